"""One rank: what Inductor does, unless a kernel is asked for by name."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.tolerances import assert_output_equal
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.utils import run_and_get_code  # noqa: TID251

import ringcompile  # noqa: F401 - the backend

TORCHS_OWN = "_scaled_dot_product_flash_attention_for_cpu"


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def compiled(**options: Any) -> Any:  # noqa: ANN401 - torch's
    torch.compiler.reset()
    return torch.compile(attend, backend="ring", options=options)


@pytest.mark.parametrize(("kernel", "is_torchs"), [("auto", True), ("math", False)])
def test_a_kernel_that_is_asked_for_runs(kernel: str, is_torchs: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 2, 33, 8, generator=generator) for _ in range(3)]
    out, (code, *_) = run_and_get_code(compiled(kernel=kernel), *inputs)
    assert_output_equal(out, attend(*(x.double() for x in inputs)))
    assert (TORCHS_OWN in code) is is_torchs


def test_flex_on_cpu_is_refused() -> None:
    x = torch.ones(1, 2, 8, 8)
    with pytest.raises(BackendCompilerFailed, match="kernel='flex' on CPU"):
        compiled(kernel="flex")(x, x, x)
