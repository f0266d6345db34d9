"""The demo as it is seen: a line for each rank while it runs, then a table."""

from types import TracebackType
from typing import Self

from rich.box import SIMPLE_HEAD
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

from ringcompile.demo.records import TOLERANCE, DemoSize, Results, Stage
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
    """The table, a column for each run, and in one line what it says."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column()
    ranks = (f"rank {n}" for n in range(len(results.ranks)))
    for name in ("eager float32", *ranks):
        table.add_column(name, justify="right")
    runs = (results.eager, *results.ranks)
    plan = results.plan
    rings = f"{plan.rings} of {plan.attentions}"
    errors = [run.errors for run in runs]
    rows = {
        "loss": [f"{e.loss:.6f}" for e in errors],
        "loss error": [f"{e.loss_error:.1e}" for e in errors],
        "logit error": [f"{e.logits:.1e}" for e in errors],
        "gradient error": [f"{e.gradient:.1e}" for e in errors],
        "rings": ["", *([rings] * len(results.ranks))],
        "bytes sent": ["", *map(format_bytes, plan.sent_bytes)],
        "peak memory": [format_bytes(run.peak_bytes) for run in runs],
        "first run": [f"{run.first_s:.1f} s" for run in runs],
        "next run": [f"{run.next_s:.1f} s" for run in runs],
    }
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return Group(table, _format_verdict(results))


def _format_verdict(results: Results) -> Text:
    worst = max((run.errors for run in results.ranks), key=lambda e: e.gradient)
    text = (
        "Errors are the worst against eager in float64, as a share of the largest"
        f" value: each may be {TOLERANCE:g}, and every attention must be a ring. The"
        f" worst gradient is that of {worst.gradient_name}. Bytes are the plan's. "
    )
    right, wrong = Text("right", "bold green"), Text("WRONG", "bold red")
    return Text(text) + (right if results.is_right else wrong)
