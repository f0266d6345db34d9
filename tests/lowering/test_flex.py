"""Tiles by flex_attention's kernels: on CPU its eager form, and the lists of blocks."""

from collections.abc import Callable
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
from ringcompile.lowering.tiles import flex, pieces
from ringcompile.patterns import AttentionSpec, Custom, LocalWindow, PerHead

NAMES = ("out", "dq", "dk", "dv")


def obey_lists(call: Callable[..., Any]) -> Callable[..., Any]:
    """As kernels do, and the eager form does not: what is not listed does not count."""

    def wrapped(*args: Any, scale: float) -> Any:  # noqa: ANN401
        *tensors, lists, mask_mod, buffers = args
        some, some_at, full, full_at = list(lists)[:4]
        columns = torch.arange(some_at.shape[-1])
        on = torch.zeros(some_at.shape, dtype=torch.bool)
        for counts, indices in ((some, some_at), (full, full_at)):
            flags = columns < counts[..., None]
            on |= torch.zeros_like(on).scatter(-1, indices.long(), flags)
        on = on.expand(tensors[0].shape[0], tensors[0].shape[1], -1, -1).contiguous()

        def listed(
            b: Tensor, h: Tensor, q: Tensor, k: Tensor, *given: Tensor
        ) -> Tensor:
            *rest, blocks = given
            kept: Tensor = mask_mod(b, h, q, k, *rest)
            return kept & blocks[b, h, q // flex.BLOCK, k // flex.BLOCK]

        return call(*tensors, lists, listed, (*buffers, on), scale=scale)

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
            ("global local", "contiguous", 300, "eager", False),
            ("window", "striped", 300, "eager", False),
        )
    )
    by_rank = ranks.run(run_flex, cases, world_size=cp_size)
    for case, *shards in zip(cases, *by_rank, strict=True):
        for n, want in enumerate(case.expected()):
            got = join(case, [s[n] for s in shards]).double()
            assert (got - want).abs().max() <= 3e-6 * want.abs().max(), (case, NAMES[n])


MASKS: dict[str, Boolean] = {
    "all": Mask().keeps,
    "causal": causal(),
    "window": Mask(causal()).__and__(window(140)).keeps,
    "padding": Mask(causal()).__and__(key_padding(0)).keeps,
    "by head": PerHead((LocalWindow(256), LocalWindow(512))).keeps(
        AttentionSpec(4, 4, 600)
    ),
}


def read_lists(text: str) -> tuple[Tensor, Tensor]:
    """Which blocks are under the mask, and which are full, ``(rows, columns)``."""
    found = []
    lists = flex._make_lists(text)
    for counts, indices in zip(lists[::2], lists[1::2], strict=True):
        on = torch.zeros(indices.shape[2:], dtype=torch.bool)
        for row, count in enumerate(counts[0, 0].tolist()):
            on[row, indices[0, 0, row, :count].long()] = True
        assert (indices.sort().values == torch.arange(indices.shape[3])).all()
        found.append(on)
    partial, full, partial_of_keys, full_of_keys = found
    assert torch.equal(partial_of_keys, partial.mT)
    assert torch.equal(full_of_keys, full.mT)
    return partial, full


def test_what_hangs_on_the_batch_is_under_the_mask() -> None:
    """Lists are of all batches: a block that is full in one may be empty in another."""
    positions = tuple(range(256))
    for first_only in (at_least_zero(-B), at_least_zero(B - 1)):
        text = flex._list_blocks(first_only, 1, positions, positions)
        partial, full = read_lists(text)
        assert partial.all()
        assert not full.any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MASKS)
def test_lists_hold_each_block_that_may_count(name: str, layout: str) -> None:
    keeps, length, num_heads = MASKS[name], 600, 4
    place = Layout(layout, 2)
    for ranks in ((0, 0), (1, 0)):
        q, k = (
            tuple(p for p in place.positions(r, length) if p < length) for r in ranks
        )
        partial, full = read_lists(flex._list_blocks(keeps, num_heads, q, k))
        assert not (partial & full).any()
        heads = torch.arange(num_heads).view(-1, 1, 1)
        at = (torch.zeros_like(heads), heads, torch.tensor(q)[:, None], torch.tensor(k))
        captures = [torch.arange(length)[None] % 7 > 0]
        kept = evaluate(keeps, at, captures).expand(num_heads, len(q), len(k))
        for i in range(full.shape[0]):
            for j in range(full.shape[1]):
                block = kept[:, i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
                if full[i, j]:
                    assert block.all(), (ranks, i, j)
                if not (full[i, j] or partial[i, j]):
                    assert not block.any(), (ranks, i, j)
                elif name != "padding":
                    assert block.any(), (ranks, i, j)
                if name != "padding" and block.all():
                    assert full[i, j], (ranks, i, j)


def test_what_a_kernel_cannot_inline_runs_by_plain_operators(ranks: RankPool) -> None:
    """A table of blocks: its mask is no arithmetic."""
    results = ranks.run(run_table, world_size=2)
    for got, want in results:
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
    blocks = torch.arange(24) // 4
    mask = table[blocks[:, None], blocks]
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return call(q, k, v), want


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)
