"""One attention run through the ring op on some ranks, and what it should give."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.fx import GraphModule

import ringcompile.lowering  # noqa: F401
from ringcompile import ops
from ringcompile.ir import mask as m
from ringcompile.ir.attention import RankPlan
from ringcompile.ir.layout import Layout, Side
from ringcompile.ir.mask import EmptyRow, Mask
from ringcompile.ir.schedule import MixedParts, Mixing, Selection, Ulysses
from ringcompile.ir.text import format_plan
from ringcompile.lowering.inductor import inductor_patches
from ringcompile.patterns import BigBird
from ringcompile.patterns.base import AttentionSpec
from ringcompile.plan.stages import build_schedule
from ringcompile.torch_private import compile_with_inductor
from support import dense
from support.compiling import compile_expanded
from support.ranks import RankPool

SCALE = 0.3


@dataclass(frozen=True)
class Case:
    """One attention.

    Attributes:
        masks: name of a mask of ``MASKS``.
        layout: name of a layout.
        length: tokens S.
        heads: H, G, D, E.
        dtype: of q, k and v.
        empty: what a row with no key gives.
        stages: at most so many; None: one per step.
        needs_grad: of q, k, v.
        compile: ``eager``; ``expanded``: eager too, but as graphs in which rings are
            written out; or ``inductor``.
        any_length: plan for any length that needs no padding.
        segment: of a hilbert layout.
        block_order: ``natural`` or ``hilbert``.
        level: of a hilbert layout.
        kernel: ``auto`` or ``math``.
        keys: how many keys, of another sequence than the queries; None: their own.
        key_layout: name of the layout of those.
        ulysses: how many ranks deal out heads among themselves.
    """

    mask: str
    layout: str = "contiguous"
    length: int = 48
    heads: tuple[int, int, int, int] = (4, 2, 8, 8)
    dtype: torch.dtype = torch.float32
    empty: EmptyRow = EmptyRow.ZERO
    stages: int | None = None
    needs_grad: tuple[bool, bool, bool] = (True, True, True)
    compile: str = "eager"
    any_length: bool = False
    segment: int | None = None
    block_order: str = "natural"
    level: int | None = None
    kernel: str = "auto"
    keys: int | None = None
    key_layout: str = "contiguous"
    ulysses: int = 1

    @property
    def num_keys(self) -> int:
        """Rows of k and v."""
        return self.keys or self.length

    def sides(self, cp_size: int) -> tuple[Side, Side]:
        """Where queries and keys lie."""
        queries = Side(self.place(cp_size), self.length)
        if self.keys is None:
            return queries, queries
        return queries, Side(Layout(self.key_layout, cp_size), self.keys)

    def place(self, cp_size: int) -> Layout:
        """The layout over so many ranks."""
        return Layout(self.layout, cp_size, self.segment, self.level)

    def with_length(self, length: int) -> "Case":
        """The same attention of so many tokens."""
        return replace(self, length=length)

    @property
    def captures(self) -> list[Tensor]:
        """What the mask reads, ``(B, S)`` each, S the number of keys."""
        S = self.num_keys
        documents = torch.stack([torch.arange(S) * 3 // S, torch.arange(S) * 5 // S])
        padding = torch.ones(2, S, dtype=torch.int64)
        padding[0, : S // 3] = 0  # left, as for generation
        padding[1, S - S // 4 :] = 0
        return [documents, padding]

    @property
    def parts(self) -> list[tuple[Mask, Selection | None]]:
        """The masks and selections whose results are merged."""
        parts = MASKS[self.mask](self)
        return [(Mask(p.keeps, 2, self.empty), selection) for p, selection in parts]

    @property
    def mixing(self) -> Mixing:
        """How the parts' outputs become one."""
        return Mixing(is_detached="detached" in self.mask)

    def shard(self, size: int, rank: int) -> list[Tensor]:
        """A rank's rows of q, k and v, as a compiler is given them, and of the gradient.

        Of a plan for any length their number is dynamic.
        """
        at = torch.tensor(self.place(size).positions(rank, self.length))
        *inputs, grad = (x[:, :, at] for x in self.tensors())
        for x in inputs:
            if self.any_length:
                torch._dynamo.mark_dynamic(x, 2)
            x.requires_grad_()
        return [*inputs, grad]

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and the gradient of the output, all rows, rounded to the dtype."""
        H, G, D, E = self.heads
        random = torch.Generator().manual_seed(0)
        sizes = [(H, D), (G, D), (G, E), (H, E)]
        lengths = (self.length, self.num_keys, self.num_keys, self.length)
        q, k, v, grad = (
            torch.randn(2, heads, rows, dim, generator=random, dtype=torch.double)
            for (heads, dim), rows in zip(sizes, lengths, strict=True)
        )
        q, k, v, grad = (x.to(self.dtype) for x in (q, k, v, grad))
        return q, k, v, grad

    def expected(self) -> tuple[Tensor, ...]:
        """out, dq, dk and dv by the dense reference, in float64."""
        q, k, v, grad = (x.double() for x in self.tensors())
        inputs = [x.requires_grad_() for x in (q, k, v)]
        out = self.attend_dense(*inputs)
        return out.detach(), *torch.autograd.grad(out, inputs, grad)

    def attend_dense(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The attention of all rows, densely."""
        shape = (2, self.heads[0], self.length)
        by_part = torch.stack(
            [
                dense.keeps(mask, self.captures, shape, self.keys)
                for mask, _ in self.parts
            ]
        )
        if self.mixing.is_detached:
            return dense.attend_detached(q, k, v, by_part, SCALE)
        return dense.attend(q, k, v, by_part.sum(0), SCALE, self.empty)


Parts = list[tuple[Mask, Selection | None]]


def _longnet(case: Case) -> Parts:
    """SEMANTICS.md 2A with offset "paper", under a causal mask."""
    parts: Parts = []
    for segment, rate in ((8, 1), (24, 2), (48, 4)):
        offset = m.H % rate
        keeps = m.TRUE
        for at in (m.Q, m.K):
            keeps &= m.equals_zero((at % segment) % rate - offset)
        keeps &= m.chunked(segment)
        keeps &= m.causal()
        offsets = tuple(h % rate for h in range(case.heads[0]))
        parts.append((Mask(keeps), Selection(segment, rate, offsets, case.heads[1])))
    return parts


def _local_window(_case: Case) -> Parts:
    """SEMANTICS.md section 3, blocks of 8 tokens, window of 16."""
    i, j = sympy.floor(m.Q / 8), sympy.floor(m.K / 8)
    near = m.at_least_zero(1 - (i - j)) & m.at_least_zero(1 - (j - i))
    return [(Mask(near & m.causal()), None)]


def _wide_blocks(_case: Case) -> Parts:
    """Blocks of 8 tokens: their own and the two before."""
    i, j = sympy.floor(m.Q / 8), sympy.floor(m.K / 8)
    return [(Mask(m.at_least_zero(2 - (i - j)) & m.causal()), None)]


def _global_local(_case: Case) -> Parts:
    """SEMANTICS.md section 3, blocks of 4 tokens: the first for all, and neighbours."""
    i, j = sympy.floor(m.Q / 4), sympy.floor(m.K / 4)
    near = m.at_least_zero(1 - (i - j)) & m.at_least_zero(1 - (j - i))
    first = m.disjunction(m.equals_zero(i), m.equals_zero(j))
    return [(Mask(m.disjunction(near, first)), None)]


def _big_bird(case: Case) -> Parts:
    """SEMANTICS.md section 3, blocks of 64 tokens, causal."""
    H, G, *_ = case.heads
    keeps = BigBird(5, 2, 1).keeps(AttentionSpec(H, G, case.length, is_causal=True))
    return [(Mask(keeps & m.causal()), None)]


def _plain(keeps: Boolean) -> Callable[[Case], Parts]:
    return lambda _case: [(Mask(keeps), None)]


MASKS: dict[str, Callable[[Case], Parts]] = {
    "all": _plain(m.TRUE),
    "causal": _plain(m.causal()),
    "window": _plain(m.causal() & m.window(9)),
    "wide window": _plain(m.causal() & m.window(17)),
    "dilated window": _plain(
        m.causal() & m.window(51) & m.equals_zero(sympy.Mod(m.Q - m.K, 3))
    ),
    "window of every fourth": _plain(
        m.causal() & m.window(67) & m.equals_zero(sympy.Mod(m.Q - m.K, 4))
    ),
    "narrow dilated window": _plain(
        m.causal() & m.window(21) & m.equals_zero(sympy.Mod(m.Q - m.K, 3))
    ),
    "two-sided window": _plain(m.window(5, 7)),
    "documents": _plain(m.causal() & m.documents(0)),
    "padding": _plain(m.causal() & m.key_padding(1)),
    "bidirectional padding": _plain(m.key_padding(1)),
    "longnet": _longnet,
    "detached longnet": lambda case: _longnet(case)[1:],
    "local window": _local_window,
    "wide blocks": _wide_blocks,
    "global local": _global_local,
    "big bird": _big_bird,
    "window and first": _plain(
        m.causal() & m.disjunction(m.window(70), m.at_least_zero(19 - m.K))
    ),
}


def plan_text(case: Case, group: ProcessGroup, rank: int, *, timeout_s: float) -> str:
    """The plan that the op carries on one rank."""
    length = None if case.any_length else case.length
    parts = MixedParts(tuple(case.parts), case.mixing)
    layout, keys = case.place(group.size()), None
    if case.keys is not None:
        (_, keys) = case.sides(group.size())
        keys = replace(keys, length=None) if case.any_length else keys
    ulysses = Ulysses()
    if case.ulysses > 1:
        ulysses = Ulysses(case.ulysses, layout.chunks_per_rank)
        layout = layout.merge(case.ulysses)
    schedule = build_schedule(parts, layout, length, num_stages=case.stages, keys=keys)
    schedule = replace(schedule, ulysses=ulysses)
    return format_plan(
        RankPlan(
            index=3,
            name="test",
            rank=rank // case.ulysses,
            member=rank % case.ulysses,
            group_name=group.group_name,
            scale=SCALE,
            timeout_s=timeout_s,
            schedule=schedule,
            sources="",
            block_order=case.block_order,
            kernel=case.kernel,
        )
    )


def run_case(group: ProcessGroup, rank: int, case: Case) -> tuple[Tensor | None, ...]:
    """This rank's rows of out, dq, dk and dv."""
    places = []
    for layout, length in (
        (side.layout, side.length) for side in case.sides(group.size())
    ):
        assert length is not None
        at = torch.tensor(layout.positions(rank, length))
        places.append((at.clamp(max=length - 1), at < length))
    (of_q, is_real), (of_kv, is_real_key) = places
    own = [
        x[:, :, at]
        for x, at in zip(case.tensors(), (of_q, of_kv, of_kv, of_q), strict=True)
    ]
    *inputs, grad = own
    for x, needed in zip(inputs, case.needs_grad, strict=True):
        x.requires_grad_(needed)
    attend = compile_ring(plan_text(case, group, rank, timeout_s=60.0), case)
    out = attend(*inputs, case.captures)
    if any(case.needs_grad):
        out.backward(grad * is_real[:, None])  # a pad's cotangent is zero
    results = (out.detach(), *(x.grad for x in inputs))
    real = (is_real, is_real, is_real_key, is_real_key)
    return tuple(
        None if x is None else x[:, :, rows]
        for x, rows in zip(results, real, strict=True)
    )


def run_inference(group: ProcessGroup, rank: int, case: Case) -> Tensor:
    """This rank's rows of out."""
    with torch.no_grad():
        out = run_case(group, rank, case)[0]
    assert out is not None
    return out


def compile_ring(
    plan: str, case: Case, *, dynamic: bool | None = None
) -> Callable[..., Tensor]:
    """The ring op as a function of q, k, v, captures, and of biases and sinks if any."""

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        captures: list[Tensor],
        biases: Sequence[Tensor] = (),
        sinks: Tensor | None = None,
    ) -> Tensor:
        out: Tensor = ops.RING_ATTENTION(
            *(q, k, v, captures, list(biases), sinks), plan=plan
        )
        return out

    if case.compile == "eager":
        return attend
    torch.compiler.reset()  # Dynamo counts what it compiled by code object
    backend = compile_expanded if case.compile == "expanded" else _inductor
    return torch.compile(attend, backend=backend, fullgraph=True, dynamic=dynamic)


def _inductor(gm: GraphModule, example_inputs: list[Tensor]) -> Callable[..., object]:
    return compile_with_inductor(gm, example_inputs, inductor_patches({}))


def run_cases(
    group: ProcessGroup, rank: int, cases: tuple[Case, ...]
) -> list[tuple[Tensor | None, ...]]:
    return [run_case(group, rank, case) for case in cases]


def join(
    case: Case, shards: Iterable[Tensor | None], *, of_keys: bool = False
) -> Tensor:
    """All rows in the user's order, from each rank's real ones."""
    found = [x for x in shards if x is not None]
    side = case.sides(len(found))[of_keys]
    assert side.length is not None
    order = [p for p in side.layout.permutation(side.length) if p < side.length]
    return torch.cat(found, 2)[:, :, torch.tensor(order).argsort()]


NAMES = ("out", "dq", "dk", "dv")
_LIMITS = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 1e-2}


def check_cases(ranks: RankPool, world_size: int, cases: Sequence[Case]) -> None:
    """Run cases on so many ranks, and compare each with the dense reference."""
    results = ranks.run(run_cases, tuple(cases), world_size=world_size)
    for case, *by_rank in zip(cases, *results, strict=True):
        for name, want, shards, is_needed in zip(
            NAMES,
            case.expected(),
            zip(*by_rank, strict=True),
            (True, *case.needs_grad),
            strict=True,
        ):
            if not is_needed:
                assert all(x is None for x in shards), (case, name)
                continue
            got = join(case, shards)
            assert got.dtype == case.dtype
            error = (got.double() - want).abs().max() / want.abs().max()
            assert error < _LIMITS[case.dtype], (case, name, error)
