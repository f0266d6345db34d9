"""What a mask says about (batch, head, query, key), from what its nodes hold.

The result is a predicate of ``ir.mask`` and the nodes that it reads at run time.
Invariants: no tensor of one value per (query, key) pair is read at run time, but one
that the user passes in, or a test of it, tile by tile; equal masks built differently
give the same predicate and captures in the same order.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import sympy
import torch
from sympy import Expr
from sympy.core.function import AppliedUndef
from sympy.logic.boolalg import Boolean
from torch.fx import Node

from ringcompile.ir.mask import (
    TRUE,
    B,
    H,
    K,
    Q,
    capture,
    conjunction,
    conjuncts,
    equals_zero,
    negate,
)
from ringcompile.passes.normal_form import normalize
from ringcompile.passes.op import is_tensor, read_op, shape_of
from ringcompile.passes.read_values import Reader
from ringcompile.passes.symbolic import (
    Size,
    Unreadable,
    captures_in,
    index_symbol,
    only_expr,
    replace_terms,
)
from ringcompile.torch_private import size_expression, sizes_equal

aten = torch.ops.aten

_POSITIONS = {index_symbol(d): symbol for d, symbol in enumerate((B, H, Q, K))}


@dataclass(frozen=True, slots=True)
class ReadMask:
    """A mask and what it reads at run time.

    Attributes:
        keeps: predicate over ``b, h, q, k`` and captures.
        captures: ``captures[i]`` is the node read as ``ci``.
        may_be_empty: whether a query without any key can't be ruled out.
    """

    keeps: Boolean
    captures: tuple[Node, ...]
    may_be_empty: bool


@dataclass(slots=True)
class MaskReader:
    """Reads the masks of one graph; each is worked out once."""

    reader: Reader
    _finished: dict[object, ReadMask] = field(default_factory=dict)

    def read_mask(self, keeps: Boolean, shape: tuple[Size, ...]) -> ReadMask:
        """Finish a predicate over ``i0..i3`` of scores ``(B, H, queries, keys)``.

        Raises:
            Unreadable: it holds a value for every pair, or depends on the length.
        """
        sizes = tuple(size_expression(size) for size in shape)
        key = (keeps, sizes)
        if key not in self._finished:
            self._finished[key] = self._finish(keeps, shape, sizes)
        return self._finished[key]

    def _finish(
        self, keeps: Boolean, shape: tuple[Size, ...], sizes: tuple[Expr, ...]
    ) -> ReadMask:
        last = {s: size - 1 for s, size in zip((B, H, Q, K), sizes, strict=True)}
        p = normalize(replace_terms(keeps, _POSITIONS), last)
        for rewrite in REWRITES:
            p = normalize(rewrite(p, self.reader), last)
        p = normalize(self._fix_symbols(p, sizes), last)
        nodes = self._check_captures(p, shape)
        return ReadMask(
            replace_terms(p, _number_captures(p, self.reader, nodes)),
            nodes,
            may_be_empty=not _always_has_a_key(p, last),
        )

    def _fix_symbols(self, p: Boolean, sizes: tuple[Expr, ...]) -> Boolean:
        """Fix sizes other than B and S, such as a window, to their value at hand."""
        free = p.free_symbols - {B, H, Q, K}
        lengths = {s for size in sizes for s in size.free_symbols}
        if free & lengths:
            raise Unreadable(f"its rule changes with the size {min(map(str, free))}")
        known = self.reader.fix_symbols(free)
        return replace_terms(p, {s: sympy.Integer(n) for s, n in known.items()})

    def _check_captures(self, p: Boolean, shape: tuple[Size, ...]) -> tuple[Node, ...]:
        reads = captures_in(p)
        nodes = {self.reader.node_of(read) for read in reads}
        given = {n for n in nodes if self._is_given(n)}
        for read in reads:
            if self.reader.node_of(read) not in given:
                _check_reads_one_token(read, self.reader.node_of(read))
        for node in nodes - given:
            _check_small(node, shape)
        return tuple(sorted(nodes, key=self.reader.place_of))

    def _is_given(self, node: Node) -> bool:
        """Whether it is on every rank whatever is done here: passed in, or by one test.

        A test of floats that are passed in is a quarter of what is there already.
        """
        return node.op == "placeholder" or self.reader.tests_input(node)


def _number_captures(
    p: Boolean, reader: Reader, nodes: tuple[Node, ...]
) -> dict[Expr, Expr]:
    return {
        read: capture(nodes.index(reader.node_of(read)), *read.args)
        for read in captures_in(p)
    }


def _always_has_a_key(p: Boolean, last: dict[sympy.Symbol, Expr]) -> bool:
    """Whether each query sees the first key, or the one at its own position."""
    keys = [sympy.S.Zero]
    if (last[K] - last[Q]).is_nonnegative:
        keys.append(Q)
    return any(normalize(replace_terms(p, {K: key}), last) == TRUE for key in keys)


# ---- what may be read at run time ----------------------------------------------------


def _check_reads_one_token(read: AppliedUndef, node: Node) -> None:
    if all(isinstance(e, sympy.floor) for e in read.args if e.has(Q, K)):
        return  # it holds a value for every pair of blocks
    tokens = [e.free_symbols & {Q, K} for e in read.args]
    if sum(map(len, tokens)) > 1:
        raise Unreadable(
            f"{node.name} {list(shape_of(node))} holds a value for every pair of tokens"
            " that is known at run time only"
        )


def _check_small(node: Node, shape: tuple[Size, ...]) -> None:
    """No tensor that leads to a capture may have one element per pair of tokens."""
    seen = set()
    work = [node]
    while work:
        n = work.pop()
        if n in seen:
            continue
        seen.add(n)
        work += n.all_input_nodes
        if is_tensor(n) and not _is_small(shape_of(n), shape):
            raise Unreadable(
                f"{n.name} {list(shape_of(n))}, which it is computed from, holds a"
                " value for every pair of tokens"
            )


def _is_small(shape: Iterable[Size], scores: tuple[Size, ...]) -> bool:
    """Whether a shape holds no value for each pair of tokens of ``scores``."""
    batch, _, *lengths = scores
    dims = list(shape)
    if dims and sizes_equal(dims[0], batch):
        dims = dims[1:]
    spans = [any(sizes_equal(size, length) for length in lengths) for size in dims]
    return sum(spans) <= 1 and not any(
        sizes_equal(size, length * lengths[1]) for size in dims for length in lengths
    )


# ---- theorems ------------------------------------------------------------------------


def straighten_runs(p: Boolean, reader: Reader) -> Boolean:
    """Inside a run of consecutive position ids, differences of ids are of positions.

    If ``c0 = cumsum(diff(c1, prepend=...) != 1)`` then ``c0(b, q) == c0(b, k)`` says
    that no id between q and k breaks the count: ``c1(b, k) == c1(b, q) + k - q``.
    """
    facts = conjuncts(p)
    for fact in facts:
        run = _find_run(fact, reader)
        if run:
            facts = tuple(f if f == fact else run.straighten(f) for f in facts)
    return conjunction(*facts)


@dataclass(frozen=True, slots=True)
class _Run:
    """``there == here + distance``, of two reads of the same position ids."""

    here: AppliedUndef
    there: AppliedUndef
    distance: Expr

    def straighten(self, p: Boolean) -> Boolean:
        """Write ids as positions where that takes every id out of ``p``."""
        straight = replace_terms(p, {self.there: self.here + self.distance})
        left = {read.func for read in captures_in(straight)}
        return p if self.here.func in left else straight


def _find_run(fact: Boolean, reader: Reader) -> _Run | None:
    """The run of ids in which ``c0(.. u ..) == c0(.. w ..)`` places both."""
    match sorted(captures_in(fact), key=str):
        case here, there if fact == equals_zero(here - there):
            pass
        case _:
            return None
    if here.func != there.func:
        return None
    ids = _find_position_ids(reader, reader.node_of(here))
    pairs = zip(here.args, there.args, strict=True)
    differ = [d for d, (u, w) in enumerate(pairs) if u != w]
    if ids is None or differ != [ids.dim]:
        return None
    distance = there.args[ids.dim] - here.args[ids.dim]
    return _Run(ids.at(here.args), ids.at(there.args), distance)


@dataclass(frozen=True, slots=True)
class _PositionIds:
    """Position ids that a run count was made of, and the dim it counts along."""

    ids: AppliedUndef
    dim: int

    def at(self, index: tuple[Expr, ...]) -> AppliedUndef:
        return self.ids.xreplace({index_symbol(d): e for d, e in enumerate(index)})


def _find_position_ids(reader: Reader, node: Node) -> _PositionIds | None:
    """The ids ``x`` if ``node`` is ``cumsum(diff(x, prepend=<one>) != 1)``."""
    cumsum = read_op(node)
    if cumsum is None or cumsum.packet is not aten.cumsum:
        return None
    breaks = reader.read(cumsum.args["self"]).content
    steps = captures_in(breaks) if isinstance(breaks, Boolean) else set()
    if len(steps) != 1:
        return None
    step = steps.pop()
    diff = read_op(reader.node_of(step))
    if breaks != negate(equals_zero(step - 1)) or diff is None:
        return None
    if diff.packet is not aten.diff or diff.args["n"] != 1 or diff.args["append"]:
        return None
    ndim = len(shape_of(node))
    dim = cumsum.args["dim"] % ndim
    if diff.args["dim"] % ndim != dim or not _prepends_one(diff.args["prepend"], dim):
        return None
    ids = only_expr(reader.read(diff.args["self"]).content)
    return _PositionIds(ids, dim) if isinstance(ids, AppliedUndef) else None


def _prepends_one(prepended: Node | None, dim: int) -> bool:
    return prepended is not None and sizes_equal(shape_of(prepended)[dim], 1)


REWRITES = (straighten_runs,)
