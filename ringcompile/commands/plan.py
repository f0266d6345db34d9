"""``plan`` and ``simulate``: one attention's schedule, drawn, weighed and tried out."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import sympy
import torch
from torch import Tensor

from ringcompile.errors import OptionError
from ringcompile.ir.layout import Layout
from ringcompile.ir.mask import Mask
from ringcompile.ir.schedule import Schedule, Ulysses
from ringcompile.patterns import AttentionSpec
from ringcompile.patterns.picture import draw_parts
from ringcompile.plan.check import check_schedule
from ringcompile.plan.choose import choose_layout
from ringcompile.plan.cost import CPU, H200, Machine, Sizes, estimate_seconds
from ringcompile.plan.coverage import DependsOnLength
from ringcompile.plan.simulate import simulate
from ringcompile.plan.stages import build_schedule
from ringcompile.plan.traffic import GRAD_BYTES, bytes_per_rank
from ringcompile.reference import attention
from ringcompile.report.schedules import read_steps
from ringcompile.report.text import format_steps

MACHINES: dict[str, Machine] = {"cpu": CPU, "h200": H200}
TOLERANCE = 1e-12
"""Of the largest value: both sides are float64, and only sums are ordered otherwise."""


@dataclass(frozen=True, slots=True)
class Question:
    """The attention that is asked about.

    Attributes:
        mask: the pairs that count.
        layout: ``auto``, ``contiguous``, ``zigzag``, ``striped`` or ``hilbert``.
        ranks: P.
        length: tokens S.
        sizes: of the attention.
        num_stages: steps are grouped into this many; None: a stage for each.
        machine: ``cpu`` or ``h200``.
        ulysses: how many ranks deal out heads among themselves.

    Raises:
        OptionError: ranks, heads or the layout don't allow that.
    """

    mask: Mask
    layout: str
    ranks: int
    length: int
    sizes: Sizes
    num_stages: int | None = None
    machine: str = "cpu"
    ulysses: int = 1

    def __post_init__(self) -> None:
        numbers = self.ranks, self.sizes.num_heads, self.sizes.num_kv_heads
        if self.ulysses < 1 or any(n % self.ulysses for n in numbers):
            raise OptionError(
                f"--ulysses {self.ulysses}",
                at="plan",
                because="ranks, heads and KV heads ({}, {}, {}) are dealt out to so"
                " many".format(*numbers),
                instead="a number that divides all three",
            )

    def plan(self) -> tuple[Schedule, str]:
        """The schedule, and why it has its layout."""
        machine = MACHINES[self.machine]
        parts = [(self.mask, None)]
        layout, reason = choose_layout(
            [parts], self.ranks, self.length, sizes=self.sizes, machine=machine
        )
        if self.layout != "auto":
            layout, reason = Layout(self.layout, self.ranks), "as asked"
        is_even = self.length % layout.num_chunks == 0
        if self.ulysses > 1:
            return self._plan_ulysses(layout, is_even=is_even), reason
        try:
            length = None if is_even else self.length
            schedule = build_schedule(parts, layout, length, num_stages=self.num_stages)
        except DependsOnLength:
            schedule = build_schedule(
                parts, layout, self.length, num_stages=self.num_stages
            )
        check_schedule(schedule)
        return schedule, reason

    def _plan_ulysses(self, layout: Layout, *, is_even: bool) -> Schedule:
        if layout.name not in {"contiguous", "zigzag"} or not is_even:
            raise OptionError(
                f"--ulysses with {layout} of {self.length} tokens",
                at="plan",
                because="neighbours' shards are one of the ring's only in contiguous"
                " and zigzag, where the sequence fills them",
                instead=f"a multiple of {2 * self.ranks} tokens, and one of these",
            )
        parts, merged = [(self.mask, None)], layout.merge(self.ulysses)
        schedule = build_schedule(
            parts, merged, self.length, num_stages=self.num_stages
        )
        check_schedule(schedule)
        ulysses = Ulysses(self.ulysses, layout.chunks_per_rank)
        return replace(schedule, ulysses=ulysses)


def draw_question(question: Question) -> str:
    """Draw which keys the queries see: queries down, keys to the right."""
    sizes = question.sizes
    spec = AttentionSpec(sizes.num_heads, sizes.num_kv_heads, question.length)
    return draw_parts([(question.mask, None)], spec)


def format_plan_answer(question: Question) -> str:
    """Write the schedule, what each step moves, and what the cost model says."""
    schedule, reason = question.plan()
    sizes, length = question.sizes, question.length
    row = sizes.elements_per_row
    steps = read_steps(
        schedule,
        kv_bytes=row * sizes.item_bytes,
        dkv_bytes=row * max(GRAD_BYTES, sizes.item_bytes),
        length=length,
    )
    machine = MACHINES[question.machine]
    seconds = estimate_seconds(schedule, length, sizes=sizes, machine=machine)
    cost = f"{_format_seconds(seconds)} by the model of {machine.name}"
    serves = "every S without padding" if schedule.length is None else f"S = {length}"
    return "\n".join(
        [
            str(schedule),
            f"  layout: {reason}; checked; serves {serves}",
            *format_steps(tuple(steps)),
            *_format_formulas(schedule),
            f"  forward and backward take {cost}",
        ]
    )


def _format_seconds(seconds: float) -> str:
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def _format_formulas(schedule: Schedule) -> Iterator[str]:
    """Bytes in the sizes of a call; ranks of one formula are told once."""
    if schedule.cp_size == schedule.ulysses.size == 1:
        return
    by_text: dict[str, list[int]] = {}
    for rank, traffic in enumerate(bytes_per_rank(schedule)):
        there, back = sympy.factor(traffic.forward), sympy.factor(traffic.backward)
        text = f"forward {there}, backward {back}"
        by_text.setdefault(text, []).append(rank)
    heads = "G KV heads" if schedule.ulysses.size == 1 else "H heads, G KV heads"
    yield f"  bytes sent for B batches, {heads}, S tokens, D and E features:"
    for text, ranks in by_text.items():
        yield f"    rank {', '.join(map(str, ranks))}: {text}"


def simulate_answer(question: Question) -> tuple[str, bool]:
    """Run all ranks in this process, in float64, against the dense reference.

    Returns:
        The errors as text, and whether they are those of rounding.
    """
    schedule, _ = question.plan()
    q, k, v, grad_out = _make_tensors(question)
    got = simulate(schedule, q, k, v, grad_out=grad_out)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, mask=question.mask)
    dq, dk, dv = torch.autograd.grad(out, leaves, grad_out)
    pairs = {
        "out": (got.out, out.detach()),
        "dq": (got.dq, dq),
        "dk": (got.dk, dk),
        "dv": (got.dv, dv),
    }
    errors = {name: _error(a, b) for name, (a, b) in pairs.items()}
    is_right = all(error <= TOLERANCE for error in errors.values())
    lines = [str(schedule), "  errors against the dense reference, float64:"]
    lines += [f"    {name:3} {error:.1e}" for name, error in errors.items()]
    lines.append("  right" if is_right else f"  WRONG: more than {TOLERANCE:g}")
    return "\n".join(lines), is_right


def _make_tensors(question: Question) -> tuple[Tensor, ...]:
    sizes = question.sizes
    generator = torch.Generator().manual_seed(0)
    heads = (sizes.num_heads, sizes.num_kv_heads, sizes.num_kv_heads, sizes.num_heads)
    return tuple(
        torch.randn(
            (sizes.batch, n, question.length, sizes.head_size),
            dtype=torch.float64,
            generator=generator,
        )
        for n in heads
    )


def _error(got: Tensor, want: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return ((got - want).abs().max() / want.abs().max().clamp(min=1e-300)).item()
