"""The zoo: each model, by each implementation, against eager float64.

CI runs four without Inductor. All of them, by hand (see also tests/print_models.py):

    pytest -q -m slow tests/zoo/test_models.py
"""

import re

import pytest
from support.ranks import RankError, RankPool
from support.zoo_models import ZOO
from support.zoo_modules import is_installed
from support.zoo_rows import Attention
from support.zoo_runs import Cell, find_surprises, run_cell

IN_CI: tuple[tuple[str, Attention], ...] = (
    ("gemma3", "sdpa"),
    ("vit", "eager"),
    ("clip", "sdpa"),
    ("nn.TransformerEncoder", "sdpa"),
)
ON_FOUR_RANKS = (
    "llama",
    "mistral",
    "qwen3",
    "gemma3",
    "gpt2",
    "bert",
    "deberta_v2",
    "t5",
    "vit",
    "nn.TransformerEncoder",
)
WITH_INDUCTOR = (
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "gemma3",
    "phi3",
    "gpt_neox",
    "bloom",
    "bert",
    "modernbert",
    "t5",
    "vit",
    "wav2vec2",
    "llava",
    "nn.TransformerDecoder",
)
ALL = [Cell(row.name, attention) for row in ZOO for attention in row.attentions]


def check_cell(ranks: RankPool, cell: Cell) -> None:
    if not is_installed(cell.row.library):
        pytest.skip(f"{cell.row.library} can't be imported")
    if cell.expected.error:
        with pytest.raises(RankError, match=re.escape(cell.expected.error)):
            ranks.run(run_cell, cell, world_size=cell.cp_size)
        return
    results = ranks.run(run_cell, cell, world_size=cell.cp_size)
    for rank, result in enumerate(results):
        assert not result.faults, f"rank {rank}: {result.faults}"
        assert find_surprises(cell, result.record) == []


@pytest.mark.parametrize("cell", [Cell(*chosen) for chosen in IN_CI], ids=str)
def test_a_model_equals_eager(ranks: RankPool, cell: Cell) -> None:
    check_cell(ranks, cell)


@pytest.mark.slow
@pytest.mark.parametrize("cell", ALL, ids=str)
def test_every_model_equals_eager(ranks: RankPool, cell: Cell) -> None:
    check_cell(ranks, cell)


@pytest.mark.slow
@pytest.mark.parametrize(
    "cell",
    [Cell(c.name, c.attention, 4) for c in ALL if c.name in ON_FOUR_RANKS],
    ids=str,
)
def test_on_four_ranks(ranks: RankPool, cell: Cell) -> None:
    check_cell(ranks, cell)


@pytest.mark.slow
@pytest.mark.parametrize(
    "cell",
    [Cell(c.name, c.attention, 2, "inductor") for c in ALL if c.name in WITH_INDUCTOR],
    ids=str,
)
def test_with_inductor(ranks: RankPool, cell: Cell) -> None:
    check_cell(ranks, cell)


def test_the_zoo_is_as_large_as_it_says() -> None:
    names = [row.name for row in ZOO]
    assert len(set(names)) == len(names)
    assert len({name.split()[0] for name in names if "timm" not in name}) >= 64
    assert sum(row.library == "timm" for row in ZOO) >= 6
    assert {*ON_FOUR_RANKS, *WITH_INDUCTOR} <= set(names)
    assert len(ON_FOUR_RANKS) == 10
    assert len(WITH_INDUCTOR) == 15
