"""Numbers and places as text."""

import sysconfig
from pathlib import Path

import pytest

from ringcompile.report.text import format_bytes, format_place


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (1024**2 * 5 // 4, "1.25 MiB"),
        (1023 * 1024, "1023 KiB"),
        (3 * 1024**3, "3 GiB"),
        (5 * 1024**5, "5120 TiB"),
    ],
)
def test_bytes_have_three_digits(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


def test_places_are_told_without_the_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    library = Path(sysconfig.get_path("purelib")) / "some" / "model.py"
    assert format_place(f"{library}:12") == "some/model.py:12"
    assert format_place(f"{tmp_path}/train.py:3") == "train.py:3"
    assert format_place("/elsewhere/x.py:4") == "/elsewhere/x.py:4"
    assert format_place("add_1") == "add_1"
