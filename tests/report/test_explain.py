"""What a report says, and that looking changes nothing."""

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from support.sampling import slow
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import GraphModule
from torch.utils._python_dispatch import TorchDispatchMode

import ringcompile
from ringcompile import OptionError, Report, explain
from ringcompile.config import RingOptions
from ringcompile.ir.layout import Layout
from ringcompile.lowering import expand as ring_ops
from ringcompile.lowering.hops import Phase, Tag
from ringcompile.mesh import Ranks
from ringcompile.ops import HOP
from ringcompile.passes.pipeline import Rewritten, run_passes
from ringcompile.patterns import LongNet
from ringcompile.report.trial import bytes_of, run_trial
from ringcompile.torch_private import CallObserver

LENGTH = 64
WIDTH = 32


class Attention(nn.Module):
    """Causal, with an optional bias that is no function of positions."""

    calls: Tensor

    def __init__(self, *, biased: bool = False) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.biased = biased
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        self.calls += 1
        q, k, v = (
            y.view(*x.shape[:2], 4, 8).transpose(1, 2)
            for y in self.qkv(x).chunk(3, dim=-1)
        )
        if self.biased:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.cumsum(0) > 0)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        projected: Tensor = self.out(y.transpose(1, 2).reshape(x.shape))
        return projected


class Model(nn.Module):
    def __init__(self, *biased: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Attention(biased=b) for b in biased])

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x, bias)
        return x.square().mean()


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, LENGTH, WIDTH, generator=generator)
    return x, torch.randn(LENGTH, LENGTH, generator=generator)


def report(*biased: bool, **options: object) -> Report:
    torch.manual_seed(0)
    return explain(Model(*biased), *inputs(), options=options)


def line_of(text: str) -> int:
    lines = Path(__file__).read_text().splitlines()
    return next(n for n, line in enumerate(lines, 1) if line.strip() == text)


def stable(text: object) -> str:
    """Without what moves when this file is edited."""
    return re.sub(r"\S*test_explain\.py:\d+", "test_explain.py:N", str(text))


# ---- form ----------------------------------------------------------------------------


def test_text_of_rings() -> None:
    assert_expected_inline(
        stable(report(False, False, layout="zigzag")),
        """\
4 ranks, 1 graph, 2 of 2 attentions ring

ring     layers.0 to layers.1 (2)
  at       test_explain.py:N
  mask     k <= q
  pattern  exact
  layout   zigzag x4
  because  layout="zigzag" in the options

runs in layers.0 to layers.1 (2):
schedule zigzag x4
  part 0: k <= q
    step 0: kv0/ kv1/ kv2/ kv3/
    step 1: kv3/ kv0/ kv1/ kv2/
    step 2: kv2/ kv3/ kv0/ kv1/
    step 3: kv1/ kv2/ kv3/ kv0/
  bytes sent, forward + backward:
    part 0, step 1: 4 KiB + 12 KiB, 4 KiB + 8 KiB, 4 KiB + 8 KiB, 8 KiB + 12 KiB
    part 0, step 2: 4 KiB + 12 KiB, 4 KiB + 12 KiB, 8 KiB + 12 KiB, 8 KiB + 12 KiB
    part 0, step 3: 4 KiB + 12 KiB, 8 KiB + 16 KiB, 8 KiB + 16 KiB, 8 KiB + 12 KiB

bytes that each rank sends in one forward and one backward
            hops  hops back  all-gathers  all-reduces    total
  rank 0  24 KiB     72 KiB          0 B     49.5 KiB  146 KiB
  rank 1  32 KiB     72 KiB          0 B     49.5 KiB  154 KiB
  rank 2  40 KiB     72 KiB          0 B     49.5 KiB  162 KiB
  rank 3  48 KiB     72 KiB          0 B     49.5 KiB  170 KiB

memory on each rank at the end of forward, without temporaries
  parameters                      33 KiB
  saved for backward, at most     29 KiB
    of that by attentions         17 KiB
  made whole                         0 B
""",
    )


def test_text_of_a_refusal() -> None:
    assert_expected_inline(
        stable(report(False, True, layout="contiguous")),
        """\
4 ranks, 1 graph, 1 of 2 attentions ring

ring     layers.0
  at       test_explain.py:N
  mask     k <= q
  pattern  exact
  layout   contiguous x4
  because  layout="contiguous" in the options

gathered layers.1
  at       test_explain.py:N
  because  attention with a mask or bias that isn't a function of positions: l_args_1_ isn't computed from positions
           instead: build the mask from positions, a (batch, sequence) integer or bool tensor, or both; keep keys with 0 and drop them with False, -inf or torch.finfo(dtype).min

runs in layers.0:
schedule contiguous x4
  part 0: k <= q
    step 0: kv0/ kv1/ kv2/ kv3/
    step 1: kv3. kv0# kv1# kv2#
    step 2: kv2. kv3. kv0# kv1#
    step 3: kv1. kv2. kv3. kv0#
  bytes sent, forward + backward:
    part 0, step 1: 8 KiB + 8 KiB, 8 KiB + 16 KiB, 8 KiB + 16 KiB, 0 B + 8 KiB
    part 0, step 2: 8 KiB + 8 KiB, 8 KiB + 8 KiB, 0 B + 8 KiB, 0 B + 8 KiB
    part 0, step 3: 8 KiB + 8 KiB, 0 B + 0 B, 0 B + 0 B, 0 B + 8 KiB

made whole on every rank
  3 x aten.scaled_dot_product_attention: 16 KiB each
    at test_explain.py:N
    because no rule knows how it acts on a shard

bytes that each rank sends in one forward and one backward
            hops  hops back  all-gathers  all-reduces    total
  rank 0  24 KiB     24 KiB       48 KiB     49.5 KiB  146 KiB
  rank 1  16 KiB     24 KiB       48 KiB     49.5 KiB  138 KiB
  rank 2   8 KiB     24 KiB       48 KiB     49.5 KiB  130 KiB
  rank 3     0 B     24 KiB       48 KiB     49.5 KiB  122 KiB

memory on each rank at the end of forward, without temporaries
  parameters                      33 KiB
  saved for backward, at most    106 KiB
    of that by attentions        8.5 KiB
  made whole                      48 KiB
""",
    )


# ---- attentions ----------------------------------------------------------------------


def test_an_attention_names_module_line_mask_and_layout() -> None:
    (first, second) = report(False, False).attentions
    call = "y = F.scaled_dot_product_attention(q, k, v, is_causal=True)"
    assert first.where == f"{__file__}:{line_of(call)}" == first.call_line
    assert (first.name, second.name) == ("layers.0", "layers.1")
    assert (first.status, first.mask, first.pattern) == ("ring", "k <= q", "exact")
    assert first.layout == "zigzag x4"
    assert first.reason


def test_a_refused_attention_is_gathered_and_says_why() -> None:
    found = report(False, True)
    first, second = found.attentions
    call = "y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.cumsum(0) > 0)"
    assert (first.status, second.status) == ("ring", "gathered")
    assert second.where == f"{__file__}:{line_of(call)}"
    assert "isn't a function of positions" in second.reason
    assert any("scaled_dot_product" in g.what for g in found.gathers)


def test_a_refusal_is_reported_even_under_error() -> None:
    found = report(False, True, unsupported="error")
    assert [a.status for a in found.attentions] == ["ring", "gathered"]


def test_on_meta_the_report_is_the_same_and_takes_no_memory() -> None:
    torch.manual_seed(0)
    model = Model(False, False)
    usual = explain(model, *inputs(), world_size=4)
    on_meta = explain(model.to("meta"), *(x.to("meta") for x in inputs()), world_size=4)
    assert [a.status for a in on_meta.attentions] == ["ring", "ring"]
    assert str(on_meta) == str(usual)


def test_one_rank_is_dense() -> None:
    found = explain(Model(False), *inputs(), world_size=1)
    assert [a.status for a in found.attentions] == ["dense"]
    assert found.bytes_per_rank == (0,)


def test_no_attention() -> None:
    found = explain(lambda x: x.sin() + 1, torch.ones(3))
    assert (found.attentions, found.gathers, found.schedules) == ((), (), ())
    assert "no attention" in str(found)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, at a break
def test_every_graph_is_reported() -> None:
    model = Model(False)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def look(x: Tensor) -> Tensor:
        return x

    def twice(x: Tensor, bias: Tensor) -> object:
        return model(look(x + model(x, bias)), bias)

    found = explain(twice, *inputs())
    assert len(found.graphs) == 2
    assert [a.status for a in found.attentions] == ["ring", "ring"]
    assert found.graph("shadow").count("# after shadow") == 2


def test_a_user_line_wins_over_the_library() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    llama = transformers.LlamaForCausalLM(config)
    ids = torch.arange(LENGTH)[None]

    def call(ids: Tensor) -> object:
        return llama(ids, use_cache=True).logits

    (mine,) = explain(call, ids).attentions
    assert (
        mine.where
        == f"{__file__}:{line_of('return llama(ids, use_cache=True).logits')}"
    )
    assert "sdpa_attention.py" in mine.call_line

    found = explain(llama, ids, use_cache=True)
    (theirs,) = found.attentions
    assert "modeling_llama.py" in theirs.where
    assert theirs.name == "model.layers.0.self_attn"
    assert [note.split(":")[0] for note in found.notes] == ["outputs 0, 1"]
    assert explain(llama, ids, use_cache=False).notes == ()
    with torch.no_grad():
        assert explain(llama, ids, use_cache=True).notes == ()


# ---- numbers -------------------------------------------------------------------------


def passes_of(rank: int, world_size: int, **options: object) -> Rewritten:
    made: list[Rewritten] = []

    def backend(gm: GraphModule, example_inputs: list[Tensor]) -> object:
        chosen = RingOptions.from_user(options)
        ranks = Ranks(rank, world_size, "explain")
        made.append(
            run_passes(gm, example_inputs, options=chosen, ranks=ranks, sources="")
        )
        return gm.forward

    torch.compiler.reset()
    torch.compile(Model(False, False), backend=backend, dynamic=False)(*inputs())
    return made[0]


def test_orders_by_option_are_in_the_plans() -> None:
    options = {"layout": "hilbert", "attention": LongNet((8, 12), (1, 2))}
    natural = passes_of(0, 4, **options)
    made = passes_of(0, 4, **options, block_order="hilbert")
    assert {a.plan.block_order for a in made.attentions} == {"hilbert"}
    assert {a.plan.block_order for a in natural.attentions} == {"natural"}
    assert made.plan_hash != natural.plan_hash
    layouts = {a.plan.schedule.layout for a in made.attentions}
    assert layouts == {Layout("hilbert", 4, 12)}
    alone = passes_of(0, 1, **options)
    layouts = {a.plan.schedule.layout for a in alone.attentions}
    assert layouts == {Layout("contiguous", 1)}


class _WrittenOut(TorchDispatchMode):
    """Walks through rings, of which fake tensors would tell the shapes alone."""

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Any,  # noqa: ANN401
        args: Any = (),  # noqa: ANN401
        kwargs: Any = None,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        run: Callable[..., Any] = ring_ops._LOOPS.get(func, func)
        return run(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "layout", [slow("contiguous"), "zigzag", "striped", slow("hilbert")]
)
def test_bytes_are_those_that_the_lowering_sends(layout: str) -> None:
    sent: dict[bool, int] = {}

    def note(op: OpOverload, args: tuple[Any, ...], _result: object) -> None:
        if op is HOP and args[2] >= 0:
            is_back = Tag.decode(args[5]).phase is not Phase.FORWARD_KV
            sent[is_back] = sent.get(is_back, 0) + sum(map(bytes_of, args[0]))

    traffic = report(False, False, layout=layout).traffic
    for rank in range(4):
        made = passes_of(rank, 4, layout=layout)
        sent.clear()
        with CallObserver(note), _WrittenOut():  # type: ignore[no-untyped-call]
            run_trial(made.gm, 4)
        assert sent.get(False, 0) == traffic.hops_forward[rank]
        assert sent.get(True, 0) == traffic.hops_backward[rank]


def test_a_rank_holds_half_when_there_are_twice_as_many() -> None:
    two, four = (
        explain(Model(False, False), *inputs(), world_size=n).memory_per_rank
        for n in (2, 4)
    )
    assert two.parameters == four.parameters > 0
    assert 0 < four.saved <= 0.55 * two.saved
    assert 0 < four.attention <= 0.55 * two.attention


def test_totals_add_up() -> None:
    found = report(False, True)
    traffic = found.traffic
    assert found.bytes_per_rank == tuple(
        traffic.hops_forward[r]
        + traffic.hops_backward[r]
        + traffic.gathers[r]
        + traffic.reduces[r]
        for r in range(4)
    )
    assert min(traffic.gathers) > 0


def test_json_holds_the_fields() -> None:
    found = report(False, True)
    told = json.loads(found.to_json())
    assert [a["status"] for a in told["attentions"]] == ["ring", "gathered"]
    assert tuple(told["bytes_per_rank"]["total"]) == found.bytes_per_rank
    assert told["schedules"][0]["text"] == found.schedules[0].text


# ---- graphs --------------------------------------------------------------------------


def test_graphs_show_shards_of_any_rank() -> None:
    found = report(False)
    assert f"float32[2, {LENGTH}, {WIDTH}]" in found.graph("shadow")
    for rank in (0, 3):
        text = found.graph("rewrite", rank=rank)
        assert f"float32[2, 4, {LENGTH // 4}, 8] = ringcompile.ring_attention" in text
        assert f"rank={rank} " in text
    with pytest.raises(ValueError, match="'shadow', 'raise_attention', 'rewrite'"):
        found.graph("no such")
    with pytest.raises(ValueError, match="0 to 3"):
        found.graph("rewrite", rank=4)


# ---- what looking must not do --------------------------------------------------------


def test_looking_changes_nothing() -> None:
    torch.manual_seed(0)
    model = Model(False, True).eval()
    parameters = list(model.parameters())
    for p in parameters:
        p.grad = torch.ones_like(p)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    state = torch.get_rng_state()
    explain(model, *inputs())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())
    assert all(bool((p.grad == 1).all()) for p in parameters if p.grad is not None)
    assert not model.training


def test_looking_often_is_no_recompile() -> None:
    model = Model(False)
    found = [explain(model, *inputs(), world_size=n) for n in range(1, 12)]
    assert all(len(f.graphs) == 1 for f in found)


def test_looking_is_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report(False, True)


def test_a_compiled_module_is_looked_into() -> None:
    compiled = torch.compile(Model(False), backend="eager")
    assert [a.name for a in explain(compiled, *inputs()).attentions] == ["layers.0"]


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(OptionError, match="did you mean 'zigzag'"):
        report(False, layout="zigzga")
    with pytest.raises(ValueError, match="world_size=0"):
        explain(Model(False), *inputs(), world_size=0)


def test_the_package_exports_what_it_says() -> None:
    for name in ringcompile.__all__:
        assert getattr(ringcompile, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ringcompile.nothing
