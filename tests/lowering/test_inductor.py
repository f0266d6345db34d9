"""What Inductor is told."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._functorch.aot_autograd import aot_module_simplified  # noqa: TID251
from torch._guards import TracingContext
from torch._inductor.utils import run_and_get_code  # noqa: TID251
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy

from ringcompile import backend as ring_backend
from ringcompile import ops
from ringcompile.inductor_passes import GraphPass, first_pass, pass_uuid
from ringcompile.lowering import inductor
from ringcompile.lowering.inductor import inductor_patches, sources_hash
from ringcompile.lowering.rows import join
from ringcompile.patterns import LocalWindow
from ringcompile.torch_private import compile_with_inductor


def joint_graph() -> Graph:
    graph = Graph()
    x = graph.placeholder("x")
    other = graph.call_function(torch.ops.aten.sin.default, (x,))
    graph.output(graph.call_function(ops.KEEP, (other, [])))
    return graph


def joint_pass(patches: dict[str, object]) -> GraphPass:
    found = patches["joint_custom_pre_pass"]
    assert callable(found)
    return found


def run_joint_pass(patches: dict[str, object]) -> Graph:
    graph = joint_graph()
    joint_pass(patches)(graph)
    return graph


def test_kept_values_are_saved() -> None:
    graph = run_joint_pass(inductor_patches({}))
    policies = {n.target: n.meta.get("recompute") for n in graph.nodes}
    assert policies[ops.KEEP] is CheckpointPolicy.MUST_SAVE
    assert policies[torch.ops.aten.sin.default] is None


def test_a_users_patches_win_and_its_passes_run_first() -> None:
    seen: list[object] = []
    user = {
        "joint_custom_pre_pass": lambda g: seen.append(next(iter(g.nodes)).op),
        "max_autotune": True,
        "reorder_for_locality": True,
    }
    patches = inductor_patches(user)
    run_joint_pass(patches)
    assert seen == ["placeholder"]
    assert patches["max_autotune"] is True
    assert patches["reorder_for_locality"] is True
    assert patches["reorder_for_peak_memory"] is False


def test_a_users_pass_set_globally_runs_too() -> None:
    seen: list[Graph] = []
    with torch._inductor.config.patch(  # noqa: TID251
        joint_custom_pre_pass=seen.append
    ):
        patches = inductor_patches({})
    run_joint_pass(patches)
    assert len(seen) == 1


def test_caches_know_our_pass_but_not_an_anonymous_one() -> None:
    ours = joint_pass(inductor_patches({}))
    assert sources_hash() in pass_uuid(ours)
    with_users = inductor_patches({"joint_custom_pre_pass": print})
    assert pass_uuid(joint_pass(with_users)) == ""
    both = inductor_patches({"joint_custom_pre_pass": ours})
    assert pass_uuid(joint_pass(both)) not in {"", pass_uuid(ours)}


def test_caches_know_which_nodes_are_checkpointed_and_together() -> None:
    """Two checkpoints may have the ops of one; see test_caches.py for what it saves."""
    uuids = set()
    for regions in ({}, {0: 7, 1: 7}, {0: 8, 1: 8}, {0: 7, 1: 8}, {0: 7}):
        graph = joint_graph()
        for n, node in enumerate(graph.nodes):
            if n in regions:
                node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
                node.meta["ac_graph_id"] = regions[n]
        uuids.add(pass_uuid(joint_pass(inductor_patches({}, graph))))
    assert len(uuids) == 4  # how a region is numbered says nothing


def test_sources_are_all_that_give_a_plan_its_meaning() -> None:
    names = {f.name for f in inductor.source_files()}
    assert {"ring.py", "process_group.py", "ops.py", "schedule.py"} <= names


def _uploaded(x: Tensor) -> Tensor:
    return x + torch.ones(4).to(x.device)


def _moved(x: Tensor) -> Tensor:
    return (x.sin().to("cuda:1") + 1).to(x.device)


def _branched(x: Tensor) -> Tensor:
    chosen: Tensor = torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))
    return chosen


@pytest.mark.parametrize(
    ("compute", "settings", "may_be_cut"),
    [
        (torch.sin, {}, False),
        (torch.sin, {"triton.cudagraphs": False}, False),
        (torch.sin, {"triton.cudagraph_skip_dynamic_graphs": True}, True),
        (_uploaded, {}, True),
        (_moved, {}, True),
        (_branched, {}, True),
    ],
)
def test_where_cuda_graphs_may_be_cut_is_known(
    compute: Callable[[Tensor], Tensor], settings: dict[str, Any], *, may_be_cut: bool
) -> None:
    """Over a cut no hop may be under way."""
    told: list[bool] = []

    def expand(_graph: Graph, *, may_be_cut: bool, **_: object) -> None:
        told.append(may_be_cut)

    run: Any = first_pass(expand, "")
    with FakeTensorMode(allow_non_fake_inputs=True):
        traced = make_fx(compute)(torch.empty(4, device="cuda"))
    with torch._inductor.config.patch(  # noqa: TID251
        {"triton.cudagraphs": True} | settings
    ):
        run(traced.graph)
    assert told == [may_be_cut]


@pytest.mark.parametrize("rows", [(4, 3), (1, 6)])
def test_joined_rows_are_written_where_they_belong(rows: tuple[int, int]) -> None:
    """What makes them writes into the result: none is copied, be it of one row."""

    def lay(x: Tensor, y: Tensor) -> Tensor:
        return join([x.sin().transpose(1, 2), y.cos().transpose(1, 2)], 1)

    def backend(gm: GraphModule, example: list[Tensor]) -> Callable[..., object]:
        return compile_with_inductor(gm, example, inductor_patches({}))

    x, y = (torch.randn(1, 5, n, 3) for n in rows)
    call = torch.compile(lay, backend=backend, dynamic=False)
    out, (code, *_) = run_and_get_code(call, x, y)
    want = torch.cat([x.sin(), y.cos()], 2).transpose(1, 2)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lay(x, y), want)
    assert out.is_contiguous()
    allocated = re.findall(r"= empty_strided_cpu\((\(.*?\))", code)
    assert allocated == ["(1, 1, 1, 7, 5, 3)"]


class Projected(nn.Module):
    shift: Tensor

    def __init__(self, *, has_constant: bool) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24)
        self.register_buffer("shift", torch.ones(8))
        self.has_constant = has_constant

    def forward(self, x: Tensor) -> Tensor:
        if self.has_constant:
            x = x * torch.tensor([1.0, 2.0, 3.0, 4.0] * 2)
        q, k, v = self.project(x + self.shift).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.parametrize("has_constant", [False, True])
def test_inputs_that_stay_in_memory_are_known(
    monkeypatch: pytest.MonkeyPatch, *, has_constant: bool
) -> None:
    """A CUDA graph copies all others at each call."""
    stay: list[bool] = []

    def compile_graph(
        gm: GraphModule, example: list[Tensor], *_: object
    ) -> Callable[..., object]:
        def note(traced: GraphModule, given: Sequence[object]) -> object:
            context = TracingContext.get()
            assert context.fw_metadata is not None
            where = context.fw_metadata.static_input_indices
            assert len(given) == len(example) + has_constant
            stay.extend(n in where for n in range(len(given)))
            return traced.forward

        compile_forward: Any = note
        return aot_module_simplified(gm, example, fw_compiler=compile_forward)

    monkeypatch.setattr(ring_backend, "compile_with_inductor", compile_graph)
    model, x = Projected(has_constant=has_constant), torch.randn(2, 2, 16, 8)
    options: Any = {"attention": LocalWindow(8, 4)}
    compiled = torch.compile(model, backend="ring", options=options)
    with torch.no_grad():
        compiled(x)
    held = [*model.parameters(), *model.buffers()]
    assert stay.count(True) == len(held) + has_constant
    assert stay.count(False) == 1  # x
