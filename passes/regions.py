"""Records of the attentions found in a graph, and of those that must be gathered."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from ringcompile.ir.mask import Mask
from ringcompile.passes.op import shape_of
from ringcompile.passes.symbolic import Size


@dataclass(frozen=True, slots=True)
class Operand:
    """A Q, K or V of a region.

    Attributes:
        node: ``(B, heads, S, D)``; K and V un-repeated, with their G heads.
        transposed: whether it is ``(B, heads, D, S)`` instead.
        view: the shape of these four dims, if the node has others.
    """

    node: Node
    transposed: bool = False
    view: tuple[Size, ...] = ()

    @property
    def shape(self) -> tuple[Size, ...]:
        """``(B, heads, S, D)``."""
        batch, heads, *matrix = self.view or shape_of(self.node)
        return (batch, heads, *(matrix[::-1] if self.transposed else matrix))


@dataclass(frozen=True, slots=True)
class BiasOperand:
    """A float tensor that is added to scores.

    Attributes:
        node: the tensor.
        view: its shape as ``(B or 1, H or 1, S or 1, S or 1)``.
        shape: that shape, its rows repeated for each query if need be.
        factor: what it is multiplied with.
    """

    node: Node
    view: tuple[Size, ...]
    shape: tuple[Size, ...]
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class FactorOperand:
    """A float tensor that Q is multiplied with, or divided by.

    Attributes:
        node: the tensor.
        view: its shape as ``(B or 1, H or 1, S or 1, 1)``.
        divides: whether Q is divided by it.
    """

    node: Node
    view: tuple[Size, ...]
    divides: bool = False


@dataclass(frozen=True, slots=True)
class Region:
    """One attention that can become a ring.

    Attributes:
        output: the node that the ring's result replaces: ``(B, H, S, E)`` viewed in
            its shape.
        q, k, v: the operands.
        scale: factor of ``<Q, K>``.
        mask: the pairs that count, over captures.
        captures: ``captures[i]`` is the integer or bool node read as ``ci``: a small
            one, or a mask of pairs that the user passes in.
        where: the user's ``file:line`` and the node's name.
        dropout: share of weights that are dropped.
        transposed: whether the output is a view of ``(B, H, E, S)`` instead.
        softcap: as of ``ir.attention.RankPlan``.
        biases: what is added to scores.
        sinks: ``(H,)`` scores of one more key per head, whose value is 0; or a number.
        factors: what Q is multiplied with first.
        is_cross: whether keys are tokens of another sequence than queries.
    """

    output: Node
    q: Operand
    k: Operand
    v: Operand
    scale: float
    mask: Mask
    captures: tuple[Node, ...]
    where: str
    dropout: float = 0.0
    transposed: bool = False
    softcap: float | None = None
    biases: tuple[BiasOperand, ...] = ()
    sinks: Node | float | None = None
    factors: tuple[FactorOperand, ...] = ()
    is_cross: bool = False


@dataclass(frozen=True, slots=True)
class Refusal:
    """An attention that runs gathered instead.

    Attributes:
        output: its last node.
        what: what it is, with the offending value.
        because: why it can't become a ring.
        instead: what the user can do.
        where: the user's ``file:line`` and the node's name.
    """

    output: Node
    what: str
    because: str
    instead: str
    where: str

    @property
    def inside(self) -> frozenset[str]:
        """Names of the nodes from Q.K to the output, as far as scores show them."""
        inside, pending = {self.output.name}, [self.output]
        sequence = self.output.meta["val"].shape[-2]
        while pending:
            for node in pending.pop().all_input_nodes:
                value = node.meta.get("val")
                is_score = isinstance(value, Tensor) and value.shape[-2:-1] == (
                    sequence,
                )
                if not is_score or node.name in inside:
                    continue
                inside.add(node.name)
                if node.target not in _PRODUCTS:
                    pending.append(node)
        return frozenset(inside)


_PRODUCTS = frozenset(
    getattr(torch.ops.aten, name).default for name in ("matmul", "bmm", "mm", "linear")
)
