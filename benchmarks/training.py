"""A training step of a Llama with random weights, ours and its peers.

Forward, loss and backward, no optimizer. All have the same weights and ids, and sum no
gradients over ranks: FSDP or DDP does that for each of them alike. What is compiled is
the model with its loss, so that nothing as long as the sequence leaves the graph.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from by_hand import attend_by_tiles, attend_gathered
from measure import Row, largest, time_slowest, try_together
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch_cp import ring_sdpa
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import ringcompile

# What CPUs train.
SMALL = {"heads": 8, "kv_heads": 2, "hidden": 64, "intermediate": 128, "vocab": 256}
_PEAK_TFLOPS = 989  # of an H200, dense bfloat16
_TOLERANCE = {"cuda": 1e-2, "cpu": 1e-4}  # of the loss; five times that of gradients


def _gather(
    _module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object
) -> tuple[Tensor, None]:
    group = dist.distributed_c10d._get_default_group()  # noqa: SLF001 - no public name
    out = attend_gathered(q, k, v, group, attend_by_tiles)
    return out.transpose(1, 2).contiguous(), None


# Under names that transformers makes no mask for. From positions that are cut by head
# and tail it would read packed sequences, and torch's ring takes no mask.
_UNMASKED, _GATHERED = "sdpa_without_mask", "gathered"
AttentionInterface.register(_UNMASKED, sdpa_attention_forward)
AttentionInterface.register(_GATHERED, _gather)


@dataclass(frozen=True, slots=True)
class Llama:
    """A decoder, and the sequence that it is trained on.

    Attributes:
        layers: how many.
        tokens: per rank.
        num_ranks: ranks that share the sequence.
        heads: of queries.
        kv_heads: of keys and values.
        hidden: features of a token.
        intermediate: features between the two products of an MLP.
        vocab: tokens that there are.
        is_checkpointed: whether each layer's activations are computed again.
    """

    layers: int
    tokens: int
    num_ranks: int
    heads: int = 32
    kv_heads: int = 8
    hidden: int = 4096
    intermediate: int = 14336
    vocab: int = 32000
    is_checkpointed: bool = False

    def __str__(self) -> str:
        again = "checkpointed, " if self.is_checkpointed else ""
        return (
            f"{again}{self.layers} layers, {self.heads}:{self.kv_heads} heads,"
            f" {self.tokens} tokens x {self.num_ranks}"
        )

    @property
    def total(self) -> int:
        """Tokens of the sequence."""
        return self.tokens * self.num_ranks

    @property
    def step_tflop(self) -> float:
        """Work of one rank that the model asks for: what is computed again is not.

        6 for each weight that multiplies and each token; of each layer's attention two
        products of the causal pairs forward, four backward.
        """
        head_size = self.hidden // self.heads
        projections = 2 * self.hidden * (self.heads + self.kv_heads) * head_size
        layer = projections + 3 * self.hidden * self.intermediate
        weights = self.layers * layer + self.hidden * self.vocab
        pairs = self.total**2 / 2 / self.num_ranks
        attention = 3 * 4 * pairs * self.hidden * self.layers
        return (6 * weights * self.tokens + attention) / 1e12

    def build(self, device: str, attention: str = "sdpa") -> LlamaForCausalLM:
        """The model, the same on all ranks."""
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=self.total,
            use_cache=False,
            attn_implementation=attention,  # type: ignore[call-arg]
        )
        with torch.device(device):
            model = LlamaForCausalLM(config)
        if device == "cuda":
            model = model.bfloat16()
        if self.is_checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[no-untyped-call]
        model.train()
        return model

    def draw(self, device: str) -> Tensor:
        """Ids, the same on all ranks."""
        generator = torch.Generator().manual_seed(1)
        return torch.randint(self.vocab, (1, self.total), generator=generator).to(
            device
        )


@dataclass(frozen=True, slots=True)
class Step:
    """What is trained.

    Attributes:
        model: has the gradients.
        forward: gives the loss.
        is_part: whether a rank's loss is its part of a sum.
        has_parts: whether a rank's gradients are.
    """

    model: nn.Module
    forward: Callable[[], Tensor]
    is_part: bool
    has_parts: bool

    def run(self) -> Tensor:
        """The loss; gradients are the model's."""
        self.model.zero_grad(set_to_none=True)
        loss = self.forward()
        loss.backward()
        return loss.detach()


class _Loss(nn.Module):
    """Of all tokens but the first: what a user compiles."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        loss: Tensor = self.model(input_ids=ids, labels=ids).loss
        return loss


class _LossOfRows(nn.Module):
    """A rank's part: labels are shifted before they are cut."""

    def __init__(self, model: LlamaForCausalLM, num_labels: int) -> None:
        super().__init__()
        self.model = model
        self.num_labels = num_labels

    def forward(self, ids: Tensor, positions: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = self.model(
            input_ids=ids,
            position_ids=positions,
            labels=labels,
            shift_labels=labels,
            num_items_in_batch=self.num_labels,
        ).loss
        return loss


Trainer = Callable[[Llama, DeviceMesh], AbstractContextManager[Step]]


@contextmanager
def _ring(sizes: Llama, mesh: DeviceMesh) -> Iterator[Step]:
    model = sizes.build(mesh.device_type)
    ids = sizes.draw(mesh.device_type)
    options: Any = {"grads": "local", "local_scale": "sum"}
    compiled = torch.compile(_Loss(model), backend="ring", options=options)
    yield Step(model, lambda: compiled(ids), is_part=False, has_parts=mesh.size() > 1)


@contextmanager
def _alone(sizes: Llama, mesh: DeviceMesh) -> Iterator[Step]:
    module = _Loss(sizes.build(mesh.device_type))
    ids = sizes.draw(mesh.device_type)
    yield Step(module.model, lambda: module(ids), is_part=False, has_parts=False)


def _draw_buffers(sizes: Llama, device: str) -> list[Tensor]:
    """Ids, positions and labels, shifted: of all tokens."""
    ids = sizes.draw(device)
    positions = torch.arange(sizes.total, device=device)[None]
    return [ids, positions, nn.functional.pad(ids[:, 1:], (0, 1), value=-100)]


@contextmanager
def _gathered(sizes: Llama, mesh: DeviceMesh) -> Iterator[Step]:
    model = sizes.build(mesh.device_type, _GATHERED)
    module = _LossOfRows(model, sizes.total - 1)
    rows = [
        ringcompile.shard(x, 1, layout="zigzag")
        for x in _draw_buffers(sizes, mesh.device_type)
    ]
    yield Step(model, lambda: module(*rows), is_part=True, has_parts=True)


def _context_parallel(rotate: str, *, is_compiled: bool) -> Trainer:
    @contextmanager
    def enter(sizes: Llama, mesh: DeviceMesh) -> Iterator[Step]:
        model = sizes.build(mesh.device_type, _UNMASKED)
        module: Callable[..., Tensor] = _LossOfRows(model, sizes.total - 1)
        buffers = _draw_buffers(sizes, mesh.device_type)
        if is_compiled:
            module = torch.compile(module)
        with ring_sdpa(mesh, buffers, [1, 1, 1], rotate):
            yield Step(model, lambda: module(*buffers), is_part=True, has_parts=True)

    return enter


TRAINERS: dict[str, Trainer] = {
    "ring": _ring,
    "torch CP, all-to-all": _context_parallel("alltoall", is_compiled=False),
    "torch CP, all-gather": _context_parallel("allgather", is_compiled=False),
    "torch CP, all-to-all, compiled": _context_parallel("alltoall", is_compiled=True),
    "torch CP, all-gather, compiled": _context_parallel("allgather", is_compiled=True),
    "all-gather + cuDNN": _gathered,
    "one rank, eager": _alone,  # of the whole sequence: to compare on CPU
}


def try_training(name: str, sizes: Llama, mesh: DeviceMesh, rounds: int) -> Row:
    """The row of a training step; peak memory is the fullest rank's.

    The first step also compiles, and tries kernels out: its peak stands by itself.
    """
    torch.compiler.reset()
    gc.collect()  # the last model, whose graphs are circles
    on_gpu = mesh.device_type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()

    def start(stack: ExitStack) -> Callable[[], Row]:
        step = stack.enter_context(TRAINERS[name](sizes, mesh))
        stack.callback(_release, step.model)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()  # the model's making is no step
        loss = step.run()
        first = 0.0
        if on_gpu:
            first = _read_peak()
            torch.cuda.reset_peak_memory_stats()  # nor is its compilation

        def measure() -> Row:
            row = _measure(step, sizes, mesh, rounds) | _check(step, loss)
            if not on_gpu:
                return row
            return row | _read_memory(mesh) | {"first_step_gib": largest(first, mesh)}

        return measure

    return try_together(start)


def _release(model: nn.Module) -> None:
    """Free its weights, whatever still holds it: they would count in the next peak."""
    for parameter in model.parameters():
        parameter.grad = None
        parameter.data = parameter.data.new_empty(0)


def _measure(step: Step, sizes: Llama, mesh: DeviceMesh, rounds: int) -> Row:
    seconds = time_slowest(step.run, mesh, rounds)
    row: Row = {"step_ms": 1e3 * seconds, "tokens_per_s": sizes.tokens / seconds}
    if mesh.device_type == "cuda":
        row["mfu"] = sizes.step_tflop / seconds / _PEAK_TFLOPS
    return row


def _check(step: Step, loss: Tensor) -> Row:
    """The loss, and the size of one gradient that all layers and rows count in."""
    loss = loss.float()
    if step.is_part:
        dist.all_reduce(loss)
    norms = (x for name, x in step.model.named_parameters() if "layernorm" in name)
    grad = next(norms).grad
    assert grad is not None, "there was a backward"
    grad = grad.float()
    if step.has_parts:
        dist.all_reduce(grad)
    return {"loss": float(loss), "grad_norm": float(grad.norm())}


def _read_memory(mesh: DeviceMesh) -> Row:
    """Of tensors; and of all, buffers of transfers and what is cached included."""
    free, total = torch.cuda.mem_get_info()
    return {
        "peak_gib": largest(_read_peak(), mesh),
        "device_gib": largest((total - free) / 2**30, mesh),
    }


def _read_peak() -> float:
    """The most that tensors of this rank took at once."""
    return torch.cuda.max_memory_allocated() / 2**30


def compare(row: Row, ring: Row, device: str) -> Row:
    """The row with the ring's loss beside its own, or an error where they differ."""
    if "error" in row or "error" in ring:
        return row
    row = row | {f"ring's {name}": ring[name] for name in ("loss", "grad_norm")}
    for name, times in (("loss", 1), ("grad_norm", 5)):
        a, b = row[name], ring[name]
        if not abs(a - b) <= times * _TOLERANCE[device] * abs(b):
            row["error"] = f"{name} is {a:.6g}, the ring's {b:.6g}"
    return row
