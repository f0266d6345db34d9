"""Block lists that are passed in are compared with their mask_mod before a call."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from support.flex_cases import causal, make_mask, near
from support.spellings import B, D, H, S
from torch import Tensor
from torch.fx import GraphModule
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ringcompile.errors import UnsupportedAttentionError
from ringcompile.passes.block_checks import check_blocks_at_calls
from ringcompile.passes.shadow import trace_shadow

DOCUMENTS = (torch.arange(S) >= torch.tensor([[6], [9]])).long()


def compile_checks(
    attend: Callable[..., Tensor], made: list[GraphModule] | None = None
) -> Callable[..., Any]:
    """A function under the checks alone: what it computes is left out."""

    def compile_graph(gm: GraphModule, inputs: Sequence[object]) -> Callable[..., Any]:
        shadow = trace_shadow(gm, inputs)
        if made is not None:
            made.append(shadow)
        return check_blocks_at_calls(gm.forward, shadow.meta["block_checks"])

    torch.compiler.reset()
    return torch.compile(attend, backend=compile_graph)


def attend(mask: BlockMask) -> Tensor:
    q = torch.ones(B, H, S, D)
    return flex_attention(q, q, q, block_mask=mask)


def with_rule(mask: BlockMask, rule: Any) -> BlockMask:  # noqa: ANN401
    """The lists of a mask with another mask_mod."""
    lists = (
        *(mask.kv_num_blocks, mask.kv_indices),
        *(mask.full_kv_num_blocks, mask.full_kv_indices),
    )
    return BlockMask.from_kv_blocks(
        *lists, BLOCK_SIZE=mask.BLOCK_SIZE, mask_mod=rule, seq_lengths=mask.seq_lengths
    )


def behind(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (i >= j) & (i - j <= 6)


def full_blocks() -> tuple[Tensor, Tensor]:
    """Number and indices of the full blocks of a causal mask."""
    mask = make_mask(causal)
    numbers, indices = mask.full_kv_num_blocks, mask.full_kv_indices
    assert numbers is not None
    assert indices is not None
    return numbers, indices


def with_full(numbers: Tensor, indices: Tensor) -> BlockMask:
    """A causal mask whose full blocks are given."""
    mask = make_mask(causal)
    return BlockMask.from_kv_blocks(
        *(mask.kv_num_blocks, mask.kv_indices, numbers, indices),
        BLOCK_SIZE=4,
        mask_mod=causal,
        seq_lengths=(S, S),
    )


@pytest.mark.parametrize("size", [4, (4, 8), 128], ids=str)
def test_lists_of_the_same_rule_pass(size: Any) -> None:  # noqa: ANN401
    compile_checks(attend)(make_mask(causal, BLOCK_SIZE=size))


def test_lists_without_full_blocks_pass() -> None:
    compile_checks(attend)(make_mask(causal, separate_full_blocks=False))


def test_a_mask_cut_to_a_shorter_length_passes() -> None:
    mask = make_mask(causal, Q_LEN=2 * S, KV_LEN=2 * S)
    compile_checks(attend)(mask._adjust(S, S))


def test_lists_that_leave_out_what_the_rule_keeps() -> None:
    with pytest.raises(
        UnsupportedAttentionError, match="keeps keys in a block that is not"
    ):
        compile_checks(attend)(with_rule(make_mask(near), causal))


def test_full_blocks_of_which_the_rule_drops_keys() -> None:
    with pytest.raises(
        UnsupportedAttentionError, match="drops keys in a block that is listed as full"
    ):
        compile_checks(attend)(with_rule(make_mask(causal), behind))


def test_full_blocks_ahead_of_a_causal_rule() -> None:
    numbers, indices = (x.clone() for x in full_blocks())
    numbers[0, 0, 0], indices[0, 0, 0, 0] = 1, 2
    with pytest.raises(UnsupportedAttentionError, match="queries from 0, keys from 8"):
        compile_checks(attend)(with_full(numbers, indices))


def test_blocks_listed_twice() -> None:
    numbers, indices = full_blocks()
    with pytest.raises(UnsupportedAttentionError, match="listed twice"):
        compile_checks(attend)(with_full(numbers, torch.zeros_like(indices)))


def test_blocks_listed_as_partial_and_full() -> None:
    mask = make_mask(causal)
    with pytest.raises(UnsupportedAttentionError, match="as partial and as full"):
        compile_checks(attend)(with_full(mask.kv_num_blocks, mask.kv_indices))


def test_documents_that_change_under_their_lists() -> None:
    documents = DOCUMENTS.clone()

    def same(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return documents[b, i] == documents[b, j]

    made: list[GraphModule] = []
    call = compile_checks(attend, made)
    mask = make_mask(same, B=B)
    call(mask)
    documents[1] = 0
    with pytest.raises(
        UnsupportedAttentionError, match="keeps keys in a block that is not"
    ):
        call(mask)
    call(make_mask(same, B=B))
    assert len(made) == 1


def test_lists_are_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[object] = []
    monkeypatch.setattr(
        "ringcompile.passes.block_checks.check_blocks", lambda *a: compared.append(a)
    )
    call = compile_checks(attend)
    mask = make_mask(causal)
    call(mask)
    call(mask)
    assert len(compared) == 1
    call(make_mask(causal))
    assert len(compared) == 2


def test_a_rule_that_reads_the_batch_needs_lists_for_each() -> None:
    def same(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return DOCUMENTS[b, i] == DOCUMENTS[b, j]

    with pytest.raises(Exception, match="mask_mod reads the batch"):
        compile_checks(attend)(make_mask(same))


def test_lists_made_in_the_graph_of_another_rule() -> None:
    def run(x: Tensor) -> Tensor:
        return flex_attention(x, x, x, block_mask=with_rule(make_mask(near), causal))

    with pytest.raises(Exception, match="is made in the graph, and not by"):
        compile_checks(run)(torch.ones(B, H, S, D))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_lists_made_in_the_graph_for_the_first_of_a_batch() -> None:
    def same(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return DOCUMENTS[b, i] == DOCUMENTS[b, j]

    def run(x: Tensor) -> Tensor:
        return flex_attention(x, x, x, block_mask=make_mask(same))

    with pytest.raises(Exception, match="is made in the graph, and not by"):
        compile_checks(run)(torch.ones(B, H, S, D))


@pytest.mark.parametrize(
    "rule",
    [
        lambda b, h, i, j: DOCUMENTS[b].sum() > j,
        lambda b, h, i, j: torch.stack((i >= j, i >= 0)).all(),
    ],
    ids=["sum", "stack"],
)
def test_rules_that_see_more_than_one_scalar(rule: Any) -> None:  # noqa: ANN401
    with pytest.raises(Exception, match="isn't known to work on each scalar alone"):
        compile_checks(attend)(make_mask(rule, B=B))


def test_a_window_that_changes_is_read_from_the_call() -> None:
    def run(x: Tensor, mask: BlockMask, size: int) -> Tensor:
        def inside(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (i >= j) & (i - j <= size * 2)

        return flex_attention(x, x, x, block_mask=with_rule(mask, inside))

    call = compile_checks(run)
    mask = make_mask(causal)
    for size in (1, 2, 3):

        def inside(b: Tensor, h: Tensor, i: Tensor, j: Tensor, w: int = size) -> Tensor:
            return (i >= j) & (i - j <= w * 2)

        mask = make_mask(inside)
        call(torch.ones(B, H, S, D), mask, size)
    with pytest.raises(UnsupportedAttentionError, match="keeps keys in a block that"):
        call(torch.ones(B, H, S, D), mask, 8)
