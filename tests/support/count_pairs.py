"""How often kernel calls compute each pair."""

from collections.abc import Callable, Iterable
from itertools import product

import torch
from torch import Tensor

from ringcompile.ir.schedule import Kernel, Piece
from ringcompile.lowering.calls import Call


def refuse_masked(_: Call) -> Tensor:
    """What is counted where no call may have a mask."""
    raise AssertionError("a call under a mask")


def count_pairs(
    calls: Iterable[Piece],
    num_q: int,
    num_kv: int,
    count_masked: Callable[[Call], Tensor] = refuse_masked,
) -> Tensor:
    """How often each pair is computed, ``(num_q, num_kv)``.

    Args:
        calls: the calls.
        num_q: rows of queries.
        num_kv: rows of keys.
        count_masked: of a call under a mask, how often it computes each of its pairs.
    """
    total = torch.zeros(num_q, num_kv, dtype=torch.int64)
    for call in calls:
        assert isinstance(call, Call)
        height, width = call.runs
        assert call.q.stop[1] <= num_q
        assert call.kv.stop[1] <= num_kv
        for n, g in product(range(call.classes), range(call.groups)):
            q, kv = (
                torch.arange(of.start[1] + n, of.stop[1], call.classes)[
                    g * (size + call.gap) :
                ][:size]
                for of, size in ((call.q, height), (call.kv, width))
            )
            assert (len(q), len(kv)) == (height, width)
            found = torch.ones(height, width, dtype=torch.int64)
            if call.kernel is Kernel.CAUSAL:
                assert height == width
                found = found.triu() if call.is_upper else found.tril()
            if call.kernel is Kernel.MASKED:
                found = count_masked(call)
            total[q[:, None], kv] += found
    return total
