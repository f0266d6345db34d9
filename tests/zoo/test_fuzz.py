"""Random small models: each is right on all ranks, or refused with a reason.

``python tests/print_fuzz.py --count 20000`` runs larger ones by hand.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import fuzz_checks
from support.compiling import compile_ring
from support.fuzz_checks import (
    Verdict,
    _judge,
    _simulate,
    check_program,
    compare,
)
from support.fuzz_models import write_program
from support.fuzz_program import Input, Line, Outcome, Program, Ref, run_program
from support.fuzz_shrink import shrink
from support.ranks import RankPool
from support.sampling import one_in
from torch._dynamo.exc import BackendCompilerFailed
from torch.distributed import ProcessGroup
from torch.fx import Node

from ringcompile.config import RingOptions
from ringcompile.errors import RingCompileError
from ringcompile.passes.collectors import _COLLECTORS
from ringcompile.passes.collectors.sums import _Sum
from ringcompile.passes.emitter import Emitter
from ringcompile.passes.op import Op

CHUNK, SHARES = 50, 2
NUM_SIMULATED = 1000
GLOO_SEEDS = {2: range(12), 3: range(12, 18), 4: range(18, 24)}


def simulate_some(_group: ProcessGroup, rank: int, seeds: range) -> int:
    """How many programs became rings, of this rank's share: each simulates its own."""
    num_rings = 0
    for seed in seeds[rank::SHARES]:
        program = write_program(seed, is_small=True)
        found = check_program(program)
        num_rings += found.verdict is Verdict.RING
        if found.verdict.is_find:
            small = shrink(program, found.verdict)
            text = check_program(small).text
            pytest.fail(f"seed {seed}: {found.verdict.value}\n{small}\n{text}")
    return num_rings


@pytest.mark.parametrize("first", one_in(24, range(0, NUM_SIMULATED, CHUNK)))
def test_random_models_are_right_or_refused(ranks: RankPool, first: int) -> None:
    seeds = range(first, first + CHUNK)
    num_rings = ranks.run(simulate_some, seeds, world_size=SHARES)
    assert sum(num_rings) > CHUNK // 2


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 20000, 500))
def test_larger_random_models_are_right_or_refused(first: int) -> None:
    for seed in range(first, first + 500):
        found = check_program(write_program(seed))
        assert not found.verdict.is_find, f"seed {seed}: {found}"


def run_on_ranks(group: ProcessGroup, _rank: int, seeds: range) -> list[str]:
    """What became of each program, as Dynamo hands it over; all ranks agree."""
    torch.set_num_threads(1)
    verdicts = []
    for seed in seeds:
        program = write_program(seed, is_small=True)
        options = {"layout": program.options.layout, "stages": program.options.stages}
        gm = program.build(torch.float64)
        call, record = compile_ring(gm, group, compiler="eager", options=options)
        reference = run_program(program, program.run, torch.float64)
        torch._dynamo.reset()
        try:
            got = run_program(program, call, torch.float64)
            compare(got, reference)
        except BackendCompilerFailed as error:
            if not isinstance(error.inner_exception, RingCompileError):
                raise
            verdicts.append("refused")
            continue
        except AssertionError as error:
            error.add_note(f"seed {seed}\n{program}")
            raise
        verdicts.append("ring" if record.rings else "whole")
    return verdicts


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("size", GLOO_SEEDS)
def test_random_models_on_gloo(ranks: RankPool, size: int) -> None:
    seeds = GLOO_SEEDS[size]
    verdicts = ranks.run(run_on_ranks, seeds, world_size=size)
    assert all(v == verdicts[0] for v in verdicts)
    assert verdicts[0].count("ring") > len(seeds) // 2


class _Twice(_Sum):
    """A fault: means over the sequence are twice too large."""

    def emit(self, emitter: Emitter, op: Op, operands: list[Node]) -> Node:
        total = super().emit(emitter, op, operands)
        return emitter.call(torch.ops.aten.mul.Scalar, total, 2)


def test_the_fuzzer_finds_a_planted_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_COLLECTORS, torch.ops.aten.mean, (_Twice(),))
    programs = (write_program(seed, is_small=True) for seed in range(100))
    assert any(check_program(p).verdict is Verdict.WRONG for p in programs)


def _write_tie(dtype: torch.dtype) -> Program:
    """An argmax, whose last row is over numbers that are 0 but for rounding."""
    random = torch.Generator().manual_seed(0)
    x, table = (torch.randn(n, 8, 4, generator=random).double() for n in (2, 1))
    x0 = Ref("x0")
    calls: list[tuple[Callable[..., Any] | str, tuple[Any, ...]]] = [
        (F.scaled_dot_product_attention, (x0, x0, x0)),
        (torch.mean, (Ref("v0"), 1, True)),
        (torch.sub, (Ref("v0"), Ref("v1"))),
        (torch.cumsum, (Ref("v2"), 1)),
        (torch.argmax, (Ref("v3"), -1)),
        (F.embedding, (Ref("v4"), Ref("x1"))),
        (torch.cumsum, (Ref("v5"), 1)),
    ]
    lines = tuple(Line(f"v{i}", f, args, {}) for i, (f, args) in enumerate(calls))
    inputs = (Input("x0", x), Input("x1", table[0]))
    return Program(inputs, lines, ("v4", "v6"), 2, RingOptions(), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_tie_is_rounding_and_a_fault_beside_it_is_not(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    program = _write_tie(dtype)
    assert check_program(program).verdict is Verdict.ROUNDING
    monkeypatch.setitem(_COLLECTORS, torch.ops.aten.mean, (_Twice(),))
    assert check_program(program).verdict is Verdict.WRONG


def test_behind_a_tie_faults_are_found_and_ranks_agree() -> None:
    program = _write_tie(torch.float64)
    reference = run_program(program, program.run, torch.float64)
    made, (first, second) = _simulate(program)

    def scale(outcome: Outcome, factor: float) -> Outcome:
        outputs = outcome.outputs | {"v6": factor * outcome.outputs["v6"]}
        return replace(outcome, outputs=outputs)

    for found, verdict in (
        ([first, second], Verdict.ROUNDING),
        ([scale(x, 1.01) for x in (first, second)], Verdict.WRONG),
        ([first, scale(second, 1 + 1e-7)], Verdict.WRONG),
    ):
        assert _judge(program, made, found, reference).verdict is verdict


def test_rounding_beside_a_row_without_keys_is_told_from_a_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fuzz_checks, "_TIES", 4)
    # torch's CPU kernel is wrong in that row, so plain operators are the reference.
    program = write_program(605736)
    reference = run_program(program, program.run, torch.float64)
    made, outcomes = _simulate(program)
    assert _judge(program, made, outcomes, reference).verdict is Verdict.ROUNDING
    grad = outcomes[0].grads["p3"]
    assert grad is not None
    grads = outcomes[0].grads | {"p3": grad * (1 + 1e-4)}
    wrong = [replace(x, grads=grads) for x in outcomes]
    assert _judge(program, made, wrong, reference).verdict is Verdict.WRONG
