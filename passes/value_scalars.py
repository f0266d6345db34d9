"""Numbers of a symbolic value: constants, and how torch rounds and casts them."""

from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from ringcompile.ir.mask import FALSE, TRUE
from ringcompile.passes.symbolic import (
    Case,
    Content,
    Number,
    Unreadable,
    always,
    captures_in,
    merge_cases,
    read_cases,
    read_truth,
)
from ringcompile.passes.value_views import read_integer

WIDE_INTS = (torch.int32, torch.int64)  # overflow of narrower ones is not modelled


def is_constant(number: Number) -> bool:
    """Whether a number depends on nothing."""
    return isinstance(number, float) or bool(number.is_Integer)


def to_scalar(number: Number, dtype: torch.dtype, ndim: int = 0) -> Tensor:
    """A real tensor of one known number."""
    known = number if isinstance(number, float) else int(number)
    return torch.full((1,) * ndim, known, dtype=dtype, device="cpu")


def read_constant(x: Tensor) -> Content:
    """What a tensor of one known number holds."""
    number = from_scalar(x.detach().reshape(()))
    return constant_content(number, x.dtype)


def from_scalar(x: Tensor) -> Number:
    """The number in a real tensor of one."""
    return float(x.item()) if x.dtype.is_floating_point else sympy.Integer(x.item())


def read_scalar(argument: Any) -> Number:  # noqa: ANN401
    """A Python or symbolic number; a symbolic float is fixed to its value, guarded."""
    value = argument.meta.get("val") if isinstance(argument, Node) else argument
    if isinstance(value, torch.SymFloat) and not value.node.has_hint():
        raise Unreadable("a number is known at run time only")
    if isinstance(value, (float, torch.SymFloat)):
        return float(value)
    return read_integer(value)


def constant_content(number: Number, dtype: torch.dtype) -> Content:
    """What a tensor of one number everywhere holds."""
    if is_constant(number):
        number = from_scalar(to_scalar(number, dtype))
    elif dtype not in WIDE_INTS:
        raise Unreadable(f"a tensor of {dtype} filled with {number}")
    return always(number) if dtype is not torch.bool else TRUE if number else FALSE


def cast_content(content: Content, old: torch.dtype, new: torch.dtype) -> Content:
    """What a tensor holds after a cast."""
    if new is torch.bool:
        return read_truth(content)
    if new == old:
        return content
    return merge_cases(
        Case(c.when, _cast_number(c.number, old, new)) for c in read_cases(content)
    )


def _cast_number(number: Number, old: torch.dtype, new: torch.dtype) -> Number:
    if is_constant(number):
        return from_scalar(to_scalar(number, old).to(new))
    if new is torch.int64 or (new in WIDE_INTS and not captures_in(number)):
        return number
    raise Unreadable(f"values that depend on positions are cast to {new}")


def holds_tensor(argument: Any) -> bool:  # noqa: ANN401
    """Whether an argument is a node of one tensor."""
    return isinstance(argument, Node) and isinstance(argument.meta.get("val"), Tensor)
