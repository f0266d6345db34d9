"""What is added to scores, or put in their place: masks and biases.

A tensor that is added is taken apart into masks, whose rule is read, and biases, whose
values are carried. Invariant: what is no mask is added as it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import sympy
import torch
from sympy import Expr
from sympy.logic.boolalg import Boolean
from torch.fx import Node

from ringcompile.ir.mask import negate
from ringcompile.passes.coordinates import (
    BATCH,
    COLUMN,
    HEAD,
    ROW,
    Grid,
    align,
    climb,
    is_view_of,
    read_index_map,
)
from ringcompile.passes.op import Op, is_float, is_tensor, read_op, shape_of
from ringcompile.passes.operands import CASTS, NOT_FOLLOWED
from ringcompile.passes.read_score import BiasTerm, Score, check_drops, round_to
from ringcompile.passes.read_values import Reader
from ringcompile.passes.regions import BiasOperand
from ringcompile.passes.symbolic import (
    Case,
    Content,
    Size,
    Unreadable,
    merge_cases,
    read_truth,
)
from ringcompile.passes.value_scalars import holds_tensor, is_constant, read_scalar
from ringcompile.torch_private import sizes_equal

aten = torch.ops.aten


class Place(Protocol):
    """Where scores stand that something is added to."""

    @property
    def index(self) -> Sequence[Expr]:
        """Of the scores' elements."""

    @property
    def grid(self) -> Grid:
        """Batch and heads."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the sum."""


def add_tensor(
    reader: Reader, node: Node, place: Place, score: Score, *, factor: float = 1.0
) -> Score:
    """Scores with ``factor`` times a tensor added."""
    added = _Added(reader, place)
    added.take(node, align(node, place.index), factor)
    for mask in added.masks:
        score = score.add(mask, place.dtype)
    for bias in added.biases:
        score = score.bias(bias)
    return score


@dataclass(slots=True)
class _Added:
    """The masks and biases that a sum consists of."""

    reader: Reader
    place: Place
    masks: list[Content] = field(default_factory=list)
    biases: list[BiasTerm] = field(default_factory=list)

    def take(self, node: Node, index: Sequence[Expr], factor: float) -> None:
        mask = self._read_mask(node, index) if factor == 1 else None
        if mask is not None:
            self.masks.append(mask)
            return
        if not is_float(node):
            # Raise what keeps it from being read.
            self.reader.read(node)
            raise Unreadable(f"{node.name} is added to scores, and isn't float")
        parts = _Added(self.reader, self.place)
        parts._take_apart(node, index, factor)
        if parts.masks:
            self.masks += parts.masks
            self.biases += parts.biases
        else:
            self.biases.append(BiasTerm(node, tuple(index), factor))

    def _read_mask(self, node: Node, index: Sequence[Expr]) -> Content | None:
        """What a tensor adds, if it only keeps and drops keys."""
        try:
            content = self.reader.read(node).at(index)
            Score(1.0).add(content, self.place.dtype)
        except Unreadable:
            return None
        return content

    def _take_apart(self, node: Node, index: Sequence[Expr], factor: float) -> None:
        op = read_op(node)
        if op is None or self.reader.is_mutated(node) or factor != 1:
            return
        if op.packet in NOT_FOLLOWED:
            return
        if op.packet is aten.add and len(op.slots) == 2 and op.args["alpha"] == 1:  # noqa: PLR2004
            for slot in op.slots:
                self.take(slot, align(slot, index), factor)
        elif read_index_map(op) is not None or (
            op.packet in CASTS and is_float(op.slots[0])
        ):
            slot = op.slots[0]
            self.take(slot, climb(op, slot, index, self.place.grid), factor)
        elif op.packet in (aten.where, aten.masked_fill):
            self._take_filled(op, index)

    def _take_filled(self, op: Op, index: Sequence[Expr]) -> None:
        """``where(keeps, x, -inf)`` adds x and drops the other keys."""
        try:
            dropped, number, kept = _read_filled(self.reader, op, index)
            check_drops(number, self.place.dtype)
        except Unreadable:
            return
        cases = [Case(dropped, number), Case(negate(dropped), 0.0)]
        self.masks.append(merge_cases(cases))
        self.take(kept, align(kept, index), 1.0)


def _read_filled(
    reader: Reader, op: Op, index: Sequence[Expr]
) -> tuple[Boolean, float, Node]:
    """Where a number stands, which number, and what stands elsewhere."""
    dtype = op.node.meta["val"].dtype
    if op.packet is aten.masked_fill:
        mask, number, kept = (op.args[name] for name in ("mask", "value", "self"))
        dropped = _truth(reader, mask, index)
        return dropped, round_to(read_fill(reader, number), dtype), kept
    kept, number = op.args["self"], op.args["other"]
    dropped = negate(_truth(reader, op.args["condition"], index))
    try:
        return dropped, round_to(read_fill(reader, number), dtype), kept
    except Unreadable:
        return negate(dropped), round_to(read_fill(reader, kept), dtype), number


def _truth(reader: Reader, node: Node, index: Sequence[Expr]) -> Boolean:
    return read_truth(reader.read(node).at(align(node, index)))


def read_fill(reader: Reader, argument: object) -> float:
    """The one number that replaces scores."""
    if not holds_tensor(argument):
        return float(read_scalar(argument))
    assert isinstance(argument, Node), "a tensor of the graph is a node"
    content = reader.read(argument).content
    if isinstance(content, tuple) and len(content) == 1:
        number = content[0].number
        if is_constant(number):
            return float(number)
    raise Unreadable(f"{argument.name} replaces scores, and it isn't one number")


# ---- biases as operands --------------------------------------------------------------


def find_bias(term: BiasTerm, shape: tuple[Size, ...], grid: Grid) -> BiasOperand:
    """The operand that a bias is.

    Args:
        term: what is added.
        shape: ``(B, H, queries, keys)`` of the scores.
        grid: batch and heads.

    Raises:
        Unreadable: its dims are not batch, heads, queries and keys in this order.
    """
    symbols = (BATCH, HEAD, ROW, COLUMN)
    used = [any(e.has(s) for e in term.index) for s in symbols]
    view = tuple(size if has else 1 for size, has in zip(shape, used, strict=True))
    wanted = [s if has else sympy.S.Zero for s, has in zip(symbols, used, strict=True)]
    index = [grid.settle(e) for e in term.index]
    if not is_view_of(term.node, index, view, wanted):
        raise Unreadable(
            f"{term.node.name} {list(shape_of(term.node))} is added to scores, and its"
            " dims are not batch, heads, queries and keys in this order"
        )
    # A row may see keys alone that a mask of finfo.min hides: that mask must be known
    # for each row, so that their number is not lost behind it.
    by_row = used[3] and not used[2] and (not used[1] or is_given(term.node))
    shape = (*view[:2], shape[2], view[3]) if by_row else view
    return BiasOperand(term.node, view, shape, term.factor)


def is_given(node: Node) -> bool:
    """Whether a tensor follows from what the user passes in, without any parameter."""
    work, seen = [node], {node}
    while work:
        n = work.pop()
        work += [m for m in n.all_input_nodes if m not in seen]
        seen.update(n.all_input_nodes)
    inputs = [n for n in seen if n.op == "placeholder" and is_tensor(n) and is_float(n)]
    return bool(inputs) and not any(n.meta.get("is_parameter") for n in inputs)


def is_cut(bias: BiasOperand) -> bool:
    """Whether a bias has a row for each query."""
    return not sizes_equal(bias.shape[2], 1)
