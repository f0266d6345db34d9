"""Spell products of two tensors as ``matmul``: einsums, and sums of broadcast products.

A product is read by a letter for each dim, whatever their order. Where an operand has
several rows, all but the one over tokens are taken for more of the batch. Invariant:
the graph computes what it did.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from ringcompile.passes.autocast import has_autocast
from ringcompile.passes.find_softmax import find_spelled
from ringcompile.passes.functional import call_like
from ringcompile.passes.memory import find_base, find_mutated
from ringcompile.passes.op import Op, is_float, read_op, shape_of
from ringcompile.passes.operands import carries_sequence
from ringcompile.torch_private import sizes_equal

aten = torch.ops.aten

_PAIR = 2
Letters = tuple[str, ...]


def spell_products(graph: Graph) -> int:
    """Write what is one plain product, or a product of an attention, as ``matmul``."""
    edits = 0
    for node in graph.find_nodes(op="call_function", target=aten.einsum.default):
        op = read_op(node)
        term = None if op is None else _read_einsum(op)
        if term is not None and term.is_plain:
            edits += _spell(node, term, frozenset(), place=node)
    sums = {} if has_autocast(graph) else _find_sums(graph)
    for node, weights in _find_products(graph, sums).items():
        op = read_op(node)
        assert op is not None, "a product is an op"
        if op.packet is aten.einsum:
            edits += _spell(node, _read_einsum(op), weights, place=node)
        elif op.packet is aten.sum:
            edits += _spell(node, _read_sum(op), weights, place=op.slots[0])
    return edits


def _find_products(
    graph: Graph, sums: Mapping[Node, Node]
) -> dict[Node, frozenset[Node]]:
    """Every product that makes scores, or uses weights: what weights may be in it."""
    found: dict[Node, frozenset[Node]] = {}
    for spelled in find_spelled(graph, sums):
        weights = frozenset((spelled.softmax.weights, *spelled.way_out))
        found.setdefault(spelled.way_down[0], frozenset())
        found.update(dict.fromkeys(spelled.outputs, weights))
    return found


def _find_sums(graph: Graph) -> dict[Node, Node]:
    """The sum of each product of two broadcast tensors that is nothing but summed."""
    mutated = find_mutated(graph)
    sums = {}
    for node in graph.find_nodes(op="call_function", target=aten.sum.dim_IntList):
        op = read_op(node)
        if op is None or _read_sum(op) is None or find_base(op.slots[0]) in mutated:
            continue
        if len(op.slots[0].users) == 1:
            sums[op.slots[0]] = node
    return sums


# ---- a product by its letters --------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Term:
    """A product of two tensors, summed over the letters that the result lacks.

    Attributes:
        operands: the tensors.
        letters: of the dims of each; a dim of size 1 that is broadcast has none ("").
        result: letters of the result.
    """

    operands: tuple[Node, Node]
    letters: tuple[Letters, Letters]
    result: Letters

    @property
    def batch(self) -> Letters:
        """Letters of both operands and of the result."""
        left, right = self.letters
        return tuple(i for i in left if i and i in right and i in self.result)

    @property
    def inner(self) -> Letters:
        """Letters that are summed over."""
        left, right = self.letters
        return tuple(i for i in left if i in right and i not in (*self.result, ""))

    def own(self, side: int) -> Letters:
        """Letters that one operand alone has."""
        other = self.letters[1 - side]
        return tuple(i for i in self.letters[side] if i and i not in other)

    @property
    def is_product(self) -> bool:
        """Whether it is a product of matrices, however many dims spell their sides."""
        terms = [[i for i in term if i] for term in (*self.letters, self.result)]
        if any(len(set(term)) != len(term) for term in terms):
            return False
        known = {*self.batch, *self.own(0), *self.own(1)}
        return bool(
            self.inner
            and self.own(0)
            and self.own(1)
            and known == set(self.result)
            and all(map(is_float, self.operands))
        )

    @property
    def is_plain(self) -> bool:
        """Whether each side of the matrices is spelled by one dim."""
        sides = (self.inner, self.own(0), self.own(1))
        return all(len(s) == 1 for s in sides) and "" not in sum(self.letters, ())


def _read_einsum(op: Op) -> _Term | None:
    """An einsum of two tensors; an ellipsis stands for letters of its own."""
    inputs, arrow, result = op.args["equation"].replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow or len(terms) != _PAIR or len(op.slots) != _PAIR or op.args["path"]:
        return None
    left, right = (
        _write_out(term, len(shape_of(x)))
        for term, x in zip(terms, op.slots, strict=True)
    )
    return _make_term(
        op.slots, (left, right), _write_out(result, len(shape_of(op.node)))
    )


def _write_out(term: str, ndim: int) -> Letters:
    before, ellipsis, after = term.partition("...")
    if not ellipsis:
        return tuple(term)
    count = ndim - len(before) - len(after)
    return (*before, *(f".{i}" for i in range(count, 0, -1)), *after)


def _read_sum(op: Op) -> _Term | None:
    """``(x * y).sum(dims)`` of tensors that broadcast against each other."""
    product = read_op(op.slots[0])
    if product is None or product.packet is not aten.mul or len(product.slots) != _PAIR:
        return None
    if op.args["keepdim"] or not op.args["dim"] or op.args["dtype"] is not None:
        return None
    if len({n.meta["val"].dtype for n in (*product.slots, op.node)}) != 1:
        return None
    ndim = len(shape_of(product.node))
    every = tuple(f".{i}" for i in range(ndim, 0, -1))
    gone = {int(dim) % ndim for dim in op.args["dim"]}
    left, right = (every[ndim - len(shape_of(x)) :] for x in product.slots)
    result = tuple(i for d, i in enumerate(every) if d not in gone)
    return _make_term(product.slots, (left, right), result)


def _make_term(
    operands: Sequence[Node], letters: tuple[Letters, Letters], result: Letters
) -> _Term | None:
    left, right = operands
    sizes = [
        dict(zip(term, shape_of(x), strict=True))
        for term, x in zip(letters, operands, strict=True)
    ]
    kept = [
        tuple("" if _is_broadcast(i, own, other) else i for i in term)
        for term, own, other in zip(letters, sizes, sizes[::-1], strict=True)
    ]
    term = _Term((left, right), (kept[0], kept[1]), result)
    return term if term.is_product else None


def _is_broadcast(letter: str, own: dict, other: dict) -> bool:  # type: ignore[type-arg]
    """Whether a dim of size 1 meets one of another size."""
    if letter not in other or sizes_equal(own[letter], other[letter]):
        return False
    return bool(sizes_equal(own[letter], 1))


# ---- the product as matrices ---------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Sides:
    """Letters of the rows of an operand's matrices, and of more matrices."""

    rows: Letters
    more: Letters


def _choose_sides(term: _Term, side: int, weights: frozenset[Node]) -> _Sides | None:
    """The letter over tokens is the row, the others are more of the batch.

    V's letters, if the other operand are weights, and those of what has no tokens are
    features: rows all together. Of several letters over tokens, as inputs have them,
    the one with as many as there are keys is the row.
    """
    own = term.own(side)
    letters, node = term.letters[side], term.operands[side]
    tokens = [i for i in own if carries_sequence(node, letters.index(i))]
    if len(own) == 1 or not tokens or term.operands[1 - side] in weights:
        return _Sides(own, ())
    keys = term.inner if node in weights else term.own(1 - side)
    if len(tokens) > 1 and len(keys) == 1:
        (number,) = _sizes(term, 1 - side, keys)
        tokens = [i for i in tokens if sizes_equal(_sizes(term, side, (i,))[0], number)]
    if len(tokens) != 1:
        return None
    return _Sides((tokens[0],), tuple(i for i in own if i != tokens[0]))


def _spell(
    node: Node, term: _Term | None, weights: frozenset[Node], *, place: Node
) -> int:
    """Write a product before ``place``; return the number of edits."""
    if term is None:
        return 0
    left, right = (_choose_sides(term, side, weights) for side in (0, 1))
    if left is None or right is None or not _can_flatten(term, (left, right)):
        return 0
    batch = (*term.batch, *left.more, *right.more)
    orders = ((batch, left.rows, term.inner), (batch, term.inner, right.rows))
    with node.graph.inserting_before(place):
        matrices = [
            _arrange(x, letters, order, like=node)
            for x, letters, order in zip(
                term.operands, term.letters, orders, strict=True
            )
        ]
        product = call_like(node, aten.matmul.default, *matrices)
        for dim, side, rows in ((-2, 0, left.rows), (-1, 1, right.rows)):
            if len(rows) > 1:
                sizes = _sizes(term, side, rows)
                product = call_like(node, aten.unflatten.int, product, dim, sizes)
        order = (*batch, *left.rows, *right.rows)
        dims = [order.index(i) for i in term.result]
        result = _permute(product, dims, like=node)
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)
    return 1


def _can_flatten(term: _Term, sides: Sequence[_Sides]) -> bool:
    """Whether all sizes are known that rows are taken apart into again."""
    return all(
        len(s.rows) == 1 or all(isinstance(n, int) for n in _sizes(term, side, s.rows))
        for side, s in enumerate(sides)
    )


def _sizes(term: _Term, side: int, letters: Letters) -> list[int]:
    shape = shape_of(term.operands[side])
    return [shape[term.letters[side].index(i)] for i in letters]


def _arrange(
    node: Node, letters: Letters, order: tuple[Letters, Letters, Letters], *, like: Node
) -> Node:
    """An operand as ``(*batch, rows, columns)``, dims that it lacks of size 1."""
    batch, *matrix = order
    for dim in reversed([d for d, i in enumerate(letters) if not i]):
        node = call_like(like, aten.squeeze.dim, node, dim)
    letters = tuple(i for i in letters if i)
    wanted = [i for group in order for i in group if i in letters]
    node = _permute(node, [letters.index(i) for i in wanted], like=like)
    start = len(wanted) - sum(map(len, matrix))
    for dim, group in enumerate(matrix, start):
        if len(group) > 1:
            end = dim + len(group) - 1
            node = call_like(like, aten.flatten.using_ints, node, dim, end)
    for dim, i in enumerate(batch):
        if i not in letters:
            node = call_like(like, aten.unsqueeze.default, node, dim)
    return node


def _permute(node: Node, dims: list[int], *, like: Node) -> Node:
    if dims == sorted(dims):
        return node
    return call_like(like, aten.permute.default, node, dims)
