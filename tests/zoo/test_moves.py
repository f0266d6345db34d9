"""What is made whole on the way into an attention is listed once."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ringcompile

B, H, S, D = 2, 2, 16, 4


class KeyBias(nn.Module):
    """A bias of each key, computed from the tokens: its keys are cut, not its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(H * D, 3 * H * D)
        self.weigh = nn.Linear(H * D, H)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(B, S, 3, H, D).permute(2, 0, 3, 1, 4).unbind()
        bias = self.weigh(x).mT[:, :, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return out.transpose(1, 2).flatten(2)


def test_a_bias_of_keys_is_gathered_once() -> None:
    report = ringcompile.explain(KeyBias(), torch.randn(B, S, H * D), world_size=2)
    assert [a.status for a in report.attentions] == ["ring"]
    moved = [g for g in report.gathers if not g.what.startswith("output")]
    assert len(moved) == 1
    assert moved[0].because == "a row of biases is read over all keys"
