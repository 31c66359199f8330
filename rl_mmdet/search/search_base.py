"""What all searches share: a policy draws gates before each step of the training, and learns after it."""
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..replacement.checks import check_number
from .policy import Policy

Collective = Callable[[Tensor], Any]
"""Changes a tensor in place together with all other processes."""


class SearchResult(NamedTuple):
    """What a search has ended with: the ordinary ``plan`` or ``transfer`` for a config, and a text for the log."""
    found: dict[str, dict[str, Any]]
    text: str


class Search:
    """Draws gates for a model's units step by step, learns which should be open, and ends with an ordinary model.

    One step of training is :meth:`sample`, forward and backward, :meth:`look`, the optimizer's step, :meth:`learn`.
    """

    def __init__(self, model: nn.Module, policy: Policy) -> None:
        check_number('steps of a search', policy.steps, whole=True, least=1)
        self.model = model
        self.policy = policy

    @property
    def done(self) -> bool:
        """Whether all steps are made, and :meth:`conclude_` can be called."""
        return self.policy.step >= self.policy.steps

    @property
    def num_settled(self) -> int:
        """How many gates don't change any more."""
        return len(self.policy.units) - int(self.policy.settled.isnan().sum())

    def sample(self) -> list[bool]:
        """Draw the gates of the next step, and let the model compute with them."""
        raise NotImplementedError

    def look(self) -> None:
        """Just before the optimizer's step: take from the gradients what is needed. By default nothing."""

    def learn(self, reduce: Collective | None = None, share: Collective | None = None) -> None:
        """After a step: learn from its gradients.

        Args:
            reduce: averages a tensor over processes.
            share: gives all processes the first one's tensor.
        """
        raise NotImplementedError

    def best(self) -> list[bool]:
        """The gates that the search would end with now."""
        return self.policy.best()

    def show_best(self) -> None:
        """Let the model compute with these gates until the next sample: for validation."""
        raise NotImplementedError

    def conclude_(self, *copies: nn.Module) -> SearchResult:
        """End the search: the model becomes an ordinary one, in place, and so do copies such as an average of it."""
        raise NotImplementedError

    def scalars(self) -> dict[str, float]:
        """For the log: of each unit the probability that its gate is open."""
        return dict(zip([unit.name for unit in self.policy.units], self.policy.probabilities().tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed search needs besides the model's own state."""
        return dict(policy=self.policy.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave; a ValueError if it is of another model or number of steps."""
        self.policy.load_state_dict(tree_map_only(Tensor, Tensor.cpu, state['policy']))  # resuming puts it on the GPU
