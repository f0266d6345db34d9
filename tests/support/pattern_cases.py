"""Every pattern, and which pairs it keeps, written from SEMANTICS.md alone."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ringcompile import patterns as p
from ringcompile import reference
from ringcompile.ir.layout import Layout
from ringcompile.ir.mask import Mask, causal
from ringcompile.patterns import AttentionSpec
from ringcompile.plan.check import check_schedule
from ringcompile.plan.simulate import simulate
from ringcompile.plan.stages import build_schedule

Counts = Callable[[int, int, int], Tensor]
Chosen = Callable[[Tensor, Tensor, bool], Tensor]


@dataclass(frozen=True, slots=True)
class PatternCase:
    """One pattern.

    Attributes:
        pattern: the pattern.
        counts: how often each pair counts, ``(H, S, S)``, from H, G and S.
        causal_counts: the same under a causal mask, where that says more than that
            later keys are not seen.
        divisor: what the output is divided by.
        by_part: ``counts`` of each part, ``(n, H, S, S)``, where gradients take the
            weights of the parts as constants.
        chosen: the pairs that q and k choose, ``(B, H, S, S)``, from both and from
            whether the user's mask is causal; ``counts`` are then those it may choose.
    """

    pattern: p.Pattern
    counts: Counts
    causal_counts: Counts | None = None
    divisor: int = 1
    by_part: Counts | None = None
    chosen: Chosen | None = None

    def count(self, H: int, G: int, S: int, *, is_causal: bool) -> Tensor:
        """How often each pair counts, with or without a causal mask of the user's."""
        if not is_causal:
            return self.counts(H, G, S)
        return (self.causal_counts or self.counts)(H, G, S).tril()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool) -> Tensor:
        """``softmax(A + log C) V``, 0 where C is 0, in float64 and with gradients.

        Args:
            q: ``(B, H, S, D)``.
            k: ``(B, G, S, D)``.
            v: ``(B, G, S, E)``.
            is_causal: whether no query sees a later key.
        """
        H, S = q.shape[1:3]
        G = k.shape[1]
        counts = self.count(H, G, S, is_causal=is_causal)[None]
        if self.chosen:
            counts = counts * self.chosen(q, k, is_causal)[None]
        k, v = (x.repeat_interleave(H // G, 1) for x in (k, v))
        scores = q @ k.mT * q.shape[-1] ** -0.5
        e = (scores - scores.detach().amax(-1, keepdim=True)).exp()
        if self.by_part:
            counts = self.by_part(H, G, S)
            counts = counts.tril() if is_causal else counts
        parts = [e * c for c in counts]
        totals = [part.sum(-1, keepdim=True) for part in parts]
        whole = sum(totals).clamp(min=1e-300)
        out = sum(
            (total / whole).detach() * (part / total.clamp(min=1e-300)) @ v
            for part, total in zip(parts, totals, strict=True)
        )
        assert isinstance(out, Tensor)
        return out / self.divisor


def _at(S: int) -> tuple[Tensor, Tensor]:
    at = torch.arange(S)
    return at[:, None], at[None]


def _heads(kept: Tensor, H: int) -> Tensor:
    return kept.expand(H, *kept.shape[-2:]).int()


def of_blocks(block: int, on: Callable[[Tensor, Tensor, int], Tensor]) -> Counts:
    """Of a layout whose ``on(i, j, nb)`` is the same for all heads."""

    def counts(H: int, _G: int, S: int) -> Tensor:
        q, k = _at(S)
        return _heads(on(q // block, k // block, math.ceil(S / block)), H)

    return counts


def _tokens(on: Callable[[Tensor, Tensor], Tensor]) -> Counts:
    return lambda H, _G, S: _heads(on(*_at(S)), H)


def _is_one_of(x: Tensor, numbers: tuple[int, ...]) -> Tensor:
    return torch.isin(x, torch.tensor(numbers))


def longnet(
    segments: tuple[int, ...],
    rates: tuple[int, ...],
    offset: str,
    *,
    weights: str = "joint",
) -> PatternCase:
    def by_part(H: int, G: int, S: int) -> Tensor:
        kept = torch.zeros(len(segments), H, S, S, dtype=torch.int32)
        q, k = _at(S)
        for part, w, r in zip(kept, segments, rates, strict=True):
            for h in range(H):
                s = {
                    "paper": h % r,
                    "torchscale": h // math.ceil(H / r),
                    "kv_head": (h // (H // G)) % r,
                }[offset]
                selects = [(x % w) % r == s for x in (q, k)]
                part[h] = selects[0] & selects[1] & (q // w == k // w)
        return kept

    return PatternCase(
        p.LongNet(segments, rates, offset, weights),
        lambda H, G, S: by_part(H, G, S).sum(0),
        by_part=by_part if weights == "detached" else None,
    )


def grouped(
    segments: tuple[int, ...], rates: tuple[int, ...], *, divides: bool = False
) -> PatternCase:
    def counts(H: int, _G: int, S: int) -> Tensor:
        total = torch.zeros(H, S, S, dtype=torch.int32)
        q, k = _at(S)
        n, h = len(segments), 0
        for i, (w, r) in enumerate(zip(segments, rates, strict=True)):
            for _ in range(H // n + (i < H % n)):
                s = i % r
                selects = [(x % w) % r == s for x in (q, k)]
                total[h] = selects[0] & selects[1] & (q // w == k // w)
                h += 1
        return total

    pattern = p.GroupedDilated(segments, rates, divides)
    return PatternCase(pattern, counts, divisor=len(segments) if divides else 1)


def consecutive(segments: tuple[int, ...], rates: tuple[int, ...]) -> PatternCase:
    def on(q: Tensor, k: Tensor) -> Tensor:
        kept, start = torch.zeros(q.shape[0], k.shape[1], dtype=torch.bool), 0
        for w, r in zip(segments, rates, strict=True):
            within = (q >= start) & (q < start + w) & (k >= start) & (k < start + w)
            kept |= within & ((q - k) % r == 0)
            start += w
        return kept

    return PatternCase(p.ConsecutiveDilated(segments, rates), _tokens(on))


def local_window(window: int, block: int) -> PatternCase:
    def on(i: Tensor, j: Tensor, _nb: int) -> Tensor:
        return (i - j).abs() <= (window // block) // 2

    return PatternCase(p.LocalWindow(window, block), of_blocks(block, on))


def dilated_blocks(rates: tuple[int, ...], block: int) -> PatternCase:
    def on(i: Tensor, j: Tensor, _nb: int) -> Tensor:
        return _is_one_of((i - j).abs(), (0, *rates))

    return PatternCase(p.DilatedBlocks(rates, block), of_blocks(block, on))


def global_local(g: int, window: int, block: int) -> PatternCase:
    def on(i: Tensor, j: Tensor, _nb: int) -> Tensor:
        return ((i - j).abs() <= (window // block) // 2) | (i < g) | (j < g)

    return PatternCase(p.GlobalLocal(g, window, block), of_blocks(block, on))


def adaptive(keep: int, block: int) -> PatternCase:
    """All pairs may count; q and k choose."""

    def chosen(q: Tensor, k: Tensor, is_causal: bool) -> Tensor:
        on = reference.chosen_blocks(q, k, keep=keep, block=block, is_causal=is_causal)
        at = torch.arange(q.shape[2]) // block
        return on[:, :, at][..., at]

    pattern = p.Adaptive(keep, block=block)
    return PatternCase(pattern, keep_all, chosen=chosen)


def keep_all(H: int, _G: int, S: int) -> Tensor:
    return torch.ones(H, S, S, dtype=torch.int32)


def fixed(L: int, g: int, n: int, block: int, *, horizontal: bool) -> PatternCase:
    def counts(H: int, _G: int, S: int) -> Tensor:
        nb = math.ceil(S / block)
        total = torch.zeros(H, S, S, dtype=torch.int32)
        q, k = _at(S)
        i, j = q // block, k // block
        for h in range(H):
            f, e = L - (1 + h % n) * g, nb - nb % L
            starts = list(range(f, e, L)) + ([min(e + f, nb - g)] if e < nb else [])
            kept = i // L == j // L
            for s in starts:
                kept = kept | ((s <= j) & (j < s + g))
                if horizontal:
                    kept = kept | ((s <= i) & (i < s + g))
            total[h] = kept
        return total

    return PatternCase(p.Fixed(L, g, n, horizontal, block), counts)


def variable(
    windows: tuple[int, ...],
    ranges: tuple[tuple[int, int], ...],
    block: int,
    *,
    horizontal: bool,
) -> PatternCase:
    def on(i: Tensor, j: Tensor, nb: int) -> Tensor:
        widths = list(windows)
        while sum(widths) < nb:
            widths.append(windows[-1])
        window_of = torch.repeat_interleave(
            torch.arange(len(widths)), torch.tensor(widths)
        )
        kept = window_of[i] == window_of[j]
        for a, b in ranges:
            kept = kept | ((a <= j) & (j < b))
            if horizontal:
                kept = kept | ((a <= i) & (i < b))
        return kept

    pattern = p.Variable(windows, ranges, horizontal=horizontal, block=block)
    return PatternCase(pattern, of_blocks(block, on))


def hierarchical(levels: tuple[tuple[int, int], ...], block: int) -> PatternCase:
    def on(i: Tensor, j: Tensor, _nb: int) -> Tensor:
        kept = i == j
        for span, stride in levels:
            kept = kept | ((i // span == j // span) & (j % stride == 0))
        return kept

    return PatternCase(p.Hierarchical(levels, block), of_blocks(block, on))


def within(mask: PatternCase, other: PatternCase) -> PatternCase:
    assert isinstance(mask.pattern, p.MaskPattern)
    by_part = other.by_part
    return PatternCase(
        mask.pattern & other.pattern,
        lambda H, G, S: mask.counts(H, G, S) * other.counts(H, G, S),
        divisor=other.divisor,
        by_part=by_part and (lambda H, G, S: mask.counts(H, G, S) * by_part(H, G, S)),
    )


def _per_head(*cases: PatternCase) -> PatternCase:
    masks = tuple(c.pattern for c in cases)
    assert all(isinstance(m, p.MaskPattern) for m in masks)

    def counts(H: int, G: int, S: int) -> Tensor:
        n = len(cases)
        rows: list[Tensor] = []
        for i, case in enumerate(cases):
            first = sum(map(len, rows))
            rows.append(case.counts(H, G, S)[first : first + H // n + (i < H % n)])
        return torch.cat(rows)

    return PatternCase(p.PerHead(masks), counts)  # type: ignore[arg-type]


def splitmix64(x: int) -> int:
    """The public reference code, in numbers."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def with_random(
    pattern: p.Pattern, given: Counts, random: int, block: int
) -> PatternCase:
    """``given``, and of each row the open blocks with the least hash."""
    seed = 7

    def count(H: int, G: int, S: int, *, is_causal: bool) -> Tensor:
        kept = given(H, G, S).bool()
        nb = math.ceil(S / block)
        is_open = ~kept[:, ::block, ::block]
        for h in range(H):
            for i in range(nb):
                rows = slice(i * block, (i + 1) * block)
                last = i if is_causal else nb - 1
                candidates = [j for j in range(last + 1) if is_open[h, i, j]]
                candidates.sort(key=lambda j: splitmix64(seed ^ h << 42 ^ i << 21 ^ j))
                for j in candidates[:random]:
                    kept[h, rows, j * block : (j + 1) * block] = True
        return kept.int()

    return PatternCase(
        pattern,
        lambda H, G, S: count(H, G, S, is_causal=False),
        lambda H, G, S: count(H, G, S, is_causal=True),
    )


def near_or_sink(b: object, h: Any, q: Any, k: Any) -> object:  # noqa: ANN401
    """A user's mask function."""
    del b
    return ((q - k).abs() < 5 + h % 2) & (k != 7) | (k // 3 == 2) & ~(q % 4 == 1)


def _near_or_sink(H: int, _G: int, S: int) -> Tensor:
    q, k = _at(S)
    h = torch.arange(H)[:, None, None]
    near = ((q - k).abs() < 5 + h % 2) & (k != 7)
    return (near | (k // 3 == 2) & (q % 4 != 1)).int()


def of_table(heads: int, block: int, S: int) -> PatternCase:
    nb = math.ceil(S / block)
    on = (torch.arange(heads * nb * nb) * 7 % 5 < 2).view(heads, nb, nb)

    def counts(H: int, _G: int, S: int) -> Tensor:
        q, k = _at(S)
        return on[:, q // block, k // block].expand(H, S, S).int()

    return PatternCase(p.Custom(on[0] if heads == 1 else on, block), counts)


LOCAL = local_window(16, 4)
DILATED_BLOCKS = dilated_blocks((2, 5), 4)
LONGNET = longnet((8, 24, 48), (1, 2, 4), "paper")

CASES: dict[str, PatternCase] = {
    "longnet paper": LONGNET,
    "longnet torchscale": longnet((5, 12, 30), (1, 3, 4), "torchscale"),
    "longnet kv_head": longnet((7, 64), (2, 3), "kv_head"),
    "longnet r over w": longnet((6, 200), (4, 7), "paper"),
    "longnet detached": longnet((8, 24, 48), (1, 2, 4), "paper", weights="detached"),
    "grouped": grouped((8, 24, 60), (1, 2, 4)),
    "consecutive": consecutive((9, 20, 11), (1, 2, 4)),
    "local window": LOCAL,
    "dilated blocks": DILATED_BLOCKS,
    "global local": global_local(2, 8, 4),
    "fixed": fixed(4, 1, 1, 4, horizontal=False),
    "fixed by head": fixed(5, 1, 3, 4, horizontal=True),
    "variable": variable((2, 1, 3), ((4, 6),), 4, horizontal=False),
    "variable one": variable((3,), ((0, 1), (7, 8)), 4, horizontal=True),
    "bigbird": PatternCase(
        p.BigBird(3, 1, 0, 4),
        of_blocks(4, lambda i, j, _: ((i - j).abs() <= 1) | (i < 1) | (j < 1)),
    ),
    "bigbird random": with_random(
        p.BigBird(3, 1, 2, 4, seed=7),
        of_blocks(4, lambda i, j, _: ((i - j).abs() <= 1) | (i < 1) | (j < 1)),
        *(2, 4),
    ),
    "variable random": with_random(
        p.Variable((2, 1), ((3, 4),), 1, block=5, seed=7),
        variable((2, 1), ((3, 4),), 5, horizontal=False).counts,
        *(1, 5),
    ),
    "custom function": PatternCase(p.Custom(near_or_sink), _near_or_sink),
    "custom table": of_table(1, 4, 43),
    "longformer": PatternCase(
        p.Longformer(2, (0, 5), 4),
        of_blocks(
            4,
            lambda i, j, _: (
                ((i - j).abs() <= 1) | _is_one_of(i, (0, 5)) | _is_one_of(j, (0, 5))
            ),
        ),
    ),
    "strided": PatternCase(
        p.Strided(6),
        _tokens(lambda q, k: (k <= q) & ((q - k < 6) | ((q - k) % 6 == 0))),
    ),
    "sinks": PatternCase(
        p.Sinks(3, 9), _tokens(lambda q, k: (k <= q) & ((k < 3) | (k > q - 9)))
    ),
    "dilated window": PatternCase(
        p.DilatedWindow(4, 3),
        _tokens(lambda q, k: ((q - k) % 3 == 0) & ((q - k).abs() <= 4 * 3)),
    ),
    "hierarchical": hierarchical(((4, 1), (12, 4)), 4),
    "local and longnet": within(LOCAL, LONGNET),
    "local and divided": within(LOCAL, grouped((8, 24), (2, 3), divides=True)),
    "dilated and local": within(DILATED_BLOCKS, LOCAL),
    "by head": _per_head(LOCAL, DILATED_BLOCKS),
}

# Not among those above, which are known before q and k are.
ADAPTIVE: dict[str, PatternCase] = {
    "adaptive": adaptive(3, 4),
    "adaptive alone": adaptive(1, 4),
}


def check_simulated(
    case: PatternCase,
    layout: Layout,
    heads: tuple[int, int],
    *,
    is_causal: bool,
    length: int = 43,
) -> None:
    """Hold a pattern's schedule, checked and simulated, against its dense meaning."""
    (H, G), S, D = heads, length, 4
    generator = torch.Generator().manual_seed(1)
    shapes = [(1, H, S, D), (1, G, S, D), (1, G, S, D), (1, H, S, D)]
    q, k, v, grad = (
        torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes
    )
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = case.attend(*inputs, is_causal=is_causal)
    want = (out, *torch.autograd.grad(out, inputs, grad))
    mask = Mask(causal()) if is_causal else Mask()
    parts = case.pattern.build_parts(mask, AttentionSpec(H, G, S, is_causal))
    schedule = build_schedule(parts, layout, S)
    check_schedule(schedule)
    with torch.no_grad():
        got = simulate(schedule, q, k, v, grad_out=grad)
    for name, value in zip(("out", "dq", "dk", "dv"), want, strict=True):
        assert (getattr(got, name) - value).abs().max() <= 1e-10, name
