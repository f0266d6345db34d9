"""What a hop by copies puts where, and who may ask for one; tests/gpu runs it."""

from collections.abc import Iterator
from unittest.mock import MagicMock

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given
from hypothesis import strategies as st

from ringcompile.errors import OptionError
from ringcompile.lowering.transports import driver
from ringcompile.lowering.transports.choose import prepare_transport
from ringcompile.lowering.transports.copy_engine import (
    _ALIGNMENT,
    _BUDGET,
    _SHARE,
    CopyEngine,
    cut_into_places,
)
from ringcompile.mesh import Ranks


@pytest.fixture(autouse=True)
def _no_driver_is_known() -> Iterator[None]:
    driver._calls.cache_clear()
    yield
    driver._calls.cache_clear()


@given(
    st.lists(st.integers(0, 5 * _ALIGNMENT), max_size=4),
    st.integers(1, 4).map(lambda n: n * _ALIGNMENT),
)
def test_every_byte_has_one_place_and_order_is_kept(
    sizes: list[int], capacity: int
) -> None:
    places = cut_into_places(sizes, capacity)
    slices = [s for place in places for s in place]
    covered = [(s.tensor, byte) for s in slices for byte in range(s.start, s.stop)]
    assert covered == [
        (t, byte) for t, size in enumerate(sizes) for byte in range(size)
    ]
    for place in places:
        stop = 0
        for s in place:
            assert s.offset >= stop
            assert s.offset % _ALIGNMENT == 0
            stop = s.offset + s.stop - s.start
        assert 0 < stop <= capacity


def test_what_fits_takes_one_place() -> None:
    assert len(cut_into_places([700, 300], 3 * _ALIGNMENT)) == 1
    assert len(cut_into_places([700, 600], 3 * _ALIGNMENT)) == 2


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_places_for_each_peer_fill_the_buffer(size: int) -> None:
    for gpu_bytes in (80 * 2**30 + 1, 2**50):
        room = min(_BUDGET, gpu_bytes // _SHARE)
        found = CopyEngine.buffer_bytes(size, gpu_bytes)
        assert found % (3 * (size - 1) * _ALIGNMENT) == 0
        assert room - 3 * size * _ALIGNMENT < found <= room


@pytest.mark.parametrize("asked", ["auto", "p2p"])
def test_cpu_ranks_send(asked: str) -> None:
    prepare_transport(asked, Ranks(0, 2, "any"), [torch.ones(2)])


def test_one_rank_has_no_hops() -> None:
    prepare_transport("copy_engine", Ranks(), [torch.ones(2)])


def test_copies_need_gpus() -> None:
    with pytest.raises(OptionError) as caught:
        prepare_transport("copy_engine", Ranks(0, 2, "any"), [torch.ones(2)])
    assert_expected_inline(
        str(caught.value),
        """\
transport='copy_engine'
  at: options
  because: not every rank's GPU can read every other's memory
  instead: transport='auto', or 'p2p'""",
    )


def test_without_the_driver_ranks_send(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(driver, "CDLL", fail)
    assert not driver.is_here()
    monkeypatch.setattr(driver, "CDLL", lambda _name: object())  # an old one
    assert not driver.is_here()
    monkeypatch.setattr(driver, "CDLL", lambda _name: MagicMock())
    assert driver.is_here()


def test_a_drivers_failure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    library = MagicMock()
    library.cuMemcpyAsync.return_value = 0
    library.cuStreamWriteValue32_v2.return_value = 700
    monkeypatch.setattr(driver, "CDLL", lambda _name: library)
    driver.copy(1024, 2048, 16, 7)
    library.cuMemcpyAsync.assert_called_once_with(1024, 2048, 16, 7)
    with pytest.raises(RuntimeError, match="cuStreamWriteValue32_v2 failed: 700"):
        driver.set_flag(1024, 1, 7)
