"""What was replaced, by whom, and why other blocks were not."""
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from .chain import Chain, Choice, as_blocks


@dataclass(frozen=True)
class BlockRow:
    """One block of one chain.

    Args:
        chain: name of the chain; ``index`` counts from 0 in it.
        name: qualified name of the block.
        kind: class name of the block.
        parameters: number of its own parameters (of the removed ones for a replaced block).
        replaced: whether a computing layer stands there.
        before, after: names of the nearest kept blocks that it takes its weights from.
        others: names of kept blocks further away that give it the tensors which have another size in those two.
        reason: why it can't be replaced, None if it can.
        learnable: number of parameters that the computing layer that stands there adds.
        only: names of the submodules that are replaced, where it isn't the whole block.
        open: whether a search decides if it is replaced.
    """
    chain: str
    index: int
    name: str
    kind: str
    parameters: int
    replaced: bool = False
    before: str | None = None
    after: str | None = None
    others: tuple[str, ...] = ()
    reason: str | None = None
    learnable: int = 0
    only: tuple[str, ...] = ()
    open: bool = False


@dataclass(frozen=True)
class ReplacementReport:
    """Every block of every chain, in the model's order, with what was done to it.

    Args:
        rows: one per block.
        settings: plan, fusion, operator and gradient, as text.
    """
    rows: tuple[BlockRow, ...]
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def replaced(self) -> Choice:
        """The choice, as the ``Blocks`` plan takes it."""
        choice: Choice = {}
        for row in self.rows:
            if row.replaced:
                choice.setdefault(row.chain, []).append(row.index)
        return choice

    @property
    def as_plan(self) -> str:
        """The choice as the plan that asks for just these blocks, ready to be pasted into a config."""
        return as_blocks(self.replaced)

    @property
    def learnable(self) -> int:
        """Number of parameters that all computing layers together add."""
        return sum(row.learnable for row in self.rows)

    @property
    def removed_parameters(self) -> int:
        """Number of parameters that the replaced blocks gave up."""
        return sum(row.parameters for row in self.rows if row.replaced)

    def __str__(self) -> str:
        if any(row.open for row in self.rows):
            return self._of_search()
        count = sum(row.replaced for row in self.rows)
        head = (f'{count} of {len(self.rows)} blocks replaced by computing layers: '
                f'{self.removed_parameters:,} parameters removed, {self.learnable:,} added')
        lines = [f'  {row.name} ({row.kind}): ' + _describe(row) for row in self.rows]
        if self.replaced and not self.settings.get('plan', '').startswith('Blocks('):
            lines.append(f'  the same choice as a plan: {self.as_plan}')
        return '\n'.join([head, *lines])

    def _of_search(self) -> str:
        head = f'{sum(row.open for row in self.rows)} of {len(self.rows)} blocks may be replaced; the search decides'
        return '\n'.join([head, *(f'  {row.name} ({row.kind}): ' + _describe(row) for row in self.rows)])


def describe_state(row: BlockRow) -> str:
    """In a word or two, whether the block is replaced, or which submodules of it are."""
    if row.open or not row.replaced:
        return 'open' if row.open else 'kept'
    return ' and '.join(row.only) + ' replaced' if row.only else 'replaced'


def _describe(row: BlockRow) -> str:
    if row.replaced:
        others = f'; tensors of another size there from {" and ".join(row.others)}' if row.others else ''
        neighbours = ' and '.join(name for name in (row.before, row.after) if name is not None)
        return f'{describe_state(row)}, from {neighbours}{others}; learns {row.learnable:,}'
    return describe_state(row) + ('' if row.reason is None else f', can\'t be replaced: {row.reason}')


def describe_blocks(chains: Mapping[str, Chain], choice: Choice) -> tuple[BlockRow, ...]:
    """The rows of a report for ``choice``, taken before any block is touched."""
    rows = []
    for name, chain in chains.items():
        chosen = choice.get(name, [])
        for index, block in enumerate(chain.blocks):
            row = dict(chain=name, index=index, name=chain.block_name(index), kind=type(block).__name__,
                       parameters=_count(block), reason=chain.why_not(index))
            if index in chosen:
                before, after = chain.neighbours(index, choice)
                used = dict.fromkeys(p for sides in chain.donors(index, choice).values() for p in sides if p)
                row.update(replaced=True, parameters=_count(block, chain.untouched(index)), only=chain.only,
                           before=before and before.name, after=after and after.name,
                           others=tuple(place.name for place in used if place not in (before, after)))
            rows.append(BlockRow(**row))
    return tuple(rows)


def with_added(rows: Iterable[BlockRow], added: Mapping[str, Iterable[nn.Parameter]]) -> tuple[BlockRow, ...]:
    """The rows with how many of the parameters learn that were added in the place of a block, by its name."""
    return tuple(replace(row, learnable=sum(p.numel() for p in added[row.name] if p.requires_grad))
                 if row.name in added else row for row in rows)


def _count(block: nn.Module, untouched: Collection[str] = ()) -> int:
    """How many parameters the block has, without those of these names."""
    return sum(parameter.numel() for name, parameter in block.named_parameters() if name not in untouched)
