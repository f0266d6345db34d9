"""Training loops over small Llamas, for comparing loss curves with one eager rank."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ringcompile import backend
from ringcompile.torch_private import compile_with_inductor

VOCABULARY = 67
LENGTH = 24
CURVE_TOLERANCE = 1e-4


def build_llama(*, num_layers: int = 2, attention: str = "sdpa") -> nn.Module:
    """A small random Llama, the same at every call."""
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        use_cache=False,
    )
    config._attn_implementation = attention
    model = LlamaForCausalLM(config)
    assert isinstance(model, nn.Module)
    return model.train()


def make_batches(num_steps: int, batch: int = 2) -> list[Tensor]:
    """Ids of each step; labels are the same."""
    generator = torch.Generator().manual_seed(1)
    shape = (batch, LENGTH)
    return [
        torch.randint(0, VOCABULARY, shape, generator=generator)
        for _ in range(num_steps)
    ]


def train(
    model: nn.Module, call: Callable[..., Any], batches: Sequence[Tensor]
) -> list[float]:
    """The loss of each step, with weights that each step changes."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.5)
    losses = []
    for ids in batches:
        loss = call(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def assert_curves_equal(got: Sequence[float], want: Sequence[float]) -> None:
    """Require each step's loss to be that of one eager rank."""
    errors = [abs(a - b) for a, b in zip(got, want, strict=True)]
    assert max(errors) <= CURVE_TOLERANCE, f"{got} is not {want}"


@contextmanager
def without_codegen() -> Iterator[None]:
    """Let ``backend="ring"`` do all but generate code: what Inductor gets runs eagerly.

    A compile then takes a second and not half a minute.
    """
    compile_graph = partial(compile_with_inductor, inner_compile=_run_eagerly)
    with mock.patch.object(backend, "compile_with_inductor", compile_graph):
        yield


def _run_eagerly(
    graph: GraphModule, _inputs: Sequence[object], **_options: object
) -> Callable[..., Any]:
    def run(args: list[object]) -> object:
        return graph(*args)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run
