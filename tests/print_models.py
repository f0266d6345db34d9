"""What becomes of every model of the zoo, and how far it is from eager, as a table.

    PYTHONPATH=tests .venv/bin/python tests/print_models.py
    PYTHONPATH=tests .venv/bin/python tests/print_models.py --only gpt2 --ranks 4

One line for each model and implementation of attention: how many attentions became a
ring and how many run gathered; how many other values are gathered; the largest error of
outputs and of gradients against eager float64, by the largest value of each; and why
something is gathered. Takes about 30 minutes on 2 cores. Models of a library that can't
be imported are left out. Exits with 1 if a line is out of tolerance, or other than the
zoo says that it is.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from support.ranks import RankError, RankPool
from support.zoo_models import ZOO
from support.zoo_modules import is_installed
from support.zoo_runs import Cell, Result, find_cause, find_surprises, run_cell

HEAD = (
    f"{'model':40}{'attention':10}{'ring':>5}{'gathered':>9}{'other':>6}"
    f"{'outputs':>9}{'gradients':>10}"
)


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the table.

    Attributes:
        text: of it.
        is_right: whether all is within tolerance and as the zoo says.
        is_ring: whether every attention is a ring.
    """

    text: str
    is_right: bool
    is_ring: bool


def measure(ranks: RankPool, cell: Cell) -> Line:
    """Run one cell."""
    head = f"{cell.name:40}{cell.attention:10}"
    try:
        results = ranks.run(run_cell, cell, world_size=cell.cp_size)
    except RankError as error:
        cause, expected = find_cause(error), cell.expected.error
        is_right = bool(expected) and expected in str(error)
        word = "refused" if is_right else "FAILED"
        return Line(f"{head}  {word}: {shorten(cause)}", is_right, False)
    first = results[0]
    faults = [fault for result in results for fault in result.faults]
    surprises = find_surprises(cell, first.record)
    text = head + format_result(results) + cell.expected.note
    if faults:
        text += f"  WRONG: {shorten(faults[0])}"
    if surprises:
        text += f"  UNEXPECTED: {surprises[0]}"
    is_ring = bool(first.record.rings) and not first.record.refused
    return Line(text, not faults and not surprises, is_ring)


def format_result(results: Sequence[Result]) -> str:
    """The numbers of a line, and reasons."""
    record = results[0].record
    output_error = max(r.output_error for r in results)
    grad_error = max(r.grad_error for r in results)
    text = (
        f"{len(record.rings):5}{len(record.refused):9}{len(record.gathers):6}"
        f"{output_error:9.1e}{grad_error:10.1e}"
    )
    ops = sorted({gather.split(":")[0] for gather in record.gathers})
    reasons = [*dict.fromkeys(map(shorten, record.refused)), *ops]
    return text + "  " + "; ".join(reasons)


def shorten(text: str, length: int = 160) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 3] + "..."


def choose_cells(options: argparse.Namespace) -> list[Cell]:
    """What is run: every implementation of every chosen model."""
    compiler = "inductor" if options.inductor else "aot_eager"
    return [
        Cell(row.name, attention, options.ranks, compiler)
        for row in ZOO
        if is_installed(row.library)
        if not options.library or row.library == options.library
        if not options.only or row.name in options.only
        for attention in row.attentions
    ]


def read_options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The zoo as a table.")
    parser.add_argument("--only", action="append", metavar="NAME", help="these models")
    parser.add_argument("--library", help="models of transformers, timm or torch.nn")
    parser.add_argument("--ranks", type=int, default=2, help="2, unless given")
    parser.add_argument("--inductor", action="store_true", help="compile all the way")
    return parser.parse_args(arguments)


def write(line: str) -> None:
    sys.stdout.write(f"{line.rstrip()}\n")
    sys.stdout.flush()


def main(arguments: Sequence[str]) -> int:
    options = read_options(arguments)
    known = {row.name for row in ZOO}
    if unknown := sorted(set(options.only or ()) - known):
        write(f"no such model: {', '.join(unknown)}")
        write(f"there are: {', '.join(sorted(known))}")
        return 2
    ranks, lines = RankPool(options.ranks), []
    write(HEAD)
    try:
        for cell in choose_cells(options):
            lines.append(measure(ranks, cell))
            write(lines[-1].text)
    finally:
        ranks.close()
    num_right = sum(line.is_right for line in lines)
    num_ring = sum(line.is_ring for line in lines)
    write("")
    write(f"{len(lines)} lines: {num_ring} all in rings, {num_right} as they should be")
    return 0 if num_right == len(lines) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
