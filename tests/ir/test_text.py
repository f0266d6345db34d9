import dataclasses

import pytest
import sympy
from expecttest import assert_expected_inline
from hypothesis import given, settings
from hypothesis import strategies as st
from support.masks import layouts, masks

from ringcompile.ir.attention import RankPlan
from ringcompile.ir.layout import Layout, Side
from ringcompile.ir.mask import EmptyRow, K, Mask, Q, at_least_zero, causal, documents
from ringcompile.ir.schedule import MixedParts, Mixing, Schedule, Selection, Ulysses
from ringcompile.ir.text import (
    format_mask,
    format_plan,
    format_schedule,
    format_sexpr,
    parse_mask,
    parse_plan,
    parse_schedule,
    parse_sexpr,
)
from ringcompile.plan.stages import build_schedule

MIXINGS = st.builds(Mixing, st.integers(1, 5), st.booleans())
SELECTIONS = st.sampled_from([None, Selection(6, 2, (0, 1, None, 0), 2)])


def plan_of(schedule: Schedule, name: str = "layer") -> RankPlan:
    return RankPlan(
        index=3,
        name=name,
        rank=0,
        group_name="0",
        scale=0.1,
        timeout_s=600.0,
        schedule=schedule,
        sources="abc",
    )


@settings(deadline=None, max_examples=25)
@given(masks, SELECTIONS, layouts(4), st.integers(1, 30), st.text(), MIXINGS)
def test_a_plan_comes_back_from_its_text(
    mask: Mask,
    selection: Selection | None,
    layout: Layout,
    length: int,
    name: str,
    mixing: Mixing,
) -> None:
    parts = MixedParts(((mask, selection),), mixing)
    plan = plan_of(build_schedule(parts, layout, length), name)
    text = format_plan(plan)
    assert text.isascii()
    assert parse_plan(text) == plan
    assert format_plan(parse_plan(text)) == text


@settings(deadline=None, max_examples=40)
@given(masks, st.sampled_from(EmptyRow))
def test_a_mask_comes_back_from_its_text(mask: Mask, empty_row: EmptyRow) -> None:
    mask = dataclasses.replace(mask, empty_row=empty_row)
    assert parse_mask(format_mask(mask)) == mask


def test_a_capture_without_positions_comes_back() -> None:
    width = sympy.Function("c0", integer=True)()
    mask = Mask(at_least_zero(width - Q + K), num_captures=1)
    assert "(c0)" in format_mask(mask)
    assert parse_mask(format_mask(mask)) == mask


def test_schedules_for_any_length_come_back() -> None:
    for name in ("contiguous", "zigzag", "striped"):
        schedule = build_schedule([(Mask(causal()), None)], Layout(name, 3), None)
        assert parse_schedule(format_schedule(schedule)) == schedule


def test_ranks_that_deal_out_heads_come_back() -> None:
    schedule = build_schedule([(Mask(causal()), None)], Layout("zigzag", 2), 8)
    schedule = dataclasses.replace(schedule, ulysses=Ulysses(3, 2))
    plan = dataclasses.replace(plan_of(schedule), rank=1, member=2)
    assert parse_plan(format_plan(plan)) == plan
    peers = plan.find_peer(), plan.find_peer(rank=0), plan.find_peer(member=0)
    assert peers == (5, 2, 3)
    assert "heads over 3 ranks" in str(schedule)


def test_keys_of_another_sequence_come_back() -> None:
    for length, keys in ((None, None), (7, None), (None, 9), (7, 9)):
        side = Side(Layout("zigzag", 3), keys)
        schedule = build_schedule(
            [(Mask(), None)], Layout("striped", 3), length, keys=side
        )
        assert schedule.keys == side
        assert parse_schedule(format_schedule(schedule)) == schedule


def test_the_text_of_a_plan() -> None:
    mask = Mask(sympy.And(causal(), documents(0)), 1)
    schedule = build_schedule(
        [(mask, None), (Mask(causal()), Selection(4, 2, (0, 1), 1))],
        Layout("striped", 2),
        7,
    )
    text = format_plan(plan_of(schedule))
    assert_expected_inline(
        text.replace(",", ",\n"),
        """\
{"biases":[],
"block_order":"natural",
"dropout":null,
"group_name":"0",
"index":3,
"kernel":"auto",
"member":0,
"name":"layer",
"rank":0,
"scale":0.1,
"schedule":{"layout":["striped",
2],
"length":7,
"mixing":[1,
false],
"parts":[{"mask":["(and (== (+ (* (c0 b q) -1) (c0 b k)) 0) (>= (+ (* -1 k) q) 0))",
1,
"zero"],
"selection":null,
"stages":[[[0,
"/ needs 0:c masked 0:c 0:c",
"/ needs 0:3 masked 0:3 0:3"]],
[[1,
"/ needs 0:3 masked 1:c 0:3",
"/ needs 0:3 masked 0:3 0:3"]]]},
{"mask":["(>= (+ (* -1 k) q) 0)",
0,
"zero"],
"selection":[4,
2,
[0,
1],
1,
0,
null],
"stages":[[[0,
"/ needs 0:c masked 0:c 0:c",
"/ needs 0:c masked 0:c 0:c"]]]}]},
"softcap":null,
"sources":"abc",
"timeout_s":600.0,
"transport":"p2p"}""",
    )


def test_a_symbol_that_no_mask_has_is_refused() -> None:
    with pytest.raises(AssertionError, match="x in a mask predicate"):
        format_sexpr(at_least_zero(Q - sympy.Symbol("x", integer=True)))


@pytest.mark.parametrize("text", ["(foo q k)", "(+ q k) q", "(>= q"])
def test_what_is_no_s_expression_is_refused(text: str) -> None:
    with pytest.raises(AssertionError):
        parse_sexpr(text)
