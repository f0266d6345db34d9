"""Hold what was found in a graph against what the graph computes on real tensors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx

from ringcompile.ir.evaluate import evaluate
from ringcompile.ir.mask import EmptyRow
from ringcompile.passes.find_attention import find_attention
from ringcompile.passes.op import read_op
from ringcompile.passes.regions import Operand, Refusal, Region
from ringcompile.passes.shadow import trace_shadow
from ringcompile.torch_private import size_hint


@dataclass(frozen=True, slots=True)
class Traced:
    """A flat ATen graph and real inputs of it."""

    gm: GraphModule
    inputs: tuple[object, ...]

    def find(self) -> tuple[Region | Refusal, ...]:
        """What ``find_attention`` finds, each region held against the graph."""
        found = find_attention(self.gm)
        regions = [f for f in found if isinstance(f, Region)]
        if regions:
            values = record_values(self)
            for region in regions:
                assert_region_is_true(region, values)
        return found

    def region(self) -> Region:
        """The one attention found, which must be a region."""
        (found,) = self.find()
        assert isinstance(found, Region), found
        return found

    def refusal(self) -> Refusal:
        """The one attention found, which must be refused."""
        (found,) = self.find()
        assert isinstance(found, Refusal), found
        return found


def trace(fn: Callable[..., Any], *inputs: Tensor, dynamic: bool = False) -> Traced:
    """Trace a function as the shadow does; ``dynamic`` keeps sizes symbolic."""
    mode: Literal["symbolic", "fake"] = "symbolic" if dynamic else "fake"
    gm = make_fx(fn, pre_dispatch=True, tracing_mode=mode)(*inputs)
    return Traced(gm, inputs)


def trace_model(
    model: nn.Module | Callable[..., Any],
    inputs: dict[str, Any],
    *,
    dynamic: bool | None = None,
) -> Traced:
    """The shadow of a model's first graph, as the backend gets it."""
    graphs: list[Traced] = []

    def keep(gm: GraphModule, example_inputs: Sequence[object]) -> Callable[..., Any]:
        real = [
            size_hint(x) if isinstance(x, torch.SymInt) else x for x in example_inputs
        ]
        graphs.append(Traced(trace_shadow(gm, example_inputs), tuple(real)))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(model, backend=keep, dynamic=dynamic)(**inputs)
    return graphs[0]


class _Recorder(Interpreter):
    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.values: dict[Node, Any] = {}

    def run_node(self, n: Node) -> Any:  # noqa: ANN401
        self.values[n] = super().run_node(n)
        return self.values[n]


def record_values(traced: Traced) -> dict[Node, Any]:
    """The real value of every node."""
    recorder = _Recorder(traced.gm)
    recorder.run(*traced.inputs)
    return recorder.values


def assert_region_is_true(region: Region, values: dict[Node, Any]) -> None:
    """Require a region to say what the graph computes: its result and its mask."""
    q, k, v = (_read_rows(o, values) for o in (region.q, region.k, region.v))
    batch, heads, length, _ = q.shape
    repeats = heads // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    for factor in region.factors:
        own = values[factor.node].double().reshape([int(n) for n in factor.view])
        q = q / own if factor.divides else q * own
    scores = _change_scores(region.scale * q @ k.transpose(-2, -1), region, values)
    kept = evaluate_mask(region, values, (batch, heads, length, k.shape[2]))
    scores = scores.masked_fill(~kept, -torch.inf)
    if region.sinks is not None:
        own = region.sinks
        read = values[own] if isinstance(own, Node) else torch.tensor(own)
        sinks = read.double().view(1, -1, 1, 1)
        scores = torch.cat([scores, sinks.expand(batch, heads, length, 1)], -1)
    weights = scores.softmax(-1)[..., : k.shape[2]]
    empty = {
        EmptyRow.ZERO: 0.0,
        EmptyRow.MEAN_ALL: 1 / k.shape[2],
        EmptyRow.MEAN_FILLED: 1 / k.shape[2],
        EmptyRow.NAN: torch.nan,
    }[region.mask.empty_row]
    has_key = kept.any(-1, keepdim=True)
    want = weights.masked_fill(~has_key, empty) @ v
    want = want.mT if region.transposed else want
    got = values[region.output].double()
    rounding = torch.finfo(values[region.output].dtype).eps
    torch.testing.assert_close(
        *(got, want.reshape(got.shape)),
        rtol=32 * rounding,
        atol=32 * rounding,
        equal_nan=True,
    )
    if not region.biases and got.shape == want.shape and not region.transposed:
        graphs_own = read_kept(region, values)
        assert torch.equal(graphs_own & has_key, kept), f"not its mask: {region.mask}"


def _change_scores(scores: Tensor, region: Region, values: dict[Node, Any]) -> Tensor:
    if region.softcap is not None:
        scores = region.softcap * torch.tanh(scores / region.softcap)
    for bias in region.biases:
        view = [int(size) for size in bias.view]
        scores = scores + bias.factor * values[bias.node].double().reshape(view)
    return scores


def _read_rows(operand: Operand, values: dict[Node, Any]) -> Tensor:
    rows: Tensor = values[operand.node].double()
    if operand.view:
        rows = rows.reshape([int(size) for size in operand.view])
    return rows.transpose(2, 3) if operand.transposed else rows


def evaluate_mask(
    region: Region, values: dict[Node, Any], shape: tuple[int, ...]
) -> Tensor:
    """The mask that was read, on the real captures, as a bool of ``shape``."""
    at = [
        torch.arange(size).view([-1 if d == dim else 1 for d in range(4)])
        for dim, size in enumerate(shape)
    ]
    captures = [values[node] for node in region.captures]
    return evaluate(region.mask.keeps, at, captures).broadcast_to(shape)


def read_kept(region: Region, values: dict[Node, Any]) -> Tensor:
    """The pairs that the graph itself keeps, from its own mask or weights."""
    op = read_op(region.output)
    assert op is not None
    keys = int(region.k.shape[2])
    shape = (*values[region.output].shape[:3], keys)
    if "attn_mask" not in op.args:
        weights: Tensor = values[op.slots[0]]
        return weights != 0
    node = op.args["attn_mask"]
    kept = torch.ones(shape, dtype=torch.bool)
    if node is not None:
        mask = values[node]
        kept = (mask if mask.dtype is torch.bool else mask == 0).broadcast_to(shape)
    return kept.tril() if op.args["is_causal"] else kept
