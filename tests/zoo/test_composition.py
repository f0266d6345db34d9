"""The backend beside what else trains models: curves are those of one eager rank."""

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.ranks import RankError, RankPool
from support.training import (
    VOCABULARY,
    assert_curves_equal,
    build_llama,
    make_batches,
    ring,
    train,
    train_eager,
    without_codegen,
)
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import ringcompile

Options = Mapping[str, Any]
Step = Callable[[nn.Module, Callable[..., Any]], list[float]]


def count_rings(found: Sequence[Any]) -> int:
    assert not any(made.refusals for made in found)
    return sum(len(made.attentions) for made in found)


# ---- FSDP2 and DDP -------------------------------------------------------------------


def shard_parameters(
    group: ProcessGroup, rank: int, shape: tuple[int, ...], by_block: bool, scale: str
) -> None:
    """FSDP2 over all ranks; the last mesh dim cuts the sequence."""
    names = ("dp", "cp")[-len(shape) :]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    num_batches = 1 if len(shape) == 1 else shape[0]
    mine = 0 if num_batches == 1 else mesh["dp"].get_local_rank()
    whole = mesh if num_batches == 1 else mesh._flatten("world")
    model = build_llama()
    if by_block:
        for layer in model.model.layers:
            fully_shard(layer, mesh=whole)
    fully_shard(model, mesh=whole)
    if scale == "sum":
        for module in model.modules():
            if isinstance(module, torch.distributed.fsdp.FSDPModule):
                module.set_gradient_divide_factor(num_batches)
                module.set_force_sum_reduction_for_comms(True)  # all that gloo has
    options = {"grads": "local", "local_scale": scale}
    batches = [b.chunk(num_batches)[mine] for b in make_batches(batch=2 * num_batches)]
    with without_codegen() as found:
        losses = train(model, ring(model, mesh["cp"], options), batches)
    assert count_rings(found) == (1 if by_block else 2), "blocks share a graph"
    if num_batches > 1:
        losses = average(losses, mesh["dp"].get_group())
    assert_curves_equal(losses, train_eager(batch=2 * num_batches))


def average(losses: Sequence[float], group: ProcessGroup) -> list[float]:
    total = torch.tensor(losses, dtype=torch.float64)
    dist.all_reduce(total, group=group)
    return [x / dist.get_world_size(group) for x in total.tolist()]


@pytest.mark.parametrize(
    ("shape", "by_block", "scale"),
    [
        ((4,), False, "mean"),
        ((4,), True, "mean"),
        pytest.param((4,), False, "sum", marks=pytest.mark.slow),
        pytest.param((2, 2), False, "sum", marks=pytest.mark.slow),
        pytest.param((2, 2), True, "mean", marks=pytest.mark.slow),
    ],
)
def test_fsdp2(
    ranks: RankPool, shape: tuple[int, ...], by_block: bool, scale: str
) -> None:
    ranks.run(shard_parameters, shape, by_block, scale, world_size=4)


def test_a_sum_over_ranks_of_a_part_is_refused(ranks: RankPool) -> None:
    """What runs outside of the blocks' graphs can't be divided by P."""
    with pytest.raises(RankError, match='local_scale="sum" on a part of a model'):
        ranks.run(shard_parameters, (4,), True, "sum", world_size=4)


class TwoGraphs(nn.Module):
    """Attention in the first graph, a head in the second."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(VOCABULARY, 16)
        self.head = nn.Linear(16, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)[:, None]
        x = F.scaled_dot_product_attention(x, x, x, is_causal=True)[:, 0]
        torch._dynamo.graph_break()
        return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


def sum_local_gradients(group: ProcessGroup, rank: int, scale: str) -> None:
    (ids,) = make_batches(1)
    (want := TwoGraphs())(ids).backward()
    model = TwoGraphs()
    with without_codegen() as found:
        ring(model, group, {"grads": "local", "local_scale": scale})(ids).backward()
    assert [len(made.attentions) for made in found] == [1, 0]
    for p, q in zip(model.parameters(), want.parameters(), strict=True):
        assert p.grad is not None
        dist.all_reduce(p.grad, group=group)
        p.grad /= 1 if scale == "sum" else dist.get_world_size(group)
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("scale", ["mean", "sum"])
def test_local_gradients_of_a_graph_without_attention(
    ranks: RankPool, scale: str
) -> None:
    ranks.run(sum_local_gradients, scale)


def wrap_in_ddp(
    group: ProcessGroup, rank: int, over: str, grads: str, is_split: bool
) -> list[str]:
    """DDP over ``dp`` or over all ranks of a 2 x 2 mesh."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    rows = slice(2 * mesh["dp"].get_local_rank(), 2 * mesh["dp"].get_local_rank() + 2)
    if is_split:
        dist._DEFAULT_FIRST_BUCKET_BYTES = 1000  # type: ignore[attr-defined]
    model = build_llama()
    wrapped = DistributedDataParallel(
        model,
        process_group=mesh["dp"].get_group() if over == "dp" else None,
        bucket_cap_mb=0.01 if is_split else 25,
    )
    batches = [b[rows] for b in make_batches(batch=4)]
    call = ring(wrapped, mesh["cp"], {"grads": grads})
    with without_codegen(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        losses = train(wrapped, call, batches)
    assert_curves_equal(average(losses, mesh["dp"].get_group()), train_eager(batch=4))
    return [str(w.message) for w in caught]


@pytest.mark.parametrize(("over", "grads"), [("dp", "summed"), ("all", "local")])
def test_ddp_beside_context_parallel(ranks: RankPool, over: str, grads: str) -> None:
    for said in ranks.run(wrap_in_ddp, over, grads, False, world_size=4):
        assert not any("DDP" in text for text in said)


@pytest.mark.slow
def test_pieces_that_ddp_splits_off_are_right_and_told(ranks: RankPool) -> None:
    for said in ranks.run(wrap_in_ddp, "all", "local", True, world_size=4):
        assert any("optimize_ddp = False" in text for text in said)


# ---- checkpoints, breaks, places where models are compiled ---------------------------


class CheckpointedLayers(nn.Module):
    def __init__(self, *, use_reentrant: bool) -> None:
        super().__init__()
        self.llama = build_llama()
        self.use_reentrant = use_reentrant

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        model = self.llama.model
        x = model.embed_tokens(input_ids)
        places = model.rotary_emb(x, torch.arange(x.shape[1])[None])
        for layer in model.layers:

            def body(x: Tensor, layer: Any = layer) -> Any:  # noqa: ANN401
                return layer(x, position_embeddings=places, attention_mask=None)

            x = checkpoint(body, x, use_reentrant=self.use_reentrant)
        logits = self.llama.lm_head(model.norm(x))
        wanted = F.pad(labels[:, 1:], (0, 1), value=-100)
        return F.cross_entropy(logits.flatten(0, 1), wanted.flatten())


def checkpointed() -> nn.Module:
    return CheckpointedLayers(use_reentrant=False)


def checkpointed_reentrant() -> nn.Module:
    return CheckpointedLayers(use_reentrant=True)


def hf_checkpointed() -> nn.Module:
    model = build_llama()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model  # type: ignore[no-any-return]


def hf_checkpointed_reentrant() -> nn.Module:
    model = build_llama()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    return model  # type: ignore[no-any-return]


def broken() -> nn.Module:
    """A graph for each layer."""
    model = build_llama()
    kind: Any = type(model.model.layers[0])

    class Breaking(kind):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            x = super().forward(*args, **kwargs)
            torch._dynamo.graph_break()
            return x

    for layer in model.model.layers:
        layer.__class__ = Breaking
    return model  # type: ignore[no-any-return]


def train_built(
    group: ProcessGroup,
    rank: int,
    build: Callable[[], nn.Module],
    num_rings: int,
    options: Options,
) -> None:
    model = build()
    with without_codegen() as found:
        losses = train(model, ring(model, group, options), make_batches())
    assert count_rings(found) == num_rings
    model = build()
    assert_curves_equal(losses, train(model, model, make_batches()))


@pytest.mark.parametrize(
    ("build", "num_rings", "options"),
    [
        (checkpointed, 2, {}),
        (hf_checkpointed_reentrant, 2, {}),
        (broken, 1, {}),
        pytest.param(checkpointed_reentrant, 2, {}, marks=pytest.mark.slow),
        pytest.param(hf_checkpointed, 2, {}, marks=pytest.mark.slow),
        pytest.param(broken, 1, {"layout": "zigzag"}, marks=pytest.mark.slow),
    ],
)
def test_checkpoints_and_graph_breaks(
    ranks: RankPool, build: Callable[[], nn.Module], num_rings: int, options: Options
) -> None:
    ranks.run(train_built, build, num_rings, options)


def compile_in_place(group: ProcessGroup, rank: int, what: str) -> None:
    model = build_llama()
    parts = model.model.layers if what == "blocks" else [model]
    for part in parts:
        part.compile(backend="ring", options={"mesh": group}, fullgraph=True)
    with without_codegen() as found:
        losses = train(model, model, make_batches())
    assert count_rings(found) == (1 if what == "blocks" else 2)
    assert_curves_equal(losses, train_eager())


@pytest.mark.parametrize("what", ["blocks", "model"])
def test_compiled_in_place(ranks: RankPool, what: str) -> None:
    ranks.run(compile_in_place, what)


# ---- loops ---------------------------------------------------------------------------


def accumulate(model: nn.Module, call: Callable[..., Any]) -> list[float]:
    """Four micro-batches a step, gradients clipped."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    seen = []
    for batches in zip(*[iter(make_batches(8))] * 4, strict=True):
        for ids in batches:
            loss = call(input_ids=ids, labels=ids).loss
            (loss / 4).backward()
            seen.append(loss.item())
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(norm.item())
    return seen


def evaluate_between(model: nn.Module, call: Callable[..., Any]) -> list[float]:
    """Evaluation and inference between steps see the new weights."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    seen = []
    for ids in make_batches(3):
        call(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            seen.append(call(input_ids=ids, labels=ids).loss.item())
        with torch.inference_mode():
            seen.append(call(input_ids=ids).logits.square().mean().item())
        model.train()
    return seen


def scale_losses(model: nn.Module, call: Callable[..., Any]) -> list[float]:
    """A ``GradScaler``; the third step overflows and must be skipped on all ranks."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    seen = []
    for step, ids in enumerate(make_batches(6)):
        loss = call(input_ids=ids, labels=ids).loss
        factor = float("inf") if step == 2 else 1.0
        (scaler.scale(loss) * factor).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        seen += [loss.item(), scaler.get_scale() / 1024]
    return seen


def many_lengths(model: nn.Module, call: Callable[..., Any]) -> list[float]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(2, n) for n in (24, 32, 40, 26, 33, 5)]
    batches = [torch.randint(VOCABULARY, s, generator=generator) for s in shapes]
    return train(model, call, batches)


def run_loop(group: ProcessGroup, rank: int, loop: Step, dynamic: bool | None) -> None:
    model = build_llama()
    with without_codegen() as found:
        seen = loop(model, ring(model, group, dynamic=dynamic))
    assert count_rings(found) >= 2
    assert_curves_equal(seen, loop(model := build_llama(), model))


@pytest.mark.parametrize(
    ("loop", "dynamic"),
    [
        (accumulate, None),
        (evaluate_between, None),
        (scale_losses, None),
        pytest.param(many_lengths, True, marks=pytest.mark.slow),
    ],
)
def test_loops(ranks: RankPool, loop: Step, dynamic: bool | None) -> None:
    ranks.run(run_loop, loop, dynamic)


def train_under_autocast(group: ProcessGroup, rank: int, attention: str) -> None:
    """Forward in bfloat16: no further from float32 than twice what eager is."""

    def run(model: nn.Module, call: Callable[..., Any], enabled: bool) -> list[float]:
        def forward(**inputs: Tensor) -> object:
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                return call(**inputs)

        return train(model, forward, make_batches())

    model = build_llama(attention=attention)
    with without_codegen() as found:
        got = run(model, ring(model, group), enabled=True)
    assert count_rings(found) == 2
    want, low = (
        run(model, model, enabled)
        for enabled in (False, True)
        if (model := build_llama(attention=attention))
    )
    mine, eagers = (
        max(abs(a - b) for a, b in zip(x, want, strict=True)) for x in (got, low)
    )
    assert 0 < mine <= 2 * eagers


@pytest.mark.parametrize(
    "attention", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)]
)
def test_autocast(ranks: RankPool, attention: str) -> None:
    ranks.run(train_under_autocast, attention)


# ---- outputs, copies, several models -------------------------------------------------


def sum_own_losses(group: ProcessGroup, rank: int) -> None:
    """Each rank's loss is over its rows; gradients and the sum are eager's."""

    def run(call: Callable[..., Any], model: nn.Module, cut: bool) -> list[float]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        losses = []
        for ids in make_batches():
            labels = F.pad(ids[:, 1:], (0, 1), value=-100)
            if cut:
                labels = ringcompile.shard(labels, 1, group, layout="zigzag")
            logits = call(input_ids=ids).logits.flatten(0, 1)
            loss = F.cross_entropy(logits, labels.flatten(), reduction="sum")
            loss = loss / (ids.numel() - len(ids))
            loss.backward()
            total = loss.detach()
            if cut:
                dist.all_reduce(total, group=group)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total.item())
        return losses

    model = build_llama()
    options = {"layout": "zigzag", "outputs": "sharded"}
    with without_codegen():
        got = run(ring(model, group, options), model, cut=True)
    assert_curves_equal(got, run(model := build_llama(), model, cut=False))


def test_a_loss_on_sharded_outputs(ranks: RankPool) -> None:
    ranks.run(sum_own_losses)


def copy_and_load(group: ProcessGroup, rank: int) -> None:
    """What is copied or loaded trains on as the original does."""
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("cp",))
    first, rest = make_batches()[:3], make_batches()[3:6]
    model = build_llama()
    want = [train(model, model, batches) for batches in (first, rest)]
    with without_codegen():
        call = ring(model := build_llama(), mesh)
        assert_curves_equal(train(model, call, first), want[0])
        copied = copy.deepcopy(call)
        loaded = ring(build_llama(), mesh)
        loaded.load_state_dict(call.state_dict())
        for module in (copied, loaded, call):
            assert_curves_equal(train(module, module, rest), want[1])


def two_models(group: ProcessGroup, rank: int) -> None:
    def run(*calls: tuple[nn.Module, Callable[..., Any]]) -> list[float]:
        turns = [*calls, calls[0]]
        return [x for model, call in turns for x in train(model, call, make_batches(3))]

    def build() -> tuple[Any, Any]:
        return build_llama(), build_llama(num_layers=1)

    one, two = build()
    with without_codegen():
        other = ring(two, group, {"layout": "zigzag"})
        got = run((one, ring(one, group)), (two, other))
    one, two = build()
    assert_curves_equal(got, run((one, one), (two, two)))


@pytest.mark.parametrize("job", [copy_and_load, two_models])
def test_copies_and_several_models(
    ranks: RankPool, job: Callable[[ProcessGroup, int], None]
) -> None:
    ranks.run(job)


# Torch's own, where Dynamo goes on behind a break.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_explain_prices_graph_breaks() -> None:
    ids = make_batches(1)[0]
    whole = ringcompile.explain(build_llama(), input_ids=ids, world_size=4)
    parts = ringcompile.explain(broken(), input_ids=ids, world_size=4)
    assert len(whole.graphs) == 1
    assert len(parts.graphs) > 1
    activation = ids.numel() * 32 * 4
    assert [g.num_bytes for g in parts.gathers] == [activation] * len(parts.attentions)
    assert "output 0: 6 KiB" in str(parts)


# ---- with generated code -------------------------------------------------------------


def train_with_inductor(group: ProcessGroup, rank: int) -> None:
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("cp",))
    model = build_llama()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    call = ring(model, mesh, {"grads": "local"})
    assert_curves_equal(train(model, call, make_batches()), train_eager())


@pytest.mark.slow
def test_fsdp2_with_generated_code(ranks: RankPool) -> None:
    ranks.run(train_with_inductor, world_size=4, timeout_s=600)
