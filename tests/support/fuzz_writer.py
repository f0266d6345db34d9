"""A random program in the making: its choices, inputs and lines.

Every line is run in float64 as it is written, so a step whose values are not finite, or
grow too large, is taken back.
"""

import operator
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from support.fuzz_program import Input, Line, Number, Ref, evaluate

T = TypeVar("T")

FLOAT, LOWEST = Number.FLOAT, Number.LOWEST

LARGEST = 1e3

# What torch knows of an op on fake tensors it keeps by sizes: few sizes are fast.
SMALL_SIZES = ((1, 5, 8), (2, 7, 8), (2, 8, 8), (3, 4, 8), (2, 13, 8), (1, 2, 8))
LENGTHS = (*range(1, 12), 5, 6, 7, 8, 9, 12, 13, 15, 16, 17, 33)


class TakeBack(Exception):  # noqa: N818
    """A step that led nowhere."""


@dataclass(frozen=True, slots=True)
class Var:
    """A value while its program is written: its name, and itself in float64."""

    name: str
    value: Any

    @property
    def shape(self) -> torch.Size:
        shape: torch.Size = self.value.shape
        return shape


class Writer:
    """A program in the making.

    Attributes:
        rng: where all choices come from.
        is_small: whether sizes are few, and steps too.
        batch, length, width: B, S and E of the stream.
        is_distinct: whether no two tokens of a batch are alike by construction.
        shared_kv: K and V of earlier attentions.
    """

    def __init__(self, seed: int, *, is_small: bool) -> None:
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.is_small = is_small
        rng = self.rng
        if is_small:
            self.batch, self.length, self.width = rng.choice(SMALL_SIZES)
        else:
            self.batch = rng.choice((1, 1, 2, 2, 3))
            self.length = rng.choice(LENGTHS)
            self.width = rng.choice((4, 8, 8, 12))
        self.is_distinct = False
        self.inputs: dict[str, Input] = {}
        self.lines: list[Line] = []
        self.env: dict[str, Any] = {}
        self.shared_kv: list[tuple[Var, Var]] = []
        self._memo: dict[str, Var] = {}

    # ---- choices ---------------------------------------------------------------------

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def pick(self, *options: Any) -> Any:  # noqa: ANN401
        return self.rng.choice(options)

    # ---- inputs ----------------------------------------------------------------------

    def randn(self, *shape: int, scale: float = 1.0) -> Tensor:
        x = torch.randn(*shape, generator=self.generator, dtype=torch.float64)
        return x * scale

    def randint(self, high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=self.generator)

    def parameter(self, *shape: int, scale: float | None = None) -> Var:
        """A new parameter, or an earlier one of that shape; a few are frozen."""
        alike = [
            x
            for x in self.inputs.values()
            if x.is_parameter and x.value.shape == torch.Size(shape)
        ]
        if alike and self.chance(0.12):
            shared = self.rng.choice(alike)
            return Var(shared.name, shared.value)
        value = self.randn(*shape, scale=scale or shape[-1] ** -0.5)
        needs_grad = not self.chance(0.1)
        return self._input("p", value, is_parameter=True, needs_grad=needs_grad)

    def argument(self, value: Tensor, *, needs_grad: bool = False) -> Var:
        """A new input that is no parameter."""
        return self._input("x", value, is_parameter=False, needs_grad=needs_grad)

    def once(self, key: str, make: Callable[[], Var]) -> Var:
        """The one value of that key."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    def _input(self, kind: str, value: Tensor, **options: bool) -> Var:
        name = f"{kind}{len(self.inputs)}"
        self.inputs[name] = Input(name, value, **options)
        self.env[name] = value
        return Var(name, value)

    # ---- lines -----------------------------------------------------------------------

    def call(self, target: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> Var:  # noqa: ANN401
        """Write a call and run it."""
        args, kwargs = tree_map_only(Var, lambda v: Ref(v.name), (args, kwargs))
        line = Line(f"v{len(self.lines)}", target, args, kwargs)
        try:
            value = evaluate(line, self.env)
        except (RuntimeError, IndexError) as error:
            raise TakeBack(f"{target}: {error}") from error
        _check(value)
        self.lines.append(line)
        self.env[line.name] = value
        return Var(line.name, value)

    def items(self, several: Var) -> list[Var]:
        """The results of a call that gives several."""
        return [
            self.call(operator.getitem, several, i) for i in range(len(several.value))
        ]

    def item(self, x: Var, *index: Any) -> Var:  # noqa: ANN401
        """``x[index]``."""
        return self.call(operator.getitem, x, index if len(index) > 1 else index[0])

    def attempt(self, step: Callable[..., T], *args: Any) -> T | None:  # noqa: ANN401
        """A step's result; None if it was taken back."""
        lines, inputs, memo = len(self.lines), dict(self.inputs), dict(self._memo)
        shared = len(self.shared_kv)
        try:
            return step(self, *args)
        except TakeBack:
            for line in self.lines[lines:]:
                del self.env[line.name]
            del self.lines[lines:], self.shared_kv[shared:]
            self.inputs, self._memo = inputs, memo
            return None

    # ---- common values ---------------------------------------------------------------

    def positions(self) -> Var:
        """``arange(S)``, now and then a new one."""
        if self.chance(0.7):
            return self.once("arange", lambda: self.call(torch.arange, self.length))
        return self.call(torch.arange, self.length)

    def keep(self) -> Var:
        """Which tokens are real: bool ``(B, S)``, one at least in each row."""

        def make() -> Var:
            if self.chance(0.5):
                value = self.randint(4, self.batch, self.length) > 0
                value[:, self.rng.randrange(self.length)] = True
                return self.argument(value)
            lengths = self.randint(self.length, self.batch, 1) + 1
            given = self.argument(lengths)
            return self.call("__lt__", self.positions(), given)

        return self.once("keep", make)

    def documents(self) -> Var:
        """Number of each token's document, ``(B, S)``."""

        def make() -> Var:
            starts = self.randint(3, self.batch, self.length) == 0
            if self.chance(0.5):
                return self.argument(starts.long().cumsum(1))
            return self.call("cumsum", self.argument(starts.long()), 1)

        return self.once("documents", make)

    def linear(self, x: Var, width: int) -> Var:
        """A product with a weight, in some spelling."""
        inner = x.shape[-1]
        weight = self.parameter(width, inner)
        bias = self.parameter(width) if self.chance(0.5) else None
        plain = ("linear",) * (12 if self.is_small else 3)
        spelling = self.pick(*plain, "matmul", "einsum", "addmm")
        if spelling == "linear":
            return self.call(F.linear, x, weight, bias)
        if spelling == "addmm" and bias is not None:
            turned = self.call("t", weight)
            flat = self.call("reshape", x, -1, inner)
            y = self.call(torch.addmm, bias, flat, turned)
            return self.call("view", y, *x.shape[:-1], width)
        if spelling == "einsum":
            y = self.call(torch.einsum, "...e,fe->...f", x, weight)
        else:
            y = self.call(torch.matmul, x, self.call("transpose", weight, 0, 1))
        return y if bias is None else self.call("__add__", y, bias)


def _check(value: Any) -> None:  # noqa: ANN401
    """Take back what is not finite, or large; masks may be -inf or large below zero."""
    for x in value if isinstance(value, tuple | list) else (value,):
        if isinstance(x, Tensor) and x.is_floating_point():
            is_fine = (x.abs() <= LARGEST) | (x < -9 * LARGEST)
            if not is_fine.all():
                raise TakeBack("not finite, or large")
