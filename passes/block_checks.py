"""Compare block lists that are passed in with the ``mask_mod`` that comes with them.

A ring follows ``mask_mod``; a kernel of flex_attention follows the lists and calls
``mask_mod`` in partial blocks alone. Invariant: where both would differ, the call fails
before anything is computed. Lists that were compared once cost nothing more.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

from ringcompile.errors import UnsupportedAttentionError
from ringcompile.passes.flex_attention import build_tables
from ringcompile.passes.scalar_graphs import run_scalars


@dataclass(frozen=True, slots=True)
class Input:
    """An input of the graph, by its number."""

    number: int


@dataclass(frozen=True, slots=True)
class BlockCheck:
    """What must hold of the lists of one block mask.

    Attributes:
        lists: number and indices of the partial, then of the full blocks of keys.
        lengths: queries and keys.
        block: queries and keys in a block.
        mask_mod: its rule; None where the lists alone are the rule.
        buffers: what that reads.
        where: the user's ``file:line`` and the node's name.
    """

    lists: tuple[Input | None, ...]
    lengths: tuple[int | Input, int | Input]
    block: tuple[int | Input, int | Input]
    mask_mod: GraphModule | None
    buffers: tuple[Input, ...]
    where: str


def check_blocks_at_calls(
    compiled: Callable[..., object], checks: Sequence[BlockCheck]
) -> Callable[..., object]:
    """Wrap ``compiled`` so that every call compares what has changed.

    Args:
        compiled: the rank's program.
        checks: what must hold.

    Returns:
        A callable that raises ``UnsupportedAttentionError`` before it runs.
    """
    if not checks:
        return compiled
    watched = [_Watched(check) for check in checks]

    def run(*args: object) -> object:
        for one in watched:
            one.check(args)
        return compiled(*args)

    return run


class _Watched:
    """A check, and the inputs for which it held last."""

    def __init__(self, check: BlockCheck) -> None:
        self._check = check
        self._held: tuple[_Mark, ...] = ()
        inputs = (*check.lists, *check.buffers, *check.lengths, *check.block)
        self._numbers = [i.number for i in inputs if isinstance(i, Input)]

    def check(self, args: Sequence[object]) -> None:
        """Compare, unless the inputs are those of the last time, unchanged."""
        given = [args[number] for number in self._numbers]
        if len(self._held) == len(given) and all(
            mark.fits(x) for mark, x in zip(self._held, given, strict=True)
        ):
            return
        with torch.no_grad():
            check_blocks(self._check, args)
        self._held = tuple(map(_Mark.of, given))


@dataclass(frozen=True, slots=True)
class _Mark:
    """By which an input is known again: a tensor that nobody wrote to, or a number."""

    tensor: weakref.ref[Tensor] | None
    value: object

    @classmethod
    def of(cls, given: object) -> "_Mark":
        if not isinstance(given, Tensor):
            return cls(None, given)
        return cls(weakref.ref(given), _version_of(given))

    def fits(self, given: object) -> bool:
        if self.tensor is None:
            return not isinstance(given, Tensor) and bool(self.value == given)
        is_same = self.tensor() is given and isinstance(given, Tensor)
        return is_same and self.value is not None and self.value == _version_of(given)


def _version_of(x: object) -> int | None:
    """How often a tensor was written to; None if that isn't counted."""
    assert isinstance(x, Tensor), "only tensors are written to"
    return None if x.is_inference() else x._version  # noqa: SLF001


def check_blocks(check: BlockCheck, args: Sequence[object]) -> None:
    """Compare the lists with the rule, a few rows of blocks at a time.

    Args:
        check: what must hold.
        args: the graph's inputs.

    Raises:
        UnsupportedAttentionError: a kernel would compute another mask.
    """
    lists = [None if i is None else args[i.number] for i in check.lists]
    queries, keys, rows, columns = (
        _read_size(x, args) for x in (*check.lengths, *check.block)
    )
    given = [x for x in lists if isinstance(x, Tensor)]
    tables = build_tables(given, -(-keys // columns))
    partial, full = tables if len(tables) > 1 else (*tables, tables[0] & False)
    for table, number in zip(tables, given[::2], strict=True):
        if int(table.sum()) != int(number.sum()):
            raise _differ(check, "some block is listed twice")
    if bool((partial & full).any()):
        raise _differ(check, "some block is listed as partial and as full")
    if check.mask_mod is None:
        return
    rule = _Rule(
        check.mask_mod,
        [args[i.number] for i in check.buffers],
        (*partial.shape[:2], queries, keys),
        (rows, columns),
        partial.device,
    )
    at_a_time = max(1, _PART // (partial.shape[0] * partial.shape[1] * rows * keys))
    for first in range(0, partial.shape[2], at_a_time):
        here = slice(first, first + at_a_time)
        listed, whole = ((x)[:, :, here] for x in (partial | full, full))
        some, all_ = rule.evaluate(first, listed.shape[2])
        lost, added = ~listed & some, whole & ~all_
        for wrong, what in ((lost, _LOST), (added, _ADDED)):
            if bool(wrong.any()):
                b, h, row, column = wrong.nonzero()[0].tolist()
                raise _differ(
                    check,
                    f"{what}: batch {b}, head {h}, queries from"
                    f" {(row + first) * rows}, keys from {column * columns}",
                )


_PART = 1 << 24  # scores at a time
_LOST = "mask_mod keeps keys in a block that is not listed"
_ADDED = "mask_mod drops keys in a block that is listed as full"


def _read_size(size: int | Input, args: Sequence[object]) -> int:
    if isinstance(size, int):
        return size
    given = args[size.number]
    assert isinstance(given, int | torch.SymInt), "a size is an integer"
    return int(given)


@dataclass(frozen=True, slots=True)
class _Rule:
    """A mask_mod over scores of this shape, in blocks."""

    mask_mod: GraphModule
    buffers: list[object]
    shape: tuple[int, ...]
    block: tuple[int, int]
    device: torch.device

    def evaluate(self, first: int, num_rows: int) -> tuple[Tensor, Tensor]:
        """Whether it keeps some keys in each block of some rows, and whether all."""
        start = first * self.block[0]
        stop = min(start + num_rows * self.block[0], self.shape[2])
        spans = [(0, size) for size in self.shape]
        spans[2] = (start, stop)
        positions = [
            torch.arange(*span, device=self.device).view(
                [-1 if d == dim else 1 for d in range(len(spans))]
            )
            for dim, span in enumerate(spans)
        ]
        kept = run_scalars(self.mask_mod, positions, self.buffers)
        kept = kept.expand([b - a for a, b in spans])
        return self._any_in_block(kept), ~self._any_in_block(~kept)

    def _any_in_block(self, kept: Tensor) -> Tensor:
        rows, columns = self.block
        kept = F.pad(kept, (0, -kept.shape[3] % columns, 0, -kept.shape[2] % rows))
        blocks = kept.unflatten(3, (-1, columns)).unflatten(2, (-1, rows))
        any_: Tensor = blocks.any(-1).any(3)
        return any_


def _differ(check: BlockCheck, because: str) -> UnsupportedAttentionError:
    return UnsupportedAttentionError(
        "flex_attention with a block mask whose lists say other than its mask_mod",
        at=check.where,
        because=because,
        instead="create_block_mask of the same mask_mod and tensors, or"
        " BlockMask.from_kv_blocks without a mask_mod",
    )
