"""One rank of the demo: an unmodified Llama, compiled and eager."""

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from ringcompile.demo.records import (
    SMALL_GRADIENT,
    DemoSize,
    Errors,
    Plan,
    RankResult,
    Run,
    Stage,
)
from ringcompile.report.explain import explain

IGNORED = -100
PEER_TIMEOUT = timedelta(minutes=10)

Outcome = dict[str, Tensor]
"""``loss``, ``logits`` and the gradient of each parameter by its name."""


def run_rank(
    rank: int, size: DemoSize, store: str, tell: Callable[[Stage], None]
) -> RankResult:
    """Run the model compiled, then on rank 0 in eager, and compare.

    Args:
        rank: of this process.
        size: what to run.
        store: a path that all ranks meet at.
        tell: hears of each stage.
    """
    torch.set_num_threads(1)  # ranks share the cores of one machine
    tell(Stage.MEET)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size.ranks,
        timeout=PEER_TIMEOUT,
    )
    model, inputs = build_model(size), make_inputs(size)
    compiled = torch.compile(model, backend="ring")
    got = _run_twice(compiled, model, inputs, tell)
    eager = None
    if rank == 0:
        tell(Stage.EAGER)
        eager = _run_twice(model, model, inputs, lambda _: None)
        exact = _run_exact(model.double(), inputs)
    else:
        tell(Stage.WAIT)
        exact = {name: _empty_double(x) for name, x in got.outcome.items()}
    for value in exact.values():
        dist.broadcast(value, src=0)
    tell(Stage.COMPARE)
    result = RankResult(got.compare(exact))
    if eager is not None:
        tell(Stage.EXPLAIN)
        plan = _read_plan(size)
        result = RankResult(got.compare(exact), eager.compare(exact), plan)
    tell(Stage.DONE)
    return result


def _read_plan(size: DemoSize) -> Plan:
    ids, labels = make_inputs(size).values()
    report = explain(
        build_model(size), input_ids=ids, labels=labels, world_size=size.ranks
    )
    return Plan(
        rings=sum(a.status == "ring" for a in report.attentions),
        attentions=len(report.attentions),
        sent_bytes=report.bytes_per_rank,
    )


def build_model(size: DemoSize) -> nn.Module:
    """The same random weights on every rank."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=2 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=size.length,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def make_inputs(size: DemoSize) -> dict[str, Tensor]:
    """Ids and labels; the first eighth of the labels, a prompt, is ignored."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(size.vocabulary, (1, size.length), generator=generator)
    labels = ids.clone()
    labels[:, : size.length // 8] = IGNORED
    return {"input_ids": ids, "labels": labels}


@dataclass(frozen=True, slots=True)
class _Timed:
    outcome: Outcome
    peak_bytes: int
    first_s: float
    next_s: float

    def compare(self, exact: Outcome) -> Run:
        """The run's record, against eager in float64."""
        errors = _compare(self.outcome, exact)
        return Run(errors, self.peak_bytes, self.first_s, self.next_s)


def _run_twice(
    call: Callable[..., Any],
    model: nn.Module,
    inputs: dict[str, Tensor],
    tell: Callable[[Stage], None],
) -> _Timed:
    start = time.perf_counter()
    _run_once(call, model, inputs, tell)
    middle = time.perf_counter()
    tell(Stage.AGAIN)
    outcome = _run_once(call, model, inputs, lambda _: None)
    end = time.perf_counter()
    return _Timed(outcome, _peak_bytes(), middle - start, end - middle)


def _run_once(
    call: Callable[..., Any],
    model: nn.Module,
    inputs: dict[str, Tensor],
    tell: Callable[[Stage], None],
) -> Outcome:
    model.zero_grad()
    tell(Stage.FORWARD)
    output = call(**inputs)
    tell(Stage.BACKWARD)
    output.loss.backward()
    return _outcome(model, output.loss, output.logits)


def _run_exact(model: nn.Module, inputs: dict[str, Tensor]) -> Outcome:
    """In float64 throughout: transformers computes any loss in float32."""
    model.zero_grad()
    logits = model(inputs["input_ids"]).logits
    loss = functional.cross_entropy(
        logits[0, :-1], inputs["labels"][0, 1:], ignore_index=IGNORED
    )
    loss.backward()
    return _outcome(model, loss, logits)


def _outcome(model: nn.Module, loss: Tensor, logits: Tensor) -> Outcome:
    gradients = {
        name: p.grad.clone()
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    return {"loss": loss.detach(), "logits": logits.detach(), **gradients}


def _empty_double(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=torch.float64)


def _compare(got: Outcome, exact: Outcome) -> Errors:
    names = [name for name in exact if name not in {"loss", "logits"}]
    floor = SMALL_GRADIENT * max(_largest(exact[name]) for name in names)
    errors = {name: _error(got[name], exact[name], floor) for name in names}
    # max() passes over a NaN; this does not.
    worst = max(names, key=lambda name: (errors[name] != errors[name], errors[name]))
    return Errors(
        loss=got["loss"].item(),
        loss_error=_error(got["loss"], exact["loss"]),
        logits=_error(got["logits"], exact["logits"]),
        gradient=errors[worst],
        gradient_name=worst,
    )


def _error(got: Tensor, exact: Tensor, floor: float = 0.0) -> float:
    return _largest(got.double() - exact) / max(_largest(exact), floor)


def _largest(x: Tensor) -> float:
    return x.abs().max().item()


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kibibytes elsewhere
