"""Small tensors that the host makes once and graphs copy to their device at each call.

From memory that is pinned, so that the host does not wait and CUDA graphs can capture
it. Invariant: what a captured graph copies from lives as long as the process.
"""

import torch
from torch import Tensor

_captured: list[Tensor] = []


def prepare_upload(x: Tensor) -> Tensor:
    """The same values where they are copied from fast; made once, and kept."""
    return x.pin_memory() if torch.cuda.is_available() else x


def upload(x: Tensor, device: torch.device) -> Tensor:
    """A copy on a device, behind what its current stream does."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured.append(x)
    return x.to(device, copy=True, non_blocking=True)
