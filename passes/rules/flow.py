"""What a rule says of one op."""

from dataclasses import dataclass

from ringcompile.passes.dims import Dims


@dataclass(frozen=True, slots=True)
class Link:
    """The op is local along this operand dim and this result dim."""

    slot: int
    operand_dim: int
    result_dim: int


@dataclass(frozen=True, slots=True)
class Flow:
    """How dims pass through one op.

    Attributes:
        dims: of the result (of each result, if it has several of the same rank).
        links: where the op is local.
        sizes: name of the argument that lists the result's sizes, one per dim, and so
            must be given the shard's size at the sharded dim.
        is_view: the op is a view and can be made anew as ``reshape``.
        is_constant: every element is the same, so each dim is local without a link.
    """

    dims: Dims
    links: frozenset[Link]
    sizes: str | None = None
    is_view: bool = False
    is_constant: bool = False
