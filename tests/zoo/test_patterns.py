"""A pattern by option, on a whole model: eager's, with the dense reference inside."""

from functools import partial
from typing import Any

import pytest
import torch
from support.compiling import compile_ring
from support.ranks import RankPool
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
PATTERNS: dict[str, Pattern] = {"longnet": LONGNET, "local window": WINDOW}


def _attend(
    _module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    _mask: Tensor | None,
    *,
    pattern: Pattern,
    scaling: float,
    **_: Any,  # noqa: ANN401
) -> tuple[Tensor, None]:
    """What transformers calls for attention: the dense reference."""
    if isinstance(pattern, LongNet):
        out = reference.longnet(
            *(q, k, v),
            segments=pattern.segments,
            rates=pattern.rates,
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


def run_pattern(group: ProcessGroup, rank: int, name: str) -> list[str]:
    from transformers import AttentionInterface  # noqa: PLC0415 - seconds to import

    pattern = PATTERNS[name]
    AttentionInterface.register(name, partial(_attend, pattern=pattern))
    row = find_model("llama")
    inputs = row.make_inputs(LENGTH)
    want = run_reference(row, name, inputs)
    model = build_model(row, "sdpa", torch.float32)
    call, record = compile_ring(
        model, group, compiler="eager", options={"attention": pattern}
    )
    got = run_step(model, call, inputs)
    assert_output_equal(got.loss, want.loss, "loss")
    assert_output_equal(got.logits, want.logits, "logits")
    assert_gradients_equal(got.grads, want.grads)
    assert record.gathers == []
    return record.rings


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_a_model_with_a_pattern(ranks: RankPool, name: str, cp_size: int) -> None:
    for rings in ranks.run(run_pattern, name, world_size=cp_size):
        assert len(rings) == 2
