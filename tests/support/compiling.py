"""Compile a model on this rank and keep what the compiler said of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.fx import GraphModule

from ringcompile import backend
from ringcompile.config import RingOptions
from ringcompile.mesh import find_ranks
from ringcompile.passes.pipeline import Rewritten


@dataclass(slots=True)
class Record:
    """What the compiler made of a model, as plain data that travels between processes.

    Attributes:
        num_graphs: graphs that Dynamo handed over.
        rings: user line of each attention that became a ring.
        refused: what each other attention was refused for.
        gathers: op and reason of each gather that is no output.
        masks: text of each ring's mask.
        layouts: layout of each ring.
        text: the last graph after rewriting.
    """

    num_graphs: int = 0
    rings: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    gathers: list[str] = field(default_factory=list)
    masks: list[str] = field(default_factory=list)
    layouts: list[str] = field(default_factory=list)
    text: str = ""

    def note(self, made: Rewritten) -> None:
        """Add one graph."""
        self.num_graphs += 1
        self.rings += [a.plan.name for a in made.attentions]
        self.refused += [f"{r.what}: {r.because}" for r in made.refusals]
        self.gathers += [
            f"{g.what}: {g.because}"
            for g in made.gathered
            if not g.what.startswith("output")
        ]
        self.masks += [str(a.region.mask) for a in made.attentions]
        self.layouts += [str(a.plan.schedule.layout) for a in made.attentions]
        self.text = made.texts.get("rewrite", "")


def compile_ring(
    model: nn.Module | Callable[..., Any],
    group: ProcessGroup | None,
    *,
    compiler: str = "inductor",
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
) -> tuple[Callable[..., Any], Record]:
    """Compile for the ranks of ``group``.

    Args:
        model: what to compile.
        group: the context-parallel group; None for one rank.
        compiler: ``inductor``, or ``aot_eager`` or ``eager`` to run the rewritten graph
            without Inductor.
        options: options of the backend, beside ``mesh``.
        dynamic: as in ``torch.compile``.

    Returns:
        The compiled callable, and a record that fills at its first call.
    """
    record = Record()
    chosen = {"mesh": group, **(options or {})}

    def compile_graph(gm: GraphModule, inputs: Sequence[object]) -> Callable[..., Any]:
        settings = RingOptions.from_user(chosen)
        made = backend._rewrite(gm, inputs, settings, find_ranks(group))
        record.note(made)
        if compiler == "inductor":
            return backend.ring(gm, inputs, options=chosen)
        if compiler == "eager":
            return made.gm.forward
        aot_eager = torch._dynamo.lookup_backend("aot_eager")
        result: Callable[..., Any] = aot_eager(made.gm, inputs)
        return result

    return torch.compile(model, backend=compile_graph, dynamic=dynamic), record
