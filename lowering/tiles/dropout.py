"""What dropout keeps: a hash of the seed and of where a weight or element stands.

Invariant: it does not depend on ranks, layouts or tiles, so that each of them, and
backward, draws the same (SEMANTICS.md, "Dropout of weights").
"""

from collections.abc import Sequence

from torch import Tensor

from ringcompile import ops
from ringcompile.ir.evaluate import shift_right, splitmix64

_BITS = 31


def find_kept(seed: Tensor, at: Sequence[Tensor], rate: float) -> Tensor:
    """Whether each weight or element is kept, with probability ``1 - rate``.

    Args:
        seed: one int64 number.
        at: int64 tensors that broadcast against each other: ``(b, h, q, k)`` of a
            weight, or the indices of an element.
        rate: share that is dropped.

    Returns:
        bool tensor of the broadcast shape.

    Source: ``splitmix64``, once for each index.
    """
    x = splitmix64(seed.view(()))
    for index in at:
        x = splitmix64(x ^ index)
    return shift_right(x, 64 - _BITS) >= round(rate * (1 << _BITS))


ops.LIBRARY.impl("find_kept", find_kept, "CompositeImplicitAutograd")
