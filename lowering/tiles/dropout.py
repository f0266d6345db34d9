"""Which weights dropout keeps: a hash of the seed and of where a weight stands.

Invariant: it does not depend on ranks, layouts or tiles, so that each of them, and
backward, draws the same (SEMANTICS.md, "Dropout of weights").
"""

from collections.abc import Sequence

from torch import Tensor

_BITS = 31
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # as the signed number with these bits
_FACTORS = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))


def find_kept(seed: Tensor, at: Sequence[Tensor], rate: float) -> Tensor:
    """Whether each weight is kept, with probability ``1 - rate``.

    Args:
        seed: one int64 number.
        at: int64 tensors ``(b, h, q, k)`` that broadcast against each other.
        rate: share of weights that are dropped.

    Returns:
        bool tensor of the broadcast shape.

    Source: splitmix64 (Steele, Lea, Flood 2014), once for each index.
    """
    x = _mix(seed.view(()) + _GOLDEN)
    for index in at:
        x = _mix(x ^ index)
    return _shift_right(x, 64 - _BITS) >= round(rate * (1 << _BITS))


def _mix(x: Tensor) -> Tensor:
    first, second = _FACTORS
    x = (x ^ _shift_right(x, 30)) * first  # int64 products wrap around
    x = (x ^ _shift_right(x, 27)) * second
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Zeros come in from the left, whatever the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
