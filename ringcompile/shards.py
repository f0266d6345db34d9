"""Cut tensors over the ranks of a mesh by hand, and join them again.

The same ops that rewritten graphs run, so both are differentiable and each is the
other's inverse; padding goes on at the end and comes off again.
"""

from torch import Tensor

from ringcompile import ops
from ringcompile.errors import OptionError
from ringcompile.ir.layout import Layout
from ringcompile.ir.reshard import ReshardSpec, format_spec
from ringcompile.lowering.inductor import sources_hash
from ringcompile.mesh import Ranks, find_ranks

TIMEOUT_S = 600.0


def shard(
    tensor: Tensor,
    dim: int,
    mesh: object = None,
    *,
    layout: str,
    segment: int | None = None,
) -> Tensor:
    """Take this rank's rows of a tensor that every rank holds whole.

    Args:
        tensor: the whole tensor, equal on all ranks.
        dim: the sequence.
        mesh: as the option ``mesh``; None for the default group.
        layout: ``contiguous``, ``zigzag``, ``striped`` or ``hilbert``.
        segment: of ``hilbert``, tokens in a segment: the largest of the pattern's, if
            it has some, as compiled graphs have it.

    Returns:
        This rank's rows. If the ranks can't share the rows evenly, the last row is
        repeated at the end of the layout's order until they can. One rank alone keeps
        the tensor, whatever the layout.

    Raises:
        OptionError: no such layout or dim, or this process has no place in the mesh.
    """
    ranks = find_ranks(mesh)
    _check_dim(tensor, dim)
    spec = _spec(Layout(layout, ranks.size, segment), ranks)
    if ranks.is_alone:
        return tensor
    rows: Tensor = ops.SHARD(tensor, dim, spec=spec)
    return rows


def unshard(
    tensor: Tensor,
    dim: int,
    mesh: object = None,
    *,
    layout: str,
    segment: int | None = None,
    length: int | None = None,
) -> Tensor:
    """Join the rows that ranks hold, in order, on every rank; ``shard`` undone.

    Args:
        tensor: this rank's rows.
        dim: the sequence.
        mesh: as for ``shard``.
        layout: the one that the tensor was sharded by.
        segment: as for ``shard``.
        length: rows of the whole; None: all of them, there is no padding.

    Returns:
        The whole tensor, equal on all ranks.

    Raises:
        OptionError: as for ``shard``; or ``length`` is not what such shards can hold.
    """
    ranks = find_ranks(mesh)
    _check_dim(tensor, dim)
    place = Layout(layout, ranks.size, segment)
    rows = tensor.shape[dim]
    whole = rows * ranks.size if length is None else length
    if place.shard_size(whole) != rows:
        raise OptionError(
            f"length={length}",
            at="unshard",
            because=f"{ranks.size} {layout} shards of {rows} rows are no such sequence",
            instead="the length of the tensor that was sharded",
        )
    if ranks.is_alone:
        return tensor
    joined: Tensor = ops.GATHER(tensor, dim, whole, spec=_spec(place, ranks))
    return joined


def _spec(layout: Layout, ranks: Ranks) -> str:
    return format_spec(
        ReshardSpec(layout, ranks.rank, ranks.group_name, TIMEOUT_S, sources_hash())
    )


def _check_dim(tensor: Tensor, dim: int) -> None:
    if not -tensor.dim() <= dim < tensor.dim():
        raise OptionError(
            f"dim={dim}",
            at="shard",
            because=f"the tensor has {tensor.dim()} dims",
            instead="the dim that is the sequence",
        )
