"""Compare block lists that are passed in with the ``mask_mod`` that comes with them.

A ring follows ``mask_mod``; a kernel of flex_attention follows the lists and calls
``mask_mod`` in partial blocks alone. Invariant: where both would differ, the call fails
before anything is computed. Lists that were compared once cost nothing more.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
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
    block: tuple[int, int]
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
    """A check, and the tensors for which it held last."""

    def __init__(self, check: BlockCheck) -> None:
        self._check = check
        self._held: tuple[tuple[weakref.ref[Tensor], int], ...] = ()

    def check(self, args: Sequence[object]) -> None:
        """Compare, unless tensors are those of the last time, unchanged."""
        inputs = (*self._check.lists, *self._check.buffers)
        tensors = [args[i.number] for i in inputs if i is not None]
        found = [x for x in tensors if isinstance(x, Tensor)]
        if self._is_known(found):
            return
        with torch.no_grad():
            check_blocks(self._check, args)
        if not any(x.is_inference() for x in found):  # those count no versions
            self._held = tuple((weakref.ref(x), x._version) for x in found)  # noqa: SLF001

    def _is_known(self, tensors: Sequence[Tensor]) -> bool:
        return len(self._held) == len(tensors) and all(
            known() is x and version == x._version  # noqa: SLF001
            for (known, version), x in zip(self._held, tensors, strict=True)
        )


def check_blocks(check: BlockCheck, args: Sequence[object]) -> None:
    """Compare the lists with the rule, a few rows of blocks at a time.

    Args:
        check: what must hold.
        args: the graph's inputs.

    Raises:
        UnsupportedAttentionError: a kernel would compute another mask.
    """
    lists = [None if i is None else args[i.number] for i in check.lists]
    queries, keys = (_read_length(x, args) for x in check.lengths)
    given = [x for x in lists if isinstance(x, Tensor)]
    tables = build_tables(given, -(-keys // check.block[1]))
    partial, full = tables if len(tables) > 1 else (*tables, tables[0] & False)
    for table, number in zip(tables, given[::2], strict=True):
        if int(table.sum()) != int(number.sum()):
            raise _differ(check, "some block is listed twice")
    if bool((partial & full).any()):
        raise _differ(check, "some block is listed as partial and as full")
    if check.mask_mod is None:
        return
    rows = _rows_at_a_time(partial, check.block, keys)
    for first in range(0, partial.shape[2], rows):
        some, all_ = _evaluate(check, args, partial, (first, rows, queries, keys))
        here = slice(first, first + rows)
        listed = (partial | full)[:, :, here]
        _require(check, ~listed & some, first, "mask_mod keeps keys in a block not in")
        _require(
            check, full[:, :, here] & ~all_, first, "mask_mod drops keys in a full"
        )


def _read_length(length: int | Input, args: Sequence[object]) -> int:
    return length if isinstance(length, int) else int(str(args[length.number]))


def _rows_at_a_time(table: Tensor, block: tuple[int, int], keys: int) -> int:
    batch, heads, rows, _ = table.shape
    return max(1, min(rows, _PART // (batch * heads * block[0] * keys)))


_PART = 1 << 24  # scores at a time


def _evaluate(
    check: BlockCheck,
    args: Sequence[object],
    table: Tensor,
    at: tuple[int, int, int, int],
) -> tuple[Tensor, Tensor]:
    """Whether the rule keeps some keys in each block, and whether it keeps all."""
    assert check.mask_mod is not None, "lists alone need no rule"
    first, rows, queries, keys = at
    start = first * check.block[0]
    ends = (*table.shape[:2], min(queries, start + rows * check.block[0]), keys)
    starts = (0, 0, start, 0)
    positions = [
        torch.arange(a, b, device=table.device).view(
            [-1 if d == dim else 1 for d in range(len(ends))]
        )
        for dim, (a, b) in enumerate(zip(starts, ends, strict=True))
    ]
    shape = [x.numel() for x in positions]
    buffers = [args[i.number] for i in check.buffers]
    kept = run_scalars(check.mask_mod, positions, buffers).expand(shape)
    pads = [x for d in (3, 2) for x in (0, -shape[d] % check.block[d - 2])]
    some, none = (
        _any_in_block(torch.nn.functional.pad(x, pads), check.block)
        for x in (kept, ~kept)
    )
    return some, ~none


def _any_in_block(kept: Tensor, block: tuple[int, int]) -> Tensor:
    blocks = kept.unflatten(3, (-1, block[1])).unflatten(2, (-1, block[0]))
    return blocks.any(-1).any(3)


def _require(check: BlockCheck, wrong: Tensor, first: int, what: str) -> None:
    if not bool(wrong.any()):
        return
    b, h, row, column = wrong.nonzero()[0].tolist()
    lists = "block" if "full" in what else "the lists"
    raise _differ(
        check,
        f"{what} {lists}: batch {b}, head {h}, queries from"
        f" {(row + first) * check.block[0]}, keys from {column * check.block[1]}",
    )


def _differ(check: BlockCheck, because: str) -> UnsupportedAttentionError:
    return UnsupportedAttentionError(
        "flex_attention with a block mask whose lists say other than its mask_mod",
        at=check.where,
        because=because,
        instead="create_block_mask of the same mask_mod and tensors, or"
        " BlockMask.from_kv_blocks without a mask_mod",
    )
