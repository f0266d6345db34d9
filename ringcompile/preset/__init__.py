"""Presets: ring attention systems by name, and the configuration that they read.

Source: SEMANTICS.md section 6.
"""

from ringcompile.preset.config import RingAttentionConfig, changed_fields
from ringcompile.preset.options import (
    explain_presets,
    find_hardware,
    pick_preset,
    read_options,
)
from ringcompile.preset.table import Preset, find_preset, presets, run_options

__all__ = [
    "Preset",
    "RingAttentionConfig",
    "changed_fields",
    "explain_presets",
    "find_hardware",
    "find_preset",
    "pick_preset",
    "presets",
    "read_options",
    "run_options",
]
