"""The ops that passes write into graphs and that lowering gives meaning to.

Only schemas and shapes live here. Kernels are registered by ``ringcompile.lowering``;
invariant: every op is functional (no argument is written, no result is an argument).
"""

from collections.abc import Sequence

import torch
from torch import SymInt, Tensor

LIBRARY = torch.library.Library("ringcompile", "DEF")

# Schemas end with a semicolon; the grammar has no comments, so here is the glossary.
#   ring_attention  attention of local shards; k and v may be of another sequence than
#                   q, of other lengths and layout. `captures` are full and replicated,
#                   `biases` are as the plan says, `sinks` (H,) are scores of one more
#                   key per head, whose value is 0. `plan` is `ir.text.format_plan` of
#                   a `RankPlan`.
#   ring_forward    the ring of an attention, whole: out in the dtype of q and lse, then
#                   each part's own out where its weights are detached.
#   ring_backward   its gradients, of `outs`, all or the parts' own: of q, k, v, sinks,
#                   the biases and, where `num_blocks` says how many there are, of the
#                   scores summed over blocks, as far as they are `needed`. Inductor
#                   lowers neither: `lowering.expand` writes the ring out.
#   shard ... scale_grad  reshards, with the transposes of DESIGN.md section 3. `spec`
#                   is `ir.reshard.format_spec` of a `ReshardSpec`. The cut dim may be a
#                   flattening [outer, length, inner]; pads copy the last position, or
#                   are `fill`.
#   find_kept       which elements dropout keeps, by a hash of a seed and of where they
#                   stand: `at` are indices that broadcast against each other.
#   hop, all_gather start communication, `_c10d_functional.wait_tensor` ends it. `deps`
#                   only order; dst or src = -1: no peer, no rows.
#   all_reduce      sums over the ranks, which are there when it returns.
#   exchange        heads for rows, or rows for heads, among the ranks of `Ulysses`; a
#                   tensor for each of `xs`. `kind` is `lowering.hops.Exchange`.
#   join            as `torch.cat`; what makes a tensor writes it to its place, where
#                   of `cat` Inductor may make one kernel that asks of each element
#                   whose it is.
#   store           a copy of x that is in memory before a generated kernel reads it.
#   keep            a copy of x that is saved for backward, and makes `deps` needed.
#   row_table       rows of a shard that take part, (heads, n) int64, -1 for no row; or
#                   which of them travel, and where.
#   block_lists     numbers and indices of blocks of keys under a mask, then of full
#                   ones, for each block of queries, as `flex_attention` has them; then
#                   those of blocks of queries for each block of keys.
#   list_blocks     the same, of blocks whose pairs all count, and whose may.
#   block_table     what a table of blocks holds, as `ir.evaluate.table_values` has it.
#   sum_up_blocks   means of blocks of q and k, equal on all ranks; see lowering.
#   choose_blocks   the key blocks that each query block keeps, (B, H, num_blocks,
#                   count) int64, -1 for none.
#   masked_attention  one tile. Positions are (H or 1, n) and (G or 1, m) int64 with -1
#                   for no row, `mask` is text of a `Mask`. out and lse are float32, or
#                   float64 for float64. The backward takes the merged out and lse.
#                   `block_order` is `natural` or `hilbert` (SEMANTICS.md 4b).
#                   `dropout` of weights; `seed` is the capture that holds its seed.
#                   `softcap` and `biases` change scores as `ir.attention` says; rows of
#                   a bias are the tile's n queries or one, its columns those of all
#                   keys. `relative` are numbers of biases. The backward gives dq, dk,
#                   dv and gradients of the biases of which `learned` are the numbers:
#                   where a bias has a column per key, of the tile's m keys.
#   block_gradients gradients of the scores, summed over blocks of queries and keys:
#                   (B, H, num_blocks, num_blocks).
_SCHEMAS = """
ring_attention(Tensor q, Tensor k, Tensor v, Tensor[] captures, Tensor[] biases,
    Tensor? sinks=None, *, str plan) -> Tensor;
ring_forward(Tensor q, Tensor k, Tensor v, Tensor[] captures, Tensor[] biases,
    Tensor? sinks, *, str plan) -> Tensor[];
ring_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor[] outs, Tensor lse,
    Tensor[] captures, Tensor[] biases, Tensor? sinks, *, bool[] needed,
    SymInt? num_blocks, str plan) -> Tensor[];

shard(Tensor x, int dim, SymInt outer=1, SymInt inner=1, *, str spec,
    Scalar? fill=None) -> Tensor;
gather(Tensor x, int dim, SymInt length, SymInt outer=1, SymInt inner=1, *,
    str spec) -> Tensor;
reduce(Tensor x, *, str spec) -> Tensor;
spread(Tensor[] xs, *, str spec) -> Tensor[];
scale_grad(Tensor x, float factor) -> Tensor;

find_kept(Tensor seed, Tensor[] at, float rate) -> Tensor;

hop(Tensor[] payload, Tensor[] deps, int dst, int src, SymInt[] recv_rows, int tag,
    str group_name, float timeout_s, str transport="p2p") -> Tensor[];
all_gather(Tensor x, int cp_size, int tag, str group_name, float timeout_s) -> Tensor;
all_reduce(Tensor[] xs, int tag, str group_name, float timeout_s) -> Tensor[];

keep(Tensor x, Tensor[] deps) -> Tensor;
exchange(Tensor[] xs, *, int kind, str plan) -> Tensor[];
join(Tensor[] xs, int dim) -> Tensor;
store(Tensor x) -> Tensor;

row_table(str spec, *, Device device) -> Tensor;
block_lists(str spec, *, Device device) -> Tensor[];
block_table(str name, *, Device device) -> Tensor;
list_blocks(Tensor must, Tensor may) -> Tensor[];
sum_up_blocks(Tensor q, Tensor k, Tensor[] captures, *, str plan) -> (Tensor q_means,
    Tensor k_means, Tensor has_key);
choose_blocks(Tensor scores, Tensor has_key, int count, bool is_causal) -> Tensor;

masked_attention(Tensor q, Tensor k, Tensor v, Tensor q_pos, Tensor k_pos,
    Tensor[] captures, Tensor[] biases, *, str mask, float scale,
    str block_order="natural", float dropout=0.0, int seed=-1, float? softcap=None,
    int[] relative=[]) -> (Tensor out, Tensor lse);
masked_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out,
    Tensor lse, Tensor q_pos, Tensor k_pos, Tensor[] captures, Tensor[] biases, *,
    str mask, float scale, str block_order="natural", float dropout=0.0, int seed=-1,
    float? softcap=None, int[] relative=[], int[] learned=[]) -> Tensor[];
block_gradients(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
    Tensor q_pos, Tensor k_pos, Tensor[] captures, Tensor[] biases, SymInt num_blocks,
    int block, *, str mask, float scale, float dropout=0.0, int seed=-1,
    float? softcap=None, int[] relative=[]) -> Tensor;
"""

for _schema in _SCHEMAS.split(";")[:-1]:
    LIBRARY.define(" ".join(_schema.split()), tags=(torch.Tag.pt2_compliant_tag,))

_OPS = torch.ops.ringcompile
RING_ATTENTION = _OPS.ring_attention.default
RING_FORWARD = _OPS.ring_forward.default
RING_BACKWARD = _OPS.ring_backward.default
SHARD = _OPS.shard.default
GATHER = _OPS.gather.default
REDUCE = _OPS.reduce.default
SPREAD = _OPS.spread.default
SCALE_GRAD = _OPS.scale_grad.default
FIND_KEPT = _OPS.find_kept.default
HOP = _OPS.hop.default
ALL_GATHER = _OPS.all_gather.default
ALL_REDUCE = _OPS.all_reduce.default
KEEP = _OPS.keep.default
EXCHANGE = _OPS.exchange.default
JOIN = _OPS.join.default
STORE = _OPS.store.default
ROW_TABLE = _OPS.row_table.default
BLOCK_LISTS = _OPS.block_lists.default
BLOCK_TABLE = _OPS.block_table.default
LIST_BLOCKS = _OPS.list_blocks.default
SUM_UP_BLOCKS = _OPS.sum_up_blocks.default
CHOOSE_BLOCKS = _OPS.choose_blocks.default
MASKED_ATTENTION = _OPS.masked_attention.default
BLOCK_GRADIENTS = _OPS.block_gradients.default
MASKED_ATTENTION_BACKWARD = _OPS.masked_attention_backward.default


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What results of ``dtype`` are merged and summed in: float32, or float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.register_fake("ringcompile::hop", lib=LIBRARY)
def _hop_shapes(
    payload: Sequence[Tensor],
    deps: Sequence[Tensor],
    dst: int,
    src: int,
    recv_rows: Sequence[int | SymInt],
    *_rest: object,
) -> list[Tensor]:
    return [
        x.new_empty((*x.shape[:-2], rows, x.shape[-1]))
        for x, rows in zip(payload, recv_rows, strict=True)
    ]


@torch.library.register_fake("ringcompile::all_gather", lib=LIBRARY)
def _all_gather_shape(x: Tensor, cp_size: int, *_rest: object) -> Tensor:
    return x.new_empty((cp_size, *x.shape))


@torch.library.register_fake("ringcompile::all_reduce", lib=LIBRARY)
def _all_reduce_shapes(xs: Sequence[Tensor], *_rest: object) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in xs]


@torch.library.register_fake("ringcompile::keep", lib=LIBRARY)
def _keep_shape(x: Tensor, _deps: Sequence[Tensor]) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("ringcompile::join", lib=LIBRARY)
def _join_shape(xs: Sequence[Tensor], dim: int) -> Tensor:
    return torch.cat(list(xs), dim)


@torch.library.register_fake("ringcompile::masked_attention", lib=LIBRARY)
def _masked_shapes(
    q: Tensor, _k: Tensor, v: Tensor, *_rest: object, **_options: object
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(q.dtype)
    out = q.new_empty((*q.shape[:-1], v.shape[-1]), dtype=dtype)
    return out, q.new_empty(q.shape[:-1], dtype=dtype)


@torch.library.register_fake("ringcompile::block_gradients", lib=LIBRARY)
def _block_gradient_shape(
    _grad_out: Tensor, q: Tensor, *rest: object, **_options: object
) -> Tensor:
    num_blocks: int = rest[8]  # type: ignore[assignment]
    shape = (*q.shape[:2], num_blocks, num_blocks)
    return q.new_empty(shape, dtype=accumulation_dtype(q.dtype))


@torch.library.register_fake("ringcompile::masked_attention_backward", lib=LIBRARY)
def _masked_backward_shapes(
    _grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *rest: Tensor | Sequence[Tensor],
    relative: Sequence[int] = (),
    learned: Sequence[int] = (),
    **_options: object,
) -> list[Tensor]:
    shapes = [x.shape for x in (q, k, v)]
    for n in learned:
        shape = rest[-1][n].shape
        of_keys = n not in relative and shape[3] != 1
        shapes.append(torch.Size((*shape[:3], k.shape[2])) if of_keys else shape)
    dtype = accumulation_dtype(q.dtype)
    return [q.new_empty(shape, dtype=dtype) for shape in shapes]
