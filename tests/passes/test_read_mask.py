"""Masks are read as what they are: equal ones alike, others not at all."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.attentions import Traced, trace
from torch import Tensor

from ringcompile.ir.evaluate import evaluate
from ringcompile.ir.mask import (
    TRUE,
    EmptyRow,
    Mask,
    causal,
    chunked,
    conjunction,
    disjunction,
    documents,
    key_padding,
    prefix,
    window,
)

B, H, S, D = 3, 4, 12, 8
LOWEST = torch.finfo(torch.float32).min
MaskFn = Callable[..., Tensor]


def make_qkv() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(B, H, S, D, generator=generator) for _ in range(3))


def trace_masked(make_mask: MaskFn, *captures: Tensor, dynamic: bool = False) -> Traced:
    """SDPA under a mask made of the given tensors and S."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *tensors: Tensor) -> Tensor:
        mask = make_mask(q.shape[2], *tensors)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return trace(attend, *make_qkv(), *captures, dynamic=dynamic)


def row(s: int) -> Tensor:
    return torch.arange(s)[:, None]


def column(s: int) -> Tensor:
    return torch.arange(s)[None, :]


def by_fancy_indexing(s: int) -> Tensor:
    positions = torch.arange(s)
    i, j = positions[None, None, :, None], positions[None, None, None, :]
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.int64)
    table = positions.expand(2, -1)
    return table[zero, j] <= table[zero, i]


def by_cumsum(s: int) -> Tensor:
    counted = torch.ones(s, dtype=torch.int64).cumsum(0)
    return counted[None] <= counted[:, None]


def by_cat(s: int) -> Tensor:
    half = s // 2
    above = torch.cat([row(s)[:half] >= column(s), row(s)[half:] >= column(s)])
    return above.view(1, 1, s, s)


CAUSAL: dict[str, MaskFn] = {
    "tril of ones": lambda s: torch.ones(s, s, dtype=torch.bool).tril(),
    "not triu": lambda s: ~torch.ones(s, s, dtype=torch.bool).triu(1),
    "triu == 0": lambda s: torch.ones(s, s).triu(1) == 0,
    "tril of ints": lambda s: torch.tril(torch.ones(s, s, dtype=torch.int64)).bool(),
    "le": lambda s: column(s) <= row(s),
    "not gt": lambda s: ~(column(s) > row(s)),
    "ge flipped": lambda s: row(s).ge(column(s)),
    "difference": lambda s: (row(s) - column(s)) >= 0,
    "negated difference": lambda s: (column(s) - row(s)) < 1,
    "shifted and doubled": lambda s: 2 * column(s) + 3 < 2 * row(s) + 4,
    "where": lambda s: torch.where(column(s) > row(s), False, True),
    "masked_fill": lambda s: torch.ones(s, s, dtype=torch.bool).masked_fill(
        column(s) > row(s), False
    ),
    "transposed": lambda s: (row(s) <= column(s)).transpose(0, 1),
    "permuted 4-D": lambda s: (
        (row(s) <= column(s)).expand(B, 1, s, s).permute(0, 1, 3, 2)
    ),
    "flipped": lambda s: (row(s) <= column(s)).flip(0).flip(1).flip([0, 1]).T,
    "sliced from larger": lambda s: torch.ones(2 * s, 2 * s).tril()[:s, :s] != 0,
    "fancy indexing": by_fancy_indexing,
    "cumsum of ones": by_cumsum,
    "cat": by_cat,
    "select": lambda s: (column(s) <= row(s)).expand(5, s, s)[3],
    "xor": lambda s: (column(s) > row(s)) ^ torch.ones((), dtype=torch.bool),
    "twice": lambda s: (column(s) <= row(s)) & torch.ones(s, s).tril().bool(),
    "with a weaker one": lambda s: (column(s) <= row(s)) & (column(s) <= row(s) + 3),
    "with bounds": lambda s: (column(s) <= row(s)) & (column(s) < s) & (row(s) >= 0),
    "added": lambda s: torch.zeros(s, s).masked_fill(column(s) > row(s), -math.inf),
    "added triu": lambda s: torch.full((s, s), LOWEST).triu(1),
    "one minus, times": lambda s: (1.0 - (column(s) <= row(s)).float()) * LOWEST,
    "sum of two": lambda s: (
        torch.where(column(s) > row(s), LOWEST, 0.0)
        + torch.where(column(s) > row(s) + 2, LOWEST, 0.0)
    ),
    "log": lambda s: torch.ones(s, s).tril().log(),
}
SYMBOLIC = set(CAUSAL) - {"cat"}


@pytest.mark.parametrize("spelling", CAUSAL)
def test_causal_spellings_read_alike(spelling: str) -> None:
    region = trace_masked(CAUSAL[spelling]).region()
    assert region.mask == Mask(causal())
    assert region.captures == ()


@pytest.mark.parametrize("spelling", sorted(SYMBOLIC))
def test_causal_spellings_read_alike_for_symbolic_sizes(spelling: str) -> None:
    assert trace_masked(CAUSAL[spelling], dynamic=True).region().mask == Mask(causal())


def test_is_causal_reads_as_causal() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    assert trace(attend, *make_qkv()).region().mask == Mask(causal())


STATIC_MASKS: dict[str, tuple[MaskFn, Mask]] = {
    "none": (lambda s: torch.ones(s, s, dtype=torch.bool), Mask()),
    "window": (
        lambda s: (column(s) <= row(s)) & (row(s) - column(s) < 4),
        Mask(window(left=3, right=0)),
    ),
    "band": (
        lambda s: torch.ones(s, s).tril(2).triu(-3).bool(),
        Mask(window(left=3, right=2)),
    ),
    "prefix": (
        lambda s: (column(s) <= row(s)) | (column(s) < 5),
        Mask(disjunction(causal(), prefix(5))),
    ),
    "chunked": (lambda s: row(s) // 4 == column(s) // 4, Mask(chunked(4))),
    "chunked by rounding": (
        lambda s: (
            torch.div(row(s), 4, rounding_mode="floor")
            == torch.div(column(s), 4, rounding_mode="trunc")
        ),
        Mask(chunked(4)),
    ),
    "chunked causal": (
        lambda s: (row(s) // 4 == column(s) // 4).tril(),
        Mask(conjunction(chunked(4), causal())),
    ),
    "sinks": (
        lambda s: (column(s) <= row(s)) & ((column(s) < 2) | (row(s) - column(s) < 3)),
        Mask(conjunction(causal(), disjunction(prefix(2), window(left=2)))),
    ),
    "window longer than S": (
        lambda s: (column(s) <= row(s)) & (row(s) - column(s) < 40),
        Mask(causal()),
    ),
}


@pytest.mark.parametrize("name", STATIC_MASKS)
def test_masks_of_positions(name: str) -> None:
    make_mask, want = STATIC_MASKS[name]
    assert trace_masked(make_mask).region().mask == want


def test_a_mask_laid_flat_and_folded_again_is_read_right() -> None:
    """Not in normal form, but ``region()`` holds it against the graph's own."""
    trace_masked(lambda s: (column(s) <= row(s)).reshape(-1).view(1, s, s)).region()


def test_heads_may_differ() -> None:
    """A mask per head: even heads causal, odd heads see all."""

    def make_mask(s: int) -> Tensor:
        odd = (torch.arange(H) % 2 == 1).view(1, H, 1, 1)
        return odd | (column(s) <= row(s))

    assert str(trace_masked(make_mask).region().mask) == "h % 2 == 1 or k <= q"


# ---- captures ------------------------------------------------------------------------


def make_padding() -> Tensor:
    lengths = torch.tensor([S, S - 3, S - 5])
    return torch.arange(S) < lengths[:, None]


PADDING: dict[str, Callable[[int, Tensor], Tensor]] = {
    "ints": lambda s, m: m.bool()[:, None, None, :],
    "compared": lambda s, m: (m == 0).logical_not()[:, None, None],
    "not equal": lambda s, m: m.view(B, 1, 1, s) != 0,
    "indexed": lambda s, m: m.bool()[
        torch.arange(B).view(B, 1, 1, 1), torch.arange(s).view(1, 1, 1, s)
    ],
    "expanded": lambda s, m: m[:, None, None, :].expand(B, 1, s, s).to(torch.bool),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("spelling", PADDING)
def test_padding_spellings_read_alike(spelling: str, *, dynamic: bool) -> None:
    traced = trace_masked(PADDING[spelling], make_padding().long(), dynamic=dynamic)
    region = traced.region()
    assert region.mask == Mask(key_padding(0), num_captures=1)
    assert [n.op for n in region.captures] == ["placeholder"]


EMPTY_ROWS: dict[str, tuple[MaskFn, EmptyRow]] = {
    "bool": (lambda s, m: m[:, None, None] & (column(s) <= row(s)), EmptyRow.ZERO),
    "-inf": (
        lambda s, m: torch.zeros(B, 1, s, s).masked_fill(
            ~(m[:, None, None] & (column(s) <= row(s))), -math.inf
        ),
        EmptyRow.ZERO,
    ),
    "finfo.min": (
        lambda s, m: torch.where(m[:, None, None] & (column(s) <= row(s)), 0.0, LOWEST),
        EmptyRow.MEAN_ALL,
    ),
    "one minus": (
        lambda s, m: (
            (1.0 - (m[:, None, None] & (column(s) <= row(s))).float()) * LOWEST
        ),
        EmptyRow.MEAN_ALL,
    ),
}


@pytest.mark.parametrize("spelling", EMPTY_ROWS)
def test_what_a_query_without_keys_gives(spelling: str) -> None:
    """Left padding: the first queries see no key. ``region()`` runs the graph's own."""
    make_mask, want = EMPTY_ROWS[spelling]
    region = trace_masked(make_mask, make_padding().flip(1)).region()
    assert region.mask == Mask(conjunction(key_padding(0), causal()), 1, want)


def make_documents() -> Tensor:
    return torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2]).expand(B, -1).contiguous()


DOCUMENTS: dict[str, Callable[[int, Tensor], Tensor]] = {
    "equal": lambda s, d: (d[:, None, :, None] == d[:, None, None, :]).tril(),
    "difference": lambda s, d: ((d[:, :, None] - d[:, None, :]) == 0)[:, None].tril(),
    "not different": lambda s, d: (
        ~((d[:, None, None, :] != d[:, None, :, None]) | (column(s) > row(s)))
    ),
    "ranges": lambda s, d: (
        (d[:, None, :, None] >= d[:, None, None])
        & (d[:, None, :, None] <= d[:, None, None])
    ).tril(),
    "added": lambda s, d: (
        torch.where(d[:, None, :, None] == d[:, None, None], 0.0, -math.inf)
        + torch.full((s, s), -math.inf).triu(1)
    ),
}


@pytest.mark.parametrize("spelling", DOCUMENTS)
def test_document_spellings_read_alike(spelling: str) -> None:
    region = trace_masked(DOCUMENTS[spelling], make_documents()).region()
    assert region.mask == Mask(conjunction(documents(0), causal()), num_captures=1)


def test_captures_are_numbered_as_they_stand_in_the_graph() -> None:
    def one(s: int, m: Tensor, d: Tensor) -> Tensor:
        return m[:, None, None].bool() & (d[:, None, :, None] == d[:, None, None])

    def other(s: int, m: Tensor, d: Tensor) -> Tensor:
        same = d[:, :, None] == d[:, None]
        return (same & (m != 0)[:, None])[:, None]

    captures = make_padding().long(), make_documents()
    regions = [trace_masked(make, *captures).region() for make in (one, other)]
    assert str(regions[0].mask) == "c0[b, k] != 0 and c1[b, k] == c1[b, q]"
    assert regions[0].mask == regions[1].mask


def test_the_same_computation_twice_is_one_capture() -> None:
    def make_mask(s: int, starts: Tensor) -> Tensor:
        at_query = starts.cumsum(1)[:, None, :, None]
        return at_query == starts.cumsum(1)[:, None, None, :]

    starts = torch.zeros(B, S, dtype=torch.int64)
    starts[:, [0, 4, 9]] = 1
    region = trace_masked(make_mask, starts).region()
    assert region.mask == Mask(documents(0), num_captures=1)


# ---- runs of position ids ------------------------------------------------------------


def make_positions() -> Tensor:
    """Three runs, one of which starts at 5; equal to no document numbering."""
    runs = [torch.arange(4), 5 + torch.arange(3), torch.arange(5)]
    return torch.cat(runs).expand(B, -1).contiguous()


def count_runs(positions: Tensor) -> Tensor:
    before = positions[:, :1] - 1
    return (torch.diff(positions, prepend=before, dim=-1) != 1).cumsum(-1)


def same_run(s: int, p: Tensor) -> Tensor:
    runs = count_runs(p)
    return runs[:, None, :, None] == runs[:, None, None, :]


def test_inside_a_run_ids_compare_like_positions() -> None:
    def make_mask(s: int, p: Tensor) -> Tensor:
        return same_run(s, p) & (p[:, None, None] <= p[:, None, :, None])

    region = trace_masked(make_mask, make_positions()).region()
    assert region.mask == Mask(conjunction(documents(0), causal()), num_captures=1)
    assert "cumsum" in region.captures[0].name


def test_inside_a_run_a_window_of_ids_is_one_of_positions() -> None:
    def make_mask(s: int, p: Tensor) -> Tensor:
        at_query, at_key = p[:, None, :, None], p[:, None, None, :]
        inside = (at_key <= at_query) & (at_key > at_query - 3)
        return same_run(s, p) & inside

    region = trace_masked(make_mask, make_positions()).region()
    want = conjunction(documents(0), window(left=2, right=0))
    assert region.mask == Mask(want, num_captures=1)


def test_without_the_run_ids_stay_ids() -> None:
    def make_mask(s: int, p: Tensor) -> Tensor:
        return p[:, None, None] <= p[:, None, :, None]

    assert str(trace_masked(make_mask, make_positions()).region().mask) == (
        "c0[b, k] <= c0[b, q]"
    )


def test_breaks_of_another_step_are_no_runs() -> None:
    """With steps of 2, ids differ by 2 for each position."""

    def make_mask(s: int, p: Tensor) -> Tensor:
        before = p[:, :1] - 2
        runs = (torch.diff(p, prepend=before) != 2).cumsum(-1)
        same = runs[:, None, :, None] == runs[:, None, None, :]
        return same & (p[:, None, None] > p[:, None, :, None] - 3)

    region = trace_masked(make_mask, 2 * make_positions()).region()
    assert len(region.captures) == 2


def test_of_positions_alone_there_is_one_run() -> None:
    def make_mask(s: int) -> Tensor:
        positions = torch.arange(s)[None].expand(B, -1)
        return same_run(s, positions) & (column(s) <= row(s))

    region = trace_masked(make_mask).region()
    assert region.mask == Mask(causal())


# ---- what can't be read --------------------------------------------------------------


UNREADABLE: dict[str, tuple[MaskFn, tuple[Tensor, ...], str]] = {
    "rows of a computed S x S": (
        lambda s, d: (d[:, :, None] * d[:, None, :]).amax(-1).bool()[:, None, None],
        (torch.randint(0, 2, (B, S)),),
        "every pair of tokens",
    ),
    "cumsum over activations": (
        lambda s, x: (x.cumsum(1)[..., 0] > 0)[:, None, None, :],
        (torch.randn(B, S, D),),
        "isn't computed from positions",
    ),
    "changed in place": (
        lambda s: torch.zeros(s, s).masked_fill_(column(s) > row(s), -math.inf),
        (),
        "in place",
    ),
    "random": (lambda s: torch.rand(B, 1, 1, s) > 0.5, (), ""),
    "random ints": (lambda s: torch.randint(0, 2, (B, 1, 1, s)).bool(), (), ""),
    "bytes that wrap": (
        lambda s, m: m[:, None, :, None] - m[:, None, None] < 200,
        (torch.arange(S, dtype=torch.uint8).expand(B, -1).contiguous(),),
        "",
    ),
}


CARRIED: dict[str, tuple[MaskFn, tuple[Tensor, ...]]] = {
    "dense random bias": (lambda s, x: x, (torch.randn(B, 1, S, S),)),
    "ALiBi": (
        lambda s: -(row(s) - column(s)).abs().float(),
        (),
    ),
    "small numbers": (
        lambda s: torch.where(column(s) > row(s), -1e4, 0.0),
        (),
    ),
    "NaN": (lambda s: torch.where(column(s) > row(s), math.nan, 0.0), ()),
    "ints of unknown values": (
        lambda s, m: (1.0 - m[:, None, None].float()) * LOWEST,
        (torch.ones(B, S, dtype=torch.int64),),
    ),
}


# A mask of pairs that the user passes in lies on every rank, whatever is done.
GIVEN: dict[str, tuple[MaskFn, Tensor, str]] = {
    "bools": (lambda s, m: m, torch.rand(S, S) > 0.5, "c0[q, k] != 0"),
    "true where hidden": (lambda s, m: ~m, torch.rand(S, S) > 0.5, "c0[q, k] == 0"),
    "of each batch": (
        lambda s, m: m,
        torch.rand(B, 1, S, S) > 0.5,
        "c0[b, 0, q, k] != 0",
    ),
    "ints compared": (
        lambda s, m: m[None, None] < 3,
        torch.randint(0, 5, (S, S)),
        "c0[q, k] <= 2",
    ),
    "flattened": (
        lambda s, m: m.view(s, s),
        torch.rand(S * S) > 0.5,
        f"c0[k + {S}*q] != 0",
    ),
}


@pytest.mark.parametrize("name", GIVEN)
def test_a_mask_of_pairs_that_is_passed_in_is_read_as_it_is(name: str) -> None:
    make_mask, given, text = GIVEN[name]
    region = trace_masked(make_mask, given).region()
    assert str(region.mask) == text
    at = torch.meshgrid(torch.arange(B), *[torch.arange(S)] * 2, indexing="ij")
    b, q, k = (x[:, None] for x in at)
    want = make_mask(S, given).expand(B, 1, S, S)
    got = evaluate(region.mask.keeps, (b, torch.zeros_like(b), q, k), [given])
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", CARRIED)
def test_other_numbers_are_added_as_they_are(name: str) -> None:
    make_mask, captures = CARRIED[name]
    assert trace_masked(make_mask, *captures).region().biases


@pytest.mark.parametrize("name", UNREADABLE)
def test_other_masks_are_refused(name: str) -> None:
    make_mask, captures, because = UNREADABLE[name]
    refusal = trace_masked(make_mask, *captures).refusal()
    assert because in refusal.because
    assert refusal.what
    assert refusal.instead


def test_a_mask_changed_through_a_view_is_refused() -> None:
    def make_mask(s: int) -> Tensor:
        mask = torch.ones(s, s, dtype=torch.bool).tril()
        mask[:, 0] = False
        return mask

    assert "in place" in trace_masked(make_mask).refusal().because


def test_drops_that_add_up_unevenly_are_refused_if_a_query_may_see_no_key() -> None:
    """min + min is -inf: a query without keys would average over some keys only."""

    def make_mask(s: int, m: Tensor) -> Tensor:
        padding = torch.where(m[:, None, None], 0.0, LOWEST)
        return padding + torch.full((s, s), LOWEST).triu(1)

    refusal = trace_masked(make_mask, make_padding().flip(1)).refusal()
    assert "no key" in refusal.because


def test_a_mask_that_keeps_all_is_no_mask() -> None:
    region = trace_masked(lambda s: torch.zeros(s, s)).region()
    assert region.mask == Mask(TRUE)
