"""One tile under biases of every shape, and the same by autograd in float64."""

import torch
from torch import Tensor

from ringcompile import ops
from ringcompile.ir.mask import Mask, causal
from ringcompile.ir.text import format_mask

B, H, G, S, D = 2, 4, 2, 150, 8
SCALE, SOFTCAP = 0.4, 1.5
SHAPES = (
    (B, H, S, S),
    (1, 1, S, S),
    (B, 1, 1, S),
    (1, H, 1, 2 * S - 1),
    (1, H, 1, 1),
    (B, 1, S, 1),
    (1, 1, S, 2 * S - 1),
)
RELATIVE = [n for n, shape in enumerate(SHAPES) if shape[3] == 2 * S - 1]


def make_tensors(device: str) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """q, k, v and biases; the gradient of the output; positions of rows, shuffled."""
    random = torch.Generator().manual_seed(0)
    sizes = [(B, H, S, D), (B, G, S, D), (B, G, S, D), *SHAPES, (B, H, S, D)]
    *inputs, grad = (
        torch.randn(size, generator=random, dtype=torch.double).to(device)
        for size in sizes
    )
    positions = [torch.randperm(S, generator=random)[None].to(device) for _ in range(2)]
    return inputs, grad, positions


def run_tile(device: str, dtype: torch.dtype, order: str = "natural") -> list[Tensor]:
    """out and all gradients; those of a bias with a column per key are by key row."""
    inputs, grad, positions = make_tensors(device)
    q, k, v, *biases = (x.to(dtype) for x in inputs)
    options = {
        "mask": format_mask(Mask(causal())),
        "scale": SCALE,
        "softcap": SOFTCAP,
        "relative": RELATIVE,
        "block_order": order,
    }
    out, lse = ops.MASKED_ATTENTION(q, k, v, *positions, [], biases, **options)
    grads = ops.MASKED_ATTENTION_BACKWARD(
        *(grad.to(dtype), q, k, v, out.to(dtype), lse, *positions, [], biases),
        **options,
        learned=list(range(len(SHAPES))),
    )
    return [out, *grads]


def expect_tile(device: str) -> list[Tensor]:
    """What ``run_tile`` should give."""
    inputs, grad, (q_pos, k_pos) = make_tensors(device)
    q, k, v, *biases = (x.requires_grad_() for x in inputs)
    at_q, at_k = q_pos[0, :, None], k_pos[0]
    scores = SCALE * (q @ k.repeat_interleave(H // G, 1).mT)
    scores = SOFTCAP * torch.tanh(scores / SOFTCAP)
    by_key = []
    for n, bias in enumerate(biases):
        if n in RELATIVE:
            index = (at_k - at_q + S - 1).expand(*bias.shape[:2], S, S)
            added = bias.expand(-1, -1, S, -1).gather(3, index)
        elif bias.shape[3] == S:
            by_key.append(n)
            added = bias[..., at_k]
        else:
            added = bias
        scores = scores + added
    weights = scores.masked_fill(at_k > at_q, -torch.inf).softmax(-1)
    out = weights @ v.repeat_interleave(H // G, 1)
    dq, dk, dv, *d_biases = torch.autograd.grad(out, (q, k, v, *biases), grad)
    for n in by_key:
        d_biases[n] = d_biases[n][..., at_k]
    return [out.detach(), dq, dk, dv, *d_biases]
