"""A small model with one op class behind its attention.

The part under test is a function of the model's parameters, the attention's output
``h`` (B, S, E), ids and a padding mask; some attend once more behind it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

B, E, V = 2, 8, 5
LONGEST = 40

Part = Callable[["RuleModel", Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class RuleCase:
    """One op class.

    Attributes:
        name: of the case.
        part: what comes after the first attention.
        gathers: the ops that need the whole sequence, in order.
        rings: attentions that become rings, the first included.
    """

    name: str
    part: Part
    gathers: tuple[str, ...] = ()
    rings: int = 1


def attend(x: Tensor, *, is_causal: bool = True) -> Tensor:
    """Two heads on one stream."""
    q = x.unflatten(-1, (2, E // 2)).transpose(1, 2)
    out = F.scaled_dot_product_attention(q, q.sin(), q, is_causal=is_causal)
    return out.transpose(1, 2).flatten(2)


class RuleModel(nn.Module):
    """Linear, attention, then the part under test, with what parts may need."""

    def __init__(self, part: Part, *, is_causal: bool) -> None:
        super().__init__()
        self.part = part
        self.is_causal = is_causal
        self.first = nn.Linear(E, E)
        self.second = nn.Linear(E, E)
        self.head = nn.Linear(E, V)
        self.cls = nn.Parameter(torch.randn(1, 1, E))
        self.positions = nn.Parameter(torch.randn(1, LONGEST, E))
        self.table = nn.Embedding(LONGEST, E)
        self.conv = nn.Conv1d(E, E, 3, padding=1)
        self.depthwise = nn.Conv1d(E, E, 4, padding=3, groups=E)
        self.strided = nn.Conv1d(E, E, 3, stride=2, padding=1)
        self.batch_norm = nn.BatchNorm1d(E)
        self.group_norm = nn.GroupNorm(2, E)
        self.query = nn.Parameter(torch.randn(E))
        self.scale: Tensor
        self.register_buffer("scale", torch.linspace(1, 2, E))

    def forward(self, x: Tensor, ids: Tensor, keep: Tensor) -> Tensor:
        """The first attention and the part."""
        h = attend(self.first(x), is_causal=self.is_causal)
        return self.part(self, h, ids, keep)

    def again(self, x: Tensor) -> Tensor:
        """Another attention."""
        return attend(self.second(x), is_causal=self.is_causal)
