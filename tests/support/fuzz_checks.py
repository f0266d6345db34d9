"""Check a program: all ranks of its rewritten graph against float64 eager; shrink it."""

import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.nn.attention import SDPBackend, sdpa_kernel

from ringcompile.backend import _rewrite
from ringcompile.config import RingOptions
from ringcompile.errors import RingCompileError
from ringcompile.ir.mask import EmptyRow
from ringcompile.ir.reshard import format_spec, parse_spec
from ringcompile.ir.text import format_plan, parse_plan
from ringcompile.mesh import Ranks
from ringcompile.passes.pipeline import Rewritten
from ringcompile.passes.plan_attentions import PlannedAttention
from support.fuzz_program import Input, Outcome, Program, run_program
from support.simulate_ranks import GROUP_NAME, SimulationError, simulate
from support.tolerances import (
    OUTPUT_RTOL,
    assert_gradients_equal,
    assert_output_equal,
    largest,
    max_error,
)


class Verdict(Enum):
    """What became of a program."""

    RING = "right, every attention a ring"
    GATHERED = "right, some attention gathered"
    WHOLE = "right, nothing to cut"
    REFUSED = "refused with a reason"
    ROUNDING = "off by rounding alone: eager is as far off, or float64 is right"
    UNKNOWN = "NaN gradients, told in the README: a bias, and a row without keys"
    WRONG = "wrong numbers"
    MISMATCH = "ranks that do not fit together"
    CRASH = "crashed"

    @property
    def is_find(self) -> bool:
        return self in {Verdict.WRONG, Verdict.MISMATCH, Verdict.CRASH}


@dataclass(frozen=True, slots=True)
class Finding:
    """A verdict, and what there is to say of it."""

    verdict: Verdict
    text: str = ""


def check_program(program: Program) -> Finding:
    """Simulate all ranks and compare with float64 eager."""
    reference = run_program(program, program.run, torch.float64)
    try:
        made, outcomes = _simulate(program)
    except RingCompileError as error:
        return Finding(Verdict.REFUSED, f"{error}")
    except SimulationError as error:
        return Finding(Verdict.MISMATCH, f"{error}")
    except Exception:
        return Finding(Verdict.CRASH, traceback.format_exc())
    return _judge(program, made, outcomes, reference)


def _judge(
    program: Program, made: Rewritten, outcomes: Sequence[Outcome], reference: Outcome
) -> Finding:
    try:
        _check_alike(outcomes)
    except AssertionError as error:
        return Finding(Verdict.WRONG, f"{error}")
    text = _find_difference(outcomes, reference)
    plain = _run_plainly(program)
    if not text or not _find_difference(outcomes, plain):
        return Finding(_read_verdict(made))
    is_known = any(map(_has_unknown_rows, made.attentions))
    if is_known and _is_nan_or_right(outcomes, reference):
        return Finding(Verdict.UNKNOWN)
    if _is_off_by_rounding(program, outcomes, reference):
        return Finding(Verdict.ROUNDING)
    with sdpa_kernel(SDPBackend.MATH):
        if _is_off_by_rounding(program, outcomes, plain):
            return Finding(Verdict.ROUNDING)
    return Finding(Verdict.WRONG, text)


def _is_off_by_rounding(
    program: Program, outcomes: Sequence[Outcome], reference: Outcome
) -> bool:
    return any(
        explains(program, outcomes, reference)
        for explains in (_is_rounding, _shrinks_with_precision, _hangs_on_last_bits)
    )


def _has_unknown_rows(attention: PlannedAttention) -> bool:
    """Whether ``lowering.empty_rows`` gives NaN for gradients that it can't know."""
    plan = attention.plan
    is_mean = plan.schedule.parts[0].mask.empty_row is EmptyRow.MEAN_ALL
    return is_mean and plan.changes_scores


def _is_nan_or_right(outcomes: Sequence[Outcome], reference: Outcome) -> bool:
    """Whether outputs are right, and gradients too where they aren't NaN."""

    def known(outcome: Outcome) -> Outcome:
        grads = {
            name: g if g is None or want is None else torch.where(g.isnan(), want, g)
            for (name, g), want in zip(
                outcome.grads.items(), reference.grads.values(), strict=True
            )
        }
        return replace(outcome, grads=grads)

    return not _find_difference([known(x) for x in outcomes], reference)


def _run_plainly(program: Program) -> Outcome:
    """Eager with attention by plain operators.

    torch's CPU kernel gives rows whose mask is ``finfo.min`` throughout S times their
    gradient: the log of their sum is lost beside ``finfo.min``.
    """
    with sdpa_kernel(SDPBackend.MATH):
        return run_program(program, program.run, torch.float64)


def _find_difference(outcomes: Sequence[Outcome], reference: Outcome) -> str:
    """How ranks differ from the reference; else empty."""
    try:
        for outcome in outcomes:
            compare(outcome, reference)
    except AssertionError as error:
        return f"{error}"
    return ""


def _read_verdict(made: Rewritten) -> Verdict:
    if made.refusals:
        return Verdict.GATHERED
    return Verdict.RING if made.attentions else Verdict.WHOLE


def _simulate(program: Program) -> tuple[Rewritten, list[Outcome]]:
    gm = program.build(program.dtype)
    inputs = program.make_inputs(program.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is gathered
        made = rewrite_for(gm, inputs, program.options, program.size)

    def work(rank: int) -> Outcome:
        return run_program(program, RankRun(made.gm, rank).run, program.dtype)

    return made, simulate(program.size, work)


def rewrite_for(
    gm: GraphModule, inputs: Sequence[object], options: RingOptions, size: int
) -> Rewritten:
    """Rank 0's graph, for ranks that are simulated."""
    return _rewrite(gm, inputs, options, Ranks(0, size, GROUP_NAME))


class RankRun(Interpreter):
    """A rank's graph from that of rank 0: they differ in the texts of plans alone."""

    def __init__(self, gm: GraphModule, rank: int) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self._texts: dict[Node, dict[str, str]] = {}
        for node in gm.graph.nodes:
            for name, (parse, write) in _TEXTS.items():
                if name in node.kwargs:
                    text = write(replace(parse(node.kwargs[name]), rank=rank))
                    self._texts[node] = {name: text}

    def fetch_args_kwargs_from_env(self, n: Node) -> tuple[Any, Any]:
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return args, kwargs | self._texts.get(n, {})


_TEXTS: dict[str, tuple[Callable[[str], Any], Callable[[Any], str]]] = {
    "spec": (parse_spec, format_spec),
    "plan": (parse_plan, format_plan),
}


def compare(got: Outcome, want64: Outcome) -> None:
    """Outputs and gradients of one rank against the reference.

    Where eager overflows (exps of sums, and what is computed from them), so must it.
    """
    for name, want in want64.outputs.items():
        if want.is_floating_point():
            assert_output_equal(*_finite(got.outputs[name], want, name), name)
        else:
            assert torch.equal(got.outputs[name], want), f"{name} differs"
    grads, wanted = dict(got.grads), dict(want64.grads)
    for name, true in want64.grads.items():
        g = got.grads[name]
        if g is not None and true is not None:
            grads[name], wanted[name] = _finite(g, true, name)
    assert_gradients_equal(grads, wanted)


def _finite(got: Tensor, want: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Both with 0 where the reference is not finite; there, both must be the same."""
    odd = ~want.isfinite()
    if not odd.any():
        return got, want
    same = torch.equal(got[odd].double().nan_to_num(), want[odd].nan_to_num())
    assert same, f"{name}: eager overflows, and this does not as it does"
    return got.masked_fill(odd, 0), want.masked_fill(odd, 0)


def _check_alike(outcomes: Sequence[Outcome]) -> None:
    first = outcomes[0]
    for rank, other in enumerate(outcomes):
        for kind in ("outputs", "grads"):
            here, there = getattr(first, kind), getattr(other, kind)
            for name, x in here.items():
                y = there[name]
                same = x is y or torch.equal(x.nan_to_num(), y.nan_to_num())
                assert same, f"{kind} {name} of rank {rank} differ from rank 0's"


def _is_rounding(
    program: Program, outcomes: Sequence[Outcome], reference: Outcome
) -> bool:
    """Whether errors are no more than a few times those of eager in the same dtype.

    A sum that is 0 in exact arithmetic has no relative error. What eager's rounding
    does in float64 is read from float32 too, 2^29 times coarser: in either it may be 0
    by luck. A program of float32 must be right in float64 then.
    """
    if not _has_right_integers(outcomes, reference):
        return False
    is_wide = program.dtype == torch.float64
    steps = {torch.float32: 2.0**-29, torch.float64: 1.0}
    draws = [
        (steps[dtype] if is_wide else 1.0, _run_jittered(program, i, dtype))
        for dtype in {torch.float32, program.dtype}
        for i in range(_DRAWS)
    ]
    for kind in ("outputs", "grads"):
        for name, want in getattr(reference, kind).items():
            if want is None or not want.is_floating_point():
                continue
            noise = max(
                step * max_error(getattr(x, kind)[name], want) for step, x in draws
            )
            allowed = max(_FEW_TIMES * noise, OUTPUT_RTOL * largest(want))
            got = [getattr(x, kind)[name] for x in outcomes]
            if not all(x is not None and max_error(x, want) <= allowed for x in got):
                return False
    return _is_right_in_float64(program)


def _has_right_integers(outcomes: Sequence[Outcome], reference: Outcome) -> bool:
    return all(
        want.is_floating_point() or torch.equal(x.outputs[name], want)
        for x in outcomes
        for name, want in reference.outputs.items()
    )


def _is_right_in_float64(program: Program) -> bool:
    """Whether it is one of float64, or right as such."""
    wide = replace(program, dtype=torch.float64)
    return program.dtype == torch.float64 or not check_program(wide).verdict.is_find


def _shrinks_with_precision(
    program: Program, outcomes: Sequence[Outcome], reference: Outcome
) -> bool:
    """Whether a float32 program's errors are those of rounding: float64 has none.

    Softmax's gradient is the difference of two numbers that each is a sum, in one
    kernel of the same products and in another not; where weights are 0 and 1, eager's
    is 0 by chance. An error beyond a few roundings of the model's largest number is
    none, though: float32 may have a fault of its own.
    """
    if program.dtype == torch.float64 or not _has_right_integers(outcomes, reference):
        return False
    _, wide = _simulate(replace(program, dtype=torch.float64))
    for kind in ("outputs", "grads"):
        floats = {
            name: want
            for name, want in getattr(reference, kind).items()
            if want is not None and want.is_floating_point()
        }
        top = max(map(largest, floats.values()), default=0.0)
        for name, want in floats.items():
            coarse, fine = (
                max(max_error(getattr(x, kind)[name], want) for x in runs)
                for runs in (outcomes, wide)
            )
            if not coarse <= _FEW_TIMES * 2.0**-23 * top:
                return False
            if not fine <= max(_FEW_TIMES * 2.0**-29 * coarse, 1e-12 * largest(want)):
                return False
    return True


def _hangs_on_last_bits(
    program: Program, outcomes: Sequence[Outcome], reference: Outcome
) -> bool:
    """Whether eager gives just this for inputs whose last bits are other ones.

    An argmax over numbers that are all 0 but for rounding is anyone's. A program of
    float32 must be right in float64.
    """
    draws = (_run_jittered(program, i, program.dtype) for i in range(_TIES))
    is_drawn = any(not _find_difference(outcomes, _widen(draw)) for draw in draws)
    return is_drawn and _is_right_in_float64(program)


def _widen(outcome: Outcome) -> Outcome:
    """The same numbers in float64."""

    def widen(x: Tensor) -> Tensor:
        return x.double() if x.is_floating_point() else x

    outputs = {name: widen(x) for name, x in outcome.outputs.items()}
    grads = {n: None if x is None else widen(x) for n, x in outcome.grads.items()}
    return Outcome(outputs, grads)


def _run_jittered(program: Program, seed: int, dtype: torch.dtype) -> Outcome:
    """Eager with the last bit of its inputs at random: one draw of rounding.

    A single draw may be small by luck.
    """
    generator = torch.Generator().manual_seed(seed)
    bit = torch.finfo(dtype).eps / 2

    def jitter(x: Input) -> Input:
        if not x.value.is_floating_point():
            return x
        signs = torch.randint(-1, 2, x.value.shape, generator=generator).double()
        return replace(x, value=x.value * (1 + signs * bit))

    moved = replace(program, inputs=tuple(map(jitter, program.inputs)))
    return run_program(moved, moved.run, dtype)


_DRAWS = 4
_TIES = 100
_FEW_TIMES = 32
