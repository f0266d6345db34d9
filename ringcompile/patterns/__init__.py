"""Patterns: which pairs an attention keeps on top of the user's own mask.

Source: SEMANTICS.md sections 2 and 3. Masks compose by ``&`` and ``|``.
"""

from ringcompile.patterns.adaptive import Adaptive
from ringcompile.patterns.base import (
    AtDensity,
    AttentionSpec,
    MaskPattern,
    Parts,
    Pattern,
    PerHead,
)
from ringcompile.patterns.blocks import (
    BigBird,
    DilatedBlocks,
    Fixed,
    GlobalLocal,
    Hierarchical,
    LocalWindow,
    Longformer,
    Variable,
)
from ringcompile.patterns.custom import Custom
from ringcompile.patterns.dilated import ConsecutiveDilated, GroupedDilated, LongNet
from ringcompile.patterns.picture import draw, save_image
from ringcompile.patterns.tokens import DilatedWindow, Sinks, Strided

__all__ = [
    "Adaptive",
    "AtDensity",
    "AttentionSpec",
    "BigBird",
    "ConsecutiveDilated",
    "Custom",
    "DilatedBlocks",
    "DilatedWindow",
    "Fixed",
    "GlobalLocal",
    "GroupedDilated",
    "Hierarchical",
    "LocalWindow",
    "LongNet",
    "Longformer",
    "MaskPattern",
    "Parts",
    "Pattern",
    "PerHead",
    "Sinks",
    "Strided",
    "Variable",
    "draw",
    "save_image",
]
