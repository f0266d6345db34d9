"""flex_attention, whose block mask is passed in, becomes a ring and equals eager.

References are dense masks, worked out pair by pair. By hand, all rows on more ranks:

    pytest -q -m slow tests/zoo/test_flex.py
"""

import copy
import warnings
from functools import partial

import pytest
import torch
from support.compiling import Record, compile_ring
from support.flex import trained_on_cpu
from support.flex_cases import TABLE, attend_dense, make_mask
from support.ranks import RankPool
from support.sampling import one_in
from support.spelling_runs import find_faults, run_named
from support.spellings import B, E, Heads, S, Spelling
from support.spine_models import Float64
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import LlamaConfig, LlamaForCausalLM

from ringcompile.errors import UnsupportedAttentionError

NAMES = [s.name for s in TABLE]
GATHERED = {
    "lse": "scores are also used by aten.logsumexp",
}


def check_row(ranks: RankPool, spelling: Spelling, cp_size: int) -> None:
    results = ranks.run(run_named, "flex", spelling.name, world_size=cp_size)
    for rank, (record, faults) in enumerate(results):
        assert not faults, f"rank {rank}: {faults}"
        if spelling.name in GATHERED:
            (reason,) = record.refused
            assert GATHERED[spelling.name] in reason
        else:
            assert record.refused == []
            assert record.gathers == []
            assert len(record.rings) == spelling.num_regions


@pytest.mark.parametrize("number", one_in(6, range(len(TABLE))), ids=NAMES)
def test_flex_attention_equals_eager(ranks: RankPool, number: int) -> None:
    check_row(ranks, TABLE[number], 2 + number % 2)


@pytest.mark.slow
@pytest.mark.parametrize("cp_size", [2, 3, 4])
@pytest.mark.parametrize("spelling", TABLE, ids=NAMES)
def test_every_flex_attention(
    ranks: RankPool, spelling: Spelling, cp_size: int
) -> None:
    check_row(ranks, spelling, cp_size)


# ---- lists that change ---------------------------------------------------------------


class Documents(nn.Module):
    """Attention inside documents; the block mask is made for each batch outside."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = Heads(_attend)

    def forward(self, x: Tensor, mask: BlockMask) -> Tensor:
        return self.heads(x, mask)  # type: ignore[no-any-return]


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    return flex_attention(q, k, v, block_mask=mask)


def make_documents(documents: Tensor) -> BlockMask:
    def same(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (documents[b, i] == documents[b, j]) & (i >= j)

    return make_mask(same, B=B)


def run_documents(group: ProcessGroup, rank: int) -> tuple[list[str], str, int]:
    """Two batches and gradients, then one whose lists are another's."""
    model = Documents()
    call, record = compile_ring(model, group)
    x = torch.randn(B, S, E, generator=torch.Generator().manual_seed(1))
    faults: list[str] = []
    documents = torch.zeros(B, S, dtype=torch.long)
    mask = make_documents(documents)
    for ends in ([6, 9], [3, 12]):
        documents = (torch.arange(S) >= torch.tensor(ends)[:, None]).long()
        mask, kept = make_documents(documents), show_documents(documents)
        model.zero_grad()
        with trained_on_cpu():
            out = call(x, mask)
        out.sin().sum().backward()
        got = {n: p.grad for n, p in model.named_parameters()}
        reference = copy.deepcopy(model.heads).double()
        reference.attend = partial(attend_dense, kept=kept)
        reference.zero_grad()
        want = reference(x.double())
        want.sin().sum().backward()
        grads = {f"heads.{n}": p.grad for n, p in reference.named_parameters()}
        faults += find_faults((out.detach(), got), (want.detach(), grads))
    documents[:] = 0
    try:
        with trained_on_cpu():
            call(x, mask)
    except UnsupportedAttentionError as error:
        return faults, error.because, record.num_graphs
    return faults, "", record.num_graphs


def show_documents(documents: Tensor) -> Tensor:
    same = documents[:, None, :, None] == documents[:, None, None]
    return same & torch.ones(S, S, dtype=torch.bool).tril()


def test_documents_change_between_calls(ranks: RankPool) -> None:
    for faults, because, num_graphs in ranks.run(run_documents, world_size=2):
        assert faults == []
        assert because.startswith("mask_mod keeps keys in a block that is not listed")
        assert num_graphs == 1


# ---- Hugging Face's flex_attention ---------------------------------------------------


def run_llama(group: ProcessGroup, rank: int) -> tuple[Record, list[str]]:
    """A padded batch, forward and backward."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    config._attn_implementation = "flex_attention"
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(64, (2, 20), generator=generator)
    given = {"input_ids": ids, "attention_mask": (ids >= 0).long(), "labels": ids}
    given["attention_mask"][1, 15:] = 0
    call, record = compile_ring(model, group, compiler="eager")
    with warnings.catch_warnings(), trained_on_cpu():
        warnings.simplefilter("ignore")
        loss = call(**given).loss
        loss.backward()
    got = {n: p.grad for n, p in model.named_parameters()}
    reference = copy.deepcopy(model).double()
    reference.zero_grad()
    reference.set_attn_implementation("eager")
    with Float64():
        want = reference(**given).loss
        want.backward()
    grads = {n: p.grad for n, p in reference.named_parameters()}
    return record, find_faults((loss.detach(), got), (want.detach(), grads))


@pytest.mark.slow
def test_llama_with_flex_attention(ranks: RankPool) -> None:
    for record, faults in ranks.run(run_llama, world_size=2):
        assert faults == []
        assert record.refused == []
        assert len(record.rings) == 2
