"""The search for tensors to update: W' = W + g·Δ."""
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .found import Found
from .policy import Unit
from .transfers import freeze_others_, learnable


class TensorSearch:
    """Draws gates for a backbone's tensors step by step, and learns which should be updated (:class:`~.transfers.SWR`).

    The model's parameters *are* :math:`W + gΔ`: they are set before each step, and what the optimizer makes of those
    whose gate is open is the new :math:`W + Δ`. No module of the model is changed, so everything runs as ever.

    Args:
        model: that a transfer has prepared, with its pretrained weights; kept as ``model.transfer``.
        steps: length of the search.

    Example:
        >>> search = TensorSearch(backbone, steps=1000)
        >>> optimizer.register_step_pre_hook(lambda *_: search.look())
        >>> while not search.done:
        ...     search.sample()
        ...     loss(backbone(images)).backward()
        ...     optimizer.step()
        ...     search.learn()
        ...     optimizer.zero_grad()
        >>> found = search.conclude_()
    """

    def __init__(self, model: nn.Module, steps: int) -> None:
        self.model = model
        self.steps = steps
        self.parameters = dict(learnable(model))
        self.base = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        """W."""
        self.tuned = {name: tensor.clone() for name, tensor in self.base.items()}
        """W + Δ."""
        self.gates = [False] * len(self.base)
        self.gradient: Tensor | None = None
        """∂L/∂g of the optimizer's last step, until it was learned from."""
        self.drawn = False
        self._begin()

    @property
    def done(self) -> bool:
        """Whether the choice can be made."""
        return self.policy.step >= self.steps

    def sample(self) -> list[bool]:
        """Draw gates for the optimizer's next step; the same until it comes, where gradients are accumulated."""
        if not self.drawn:
            self.gates = self._draw()
            self.drawn = True
        self._set(self.gates)
        return self.gates

    @torch.no_grad()
    def look(self) -> None:
        """Just before the optimizer's step: look at the gradients; hide those of tensors with a closed gate."""
        self.gradient = torch.stack([self._of_gate(name, parameter) for name, parameter in self.parameters.items()])
        for parameter, gate in zip(self.parameters.values(), self.gates, strict=True):
            if not gate:
                parameter.grad = None

    @torch.no_grad()
    def learn(self, reduce: Callable[[Tensor], Any] | None = None,
              share: Callable[[Tensor], Any] | None = None) -> None:
        """After the optimizer's step: keep what it has made of the open tensors, and learn.

        Args:
            reduce: not needed, the parameters' gradients are those of all processes already.
            share: makes a tensor the first process's in all others, in place.
        """
        gradient, self.gradient = self.gradient, None
        if gradient is not None:
            self.drawn = False
            for (name, parameter), gate in zip(self.parameters.items(), self.gates, strict=True):
                if gate:
                    self.tuned[name].copy_(parameter)
        self._learn(gradient, share)

    def show_best(self) -> None:
        """Let the model be what it would be with the choice that would be made now: for validation."""
        self._set(self.best())

    def best(self) -> list[bool]:
        """The gates of the choice that would be made now."""
        return self.policy.best()

    @torch.no_grad()
    def conclude_(self, *copies: nn.Module) -> Found:
        """Make the choice: its tensors stay updated and learn on, all others are the pretrained ones and frozen.

        Args:
            copies: of the model, such as an average of it; their other tensors become the pretrained ones as well.
        """
        gates = self.best()
        self._set(gates)
        names = [name for name, gate in zip(self.base, gates, strict=True) if gate]
        for copy in copies:
            for name, parameter in copy.named_parameters():
                if name in self.base and name not in names:
                    parameter.copy_(self.base[name])
        for parameter in self.parameters.values():
            parameter.grad = None
        freeze_others_(self.model, names)
        whole, updated = (sum(p.numel() for p in parameters) for parameters in
                          (self.model.parameters(), (self.parameters[name] for name in names)))
        text = (f'{self.model.transfer}: {len(names)} of {len(self.base)} tensors are updated, {updated:,} of '
                f'{whole:,} parameters ({updated / whole:.4f}): {", ".join(names)}')
        self.model.transfer = None
        return Found(dict(transfer=dict(type='Tensors', names=names)), text)

    def scalars(self) -> dict[str, float]:
        """The probability of every tensor to be updated."""
        return dict(zip(self.base, self.policy.probabilities().tolist(), strict=True))

    @property
    def settled(self) -> int:
        """How many gates don't change any more."""
        return self.policy.count_settled()

    def state_dict(self) -> dict[str, Any]:
        return dict(base=self.base, tuned=self.tuned, policy=self.policy.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave.

        Raises:
            ValueError: it is of other tensors, or was for another number of steps.
        """
        if list(state['base']) != list(self.base):
            raise ValueError('the search was for other tensors')
        self.policy.load_state_dict(state['policy'])
        for mine, theirs in ((self.base, state['base']), (self.tuned, state['tuned'])):
            for name, tensor in mine.items():
                tensor.copy_(theirs[name])

    def _begin(self) -> None:
        whole = sum(parameter.numel() for parameter in self.model.parameters())
        transfer = self.model.transfer
        self.policy = transfer.settings.policy(_units(self.model, whole), transfer.budget, self.steps, transfer.budget)

    def _draw(self) -> list[bool]:
        return self.policy.sample()

    def _of_gate(self, name: str, parameter: Tensor) -> Tensor:
        if parameter.grad is None:
            return torch.zeros((), device=parameter.device)
        return (parameter.grad.float() * (self.tuned[name] - self.base[name]).float()).sum()

    def _learn(self, gradient: Tensor | None, share: Callable[[Tensor], Any] | None) -> None:
        if gradient is None:
            self.policy.step += 1
        else:
            with torch.enable_grad():
                self.policy.learn(gradient, share)
        self.policy.settle_due(self.best)

    @torch.no_grad()
    def _set(self, gates: Sequence[bool]) -> None:
        for (name, parameter), gate in zip(self.parameters.items(), gates, strict=True):
            parameter.copy_((self.tuned if gate else self.base)[name])


class GradientNormSearch(TensorSearch):
    """Looks at the gradients of a backbone's tensors for some steps (:class:`~.transfers.GradientNorm`)."""

    @property
    def done(self) -> bool:
        return self.step >= self.steps

    @property
    def settled(self) -> int:
        return 0

    def best(self) -> list[bool]:
        order = sorted(self.base, key=lambda name: -self.norms[name])
        chosen = self.model.transfer.fill(self.model, order)
        return [name in chosen for name in self.base]

    def show_best(self) -> None:
        """Nothing is updated yet."""

    def scalars(self) -> dict[str, float]:
        """The squared norms of the gradients, summed over the steps."""
        return self.norms

    def state_dict(self) -> dict[str, Any]:
        return dict(step=self.step, steps=self.steps, norms=self.norms)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if list(state['norms']) != list(self.norms):
            raise ValueError('the search was for other tensors')
        if state['steps'] != self.steps:
            raise ValueError(f'the search was to take {state["steps"]} steps and would now take {self.steps}')
        self.step, self.norms = state['step'], dict(state['norms'])

    def _begin(self) -> None:
        self.step, self.norms = 0, dict.fromkeys(self.base, 0.)

    def _draw(self) -> list[bool]:
        return [False] * len(self.base)

    def _of_gate(self, name: str, parameter: Tensor) -> Tensor:
        zero = torch.zeros((), device=parameter.device)
        return zero if parameter.grad is None else parameter.grad.float().square().sum()

    def _learn(self, gradient: Tensor | None, share: Callable[[Tensor], Any] | None) -> None:
        for name, value in zip(self.norms, [] if gradient is None else gradient.tolist(), strict=gradient is not None):
            self.norms[name] += value
        self.step += 1


def _units(model: nn.Module, whole: int) -> list[Unit]:
    tensors = learnable(model)
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    units = []
    for index, (name, parameter) in enumerate(tensors):
        owner, _, slot = name.rpartition('.')
        units.append(Unit(name, name.split('.')[0], index / max(1, len(tensors) - 1), f'{kinds[owner]}.{slot}',
                          parameter.numel(), parameter.numel() / whole))
    return units
