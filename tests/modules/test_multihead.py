"""``MultiheadRingAttention`` is ``nn.MultiheadAttention``, whole or under a pattern.

All but the tests whose names say "Inductor" run the rewritten graphs eagerly, as each
compiles for seconds. Many more cells by hand:

    pytest -q -m slow tests/modules
"""

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from support.module_cases import (
    BY_NAME,
    EXACT,
    PATTERNS,
    B,
    Case,
    E,
    H,
    attend_exact,
    attend_pattern,
    compiled_by,
    find_faults,
    later_keys,
    make_pair,
    rewritten_only,
    run_ours,
    run_reference,
    run_step,
)
from support.ranks import RankError, RankPool
from support.tolerances import assert_output_equal
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ringcompile import MultiheadRingAttention, RingAttentionConfig
from ringcompile.errors import OptionError
from ringcompile.patterns import LocalWindow

# Dynamo asks a projection's part for its gradient, and hides what torch says of that;
# where warnings are errors it can't.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")


def run_cases(
    group: ProcessGroup, _rank: int, cases: tuple[Case, ...], compiler: str
) -> tuple[dict[str, list[str]], dict[str, int]]:
    """What is wrong with each case, and how often each gathered."""
    faults, gathered = {}, {}
    for case in cases:
        ours, theirs = make_pair(case, group)
        with compiled_by(compiler), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = find_faults(run_ours(ours, case), run_reference(theirs, case))
        count = sum("gather" in str(w.message) for w in caught)
        if found:
            faults[str(case)] = found
        if count:
            gathered[str(case)] = count
        torch.compiler.reset()
    return faults, gathered


def check_cases(
    ranks: RankPool, cases: list[Case], world_size: int, compiler: str = "eager"
) -> None:
    """All are right on each rank, and nothing is gathered."""
    for faults, gathered in ranks.run(
        run_cases, tuple(cases), compiler, world_size=world_size, timeout_s=1200
    ):
        assert faults == {}
        assert gathered == {}


UNDER_PATTERN = [
    replace(BY_NAME[name], attention=attention, length=19)
    for attention in PATTERNS
    for name in ("plain", "causal", "padding", "mask by head", "causal and padding")
]
ONE_OF_EACH = [  # kinds of tensors, of weights and of masks
    BY_NAME["unbatched under masks"],
    BY_NAME["no bias and other widths"],
    BY_NAME["causal, mask, padding"],
]


def test_it_equals_nn_multihead_attention_on_one_rank(ranks: RankPool) -> None:
    check_cases(ranks, [*ONE_OF_EACH, BY_NAME["bias"]], 1)


def test_it_equals_nn_multihead_attention_on_two_ranks(ranks: RankPool) -> None:
    check_cases(ranks, EXACT[::2] + ONE_OF_EACH, 2)


def test_it_equals_nn_multihead_attention_on_four_ranks(ranks: RankPool) -> None:
    check_cases(ranks, [BY_NAME["sequence first"], BY_NAME["causal, mask, padding"]], 4)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_pattern_is_on_top_of_the_masks(ranks: RankPool, world_size: int) -> None:
    check_cases(ranks, UNDER_PATTERN[world_size % 2 :: 2], world_size)


@pytest.mark.slow
def test_a_pattern_is_on_top_of_the_masks_through_inductor(ranks: RankPool) -> None:
    case = replace(BY_NAME["causal and padding"], attention="window")
    check_cases(ranks, [case], 2, "inductor")


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_case_without_inductor(ranks: RankPool, world_size: int) -> None:
    check_cases(ranks, EXACT + UNDER_PATTERN, world_size)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*EXACT, *UNDER_PATTERN], ids=str)
def test_every_case_through_inductor(ranks: RankPool, case: Case) -> None:
    check_cases(ranks, [case], 2, "inductor")


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 4])
def test_one_case_of_each_kind_through_inductor(
    ranks: RankPool, world_size: int
) -> None:
    pattern = replace(BY_NAME["mask by head"], attention="preset", length=19)
    check_cases(ranks, [*ONE_OF_EACH, pattern], world_size, "inductor")


def run_learned_bias(group: ProcessGroup, _rank: int) -> list[str]:
    """The faults of a bias that gets a gradient."""
    case = BY_NAME["bias"]
    outcomes = []
    for module, dtype in zip(
        make_pair(case, group), (torch.float32, torch.float64), strict=True
    ):
        inputs = case.make_inputs()
        x, grad = (inputs[n].to(dtype) for n in ("query", "grad"))
        bias = case.make_bias().to(dtype).requires_grad_()
        out, _ = module(x, x, x, attn_mask=bias, need_weights=False)
        out.backward(grad)
        outcomes.append((out.detach(), {"bias": bias.grad}))
    return find_faults(*outcomes)


def run_learned_bias_rewritten(group: ProcessGroup, rank: int) -> list[str]:
    with rewritten_only(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run_learned_bias(group, rank)


def test_a_bias_gets_its_gradient(ranks: RankPool) -> None:
    assert ranks.run(run_learned_bias_rewritten, world_size=2) == [[], []]


# ---- in the place of torch's ---------------------------------------------------------

KINDS = [
    BY_NAME[n] for n in ("plain", "no bias", "other widths", "no bias and other widths")
]


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_state_dicts_go_both_ways(case: Case) -> None:
    ours, theirs = make_pair(case)
    fresh = nn.MultiheadAttention(
        E, H, bias=case.bias, kdim=case.kdim, vdim=case.vdim
    ).float()
    assert list(ours.state_dict()) == list(fresh.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [
        n for n, _ in fresh.named_parameters()
    ]
    saved = {n: x.clone() for n, x in fresh.state_dict().items()}
    ours.load_state_dict(saved)
    assert all(torch.equal(x, saved[n]) for n, x in ours.state_dict().items())
    theirs.load_state_dict(ours.state_dict())
    assert all(torch.equal(x, saved[n]) for n, x in theirs.float().state_dict().items())


def run_copies(group: ProcessGroup, _rank: int) -> None:
    case = replace(BY_NAME["plain"], attention="window")
    ours, theirs = make_pair(case, group)
    other = copy.deepcopy(ours)
    own = {x.data_ptr() for x in ours.parameters()}
    assert own.isdisjoint(x.data_ptr() for x in other.parameters())
    with torch.no_grad():
        for x in other.parameters():
            x.mul_(-0.5)
    changed = copy.deepcopy(theirs)
    changed.load_state_dict(other.state_dict())
    with rewritten_only():
        assert find_faults(run_ours(other, case), run_reference(changed, case)) == []
        assert all(x.grad is None for x in ours.parameters())
        assert find_faults(run_ours(ours, case), run_reference(theirs, case)) == []


def test_a_deep_copy_has_weights_of_its_own(ranks: RankPool) -> None:
    ranks.run(run_copies, world_size=2)


def make_encoder_layer(
    case: Case,
) -> tuple[nn.TransformerEncoderLayer, nn.MultiheadAttention]:
    torch.manual_seed(0)
    ours, theirs = make_pair(case)
    layer = nn.TransformerEncoderLayer(E, H, 2 * E, 0.0, batch_first=True)
    layer.self_attn = ours
    return layer.eval(), theirs


@pytest.mark.parametrize("name", ["plain", "padding", "causal"])
def test_an_encoder_layer_in_eval_keeps_the_pattern(name: str) -> None:
    """Its fused path, which would call no ``forward``, is not taken."""
    case = replace(BY_NAME[name], attention="window")
    layer, theirs = make_encoder_layer(case)
    x = case.make_inputs()["query"]
    masks = {"src_key_padding_mask": case.hidden_keys()}
    if case.is_causal:
        masks["src_mask"] = later_keys(case.length)
    with torch.no_grad(), rewritten_only():
        got = layer(x.float(), **masks, is_causal=case.is_causal)
    layer = copy.deepcopy(layer).double()
    with torch.no_grad():
        after = [
            layer.norm1(x + attend(theirs, case, x, x, x))
            for attend in (attend_pattern, attend_exact)
        ]
        want, dense = (
            layer.norm2(y + layer.linear2(layer.linear1(y).relu())) for y in after
        )
    assert_output_equal(got, want)
    assert (want - dense).abs().max() > 0.1, "the pattern makes no difference here"


class Between(nn.Module):
    """A model with something before and after it."""

    def __init__(self, attention: MultiheadRingAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        x = x.sin()
        y: Tensor = self.attention(x, x, x, is_causal=True)[0]
        return x + y.cos()


def run_within_outer(group: ProcessGroup, _rank: int) -> None:
    case = replace(BY_NAME["causal"], attention="window")
    model = Between(make_pair(case, group)[0])
    outer = torch.compile(model, backend="eager")
    with rewritten_only():
        got = run_step(model, case, lambda x, *_: outer(x), torch.float32)
        want = run_step(model, case, lambda x, *_: model(x), torch.float32)
    assert torch.equal(got[0], want[0])
    for name, x in want[1].items():
        assert x is not None, name
        assert torch.equal(x, got[1][name]), name  # type: ignore[arg-type]


def test_an_outer_compile_changes_nothing(ranks: RankPool) -> None:
    ranks.run(run_within_outer, world_size=2)


# ---- what can't be -------------------------------------------------------------------


def make_exact(**options: Any) -> MultiheadRingAttention:  # noqa: ANN401
    return MultiheadRingAttention(
        E, H, batch_first=True, **({"attention": "exact"} | options)
    )


def make_window(**options: Any) -> MultiheadRingAttention:  # noqa: ANN401
    return make_exact(attention=LocalWindow(8, 4), **options)


X = torch.ones(B, 9, E)
PAIRS, KEYS = torch.zeros(9, 9), torch.zeros(B, 9)


def test_a_refusal_says_who_why_and_what_to_do() -> None:
    with pytest.raises(OptionError) as caught:
        make_exact()(X, X, X, need_weights=True)
    assert_expected_inline(
        str(caught.value),
        """\
need_weights=True
  at: MultiheadRingAttention
  because: the weights of all pairs are on no rank
  instead: need_weights=False""",
    )


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "extra key": (lambda: make_exact(add_bias_kv=True), "^add_bias_kv=True"),
    "zero key": (lambda: make_exact(add_zero_attn=True), "^add_zero_attn=True"),
    "weights": (lambda: make_window()(X, X, X, need_weights=True), "^need_weights"),
    "bias under a pattern": (
        lambda: make_window()(X, X, X, attn_mask=PAIRS + 0.5),
        "^attn_mask of other floats",
    ),
    "learned bias under a pattern": (
        lambda: make_window()(X, X, X, attn_mask=PAIRS.clone().requires_grad_()),
        "^attn_mask of other floats",
    ),
    "integer mask": (
        lambda: make_exact()(X, X, X, attn_mask=PAIRS.int()),
        "^attn_mask of torch.int32",
    ),
    "float padding": (
        lambda: make_exact()(X, X, X, key_padding_mask=KEYS + 0.5),
        "^key_padding_mask of other floats",
    ),
    "float padding under a pattern": (
        lambda: make_window()(X, X, X, key_padding_mask=KEYS + 0.5),
        "^key_padding_mask of other floats",
    ),
    "integer padding": (
        lambda: make_exact()(X, X, X, key_padding_mask=KEYS.int()),
        "^key_padding_mask of torch.int32",
    ),
    "heads of the config": (
        lambda: make_exact(config=RingAttentionConfig(embed_dim=E, num_heads=2 * H)),
        f"num_heads={2 * H}",
    ),
    "width of the config": (
        lambda: make_exact(config=RingAttentionConfig(embed_dim=2 * E, num_heads=H)),
        f"embed_dim={2 * E}",
    ),
    "window beside exact": (
        lambda: make_exact(config=RingAttentionConfig(window_size=128)),
        "window_size=128",
    ),
    "segments beside a pattern": (
        lambda: make_window(
            config=RingAttentionConfig(segment_lengths=(8,), dilation_rates=(1,))
        ),
        "segment_lengths=",
    ),
    "no such preset": (
        lambda: make_exact(attention="block_sparse_multiheads"),
        "did you mean 'block_sparse_multihead'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_names_the_argument(name: str) -> None:
    call, text = REFUSED[name]
    with pytest.raises(OptionError, match=text), rewritten_only():
        call()


def test_dropout_is_nothing_in_eval() -> None:
    case = BY_NAME["mask and padding"]
    ours, theirs = make_pair(case)
    ours.dropout = theirs.dropout = 0.5
    with rewritten_only():
        got = run_ours(ours.eval(), case)
    assert find_faults(got, run_reference(theirs.eval(), case)) == []


@pytest.mark.parametrize("attention", ["exact", LocalWindow(8, 4)], ids=str)
def test_how_it_runs_is_read_beside_a_pattern_too(attention: object) -> None:
    """Of a configuration, what every preset reads."""
    config = RingAttentionConfig(
        use_fused_kernels=False,
        overlap_communication=False,
        use_hilbert=True,
        watchdog_timeout=5.0,
    )
    options = make_exact(attention=attention, config=config)._runner.options
    assert options.kernel == "math"
    assert options.stages == 1
    assert options.layout == "hilbert"
    assert options.timeout_s == 5.0


# ---- several modules, several calls --------------------------------------------------


def test_modules_of_other_head_counts_run_beside_each_other() -> None:
    with rewritten_only():
        for heads in (4, 2, 8):
            ours = MultiheadRingAttention(
                E, heads, batch_first=True, attention="exact", dtype=torch.float64
            )
            theirs = nn.MultiheadAttention(
                E, heads, batch_first=True, dtype=torch.float64
            )
            theirs.load_state_dict(ours.state_dict())
            x = BY_NAME["plain"].make_inputs()["query"]
            want, _ = theirs(x, x, x, need_weights=False)
            assert_output_equal(ours(x, x, x)[0], want)


def test_one_module_takes_every_mask_in_training_and_in_eval() -> None:
    """Though Dynamo compiles a function for no more than 8 kinds of arguments."""
    names = ["plain", "causal", "padding", "mask", "mask and padding", "bias"]
    ours, theirs = make_pair(BY_NAME["plain"])
    with rewritten_only():
        for case in (replace(BY_NAME[name], length=13) for name in names):
            want = run_reference(theirs, case)
            assert find_faults(run_ours(ours.train(), case), want) == []
            x = case.make_inputs()["query"].float()
            with torch.no_grad():
                out, _ = ours.eval()(x, x, x, **case.masks(torch.float32))
            assert_output_equal(out, want[0])


def test_one_module_takes_every_length() -> None:
    ours, theirs = make_pair(BY_NAME["padding"])
    with rewritten_only():
        for length in range(6, 17):
            case = replace(BY_NAME["padding"], length=length)
            assert find_faults(run_ours(ours, case), run_reference(theirs, case)) == []


@pytest.mark.parametrize("masks", ["", "padding", "causal and padding"])
def test_keys_of_another_sequence_where_attention_is_exact(masks: str) -> None:
    """As in a decoder's cross attention."""
    ours, theirs = make_pair(BY_NAME["plain"])
    x, y = (BY_NAME[n].make_inputs()["query"] for n in ("plain", "no bias"))
    arguments: dict[str, Any] = {}
    if masks:
        arguments["key_padding_mask"] = torch.arange(19).expand(B, 19) > 15
    if "causal" in masks:
        arguments |= {
            "attn_mask": torch.ones(13, 19, dtype=torch.bool).triu(1),
            "is_causal": True,
        }
    with rewritten_only():
        got, _ = ours(x.float(), y.float(), y.float(), **arguments)
    want, _ = theirs(x, y, y, need_weights=False, **arguments)
    assert_output_equal(got, want)


def run_other_keys(group: ProcessGroup, _rank: int) -> None:
    case = replace(BY_NAME["plain"], attention="window")
    ours, _ = make_pair(case, group)
    with rewritten_only():
        ours(X, X[:, :5], X[:, :5])


def test_keys_of_another_sequence_never_lose_a_pattern(ranks: RankPool) -> None:
    text = "UnsupportedAttentionError: attention of 9 queries over 5 keys"
    with pytest.raises(RankError, match=text):
        ranks.run(run_other_keys, world_size=2)


def test_its_parameters_can_be_reset() -> None:
    """As of torch's module, which draws the same."""
    ours, theirs = make_exact(), nn.MultiheadAttention(E, H)
    for module in (ours, theirs):
        torch.manual_seed(3)
        module._reset_parameters()
    assert torch.equal(ours.in_proj_weight, theirs.in_proj_weight)
