"""Reshards: a value from one placement to another, each with its transpose.

Invariant: a cotangent has its value's placement, and that of a replicated value is the
full cotangent, equal on all ranks (DESIGN.md section 3). So, forward and backward:

    shard   slice own rows   all-gather
    gather  all-gather       slice own rows, 0 at padding
    reduce  all-reduce       identity
    spread  identity         all-reduce, all values together
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ringcompile import ops
from ringcompile.ir.layout import Run
from ringcompile.ir.reshard import ReshardSpec, parse_spec
from ringcompile.lowering.hops import reshard_tag
from ringcompile.lowering.orders import find_positions, find_rows
from ringcompile.lowering.rows import Size, resolve
from ringcompile.torch_private import WAIT_TENSOR

Scalar = int | float | bool

read_spec = lru_cache(maxsize=256)(parse_spec)


@dataclass(frozen=True, slots=True)
class _Cut:
    """Which dim is cut: ``dim`` is a flattening of ``(outer, rows, inner)``."""

    dim: int
    outer: Size
    inner: Size

    @property
    def rows_dim(self) -> int:
        """The dim of the rows once unflattened."""
        return self.dim + 1

    def count_rows(self, x: Tensor) -> Size:
        """How many rows ``x`` has."""
        return x.shape[self.dim] // (self.outer * self.inner)

    def unflatten(self, x: Tensor) -> Tensor:
        """Give the rows a dim of their own."""
        split = (self.outer, self.count_rows(x), self.inner)
        return x.reshape(*x.shape[: self.dim], *split, *x.shape[self.dim + 1 :])

    def flatten(self, x: Tensor) -> Tensor:
        """Undo ``unflatten``."""
        return x.flatten(self.dim, self.dim + 2)


# ---- rows ----------------------------------------------------------------------------


def _slice_own(
    x: Tensor, cut: _Cut, spec: ReshardSpec, *, fill: Scalar | None
) -> Tensor:
    """This rank's rows of a full tensor; padding copies the last row or is ``fill``."""
    x, dim = cut.unflatten(x), cut.rows_dim
    layout, length = spec.layout, x.shape[dim]
    runs = layout.runs(spec.rank) if layout.has_runs else ()
    has_pads = length % layout.num_chunks != 0
    # Integers are not concatenated: Inductor 2.11 fuses that with a loss over two loops
    # of one GPU kernel, where the second reads what the first has not yet written.
    if runs and not has_pads and (len(runs) == 1 or x.is_floating_point()):
        chunk = length // layout.num_chunks
        pieces = [_slice_run(x, dim, run, chunk) for run in runs]
        return cut.flatten(pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim))
    positions = find_positions(
        *(layout, spec.rank, layout.chunk_size(length)),
        length=length,
        device=x.device,
    )
    # Only a length with pads becomes a constant: one graph serves the others.
    wanted = fill_pads(positions, int(length)) if has_pads else positions
    rows = x.index_select(dim, wanted)
    if has_pads and fill is not None:
        is_real = (positions < length).view(-1, *(1 for _ in rows.shape[dim + 1 :]))
        rows = torch.where(is_real, rows, fill)
    return cut.flatten(rows)


def fill_pads(positions: Tensor, length: int) -> Tensor:
    """Which row stands in each place: pads hold the last row, so they hold no NaN."""
    return positions.clamp(max=length - 1)


def _slice_run(x: Tensor, dim: int, run: Run, chunk: Size) -> Tensor:
    first = resolve(run.start, chunk)
    last = first + run.stride * (chunk - 1)
    return x[(slice(None),) * dim + (slice(first, last + 1, run.stride),)]


def _gather_rows(x: Tensor, cut: _Cut, spec: ReshardSpec, length: Size) -> Tensor:
    """The full tensor in the user's order, without padding, from all ranks' rows."""
    shards = _gather_ranks(cut.unflatten(x), spec)
    dim = cut.rows_dim
    if spec.layout.name == "striped":
        full = shards.movedim(0, dim + 1)
    elif spec.layout.name == "zigzag":
        low, high = shards.chunk(2, dim + 1)
        full = torch.cat([low, high.flip(0)]).movedim(0, dim)
    else:
        full = shards.movedim(0, dim)
    if not spec.layout.has_runs:
        rows = find_rows(spec.layout, int(length), x.device)
        return cut.flatten(full.flatten(dim, dim + 1).index_select(dim, rows))
    return cut.flatten(full.flatten(dim, dim + 1).narrow(dim, 0, length))


# ---- communication -------------------------------------------------------------------


def _gather_ranks(x: Tensor, spec: ReshardSpec) -> Tensor:
    """The same tensor of all ranks, stacked: ``(P, ...)``."""
    if spec.layout.cp_size == 1:
        return x[None]
    gathered: Tensor = WAIT_TENSOR(
        ops.ALL_GATHER(
            *(x, spec.layout.cp_size, reshard_tag("gather")),
            *(spec.group_name, spec.timeout_s),
        )
    )
    return gathered


def _sum_ranks(xs: Sequence[Tensor], spec: ReshardSpec, kind: str) -> list[Tensor]:
    """Sums over the ranks; what is narrower than float32 travels as float32."""
    if spec.layout.cp_size == 1:
        return list(xs)
    wide = [x.to(_sum_dtype(x)) for x in xs]
    tag = reshard_tag(kind)
    sums = ops.ALL_REDUCE(wide, tag, spec.group_name, spec.timeout_s)
    return [s.to(x.dtype) for s, x in zip(sums, xs, strict=True)]


def _sum_dtype(x: Tensor) -> torch.dtype:
    """Integers and bools are summed as integers, exactly."""
    is_number = x.is_floating_point() or x.is_complex()
    return ops.accumulation_dtype(x.dtype) if is_number else torch.int64


# ---- ops -----------------------------------------------------------------------------


class _Shard(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - autograd's
        x: Tensor,
        cut: _Cut,
        spec: ReshardSpec,
        fill: Scalar | None,
    ) -> Tensor:
        ctx.place = (cut, spec, cut.count_rows(x))
        return _slice_own(x, cut, spec, fill=fill)

    @staticmethod
    def backward(
        ctx: Any,  # noqa: ANN401 - autograd's
        grad: Tensor,
    ) -> tuple[Tensor | None, ...]:
        cut, spec, length = ctx.place
        return _gather_rows(grad, cut, spec, length), None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - autograd's
        x: Tensor,
        cut: _Cut,
        spec: ReshardSpec,
        length: Size,
    ) -> Tensor:
        ctx.place = (cut, spec)
        return _gather_rows(x, cut, spec, length)

    @staticmethod
    def backward(
        ctx: Any,  # noqa: ANN401 - autograd's
        grad: Tensor,
    ) -> tuple[Tensor | None, ...]:
        cut, spec = ctx.place
        return _slice_own(grad, cut, spec, fill=0), None, None, None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(
        _ctx: Any,  # noqa: ANN401 - autograd's
        x: Tensor,
        spec: ReshardSpec,
    ) -> Tensor:
        (total,) = _sum_ranks([x], spec, "reduce")
        return total

    @staticmethod
    def backward(
        _ctx: Any,  # noqa: ANN401 - autograd's
        grad: Tensor,
    ) -> tuple[Tensor | None, ...]:
        return grad, None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - autograd's
        spec: ReshardSpec,
        *xs: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.spec = spec
        return tuple(x.view_as(x) for x in xs)

    @staticmethod
    def backward(
        ctx: Any,  # noqa: ANN401 - autograd's
        *grads: Tensor,
    ) -> tuple[Tensor | None, ...]:
        needed = [i for i, need in enumerate(ctx.needs_input_grad[1:]) if need]
        sums = _sum_ranks([grads[i] for i in needed], ctx.spec, "spread")
        found = dict(zip(needed, sums, strict=True))
        return None, *(found.get(i) for i in range(len(grads)))


class _ScaleGrad(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - autograd's
        x: Tensor,
        factor: float,
    ) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(
        ctx: Any,  # noqa: ANN401 - autograd's
        grad: Tensor,
    ) -> tuple[Tensor | None, ...]:
        return grad * ctx.factor, None


def shard(
    x: Tensor,
    dim: int,
    outer: Size = 1,
    inner: Size = 1,
    *,
    spec: str,
    fill: Scalar | None = None,
) -> Tensor:
    """This rank's rows of a replicated value; what is not float has no gradient."""
    cut, place = _Cut(dim % x.dim(), outer, inner), read_spec(spec)
    if not x.is_floating_point():
        return _slice_own(x, cut, place, fill=fill)
    rows: Tensor = _Shard.apply(x, cut, place, fill)  # type: ignore[no-untyped-call]
    return rows


def gather(
    x: Tensor,
    dim: int,
    length: Size,
    outer: Size = 1,
    inner: Size = 1,
    *,
    spec: str,
) -> Tensor:
    """The value whose rows ranks hold, replicated, in the user's order, unpadded."""
    cut, place = _Cut(dim % x.dim(), outer, inner), read_spec(spec)
    if not x.is_floating_point():
        return _gather_rows(x, cut, place, length)
    full: Tensor = _Gather.apply(x, cut, place, length)  # type: ignore[no-untyped-call]
    return full


def reduce_partial(x: Tensor, *, spec: str) -> Tensor:
    """The replicated sum of what ranks hold in part."""
    total: Tensor = _Reduce.apply(x, read_spec(spec))  # type: ignore[no-untyped-call]
    return total


def spread(xs: Sequence[Tensor], *, spec: str) -> list[Tensor]:
    """Replicated values, as sharded compute uses them: their gradients are summed."""
    if not xs:
        return []
    return list(_Spread.apply(read_spec(spec), *xs))  # type: ignore[no-untyped-call]


def scale_grad(x: Tensor, factor: float) -> Tensor:
    """``x``; its gradient times ``factor``."""
    same: Tensor = _ScaleGrad.apply(x, factor)  # type: ignore[no-untyped-call]
    return same


for _name, _kernel in (
    ("shard", shard),
    ("gather", gather),
    ("reduce", reduce_partial),
    ("spread", spread),
    ("scale_grad", scale_grad),
):
    ops.LIBRARY.impl(_name, _kernel, "CompositeImplicitAutograd")
