"""What CI runs of a list of cases; the others are for a run by hand."""

from collections.abc import Iterable
from functools import partial

import pytest

slow = partial(pytest.param, marks=pytest.mark.slow)


def one_in(step: int, cases: Iterable[object]) -> list[object]:
    """The first of each ``step`` cases as it is, the others marked ``slow``."""
    return [slow(case) if n % step else case for n, case in enumerate(cases)]
