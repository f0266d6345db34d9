"""Flags that GPUs set in each other's memory, and wait for in their own.

They are the driver's operations on streams and run no kernel: a kernel, as torch's own
signals are, finds no SM beside a large one and sets its flag when that ends. On 4 H200s
a ring of 8,192 tokens each stood still for 2 of 16 ms.
"""

from functools import lru_cache
from importlib import import_module
from typing import Any

import torch

from ringcompile.torch_private import SymmetricMemory

_BYTES = 4


class Flags:
    """A rank's flags: one of each number for each peer, all of them down at first.

    Each is set only when it is down; who waits for it takes it down again.
    """

    def __init__(self, shared: SymmetricMemory) -> None:
        self._pads = shared.signal_pad_ptrs
        self._rank, self._size = shared.rank, shared.world_size
        self._set = lru_cache(maxsize=None)(self._set_operations)
        self._take = lru_cache(maxsize=None)(self._take_operations)

    def set(self, peer: int, number: int) -> None:
        """Set the flag that a peer waits for, after the current stream's work."""
        _enqueue(self._set(peer, number))

    def take(self, peer: int, number: int) -> None:
        """Let the current stream wait until a peer has set the flag."""
        _enqueue(self._take(peer, number))

    def _set_operations(self, peer: int, number: int) -> list[object]:
        return [_write(self._address(peer, number, self._rank), 1)]

    def _take_operations(self, peer: int, number: int) -> list[object]:
        address = self._address(self._rank, number, peer)
        return [_wait(address, 1), _write(address, 0)]

    def _address(self, owner: int, number: int, setter: int) -> int:
        return self._pads[owner] + _BYTES * (number * self._size + setter)


def _write(address: int, value: int) -> object:
    """Write a value behind all that the stream has written before."""
    driver = _driver()
    operation = driver.CUstreamBatchMemOpParams()
    kind = driver.CUstreamBatchMemOpType.CU_STREAM_MEM_OP_WRITE_VALUE_32
    operation.operation = operation.writeValue.operation = kind
    operation.writeValue.address = driver.CUdeviceptr(address)
    operation.writeValue.value = driver.cuuint32_t(value)
    operation.writeValue.flags = 0
    return operation


def _wait(address: int, value: int) -> object:
    """Wait for a value."""
    driver = _driver()
    operation = driver.CUstreamBatchMemOpParams()
    kind = driver.CUstreamBatchMemOpType.CU_STREAM_MEM_OP_WAIT_VALUE_32
    operation.operation = operation.waitValue.operation = kind
    operation.waitValue.address = driver.CUdeviceptr(address)
    operation.waitValue.value = driver.cuuint32_t(value)
    equal = driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_EQ
    operation.waitValue.flags = int(equal)
    return operation


def _enqueue(operations: list[object]) -> None:
    stream = torch.cuda.current_stream().cuda_stream
    (code,) = _driver().cuStreamBatchMemOp(stream, len(operations), operations, 0)
    if code:
        raise RuntimeError(f"cuStreamBatchMemOp failed: {code!r}")


def can_set_flags() -> bool:
    """Whether there is the driver's interface, which torch's CUDA builds bring."""
    try:
        _driver()
    except ImportError:
        return False
    return True


@lru_cache(maxsize=1)
def _driver() -> Any:  # noqa: ANN401 - without type stubs
    return import_module("cuda.bindings.driver")
