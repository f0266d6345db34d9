"""Every op class behind an attention, on shards: forward, and all gradients, equal eager.

Each row of ``CASES`` says which of its ops gather; an op that no rule knows gathers
exactly, and says so once. P = 2 runs zigzag with pads, P = 3 contiguous without; the
latter by hand:

    pytest -q -m slow tests/zoo/test_rules.py
"""

import warnings

import pytest
import torch
from support.compiling import compile_ring
from support.ranks import RankPool
from support.rule_cases import SEQUENCE_CASES
from support.rule_models import B, E, RuleCase, RuleModel
from support.sampling import one_in
from support.token_cases import TOKEN_CASES
from support.tolerances import assert_gradients_equal, assert_output_equal
from torch import Tensor
from torch.distributed import ProcessGroup

CASES = (*SEQUENCE_CASES, *TOKEN_CASES)
LENGTHS = {2: 13, 3: 12}

Outcome = tuple[Tensor, dict[str, Tensor | None], dict[str, Tensor]]


def find_case(name: str) -> RuleCase:
    return next(case for case in CASES if case.name == name)


def make_inputs(length: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(B, length, E, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, 30, (B, length), generator=generator)
    keep = torch.arange(length) < torch.tensor([[length - 1], [5]])
    return x, ids, keep


def run_step(model: RuleModel, call: RuleModel, length: int) -> Outcome:
    """Output, all gradients, and buffers after one step."""
    x, ids, keep = make_inputs(length)
    x.requires_grad_()
    before = {name: b.clone() for name, b in model.named_buffers()}
    out = call(x, ids, keep)
    weight = torch.linspace(1, 2, out.numel(), dtype=out.dtype).reshape(out.shape)
    (out * weight).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()} | {"x": x.grad}
    after = {name: b.clone() for name, b in model.named_buffers()}
    model.zero_grad(set_to_none=True)
    for name, b in model.named_buffers():
        b.copy_(before[name])
    return out.detach(), grads, after


def run_case(
    group: ProcessGroup, rank: int, name: str
) -> tuple[tuple[str, ...], int, list[str]]:
    """The ops that gathered, how many rings there are, and what was warned of."""
    case, size = find_case(name), group.size()
    torch.manual_seed(0)
    model = RuleModel(case.part, is_causal=size == min(LENGTHS)).double()
    want, want_grads, want_buffers = run_step(model, model, LENGTHS[size])
    call, record = compile_ring(model, group, compiler="eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got, grads, buffers = run_step(model, call, LENGTHS[size])  # type: ignore[arg-type]
    assert_output_equal(got, want)
    assert_gradients_equal(grads, want_grads)
    for buffer, value in want_buffers.items():
        torch.testing.assert_close(buffers[buffer], value)
    gathers = sorted(
        {text.split(":")[0].removeprefix("aten.") for text in record.gathers}
    )
    texts = [str(w.message) for w in caught if "gathers: " in str(w.message)]
    return tuple(gathers), len(record.rings), texts


@pytest.mark.parametrize("cp_size", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", one_in(3, CASES), ids=lambda case: case.name)
def test_an_op_equals_eager(ranks: RankPool, case: RuleCase, cp_size: int) -> None:
    for gathers, rings, warned in ranks.run(run_case, case.name, world_size=cp_size):
        assert gathers == case.gathers
        assert rings == case.rings
        assert bool(warned) == bool(gathers)
        assert len(warned) == len(set(warned))
