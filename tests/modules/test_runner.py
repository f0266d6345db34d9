"""What a module's compiled function hangs on, and what happens around its call."""

from typing import Any

import pytest
import torch
from support.module_cases import rewritten_only

from ringcompile import OptionError, RingAttentionConfig, create_ring_attention
from ringcompile.errors import RingCompileError
from ringcompile.modules import runner


@pytest.mark.parametrize("preset", ["standard", "block_sparse"])
def test_the_first_step_of_all_may_be_checkpointed(preset: str) -> None:
    """What is traced while a checkpoint waits for saved tensors is none of them."""
    torch.compiler.reset()
    runner._compile.cache_clear()
    config = RingAttentionConfig(use_checkpointing=True)
    module = create_ring_attention(preset, config)
    q = torch.randn(1, 80, 2, 8, requires_grad=True)
    with rewritten_only():
        module(q, q, q, is_causal=True).sum().backward()
    assert q.grad is not None


def test_another_process_group_is_another_function() -> None:
    """Else a graph for other ranks, or for none, would run without a word."""
    module = create_ring_attention("standard")
    q = torch.randn(1, 6, 2, 8)
    with rewritten_only():
        module(q, q, q)
        before = runner._compile.cache_info().misses
        module(q, q, q)
        assert runner._compile.cache_info().misses == before
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runner, "find_group", lambda _mesh: object())
            module(q, q, q)
    assert runner._compile.cache_info().misses == before + 1


def test_gradients_inside_of_a_tuple_are_watched_too() -> None:
    config = RingAttentionConfig(validate_gradients=True)
    module: Any = create_ring_attention("standard", config)
    x = torch.zeros(3, requires_grad=True)
    ((y,),) = module._runner._watch(((x,),))
    with pytest.raises(RingCompileError, match="not finite"):
        (y / 0).sum().backward()


def test_chosen_blocks_need_to_know_causality() -> None:
    """A mask of pairs may hide the future, and means over a block would leak it."""
    config = RingAttentionConfig(pattern_type="adaptive", block_size=4)
    module = create_ring_attention("block_sparse", config)
    q = torch.randn(1, 12, 2, 8)
    hidden = torch.ones(12, 12, dtype=torch.bool).triu(1)
    with rewritten_only():
        with pytest.raises(OptionError, match="a mask of pairs that is passed in"):
            module(q, q, q, attn_mask=hidden)
        module(q, q, q, is_causal=True)
