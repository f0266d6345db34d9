"""Attentions whose scores are more than products, and what they should give.

The reference is written from what a bias, a softcap and a sink mean, dense, in float64,
and differentiated by autograd.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TypeVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from ringcompile.ir.attention import Bias, Dropout
from ringcompile.ir.mask import EmptyRow
from ringcompile.ir.text import format_plan, parse_plan
from ringcompile.lowering.tiles.dropout import find_kept
from support import dense
from support.ring_cases import SCALE, Case, compile_ring, join, plan_text

_T = TypeVar("_T")

B = 2
SEED = 11


@dataclass(frozen=True)
class Kind:
    """A kind of bias.

    Attributes:
        shape: of H and S.
        is_relative: whether columns are distances.
        is_learned: whether it has a gradient.
        change: what is done to its random values.
    """

    shape: Callable[[int, int], tuple[int, int, int, int]]
    is_relative: bool = False
    is_learned: bool = True
    change: Callable[[Tensor], Tensor] = lambda x: x

    @property
    def traits(self) -> Bias:
        """As plans have it."""
        return Bias(is_cut=self.shape(1, 7)[2] == 7, is_relative=self.is_relative)


def _hide(x: Tensor, value: float) -> Tensor:
    """A mask as a bias: left padding, the future, and a query with no key at all."""
    S = x.shape[3]
    hidden = torch.ones(S, S, dtype=torch.bool).triu(1).expand_as(x).clone()
    hidden[0, :, :, : S // 3] = True
    hidden[1, :, S // 2] = True
    return torch.zeros_like(x).masked_fill(hidden, value)


LOWEST = torch.finfo(torch.float32).min

KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "dense": Kind(lambda H, S: (B, H, S, S)),
        "one for all": Kind(lambda _H, S: (1, 1, S, S)),
        "fixed": Kind(lambda _H, S: (B, 1, S, S), is_learned=False),
        "keys": Kind(lambda H, S: (B, H, 1, S)),
        "keys of all": Kind(lambda _H, S: (1, 1, 1, S)),
        "relative": Kind(lambda H, S: (1, H, 1, 2 * S - 1), is_relative=True),
        "relative of all": Kind(lambda _H, S: (B, 1, 1, 2 * S - 1), is_relative=True),
        "heads": Kind(lambda H, _S: (1, H, 1, 1)),
        "queries": Kind(lambda H, S: (1, H, S, 1)),
        "hides": Kind(
            lambda _H, S: (B, 1, S, S),
            is_learned=False,
            change=lambda x: _hide(x, -torch.inf),
        ),
        "lowest": Kind(
            lambda _H, S: (B, 1, S, S),
            is_learned=False,
            change=lambda x: _hide(x, LOWEST),
        ),
    }
)


@dataclass(frozen=True)
class ScoreCase:
    """One attention.

    Attributes:
        base: its mask, layout, sizes and compiler.
        biases: names of ``KINDS``.
        softcap: of scores.
        has_sinks: whether each head has one.
        dropout: of weights.
        bias_dtype: of biases and sinks; None: that of q.
        is_checkpointed: whether backward runs it again.
        reads_empty: whether rows without a key have a gradient under ``MEAN_ALL``.
    """

    base: Case = field(default_factory=lambda: Case("causal"))
    biases: tuple[str, ...] = ()
    softcap: float | None = None
    has_sinks: bool = False
    dropout: float = 0.0
    bias_dtype: torch.dtype | None = None
    is_checkpointed: bool = False
    reads_empty: bool = False

    @property
    def kinds(self) -> list[Kind]:
        """Of each bias."""
        return [KINDS[name] for name in self.biases]

    def needed(self, xs: list[_T]) -> list[_T]:
        """Of those for q, k and v the ones that have a gradient."""
        return list(itertools.compress(xs, self.base.needs_grad))

    @property
    def is_cut(self) -> list[bool]:
        """Which of ``expected`` have rows of tokens."""
        learned = [kind.traits.is_cut for kind in self.kinds if kind.is_learned]
        return [True, *self.needed([True] * 3), *learned, *[False] * self.has_sinks]

    @property
    def names(self) -> list[str]:
        """Of ``expected``."""
        learned = [
            f"d_{name}"
            for name, kind in zip(self.biases, self.kinds, strict=True)
            if kind.is_learned
        ]
        return [
            "out",
            *self.needed(["dq", "dk", "dv"]),
            *learned,
            *["d_sinks"] * self.has_sinks,
        ]

    def scores(self) -> tuple[list[Tensor], Tensor | None]:
        """Biases of all rows, and sinks, rounded to their dtype."""
        random = torch.Generator().manual_seed(1)
        H, S = self.base.heads[0], self.base.length
        dtype = self.bias_dtype or self.base.dtype

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random, dtype=torch.double)

        biases = [kind.change(draw(*kind.shape(H, S))).to(dtype) for kind in self.kinds]
        return biases, draw(H).to(dtype) if self.has_sinks else None

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and the gradient of the output, 0 where it is not passed on."""
        q, k, v, grad = self.base.tensors()
        if self.base.empty is EmptyRow.MEAN_ALL and not self.reads_empty:
            grad = torch.where(self._counts().any(-1, keepdim=True), grad, 0)
        return q, k, v, grad

    def captures(self) -> list[Tensor]:
        """What the mask reads, and the seed of dropout."""
        return [*self.base.captures, torch.tensor([SEED])]

    def _counts(self) -> Tensor:
        """How often each pair counts, ``(B, H, S, S)``."""
        shape = (B, self.base.heads[0], self.base.length)
        kept = [dense.keeps(m, self.base.captures, shape) for m, _ in self.base.parts]
        return torch.stack(kept).sum(0)

    def expected(self) -> list[Tensor]:
        """Output and gradients, as ``names`` has them."""
        q, k, v, grad = (x.double() for x in self.tensors())
        biases, sinks = self.scores()
        biases = [x.double() for x in biases]
        inputs = self.needed([q, k, v])
        inputs += [
            x for x, kind in zip(biases, self.kinds, strict=True) if kind.is_learned
        ]
        if sinks is not None:
            sinks = sinks.double()
            inputs.append(sinks)
        for x in inputs:
            x.requires_grad_()
        out = self._attend(q, k, v, biases, sinks)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad)]

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        biases: list[Tensor],
        sinks: Tensor | None,
    ) -> Tensor:
        H, S = self.base.heads[0], self.base.length
        shared = H // k.shape[1]
        k, v = (x.repeat_interleave(shared, 1) for x in (k, v))
        scores = SCALE * (q @ k.mT)
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        at = torch.arange(S)
        for x, kind in zip(biases, self.kinds, strict=True):
            scores = scores + (
                x[:, :, 0, at - at[:, None] + S - 1] if kind.is_relative else x
            )
        # What finfo.min, when added, makes of scores: alike all, yet with gradients.
        level = (scores - scores.detach()).softmax(-1)
        counts = self._counts()
        hidden = (counts == 0) | (scores.detach() == -torch.inf)
        is_empty = hidden.all(-1, keepdim=True)
        scores = scores + counts.clamp(min=1).to(q.dtype).log()
        scores = scores.masked_fill(hidden, -torch.inf).masked_fill(is_empty, 0.0)
        if sinks is not None:
            last = sinks[None, :, None, None].expand(B, H, S, 1)
            scores = torch.cat([scores, last], -1)
        weights = scores.softmax(-1)[..., :S] * ~is_empty
        if self.base.empty is not EmptyRow.ZERO and sinks is None:
            is_added = self.base.empty is EmptyRow.MEAN_ALL
            weights = torch.where(is_empty, level if is_added else 1 / S, weights)
        if self.dropout:
            where = [
                torch.arange(size).view([-1 if d == dim else 1 for d in range(4)])
                for dim, size in enumerate((B, H, S, S))
            ]
            kept = find_kept(torch.tensor([SEED]), where, self.dropout)
            weights = weights * kept / (1 - self.dropout)
        return weights @ v


def score_plan_text(case: ScoreCase, group: ProcessGroup, rank: int) -> str:
    """The plan that the op carries on one rank."""
    plan = parse_plan(plan_text(case.base, group, rank, timeout_s=60.0))
    changed = replace(
        plan,
        softcap=case.softcap,
        biases=tuple(kind.traits for kind in case.kinds),
        dropout=Dropout(case.dropout, seed=2) if case.dropout else None,
    )
    return format_plan(changed)


def run_score_case(
    group: ProcessGroup,
    rank: int,
    case: ScoreCase,
    *,
    attend: Callable[..., Tensor] | None = None,
) -> list[Tensor]:
    """This rank's rows of output and gradients; of biases not cut its partial sums.

    ``attend``: the ring op as ``compile_ring`` gives it, if there is one already.
    """
    base = case.base
    layout = base.place(group.size())
    at = torch.tensor(layout.positions(rank, base.length))
    is_real, rows = at < base.length, at.clamp(max=base.length - 1)
    q, k, v, grad = (x[:, :, rows] for x in case.tensors())
    biases, sinks = case.scores()
    inputs = case.needed([q, k, v])
    for n, kind in enumerate(case.kinds):
        if kind.traits.is_cut:
            biases[n] = biases[n][:, :, rows]
        if kind.is_learned:
            inputs.append(biases[n])
    if sinks is not None:
        inputs.append(sinks)
    for x in inputs:
        x.requires_grad_()
    if attend is None:
        attend = compile_ring(score_plan_text(case, group, rank), base)
    arguments = (q, k, v, case.captures(), biases, sinks)
    if case.is_checkpointed:
        out = checkpoint(attend, *arguments, use_reentrant=False)
    else:
        out = attend(*arguments)
    out.backward(grad * is_real[:, None])  # a pad's cotangent is zero
    results = [out.detach()]
    for x in inputs:
        assert x.grad is not None
        assert x.grad.dtype == x.dtype
        results.append(x.grad)
    return [
        x[:, :, is_real] if cut else x
        for x, cut in zip(results, case.is_cut, strict=True)
    ]


def run_score_cases(
    group: ProcessGroup, rank: int, cases: tuple[ScoreCase, ...]
) -> list[list[Tensor]]:
    return [run_score_case(group, rank, case) for case in cases]


def collect(case: ScoreCase, by_rank: list[list[Tensor]]) -> list[Tensor]:
    """All rows in the user's order; sums over ranks of what each has a part of."""
    return [
        join(case.base, xs) if cut else torch.stack([x.double() for x in xs]).sum(0)
        for xs, cut in zip(zip(*by_rank, strict=True), case.is_cut, strict=True)
    ]
