"""Whatever a rule reads is what the tensor holds."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.attentions import Traced, record_values, trace
from sympy.core.function import AppliedUndef
from torch import Tensor

from ringcompile.ir.evaluate import evaluate
from ringcompile.ir.mask import B, H, K, Q, capture, equals_zero
from ringcompile.passes.read_values import Reader
from ringcompile.passes.symbolic import (
    Unreadable,
    Value,
    captures_in,
    index_symbol,
    read_cases,
    read_truth,
    replace_terms,
)

ROWS, COLUMNS = 6, 8
SYMBOLS = (B, H, Q, K)


@dataclass(frozen=True, slots=True)
class Read:
    """The value of a traced function's result, and how to evaluate it."""

    value: Value
    actual: Tensor
    captures: dict[AppliedUndef, Tensor]

    def check(self) -> None:
        """Require the value to hold what the tensor does, element by element."""
        assert tuple(self.value.shape) == tuple(self.actual.shape)
        assert self.value.dtype == self.actual.dtype
        if self.value.dtype is torch.bool:
            got = self.evaluate(read_truth(self.value.content), self.actual)
            assert torch.equal(got, self.actual)
            return
        covered = torch.zeros_like(self.actual, dtype=torch.int64)
        for case in read_cases(self.value.content):
            where = self.evaluate(case.when, self.actual)
            covered += where
            if isinstance(case.number, float):
                want = torch.full_like(self.actual, case.number)
                same = (self.actual == want) | (self.actual.isnan() & want.isnan())
            else:
                here = capture(0, *(index_symbol(d) for d in range(self.actual.ndim)))
                same = self.evaluate(equals_zero(case.number - here), self.actual)
            assert bool(same[where].all()), f"{case.number} where {case.when}"
        assert bool((covered == 1).all()), "cases overlap or leave a gap"

    def evaluate(self, p: object, actual: Tensor) -> Tensor:
        """A predicate over ``i0...``; ``c0`` is the actual tensor itself."""
        assert actual.ndim <= len(SYMBOLS)
        reads = sorted({c.func for c in self.captures}, key=str)
        tensors = [actual]
        names = {}
        for number, func in enumerate(reads, start=1):
            names[func] = number
            tensors.append(next(t for c, t in self.captures.items() if c.func == func))
        mapping = {
            c: capture(names[c.func], *c.args)
            for c in captures_in(p)
            if c.func in names
        }
        p = replace_terms(p, mapping)
        p = replace_terms(p, {index_symbol(d): SYMBOLS[d] for d in range(4)})
        at = [torch.zeros((), dtype=torch.int64)] * 4
        for dim, size in enumerate(actual.shape):
            view = [-1 if d == dim else 1 for d in range(actual.ndim)]
            at[dim] = torch.arange(size).view(view)
        return evaluate(p, at, tensors).broadcast_to(actual.shape)


def read(traced: Traced) -> Read:
    """Read what a traced function returns."""
    (output,) = traced.gm.graph.find_nodes(op="output")
    node = output.args[0]
    reader = Reader(traced.gm.graph)
    value = reader.read(node)
    values = record_values(traced)
    reads: set[AppliedUndef] = captures_in(read_truth(value.content))
    if isinstance(value.content, tuple):
        for case in value.content:
            reads |= captures_in(case.when)
            if not isinstance(case.number, float):
                reads |= captures_in(case.number)
    return Read(value, values[node], {c: values[reader.node_of(c)] for c in reads})


def ints() -> Tensor:
    return torch.arange(ROWS)[:, None] * 3 - torch.arange(COLUMNS)


def bools() -> Tensor:
    return torch.arange(ROWS)[:, None] < torch.arange(COLUMNS)


RULES: dict[str, Callable[[], Tensor]] = {
    "arange": lambda: torch.arange(3, 30, 4),
    "full": lambda: torch.full((2, 3), 7),
    "full of a tensor": lambda: torch.ones(2, 3).fill_(2),
    "full_like": lambda: torch.full_like(ints(), 5),
    "new_full": lambda: ints().new_full((2,), 5),
    "zeros_like bool": lambda: torch.zeros_like(bools()),
    "scalar_tensor": lambda: torch.scalar_tensor(3, dtype=torch.int64),
    "add alpha": lambda: torch.add(ints(), ints(), alpha=3),
    "sub alpha": lambda: torch.sub(ints(), 5, alpha=2),
    "rsub": lambda: torch.rsub(ints(), 5, alpha=2),
    "neg": lambda: -ints(),
    "mul": lambda: ints() * 3,
    "mul of predicates": lambda: bools().long() * (bools().int() + 2),
    "floor divide": lambda: ints() // 4,
    "remainder": lambda: ints() % 5,
    "div floor": lambda: torch.div(ints(), 3, rounding_mode="floor"),
    "bool to int": lambda: bools().long() * 3 + 1,
    "bool times int": lambda: bools() * ints(),
    "bool plus bool": lambda: bools() + ~bools(),
    "int to bool": lambda: (ints() % 3).to(torch.bool),
    "float of a bool": lambda: 1.0 - bools().float(),
    "half of a bool": lambda: (bools().half() - 1) * 70000.0,
    "bfloat16 rounds": lambda: (bools().float() * torch.finfo(torch.float32).min).to(
        torch.bfloat16
    ),
    "overflow": lambda: bools().float() * -2e38 + bools().float() * -2e38,
    "float compared": lambda: bools().float() > 0.5,
    "clamped": lambda: torch.where(bools(), -math.inf, 0.0).clamp(min=-1e30),
    "maximum": lambda: torch.maximum(bools().float(), torch.full((), 0.5)),
    "isinf": lambda: torch.where(bools(), -math.inf, 0.0).isinf(),
    "narrow ints": lambda: bools().to(torch.uint8) - 1,
    "tril of ints": lambda: ints().tril(-1),
    "triu of bools": lambda: bools().triu(2),
    "tril of floats": lambda: bools().float().tril(1),
    "where of ints": lambda: torch.where(bools(), ints(), 3),
    "where of scalars": lambda: torch.where(bools(), 1, 0),
    "masked_fill": lambda: ints().masked_fill(bools(), -1),
    "masked_fill of a tensor": lambda: ints().masked_fill(bools(), torch.full((), 9)),
    "logical": lambda: torch.logical_or(bools(), ints()) ^ bools().logical_not(),
    "select": lambda: ints()[-2] + ints()[:, -1:],
    "slice": lambda: ints()[1:5:2, -3:],
    "negative far start": lambda: ints()[-100:],
    "reshape": lambda: ints().reshape(2, 3, 4, 2),
    "fold": lambda: ints().reshape(2, 3, 4, 2).flatten(1, 2),
    "repeat_interleave": lambda: ints().repeat_interleave(3, dim=1),
    "repeat": lambda: ints().repeat(2, 3),
    "flip": lambda: ints().flip([0, 1]),
    "squeeze": lambda: ints()[:, None].squeeze(1).unsqueeze(-1),
    "T": lambda: ints().T + ints().mT + ints().t() + ints().swapaxes(0, 1),
    "index": lambda: ints()[torch.arange(3)[:, None], torch.arange(2)],
    "index apart": lambda: ints()[:, None, :, None][
        torch.arange(3), :, torch.arange(3)
    ],
    "index behind": lambda: ints()[:, torch.arange(3)[:, None] * 2],
    "diff": lambda: (torch.arange(9) * 3).diff(dim=0),
    "diff prepend": lambda: torch.arange(9).diff(prepend=torch.full((1,), -1)),
    "cumsum": lambda: torch.full((3, 4), 2).cumsum(1),
    "cat": lambda: torch.cat(
        [ints(), ints() + 1, torch.zeros(2, COLUMNS, dtype=torch.int64)]
    ),
    "cat of bools": lambda: torch.cat([bools(), ~bools()], dim=-1),
}
NOT_READ = {"full of a tensor"}


@pytest.mark.parametrize("name", RULES)
def test_rule_says_what_the_op_does(name: str) -> None:
    traced = trace(lambda _: RULES[name](), torch.zeros(1))
    if name in NOT_READ:
        with pytest.raises(Unreadable):
            read(traced)
    else:
        read(traced).check()


CAPTURED: dict[str, Callable[[Tensor], Tensor]] = {
    "shifted": lambda c: c[:, None, :, None] - c[:, None, None, :] + 1,
    "compared": lambda c: c[:, :, None] // 2 == c[:, None, :] % 3,
    "bool": lambda c: (c > 1)[:, None] & (c != 2)[..., None],
    "sums": lambda c: c.cumsum(1)[:, None] - c.sum(1)[:, None, None],
    "sorted": lambda c: c.sort(1).values[:, :, None] < c[:, None, :],
    "float inside": lambda c: (c.float() * 0.3 > 0.5)[:, None],
    "permuted": lambda c: c.T.flip(0)[None, 2:],
    "diff": lambda c: c.diff(prepend=c[:, :1] - 1) != 1,
    "edges": lambda c: torch.where(c == c[:, :1], c, -1),
    "int32": lambda c: c.int()[:, None] - c.int()[..., None],
}


@pytest.mark.parametrize("name", CAPTURED)
def test_what_no_rule_reads_is_read_at_run_time(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    c = torch.randint(0, 5, (3, COLUMNS), generator=generator)
    read(trace(CAPTURED[name], c)).check()


# ---- random programs -----------------------------------------------------------------

UNARY: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: -x.long(),
    lambda x: x.long() * 2 + 1,
    lambda x: x.long() // 3,
    lambda x: x.long() % 4,
    lambda x: x.bool(),
    lambda x: x == 0,
    lambda x: ~(x > 2),
    lambda x: x.flip(-1),
    lambda x: x.mT if x.shape[-1] == x.shape[-2] else x,
    lambda x: x.tril(1),
    lambda x: x.triu(),
    lambda x: x[..., :1],
    lambda x: x[1:2],
    lambda x: x.masked_fill(x > 1, 0),
)
BINARY: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    lambda x, y: x.long() + y,
    lambda x, y: x.long() - y.long(),
    lambda x, y: x <= y,
    lambda x, y: x == y,
    lambda x, y: x.bool() & y.bool(),
    lambda x, y: x.bool() | y.bool(),
    lambda x, y: x.bool() ^ y.bool(),
    lambda x, y: torch.where(x > 0, x.long(), y.long()),
)
SIZE = 5
PROGRAMS = st.lists(
    st.tuples(
        st.booleans(),
        st.integers(0, 99),
        st.integers(0, 99),
        st.integers(0, 99),
    ),
    min_size=1,
    max_size=6,
)


def run_program(steps: list[tuple[bool, int, int, int]], c: Tensor) -> Tensor:
    """A stack of tensors; each step makes one of those before it."""
    made = [
        torch.arange(SIZE)[:, None].expand(SIZE, SIZE),
        torch.arange(SIZE)[None].expand(SIZE, SIZE),
        c[:, None].expand(SIZE, SIZE),
        c[None].expand(SIZE, SIZE),
    ]
    for is_unary, op, a, b in steps:
        x, y = made[a % len(made)], made[b % len(made)]
        made.append(
            UNARY[op % len(UNARY)](x) if is_unary else BINARY[op % len(BINARY)](x, y)
        )
    return made[-1]


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(steps=PROGRAMS, seed=st.integers(0, 5))
def test_random_programs_are_read_right_or_not_at_all(
    steps: list[tuple[bool, int, int, int]], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    c = torch.randint(-2, 4, (SIZE,), generator=generator)
    traced = trace(lambda c: run_program(steps, c), c)
    try:
        found = read(traced)
    except Unreadable:
        return
    found.check()
