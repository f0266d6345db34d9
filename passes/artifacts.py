"""What a compile leaves behind for tools: structured-trace artifacts and dumps.

Invariant: both hold the same texts. tlparse shows the artifacts ``ringcompile.<pass>``
and ``ringcompile.schedules``; the folder ``RINGCOMPILE_DUMP`` gets the graph before and
after each pass, in files that sort by rank, graph and pass.
"""

import logging
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from ringcompile.config import Environment
from ringcompile.passes.pipeline import Rewritten
from ringcompile.torch_private import emit_structured_trace

log = logging.getLogger(__name__)

_graph_numbers = count()


def emit_artifacts(made: Rewritten, *, rank: int) -> None:
    """Write the graph after each pass, and every schedule, to trace and dump folder.

    Args:
        made: what the passes made of one graph.
        rank: named in file names, since ranks share a folder.
    """
    number = next(_graph_numbers)
    log.info("graph %d: %s", number, _summarize(made))
    schedules = _format_schedules(made)
    for name, text in (*made.texts.items(), ("schedules", schedules)):
        emit_structured_trace(f"ringcompile.{name}", text)
    folder = Environment.read().dump_dir
    if folder is not None:
        prefix = f"rank{rank}.graph{number:02d}"
        files = {**dict(_name_files(made)), "schedules.txt": schedules}
        _write(folder, {f"{prefix}.{name}": text for name, text in files.items()})


def _summarize(made: Rewritten) -> str:
    rings, refused = len(made.attentions), len(made.refusals)
    layouts = dict.fromkeys(a.plan.schedule.place for a in made.attentions)
    of = f" as {', '.join(layouts)}" if layouts else ""
    return f"{rings} of {rings + refused} attentions ring{of}"


def _format_schedules(made: Rewritten) -> str:
    """Each schedule once, under the attentions that run it."""
    names: dict[str, list[str]] = {}
    for attention in made.attentions:
        names.setdefault(str(attention.plan.schedule), []).append(attention.plan.name)
    return "\n".join("\n".join([*who, text, ""]) for text, who in names.items())


def _name_files(made: Rewritten) -> Iterator[tuple[str, str]]:
    before = None
    for number, (name, text) in enumerate(made.texts.items()):
        if before is not None:
            yield f"{number:02d}.{name}.before.txt", before
        yield f"{number:02d}.{name}.after.txt", text
        before = text


def _write(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
