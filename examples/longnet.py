"""LongNet-style training: dilated attention learns what dense attention learns.

    torchrun --nproc-per-node=4 examples/longnet.py
    python examples/longnet.py                          # the same on one rank

The model is a Hugging Face Llama as it comes, with random weights; what attention it
runs is an option of the compiler. The task needs both ends of a sequence: its first
half states facts ("key 3 has value 5", said over four tokens) at random places among
blanks, its second half asks for keys, and the label of a question is that key's value
in this sequence. Every batch is new, so accuracy is always on unseen sequences.

- ``exact``: dense causal attention.
- ``longnet``: three segments, of which the longest holds the whole sequence but only
  every fourth token of it. Heads select different ones of them, so that every question
  shares a head with one token of each fact.
- ``short``: ``longnet`` without that longest segment. No fact reaches its question: the
  control, which stays at chance.

Needs ``pip install 'ringcompile[demo]'``. Uses GPUs if there are any, one per rank.
"""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from operator import add
from statistics import mean, median
from typing import Any

import torch
import torch.distributed as dist
from torch import Generator, Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import ringcompile
from ringcompile.patterns import LongNet

NUM_HEADS = 8  # two for each residue of the largest rate
IGNORED = -100  # what the Llama's loss leaves out
JUDGED_STEPS = 20  # accuracy and loss are means over the last steps


@dataclass(frozen=True)
class Task:
    """Recall over half a sequence; a token is blank, a fact, a question or a value."""

    length: int = 128
    batch: int = 16
    num_keys: int = 4
    num_values: int = 8
    fact_length: int = 4

    @property
    def vocabulary(self) -> int:
        """Number of different tokens."""
        return 1 + self.num_keys * self.num_values + self.num_keys + self.num_values

    def draw(self, generator: Generator) -> tuple[Tensor, Tensor]:
        """New ids and labels, each ``(batch, length)``."""
        first_question = 1 + self.num_keys * self.num_values
        first_value = first_question + self.num_keys
        half, shape = self.length // 2, (self.batch, self.num_keys)

        values = torch.randint(self.num_values, shape, generator=generator)
        facts = 1 + torch.arange(self.num_keys) * self.num_values + values
        slot = half // self.num_keys  # each fact lies somewhere in a slot of its own
        slots = torch.rand(shape, generator=generator).argsort(1)
        room = slot - self.fact_length + 1
        starts = slots * slot + torch.randint(room, shape, generator=generator)
        keys = torch.randint(self.num_keys, (self.batch, half), generator=generator)

        ids = torch.zeros(self.batch, self.length, dtype=torch.long)
        for n in range(self.fact_length):
            ids.scatter_(1, starts + n, facts)
        ids[:, half:] = first_question + keys
        labels = torch.full_like(ids, IGNORED)
        # A Llama's loss compares its output at a token with the next token's label.
        labels[:, half + 1 :] = (first_value + values.gather(1, keys))[:, :-1]
        return ids, labels


def build_options(attention: str, length: int) -> dict[str, Any]:
    """What the compiler is asked for."""
    segments: tuple[int, ...] = (length // 16, length // 4, length)
    rates: tuple[int, ...] = (1, 2, 4)
    if attention == "exact":
        return {"attention": "exact"}
    if attention == "short":
        segments, rates = segments[:-1], rates[:-1]
    # Neighbours on one rank: segments within its shard cost no communication.
    return {"attention": LongNet(segments, rates), "layout": "contiguous"}


def build_model(task: Task, num_layers: int = 2, width: int = 64) -> nn.Module:
    """The same random weights on every rank."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=task.vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=num_layers,
        num_attention_heads=NUM_HEADS,
        max_position_embeddings=task.length,
        initializer_range=0.1,  # the default, 0.02, is for models of larger width
        use_cache=False,
    )
    return LlamaForCausalLM(config)


@dataclass(frozen=True)
class Step:
    """What one training step gave."""

    loss: float
    accuracy: float
    seconds: float


def train(
    model: nn.Module,
    call: Callable[..., Any],
    task: Task,
    num_steps: int,
    *,
    learning_rate: float = 5e-3,
) -> list[Step]:
    """Train ``model`` through ``call``, which is the model, compiled."""
    generator = Generator().manual_seed(1)  # the same data on every rank
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, (0.9, 0.95))
    steps = []
    for _ in range(num_steps):
        start = time.perf_counter()
        ids, labels = (x.to(device) for x in task.draw(generator))
        output = call(input_ids=ids, labels=labels)
        output.loss.backward()  # every rank must
        optimizer.step()
        optimizer.zero_grad()
        asked = labels[:, 1:] != IGNORED
        right = (output.logits[:, :-1].argmax(-1) == labels[:, 1:])[asked]
        loss, accuracy = output.loss.item(), right.float().mean().item()
        steps.append(Step(loss, accuracy, time.perf_counter() - start))
    return steps


def count_sent_bytes(
    model: nn.Module, task: Task, options: dict[str, Any], num_ranks: int
) -> int:
    """Bytes of K, V and their gradients that the busiest rank sends in one step."""
    device = next(model.parameters()).device
    ids, labels = (x.to(device) for x in task.draw(Generator()))
    report = ringcompile.explain(
        model, input_ids=ids, labels=labels, world_size=num_ranks, options=options
    )
    traffic = report.traffic
    sent: int = max(map(add, traffic.hops_forward, traffic.hops_backward))
    return sent


def main() -> None:
    """Train once for each attention and print a table."""
    names = ("exact", "longnet", "short")
    parser = argparse.ArgumentParser(description="dense and dilated on one task")
    parser.add_argument("--attention", nargs="+", choices=names, default=names)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--length", type=int, default=Task.length, help="tokens")
    parser.add_argument("--batch", type=int, default=Task.batch, help="sequences")
    chosen = parser.parse_args()
    task = Task(chosen.length, chosen.batch)

    rank, num_ranks, device = 0, 1, torch.device("cpu")
    if dist.is_torchelastic_launched():  # by torchrun
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        rank, num_ranks = dist.get_rank(), dist.get_world_size()
    if torch.cuda.is_available():
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)

    told_ranks = num_ranks if num_ranks > 1 else 4  # explain needs no peers
    if rank == 0:
        chance, loss = 1 / task.num_values, math.log(task.num_values)
        print(f"torch {torch.__version__}, {num_ranks} x {device.type};", end=" ")
        print(f"chance: accuracy {chance:.3f}, loss {loss:.3f}\n")
        sent = f"KiB a step that each of {told_ranks} ranks sends"
        print(f"| attention | accuracy | loss | steps | {sent} | s a step | first |")
        print("|---|---|---|---|---|---|---|", flush=True)
    for attention in chosen.attention:
        options = build_options(attention, task.length)
        model = build_model(task).to(device)
        compiled = torch.compile(model, backend="ring", options=options)
        steps = train(model, compiled, task, chosen.steps)
        if rank == 0:
            sent_bytes = count_sent_bytes(model, task, options, told_ranks)
            print(format_row(attention, steps, sent_bytes), flush=True)
    if num_ranks > 1:
        dist.destroy_process_group()


def format_row(attention: str, steps: list[Step], sent_bytes: int) -> str:
    """One row of the table; the first step, which compiles, stands apart."""
    last = steps[-JUDGED_STEPS:]
    accuracy, loss = mean(s.accuracy for s in last), mean(s.loss for s in last)
    seconds = median(s.seconds for s in steps)
    return (
        f"| `{attention}` | {accuracy:.3f} | {loss:.3f} | {len(steps)} "
        f"| {sent_bytes / 1024:.0f} | {seconds:.2f} | {steps[0].seconds:.0f} s |"
    )


if __name__ == "__main__":
    main()
