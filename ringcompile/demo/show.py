"""The demo as it is seen: a line for each rank while it runs, then a table."""

from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from ringcompile.demo.records import TOLERANCE, DemoSize, Results, Run, Stage
from ringcompile.report.text import format_bytes

_ORDER = tuple(Stage)


class Display:
    """Shows how far each rank is; plain lines where there is no terminal."""

    def __init__(self, size: DemoSize, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("rank {task.fields[rank]}"),
            BarColumn(bar_width=20),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        console.print(
            f"Llama of {size.layers} layers, {size.heads}:{size.kv_heads} heads, width"
            f" {size.hidden}, {size.length} tokens; torch.compile(model,"
            f' backend="ring") on {size.ranks} CPU ranks over gloo',
            highlight=False,
        )
        self._tasks = [
            self._progress.add_task("starting", total=len(_ORDER) - 1, rank=rank)
            for rank in range(size.ranks)
        ]

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        stack: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def on_stage(self, rank: int, stage: Stage) -> None:
        """Show what a rank does now."""
        self._progress.update(
            self._tasks[rank], description=stage.value, completed=_ORDER.index(stage)
        )
        if rank == 0 and not self._console.is_terminal:
            self._console.print(f"rank 0: {stage.value}", highlight=False)


def format_results(results: Results) -> Group:
    """The table, and in one line what it says."""
    table = Table(title="errors against eager in float64, as a share of the largest")
    for name in ("", "loss", "loss err", "logits err", "grad err", "rings", "sent"):
        table.add_column(name, justify="right" if name else "left")
    for name in ("peak memory", "first run", "next run"):
        table.add_column(name, justify="right")
    table.add_row("eager float32", *_cells(results.eager, "", ""))
    rings = f"{results.plan.rings} of {results.plan.attentions}"
    for rank, run in enumerate(results.ranks):
        sent = format_bytes(results.plan.sent_bytes[rank])
        table.add_row(f"rank {rank}", *_cells(run, rings, sent))
    return Group(table, _format_verdict(results))


def _cells(run: Run, rings: str, sent: str) -> list[str]:
    e = run.errors
    errors = (f"{x:.1e}" for x in (e.loss_error, e.logits, e.gradient))
    seconds = (f"{run.first_s:.1f} s", f"{run.next_s:.1f} s")
    peak = format_bytes(run.peak_bytes)
    return [f"{e.loss:.6f}", *errors, rings, sent, peak, *seconds]


def _format_verdict(results: Results) -> Text:
    errors = max((run.errors for run in results.ranks), key=lambda e: e.gradient)
    text = (
        f"worst gradient: {errors.gradient_name}; every error must be at most"
        f" {TOLERANCE:g}, and every attention a ring: "
    )
    right, wrong = Text("right", "bold green"), Text("WRONG", "bold red")
    return Text(text) + (right if results.is_right else wrong)
