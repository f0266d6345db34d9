"""Blocks chosen by their content: the dense meaning, causality, and what is refused."""

from dataclasses import dataclass
from functools import lru_cache

import pytest
import torch
from support.compiling import compile_ring
from support.ranks import RankPool
from support.tolerances import max_error
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ringcompile import reference
from ringcompile.errors import OptionError
from ringcompile.ir.mask import (
    K,
    Mask,
    Q,
    at_least_zero,
    causal,
    disjunction,
    equals_zero,
    key_padding,
)
from ringcompile.ir.text import format_mask, parse_mask
from ringcompile.patterns import Adaptive, AttentionSpec, LocalWindow, Pattern, Sinks

BLOCK = 4


@dataclass(frozen=True, slots=True)
class Cell:
    """One run; ``padding``: the first batch has its last third padded."""

    keep: int = 3
    is_causal: bool = True
    padding: bool = False
    layout: str = "contiguous"
    heads: tuple[int, int] = (4, 2)
    length: int = 43
    changed: int | None = None  # a token whose q, k and v differ

    def tensors(self) -> tuple[Tensor, ...]:
        (H, G), S = self.heads, self.length
        random = torch.Generator().manual_seed(1)
        q, k, v, grad = (
            torch.randn(2, heads, S, 8, generator=random) for heads in (H, G, G, H)
        )
        if self.changed is not None:
            for x in (q, k, v):
                x[:, :, self.changed] += 1.0
        visible = torch.ones(2, S, dtype=torch.bool)
        if self.padding:
            visible[0, S - S // 3 :] = False
        return q, k, v, grad, visible

    @lru_cache  # noqa: B019 - few cells, and every rank is compared with each
    def expected(self) -> tuple[Tensor, ...]:
        q, k, v, grad, visible = self.tensors()
        inputs = [x.double().requires_grad_() for x in (q, k, v)]
        on = reference.chosen_blocks(
            *inputs[:2],
            keep=self.keep,
            block=BLOCK,
            is_causal=self.is_causal,
            visible=visible,
        )
        at = torch.arange(self.length)
        kept = on[:, :, at // BLOCK][..., at // BLOCK] & visible[:, None, None]
        if self.is_causal:
            kept &= at[:, None] >= at
        shared = q.shape[1] // k.shape[1]
        k_of, v_of = (x.repeat_interleave(shared, 1) for x in inputs[1:])
        scores = inputs[0] @ k_of.mT * q.shape[-1] ** -0.5
        some = kept.any(-1, keepdim=True)
        scores = scores.masked_fill(~kept & some, -torch.inf)
        out = scores.softmax(-1) @ v_of * some
        return out.detach(), *torch.autograd.grad(out, inputs, grad.double())


class Attention(nn.Module):
    def __init__(self, *, is_causal: bool, padding: bool) -> None:
        super().__init__()
        self.is_causal, self.padding = is_causal, padding

    def forward(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        mask = None
        if self.padding:
            mask = visible[:, None, None]
            if self.is_causal:
                at = torch.arange(q.shape[2], device=q.device)
                mask = mask & (at[:, None] >= at)
        return nn.functional.scaled_dot_product_attention(
            *(q, k, v, mask),
            is_causal=self.is_causal and not self.padding,
            enable_gqa=True,
        )


def run_cells(
    group: ProcessGroup,
    _rank: int,
    cells: tuple[Cell, ...],
    pattern: Pattern | None = None,
    compiler: str = "eager",
) -> list[tuple[Tensor, ...]]:
    """out, dq, dk and dv of each cell, whole."""
    results = []
    for cell in cells:
        torch.compiler.reset()
        call, record = compile_ring(
            Attention(is_causal=cell.is_causal, padding=cell.padding),
            group,
            compiler=compiler,
            options={
                "attention": pattern or Adaptive(cell.keep, block=BLOCK),
                "layout": cell.layout,
                "unsupported": "error",
            },
        )
        q, k, v, grad, visible = cell.tensors()
        inputs = [x.requires_grad_() for x in (q, k, v)]
        out = call(*inputs, visible)
        out.backward(grad)
        assert len(record.rings) == 1
        results.append((out.detach(), *(x.grad for x in inputs)))
    return results


CELLS = (
    Cell(),
    Cell(keep=1),
    Cell(keep=50, layout="zigzag"),
    Cell(is_causal=False, layout="striped", heads=(4, 4)),
    Cell(padding=True, layout="zigzag"),
    Cell(is_causal=False, padding=True, heads=(5, 1), length=37),
)


def check(ranks: RankPool, cp_size: int, compiler: str) -> None:
    by_rank = ranks.run(run_cells, CELLS, None, compiler, world_size=cp_size)
    for results in by_rank:
        for cell, got in zip(CELLS, results, strict=True):
            for ours, want in zip(got, cell.expected(), strict=True):
                error = max_error(ours, want) / want.abs().max().item()
                assert error <= 1e-5, (cell, error)


@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_the_blocks_that_fit_best_are_seen(ranks: RankPool, cp_size: int) -> None:
    check(ranks, cp_size, "eager")


@pytest.mark.slow
@pytest.mark.parametrize("cp_size", [1, 3])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_the_same_compiled(ranks: RankPool, cp_size: int, compiler: str) -> None:
    check(ranks, cp_size, compiler)


def test_no_row_sees_what_comes_later(ranks: RankPool) -> None:
    """A changed token changes no bit before it, across ranks; and itself it does."""
    cells = (Cell(), *(Cell(changed=t) for t in (5, 24, 41)))
    for results in ranks.run(run_cells, cells, world_size=2):
        before = results[0][0]
        for cell, (after, *_) in zip(cells[1:], results[1:], strict=True):
            t = cell.changed
            assert torch.equal(after[:, :, :t], before[:, :, :t])
            assert not torch.equal(after[:, :, t], before[:, :, t])


def test_a_choice_within_a_window(ranks: RankPool) -> None:
    """Among the chosen blocks those that the window keeps; one block keeps its own."""
    pattern = LocalWindow(BLOCK, BLOCK) & Adaptive(50, block=BLOCK)
    cells = (Cell(keep=1),)
    for ((got, *_),) in ranks.run(run_cells, cells, pattern, world_size=2):
        assert max_error(got, cells[0].expected()[0]) <= 1e-5


class Scorer(nn.Module):
    """A bilinear score with a bias for near blocks."""

    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(3)
        self.weight = nn.Parameter(torch.randn(8, 8, generator=random))
        self.near = nn.Parameter(torch.tensor(0.3))

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        at = torch.arange(q.shape[2])
        return q @ self.weight @ k.mT - self.near * (at[:, None] - at).abs()


def learn(
    group: ProcessGroup, _rank: int, cell: Cell, compiler: str
) -> tuple[Tensor, ...]:
    """out, dq, dk, dv and the gradients of a scorer."""
    scorer = Scorer()
    ((*got,),) = run_cells(
        group,
        0,
        (cell,),
        Adaptive(cell.keep, scorer, BLOCK),
        compiler,
    )
    grads = (p.grad for p in scorer.parameters())
    return (*got, *(g for g in grads if g is not None))


def learn_densely(cell: Cell) -> tuple[Tensor, ...]:
    """SEMANTICS.md: kept scores are ``A + t - stopgrad(t)``, in float64."""
    scorer = Scorer().double()
    q, k, v, grad, visible = cell.tensors()
    inputs = [x.double().requires_grad_() for x in (q, k, v)]
    S = cell.length
    at, nb = torch.arange(S), -(-S // BLOCK)
    shared = q.shape[1] // k.shape[1]
    k_of, v_of = (x.repeat_interleave(shared, 1) for x in inputs[1:])

    def mean(x: Tensor, counts: Tensor) -> Tensor:
        one_hot = (at // BLOCK == torch.arange(nb)[:, None]) * counts[:, None, None]
        return (one_hot.double() @ x.detach()) / one_hot.sum(-1, keepdim=True).clamp(1)

    everyone = torch.ones(2, S, dtype=torch.bool)
    first = (at % BLOCK == 0).expand(2, S)
    q_mean = mean(inputs[0], first if cell.is_causal else everyone)
    scores = scorer(q_mean, mean(k_of, visible))
    i, j = torch.arange(nb)[:, None], torch.arange(nb)
    has_key = torch.stack(
        [visible[:, j * BLOCK : (j + 1) * BLOCK].any(-1) for j in range(nb)], -1
    )
    candidates = has_key[:, None, None] & ((j < i) if cell.is_causal else (j != i))
    t = scores.masked_fill(~(candidates | (i == j)), -torch.inf).log_softmax(-1)
    best = scores.masked_fill(~candidates, -torch.inf).masked_fill(i == j, torch.inf)
    order = best.argsort(dim=-1, descending=True, stable=True)[..., : cell.keep]
    on = torch.zeros_like(best, dtype=torch.bool).scatter(-1, order, value=True)
    on &= candidates | (i == j)
    t = torch.where(on, t, 0.0)
    bonus = (t - t.detach())[:, :, at // BLOCK][..., at // BLOCK]
    kept = on[:, :, at // BLOCK][..., at // BLOCK] & visible[:, None, None]
    if cell.is_causal:
        kept &= at[:, None] >= at
    some = kept.any(-1, keepdim=True)
    pairs = inputs[0] @ k_of.mT * q.shape[-1] ** -0.5 + bonus
    out = pairs.masked_fill(~kept & some, -torch.inf).softmax(-1) @ v_of * some
    wanted = (*inputs, *scorer.parameters())
    return out.detach(), *torch.autograd.grad(out, wanted, grad.double())


@pytest.mark.parametrize(
    ("cp_size", "compiler"),
    [
        (1, "eager"),
        (2, "aot_eager"),
        (4, "eager"),
        pytest.param(2, "inductor", marks=pytest.mark.slow),
    ],
)
def test_a_scorer_learns(ranks: RankPool, cp_size: int, compiler: str) -> None:
    for cell in (Cell(), Cell(is_causal=False, padding=True, layout="zigzag")):
        want = learn_densely(cell)
        for got in ranks.run(learn, cell, compiler, world_size=cp_size):
            for ours, theirs in zip(got, want, strict=True):
                scale = theirs.abs().max().item()
                assert scale > 0
                assert max_error(ours, theirs) <= 1e-5 * scale


def test_text_carries_the_choice() -> None:
    ((mask, _),) = Adaptive(3, block=8).build_parts(
        Mask(causal()), AttentionSpec(4, 2, 64, is_causal=True)
    )
    assert parse_mask(format_mask(mask)) == mask
    assert mask.choice is not None
    assert mask.choice.is_causal


def test_what_is_refused() -> None:
    with pytest.raises(OptionError, match="keep=0"):
        Adaptive(0)
    with pytest.raises(OptionError, match="nothing of it could learn"):
        Adaptive(2, scorer=max)  # type: ignore[arg-type]


CAUSAL_OR_NOT: dict[str, tuple[Mask, Pattern, bool]] = {
    "causal": (Mask(causal()), Adaptive(2, block=8), True),
    "strictly, but for the first": (
        Mask(disjunction(at_least_zero(Q - K - 1), at_least_zero(-Q - K))),
        Adaptive(2, block=8),
        True,
    ),
    "by a pattern on top": (Mask(), Sinks(4, 20) & Adaptive(2, block=8), True),
    "with padding": (Mask(causal() & key_padding(0), 1), Adaptive(2, block=8), True),
    "padding alone": (Mask(key_padding(0), 1), Adaptive(2, block=8), False),
    "all but one later key": (
        Mask(disjunction(causal(), equals_zero(K - Q - 39))),
        Adaptive(2, block=8),
        False,
    ),
    "none": (Mask(), Adaptive(2, block=8), False),
}


@pytest.mark.parametrize("name", CAUSAL_OR_NOT)
def test_a_block_is_summed_up_by_what_no_query_may_not_see(name: str) -> None:
    """However it is spelled that no later key is seen: a mean would leak it."""
    mask, pattern, is_causal = CAUSAL_OR_NOT[name]
    ((chosen, _),) = pattern.build_parts(mask, AttentionSpec(2, 2, 40))
    assert chosen.choice is not None
    assert chosen.choice.is_causal == is_causal
