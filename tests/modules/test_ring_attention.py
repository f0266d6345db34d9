"""``create_ring_attention``: any preset as a module, against dense float64 attention.

All but the slow tests whose names say "Inductor" run the rewritten graphs eagerly, as
each compiles for seconds. By hand:

    pytest -q -m slow tests/modules
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from support.module_cases import compiled_by, rewritten_only
from support.pattern_cases import longnet
from support.ranks import RankPool
from support.tolerances import assert_gradients_equal, assert_output_equal
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ringcompile import (
    MultiheadRingAttention,
    RingAttentionConfig,
    backend,
    create_ring_attention,
)
from ringcompile.config import RingOptions
from ringcompile.errors import RingCompileError
from ringcompile.modules import RingAttention, runner
from ringcompile.patterns import LocalWindow

# Dynamo asks a projection's part for its gradient, and hides what torch says of that;
# where warnings are errors it can't.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")

B, H, G, S, D, E = 2, 4, 2, 19, 4, 6


# ---- presets and masks, and what they mean -------------------------------------------

BLOCKS: dict[str, Any] = {"block_size": 4, "window_size": 8}
SEGMENTS: dict[str, Any] = {"segment_lengths": (8, 16), "dilation_rates": (1, 2)}


def count_all() -> Tensor:
    return torch.ones(H, S, S, dtype=torch.int32)


def count_window() -> Tensor:
    """SEMANTICS.md section 3: 8 tokens in blocks of 4 reach one block to each side."""
    i, j = torch.arange(S)[:, None] // 4, torch.arange(S)[None] // 4
    return ((i - j).abs() <= 1).expand(H, S, S).int()


def count_longnet() -> Tensor:
    return longnet((8, 16), (1, 2), "paper").counts(H, G, S)


PRESETS: dict[str, tuple[dict[str, Any], Callable[[], Tensor]]] = {
    "standard": ({}, count_all),
    "block_sparse": (BLOCKS, count_window),
    "sdpa": (SEGMENTS, count_longnet),
    "block_sparse_dilated": (
        BLOCKS | SEGMENTS,
        lambda: count_window() * count_longnet(),
    ),
}

PAIRS = (7 * torch.arange(S)[:, None] + 3 * torch.arange(S)[None]) % 5 < 2
BY_HEAD = torch.stack([PAIRS.roll(n, 0) for n in range(B * H)])
KEYS = torch.zeros(B, S, dtype=torch.bool)
KEYS[0, -4:] = KEYS[1, :3] = True
NOBODY = KEYS.clone()
NOBODY[1] = True
ROWS = PAIRS.clone()
ROWS[3] = ROWS[11] = True
LATER = torch.ones(S, S, dtype=torch.bool).triu(1)
BIAS = torch.randn(
    S, S, generator=torch.Generator().manual_seed(3), dtype=torch.float64
)


def as_added(hidden: Tensor) -> Tensor:
    return torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)


# Arguments, and what they hide of (B, H, S, S).
MASKS: dict[str, tuple[dict[str, Any], Tensor]] = {
    "none": ({}, torch.tensor(False)),
    "causal": ({"is_causal": True}, LATER),
    "mask": ({"attn_mask": PAIRS}, PAIRS),
    "mask by head": ({"attn_mask": BY_HEAD}, BY_HEAD.view(B, H, S, S)),
    "mask by batch": (
        {"attn_mask": BY_HEAD[:B].view(B, 1, S, S)},
        BY_HEAD[:B].view(B, 1, S, S),
    ),
    "mask of keys": ({"attn_mask": KEYS.view(B, 1, 1, S)}, KEYS.view(B, 1, 1, S)),
    "float mask": ({"attn_mask": as_added(BY_HEAD)}, BY_HEAD.view(B, H, S, S)),
    "padding": ({"key_padding_mask": KEYS}, KEYS.view(B, 1, 1, S)),
    "a sequence of pads": ({"key_padding_mask": NOBODY}, NOBODY.view(B, 1, 1, S)),
    "rows without keys": ({"attn_mask": ROWS}, ROWS),
    "all": (
        {"attn_mask": ROWS, "key_padding_mask": KEYS, "is_causal": True},
        ROWS | KEYS.view(B, 1, 1, S) | LATER,
    ),
    "bias": ({"attn_mask": BIAS.float(), "is_causal": True}, LATER),
}


@dataclass(frozen=True, slots=True)
class Case:
    """A preset under a mask."""

    preset: str
    mask: str

    def __str__(self) -> str:
        return f"{self.preset}: {self.mask}"

    @property
    def counts(self) -> Tensor:
        """How often each pair counts, ``(B, H, S, S)``."""
        return PRESETS[self.preset][1]() * ~MASKS[self.mask][1].expand(B, H, S, S)

    def make_module(self, group: ProcessGroup, **options: object) -> nn.Module:
        config = RingAttentionConfig(**PRESETS[self.preset][0] | options)
        return create_ring_attention(self.preset, config, mesh=group)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``softmax(A + log C) V``, 0 where C is 0."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        k, v = (x.repeat_interleave(H // G, 1) for x in (k, v))
        scores = q @ k.mT * D**-0.5 + (BIAS if self.mask == "bias" else 0)
        weights = self.counts * scores.exp()
        out: Tensor = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300) @ v
        return out.transpose(1, 2)


def make_inputs(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Leaves q, k and v."""
    random = torch.Generator().manual_seed(0)
    shapes = {"q": (B, S, H, D), "k": (B, S, G, D), "v": (B, S, G, E)}
    return {
        name: torch.randn(shape, generator=random).to(dtype).requires_grad_()
        for name, shape in shapes.items()
    }


Outcome = tuple[Tensor, dict[str, Tensor]]


def run_step(call: Callable[..., Tensor], dtype: torch.dtype) -> Outcome:
    inputs = make_inputs(dtype)
    out = call(*inputs.values())
    random = torch.Generator().manual_seed(1)
    out.backward(torch.randn(out.shape, generator=random).to(dtype))
    return out.detach(), {n: x.grad for n, x in inputs.items() if x.grad is not None}


def check_case(group: ProcessGroup, case: Case) -> None:
    module = case.make_module(group)
    out, grads = run_step(
        lambda *x: module(*x, **MASKS[case.mask][0]),
        torch.float32,
    )
    want = run_step(case.attend, torch.float64)
    assert_output_equal(out, want[0])
    assert_gradients_equal(grads, want[1])
    sees = case.counts.transpose(1, 2).sum(-1) > 0  # (B, S, H)
    is_seen = case.counts.view(B, G, H // G, S, S).sum((2, 3)).mT > 0  # (B, S, G)
    for x, used in (
        (out, sees),
        (grads["q"], sees),
        (grads["k"], is_seen),
        (grads["v"], is_seen),
    ):
        assert not x[~used].any(), "not exactly 0 where nothing is seen"


def run_cases(
    group: ProcessGroup, _rank: int, cases: tuple[Case, ...], compiler: str
) -> dict[str, str]:
    faults = {}
    for case in cases:
        with compiled_by(compiler), warnings.catch_warnings():
            # A bias gathers; any other warning is a fault.
            action: Any = "ignore" if case.mask == "bias" else "error"
            warnings.filterwarnings(action, message=".*(gather|whole on every rank)")
            try:
                check_case(group, case)
            except AssertionError as error:
                faults[str(case)] = str(error)
        torch.compiler.reset()
    return faults


def check_cases(
    ranks: RankPool, cases: list[Case], world_size: int, compiler: str = "eager"
) -> None:
    for faults in ranks.run(
        run_cases, tuple(cases), compiler, world_size=world_size, timeout_s=1200
    ):
        assert faults == {}


ALL = [
    Case(preset, mask)
    for preset in PRESETS
    for mask in MASKS
    if mask != "bias" or preset == "standard"
]


def test_masks_exercise_rows_without_keys_and_keys_without_rows() -> None:
    counts = Case("standard", "all").counts
    assert (counts.sum(-1) == 0).any()
    assert (counts.sum(-2) == 0).any()
    assert not Case("standard", "a sequence of pads").counts[1].any()


@pytest.mark.parametrize("preset", ["standard", "block_sparse"])
def test_it_equals_dense_attention_on_two_ranks(ranks: RankPool, preset: str) -> None:
    check_cases(ranks, [case for case in ALL if case.preset == preset], 2)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_case_without_inductor(ranks: RankPool, world_size: int) -> None:
    check_cases(ranks, ALL, world_size)


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL, ids=str)
def test_every_case_through_inductor(ranks: RankPool, case: Case) -> None:
    check_cases(ranks, [case], 2, "inductor")


# ---- gradients that are not finite ---------------------------------------------------


def make_any(preset: str, group: ProcessGroup | None, **options: Any) -> nn.Module:  # noqa: ANN401
    """A module of any preset, for layer 3."""
    widths = {"embed_dim": H * D, "num_heads": H} if "multihead" in preset else {}
    config = RingAttentionConfig(**widths | options)
    return create_ring_attention(preset, config, mesh=group, layer=3)


def call_any(module: nn.Module) -> tuple[list[Tensor], Tensor]:
    """Leaves and the output."""
    if isinstance(module, MultiheadRingAttention):
        x = torch.ones(B, S, H * D, requires_grad=True)
        out = module(x, x, x)[0]
        return [x, *module.parameters()], out
    leaves = list(make_inputs().values())
    return leaves, module(*leaves)


def run_not_finite(
    group: ProcessGroup, _rank: int, preset: str, value: float, *, validates: bool
) -> tuple[str, str]:
    """What backward raises, and at a gradient that is not this module's."""
    texts = ["", ""]
    with rewritten_only():
        module = make_any(preset, group, validate_gradients=validates)
        leaves, out = call_any(module)
        grad = torch.ones_like(out)
        grad.view(-1)[7] = value
        total = torch.stack([x.sum() for x in leaves]).sum()
        for n, loss in enumerate((out, total * torch.inf)):
            try:
                loss.backward(grad if n == 0 else None)
            except RingCompileError as error:
                texts[n] = str(error)
    return texts[0], texts[1]


VALIDATED = {
    "standard": "standard",
    "block_sparse": "block_sparse",
    "block_sparse_multihead": "MultiheadRingAttention",
}


def run_all_not_finite(
    group: ProcessGroup, rank: int, value: float, validates: bool
) -> list[tuple[str, str]]:
    return [
        run_not_finite(group, rank, preset, value, validates=validates)
        for preset in VALIDATED
    ]


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_gradient_that_is_not_finite_names_rank_and_layer(
    ranks: RankPool, value: float
) -> None:
    for rank, texts in enumerate(ranks.run(run_all_not_finite, value, True)):
        for name, (text, elsewhere) in zip(VALIDATED.values(), texts, strict=True):
            assert "gradients are not finite" in text
            assert f"at: rank {rank}, {name}, layer 3, a gradient of shape (" in text
            assert elsewhere == "", "a hook was left on the user's tensor"


@pytest.mark.parametrize(("value", "validates"), [(1.0, True), (torch.nan, False)])
def test_no_gradient_is_refused_that_is_finite_or_not_validated(
    ranks: RankPool, value: float, validates: bool
) -> None:
    for texts in ranks.run(run_all_not_finite, value, validates):
        assert texts == [("", "")] * len(VALIDATED)


# ---- computed again in backward ------------------------------------------------------


def run_counted(
    group: ProcessGroup, layer: int, config: RingAttentionConfig, *, training: bool
) -> tuple[Outcome, tuple[int, int]]:
    """One step, and how often attention had been computed after forward and backward."""
    compile_function, calls, counts = runner._compile, 0, []

    def compile_counted(*given: Any) -> Callable[..., Tensor]:  # noqa: ANN401
        compiled = compile_function(*given)

        def call(*args: object) -> Tensor:
            nonlocal calls
            calls += 1
            return compiled(*args)

        return call

    module = create_ring_attention("block_sparse", config, mesh=group, layer=layer)
    module.train(training)

    def attend(*qkv: Tensor) -> Tensor:
        out: Tensor = module(*qkv, is_causal=True)
        counts.append(calls)
        return out

    with mock.patch.object(runner, "_compile", compile_counted):
        outcome = run_step(attend, torch.float32)
    return outcome, (counts[0], calls)


def run_checkpoints(group: ProcessGroup, _rank: int) -> dict[str, tuple[int, int]]:
    """Counts of each setting, after all were found to have the same gradients."""
    always: dict[str, Any] = BLOCKS | {"use_checkpointing": True}
    settings: dict[str, tuple[int, dict[str, Any], bool]] = {
        "off": (0, BLOCKS, True),
        "on, layer 0": (0, always, True),
        "on, layer 1": (1, always, True),
        "every 2nd, layer 0": (0, always | {"checkpoint_frequency": 2}, True),
        "every 2nd, layer 1": (1, always | {"checkpoint_frequency": 2}, True),
        "every 2nd, layer 2": (2, always | {"checkpoint_frequency": 2}, True),
        "on, in eval": (0, always, False),
    }
    counts = {}
    want: Outcome | None = None
    with rewritten_only():
        for name, (layer, options, training) in settings.items():
            config = RingAttentionConfig(**options)
            got, counts[name] = run_counted(group, layer, config, training=training)
            want = want or got
            assert torch.equal(got[0], want[0]), name
            assert got[1].keys() == {"q", "k", "v"}
            assert all(torch.equal(x, want[1][n]) for n, x in got[1].items()), name
    return counts


def test_a_checkpoint_computes_again_in_its_layers_and_changes_nothing(
    ranks: RankPool,
) -> None:
    for counts in ranks.run(run_checkpoints):
        assert counts == {
            "off": (1, 1),
            "on, layer 0": (1, 2),
            "on, layer 1": (1, 2),
            "every 2nd, layer 0": (1, 2),
            "every 2nd, layer 1": (1, 1),
            "every 2nd, layer 2": (1, 2),
            "on, in eval": (1, 1),
        }


# ---- what reaches the compiler -------------------------------------------------------


def find_reached(
    config: RingAttentionConfig,
) -> tuple[RingOptions, Mapping[str, object]]:
    """The options and Inductor's patches that the backend was called with."""
    rewrite, reached = backend._rewrite, []

    def keep(*given: Any) -> object:  # noqa: ANN401
        reached.append(given[2])
        return rewrite(*given)

    module = create_ring_attention("block_sparse", config)
    with rewritten_only() as patches, mock.patch.object(backend, "_rewrite", keep):
        module(*make_inputs().values())
    assert isinstance(module, RingAttention)
    assert reached == [module._runner.options]
    return reached[0], patches[0]


@pytest.mark.parametrize(
    ("field", "value", "option", "default", "want"),
    [
        ("overlap_communication", False, "stages", "auto", 1),
        ("use_fused_kernels", False, "kernel", "auto", "math"),
        ("use_hilbert", True, "layout", "auto", "hilbert"),
        ("watchdog_timeout", 5.0, "timeout_s", 600.0, 5.0),
        ("communication_backend", "p2p", "transport", "auto", "p2p"),
    ],
)
def test_how_it_runs_reaches_the_compiler(
    field: str,
    value: object,
    option: str,
    default: object,
    want: object,
) -> None:
    unchanged, _ = find_reached(RingAttentionConfig(**BLOCKS))
    changed, _ = find_reached(RingAttentionConfig(**BLOCKS | {field: value}))
    assert getattr(unchanged, option) == default
    assert getattr(changed, option) == want
    assert changed.attention == LocalWindow(8, 4)


def test_the_mode_reaches_inductor() -> None:
    _, unchanged = find_reached(RingAttentionConfig(**BLOCKS))
    mode = "max-autotune-no-cudagraphs"
    options, patches = find_reached(RingAttentionConfig(**BLOCKS, compile_mode=mode))
    assert "max_autotune" not in unchanged
    assert options.inductor_patches["max_autotune"] is True
    assert patches["max_autotune"] is True
    assert not patches.get("triton.cudagraphs")


@pytest.mark.parametrize("preset", ["standard", "block_sparse_multihead"])
def test_code_that_is_not_compiled_never_runs_dense(preset: str) -> None:
    module = make_any(preset, None)
    with (
        torch.compiler.set_stance("force_eager"),
        pytest.raises(RingCompileError, match="code that was not compiled"),
    ):
        call_any(module)
    with rewritten_only():
        call_any(module)
        x = torch.zeros(B, S + 1, H, D)
        other = (x.flatten(2),) * 3 if "multihead" in preset else (x,) * 3
        with (
            torch.compiler.set_stance("eager_on_recompile"),
            pytest.raises(RingCompileError, match="code that was not compiled"),
        ):
            module(*other)
