"""Keys and values among a model's outputs are told apart, and warned of."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from ringcompile.config import RingOptions
from ringcompile.mesh import Ranks
from ringcompile.passes.caches import find_cache_outputs
from ringcompile.passes.pipeline import Rewritten, run_passes

WIDTH = 16


class Cached(nn.Module):
    """Returns its keys and values as Hugging Face models do: after an empty cache."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q, k, v = (
            y.view(1, -1, 2, WIDTH // 2).transpose(1, 2)
            for y in self.qkv(x).chunk(3, dim=-1)
        )
        k = torch.cat([torch.empty(0), k], dim=-2)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out, k, q, v.clone()


def passes_of(**options: str) -> Rewritten:
    made: list[Rewritten] = []

    def backend(gm: GraphModule, example_inputs: list[Tensor]) -> object:
        chosen = RingOptions.from_user(options)
        ranks = Ranks(0, 2, "nobody")
        made.append(
            run_passes(gm, example_inputs, options=chosen, ranks=ranks, sources="")
        )
        return gm.forward

    torch.compiler.reset()
    torch.compile(Cached(), backend=backend, dynamic=False)(torch.ones(1, 8, WIDTH))
    return made[0]


def test_keys_and_values_are_told_from_other_outputs() -> None:
    with pytest.warns(UserWarning, match="use_cache=False") as caught:
        made = passes_of()
    assert len(caught) == 1
    assert find_cache_outputs([a.region for a in made.attentions]) == (1, 3)


@pytest.mark.parametrize("is_trained", [True, False])
def test_silent_where_nothing_is_lost(*, is_trained: bool) -> None:
    with warnings.catch_warnings(), torch.set_grad_enabled(is_trained):
        warnings.simplefilter("error")
        passes_of(outputs="sharded" if is_trained else "gathered")
