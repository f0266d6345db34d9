"""``inputs="sharded"``: each rank passes its rows and gets its rows of eager's."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.compiling import compile_ring
from support.ranks import RankPool
from support.sampling import slow
from support.tolerances import assert_gradients_equal, assert_output_equal
from support.training import build_llama, count_rings, without_codegen
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.distributed import ProcessGroup
from torch.fx import GraphModule

import ringcompile
from ringcompile.config import RingOptions
from ringcompile.errors import OptionError, RankMismatchError, RingCompileError
from ringcompile.mesh import Ranks
from ringcompile.passes.pipeline import run_passes

WIDTH, HEADS = 16, 4


class Block(nn.Module):
    """Attention with a mask of positions and document ids; a mean over the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, documents: Tensor, weights: Tensor) -> Any:  # noqa: ANN401
        batch, length, _ = x.shape
        qkv = self.qkv(self.norm(x)).view(batch, length, 3, HEADS, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        at = torch.arange(length)
        mask = (at[:, None] >= at) & (
            documents[:, None, :, None] == documents[:, None, None]
        )
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        y = x + self.out(y.transpose(1, 2).flatten(2))
        # The last token's position is the whole sequence's; weights meet no attention.
        return y * at[:, None], y.mean(1), y[:, -1], weights.cumsum(1)


def make_inputs(length: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    documents = torch.arange(length).mul(3).div(length, rounding_mode="floor")
    return (
        torch.randn(2, length, WIDTH, generator=generator),
        torch.stack([documents, documents // 2]),
        torch.rand(2, length, generator=generator),
    )


def check_block(group: ProcessGroup, rank: int, layout: str) -> None:
    size = dist.get_world_size(group)
    torch.manual_seed(0)
    model = Block()
    reference = copy.deepcopy(model).double()
    options = {"inputs": "sharded", "layout": layout}
    call, record = compile_ring(
        model, group, compiler="aot_eager", options=options, dynamic=True
    )

    def own(x: Tensor) -> Tensor:
        return ringcompile.shard(x, 1, group, layout=layout).clone()

    counts = []
    for length in (6 * size, 10 * size, 14 * size):
        x, documents, weights = make_inputs(length)
        model.zero_grad()
        reference.zero_grad()
        whole = x.double().requires_grad_()
        mine = own(x).requires_grad_()
        want = reference(whole, documents, weights.double())
        got = call(mine, own(documents), own(weights))
        assert_output_equal(got[0], own(want[0]))
        for a, b in zip(got[1:], want[1:], strict=True):
            assert_output_equal(a, b)
        # A rank's rows are in its own part of the loss, the others in every rank's.
        loss = want[0].square().sum() + want[1].sum() + want[2].square().sum()
        loss.backward()
        (got[0].square().sum() + got[1].sum() + got[2].square().sum()).backward()
        assert whole.grad is not None
        assert mine.grad is not None
        grads = {n: p.grad for n, p in model.named_parameters()} | {"x": mine.grad}
        wanted = {n: p.grad for n, p in reference.named_parameters()}
        assert_gradients_equal(grads, wanted | {"x": own(whole.grad)})
        counts.append(record.num_graphs)
    assert len(set(counts)) == 1
    assert len(record.rings) == record.num_graphs
    assert record.refused == []
    gathered = "input l_weights_: no attention's tokens are known to be its rows"
    assert record.gathers.count(gathered) == record.num_graphs


@pytest.mark.slow
def test_a_block_on_shards(ranks: RankPool) -> None:
    ranks.run(check_block, "zigzag", world_size=3)


@pytest.mark.slow
@pytest.mark.parametrize("cp_size", [2, 3, 4])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_a_block_in_each_layout(ranks: RankPool, layout: str, cp_size: int) -> None:
    ranks.run(check_block, layout, world_size=cp_size)


def check_llama(group: ProcessGroup, rank: int, compiler: str) -> None:
    """An unmodified model: ids and labels are gathered, positions are global."""
    model = build_llama()
    reference = copy.deepcopy(model).double()
    options = {"inputs": "sharded", "layout": "zigzag"}
    call, record = compile_ring(
        model, group, compiler=compiler, options=options, dynamic=True
    )
    ids = torch.randint(0, 67, (2, 28), generator=torch.Generator().manual_seed(1))
    padding = torch.ones_like(ids)
    padding[1, 20:] = 0
    inputs = {"input_ids": ids, "attention_mask": padding, "labels": ids}

    def own(x: Tensor) -> Tensor:
        return ringcompile.shard(x, 1, group, layout="zigzag")

    want = reference(**inputs)
    got = call(**{name: own(x) for name, x in inputs.items()})
    assert_output_equal(got.loss, want.loss.double())  # its softmax is of float32
    assert_output_equal(got.logits, own(want.logits))
    want.loss.backward()
    got.loss.backward()
    assert_gradients_equal(
        {n: p.grad for n, p in model.named_parameters()},
        {n: p.grad for n, p in reference.named_parameters()},
    )
    assert len(record.rings) == 2 * record.num_graphs
    assert record.refused == []
    assert record.gathers == []


@pytest.mark.parametrize("compiler", ["eager", slow("aot_eager")])
def test_an_unmodified_llama_on_shards(ranks: RankPool, compiler: str) -> None:
    ranks.run(check_llama, compiler, world_size=2)


def check_layers(group: ProcessGroup, rank: int) -> None:
    """Each layer is compiled alone; what lies between them runs on shards, eagerly."""
    model = build_llama()
    reference = copy.deepcopy(model).double()
    options: Any = {"inputs": "sharded", "layout": "zigzag", "mesh": group}
    with without_codegen() as found:
        for layer in model.model.layers:
            layer.compile(backend="ring", dynamic=True, options=options)
        ids = torch.randint(0, 67, (2, 20), generator=torch.Generator().manual_seed(1))

        def own(x: Tensor) -> Tensor:
            return ringcompile.shard(x, 1, group, layout="zigzag")

        def run(model: Any, ids: Tensor, at: Tensor) -> Tensor:  # noqa: ANN401
            x = model.model.embed_tokens(ids)
            places = model.model.rotary_emb(x, at)
            for layer in model.model.layers:
                x = layer(x, position_embeddings=places, attention_mask=None)
            logits: Tensor = model.lm_head(model.model.norm(x))
            return logits

        at = torch.arange(20)[None]
        want = run(reference, ids, at)
        got = run(model, own(ids), own(at))
        assert_output_equal(got, own(want))
        want.square().sum().backward()
        got.square().sum().backward()
    assert count_rings(found) == len(found) >= 1
    inside = model.model.layers.state_dict().keys()
    grads = {n: p.grad for n, p in model.model.layers.named_parameters()}
    assert set(grads) == set(inside)
    assert_gradients_equal(
        grads, {n: p.grad for n, p in reference.model.layers.named_parameters()}
    )


@pytest.mark.slow
def test_layers_compiled_one_by_one(ranks: RankPool) -> None:
    ranks.run(check_layers, world_size=2)


class Cross(nn.Module):
    """Attention to another sequence, of another length."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        out: Tensor = self.attention(x, memory, memory, need_weights=False)[0]
        return x + out


def check_cross(group: ProcessGroup, rank: int) -> None:
    torch.manual_seed(0)
    model = Cross()
    reference = copy.deepcopy(model).double()
    options = {"inputs": "sharded", "layout": "contiguous"}
    call, record = compile_ring(
        model, group, compiler="aot_eager", options=options, dynamic=True
    )

    def own(x: Tensor) -> Tensor:
        return ringcompile.shard(x, 1, group, layout="contiguous")

    x, memory = torch.randn(2, 10, WIDTH), torch.randn(2, 14, WIDTH)
    want = reference(x.double(), memory.double())
    got = call(own(x), own(memory))
    assert_output_equal(got, own(want))
    want.square().sum().backward()
    got.square().sum().backward()
    assert_gradients_equal(
        {n: p.grad for n, p in model.named_parameters()},
        {n: p.grad for n, p in reference.named_parameters()},
    )
    assert len(record.rings) == record.num_graphs
    assert record.gathers == record.refused == []


def test_two_sequences_on_shards(ranks: RankPool) -> None:
    ranks.run(check_cross, world_size=2)


def attend_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def check_heads(group: ProcessGroup, rank: int, kv_heads: int) -> None:
    """Q, K and V are inputs, and their numbers of heads are symbols as well."""
    options = {"inputs": "sharded", "layout": "zigzag"}
    call, record = compile_ring(
        attend_heads, group, compiler="aot_eager", options=options, dynamic=True
    )
    generator = torch.Generator().manual_seed(0)
    heads = (6, kv_heads, kv_heads)
    for length in (8, 24):
        whole = [torch.randn(2, n, length, 8, generator=generator) for n in heads]
        own = [ringcompile.shard(x, 2, group, layout="zigzag").clone() for x in whole]
        mine = [x.requires_grad_() for x in own]
        wide = [x.double().requires_grad_() for x in whole]
        want, got = attend_heads(*wide), call(*mine)
        assert_output_equal(got, ringcompile.shard(want, 2, group, layout="zigzag"))
        want.square().sum().backward()
        got.square().sum().backward()
        for x, true in zip(mine, wide, strict=True):
            assert x.grad is not None
            assert true.grad is not None
            shard = ringcompile.shard(true.grad, 2, group, layout="zigzag")
            assert_output_equal(x.grad, shard)
    assert record.num_graphs == len(record.rings) == 1


@pytest.mark.parametrize("kv_heads", [3, 6])
def test_heads_that_are_symbols(ranks: RankPool, kv_heads: int) -> None:
    ranks.run(check_heads, kv_heads, world_size=2)


# ---- refused -------------------------------------------------------------------------


def attend(x: Tensor, mask: Tensor | None = None) -> Tensor:
    heads = x.unflatten(2, (HEADS, -1)).transpose(1, 2)
    y = F.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask)
    return y.transpose(1, 2).flatten(2)


def no_attention(x: Tensor) -> Tensor:
    return x - x.mean(1, keepdim=True)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        return grads[0] * 2


def own_function(x: Tensor) -> Tensor:
    double: Callable[[Tensor], Tensor] = Doubled.apply
    return double(attend(x))


def fully_refused(x: Tensor) -> Tensor:
    weights = torch.softmax(x @ x.mT, -1)
    return weights @ x + weights.sum()


REFUSED: list[tuple[Callable[..., Tensor], list[tuple[int, ...]], bool, str]] = [
    (attend, [(2, 6, WIDTH)], False, "dynamic=True"),
    (attend, [(2, 6, WIDTH), (6, 6)], True, "a mask over all pairs"),
    (attend, [(6, 6, WIDTH)], True, "one dim holds the rank's rows"),
    (no_attention, [(2, 6, WIDTH)], True, "without an attention"),
    (fully_refused, [(2, 6, WIDTH)], True, "weights are also used by"),
    (own_function, [(2, 6, WIDTH)], True, "a graph with"),
    (attend, [(2, 7, WIDTH)], True, "pad the sequence before ringcompile.shard"),
]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(("call", "shapes", "dynamic", "text"), REFUSED)
def test_what_is_not_known_of_shards_is_refused(
    call: Callable[..., Tensor], shapes: list[tuple[int, ...]], dynamic: bool, text: str
) -> None:
    def compile_graph(gm: GraphModule, inputs: list[Any]) -> Any:  # noqa: ANN401
        run_passes(gm, inputs, options=options, ranks=Ranks(0, 2, "x"), sources="")
        return gm.forward

    options = RingOptions(inputs="sharded", layout="zigzag")
    torch._dynamo.reset()  # the same function, compiled for other shapes
    compiled = torch.compile(call, backend=compile_graph, dynamic=dynamic)
    with pytest.raises(BackendCompilerFailed) as caught:
        compiled(*(torch.randn(shape, requires_grad=True) for shape in shapes))
    error = caught.value.inner_exception
    assert isinstance(error, RingCompileError)
    assert text in str(error)


def test_shards_need_a_layout() -> None:
    with pytest.raises(OptionError, match="layout='auto'"):
        RingOptions.from_user({"inputs": "sharded"})
    chosen = RingOptions.from_user({"inputs": "sharded", "layout": "zigzag"})
    assert chosen.outputs == "sharded"
    assert RingOptions.from_user({"layout": "zigzag"}).outputs == "gathered"


def call_with_shapes(group: ProcessGroup, rank: int) -> str:
    options: Any = {"inputs": "sharded", "layout": "contiguous", "mesh": group}
    with without_codegen():
        call = torch.compile(attend, backend="ring", dynamic=True, options=options)
        try:
            call(torch.randn(2, 6 + 2 * rank, WIDTH))
        except RankMismatchError as error:
            return str(error)
    return ""


def test_shards_of_other_lengths_are_told(ranks: RankPool) -> None:
    for text in ranks.run(call_with_shapes, world_size=2):
        assert "shape or dtype" in text
        assert "as many rows on every rank" in text


def test_explain_takes_a_shard() -> None:
    options = {"inputs": "sharded", "layout": "zigzag"}
    report = ringcompile.explain(
        attend, torch.randn(2, 6, WIDTH), world_size=2, options=options
    )
    assert [a.status for a in report.attentions] == ["ring"]
    assert "ringcompile.shard" not in report.graph("rewrite")
    assert report.gathers == ()
