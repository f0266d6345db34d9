"""Ring attention as modules: any preset, and one in place of nn.MultiheadAttention.

A module compiles its own forward with the backend; every rank passes the same full
tensors and gets the whole result.
"""

from ringcompile.modules.attention import RingAttention
from ringcompile.modules.create import create_ring_attention
from ringcompile.modules.multihead import MultiheadRingAttention

__all__ = ["MultiheadRingAttention", "RingAttention", "create_ring_attention"]
