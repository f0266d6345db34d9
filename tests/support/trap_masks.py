"""Masks that are easy to misread: each function gives what hides or keeps (S, S)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from support.traps import SCALE, S, Seen, Setting, attend, merge, split

Positions = Callable[[Tensor, Tensor], Tensor]


def _grid() -> tuple[Tensor, Tensor]:
    position = torch.arange(S)
    return position[:, None], position[None, :]


# What keeps a pair, by queries' and keys' positions.
KEPT: dict[str, Positions] = {
    "int8 that overflows": lambda q, k: (
        (q.to(torch.int8) * 30) >= k.to(torch.int8) * 30
    ),
    "uint8 that wraps": lambda q, k: (q.to(torch.uint8) - k.to(torch.uint8)) < 100,
    "int8 cast that wraps": lambda q, k: (q * 40).to(torch.int8) >= (k * 40),
    "bfloat16 that rounds": lambda q, k: (
        (q + 250).to(torch.bfloat16) >= (k + 250).to(torch.bfloat16)
    ),
    "half that rounds": lambda q, k: (q + 2044).half() >= (k + 2044).half(),
    "float steps": lambda q, k: (q * 0.1) >= (k.float() / 10),
    "remainder of negatives": lambda q, k: (k - q) % 3 != 1,
    "fmod of negatives": lambda q, k: torch.fmod(k - q, 3) != 1,
    "trunc of negatives": lambda q, k: torch.div(k - q, 3, rounding_mode="trunc") <= 0,
    "floor of negatives": lambda q, k: (k - q) // 3 <= -1 + (q == k).long(),
    "shift of negatives": lambda q, k: ((k - q) >> 1) <= 0,
    "square": lambda q, k: (q - k) ** 2 <= 9,
    "bools added": lambda q, k: (q >= k) + (q == k - 2),
    "bools multiplied": lambda q, k: (q >= k) * (q - k < 3),
    "bools compared": lambda q, k: (q >= k) != (q - k > 4),
    "xor": lambda q, k: (q >= k) ^ (q - k > 4),
    "bool minus one": lambda q, k: ((q >= k).long() - 1) == 0,
    "not of uint8": lambda q, k: (~(q >= k).to(torch.uint8)) != 254,
    "tril of a shifted matrix": lambda q, k: (
        torch.ones(S, S).roll(1, 0).tril(-1).bool() | (k == 0)
    ),
    "flipped": lambda q, k: (q >= k).flip(0) | (k == q),
    "turned": lambda q, k: (q >= k).T,
    "rolled": lambda q, k: (q >= k).roll(1, 1) | (k == q),
    "one query only": lambda q, k: (k <= q) & (q != 5) | (k == 3),
    "cumulative": lambda q, k: (q >= k).long().cumsum(1) <= 4,
    "sorted": lambda q, k: (q >= k).long().sort(dim=1).values.bool() | (k == q),
    "strict": lambda q, k: (k < q) | (k == 0),
    "every other": lambda q, k: (k % 2 == 0) & (k <= q),
    "minimum": lambda q, k: torch.minimum(q, k) == torch.clamp(k, max=7),
    "sign": lambda q, k: torch.sign(q - k) >= 0,
    "index": lambda q, k: torch.tensor([3, 1, 2, 0] * 3)[q] >= torch.arange(S)[k] % 4,
    "none": lambda q, k: (q < 0) & (k < 0) | (k == q),
}

# What is added to scores.
ADDED: dict[str, Positions] = {
    "soft": lambda q, k: (k > q) * -2.5,
    "soft of ten": lambda q, k: -10.0 * (k > q),
    "infinite where kept": lambda q, k: torch.where(k <= q, 0.0, -math.inf),
    "positive": lambda q, k: torch.where(k == q, 3.0, 0.0),
    "two lows": lambda q, k: (
        torch.where(k > q, -1e4, 0.0) + torch.where(k < q - 4, -2e4, 0.0)
    ),
    "ints": lambda q, k: (k > q).long() * -10000,
    "one of each": lambda q, k: torch.where(k > q, -math.inf, (k == 0) * 1.0),
    "slope": lambda q, k: (k - q) * 0.25,
    "plus infinity": lambda q, k: torch.where(k == q, math.inf, 0.0),
    "NaN": lambda q, k: torch.where(k == q, math.nan, 0.0),
    "by query alone": lambda q, k: (q * 1.0).expand(S, S),
    "by key alone": lambda q, k: (k * 0.5).expand(S, S),
    "product": lambda q, k: (q * k) * 0.01,
}


@dataclass(frozen=True, slots=True)
class SdpaKept:
    """``attn_mask`` of bools."""

    name: str

    def __call__(self, setting: Setting) -> Seen:
        kept = KEPT[self.name]
        return setting.step(lambda x: attend(x, kept(*_grid())), setting.tokens())


@dataclass(frozen=True, slots=True)
class FilledKept:
    """Scores filled by the lowest number."""

    name: str

    def __call__(self, setting: Setting) -> Seen:
        kept = KEPT[self.name]

        def attend_filled(x: Tensor) -> Tensor:
            q = split(x)
            scores = q @ q.sin().mT * SCALE
            low = torch.finfo(scores.dtype).min
            weights = scores.masked_fill(~kept(*_grid()), low).softmax(-1)
            return merge(weights @ q.cos())

        return setting.step(attend_filled, setting.tokens())


@dataclass(frozen=True, slots=True)
class Added:
    """Scores with something added."""

    name: str

    def __call__(self, setting: Setting) -> Seen:
        added = ADDED[self.name]

        def attend_added(x: Tensor) -> Tensor:
            q = split(x)
            scores = q @ q.sin().mT * SCALE + added(*_grid()).to(x.dtype)
            return merge(scores.softmax(-1) @ q.cos())

        return setting.step(attend_added, setting.tokens())
