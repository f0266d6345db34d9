"""Training loops over small Llamas, for comparing loss curves with one eager rank."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ringcompile import backend
from ringcompile.passes.pipeline import Rewritten, run_passes
from ringcompile.torch_private import compile_with_inductor

VOCABULARY = 67
LENGTH = 24
NUM_STEPS = 10
CURVE_TOLERANCE = 1e-4


def build_llama(*, num_layers: int = 2, attention: str = "sdpa") -> Any:  # noqa: ANN401
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
    return LlamaForCausalLM(config).train()


def make_batches(num_steps: int = NUM_STEPS, batch: int = 2) -> list[Tensor]:
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
    """The loss of each step.

    By SGD, which, unlike Adam, tells a gradient from a multiple of it.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.5)
    losses = []
    for ids in batches:
        out = call(input_ids=ids, labels=ids)
        loss = out if isinstance(out, Tensor) else out.loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def train_eager(num_steps: int = NUM_STEPS, batch: int = 2) -> list[float]:
    """The curve of one eager rank."""
    model = build_llama()
    return train(model, model, make_batches(num_steps, batch))


def assert_curves_equal(got: Sequence[float], want: Sequence[float]) -> None:
    """Require each number of a curve to be that of one eager rank."""
    errors = [abs(a - b) for a, b in zip(got, want, strict=True)]
    assert max(errors) <= CURVE_TOLERANCE, f"{got} is not {want}"
    assert len(set(want)) > 1, "a curve changes"


def ring(
    model: Any,  # noqa: ANN401
    mesh: object,
    options: Mapping[str, Any] | None = None,
    **others: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    """Compile a model by the backend's name."""
    given = {"mesh": mesh, **(options or {})}
    return torch.compile(model, backend="ring", options=given, **others)


@contextmanager
def without_codegen() -> Iterator[list[Rewritten]]:
    """Let ``backend="ring"`` do all but generate code: what Inductor gets runs eagerly.

    A compile then takes seconds and not half a minute.

    Yields:
        What the passes make of each graph that is compiled inside.
    """
    found: list[Rewritten] = []

    def keep(*args: Any, **kwargs: Any) -> Rewritten:  # noqa: ANN401
        found.append(run_passes(*args, **kwargs))
        return found[-1]

    compile_graph = partial(compile_with_inductor, inner_compile=_run_eagerly)
    logger = logging.getLogger("ringcompile")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with (
            mock.patch.object(backend, "compile_with_inductor", compile_graph),
            mock.patch.object(backend, "run_passes", keep),
        ):
            yield found
    finally:  # the process of a rank outlives the test
        logger.setLevel(level)


def count_rings(found: Sequence[Rewritten]) -> int:
    """The number of attentions that became rings; none may have been refused."""
    assert not any(made.refusals for made in found)
    return sum(len(made.attentions) for made in found)


def _run_eagerly(
    graph: GraphModule, _inputs: Sequence[object], **_options: object
) -> Callable[..., Any]:
    def run(args: list[object]) -> object:
        return graph(*args)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run
