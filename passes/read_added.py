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
from torch import Tensor
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
from ringcompile.passes.operands import NOT_FOLLOWED, PRODUCTS, is_widened
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
    added.take(node, align(shape_of(node), place.index), factor)
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
        if self.reader.is_mutated(node):
            raise Unreadable(f"{node.name} is changed in place")
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
        if op is None or op.packet in NOT_FOLLOWED or factor != 1:
            return
        if op.packet is aten.add and len(op.slots) == 2 and op.args["alpha"] == 1:  # noqa: PLR2004
            for slot in op.slots:
                self.take(slot, align(shape_of(slot), index), factor)
        elif read_index_map(op) is not None or is_widened(op):
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
        self.take(kept, align(shape_of(kept), index), 1.0)


def _read_filled(
    reader: Reader, op: Op, index: Sequence[Expr]
) -> tuple[Boolean, float, Node]:
    """Where a number stands, which number, and what stands elsewhere."""
    dtype = op.node.meta["val"].dtype
    if op.packet is aten.masked_fill:
        mask, number, kept = (op.args[name] for name in ("mask", "value", "self"))
        dropped = read_condition(reader, mask, index)
        return dropped, round_to(read_number(reader, number, REPLACES), dtype), kept
    kept, number = op.args["self"], op.args["other"]
    dropped = negate(read_condition(reader, op.args["condition"], index))
    try:
        return dropped, round_to(read_number(reader, number, REPLACES), dtype), kept
    except Unreadable:
        return (
            negate(dropped),
            round_to(read_number(reader, kept, REPLACES), dtype),
            number,
        )


def read_condition(reader: Reader, node: Node, index: Sequence[Expr]) -> Boolean:
    """Where a mask holds, over ``i0 .. i3``.

    Args:
        reader: reads the graph.
        node: the mask.
        index: of the elements of what it broadcasts to.
    """
    return read_truth(reader.read(node).at(align(shape_of(node), index)))


REPLACES = "replaces scores"


def read_number(reader: Reader, argument: object, does: str) -> float:
    """The one number that an argument is everywhere.

    Args:
        reader: reads the graph.
        argument: a number, or a tensor.
        does: what it does to scores, for the error.

    Raises:
        Unreadable: it is a tensor of several numbers, or of unknown ones.
    """
    if not holds_tensor(argument):
        return float(read_scalar(argument))
    assert isinstance(argument, Node), "a tensor of the graph is a node"
    content = reader.read(argument).content
    if isinstance(content, tuple) and len(content) == 1:
        number = content[0].number
        if is_constant(number):
            return float(number)
    raise Unreadable(f"{argument.name} {does}, and it isn't one number")


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
    by_row = used[3] and not used[2] and (not used[1] or may_hide(term.node))
    shape = (*view[:2], shape[2], view[3]) if by_row else view
    return BiasOperand(term.node, view, shape, term.factor)


_HUGE = 1e30


def may_hide(node: Node, above: float = _HUGE) -> bool:
    """Whether a bias may hold numbers as low as ``finfo.min``, which hide a key.

    It may if it follows from floats that are passed in, or from such a number; what a
    layer or a table of weights gives is taken for moderate.

    Args:
        node: the bias.
        above: how large a number must be to count as one.
    """
    above = min(above, _HUGE)
    work, seen = [node], {node}
    while work:
        n = work.pop()
        if n.op == "placeholder":
            if is_tensor(n) and is_float(n) and not n.meta.get("is_parameter"):
                return True
            continue
        if n.op == "get_attr" and _is_huge(
            getattr(n.graph.owning_module, str(n.target)), above
        ):
            return True
        op = read_op(n)
        if op is None or op.packet in _MODERATE:
            continue
        if any(_is_huge(value, above) for value in op.args.values()):
            return True
        work += [m for m in n.all_input_nodes if m not in seen]
        seen.update(n.all_input_nodes)
    return False


def _is_huge(value: object, above: float) -> bool:
    if isinstance(value, Tensor):
        return value.is_floating_point() and bool((value.abs() > above).any())
    return isinstance(value, int | float) and abs(value) > above


_MODERATE = {*PRODUCTS, aten.linear, aten.einsum, aten.embedding, aten.softmax}


def is_cut(bias: BiasOperand) -> bool:
    """Whether a bias has a row for each query."""
    return not sizes_equal(bias.shape[2], 1)
