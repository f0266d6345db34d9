"""The LongNet example in small: each attention learns, on any number of ranks."""

import math
import re
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest
import torch
from support.compiling import compile_ring
from support.ranks import RankPool
from support.tolerances import assert_output_equal
from torch import Generator
from torch.distributed import ProcessGroup

ROOT = Path(__file__).resolve().parents[2]
NUM_VALUES = 4
CHANCE = math.log(NUM_VALUES)
NUM_COMPARED = 6


def train_small(
    group: ProcessGroup, rank: int, attention: str, num_steps: int
) -> tuple[list[float], int]:
    """The losses, and the number of rings; without Inductor, which compiles longer."""
    import longnet  # noqa: PLC0415 - transformers takes seconds to import

    task = longnet.Task(32, batch=32, num_keys=2, num_values=NUM_VALUES)
    model = longnet.build_model(task, num_layers=1)
    options = longnet.build_options(attention, task.length)
    call, record = compile_ring(model, group, compiler="eager", options=options)
    steps = longnet.train(model, call, task, num_steps, learning_rate=1e-2)
    return [s.loss for s in steps], len(record.rings)


@pytest.mark.parametrize(
    ("attention", "num_steps"),
    [pytest.param("exact", 20, marks=pytest.mark.slow), ("longnet", 45)],
)
def test_it_learns_and_ranks_agree(
    ranks: RankPool, attention: str, num_steps: int
) -> None:
    pytest.importorskip("transformers")
    results = ranks.run(train_small, attention, num_steps, world_size=2)
    (losses, num_rings), _ = results
    assert results == [(losses, 1)] * 2
    assert num_rings == 1
    assert mean(losses[-3:]) < CHANCE / 2

    ((alone, _),) = ranks.run(train_small, attention, NUM_COMPARED, world_size=1)
    want = torch.tensor(alone, dtype=torch.float64)
    assert_output_equal(torch.tensor(losses[:NUM_COMPARED]), want, "losses")


def check_labels(_group: ProcessGroup, _rank: int) -> None:
    import longnet  # noqa: PLC0415

    task = longnet.Task(32, batch=64, num_keys=2, num_values=NUM_VALUES)
    ids, labels = task.draw(Generator().manual_seed(0))
    half, first_question = task.length // 2, 1 + 2 * NUM_VALUES
    assert labels[:, : half + 1].unique().tolist() == [longnet.IGNORED]
    assert 0 <= int(ids.min()) <= int(labels.max()) < task.vocabulary
    for row, label in zip(ids.tolist(), labels.tolist(), strict=True):
        facts = [divmod(x - 1, NUM_VALUES) for x in row[:half] if x]
        assert len(facts) == 2 * task.fact_length  # none lies on another
        values = dict(facts)
        for at in range(half, task.length - 1):
            key = row[at] - first_question
            assert label[at + 1] == first_question + 2 + values[key]


def test_a_question_is_labelled_with_its_value(ranks: RankPool) -> None:
    pytest.importorskip("transformers")
    ranks.run(check_labels, world_size=1)  # where transformers is imported already


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("num_ranks", [1, 4])
def test_the_whole_run(num_ranks: int) -> None:
    pytest.importorskip("transformers")
    torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={num_ranks}"]
    done = subprocess.run(
        [sys.executable, *(torchrun if num_ranks > 1 else []), "examples/longnet.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=3600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = re.findall(
        r"^\| `(\w+)` \| ([\d.]+) \| [\d.]+ \| \d+ \| (\d+) ", done.stdout, re.MULTILINE
    )
    accuracy = {name: float(share) for name, share, _ in rows}
    sent = {name: int(kib) for name, _, kib in rows}
    assert min(accuracy["exact"], accuracy["longnet"]) > 0.98
    assert accuracy["short"] < 0.2
    assert 0 == sent["short"] < sent["longnet"] < sent["exact"] / 2
