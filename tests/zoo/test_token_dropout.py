"""Dropout of sharded activations: its law, and that ranks and layouts don't change it."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.compiling import compile_ring
from support.ranks import RankPool
from support.rule_models import B, E, RuleModel
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

RATE = 0.3
LENGTH = 48

Run = tuple[Tensor, Tensor]


def tokens(m: RuleModel, h: Tensor, ids: Tensor, keep: Tensor) -> Tensor:
    return F.dropout(torch.ones_like(h) + 0 * h, RATE).sin()


def flat(m: RuleModel, h: Tensor, ids: Tensor, keep: Tensor) -> Tensor:
    return F.dropout((torch.ones_like(h) + 0 * h).flatten(0, 1), RATE)


def part_of_sequence(m: RuleModel, h: Tensor, ids: Tensor, keep: Tensor) -> Tensor:
    return F.dropout((torch.ones_like(h) + 0 * h)[:, 1:], RATE)


def channels(m: RuleModel, h: Tensor, ids: Tensor, keep: Tensor) -> Tensor:
    return F.dropout1d((torch.ones_like(h) + 0 * h).transpose(1, 2), RATE)


def replayed(m: RuleModel, h: Tensor, ids: Tensor, keep: Tensor) -> Tensor:
    def body(x: Tensor) -> Tensor:
        return F.dropout(torch.ones_like(x) + x * 0, RATE).exp() - 1

    out = checkpoint(body, h, use_reentrant=False)
    assert isinstance(out, Tensor)
    return out


PARTS = [tokens, flat, part_of_sequence, channels, replayed]


def alpha(m: RuleModel, h: Tensor, ids: Tensor, keep: Tensor) -> Tensor:
    return F.alpha_dropout(h * 0 + m.query[0], RATE, training=True)


def noise(m: RuleModel, h: Tensor, ids: Tensor, keep: Tensor) -> Tensor:
    return h * torch.rand_like(h)


def run_seeds(
    group: ProcessGroup, rank: int, name: str, compiler: str, layout: str
) -> list[Run]:
    """Output and gradient of the input for seeds 5, 5 and 6."""
    part: Callable[..., Tensor] = globals()[name]
    torch.manual_seed(0)
    model = RuleModel(part, is_causal=True)
    options = {"layout": layout}
    call, record = compile_ring(model, group, compiler=compiler, options=options)
    x = torch.randn(B, LENGTH, E).requires_grad_()
    ids = torch.zeros(B, LENGTH, dtype=torch.int64)
    runs = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        out = call(x, ids, ids == 0)
        weight = torch.linspace(1, 2, out.numel()).reshape(out.shape)
        (grad,) = torch.autograd.grad((out * weight).sum(), x)
        runs.append((out.detach(), grad))
    assert record.gathers == []
    return runs


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_what_is_dropped_hangs_on_seed_and_place(
    ranks: RankPool, part: Callable[..., Tensor]
) -> None:
    two = ranks.run(run_seeds, part.__name__, "aot_eager", "auto")
    four = ranks.run(run_seeds, part.__name__, "eager", "striped", world_size=4)
    first, again, other = two[0]
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    for runs in (*two, *four):
        for mine, reference in zip(runs, two[0], strict=True):
            torch.testing.assert_close(mine[0], reference[0])


def test_the_share_that_is_dropped_is_that_asked_for(ranks: RankPool) -> None:
    (out, _), *_ = ranks.run(run_seeds, "flat", "eager", "auto")[0]
    kept = out != 0
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / (1 - RATE)))
    error = 4 * (RATE * (1 - RATE) / out.numel()) ** 0.5
    assert abs(kept.double().mean().item() - (1 - RATE)) < error


def weighted(m: RuleModel, h: Tensor, ids: Tensor, keep: Tensor) -> Tensor:
    return F.dropout(h, RATE)


def run_weighted(group: ProcessGroup, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """A dropped output, the undropped one, and the gradient of ``first.bias``."""
    torch.manual_seed(0)
    model = RuleModel(weighted, is_causal=True)
    x = torch.randn(B, LENGTH, E)
    ids = torch.zeros(B, LENGTH, dtype=torch.int64)
    call, _ = compile_ring(model, group, compiler="aot_eager")
    out = call(x, ids, ids == 0)
    (grad,) = torch.autograd.grad(out.sum(), model.first.bias)
    mask = (out != 0).detach() / (1 - RATE)
    model.part = lambda m, h, ids, keep: h * mask
    plain = model(x, ids, ids == 0)
    (want,) = torch.autograd.grad(plain.sum(), model.first.bias)
    torch.testing.assert_close(out, plain)
    return out.detach(), grad, want


def test_backward_drops_what_forward_dropped(ranks: RankPool) -> None:
    for _, grad, want in ranks.run(run_weighted):
        torch.testing.assert_close(grad, want)


def test_alpha_dropout_takes_eagers_two_values(ranks: RankPool) -> None:
    torch.manual_seed(0)
    value = RuleModel(alpha, is_causal=True).query[0].detach()
    eager = F.alpha_dropout(value.expand(4096), RATE, training=True).unique()
    for runs in ranks.run(run_seeds, "alpha", "eager", "auto"):
        torch.testing.assert_close(runs[0][0].unique(), eager)


def test_noise_is_eagers_own(ranks: RankPool) -> None:
    torch.manual_seed(0)
    model = RuleModel(noise, is_causal=True)
    x = torch.randn(B, LENGTH, E)
    ids = torch.zeros(B, LENGTH, dtype=torch.int64)
    torch.manual_seed(5)
    want = model(x, ids, ids == 0)
    for runs in ranks.run(run_seeds, "noise", "eager", "auto"):
        torch.testing.assert_close(runs[0][0], want)
