"""The search for tensors to update: W' = W + g·Δ."""
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .policy import Policy
from .search_base import Collective, Search, SearchResult
from .transfers import freeze_others_, learnable, tensor_units


class TensorSearch(Search):
    """Learns which tensors of a backbone are updated (:class:`~.transfers.SWR`).

    The model's parameters *are* :math:`W + gΔ`: they are set before each step, and what the optimizer makes of those
    whose gate is open is the new :math:`W + Δ`. No module of the model is changed, so everything runs as ever.

    Args:
        model: that a transfer has prepared, with its pretrained weights; the transfer is kept as ``model.transfer``.
        steps: length of the search.

    Attributes:
        base: W by name.
        tuned: W + Δ by name.
        gradient: ∂L/∂g of the optimizer's last step; None once it was learned from.

    Example:
        >>> search = TensorSearch(backbone, steps=1000)
        >>> optimizer.register_step_pre_hook(lambda *_: search.look())
        >>> while not search.done:
        ...     search.sample()
        ...     loss(backbone(images)).backward()
        ...     optimizer.step()
        ...     search.learn()
        ...     optimizer.zero_grad()
        >>> found, text = search.conclude_()
    """

    def __init__(self, model: nn.Module, steps: int) -> None:
        room = model.transfer.room(model)
        super().__init__(model, Policy(tensor_units(model), room, steps, room / 100, model.transfer.schedule.seed))
        self.parameters = dict(learnable(model))
        self.base = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.tuned = {name: tensor.clone() for name, tensor in self.base.items()}
        self.gates: list[bool] | None = None
        self.gradient: Tensor | None = None

    def sample(self) -> list[bool]:
        """Draw the gates of the optimizer's next step; the same until it comes, where gradients are accumulated."""
        self.gates = self.gates or self.policy.sample()
        self._set(self.gates)
        return self.gates

    @torch.no_grad()
    def look(self) -> None:
        """Just before the optimizer's step: look at the gradients, and hide those of tensors with a closed gate."""
        device = next(iter(self.base.values())).device
        self.gradient = torch.stack([
            torch.zeros((), device=device) if parameter.grad is None else
            (parameter.grad.float() * (self.tuned[name] - self.base[name]).float()).sum()
            for name, parameter in self.parameters.items()])
        for parameter, gate in zip(self.parameters.values(), self.gates, strict=True):
            if not gate:
                parameter.grad = None

    def learn(self, reduce: Collective | None = None, share: Collective | None = None) -> None:
        """After a step: keep what the optimizer has made of the open tensors, and learn; ``reduce`` isn't needed."""
        if self.gradient is not None:
            for (name, parameter), gate in zip(self.parameters.items(), self.gates, strict=True):
                if gate:
                    self.tuned[name].copy_(parameter.detach())
            self.gates = None
        gradient, self.gradient = self.gradient, None
        self.policy.learn(gradient, share)

    def show_best(self) -> None:
        self._set(self.best())

    @torch.no_grad()
    def conclude_(self, *copies: nn.Module) -> SearchResult:
        """The chosen tensors stay updated and learn on; all others are the pretrained ones and frozen, in copies too.
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
        return SearchResult(dict(transfer=dict(type='Tensors', names=names)), text)

    def state_dict(self) -> dict[str, Any]:
        return dict(base=self.base, tuned=self.tuned, **super().state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for mine, theirs in ((self.base, state['base']), (self.tuned, state['tuned'])):
            for name, tensor in mine.items():
                tensor.copy_(theirs[name])

    @torch.no_grad()
    def _set(self, gates: Sequence[bool]) -> None:
        """Let the parameters be W + gΔ."""
        for (name, parameter), gate in zip(self.parameters.items(), gates, strict=True):
            parameter.copy_((self.tuned if gate else self.base)[name])
