"""Write out one call of flex_attention, once its block mask is understood.

Invariant: what is written out computes what the call does whenever the check that comes
with it holds; what can't be written out or checked is refused by name.
"""

from collections.abc import Sequence
from typing import Any

from torch import SymInt, Tensor
from torch.fx import GraphModule, Node

from ringcompile.errors import UnsupportedAttentionError
from ringcompile.passes.block_checks import BlockCheck, Input
from ringcompile.passes.block_masks import (
    BlockMask,
    Scope,
    follow_from_mask,
    is_whole,
)
from ringcompile.passes.flex_attention import (
    NUM_POSITIONS,
    ListedBlocks,
    write_flex_attention,
)
from ringcompile.passes.places import where
from ringcompile.passes.scalar_graphs import (
    NotScalar,
    check_scalars,
    is_constant,
    uses_scalar,
)
from ringcompile.torch_private import sizes_equal


def inline_flex(
    node: Node, scope: Scope, args: Sequence[Any]
) -> tuple[tuple[Tensor, ...], BlockCheck | None]:
    """The results of the call, and what must hold of its block lists.

    Args:
        node: the call, in a graph of Dynamo's.
        scope: that graph.
        args: its arguments: tensors, numbers and graphs.

    Raises:
        UnsupportedAttentionError: it can't be written out, or its lists be checked.
    """
    _check_graphs(node, args)
    _check_statistics(node, args[6])
    mask, buffers = _read_mask(node)
    values = BlockMask.read(args[4])
    if is_whole(mask, scope):
        return write_flex_attention(args, None), None
    if follow_from_mask(mask, buffers, scope, args[0].shape[:2]):
        return write_flex_attention(args, None), None
    listed = None
    if is_constant(values.mask_mod, NUM_POSITIONS):
        listed = ListedBlocks(values.lists, values.block)
    check = _build_check(node, scope, values, (args[0].shape, listed is None))
    return write_flex_attention(args, listed), check


def _read_mask(node: Node) -> tuple[BlockMask, tuple[Any, ...]]:
    """The block mask in nodes, and what its mask_mod reads."""
    args: tuple[Any, ...] = node.args
    return BlockMask.read(args[4]), tuple(args[8]) if len(args) > 8 else ()  # noqa: PLR2004 - its place


def _check_graphs(node: Node, args: Sequence[Any]) -> None:
    graphs = ((args[3], NUM_POSITIONS + 1), (args[4][-1], NUM_POSITIONS))
    for graph, num_scalars in graphs:
        if not isinstance(graph, GraphModule):
            raise _refuse(node, "its score_mod or mask_mod isn't a graph", "torch 2.11")
        try:
            check_scalars(graph, num_scalars)
        except NotScalar as error:
            raise _refuse(
                node,
                error.because,
                "write score_mod and mask_mod with ops on each element alone, and"
                " tensors read at integers",
            ) from error


def _check_statistics(node: Node, options: dict[str, Any]) -> None:
    """A kernel of this backend gives them to another base."""
    items = [u for u in node.users if u.args[1] != 0 and u.users]
    if items and options.get("BACKEND") == "FLASH":
        raise _refuse(
            node,
            "the lse or the maxima of BACKEND='FLASH' are returned",
            "another BACKEND, or the result alone",
        )


def _build_check(
    node: Node, scope: Scope, values: BlockMask, scores: tuple[Sequence[Any], bool]
) -> BlockCheck:
    """What must hold of lists that are passed in, of scores of this shape."""
    shape, has_rule = scores
    mask, given = _read_mask(node)
    lists = [None if x is None else scope.find_input(x) for x in mask.lists]
    buffers = [scope.find_input(x) for x in given]
    found = [_find_size(scope, x) for x in (*mask.lengths, *mask.block)]
    sizes = [x for x in found if x is not None]
    missing = [
        x
        for x, found in zip((*mask.lists, *given), (*lists, *buffers), strict=True)
        if x is not None and found is None
    ]
    if missing or len(sizes) < len(found):
        raise _refuse(
            node,
            "its block mask, or what that reads, is made in the graph, and not by"
            " create_block_mask of the same mask_mod",
            "create_block_mask of this mask_mod, here or outside of what is compiled",
        )
    if has_rule:
        _check_batch(node, values, shape)
    return BlockCheck(
        tuple(None if x is None else Input(x) for x in lists),
        (sizes[0], sizes[1]),
        (sizes[2], sizes[3]),
        values.mask_mod if has_rule else None,
        tuple(Input(x) for x in buffers if x is not None),
        where(node),
    )


def _find_size(scope: Scope, size: Any) -> int | Input | None:  # noqa: ANN401
    if isinstance(size, int):
        return size
    found = scope.find_input(size)
    return None if found is None else Input(found)


def _check_batch(node: Node, values: BlockMask, shape: Sequence[int | SymInt]) -> None:
    """Lists must be for each batch and head that the rule tells apart."""
    sizes = values.lists[0].shape[:2]
    for scalar, (own, size) in enumerate(zip(sizes, shape, strict=False)):
        is_used = uses_scalar(values.mask_mod, scalar)
        if is_used and not sizes_equal(own, size):
            name = ("batch", "head")[scalar]
            raise _refuse(
                node,
                f"its mask_mod reads the {name}, and its block lists are for {own} of"
                f" {size}",
                "create_block_mask with B and H of the queries",
            )


def _refuse(node: Node, because: str, instead: str) -> UnsupportedAttentionError:
    return UnsupportedAttentionError(
        "flex_attention that can't be written out",
        at=where(node),
        because=because,
        instead=instead,
    )
