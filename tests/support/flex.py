"""flex_attention on CPU: torch itself trains it on GPUs alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from torch.nn.attention import flex_attention as flex_module


@contextmanager
def trained_on_cpu() -> Iterator[None]:
    """Let Dynamo trace it with gradients, as it does on GPUs."""
    with patch.object(flex_module, "_validate_device", lambda *_: None):
        yield
