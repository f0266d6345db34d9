"""Tables of blocks: their text, their values, and what they say of a box."""

import pytest
import torch
from expecttest import assert_expected_inline

from ringcompile.ir.evaluate import evaluate, find_extremes, splitmix64
from ringcompile.ir.mask import H, K, Mask, Q, has_captures
from ringcompile.ir.tables import GivenBlocks, RandomBlocks, Table, is_on, parse_table
from ringcompile.ir.text import format_mask, parse_mask

RANDOM = RandomBlocks(3, 2, 4, 9, is_causal=True, taken="(== (+ (* -1 k) q) 0)")
GIVEN = GivenBlocks.of(torch.arange(2 * 5 * 5).view(2, 5, 5) % 3 == 0)


def values(table: Table, heads: int, num_blocks: int) -> torch.Tensor:
    """``(heads, nb, nb)``, by reading a mask of one-token blocks."""
    at = [torch.arange(n) for n in (1, heads, num_blocks, num_blocks)]
    grid = torch.meshgrid(*at, indexing="ij")
    return evaluate(is_on(table, H, Q, K), grid)[0]


def test_the_hash_is_the_public_one() -> None:
    # Of the reference code's first output in state 0, in signed 64 bits.
    assert splitmix64(torch.tensor(0)).item() % 2**64 == 0xE220A8397B1DCDAF


@pytest.mark.parametrize("table", [RANDOM, GIVEN], ids=["random", "given"])
def test_text_gives_the_same_table(table: Table) -> None:
    assert parse_table(str(table)) == table
    mask = Mask(is_on(table, H, Q, K))
    assert parse_mask(format_mask(mask)) == mask
    assert not has_captures(mask.keeps)


def test_a_mask_names_the_kind_of_its_table() -> None:
    assert_expected_inline(
        str(Mask(is_on(RANDOM, H, Q, K))), """random[h, q, k] != 0"""
    )
    assert_expected_inline(str(RANDOM), """random:3:2:4:9:1:[==_[+_[*_-1_k]_q]_0]""")


def test_random_blocks_are_as_many_as_there_are_candidates() -> None:
    on = values(RANDOM, 4, 9)
    counts = on.sum(-1)
    assert counts.tolist() == [[min(i, 2) for i in range(9)]] * 4
    assert not (on & ~torch.ones(9, 9, dtype=torch.bool).tril(-1)).any()
    assert any(not torch.equal(on[0], on[h]) for h in (1, 2, 3))


def test_random_blocks_leave_torch_s_generator_alone() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = values(RandomBlocks(5, 2, 2, 12, is_causal=False, taken="false"), 2, 12)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    other = values(RandomBlocks(6, 2, 2, 12, is_causal=False, taken="false"), 2, 12)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("table", "heads", "size"), [(RANDOM, 4, 9), (GIVEN, 2, 5)], ids=["random", "given"]
)
def test_a_box_is_decided_as_its_blocks_are(
    table: Table, heads: int, size: int
) -> None:
    on = values(table, heads, size)
    for top in range(size):
        for left in range(size):
            rows, columns = range(top, min(top + 2, size)), range(left, size)
            box = on[:, top : rows.stop, left:]
            got = find_extremes(str(table), rows, columns)
            assert got == (bool(box.all()), bool(box.any()))
