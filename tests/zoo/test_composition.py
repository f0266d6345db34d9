"""The backend beside what else trains models: curves are those of one eager rank."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.ranks import RankPool
from support.training import (
    VOCABULARY,
    assert_curves_equal,
    build_llama,
    count_rings,
    make_batches,
    ring,
    train,
    train_eager,
    without_codegen,
)
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import checkpoint

import ringcompile

Options = Mapping[str, Any]
Step = Callable[[nn.Module, Callable[..., Any]], list[float]]


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
        pytest.param(broken, 1, {}, marks=pytest.mark.slow),
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
        pytest.param(evaluate_between, None, marks=pytest.mark.slow),
        pytest.param(scale_losses, None, marks=pytest.mark.slow),
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


@pytest.mark.parametrize(
    "job", [copy_and_load, pytest.param(two_models, marks=pytest.mark.slow)]
)
def test_copies_and_several_models(
    ranks: RankPool, job: Callable[[ProcessGroup, int], None]
) -> None:
    ranks.run(job)


# Torch's own, where Dynamo goes on behind a break.
@pytest.mark.slow
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
