"""The CUDA driver's calls that hops are made of.

torch has none for flags, and takes some ten microseconds of the host for what here
takes one or two: a ring of short sequences is bound by its host. None runs a kernel: as
torch's own signals do, it would find no SM beside a large one, and set its flag when
that ends. On 4 H200s a ring of 8,192 tokens each stood still for 2 of 16 ms. Addresses
are numbers, streams the driver's handles; CUDA graphs capture all of them.
"""

from collections.abc import Callable
from ctypes import CDLL, byref, c_char_p, c_int, c_size_t, c_uint32, c_uint64, c_void_p
from functools import lru_cache

_EQUAL = 1  # CU_STREAM_WAIT_VALUE_EQ
_NO_TIMING = 2  # CU_EVENT_DISABLE_TIMING
_ARGUMENTS = {
    "cuMemcpyAsync": (c_uint64, c_uint64, c_size_t, c_void_p),
    "cuStreamWriteValue32_v2": (c_void_p, c_uint64, c_uint32, c_uint32),
    "cuStreamWaitValue32_v2": (c_void_p, c_uint64, c_uint32, c_uint32),
    "cuEventCreate": (c_void_p, c_uint32),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuStreamWaitEvent": (c_void_p, c_void_p, c_uint32),
}


def is_here() -> bool:
    """Whether this machine has the driver, and it has these calls."""
    try:
        _calls()
    except (OSError, AttributeError):
        return False
    return True


def copy(to: int, source: int, num_bytes: int, stream: int) -> None:
    """Copy bytes, of this GPU's memory or of another's."""
    _calls()["cuMemcpyAsync"](to, source, num_bytes, stream)


def set_flag(address: int, value: int, stream: int) -> None:
    """Write a value, behind all that the stream has written before."""
    _calls()["cuStreamWriteValue32_v2"](stream, address, value, 0)


def await_flag(address: int, value: int, stream: int) -> None:
    """Let a stream wait for a value."""
    _calls()["cuStreamWaitValue32_v2"](stream, address, value, _EQUAL)


class Event:
    """A place in a stream, which another can be made to wait for."""

    def __init__(self) -> None:
        handle = c_void_p()
        _calls()["cuEventCreate"](byref(handle), _NO_TIMING)
        self._handle = handle.value

    def record(self, stream: int) -> None:
        """Be where the stream is now, no longer where it was."""
        _calls()["cuEventRecord"](self._handle, stream)

    def block(self, stream: int) -> None:
        """Let a stream wait until what was recorded has happened."""
        _calls()["cuStreamWaitEvent"](stream, self._handle, 0)


@lru_cache(maxsize=1)
def _calls() -> dict[str, Callable[..., None]]:
    """Each call by its name; it raises ``RuntimeError`` where the driver fails."""
    library = CDLL("libcuda.so.1")
    tell = library.cuGetErrorName
    tell.argtypes, tell.restype = (c_int, c_void_p), c_int

    def wrap(name: str) -> Callable[..., None]:
        call = getattr(library, name)
        call.argtypes, call.restype = _ARGUMENTS[name], c_int

        def checked(*args: object) -> None:
            if code := call(*args):
                raise _error(name, code)

        return checked

    def _error(name: str, code: int) -> RuntimeError:
        text = c_char_p()
        tell(code, byref(text))
        what = text.value.decode() if text.value else str(code)
        return RuntimeError(f"{name} failed: {what}")

    return {name: wrap(name) for name in _ARGUMENTS}
