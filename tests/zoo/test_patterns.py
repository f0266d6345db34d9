"""A pattern by option, on a whole model: eager's, with the dense reference inside."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.compiling import compile_ring
from support.ranks import RankPool
from support.sampling import slow
from support.spine_models import build_model, find_model, run_reference, run_step
from support.tolerances import assert_gradients_equal, assert_output_equal
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ringcompile import reference
from ringcompile.ir.mask import causal
from ringcompile.patterns import LocalWindow, LongNet, Pattern

LENGTH = 48
LONGNET = LongNet(segments=(8, 24, 48), rates=(1, 2, 4))
WINDOW = LocalWindow(window=16, block=8)
DETACHED = replace(LONGNET, weights="detached")
PATTERNS: dict[str, Pattern] = {
    "longnet": LONGNET,
    "longnet detached": DETACHED,
    "local window": WINDOW,
}
BY_LAYER: dict[str, object] = {"model.layers.[02]*": LONGNET, "*.1.self_attn": WINDOW}


def _attend(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    _mask: Tensor | None,
    *,
    patterns: Sequence[Pattern],
    scaling: float,
    **_: Any,  # noqa: ANN401
) -> tuple[Tensor, None]:
    """What transformers calls for attention: the dense reference."""
    pattern = patterns[int(module.layer_idx)]  # type: ignore[arg-type]
    if isinstance(pattern, LongNet):
        out = reference.longnet(
            *(q, k, v),
            segments=pattern.segments,
            rates=pattern.rates,
            weights=pattern.weights,
            mask=causal(),
            scale=scaling,
        )
    else:
        assert isinstance(pattern, LocalWindow)
        out = reference.local_window(
            *(q, k, v),
            window=pattern.window,
            block=pattern.block,
            mask=causal(),
            scale=scaling,
        )
    return out.transpose(1, 2), None


def run_pattern(
    group: ProcessGroup, rank: int, name: str, compiler: str, options: dict[str, str]
) -> list[str]:
    from transformers import AttentionInterface  # noqa: PLC0415 - seconds to import

    patterns = (LONGNET, WINDOW) if name == "by layer" else (PATTERNS[name],) * 2
    attention = BY_LAYER if name == "by layer" else PATTERNS[name]
    AttentionInterface.register(name, partial(_attend, patterns=patterns))
    row = find_model("llama")
    inputs = row.make_inputs(LENGTH)
    want = run_reference(row, name, inputs)
    model = build_model(row, "sdpa", torch.float32)
    call, record = compile_ring(
        model, group, compiler=compiler, options={"attention": attention, **options}
    )
    got = run_step(model, call, inputs)
    assert_output_equal(got.loss, want.loss, "loss")
    assert_output_equal(got.logits, want.logits, "logits")
    assert_gradients_equal(got.grads, want.grads)
    assert record.gathers == []
    assert len(record.rings) == 2
    return record.layouts


@pytest.mark.parametrize(
    ("name", "cp_size"),
    [
        *product(("longnet", "local window"), (1, 2)),
        slow("longnet", 4),
        slow("local window", 4),
        ("longnet detached", 2),
    ],
)
def test_a_model_with_a_pattern(ranks: RankPool, name: str, cp_size: int) -> None:
    ranks.run(run_pattern, name, "eager", {}, world_size=cp_size)


def test_a_model_with_a_pattern_for_each_layer(ranks: RankPool) -> None:
    ranks.run(run_pattern, "by layer", "eager", {}, world_size=2)


CURVES = {"layout": "hilbert", "block_order": "hilbert"}


@pytest.mark.parametrize(
    ("name", "cp_size", "layout"),
    [
        ("longnet", 2, "hilbert/48 x2"),
        slow("local window", 2, "hilbert x2"),
        ("longnet", 1, "contiguous x1"),
    ],
)
def test_a_model_along_a_curve(
    ranks: RankPool, name: str, cp_size: int, layout: str
) -> None:
    found = ranks.run(run_pattern, name, "aot_eager", CURVES, world_size=cp_size)
    assert found == [[layout] * 2] * cp_size


def attend(x: Tensor, w: Tensor) -> Tensor:
    q = (x @ w).unflatten(-1, (2, 4)).transpose(1, 2)
    y = F.scaled_dot_product_attention(q, q, q, is_causal=True)
    return y.transpose(1, 2).flatten(2) @ w


def run_lengths(group: ProcessGroup, rank: int) -> list[str]:
    call, record = compile_ring(
        attend, group, compiler="aot_eager", options=CURVES, dynamic=True
    )
    generator = torch.Generator().manual_seed(5)
    w = torch.randn(8, 8, generator=generator, dtype=torch.double).requires_grad_()
    for length in (40, 31, 64):
        x = torch.randn(2, length, 8, generator=generator, dtype=torch.double)
        x.requires_grad_()
        got, want = call(x, w), attend(x, w)
        torch.testing.assert_close(got, want)
        grads = (torch.autograd.grad(y.square().sum(), (x, w)) for y in (got, want))
        torch.testing.assert_close(*grads)
    return record.layouts


def test_each_length_has_its_own_curve(ranks: RankPool) -> None:
    assert ranks.run(run_lengths, world_size=2) == [["hilbert x2"] * 3] * 2
