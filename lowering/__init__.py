"""The rewritten attention to kernels and P2P transfers, forward and backward.

Importing this package gives the ops of ``ringcompile.ops`` their meaning.
"""

if __name__ != "ringcompile.lowering":
    _message = f"import 'ringcompile.lowering', not {__name__!r}"
    raise ImportError(_message)

from ringcompile.lowering import (
    hops,
    reshard,
    ring,
    selected,
)
from ringcompile.lowering.tiles import math
from ringcompile.lowering.transports import process_group

__all__ = ["hops", "math", "process_group", "reshard", "ring", "selected"]
