"""Each rule is proven on real tensors: where it links dims, the op is local."""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from ringcompile.passes.dims import Dims, Factors
from ringcompile.passes.op import Op, read_op, shape_of
from ringcompile.passes.rules import RULES, find_rule
from ringcompile.passes.rules.flow import Flow
from ringcompile.passes.rules.pointwise import broadcast

aten = torch.ops.aten

X = (2, 6, 4)


@dataclass(frozen=True)
class Case:
    """A function of float tensors of these shapes, and how many dims must be linked."""

    name: str
    fn: Callable[..., object]
    shapes: tuple[tuple[int, ...], ...]
    num_linked: int


def _ids() -> Tensor:
    return torch.arange(12).reshape(2, 6) % 5


CASES = [
    Case("relu", F.relu, (X,), 3),
    Case("add broadcast", torch.add, (X, (6, 1)), 3),
    Case("where", lambda x, y: torch.where(x > 0, x, y), (X, (4,)), 3),
    Case("to", lambda x: x.to(torch.float64), (X,), 3),
    Case("type_as", lambda x, y: x.type_as(y), (X, X), 3),
    Case("clamp", lambda x: x.clamp(0, 1), (X,), 3),
    Case("zeros_like", torch.zeros_like, (X,), 3),
    Case("dropout 0", lambda x: F.dropout(x, 0.0, training=True), (X,), 3),
    Case("feature_dropout 0", lambda x: F.dropout1d(x, 0.0, training=True), (X,), 3),
    Case("contiguous", lambda x: x.transpose(0, 1).contiguous(), (X,), 3),
    Case("view merges", lambda x: x.view(12, 4), (X,), 2),
    Case("view splits", lambda x: x.view(2, 6, 2, 2), (X,), 2),
    Case("view ones", lambda x: x.view(1, 2, 6, 1, 4), (X,), 3),
    Case("reshape", lambda x: x.reshape(2, 24), (X,), 2),
    Case("_unsafe_view", lambda x: aten._unsafe_view(x, [12, 4]), (X,), 2),
    Case("_reshape_alias", lambda x: aten._reshape_alias(x, [12, 4], [4, 1]), (X,), 2),
    Case("flatten", lambda x: x.flatten(0, 1), (X,), 2),
    Case("unflatten", lambda x: x.unflatten(2, (2, 2)), (X,), 2),
    Case("expand", lambda x: x.expand(3, 2, 6, 4), (X,), 3),
    Case("expand one", lambda x: x.expand(2, 6, 4), ((2, 1, 4),), 2),
    Case("permute", lambda x: x.permute(2, 0, 1), (X,), 3),
    Case("transpose", lambda x: x.transpose(0, 2), (X,), 3),
    Case("swapaxes", lambda x: torch.swapaxes(x, 0, 1), (X,), 3),
    Case("swapdims", lambda x: torch.swapdims(x, 0, 1), (X,), 3),
    Case("t", torch.t, ((6, 4),), 2),
    Case("mT", lambda x: x.mT, (X,), 3),
    Case("numpy_T", lambda x: x.T, ((6, 4),), 2),
    Case("unsqueeze", lambda x: x.unsqueeze(1), (X,), 3),
    Case("squeeze", lambda x: x.squeeze(1), ((2, 1, 6),), 2),
    Case("linear", F.linear, (X, (5, 4), (5,)), 3),
    Case("matmul", torch.matmul, (X, (2, 4, 5)), 3),
    Case("matmul broadcast", torch.matmul, (X, (4, 5)), 3),
    Case("mm", torch.mm, ((6, 4), (4, 5)), 2),
    Case("bmm", torch.bmm, (X, (2, 4, 5)), 3),
    Case("addmm", torch.addmm, ((5,), (6, 4), (4, 5)), 2),
    Case("baddbmm", torch.baddbmm, ((2, 6, 5), X, (2, 4, 5)), 3),
    Case("embedding", lambda w: F.embedding(_ids(), w), ((5, 4),), 3),
    Case("softmax", lambda x: x.softmax(-1), (X,), 2),
    Case("_softmax", lambda x: aten._softmax(x, 2, False), (X,), 2),
    Case("log_softmax", lambda x: x.log_softmax(1), (X,), 2),
    Case("_log_softmax", lambda x: aten._log_softmax(x, 1, False), (X,), 2),
    Case("cumsum", lambda x: x.cumsum(1), (X,), 2),
    Case("cumprod", lambda x: x.cumprod(1), (X,), 2),
    Case("diff", lambda x: x.diff(dim=1), (X,), 2),
    Case("flip", lambda x: x.flip(1), (X,), 2),
    Case("roll", lambda x: x.roll(1, 1), (X,), 2),
    Case("glu", lambda x: F.glu(x, -1), (X,), 2),
    Case("topk", lambda x: x.topk(2, -1)[0], (X,), 2),
    Case("sort", lambda x: x.sort(-1)[0], (X,), 2),
    Case("argsort", lambda x: x.argsort(-1), (X,), 2),
    Case("cat", lambda x, y: torch.cat([x, y], 1), (X, (2, 3, 4)), 2),
    Case("cat empty", lambda x: torch.cat([torch.tensor([]), x], 1), (X,), 3),
    Case("split", lambda x: x.split(2, -1)[1], (X,), 2),
    Case("split sizes", lambda x: x.split([1, 3], -1)[1], (X,), 2),
    Case("chunk", lambda x: x.chunk(2, -1)[0], (X,), 2),
    Case("narrow", lambda x: x.narrow(2, 1, 2), (X,), 2),
    Case(
        "gather",
        lambda x: x.gather(2, torch.zeros(2, 6, 1, dtype=torch.int64)),
        (X,),
        2,
    ),
    Case("layer_norm", lambda x, w, b: F.layer_norm(x, (4,), w, b), (X, (4,), (4,)), 2),
    Case("rms_norm", lambda x, w: F.rms_norm(x, (4,), w), (X, (4,)), 2),
    Case("sum", lambda x: x.sum(1), (X,), 2),
    Case("sum keepdim", lambda x: x.sum((0, 2), keepdim=True), (X,), 1),
    Case("mean", lambda x: x.mean(-1), (X,), 2),
    Case("amax", lambda x: x.amax(1), (X,), 2),
    Case("amin", lambda x: x.amin(1), (X,), 2),
    Case("max dim", lambda x: x.max(1)[0], (X,), 2),
    Case("max other", torch.max, (X, X), 3),
    Case("min dim", lambda x: x.min(1)[0], (X,), 2),
    Case("argmax", lambda x: x.argmax(1), (X,), 2),
    Case("argmin", lambda x: x.argmin(1), (X,), 2),
    Case("var", lambda x: x.var(1), (X,), 2),
    Case("std", lambda x: x.std(1), (X,), 2),
    Case("logsumexp", lambda x: x.logsumexp(1), (X,), 2),
    Case("prod", lambda x: x.prod(1), (X,), 2),
    Case("any", lambda x: x.any(1), (X,), 2),
    Case("all", lambda x: x.all(1), (X,), 2),
    Case("slice", lambda x: x[:, 1:4], (X,), 2),
    Case("slice whole", lambda x: aten.slice.Tensor(x, 1, 0, 2**63 - 1), (X,), 3),
    Case("select", lambda x: x[:, 2], (X,), 2),
    Case("pad", lambda x: F.pad(x, (0, 1)), (X,), 2),
    Case("constant_pad_nd", lambda x: aten.constant_pad_nd(x, [0, 0, 1, 0]), (X,), 2),
    Case("stack", lambda x, y: torch.stack([x, y], 1), (X, X), 3),
    Case("view_as", lambda x, y: x.view_as(y), (X, (12, 4)), 2),
    Case("view_as splits", lambda x, y: x.view_as(y), ((12, 4), X), 1),
    Case("expand_as", lambda x, y: x.expand_as(y), ((6, 1), X), 3),
    Case("movedim", lambda x: x.movedim(0, 2), (X,), 3),
    Case("moveaxis", lambda x: aten.moveaxis(x, [0, 1], [2, 0]), (X,), 3),
    Case("broadcast", lambda x, y: torch.broadcast_tensors(x, y)[1], (X, (6, 1)), 3),
    Case("repeat", lambda x: x.repeat(3, 1, 1, 2), (X,), 2),
    Case("repeat_interleave", lambda x: x.repeat_interleave(2, 1), (X,), 2),
    Case("unbind", lambda x: x.unbind(1)[2], (X,), 2),
    Case("tril", torch.tril, (X,), 1),
    Case("triu", torch.triu, (X,), 1),
    Case("one_hot", lambda: F.one_hot(_ids(), 5), (), 2),
    Case("index_select", lambda x: x.index_select(1, _ids()[0]), (X,), 2),
    Case("index", lambda x: x[:, _ids() % 2], (X,), 2),
    Case("index apart", lambda x: x[_ids() % 2, :, _ids() % 4], (X,), 1),
    Case("scatter", lambda x, y: x.scatter(2, y.argsort(-1)[..., :2], y), (X, X), 2),
    Case("scatter_add", lambda x, y: x.scatter_add(2, y.argsort(-1), y), (X, X), 2),
    Case(
        "select_scatter",
        lambda x, y: torch.select_scatter(x, y, 1, 2),
        (X, (2, 4)),
        2,
    ),
    Case(
        "slice_scatter",
        lambda x, y: torch.slice_scatter(x, y, 1, 2, 4),
        (X, (2, 2, 4)),
        2,
    ),
    Case("matmul vector", torch.matmul, (X, (4,)), 2),
    Case("vector matmul", torch.matmul, ((6,), X), 2),
    Case(
        "einsum",
        lambda x, y, z: torch.einsum("bse,bsf,e->bsf", x, y, z),
        (X, X, (4,)),
        3,
    ),
    Case("tensordot", lambda x, y: torch.tensordot(x, y, ([0], [1])), (X, (3, 2)), 3),
    Case("prelu", F.prelu, (X, (6,)), 3),
    Case(
        "alpha_dropout 0",
        lambda x: F.alpha_dropout(x, 0.0, training=True),
        (X,),
        3,
    ),
    Case("var_mean", lambda x: torch.var_mean(x, 1)[0], (X,), 2),
    Case("std_mean", lambda x: torch.std_mean(x, 1)[1], (X,), 2),
    Case("vector_norm", lambda x: x.norm(dim=1), (X,), 2),
    Case("nansum", lambda x: x.nansum(1), (X,), 2),
    Case("count_nonzero", lambda x: x.count_nonzero(1), (X,), 2),
    Case("batch_norm", lambda x, m: F.batch_norm(x, m, m * m), (X, (6,)), 2),
    Case("group_norm", lambda x: F.group_norm(x, 2), (X,), 1),
    Case("instance_norm", F.instance_norm, (X,), 1),
    Case("mse_loss", lambda x, y: F.mse_loss(x, y, reduction="none"), (X, X), 3),
    Case("l1_loss", lambda x, y: F.l1_loss(x, y, reduction="none"), (X, X), 3),
    Case(
        "smooth_l1_loss",
        lambda x, y: F.smooth_l1_loss(x, y, reduction="none"),
        (X, X),
        3,
    ),
    Case("huber_loss", lambda x, y: F.huber_loss(x, y, reduction="none"), (X, X), 3),
    Case("kl_div", lambda x, y: F.kl_div(x, y.exp(), reduction="none"), (X, X), 3),
    Case(
        "binary_cross_entropy",
        lambda x, y: F.binary_cross_entropy(x.sigmoid(), y.sigmoid(), reduction="none"),
        (X, X),
        3,
    ),
    Case(
        "binary_cross_entropy_with_logits",
        lambda x, y, w: F.binary_cross_entropy_with_logits(
            x, y, weight=w, pos_weight=w, reduction="none"
        ),
        (X, X, (4,)),
        3,
    ),
    Case(
        "cross_entropy",
        lambda x: F.cross_entropy(x, _ids()[:, :4], reduction="none"),
        (X,),
        2,
    ),
    Case(
        "cross_entropy soft",
        lambda x, y: F.cross_entropy(x, y, reduction="none"),
        (X, X),
        2,
    ),
    Case(
        "nll_loss_nd",
        lambda x: F.nll_loss(x, _ids()[:, :4], reduction="none"),
        (X,),
        2,
    ),
    Case(
        "nll_loss",
        lambda x: aten.nll_loss(x, _ids()[0], None, 0, -100),
        ((6, 5),),
        1,
    ),
    Case(
        "nll_loss2d",
        lambda x: aten.nll_loss2d(x, _ids().view(2, 3, 2), None, 0, -100),
        ((2, 5, 3, 2),),
        3,
    ),
    Case("cosine", lambda x, y: F.cosine_similarity(x, y, 2), (X, X), 2),
]

# Ops that take no operand with dims: their results are constants of a size.
CREATIONS = {aten.zeros, aten.ones, aten.full, aten.new_zeros, aten.new_ones}
CREATIONS |= {aten.new_full}


def _trace(case: Case) -> tuple[GraphModule, list[Tensor]]:
    inputs = [
        torch.randn(s, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        for i, s in enumerate(case.shapes)
    ]

    def call(*xs: Tensor) -> object:  # make_fx wants a signature it can read
        return case.fn(*xs)

    return make_fx(call, pre_dispatch=True, tracing_mode="fake")(*inputs), inputs


def _run(gm: GraphModule, inputs: list[Tensor]) -> dict[Node, Any]:
    values: dict[Node, Any] = {}
    pending = iter(inputs)
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(pending)
        elif node.op == "get_attr":
            values[node] = getattr(gm, str(node.target))
        elif node.op == "call_function":
            args = torch.fx.node.map_arg(node.args, values.__getitem__)
            kwargs = torch.fx.node.map_arg(node.kwargs, values.__getitem__)
            values[node] = node.target(*args, **kwargs)
    return values


def _last_op(gm: GraphModule) -> Op:
    ops = [op for n in gm.graph.nodes if (op := read_op(n)) is not None]
    return ops[-1]


def _first(value: object) -> Tensor:
    result = value[0] if isinstance(value, (tuple, list)) else value
    assert isinstance(result, Tensor)
    return result


def _flow(op: Op) -> tuple[Flow, Factors, list[Dims]]:
    factors = Factors()
    operands = [factors.new_dims(shape_of(node)) for node in op.slots]
    rule = find_rule(op)
    assert rule is not None, f"no rule for {op.packet}"
    flow = rule(op, factors, operands)
    assert flow is not None, f"the rule of {op.packet} refused"
    return flow, factors, operands


def _cut(x: Tensor, dim: int, outer: int, inner: int, rows: slice) -> Tensor:
    middle = x.shape[dim] // (outer * inner)
    shape = (*x.shape[:dim], outer, middle, inner, *x.shape[dim + 1 :])
    part = x.reshape(shape)
    part = part[(slice(None),) * (dim + 1) + (rows,)]
    return part.reshape(*x.shape[:dim], -1, *x.shape[dim + 1 :])


def _run_on_shard(
    op: Op, flow: Flow, operands: list[Tensor], result_dim: int
) -> object:
    if flow.is_view:
        sizes = [int(n) for n in shape_of(op.node)]
        sizes[result_dim] = -1
        return operands[0].reshape(sizes)
    pending = iter(operands)
    args = {
        k: torch.fx.node.map_arg(v, lambda _: next(pending)) for k, v in op.args.items()
    }
    if flow.sizes is not None:
        args[flow.sizes] = [
            -1 if d == result_dim else n for d, n in enumerate(args[flow.sizes])
        ]
    return op.node.target(**args)  # type: ignore[operator]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_an_op_is_local_along_every_link_of_its_rule(case: Case) -> None:
    gm, inputs = _trace(case)
    op = _last_op(gm)
    flow, factors, operand_dims = _flow(op)
    values = _run(gm, inputs)
    operands = [_first(values[n]) for n in op.slots]
    whole = _first(values[op.node])
    linked = 0
    for result_dim, dim in enumerate(flow.dims):
        for place, factor in enumerate(dim):
            cuts = _cuts_of(flow, factors, operand_dims, result_dim, factor)
            if not cuts:
                continue
            linked += 1
            rows = slice(1, None)
            parts = [
                _cut(x, *cuts[slot], rows) if slot in cuts else x
                for slot, x in enumerate(operands)
            ]
            outer = int(factors.product(dim[:place]))
            inner = int(factors.product(dim[place + 1 :]))
            expected = _cut(whole, result_dim, outer, inner, rows)
            got = _first(_run_on_shard(op, flow, parts, result_dim))
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert linked >= case.num_linked


def _cuts_of(
    flow: Flow,
    factors: Factors,
    operands: list[Dims],
    result_dim: int,
    factor: int,
) -> dict[int, tuple[int, int, int]]:
    """Which operands to cut, and where, to cut the result along one factor."""
    cuts = {}
    for link in flow.links:
        if link.result_dim != result_dim:
            continue
        dim = operands[link.slot][link.operand_dim]
        for place, other in enumerate(dim):
            if factors.find(other) == factors.find(factor):
                outer = int(factors.product(dim[:place]))
                inner = int(factors.product(dim[place + 1 :]))
                cuts[link.slot] = (link.operand_dim, outer, inner)
    return cuts


def test_every_rule_is_proven() -> None:
    proven = {_last_op(_trace(case)[0]).packet for case in CASES}
    unproven = [
        str(packet)
        for packet, rule in RULES.items()
        if packet not in proven | CREATIONS and rule is not broadcast
    ]
    assert unproven == []


def test_reductions_link_nothing_along_what_they_sum() -> None:
    gm, _ = _trace(Case("sum", lambda x: x.sum(1), (X,), 2))
    flow, _, _ = _flow(_last_op(gm))
    assert all(link.operand_dim != 1 for link in flow.links)


def test_random_ops_are_not_local() -> None:
    gm, _ = _trace(Case("dropout", lambda x: F.dropout(x, 0.5), (X,), 0))
    op = _last_op(gm)
    rule = find_rule(op)
    assert rule is not None
    factors = Factors()
    flow = rule(op, factors, [factors.new_dims(X)])
    assert flow is not None
    assert not flow.links
    gm, _ = _trace(Case("rand", torch.rand_like, (X,), 0))
    assert find_rule(_last_op(gm)) is None


def test_an_unknown_op_has_no_rule() -> None:
    gm, _ = _trace(Case("fft", torch.fft.fft, (X,), 0))
    assert find_rule(_last_op(gm)) is None
    assert operator.getitem not in RULES


def test_nothing_is_told_of_the_dims_of_an_empty_view() -> None:
    factors = Factors()
    dims = factors.new_dims((2, 0, 3))
    assert factors.view(dims, (0, 3)) not in ((dims[0], dims[2]), dims)
    assert [factors.product(d) for d in factors.view(dims, (6, 0))] == [6, 0]
