"""Ranks that differ are told at the first call, before anything is computed."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.compiling import compile_ring
from support.ranks import RankPool
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from ringcompile.errors import RankMismatchError


def attend(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x, is_causal=True) * 2


def attend_and_drop(x: Tensor) -> Tensor:
    return F.dropout(attend(x), 0.5, training=True)


def attend_and_drop_checkpointed(x: Tensor) -> Tensor:
    out: Tensor = checkpoint(attend_and_drop, x, use_reentrant=False)
    return out


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "random states": attend_and_drop,
    "random states, checkpointed": attend_and_drop_checkpointed,
    "random states, unread": attend,
    "nothing random": attend_and_drop,
}


def call_with(group: ProcessGroup, rank: int, what: str) -> str:
    """The text of the error of one call, or nothing."""
    fn = FUNCTIONS.get(what, attend)
    options = {"stages": 1 + rank} if what == "plans" else {}
    # ``inductor`` is the path with the check.
    call, _ = compile_ring(fn, group, options=options)
    x = torch.arange(64.0).reshape(1, 2, 8, 4) + (rank if what == "inputs" else 0)
    torch.manual_seed(rank if "random states" in what else 0)
    try:
        call(x.requires_grad_())
    except RankMismatchError as error:
        return str(error)
    return ""


@pytest.mark.filterwarnings("ignore:gathers")
@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("inputs", "input l_x_ differs between rank"),
        ("plans", "planned other schedules"),
        ("random states", "the random state differs"),
        pytest.param(
            *("random states, checkpointed", "the random state differs"),
            marks=pytest.mark.slow,
        ),
        ("random states, unread", ""),
        ("nothing", ""),
        ("nothing random", ""),
    ],
)
def test_ranks_that_differ_are_told(ranks: RankPool, what: str, text: str) -> None:
    for error in ranks.run(call_with, what):
        assert text in error
        assert bool(error) is bool(text)
