"""Presets: ring attention systems by name, and the configuration that they read.

Source: SEMANTICS.md section 6.
"""

from ringcompile.presets.config import RingAttentionConfig
from ringcompile.presets.options import read_options
from ringcompile.presets.table import Preset, find_preset, presets

__all__ = [
    "Preset",
    "RingAttentionConfig",
    "find_preset",
    "presets",
    "read_options",
]
