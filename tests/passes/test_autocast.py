"""Under autocast, inside the graph or around it, attentions are found all the same."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, GraphModule

from ringcompile.config import RingOptions
from ringcompile.mesh import Ranks
from ringcompile.passes.autocast import spell_autocast
from ringcompile.passes.find_attention import find_attention
from ringcompile.passes.pipeline import run_passes
from ringcompile.passes.regions import Region
from ringcompile.passes.shadow import trace_shadow
from ringcompile.passes.text import format_calls


def make_qkv() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 8, 4, generator=generator) for _ in range(3))
    return q, k, v


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def spelled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.transpose(-2, -1)) / 2).softmax(-1) @ v


@dataclass(frozen=True, slots=True)
class Shadowed:
    """What was called, its shadow and what that is called with: in its own order."""

    inputs: tuple[Tensor, ...]
    shadow: GraphModule
    shadow_inputs: tuple[Tensor, ...]


def shadow_of(fn: Callable[..., Tensor], *, around: bool) -> Shadowed:
    found: list[Shadowed] = []
    q, k, v = make_qkv()
    inputs = (q, k, v.bfloat16())  # as rotary leaves them

    def keep(gm: GraphModule, given: list[Tensor]) -> Callable[..., Any]:
        found.append(Shadowed(inputs, trace_shadow(gm, given), tuple(given)))
        return gm.forward

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with nullcontext() if around else torch.autocast("cpu", torch.bfloat16):
            return fn(q, k, v)

    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16) if around else nullcontext():
        torch.compile(call, backend=keep)(*inputs)
        assert spell_autocast(found[0].shadow) == 1
        assert spell_autocast(found[0].shadow) == 0
    return found[0]


@pytest.mark.parametrize("around", [False, True], ids=["inside", "around"])
@pytest.mark.parametrize("fn", [sdpa, spelled])
def test_an_attention_under_autocast_is_found(
    fn: Callable[..., Tensor], around: bool
) -> None:
    traced = shadow_of(fn, around=around)
    (region,) = find_attention(traced.shadow)
    assert isinstance(region, Region)
    assert region.q.node.meta["val"].dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        want = fn(*traced.inputs)
    with torch.autocast("cpu", torch.bfloat16) if around else nullcontext():
        (got,) = traced.shadow(*traced.shadow_inputs)
    assert got.dtype == want.dtype == torch.bfloat16
    assert torch.equal(got, want)


def test_values_are_those_of_autocast() -> None:
    (output,) = shadow_of(sdpa, around=False).shadow.graph.output_node().all_input_nodes
    assert output.meta["val"].dtype == torch.bfloat16


def test_a_trace_that_fails_leaves_autocast() -> None:
    def call(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return x @ x

    def keep(gm: GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
        with pytest.raises(RuntimeError, match="reduction dim"):
            trace_shadow(gm, [torch.ones(2, 3)])
        assert not torch.is_autocast_enabled("cpu")
        return gm.forward

    torch._dynamo.reset()
    torch.compile(call, backend=keep)(torch.ones(2, 2))


def test_double_and_a_mode_that_is_off_are_left() -> None:
    def off(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return sdpa(q, k, v.to(q.dtype))

    def keep(gm: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        assert spell_autocast(trace_shadow(gm, inputs)) == 0
        return gm.forward

    for fn, dtype in ((off, torch.float32), (sdpa, torch.float64)):
        torch._dynamo.reset()
        with torch.autocast("cpu", torch.bfloat16):
            torch.compile(fn, backend=keep)(*(x.to(dtype) for x in make_qkv()))


def test_the_text_that_ranks_compare_has_no_addresses() -> None:
    def keep(gm: GraphModule, given: list[Tensor]) -> Callable[..., Any]:
        texts.append(
            run_passes(
                gm, given, options=RingOptions(), ranks=Ranks(), sources=""
            ).graph_text
        )
        return gm.forward

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return spelled(q, k, v)

    texts: list[str] = []
    torch.compiler.reset()
    torch.compile(call, backend=keep)(*make_qkv())
    assert "_enter_autocast" in texts[0]
    assert " at 0x" not in texts[0]


def test_the_text_that_ranks_compare_names_no_rank() -> None:
    """Each rank has a GPU of its own; its kind must be the same."""

    def write(device: str, size: int = 4) -> str:
        graph = Graph()
        arange = torch.ops.aten.arange.default
        graph.call_function(arange, (size,), {"device": torch.device(device)})
        return format_calls(graph)

    assert write("cuda:0") == write("cuda:1")
    assert write("cuda:0") != write("cpu")
    assert write("cpu") != write("cpu", 5)
