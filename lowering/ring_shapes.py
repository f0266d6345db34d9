"""What the ring's ops give, without a value: sizes, strides and dtypes."""

from collections.abc import Sequence

from torch import Tensor

from ringcompile import ops
from ringcompile.lowering.program import build_program, read_plan
from ringcompile.lowering.rows import Size, resolve


def forward_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: Sequence[Tensor],
    _biases: Sequence[Tensor],
    _sinks: Tensor | None,
    *,
    plan: str,
) -> list[Tensor]:
    """Of ``ops.RING_FORWARD``."""
    B, H, T, _ = q.shape
    out = q.new_empty((B, T, H, v.shape[3])).transpose(1, 2)
    lse = q.new_empty(q.shape[:3], dtype=ops.accumulation_dtype(q.dtype))
    if not read_plan(plan).schedule.mixing.is_detached:
        return [out, lse]
    parts = build_program(plan, q, v, captures, ())
    own = [part.queries.own_rows for part in parts]
    chunk = parts[0].frame.chunk
    rows = [resolve(r.stop, chunk) - resolve(r.start, chunk) for r in own]
    return [out, lse, *(q.new_empty((*q.shape[:2], n, v.shape[3])) for n in rows)]


def backward_shapes(  # noqa: PLR0913 - the op's schema
    _grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    _outs: Sequence[Tensor],
    lse: Tensor,
    _captures: Sequence[Tensor],
    biases: Sequence[Tensor],
    sinks: Tensor | None,
    *,
    needed: Sequence[bool],
    num_blocks: Size | None,
    plan: str,
) -> list[Tensor]:
    """Of ``ops.RING_BACKWARD``."""
    found = [
        x.new_empty((x.shape[0], x.shape[2], x.shape[1], x.shape[3])).transpose(1, 2)
        for x, need in zip((q, k, v), needed, strict=False)
        if need
    ]
    others = zip((sinks, *biases), needed[3:], strict=True)
    found += [x.new_empty(x.shape) for x, need in others if need and x is not None]
    if num_blocks is not None:
        found.append(lse.new_empty((*q.shape[:2], num_blocks, num_blocks)))
    return found
