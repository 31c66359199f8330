"""Which convolutions hand their output to one BatchNorm and to nothing else: proved by tracing, not read off names."""
import copy
import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Collection
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .._torch_compat import other_ways_forward

CHECKPOINTING = ('with_cp', 'grad_checkpointing')
"""Attributes that make mmdet's and timm's modules checkpoint activations; it can't be traced through."""
Pairs = dict[str, str]


def find_pairs(model: nn.Module, wanted: Callable[[nn.Module], bool],
               runs: Callable[[nn.Module], nn.Module | None] | None = None) -> Pairs:
    """The norm behind each convolution of ``model``, both by name, in the order in which they run.

    A pair is taken if a trace with :mod:`torch.fx` says so, and none says otherwise: the two are called once, one after
    the other, and nothing else sees what is between them. Modules that can't be traced are looked into: their children
    are traced by themselves. So are the modules that others run, and other ways forward (``rfp_forward``). All is done
    on a copy, with BatchNorm in eval mode, and must be so with the rest in train and in eval mode.

    Args:
        model: left as it is.
        wanted: which convolutions and norms are looked for. Those with hooks and those that stand in several places
            are left out in any case.
        runs: see :func:`~.fold_norm.fold_norm_`.
    """
    places = Counter(id(child) for module in model.modules() for child in module._modules.values())
    fine = {name: module for name, module in model.named_modules()
            if wanted(module) and places[id(module)] == 1 and not _hooked(module)}
    if not all(any(isinstance(module, kind) for module in fine.values()) for kind in (nn.Conv2d, _BatchNorm)):
        return {}
    sketch = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    roots = [('', sketch)]
    closed: dict[nn.Module, nn.Module] = {}
    for name, module in sketch.named_modules() if runs is not None else ():
        inside = runs(module)
        if inside is not None:
            closed[module] = inside
            roots.append((name, inside))
            for way in other_ways_forward(type(inside)):  # a trace doesn't enter these, either
                module.__dict__[way] = partial(_call, module)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.enable_grad():
        warnings.simplefilter('ignore')
        training, evaluating = (_Search(roots, closed, mode) for mode in (True, False))
    refused = training.refused | evaluating.refused
    return {conv: norm for conv, norm in training.pairs.items()
            if evaluating.pairs.get(conv) == norm and {conv, norm} <= fine.keys() - refused}


class _Search:
    """What the traces of a model's modules say.

    Args:
        roots: where to start, with their names.
        closed: modules that aren't entered: what they run is among the roots.
        mode: whether they train.

    Attributes:
        pairs: names of convolutions and of the norms behind them, seen in some trace.
        refused: names of those that some trace has seen in another way.
    """

    def __init__(self, roots: list[tuple[str, nn.Module]], closed: Collection[nn.Module], mode: bool) -> None:
        self.closed = closed
        self.pairs: Pairs = {}
        self.refused: set[str] = set()
        self.opaque: set[type] = set()
        for path, root in roots:
            _set_modes(root, mode)
            self.look(path, root)
            self.look_at_other_ways(path, root)

    def look(self, path: str, root: nn.Module) -> None:
        """Trace a module or, where that isn't possible, its children."""
        graph = self._trace(root, 'forward')
        if graph is None:
            inside = root.named_children()
        else:
            self._note(path, root, graph)
            called = dict.fromkeys(node.target for node in graph.nodes if node.op == 'call_module')
            inside = [(name, root.get_submodule(name)) for name in called]
            inside = [(name, module) for name, module in inside if type(module) in self.opaque]
        for name, child in inside:
            if child not in self.closed:
                self.look(_join(path, name), child)

    def look_at_other_ways(self, path: str, root: nn.Module) -> None:
        """Trace the other ways forward of all modules; where that isn't possible, nothing inside is taken."""
        for name, module in root.named_modules():
            for way in other_ways_forward(type(module)):
                if not isinstance(getattr(type(module), way), FunctionType):
                    continue
                graph = self._trace(module, way)
                if graph is None:
                    self.refused |= {_join(path, name, inner) for inner, _ in module.named_modules()}
                else:
                    self._note(_join(path, name), module, graph)

    def _trace(self, root: nn.Module, way: str) -> fx.Graph | None:
        """The graph of a module's method, modules in it that can't be traced as they stand; None if itself can't."""
        while way not in vars(root):
            tracer = _Tracer(way, self.opaque, self.closed)
            try:
                return tracer.trace(root, _defaults(root, way))
            except Exception:  # whatever a module's code does with what stands for a tensor
                if tracer.failed is None or tracer.failed in self.opaque:
                    return None
                self.opaque.add(tracer.failed)
        return None

    def _note(self, path: str, root: nn.Module, graph: fx.Graph) -> None:
        """What a graph says of the modules that it calls."""
        calls = [node for node in graph.nodes if node.op == 'call_module']
        count = Counter(node.target for node in calls)
        named = {node: _join(path, node.target) for node in calls}
        good = set()
        for norm in calls:
            conv = norm.args[0] if len(norm.args) == 1 and not norm.kwargs else None
            if (conv in named and isinstance(root.get_submodule(conv.target), nn.Conv2d) and len(conv.users) == 1
                    and isinstance(root.get_submodule(norm.target), _BatchNorm)
                    and len(conv.args) == 1 and not conv.kwargs and count[conv.target] == count[norm.target] == 1
                    and conv.meta['grad'] == norm.meta['grad']
                    and self.pairs.setdefault(named[conv], named[norm]) == named[norm]):
                good |= {conv, norm}
        self.refused |= {name for node, name in named.items() if node not in good}


class _Tracer(fx.Tracer):
    """Traces a module's method ``way``; modules of ``opaque`` classes and ``closed`` ones are not entered.

    Attributes:
        failed: class of the innermost module, other than the traced one, in which the trace failed.
    """

    def __init__(self, way: str, opaque: set[type], closed: Collection[nn.Module]) -> None:
        super().__init__()
        self.closed = closed
        self.traced_func_name = way
        self.opaque = opaque
        self.failed: type | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (m in self.closed or isinstance(m, (nn.Conv2d, _BatchNorm)) or type(m) in self.opaque
                or super().is_leaf_module(m, module_qualified_name))

    def call_module(self, m: nn.Module, *args, **kwargs):
        try:
            return super().call_module(m, *args, **kwargs)
        except Exception:
            self.failed = self.failed or (None if type(m) is type(self.root) else type(m))
            raise

    def create_node(self, *args, **kwargs) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta['grad'] = torch.is_grad_enabled()
        return node


def _call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """In the place of another way forward of a closed module."""
    return module(*args, **kwargs)


def _defaults(root: nn.Module, way: str) -> dict:
    """The method's optional arguments, which stand in the trace as they are by default."""
    parameters = inspect.signature(getattr(type(root), way)).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not each.empty}


def _set_modes(root: nn.Module, train: bool) -> None:
    """Modes and settings of a copy; ``train()`` would let a backbone decide."""
    for module in root.modules():
        module.training = train and not isinstance(module, _BatchNorm)
        for name in CHECKPOINTING:
            if name in vars(module):
                setattr(module, name, False)


def _hooked(module: nn.Module) -> bool:
    """Whether hooks see the module's input or output."""
    return any((module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks))


def _join(*parts: str) -> str:
    return '.'.join(filter(None, parts))
