"""A report as text for people: printable ASCII, stable, without paths of a machine."""

import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from textwrap import indent

from ringcompile.report.records import (
    AttentionReport,
    GatherReport,
    GraphReport,
    Memory,
    ScheduleReport,
    StepReport,
    Traffic,
)

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def format_report(graphs: Sequence[GraphReport], world_size: int) -> str:
    """Write a whole report.

    Args:
        graphs: the graphs of the model.
        world_size: the number of ranks.
    """
    if not graphs:
        return "nothing was compiled: the call ran no graph\n"
    attentions = [a for g in graphs for a in g.attentions]
    parts = [_format_head(graphs, attentions, world_size)]
    parts += _format_attentions(attentions)
    parts += [_format_schedule(s) for g in graphs for s in g.schedules]
    gathers = [x for g in graphs for x in g.gathers]
    if gathers:
        parts.append("\n".join(["made whole on every rank", *_format_gathers(gathers)]))
    if world_size > 1 and attentions:
        traffic = Traffic.sum_of((g.traffic for g in graphs), world_size)
        memory = sum((g.memory for g in graphs), Memory(0, 0, 0, 0))
        parts += [_format_traffic(traffic), _format_memory(memory)]
    notes = dict.fromkeys(n for g in graphs for n in g.notes)
    parts += [f"note: {note}" for note in notes]
    return "\n\n".join(parts) + "\n"


def format_bytes(num_bytes: int) -> str:
    """Write a number of bytes with three digits: ``1.25 MiB``."""
    value, unit = float(num_bytes), 0
    while value >= 1024 and unit < len(_UNITS) - 1:  # noqa: PLR2004 - the unit
        value, unit = value / 1024, unit + 1
    is_whole = unit == 0 or value >= 100  # noqa: PLR2004 - three digits
    return f"{value:.{0 if is_whole else 3}{'f' if is_whole else 'g'}} {_UNITS[unit]}"


def format_place(line: str) -> str:
    """Shorten a ``file:line`` to what tells it apart.

    What lies in the working folder is named from there, a library from its package on.
    """
    file, colon, number = line.rpartition(":")
    path = Path(file)
    for folder in _folders():
        if path.is_absolute() and path.is_relative_to(folder):
            return f"{path.relative_to(folder).as_posix()}{colon}{number}"
    return line


@lru_cache(maxsize=1)
def _library_folders() -> tuple[Path, ...]:
    paths = sysconfig.get_paths()
    return tuple(Path(paths[name]) for name in ("purelib", "platlib", "stdlib"))


def _folders() -> tuple[Path, ...]:
    return (*_library_folders(), Path.cwd())


# ---- parts ---------------------------------------------------------------------------


def _format_head(
    graphs: Sequence[GraphReport],
    attentions: Sequence[AttentionReport],
    world_size: int,
) -> str:
    ranks = "1 rank" if world_size == 1 else f"{world_size} ranks"
    count = "1 graph" if len(graphs) == 1 else f"{len(graphs)} graphs"
    if not attentions:
        return f"{ranks}, {count}, no attention: compiled as Inductor would"
    rings = sum(a.status == "ring" for a in attentions)
    return f"{ranks}, {count}, {rings} of {len(attentions)} attentions ring"


def _format_attentions(attentions: Sequence[AttentionReport]) -> Iterator[str]:
    """Neighbours that differ in their module's name alone are told once."""

    def all_but_name(a: AttentionReport) -> tuple[str, ...]:
        lines = (a.where, a.call_line, a.status)
        return (*lines, a.mask, a.dropout, a.pattern, a.layout, a.reason)

    for _, group in groupby(attentions, all_but_name):
        same = list(group)
        yield _format_attention(same[0], [a.name for a in same])


def _format_attention(a: AttentionReport, names: Sequence[str]) -> str:
    place, call = format_place(a.where), format_place(a.call_line)
    rows = {
        "at": place if place == call else f"{place} (calls {call})",
        "mask": a.mask,
        "dropout": a.dropout,
        "pattern": a.pattern,
        "layout": a.layout,
        "because": a.reason,
    }
    lines = [f"{a.status:8} {_format_names(names)}"]
    lines += [_format_row(name, text) for name, text in rows.items() if text]
    return "\n".join(lines)


def _format_row(name: str, text: str) -> str:
    first, *more = text.splitlines()
    return "\n".join([f"  {name:8} {first}", *(f"  {'':8} {line}" for line in more)])


def _format_names(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    return f"{names[0]} to {names[-1]} ({len(names)})"


def _format_schedule(schedule: ScheduleReport) -> str:
    head = f"runs in {_format_names(schedule.attentions)}:"
    return "\n".join([head, schedule.text, *format_steps(schedule.steps)])


def format_steps(steps: Sequence[StepReport]) -> Iterator[str]:
    """Lines that say what each step moves; none if nothing moves."""
    moving = [s for s in steps if any(s.forward_bytes) or any(s.backward_bytes)]
    if moving:
        yield "  bytes sent, forward + backward:"
    for step in moving:
        pairs = _shorten(step.forward_bytes, step.backward_bytes)
        sizes = (f"{format_bytes(a)} + {format_bytes(b)}" for a, b in pairs)
        each = " by each rank" if len(pairs) == 1 else ""
        yield f"    part {step.part}, step {step.step}: {', '.join(sizes)}{each}"


def _shorten(there: Sequence[int], back: Sequence[int]) -> list[tuple[int, int]]:
    """A pair for each rank; one alone if all are equal."""
    pairs = list(zip(there, back, strict=True))
    return pairs[:1] if len(set(pairs)) == 1 else pairs


def _format_gathers(gathers: Sequence[GatherReport]) -> Iterator[str]:
    """Neighbours of one line, size and reason are told once."""

    def alike(gather: GatherReport) -> tuple[str, int, str]:
        return gather.where.split(" (")[0], gather.num_bytes, gather.because

    for (where, num_bytes, because), group in groupby(gathers, alike):
        counts = Counter(g.what for g in group)
        names = (what if n == 1 else f"{n} x {what}" for what, n in counts.items())
        each = " each" if counts.total() > 1 else ""
        yield f"  {', '.join(names)}: {format_bytes(num_bytes)}{each}"
        yield f"    at {format_place(where)}"
        yield f"    because {because}"


def _format_traffic(traffic: Traffic) -> str:
    head = ("", "hops", "hops back", "all-gathers", "all-reduces", "total")
    columns = (
        traffic.hops_forward,
        traffic.hops_backward,
        traffic.gathers,
        traffic.reduces,
        traffic.total,
    )
    rows = [head] + [
        (f"rank {rank}", *map(format_bytes, sizes))
        for rank, sizes in enumerate(zip(*columns, strict=True))
    ]
    title = "bytes that each rank sends in one forward and one backward"
    return f"{title}\n{indent(_format_table(rows), '  ')}"


def _format_memory(memory: Memory) -> str:
    rows = (
        ("parameters", memory.parameters),
        ("saved for backward, at most", memory.saved),
        ("  of that by attentions", memory.attention),
        ("made whole", memory.gathered),
    )
    lines = ["memory on each rank at the end of forward, without temporaries"]
    lines += [f"  {name:28} {format_bytes(size):>9}" for name, size in rows]
    return "\n".join(lines)


def _format_table(rows: Sequence[Iterable[str]]) -> str:
    """Columns wide enough for their texts: the first to the left, the rest right."""
    cells = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            text.ljust(width) if i == 0 else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    )
