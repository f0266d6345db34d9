"""Inputs that come as shards: the graph is traced anew at the whole length.

With ``inputs="sharded"`` every rank passes its own rows, so Dynamo's graph is one of
local lengths. The attentions tell which length is the sequence's; where it is a symbol,
the same graph is traced with P times that symbol, and all passes work on whole
sequences as ever. Invariant: every input that has such a length anywhere has it once,
alone in one dim; whatever else comes is refused.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import sympy
from torch import SymInt, Tensor
from torch.fx import Node

from ringcompile.errors import ShardingError
from ringcompile.passes.regions import Refusal, Region
from ringcompile.torch_private import size_expression

LOCAL = "local_val"
"""Key of a placeholder's ``meta``: its value as the rank passes it, if that is a shard
or a length."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Which symbols of a graph are local lengths.

    Attributes:
        symbols: the lengths of all sequences that some attention reads.
        cp_size: number of ranks P, by which each is multiplied.
    """

    symbols: frozenset[sympy.Symbol]
    cp_size: int

    def find_dim(self, node: Node, shape: Sequence[int | SymInt]) -> int | None:
        """The dim of an input that is cut; None if none is.

        Raises:
            ShardingError: a length stands in two dims, or within a sum or product.
        """
        found = [
            dim
            for dim, size in enumerate(shape)
            if size_expression(size).free_symbols & self.symbols
        ]
        if not found:
            return None
        if len(found) > 1 or size_expression(shape[found[0]]) not in self.symbols:
            raise ShardingError(
                f"input {node.name} of shape {tuple(shape)}",
                at="the inputs",
                because='with inputs="sharded" one dim holds the rank\'s rows, and here'
                " none is that alone (a mask over all pairs can't be passed as a"
                " shard; sizes that are equal at the first call count as one)",
                instead="make the mask of positions or of one number for each token;"
                " mark sizes that only happen to be equal by another first call",
            )
        return found[0]

    def scale(self, node: Node, value: object) -> object:
        """What the whole of an input would be.

        Raises:
            ShardingError: as for ``find_dim``, or it is computed from a length.
        """
        if isinstance(value, SymInt):
            expression = size_expression(value)
            if not expression.free_symbols & self.symbols:
                return value
            if expression not in self.symbols:
                raise ShardingError(
                    f"input {node.name}, the number {expression}",
                    at="the inputs",
                    because='with inputs="sharded" what it is of the whole sequence'
                    " can't be known",
                    instead="compute it from a shape, inside of what is compiled",
                )
            return value * self.cp_size
        if not isinstance(value, Tensor):
            return value
        dim = self.find_dim(node, value.shape)
        if dim is None:
            return value
        shape = [*value.shape]
        shape[dim] = shape[dim] * self.cp_size
        return value.new_empty(shape).requires_grad_(value.requires_grad)


def find_lengths(
    regions: Iterable[Region], refusals: Sequence[Refusal], cp_size: int
) -> Lengths:
    """Read the local lengths off the attentions of a graph of shards.

    Args:
        regions: its attentions.
        refusals: those that can't be cut.
        cp_size: number of ranks P.

    Raises:
        ShardingError: there is no attention, or some length is no plain symbol.
    """
    symbols = frozenset(_read_lengths(regions))
    if not symbols:
        raise no_attention(refusals)
    return Lengths(symbols, cp_size)


def no_attention(refusals: Sequence[Refusal]) -> ShardingError:
    """Why a graph of shards needs a ring; ``refusals``: what can't be one."""
    if refusals:
        first = refusals[0]
        return ShardingError(
            first.what,
            at=first.where,
            because='with inputs="sharded" a graph needs an attention that can be cut,'
            f" and of this one: {first.because}",
            instead=f'inputs="replicated"; or: {first.instead}',
        )
    return ShardingError(
        "a graph without an attention that can be cut",
        at="the whole graph",
        because='with inputs="sharded" the attentions tell which dim is the'
        " sequence, so what else mixes tokens here is not known",
        instead="torch.compile a module that holds an attention, and leave the rest"
        ' as it is; or inputs="replicated"',
    )


def _read_lengths(regions: Iterable[Region]) -> Iterator[sympy.Symbol]:
    for region in regions:
        for operand in (region.q, region.k):
            length = size_expression(operand.shape[2])
            if isinstance(length, sympy.Symbol):
                yield length
                continue
            raise ShardingError(
                f"attention over {length} tokens of this rank",
                at=region.where,
                because='with inputs="sharded" the length must be a symbol that comes'
                " with an input, so that it can stand for the whole sequence's",
                instead="torch.compile(..., dynamic=True), and sizes that differ from"
                " each other at the first call",
            )
