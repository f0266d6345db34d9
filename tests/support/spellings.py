"""The table of hand-written attentions: every way to write one that must become a ring.

Each is a small module on ``x`` with projections of its own, so that gradients of all its
parts are compared. A function that attends takes ``q, k, v`` as (B, H, S, D), and what
else its row names as inputs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

B, S, E, H, D = 2, 16, 32, 4, 8
G = 2  # heads of K and V where there are fewer
MEMORY = 10  # length of the second sequence

Attend = Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class Spelling:
    """One way to write attention.

    Attributes:
        name: what is special about it.
        build: makes the module, in training mode.
        inputs: names of what it takes beside ``x``; see ``make_inputs``.
        num_regions: how many attentions there are in it.
        has_gradients: False for what torch can't train on CPU.
        shape: of ``x``.
        like: the same in other words, for what can't be run in eager float64.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: tuple[str, ...] = ()
    num_regions: int = 1
    has_gradients: bool = True
    shape: tuple[int, ...] = (B, S, E)
    like: Callable[[], nn.Module] | None = None

    def __str__(self) -> str:
        return self.name


class Heads(nn.Module):
    """Projections to heads, ``attend``, and back."""

    def __init__(self, attend: Attend, kv_heads: int = H) -> None:
        super().__init__()
        self.attend = attend
        self.q = nn.Linear(E, H * D)
        self.k = nn.Linear(E, kv_heads * D)
        self.v = nn.Linear(E, kv_heads * D)
        self.out = nn.Linear(H * D, E)

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        q, k, v = (split(layer(x)) for layer in (self.q, self.k, self.v))
        return self.out(merge(self.attend(q, k, v, *more)))  # type: ignore[no-any-return]


def split(x: Tensor) -> Tensor:
    """(B, S, H * D) to (B, H, S, D)."""
    return x.view(*x.shape[:-1], -1, D).transpose(1, 2)


def merge(x: Tensor) -> Tensor:
    """(B, H, S, D) to (B, S, H * D)."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


def of_heads(
    name: str, attend: Attend, *inputs: str, kv_heads: int = H, num_regions: int = 1
) -> Spelling:
    """A row for a function of q, k and v."""
    return Spelling(name, lambda: Heads(attend, kv_heads), inputs, num_regions)


def build_spelling(
    spelling: Spelling, dtype: torch.dtype, *, alike: bool = False
) -> nn.Module:
    """The module, the same weights at every call; ``alike``: in its other words."""
    torch.manual_seed(0)
    build = spelling.like if alike and spelling.like else spelling.build
    return build().to(dtype)


def make_inputs(spelling: Spelling, dtype: torch.dtype) -> dict[str, Tensor]:
    """``x``, and by name:

    - ``kept`` (bool), ``kept int``, ``kept float``: (B, S), false where there is padding;
      ``pads``: the contrary of it.
    - ``memory``: (B, 10, E), the second sequence.
    - ``documents``: (B, S), the number of the document that a token belongs to.
    """
    generator = torch.Generator().manual_seed(1)
    draw = {
        "x": torch.randn(spelling.shape, generator=generator, dtype=torch.float64),
        "memory": torch.randn(B, MEMORY, E, generator=generator, dtype=torch.float64),
    }
    kept = torch.arange(S) < torch.tensor([[S], [S - 5]])
    masks = {
        "kept": kept,
        "pads": ~kept,
        "kept int": kept.long(),
        "kept float": kept.to(dtype),
        "documents": (torch.arange(S) >= torch.tensor([[6], [9]])).long(),
    }
    made = {n: t.to(dtype).requires_grad_() for n, t in draw.items()} | masks
    return {name: made[name] for name in ("x", *spelling.inputs)}


def find_spelling(name: str) -> Spelling:
    """The row of that name, of all tables."""
    return next(s for s in all_spellings() if s.name == name)


def all_spellings() -> tuple[Spelling, ...]:
    """Every row."""
    from support import (  # noqa: PLC0415 - they import this module
        spellings_biases,
        spellings_library,
        spellings_masks,
        spellings_scores,
        spellings_shapes,
    )

    return (
        *spellings_scores.TABLE,
        *spellings_masks.TABLE,
        *spellings_biases.TABLE,
        *spellings_shapes.TABLE,
        *spellings_library.TABLE,
    )
