"""``create_ring_attention``: what it makes, and what it refuses."""

from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from support.module_cases import rewritten_only
from support.ranks import RankPool
from support.tolerances import assert_output_equal
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ringcompile import (
    MultiheadRingAttention,
    RingAttentionConfig,
    create_ring_attention,
    presets,
)
from ringcompile.errors import OptionError
from ringcompile.modules import RingAttention

B, H, G, S, D, E = 2, 4, 2, 19, 4, 6
BLOCKS: dict[str, Any] = {"block_size": 4, "window_size": 8}
SEGMENTS: dict[str, Any] = {"segment_lengths": (8, 16), "dilation_rates": (1, 2)}
MULTIHEAD = "block_sparse_multihead"


def make_any(name: str, group: ProcessGroup | None = None, **options: Any) -> nn.Module:  # noqa: ANN401
    """A module of any preset."""
    if name in {MULTIHEAD, *presets()[MULTIHEAD].aliases}:
        options |= {"embed_dim": H * D, "num_heads": H}
    return create_ring_attention(name, RingAttentionConfig(**options), mesh=group)


def test_every_preset_is_a_module_under_each_of_its_names() -> None:
    for name, preset in presets().items():
        kind = MultiheadRingAttention if name == MULTIHEAD else RingAttention
        for known in (name, *preset.aliases):
            module = make_any(known)
            assert type(module) is kind, known
            assert module._runner.options.attention == preset.options()["attention"]


def test_the_multihead_preset_is_as_wide_as_the_configuration_says() -> None:
    module = make_any(MULTIHEAD, bias=False)
    assert isinstance(module, MultiheadRingAttention)
    assert (module.embed_dim, module.num_heads) == (H * D, H)
    assert module.batch_first
    assert not [name for name, _ in module.named_parameters() if "bias" in name]


def test_auto_tells_its_reason() -> None:
    configs: tuple[dict[str, Any], ...] = (
        {},
        BLOCKS,
        SEGMENTS,
        BLOCKS | SEGMENTS,
        {"num_groups": 3},
    )
    assert_expected_inline(
        "\n".join(
            repr(create_ring_attention("auto", RingAttentionConfig(**config)))
            for config in configs
        ),
        """\
RingAttention(standard; standard: nothing sparse is given: exact)
RingAttention(block_sparse; block_sparse: a block layout is given)
RingAttention(sdpa; sdpa: segments are given)
RingAttention(block_sparse_dilated; block_sparse_dilated: a block layout and segments are given)
RingAttention(enterprise; enterprise: groups of heads are given, on one rank; preset enterprise: not built yet, and off: error recovery, memory pool, gradient compression)""",
    )


def test_services_that_are_not_built_are_told() -> None:
    assert "off: ZeRO" in repr(create_ring_attention("distributed"))


def test_another_number_of_ranks_is_refused() -> None:
    create_ring_attention("standard", RingAttentionConfig(ring_size=1))
    with pytest.raises(OptionError) as caught:
        create_ring_attention("standard", RingAttentionConfig(ring_size=3))
    assert_expected_inline(
        str(caught.value),
        """\
ring_size=3 over 1 ranks
  at: standard
  because: the ring goes over all ranks of its mesh
  instead: ring_size=1, or a mesh of 3 ranks""",
    )


def run_ring_size(group: ProcessGroup, _rank: int) -> None:
    for preset in ("standard", "block_sparse_multihead"):
        make_any(preset, group, ring_size=2)
        with pytest.raises(OptionError, match="ring_size=1 over 2 ranks"):
            make_any(preset, group, ring_size=1)


def test_the_ring_size_is_that_of_the_mesh(ranks: RankPool) -> None:
    ranks.run(run_ring_size)


Q, K, V = torch.ones(B, S, H, D), torch.ones(B, S, G, D), torch.ones(B, S, G, E)
PAIRS, KEYS = torch.zeros(S, S, dtype=torch.bool), torch.zeros(B, S, dtype=torch.bool)
ODD: dict[str, tuple[dict[str, Any], tuple[Tensor, Tensor, Tensor], dict[str, Any]]] = {
    "three dims": ({}, (Q[0], K[0], V[0]), {}),
    "heads no multiple": ({}, (Q[:, :, :3], K, V), {}),
    "no heads of keys": ({}, (Q, K[:, :, :0], V[:, :, :0]), {}),
    "keys without values": ({}, (Q, K, V[:, :-1]), {}),
    "heads of values": ({}, (Q, K, V[:, :, :1]), {}),
    "size of keys": ({}, (Q, K[..., :3], V), {}),
    "heads of the config": ({"num_heads": 8}, (Q, K, V), {}),
    "width of the config": ({"embed_dim": 32}, (Q, K, V), {}),
    "mask of another length": ({}, (Q, K, V), {"attn_mask": PAIRS[1:, 1:]}),
    "padding of another length": ({}, (Q, K, V), {"key_padding_mask": KEYS[:, 1:]}),
    "integer mask": ({}, (Q, K, V), {"attn_mask": PAIRS.int()}),
    "integer padding": ({}, (Q, K, V), {"key_padding_mask": KEYS.int()}),
}


@pytest.mark.parametrize("name", ODD)
def test_shapes_that_do_not_fit_are_refused(name: str) -> None:
    options, qkv, masks = ODD[name]
    module = create_ring_attention("standard", RingAttentionConfig(**options))
    with pytest.raises(OptionError), rewritten_only():
        module(*qkv, **masks)


def test_shapes_of_the_configuration_are_taken() -> None:
    config = RingAttentionConfig(num_heads=H, embed_dim=H * D)
    with rewritten_only():
        assert create_ring_attention("standard", config)(Q, K, V).shape == (B, S, H, E)


def test_a_bias_is_refused_under_a_pattern() -> None:
    module = create_ring_attention("block_sparse", RingAttentionConfig(**BLOCKS))
    with pytest.raises(OptionError, match="attn_mask of other floats"):
        module(Q, K, V, attn_mask=PAIRS + 0.5)


@pytest.mark.parametrize("preset", [None, "block_sparse_multiheads"])
def test_a_preset_that_lacks_something_is_refused(preset: str | None) -> None:
    text = "did you mean" if preset else "^embed_dim=None and num_heads=None"
    with pytest.raises(OptionError, match=text):
        create_ring_attention(preset or "block_sparse_multihead")


def test_one_module_takes_any_number_of_heads() -> None:
    module = create_ring_attention("standard")
    with rewritten_only():
        for heads, groups in ((4, 2), (8, 2), (6, 6), (6, 3)):
            random = torch.Generator().manual_seed(heads)
            q, k, v = (
                torch.randn(B, S, n, D, generator=random, dtype=torch.float64)
                for n in (heads, groups, groups)
            )
            whole = (x.repeat_interleave(heads // groups, 2) for x in (k, v))
            a, b, c = (x.transpose(1, 2) for x in (q, *whole))
            want = (a @ b.mT * D**-0.5).softmax(-1) @ c
            assert_output_equal(module(q, k, v), want.transpose(1, 2))
