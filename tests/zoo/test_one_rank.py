"""One rank: the same bits as Inductor; no attention: exactly Inductor, with a note."""

import logging

import torch
from support.compiling import compile_ring
from support.ranks import RankPool
from support.spine_models import Outcome, build_model, find_model, run_step
from torch import Tensor, nn
from torch.distributed import ProcessGroup


def _step(backend: str) -> Outcome:
    torch._dynamo.reset()
    row = find_model("llama", 1)
    model = build_model(row, "sdpa", torch.float32)
    return run_step(model, torch.compile(model, backend=backend), row.make_inputs(32))


def test_one_rank_gives_the_bits_of_inductor() -> None:
    ours, theirs = _step("ring"), _step("inductor")
    assert torch.equal(ours.loss, theirs.loss)
    assert torch.equal(ours.logits, theirs.logits)
    for name, grad in theirs.grads.items():
        assert grad is not None
        got = ours.grads[name]
        assert got is not None
        assert torch.equal(got, grad), name


def run_without_attention(
    group: ProcessGroup, rank: int
) -> tuple[bool, int, list[str]]:
    notes: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            notes.append(record.getMessage())

    logger = logging.getLogger("ringcompile")
    logger.addHandler(Keep())
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.ones(3, 4)
    call, record = compile_ring(model, group)
    ours: Tensor = call(x)
    theirs: Tensor = torch.compile(model, backend="inductor")(x)
    return torch.equal(ours, theirs), len(record.rings), notes


def test_a_model_without_attention_is_inductors_with_one_note(ranks: RankPool) -> None:
    for same, num_rings, notes in ranks.run(run_without_attention):
        assert same
        assert num_rings == 0
        assert len([n for n in notes if "no attention" in n]) == 1
