"""What the block lists of a flex_attention say, and whether its ``mask_mod`` says it.

A kernel of flex_attention computes the blocks that are listed as full or partial, and
calls ``mask_mod`` in partial ones alone. A mask is read from ``mask_mod``, which is
right where the lists follow from it. They do if ``create_block_mask`` made them of it
in the same graph; lists that are passed in are compared with it when the graph runs.
Invariant: no mask is read whose lists are not proven or compared.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import HigherOrderOperator
from torch.fx import GraphModule, Node

from ringcompile.passes.scalar_graphs import (
    MAKERS,
    is_elementwise,
    is_in_place,
    name_of,
)
from ringcompile.passes.symbolic import Size
from ringcompile.torch_private import WHOLE_BLOCK, is_vmap_call, sizes_equal

FLEX = "flex_attention"
NUM_SCALARS = 4  # b, h, q and k


@dataclass(frozen=True, slots=True)
class BlockMask:
    """The arguments of a call that a ``BlockMask`` is.

    Attributes:
        lengths: queries and keys that it was made for.
        lists: number and indices of the partial, then of the full blocks of keys, for
            each block of queries; None where there are none.
        block: queries and keys in a block.
        mask_mod: its rule.
    """

    lengths: tuple[Any, Any]
    lists: tuple[Any, ...]
    block: tuple[int, int]
    mask_mod: Any

    @classmethod
    def read(cls, given: Sequence[Any]) -> "BlockMask":
        """From the tuple that the call has, by place: newer ones have more inside."""
        return cls(
            (given[0], given[1]),
            tuple(given[2:6]),
            (given[-3], given[-2]),
            given[-1],
        )


# ---- where a value comes from --------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Scope:
    """A graph of Dynamo's, and the call that it is the body of.

    Attributes:
        gm: the graph.
        outer: where it is called; None for the outermost.
        operands: what its inputs are there.
    """

    gm: GraphModule
    outer: "Scope | None" = None
    operands: tuple[Any, ...] = ()

    def find_origin(self, node: Node) -> Node:
        """The node of the outermost graph that an input of a body is."""
        if self.outer is None or node.op != "placeholder":
            return node
        inputs = self.gm.graph.find_nodes(op="placeholder")
        operand = self.operands[inputs.index(node)]
        return self.outer.find_origin(operand) if isinstance(operand, Node) else node

    def find_input(self, node: object) -> int | None:
        """Which input of the outermost graph a node is."""
        if not isinstance(node, Node):
            return None
        origin = self.find_origin(node)
        top = self
        while top.outer is not None:
            top = top.outer
        inputs = top.gm.graph.find_nodes(op="placeholder")
        return inputs.index(origin) if origin in inputs else None


def find_list_only(gm: GraphModule, bodies: dict[str, int]) -> frozenset[Node]:
    """What is computed for nothing but the block lists of some ``flex_attention``.

    Args:
        gm: a graph of Dynamo's.
        bodies: higher-order ops with bodies, and where the operands of those start.
    """
    found: set[Node] = set()
    seen: set[Node] = set()
    for node in reversed(gm.graph.nodes):
        seen.add(node)
        if not _is_pure(node):
            continue
        written = node.args[0] if _is_write(node) else node
        users = [u for u in written.users if u in seen and u is not node]
        others = [u for u in users if not (_is_write(u) and u.args[0] is written)]
        if users and all(
            u in found or _takes_as_list(gm, u, written, bodies) for u in others
        ):
            found.add(node)
    return frozenset(found | _find_idle_vmaps(gm, found))


def _find_idle_vmaps(gm: GraphModule, gone: set[Node]) -> set[Node]:
    """Calls by which vmap starts and ends, if nothing is left between."""
    calls = [n for n in gm.graph.nodes if n not in gone and is_vmap_call(n.target)]
    return set() if any(n.users for n in calls) else set(calls)


def _is_pure(node: Node) -> bool:
    """Whether a call of those that masks and their lists are made by writes nothing."""
    if node.op not in {"call_function", "call_method"} or is_in_place(node):
        return False
    if _is_write(node):
        written = node.args[0]
        return isinstance(written, Node) and name_of(written) == "new_zeros"
    return is_vmap_call(node.target) or is_elementwise(name_of(node), _LISTING)


_LISTING = frozenset(
    {
        *("sum", "argsort", "pad", "view", "permute", "transpose", "contiguous"),
        *("getitem", "unsqueeze", "arange"),
    }
)


def _is_write(node: Node) -> bool:
    return node.op == "call_function" and name_of(node) == "setitem"


def _is_flex(node: Node) -> bool:
    target = node.target
    return isinstance(target, HigherOrderOperator) and target.name() == FLEX


def _takes_as_list(
    gm: GraphModule, user: Node, node: Node, bodies: dict[str, int]
) -> bool:
    """Whether a call uses a value as a block list, and for nothing else."""
    target = user.target
    if not isinstance(target, HigherOrderOperator):
        return False
    if target.name() == FLEX:
        args: tuple[Any, ...] = user.args
        others = (*args[:4], *args[5:], args[4][:2], args[4][-3:])
        return node not in _nodes_in(others)
    first = bodies.get(target.name())
    if first is None or not isinstance(user.args[0], Node):
        return False
    body = gm.get_submodule(str(user.args[0].target))
    assert isinstance(body, GraphModule), "a body is a graph"
    gone = find_list_only(body, bodies)
    inputs = body.graph.find_nodes(op="placeholder")
    return all(
        inner in gone or _takes_as_list(body, inner, placeholder, bodies)
        for placeholder, operand in zip(inputs, user.args[first:], strict=False)
        if operand is node
        for inner in placeholder.users
    )


def _nodes_in(value: Any) -> set[Node]:  # noqa: ANN401
    found: set[Node] = set()
    torch.fx.node.map_arg(value, found.add)
    return found


# ---- lists made in the graph ---------------------------------------------------------


def is_whole(mask: BlockMask, scope: Scope) -> bool:
    """Whether it is what a call without a block mask gets: one block over all."""
    numbers, indices, *full = mask.lists
    origins = [scope.find_origin(x) for x in (numbers, indices) if isinstance(x, Node)]
    names = [name_of(x) for x in origins if x.op == "call_function"]
    return (
        mask.block == (WHOLE_BLOCK, WHOLE_BLOCK)
        and names == ["ones", "zeros"]
        and full == [None, None]
    )


def follow_from_mask(
    mask: BlockMask, buffers: Sequence[Node], scope: Scope, sizes: Sequence[Size]
) -> bool:
    """Whether ``create_block_mask`` made the lists of the same ``mask_mod``.

    Args:
        mask: the block mask.
        buffers: what ``mask_mod`` reads.
        scope: where it is used.
        sizes: batch and heads of the scores.
    """
    lists = [scope.find_origin(x) if isinstance(x, Node) else x for x in mask.lists]
    dense = _find_dense(lists, mask.block)
    if dense is None:
        return False
    axes = _read_axes(dense)
    if axes is None:
        return False
    inner, levels, lengths = axes
    made = _Recipe({}, levels)
    used = {levels[level] for level in made.levels_in(inner)}
    alike = all(
        sizes_equal(_value(own), size)
        for d, (own, size) in enumerate(zip(lengths[:2], sizes, strict=True))
        if d in used
    )
    sizes_match = zip(lengths[2:], mask.lengths, strict=True)
    if not alike or not all(sizes_equal(_value(a), _value(b)) for a, b in sizes_match):
        return False
    rule = scope.gm.get_submodule(str(mask.mask_mod.target))
    assert isinstance(rule, GraphModule), "a mask_mod is a graph"
    inputs = rule.graph.find_nodes(op="placeholder")
    origins = [scope.find_origin(x) for x in buffers]
    leaves: dict[Node, object] = dict(
        zip(inputs, [*range(NUM_SCALARS), *origins], strict=True)
    )
    (output,) = rule.graph.find_nodes(op="output")
    return made.write(inner) == _Recipe(leaves, {}).write(output.args[0])


def _value(size: Any) -> Size:  # noqa: ANN401
    value: Size = size.meta["example_value"] if isinstance(size, Node) else size
    return value


def _find_dense(lists: Sequence[Any], block: tuple[int, int]) -> Node | None:
    """The mask ``(B, H, queries, keys)`` that lists of blocks were made of."""
    numbers, indices, full_numbers, full_indices = lists
    partial = _find_blocks(numbers, indices)
    if partial is None:
        return None
    sums = [_read_sums(partial, block)]
    if full_numbers is not None:
        full = _find_blocks(full_numbers, full_indices)
        if full is None or not _is_call(full, "eq", 1, block[0] * block[1]):
            return None
        if not _is_call(partial, "bitwise_and"):
            return None
        sums.append(full.args[0])
    elif not _is_call(partial, "gt", 1, 0):
        return None
    if sums[0] is None or any(s is not sums[0] for s in sums):
        return None
    return _find_summed(sums[0], block)


def _find_blocks(numbers: Any, indices: Any) -> Any:  # noqa: ANN401
    """Which blocks are listed, a bool for each."""
    counted = _climb(numbers, "to", "sum", "to", "to")
    sorted_ = _climb(indices, "to", "argsort", "to", "to")
    if counted is None or counted is not sorted_:
        return None
    total, order = numbers.args[0], indices.args[0]
    is_last = _argument(total, 1, "dim") == _argument(order, 1, "dim") == -1
    return counted if is_last and _argument(order, 2, "descending") is True else None


def _read_sums(partial: Any, block: tuple[int, int]) -> Any:  # noqa: ANN401
    """How much each block keeps, of which partial ones were told."""
    if _is_call(partial, "gt", 1, 0):
        return partial.args[0]
    if not _is_call(partial, "bitwise_and"):
        return None
    some, not_all = partial.args
    is_both = _is_call(some, "gt", 1, 0)
    is_both = is_both and _is_call(not_all, "lt", 1, block[0] * block[1])
    return some.args[0] if is_both and some.args[0] is not_all.args[0] else None


def _find_summed(sums: Any, block: tuple[int, int]) -> Node | None:  # noqa: ANN401
    padded = _climb(sums, "sum", "permute", "view")
    if padded is None or not _is_call(padded, "pad"):
        return None
    permuted = sums.args[0]
    view = permuted.args[0]
    dims, shape = permuted.args[1:], view.args[1:]
    if _argument(sums, 1, "dim") != [-2, -1] or dims != (0, 1, 2, 4, 3, 5):
        return None
    if (shape[3], shape[5]) != block:
        return None
    args: tuple[Any, ...] = padded.args
    dense, pad, *rest = args
    is_behind = len(pad) == 4 and pad[0] == pad[2] == 0  # noqa: PLR2004 - of two dims
    is_zero = rest in ([], ["constant"], ["constant", None], ["constant", 0])
    is_plain = is_behind and is_zero and not padded.kwargs
    return dense if is_plain and isinstance(dense, Node) else None


def _climb(node: Any, *names: str) -> Node | None:  # noqa: ANN401
    """What a chain of calls starts from, named from the last to the first."""
    for name in names:
        if not _is_call(node, name):
            return None
        node = node.args[0]
    return node if isinstance(node, Node) else None


def _is_call(node: Any, name: str, at: int = 0, argument: Any = None) -> bool:  # noqa: ANN401
    is_call = isinstance(node, Node) and node.op in {"call_function", "call_method"}
    if not is_call or name_of(node) != name:
        return False
    return at == 0 or (len(node.args) > at and node.args[at] == argument)


def _argument(node: Node, place: int, name: str) -> Any:  # noqa: ANN401
    return node.args[place] if len(node.args) > place else node.kwargs.get(name)


# ---- what vmap computes --------------------------------------------------------------


def _read_axes(dense: Node) -> tuple[Node, dict[int, int], list[Any]] | None:
    """What a vmap over four dims computes, the dim of each level, and their sizes."""
    levels: dict[int, int] = {}
    lengths: list[Any] = []
    node: Any = dense
    while _is_call(node, "remove_batch_dim") and len(levels) < NUM_SCALARS:
        node, level, size, dim = node.args
        if dim != 0 or level in levels:
            return None
        levels[level] = len(levels)
        lengths.append(size)
    return (node, levels, lengths) if len(levels) == NUM_SCALARS else None


class _Recipe:
    """Writes down how a scalar follows from positions, the same for the same steps.

    Args:
        leaves: what is written for inputs: the number of a position, or a node.
        levels: the position that each level of a vmap runs over.
    """

    def __init__(self, leaves: dict[Node, object], levels: dict[int, int]) -> None:
        self._leaves = leaves
        self._levels = levels
        self._used: dict[Node, frozenset[int]] = {}

    def levels_in(self, node: Node) -> frozenset[int]:
        """The levels that a value depends on."""
        for step in _in_order(node, self._used):
            if name_of(step) in MAKERS:
                self._used[step] = frozenset()
                continue
            args: tuple[Any, ...] = step.args
            own = [args[2]] if _is_call(step, "add_batch_dim") else []
            above = [self._used[x] for x in step.all_input_nodes]
            self._used[step] = frozenset(own).union(*above)
        return self._used[node]

    def write(self, node: Any) -> object:  # noqa: ANN401
        """The steps as nested tuples."""
        if isinstance(node, tuple | list):
            items = tuple(map(self.write, node))
            return items[0] if len(items) == 1 else items
        if not isinstance(node, Node):
            return (type(node).__name__, node)
        if node in self._leaves:
            return self._leaves[node]
        name, args = name_of(node), list(node.args)
        if name in MAKERS:
            args[0] = None  # lends its dtype and device, if it says none
        elif self._levels and not self.levels_in(node):
            return node
        if _is_call(node, "add_batch_dim"):
            return self._write_position(node)
        if name in _REVERSED and isinstance(node.target, str):
            name, args = _REVERSED[name], args[::-1]
        kwargs = sorted(node.kwargs.items())
        return (name, *map(self.write, args), *((k, self.write(x)) for k, x in kwargs))

    def _write_position(self, node: Node) -> object:
        args: tuple[Any, ...] = node.args
        positions, dim, level = args
        starts = _is_call(positions, "arange") and positions.args[0] == 0
        is_plain = dim == 0 and starts and len(positions.args) == 2  # noqa: PLR2004
        return self._levels.get(level, node) if is_plain else node


_REVERSED = {"rsub": "sub", "radd": "add", "rmul": "mul", "rand": "bitwise_and"}


def _in_order(node: Node, known: Iterable[Node]) -> Iterator[Node]:
    """What a node is computed from, itself last."""
    seen, work = set(known), [node]
    found: set[Node] = set()
    while work:
        n = work.pop()
        if n not in found and n not in seen:
            found.add(n)
            work += n.all_input_nodes
    return (n for n in node.graph.nodes if n in found)
