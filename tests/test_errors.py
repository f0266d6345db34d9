import pickle

import pytest
from expecttest import assert_expected_inline

from ringcompile import errors


def test_error_text_says_what_where_why_and_what_to_do() -> None:
    error = errors.UnsupportedAttentionError(
        "attention with dropout_p=0.1",
        at="model.py:12 (scaled_dot_product_attention)",
        because="each rank would draw its own dropout mask for the same tile",
        instead="drop out the attention's output instead of its weights",
    )
    assert_expected_inline(
        str(error),
        """\
attention with dropout_p=0.1
  at: model.py:12 (scaled_dot_product_attention)
  because: each rank would draw its own dropout mask for the same tile
  instead: drop out the attention's output instead of its weights""",
    )


def test_an_empty_part_has_no_line() -> None:
    assert str(
        errors.PlanError("two hops share tag 3", because="a plan is a bijection")
    ) == ("two hops share tag 3\n  because: a plan is a bijection")


@pytest.mark.parametrize(
    "kind",
    [
        errors.UnsupportedAttentionError,
        errors.ShardingError,
        errors.OptionError,
        errors.PlanError,
        errors.RankMismatchError,
        errors.TransportError,
    ],
)
def test_errors_share_a_base_and_travel_between_processes(
    kind: type[errors.RingCompileError],
) -> None:
    error = kind("what", at="at", because="because", instead="instead")
    copy = pickle.loads(pickle.dumps(error))
    assert isinstance(copy, errors.RingCompileError)
    assert type(copy) is kind
    assert str(copy) == str(error)
    assert (copy.what, copy.at, copy.because, copy.instead) == (
        "what",
        "at",
        "because",
        "instead",
    )
