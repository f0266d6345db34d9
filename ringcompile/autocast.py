"""What autocast does on a device, be it one that torch knows nothing of."""

from contextlib import AbstractContextManager, nullcontext

import torch


def find_autocast_dtype(device_type: str) -> torch.dtype | None:
    """What autocast lowers to there; None: it is off, or unknown, as to meta."""
    if not torch.amp.is_autocast_available(device_type):
        return None
    is_on = torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if is_on else None


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Nothing is autocast inside."""
    if find_autocast_dtype(device_type) is None:
        return nullcontext()
    return torch.autocast(device_type, enabled=False)
