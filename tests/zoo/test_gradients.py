"""Gradients are eager's wherever the loss is: in the graph, or outside on outputs."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.compiling import Record, compile_ring
from support.ranks import RankPool
from support.sampling import slow
from support.tolerances import assert_gradients_equal, assert_output_equal
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

WIDTH, HEADS, VOCABULARY = 16, 2, 19


class Tangled(nn.Module):
    """A tied head, a gate from a mean pool, and a region that must be gathered."""

    def __init__(self, *, frozen: bool = False, checkpointed: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.gate = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.place = nn.Parameter(torch.randn(1, 64, WIDTH))
        self.checkpointed = checkpointed
        if frozen:
            self.table.weight.requires_grad_(False)
            self.norm.weight.requires_grad_(False)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (
            y.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for y in self.qkv(self.norm(x)).chunk(3, -1)
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.transpose(1, 2).flatten(2)

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.table(ids) + self.place[:, : ids.shape[1]]
        attended = (
            checkpoint(self.attend, x, use_reentrant=False)
            if self.checkpointed
            else self.attend(x)
        )
        assert isinstance(attended, Tensor)
        x = x + attended
        x = x + self.mix(x.cumsum(1) / ids.shape[1])  # needs the whole sequence
        x = x * torch.sigmoid(self.gate(x.mean(1)))[:, None]
        x = x + self.mix(x[:, -1])[:, None]
        logits = F.linear(x, self.table.weight)
        return logits if labels is None else find_loss(logits, labels)


def find_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


def make_batch(length: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (2, length), generator=generator)
    labels = ids.roll(-1, 1)
    labels[0, :3] = -100
    return ids, labels


def run_tangled(
    group: ProcessGroup,
    rank: int,
    length: int,
    inside: bool,
    model_options: Mapping[str, bool],
    options: Mapping[str, Any],
) -> Record:
    """Compare one step with float64 eager; raises where they differ."""
    ids, labels = make_batch(length)

    def step(model: nn.Module, call: Callable[..., Tensor]) -> Tensor:
        loss = call(ids, labels) if inside else find_loss(call(ids), labels)
        loss.backward()
        return loss.detach()

    torch.manual_seed(0)
    reference = Tangled(**model_options).double()
    want = step(reference, reference)
    torch.manual_seed(0)
    model = Tangled(**model_options)
    call, record = compile_ring(model, group, compiler="aot_eager", options=options)
    assert_output_equal(step(model, call), want, "loss")
    grads = {n: _whole_gradient(p, group, options) for n, p in model.named_parameters()}
    assert_gradients_equal(grads, {n: p.grad for n, p in reference.named_parameters()})
    return record


def _whole_gradient(
    p: Tensor, group: ProcessGroup, options: Mapping[str, Any]
) -> Tensor | None:
    """What a data-parallel wrapper would make of local gradients."""
    if p.grad is None or options.get("grads") != "local":
        return p.grad
    grad = p.grad.clone()
    dist.all_reduce(grad, group=group)
    is_mean = options.get("local_scale", "mean") == "mean"
    return grad / dist.get_world_size(group) if is_mean else grad


GRADS = [
    {"grads": "summed"},
    {"grads": "local", "local_scale": "mean"},
    {"grads": "local", "local_scale": "sum"},
]


@pytest.mark.parametrize("options", GRADS, ids=lambda o: "-".join(o.values()))
@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
def test_gradients_are_eagers_wherever_the_loss_is(
    ranks: RankPool, inside: bool, options: Mapping[str, Any]
) -> None:
    records = ranks.run(run_tangled, 16, inside, {}, options)
    for record in records:
        assert len(record.rings) == 1
        assert any("cumsum" in g for g in record.gathers)


@pytest.mark.parametrize("layout", [slow("contiguous"), "zigzag", slow("striped")])
@pytest.mark.parametrize("length", [13, slow(2)])
def test_gradients_with_pads_on_three_ranks(
    ranks: RankPool, length: int, layout: str
) -> None:
    ranks.run(run_tangled, length, True, {}, {"layout": layout}, world_size=3)


def test_frozen_parameters_get_no_gradient(ranks: RankPool) -> None:
    ranks.run(run_tangled, 16, True, {"frozen": True}, {})


def test_checkpointed_attention_gives_the_same_gradients(ranks: RankPool) -> None:
    ranks.run(run_tangled, 16, True, {"checkpointed": True}, {}, world_size=4)
