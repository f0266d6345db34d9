"""Masks that are a window and more: each pair once, and most of them without a mask."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from unittest.mock import Mock

import pytest
import torch
from expecttest import assert_expected_inline
from support.count_pairs import count_pairs
from support.ranks import RankPool
from support.ring_cases import Case, join, run_cases
from support.sampling import one_in, slow
from torch import Tensor
from torch.distributed import ProcessGroup

from ringcompile.ir.evaluate import evaluate
from ringcompile.ir.layout import Layout, Side
from ringcompile.ir.mask import (
    K,
    Mask,
    at_least_zero,
    causal,
    conjunction,
    disjunction,
    documents,
    window,
)
from ringcompile.ir.schedule import Kernel, Piece
from ringcompile.ir.text import parse_mask
from ringcompile.lowering.calls import Call, rows
from ringcompile.lowering.cut_masks import cut_masked
from ringcompile.lowering.tiles import pieces
from ringcompile.lowering.tiles.dense import attend
from ringcompile.patterns import BigBird, Fixed, GlobalLocal, MaskPattern, Variable
from ringcompile.patterns.base import AttentionSpec
from ringcompile.plan.tiles import build_tile

HEADS, BLOCK = 2, 128


def of_pattern(pattern: MaskPattern, length: int, *, is_causal: bool) -> Mask:
    """The mask of a pattern, under a causal one or alone."""
    keeps = pattern.keeps(AttentionSpec(HEADS, HEADS, length, is_causal))
    return Mask(conjunction(causal(), keeps) if is_causal else keeps)


PREFIX = Mask(disjunction(causal(), at_least_zero(299 - K)))
MASKS: dict[str, Callable[[int], Mask]] = {
    "prefix": lambda _: PREFIX,
    "window or first": lambda _: Mask(
        conjunction(causal(), disjunction(window(300), at_least_zero(255 - K)))
    ),
    "causal BigBird": lambda n: of_pattern(BigBird(5, 2, 1, BLOCK), n, is_causal=True),
    "BigBird": lambda n: of_pattern(BigBird(3, 1, 2, BLOCK), n, is_causal=False),
    "small blocks": lambda n: of_pattern(BigBird(9, 2, 1, 64), n, is_causal=True),
    "GlobalLocal": lambda n: of_pattern(
        GlobalLocal(1, 4 * BLOCK, BLOCK), n, is_causal=False
    ),
    "Fixed": lambda n: of_pattern(
        Fixed(4, 1, 2, horizontal=True, block=BLOCK), n, is_causal=True
    ),
    "Variable": lambda n: of_pattern(
        Variable((2, 3), ((0, 1),), 1, block=BLOCK), n, is_causal=False
    ),
}


@dataclass(frozen=True)
class Place:
    """A tile: whose queries, whose keys."""

    layout: Layout
    length: int
    ranks: tuple[int, int]

    @property
    def chunk(self) -> int:
        """Rows of a chunk."""
        return self.layout.chunk_size(self.length)

    @property
    def positions(self) -> list[Tensor]:
        """Of queries and of keys; those of pads are past the end."""
        return [
            torch.tensor(self.layout.positions(rank, self.length))
            for rank in self.ranks
        ]

    def cut(self, mask: Mask) -> list[Piece]:
        """All calls of the tile."""
        side = Side(self.layout, self.length)
        found: list[Piece] = []
        for piece in build_tile(mask, self.layout, *self.ranks, self.length).pieces:
            calls: tuple[Piece, ...] = (piece,)
            if piece.kernel is Kernel.MASKED:
                calls = cut_masked(
                    piece, mask, HEADS, (side, side), self.ranks, least_width=16
                )
            found += calls
        return found

    def count(self, calls: Iterable[Piece], mask: Mask, head: int) -> Tensor:
        """How often they compute each pair of a head."""
        q, k = self.positions

        def count_masked(call: Call) -> Tensor:
            at = q[slice(*call.q.resolve(1))], k[slice(*call.kv.resolve(1))]
            return evaluate_mask(parse_mask(call.mask) if call.mask else mask, head, at)

        numbered = [self._numbered(call) for call in calls]
        return count_pairs(numbered, len(q), len(k), count_masked)

    def _numbered(self, call: Piece) -> Call:
        if isinstance(call, Call):
            return call
        q, kv = (rows(*of.resolve(self.chunk)) for of in (call.q, call.kv))
        return Call(q, kv, call.kernel)


def evaluate_mask(mask: Mask, head: int, at: Sequence[Tensor]) -> Tensor:
    """Which pairs of a head count, 0 or 1."""
    q, k = at
    none = torch.zeros((), dtype=torch.int64)
    found = evaluate(mask.keeps, (none, none + head, q[:, None], k), ())
    return found.expand(len(q), len(k)).long()


def tiles_of(layout: str, cp_size: int, length: int) -> list[Place]:
    """All tiles of a layout."""
    where = Layout(layout, cp_size, *((256, 4) if layout == "hilbert" else ()))
    ranks = range(cp_size)
    return [Place(where, length, (q, k)) for q in ranks for k in ranks]


WHERE = [
    ("contiguous", 1, 2048),
    ("contiguous", 3, 1900),
    ("zigzag", 1, 1280),
    ("zigzag", 2, 2101),
    ("striped", 2, 1024),
    ("hilbert", 2, 1024),
]


@pytest.mark.parametrize("case", one_in(3, product(WHERE, MASKS)), ids=str)
def test_each_pair_is_in_one_call(case: tuple[tuple[str, int, int], str]) -> None:
    (layout, cp_size, length), mask = case
    for place in tiles_of(layout, cp_size, length):
        whole = MASKS[mask](length)
        calls = place.cut(whole)
        for head in range(HEADS):
            found = place.count(calls, whole, head)
            q, k = place.positions
            is_real = (q < length)[:, None] & (k < length)
            want = evaluate_mask(whole, head, place.positions) * is_real
            assert torch.equal(found, want)


def describe(calls: Iterable[Piece]) -> str:
    """A line for each call."""
    return "\n".join(
        f"{getattr(c, 'groups', 1)} x {c.kernel.value} q {c.q} kv {c.kv}" for c in calls
    )


def count_masked_blocks(calls: Iterable[Piece]) -> int:
    """Of the rows and columns that calls under a mask are given."""
    sizes = (
        (c.q.stop[1] - c.q.start[1]) * (c.kv.stop[1] - c.kv.start[1])
        for c in calls
        if c.kernel is Kernel.MASKED
    )
    return sum(sizes) // BLOCK**2


def test_a_prefix_is_a_causal_kernel_and_a_corner() -> None:
    (place,) = tiles_of("contiguous", 1, 2048)
    calls = place.cut(PREFIX)
    assert_expected_inline(
        describe(calls),
        """\
1 x causal q 0:2048 kv 0:2048
1 x masked q 0:384 kv 0:384""",
    )
    assert count_masked_blocks(calls) == 9


def test_global_blocks_are_rectangles() -> None:
    (place,) = tiles_of("contiguous", 1, 4096)
    calls = place.cut(MASKS["GlobalLocal"](4096))
    assert_expected_inline(
        describe(calls),
        """\
7 x causal q 0:3584 kv 256:3840
1 x causal q 3584:3840 kv 3840:4096
1 x full q 3840:4096 kv 3840:4096
1 x causal q 255:511 kv 0:256
1 x full q 0:255 kv 0:256
7 x causal q 512:4095 kv 257:3840
30 x causal q 256:4096 kv 0:3840
30 x causal q 0:3839 kv 257:4096
1 x full q 384:4096 kv 0:128
1 x full q 0:128 kv 384:4096""",
    )
    assert count_masked_blocks(calls) == 0


def test_random_blocks_alone_stay_masked() -> None:
    (place,) = tiles_of("contiguous", 1, 4096)
    mask = MASKS["causal BigBird"](4096)
    (rest,) = (c for c in place.cut(mask) if c.kernel is Kernel.MASKED)
    assert isinstance(rest, Call)
    assert rest.mask is not None
    kept = [evaluate_mask(parse_mask(rest.mask), h, place.positions) for h in (0, 1)]
    # A random block a row of blocks, for each head one of its own; early rows lack
    # blocks that nothing else holds.
    per_row = torch.stack(kept).unflatten(1, (-1, BLOCK)).sum(-1)
    assert set(per_row.flatten().tolist()) == {0, BLOCK}
    assert per_row[:, 5:].min() == BLOCK


def test_what_captures_decide_stays_under_the_mask() -> None:
    mask = Mask(
        conjunction(disjunction(window(300), at_least_zero(255 - K)), documents(0)), 1
    )
    (place,) = tiles_of("contiguous", 1, 2048)
    assert [type(c) for c in place.cut(mask)] == [Piece]
    # Documents beside a window that all see.
    beside = Mask(conjunction(causal(), disjunction(window(300), documents(0))), 1)
    calls = place.cut(beside)
    (rest,) = (c for c in calls if c.kernel is Kernel.MASKED)
    assert isinstance(rest, Call)
    assert rest.mask is not None
    far = parse_mask(rest.mask)
    assert far.num_captures == 1
    assert replace(far, keeps=beside.keeps) == beside
    ids = torch.randint(0, 3, (1, 2048), generator=torch.Generator().manual_seed(0))
    none, tokens = torch.zeros(()).long(), torch.arange(2048)
    at = (none, none, tokens[:, None], tokens)
    left, all_pairs = (evaluate(m.keeps, at, (ids,)).long() for m in (far, beside))
    dense = count_pairs([c for c in calls if c is not rest], 2048, 2048)
    assert torch.equal(dense + left, all_pairs)


def run_counting(
    group: ProcessGroup, rank: int, cases: tuple[Case, ...]
) -> list[tuple[list[tuple[Tensor | None, ...]], int]]:
    """What ``run_cases`` gives, and how many kernels without a mask each case ran."""
    found = []
    for case in cases:
        with pytest.MonkeyPatch.context() as patch:
            counter = Mock(side_effect=attend)
            patch.setattr(pieces, "attend", counter)
            results = run_cases(group, rank, (case,))
        found.append((results, counter.call_count))
    return found


@pytest.mark.parametrize("cp_size", [slow(1), 2, slow(3)])
def test_rings_are_attention(ranks: RankPool, cp_size: int) -> None:
    heads = (4, 2, 16, 16)
    cases = tuple(
        Case(mask, layout, S, heads, dtype, compile=compiler)
        for mask, layout, S, dtype, compiler in (
            # Keys of the other rank are read in two runs.
            ("window and first", "contiguous", 602, torch.float32, "eager"),
            ("window and first", "zigzag", 419, torch.float64, "eager"),
            ("window and first", "contiguous", 160, torch.bfloat16, "expanded"),
            ("big bird", "contiguous", 768, torch.float32, "expanded"),
            ("big bird", "zigzag", 768, torch.float64, "eager"),
        )
    )
    by_rank = ranks.run(run_counting, cases, world_size=cp_size)
    for n, case in enumerate(cases):
        results = [of_rank[n][0][0] for of_rank in by_rank]
        assert all(of_rank[n][1] > 0 for of_rank in by_rank), case
        for number, want in enumerate(case.expected()):
            got = join(case, [result[number] for result in results]).double()
            error = 2e-2 if case.dtype is torch.bfloat16 else 3e-6
            assert (got - want).abs().max() <= error * want.abs().max(), (case, number)
