"""Exact, dilated and block-sparse ring attention as a torch.compile backend.

``torch.compile(model, backend="ring")`` needs no import; this package is for looking at
what it does. Names are imported when they are first used, so that importing the package
costs little.
"""

import importlib
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from ringcompile.config import Environment, RingOptions, set_up_logging
from ringcompile.errors import (
    OptionError,
    PlanError,
    RankMismatchError,
    RingCompileError,
    ShardingError,
    TransportError,
    UnsupportedAttentionError,
)

if TYPE_CHECKING:
    from ringcompile import patterns
    from ringcompile.backend import rewrite
    from ringcompile.modules import (
        MultiheadRingAttention,
        RingAttention,
        create_ring_attention,
    )
    from ringcompile.preset import RingAttentionConfig, presets
    from ringcompile.report.explain import explain
    from ringcompile.report.report import Report
    from ringcompile.shards import shard, unshard

__all__ = [
    "MultiheadRingAttention",
    "OptionError",
    "PlanError",
    "RankMismatchError",
    "Report",
    "RingAttention",
    "RingAttentionConfig",
    "RingCompileError",
    "RingOptions",
    "ShardingError",
    "TransportError",
    "UnsupportedAttentionError",
    "create_ring_attention",
    "explain",
    "patterns",
    "presets",
    "rewrite",
    "shard",
    "unshard",
]

_LATER = {
    "MultiheadRingAttention": "ringcompile.modules",
    "Report": "ringcompile.report.report",
    "RingAttention": "ringcompile.modules",
    "RingAttentionConfig": "ringcompile.preset",
    "create_ring_attention": "ringcompile.modules",
    "explain": "ringcompile.report.explain",
    "patterns": "",
    "presets": "ringcompile.preset",
    "rewrite": "ringcompile.backend",
    "shard": "ringcompile.shards",
    "unshard": "ringcompile.shards",
}


def __getattr__(name: str) -> object:
    if name not in _LATER:
        message = f"module 'ringcompile' has no attribute {name!r}"
        raise AttributeError(message)
    if not _LATER[name]:
        return importlib.import_module(f"ringcompile.{name}")
    return getattr(importlib.import_module(_LATER[name]), name)


def __dir__() -> list[str]:
    return __all__


def _ring(gm: Any, example_inputs: Any, **options: Any) -> Callable[..., object]:  # noqa: ANN401 - torch is not imported yet
    from ringcompile.backend import ring  # noqa: PLC0415 - seconds to import

    return ring(gm, example_inputs, **options)


def _register_backend() -> None:
    """Where the package is not installed, torch finds no entry point."""
    if "ring" in entry_points(group="torch_dynamo_backends").names:
        return
    from ringcompile.torch_private import register_backend  # noqa: PLC0415

    register_backend("ring", _ring)


set_up_logging(Environment.read())
_register_backend()
