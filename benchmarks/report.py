"""Tables and a plot of what the benchmarks have measured.

    python benchmarks/report.py DIR --readme README.md

Reads ``attention.json``, ``sparse.json``, ``llama.json``, ``memory.json`` of ``DIR``,
as many as are there. In the README all between ``<!-- attention.json -->`` and the next
``<!-- end -->`` becomes the table of that file, and so for the others; nothing else
changes. The plot goes to ``DIR/benchmarks.png``. The same files give the same output.
"""

import argparse
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
KEY = re.compile(r"(.*), (\d+:\d+) heads, (\d+) tokens x (\d+), (\w+)")


@dataclass(frozen=True, slots=True)
class View:
    """How a file is shown.

    Attributes:
        says: what a cell of the table has.
        format: a cell of a row of the file.
        y: what is plotted.
        label: what that is.
    """

    says: str
    format: Callable[[Row], str]
    y: str
    label: str


def _format_attention(row: Row) -> str:
    ratio = "".join(f" ({row[name]:.2f})" for name in ("E", "share") if name in row)
    return f"{row['forward']:.0f} / {row['both']:.0f}{ratio}"


def _format_llama(row: Row) -> str:
    mfu = f", {row['mfu']:.2f}" if "mfu" in row else ""
    peak = f", {row['peak_gib']:.1f}" if "peak_gib" in row else ""
    return f"{row['step_ms']:.1f}, {row['tokens_per_s']:.0f}{mfu}{peak}"


def _format_memory(row: Row) -> str:
    return f"{row['peak_gib']:.2f}" if "peak_gib" in row else "not measured on CPU"


_BOTH = "TFLOP/s per GPU, forward and backward"
VIEWS = {
    "attention.json": View(
        "TFLOP/s per GPU forward / forward and backward (E)",
        *(_format_attention, "both", _BOTH),
    ),
    "sparse.json": View(
        "TFLOP/s per GPU forward / forward and backward (share)",
        *(_format_attention, "both", _BOTH),
    ),
    "llama.json": View(
        "ms of a step, tokens per second and GPU, MFU, GiB",
        *(_format_llama, "tokens_per_s", "tokens per second and GPU"),
    ),
    "memory.json": View(
        "largest GiB of a GPU", _format_memory, "peak_gib", "largest GiB of a GPU"
    ),
}


def format_table(rows: Mapping[str, Row], view: View) -> str:
    """A line for each peer, a column for each length; errors and fits below."""
    lines: dict[tuple[str, ...], dict[int, Row]] = {}
    for key, row in rows.items():
        if found := KEY.fullmatch(key):
            peer, heads, tokens, ranks, device = found.groups()
            line = lines.setdefault((f"{ranks} x {device}", heads, peer), {})
            line[int(tokens)] = row
    columns = sorted({tokens for line in lines.values() for tokens in line})
    text = [f"By tokens per rank: {view.says}.", ""]
    text += [_join("ranks", "heads", "", *columns), "|---" * (3 + len(columns)) + "|"]
    text += [
        _join(*head, *(_format_cell(line.get(n), view) for n in columns))
        for head, line in lines.items()
    ]
    notes = [*_tell_errors(lines), *_tell_memory(rows)]
    return "\n".join([*text, *(["", *notes] if notes else [])])


def _join(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _format_cell(row: Row | None, view: View) -> str:
    if row is None:
        return ""
    return "error" if "error" in row else view.format(row)


def _tell_errors(lines: Mapping[tuple[str, ...], Mapping[int, Row]]) -> list[str]:
    """Each error once: its first line."""
    told = {
        f"- {peer}: {row['error'].splitlines()[0][:160]}"
        for (_, _, peer), line in lines.items()
        for row in line.values()
        if "error" in row
    }
    return sorted(told)


def _tell_memory(rows: Mapping[str, Row]) -> list[str]:
    """Fits of peaks, and the longest sequences."""
    told = []
    for key, row in rows.items():
        if key.startswith("fit of "):
            wrong = max(map(abs, row["residuals"].values()))
            told.append(
                f"- {key}: {row['a']:.2f} GiB + {row['b']:.4f} GiB per thousand tokens"
                f" of a rank; no peak is more than {wrong:.2f} GiB off"
            )
        if key.startswith("longest of "):
            said = row.get("error") or f"{row['tokens']} tokens per rank"
            told.append(f"- {key}: {said}")
    return told


def replace_between(text: str, name: str, table: str) -> str:
    """The text with the table where the markers of that name are, if they are."""
    between = re.compile(
        rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", flags=re.DOTALL
    )
    return between.sub(lambda found: f"{found[1]}\n{table}\n\n{found[2]}", text)


def plot(files: Mapping[str, Mapping[str, Row]], path: Path) -> None:
    """A picture of each file that has something to show."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - of the extra "report"

    drawn = {n: lines for n, rows in files.items() if (lines := _read_lines(n, rows))}
    figure = Figure(figsize=(9, 5 * max(1, len(drawn))), layout="constrained")
    for number, (name, lines) in enumerate(drawn.items()):
        axes = figure.add_subplot(len(drawn), 1, number + 1)
        for label, points in lines.items():
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
        axes.set(xlabel="tokens per rank", ylabel=VIEWS[name].label)
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set_title(name.removesuffix(".json"))
        axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, metadata={"Software": None})


def _read_lines(
    name: str, rows: Mapping[str, Row]
) -> dict[str, list[tuple[int, float]]]:
    """Of each peer, heads and ranks what is plotted over tokens per rank."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for key, row in rows.items():
        found = KEY.fullmatch(key)
        if found and "error" not in row and VIEWS[name].y in row:
            peer, heads, tokens, ranks, _ = found.groups()
            line = lines.setdefault(f"{peer}, {heads} x {ranks}", [])
            line.append((int(tokens), row[VIEWS[name].y]))
    return lines


def main() -> None:
    """Read the files, write the README's tables and the plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--readme", type=Path, help="whose tables are written")
    args = parser.parse_args()
    paths = {name: args.folder / name for name in VIEWS}
    files = {n: json.loads(p.read_text()) for n, p in paths.items() if p.exists()}
    if not files:
        parser.error(f"{args.folder} has none of {', '.join(VIEWS)}")
    tables = {name: format_table(rows, VIEWS[name]) for name, rows in files.items()}
    for name, table in tables.items():
        print(f"{name}\n\n{table}\n")
    if args.readme:
        text = args.readme.read_text()
        for name, table in tables.items():
            text = replace_between(text, name, table)
        args.readme.write_text(text)
    plot(files, args.folder / "benchmarks.png")


if __name__ == "__main__":
    main()
