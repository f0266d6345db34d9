"""Tiles by flex_attention's kernels: on CPU its eager form, and the lists of blocks."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.ranks import RankPool
from support.ring_cases import Case, join, run_cases
from sympy.logic.boolalg import Boolean
from torch import Tensor
from torch.distributed import ProcessGroup

from ringcompile import ops
from ringcompile.ir.evaluate import evaluate
from ringcompile.ir.layout import LAYOUTS, Layout
from ringcompile.ir.mask import B, Mask, at_least_zero, causal, key_padding, window
from ringcompile.lowering import program
from ringcompile.lowering.tiles import flex, pieces
from ringcompile.lowering.tiles.block_lists import BLOCK, ListSpec, SomeRows
from ringcompile.patterns import AttentionSpec, BigBird, Custom, LocalWindow, PerHead
from ringcompile.torch_private import flex_forward, size_hint

NAMES = ("out", "dq", "dk", "dv")


def read_list(counts: Tensor, indices: Tensor, num_columns: int) -> Tensor:
    """Which columns are listed for each row, ``(B, H, rows, columns)``."""
    flags = torch.arange(indices.shape[-1]) < counts[..., None]
    on = torch.zeros(*counts.shape, num_columns + 1, dtype=torch.bool)
    at = indices.long().where(flags, num_columns)  # what is behind the list
    return on.scatter(-1, at, flags)[..., :num_columns]


def obey_lists(call: Callable[..., Any]) -> Callable[..., Any]:
    """As kernels do, and the eager form does not: what is not listed does not count.

    Nor do they check bounds of what they are told fills blocks.
    """

    def wrapped(*args: Any, scale: float, fills_blocks: bool) -> Any:  # noqa: ANN401
        *tensors, lists, mask_mod, buffers = args
        some, some_at, full, full_at = list(lists)[:4]
        rows = [size_hint(x.shape[2]) for x in tensors[:2]]
        assert fills_blocks == all(n % BLOCK == 0 for n in rows)
        num_columns = -(-tensors[1].shape[2] // BLOCK)
        on = read_list(some, some_at, num_columns) | read_list(
            full, full_at, num_columns
        )
        on = on.expand(tensors[0].shape[0], tensors[0].shape[1], -1, -1).contiguous()

        def listed(
            b: Tensor, h: Tensor, q: Tensor, k: Tensor, *given: Tensor
        ) -> Tensor:
            *rest, blocks = given
            kept: Tensor = mask_mod(b, h, q, k, *rest)
            return kept & blocks[b, h, q // BLOCK, k // BLOCK]

        return call(
            *(*tensors, lists, listed, (*buffers, on)),
            scale=scale,
            fills_blocks=fills_blocks,
        )

    return wrapped


def run_flex(
    group: ProcessGroup, rank: int, cases: tuple[Case, ...]
) -> list[tuple[Tensor | None, ...]]:
    """Any other kernel is an error."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("another kernel")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("flex_forward", "flex_backward"):
            patch.setattr(flex, name, obey_lists(getattr(flex, name)))
        for name in ("attend", "attend_backward"):
            patch.setattr(pieces, name, refuse)
        for name in ("MASKED_ATTENTION", "MASKED_ATTENTION_BACKWARD"):
            patch.setattr(ops, name, refuse)
        patch.setattr(program, "has_flex_kernel", lambda *_: True)  # as on a GPU
        return run_cases(group, rank, cases)


@pytest.mark.parametrize("cp_size", [1, 2])
def test_every_tile_is_flex(ranks: RankPool, cp_size: int) -> None:
    heads = (4, 2, 16, 16)
    cases = tuple(
        Case(mask, layout, S, heads, kernel="flex", compile=compiler, any_length=is_any)
        for mask, layout, S, compiler, is_any in (
            ("causal", "zigzag", 300, "eager", False),
            ("padding", "contiguous", 301, "expanded", False),
            ("documents", "zigzag", 48, "expanded", True),
            ("documents", "zigzag", 512, "expanded", True),
            ("causal", "contiguous", 256, "eager", False),
            ("causal", "striped", 300, "expanded", True),
            ("global local", "contiguous", 300, "eager", False),
            ("window", "striped", 300, "eager", False),
            ("dilated window", "contiguous", 300, "expanded", False),
        )
    )
    by_rank = ranks.run(run_flex, cases, world_size=cp_size)
    for case, *shards in zip(cases, *by_rank, strict=True):
        for n, want in enumerate(case.expected()):
            got = join(case, [s[n] for s in shards]).double()
            assert (got - want).abs().max() <= 3e-6 * want.abs().max(), (case, NAMES[n])


def count_blocks(group: ProcessGroup, rank: int, case: Case) -> list[tuple[int, int]]:
    """How many blocks each call of forward has under the mask, and how many full."""
    counts = []

    def count(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        some, _, full, _ = args[3][:4]
        counts.append((int(some.sum()), int(full.sum())))
        return flex_forward(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "flex_forward", count)
        run_cases(group, rank, (case,))
    return counts


@pytest.mark.parametrize(
    ("mask", "on_diagonal", "full"),
    [("causal", 8, 28), ("all", 0, 64)],
)
def test_blocks_of_an_open_length_are_those_that_count(
    ranks: RankPool, mask: str, on_diagonal: int, full: int
) -> None:
    """Of 8 x 8: a kernel that went through all of them would take twice as long."""
    case = Case(
        *(mask, "contiguous", 8 * BLOCK, (2, 1, 16, 16)),
        kernel="flex",
        compile="eager",
        any_length=True,
    )
    assert ranks.run(count_blocks, case, world_size=1) == [[(on_diagonal, full)]]


SPEC = AttentionSpec(4, 4, 640)
TABLES: dict[str, Boolean] = {
    "random blocks": Mask(causal()).__and__(BigBird(1, 1, 1, 128).keeps(SPEC)).keeps,
    "given blocks": Custom(torch.arange(25).view(5, 5) * 7 % 5 < 3, 128).keeps(SPEC),
    "given by head": Custom(torch.arange(100).view(4, 5, 5) * 3 % 7 < 4, 128).keeps(
        SPEC
    ),
}
MASKS: dict[str, Boolean] = TABLES | {
    "all": Mask().keeps,
    "causal": causal(),
    "window": Mask(causal()).__and__(window(140)).keeps,
    "padding": Mask(causal()).__and__(key_padding(0)).keeps,
    "by head": PerHead((LocalWindow(256), LocalWindow(512))).keeps(
        AttentionSpec(4, 4, 600)
    ),
}


def read_lists(spec: ListSpec) -> tuple[Tensor, Tensor]:
    """Which blocks are under the mask, and which are full, ``(H, rows, columns)``."""
    lists = ops.BLOCK_LISTS(str(spec), device=torch.device("cpu"))
    rows, columns = lists[0].shape[-1], lists[4].shape[-1]
    some, full, some_of_keys, full_of_keys = (
        read_list(counts, indices, size)[0]
        for counts, indices, size in zip(
            lists[::2], lists[1::2], (columns, columns, rows, rows), strict=True
        )
    )
    assert torch.equal(some_of_keys, some.mT)
    assert torch.equal(full_of_keys, full.mT)
    return some, full


def list_shards(
    keeps: Boolean, num_heads: int, layout: Layout, length: int, ranks: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """The lists of two shards, and that their text is read back."""
    size = layout.shard_size(length)
    q, k = (SomeRows(layout, length, rank, ((0, size),)) for rank in ranks)
    spec = ListSpec(Mask(keeps), num_heads, q, k)
    assert ListSpec.parse(str(spec)) == spec
    return read_lists(spec)


def test_what_hangs_on_the_batch_is_under_the_mask() -> None:
    """Lists are of all batches: a block that is full in one may be empty in another."""
    layout = Layout("contiguous", 1)
    for first_only in (at_least_zero(-B), at_least_zero(B - 1)):
        partial, full = list_shards(first_only, 1, layout, 256, (0, 0))
        assert partial.all()
        assert not full.any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MASKS)
def test_lists_hold_each_block_that_may_count(name: str, layout: str) -> None:
    keeps, length, num_heads = MASKS[name], 600, 4
    place = Layout(layout, 2)
    is_exact = name not in {"padding", *TABLES}
    for ranks in ((0, 0), (1, 0)):
        some, full = list_shards(keeps, num_heads, place, length, ranks)
        kept = find_kept(keeps, num_heads, place, length, ranks)
        for h, i, j in product(range(num_heads), *map(range, full.shape[1:])):
            block = kept[h, i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
            listed = (bool(some[h % len(some), i, j]), bool(full[h % len(full), i, j]))
            counts = (bool(block.any() and not block.all()), bool(block.all()))
            if is_exact:
                assert listed == counts, (ranks, h, i, j)
            assert not all(listed), (ranks, h, i, j)
            assert not listed[1] or counts[1], (ranks, h, i, j)
            assert any(listed) or not any(counts), (ranks, h, i, j)


@pytest.mark.parametrize("ranks", [(0, 0), (1, 0), (1, 1)])
def test_lists_of_a_class_of_rows(ranks: tuple[int, int]) -> None:
    length, step, layout = 3200, 4, Layout("contiguous", 2)
    keeps = Mask(causal()).__and__(window(900)).keeps
    q, k = (SomeRows(layout, length, rank, ((0, 1600),), step) for rank in ranks)
    spec = ListSpec(Mask(keeps), 1, q, k)
    assert ListSpec.parse(str(spec)) == spec
    some, full = read_lists(spec)
    kept = find_kept(keeps, 1, layout, length, ranks)[0, ::step, ::step]
    seen = set()
    for i, j in product(*map(range, full.shape[1:])):
        block = kept[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
        counts = (bool(block.any() and not block.all()), bool(block.all()))
        assert (bool(some[0, i, j]), bool(full[0, i, j])) == counts, (i, j)
        seen.add(counts)
    assert full.shape[1:] == (4, 4)
    assert len(seen) > 1


@pytest.mark.parametrize("length", [100, 640])
def test_lists_of_a_direction_have_one_width_and_those_of_one_row_all_columns(
    length: int,
) -> None:
    """Kernels read full blocks by strides of the others, and split one row by number."""
    layout = Layout("contiguous", 1)
    q, k = (SomeRows(layout, 640, 0, ((0, n),)) for n in (length, 640))
    spec = ListSpec(Mask(TABLES["random blocks"]), 4, q, k)
    lists = ops.BLOCK_LISTS(str(spec), device=torch.device("cpu"))
    some, full, some_of_keys, full_of_keys = (x.shape[-1] for x in lists[1::2])
    assert some == full
    assert some_of_keys == full_of_keys
    assert some == 5 if length < BLOCK else some < 5


@pytest.mark.parametrize("name", TABLES)
def test_blocks_of_a_table_that_kernels_share_are_known(name: str) -> None:
    keeps, length, num_heads = TABLES[name], 640, 4
    place, ranks = Layout("contiguous", 1), (0, 0)
    some, full = list_shards(keeps, num_heads, place, length, ranks)
    assert len(full) == (1 if name == "given blocks" else num_heads)
    kept = find_kept(keeps, num_heads, place, length, ranks)
    blocks = kept.unflatten(2, (-1, 128)).unflatten(1, (-1, 128)).transpose(2, 3)
    blocks = blocks.flatten(3)[: len(full)]
    assert torch.equal(full, blocks.all(-1))
    assert torch.equal(some, blocks.any(-1) & ~blocks.all(-1))


def find_kept(
    keeps: Boolean, num_heads: int, layout: Layout, length: int, ranks: tuple[int, int]
) -> Tensor:
    """Which pairs count, ``(H, n, m)``, of the rows of two shards."""
    q, k = (torch.tensor(layout.positions(r, length)) for r in ranks)
    heads = torch.arange(num_heads).view(-1, 1, 1)
    captures = [torch.arange(length)[None] % 7 > 0]
    kept = evaluate(keeps, (torch.zeros_like(heads), heads, q[:, None], k), captures)
    return kept.expand(num_heads, len(q), len(k))


def test_tables_of_blocks_run_by_flex_kernels(ranks: RankPool) -> None:
    for got, want in ranks.run(run_table, world_size=2):
        assert (got - want).abs().max() <= 1e-6


def run_table(group: ProcessGroup, rank: int) -> tuple[Tensor, Tensor]:
    from support.compiling import compile_ring  # noqa: PLC0415

    del rank
    table = torch.arange(36).view(6, 6) * 7 % 5 < 3
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 24, 16, generator=random) for _ in range(3))
    options: dict[str, Any] = {"attention": Custom(table, 4), "kernel": "flex"}
    call: Callable[..., Tensor]
    call, _ = compile_ring(attend, group, compiler="eager", options=options)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("plain operators")

    blocks = torch.arange(24) // 4
    mask = table[blocks[:, None], blocks]
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "MASKED_ATTENTION", refuse)
        return call(q, k, v), want


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)
