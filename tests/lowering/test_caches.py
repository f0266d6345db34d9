"""Compile caches: what they must tell apart."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import ringcompile  # noqa: F401 - the backend
from ringcompile.patterns import LocalWindow

B, H, S, D = 1, 2, 32, 8


def block(x: Tensor) -> Tensor:
    h = x.sin()
    out = F.scaled_dot_product_attention(h, h.cos(), h.exp(), is_causal=True)
    return (out.cos() * h).tanh()


def plain(x: Tensor) -> Tensor:
    return block(block(x)).sum()


def checkpointed(x: Tensor) -> Tensor:
    for _ in range(2):
        x = checkpoint(block, x, use_reentrant=False)
    return x.sum()


def count_saved(function: Callable[[Tensor], Tensor]) -> int:
    """Elements that a compiled function saves for backward."""
    torch.compiler.reset()
    options: Any = {"attention": LocalWindow(16, 4)}
    compiled = torch.compile(function, backend="ring", options=options)
    x = torch.randn(B, H, S, D, generator=torch.Generator().manual_seed(0))
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        loss = compiled(x.requires_grad_())
    loss.backward()
    return sum(saved.values())


@pytest.mark.slow
def test_what_is_checkpointed_is_so_though_the_same_ops_were_compiled_before(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    whole, few = map(count_saved, (plain, checkpointed))
    assert few < whole
