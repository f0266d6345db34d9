"""What CI runs of a long list of cases: each in so many, the others by hand."""

from collections.abc import Iterable

import pytest


def one_in(step: int, cases: Iterable[object]) -> list[object]:
    """The first of each ``step`` cases as it is, the others marked ``slow``."""
    return [
        pytest.param(case, marks=pytest.mark.slow) if n % step else case
        for n, case in enumerate(cases)
    ]
