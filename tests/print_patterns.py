"""How far every pattern and every preset is from dense float64 attention, as a table.

    PYTHONPATH=tests .venv/bin/python tests/print_patterns.py

One line for each pattern and number of ranks: the largest errors of out, dq, dk and dv
in float32, by the largest value of each, over causal or not x layouts x heads; and the
largest ratio of a bfloat16 error to that of one rank in bfloat16, with plain operators
for all tiles (math) and with the device's kernel for full ones (auto). Takes about 20
minutes on 2 cores; names of patterns or presets as arguments print those alone. Exits
with 1 if a line is out of tolerance.
"""

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from support.pattern_cases import ADAPTIVE, CASES
from support.pattern_runs import (
    NAMES,
    Cell,
    error_ratios,
    relative_errors,
    run_cells,
    sweep,
)
from support.preset_cases import PRESETS
from support.ranks import RankError, RankPool
from support.tolerances import LOW_PRECISION_FACTOR, OUTPUT_RTOL
from torch import Tensor

CP_SIZES = (1, 2, 4)
GROUPS = {"pattern": [*CASES, *ADAPTIVE], "preset": [*PRESETS]}
KERNELS = ("math", "auto")
Alone = dict[Cell, tuple[Tensor, ...]]


def print_group(ranks: RankPool, kind: str, names: Sequence[str]) -> bool:
    """Lines of all names; whether each is within tolerance."""
    columns = "".join(f"{name:>9}" for name in NAMES)
    ratios = "".join(f"{name:>7}" for name in KERNELS)
    write(f"{kind:32}{'P':>2}{'runs':>6}{columns}   bfloat16 / one rank:{ratios}")
    fine = True
    for name in names:
        alone: Alone = {}
        for cp_size in CP_SIZES:
            cells = sweep(name, cp_size)
            head = f"{name:32}{cp_size:2}{len(cells):6}"
            try:
                text, is_within = measure(ranks, cells, cp_size, alone)
            except RankError as error:
                text, is_within = f"  FAILED: {find_cause(error)}", False
            write(head + text)
            fine &= is_within
    return fine


def measure(
    ranks: RankPool, cells: Sequence[Cell], cp_size: int, alone: Alone
) -> tuple[str, bool]:
    """The numbers of one line, and whether they are within tolerance.

    Args:
        ranks: the pool.
        cells: the runs.
        cp_size: over how many ranks.
        alone: bfloat16 results of one rank, which are filled in there.
    """
    errors: dict[str, list[float]] = {name: [] for name in NAMES}
    for cell, got in run(ranks, cells, cp_size):
        for name, error in relative_errors(cell, got).items():
            errors[name].append(error)
    worst_errors = [worst(found) for found in errors.values()]
    text = "".join(f"{error:9.1e}" for error in worst_errors)
    is_within = all(error <= OUTPUT_RTOL for error in worst_errors)
    ratios: dict[str, list[float]] = {kernel: [] for kernel in KERNELS}
    for cell, got in run(ranks, low(cells), cp_size):
        one = alone.setdefault(replace(cell, layout="auto"), got)
        ratios[cell.kernel] += error_ratios(cell, got, one).values()
    worst_ratios = [worst(found) for found in ratios.values()]
    text += " " * 23 + "".join(f"{ratio:7.2f}" for ratio in worst_ratios)
    is_within &= all(ratio <= LOW_PRECISION_FACTOR for ratio in worst_ratios)
    return text + ("" if is_within else "  OUT"), is_within


def run(
    ranks: RankPool, cells: Sequence[Cell], cp_size: int
) -> Iterator[tuple[Cell, tuple[Tensor, ...]]]:
    """Each cell with its result, of every rank."""
    for by_rank in ranks.run(run_cells, tuple(cells), world_size=cp_size):
        yield from zip(cells, by_rank, strict=True)


def low(cells: Sequence[Cell]) -> tuple[Cell, ...]:
    """Those with the first heads in bfloat16, by each kernel."""
    return tuple(
        replace(cell, dtype=torch.bfloat16, kernel=kernel)
        for cell in cells
        for kernel in KERNELS
        if cell.heads == cells[0].heads
    )


def find_cause(error: RankError) -> str:
    """The line of a rank's traceback that names the exception."""
    lines = str(error).splitlines()
    return next((x for x in lines if re.match(r"[\w.]+(Error|Exception)\b", x)), "?")


def worst(values: Iterable[float]) -> float:
    """The largest; NaN if there is one."""
    return max(values, key=lambda x: (x != x, x))  # noqa: PLR0124 - x is NaN


def write(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(names: Sequence[str]) -> int:
    known = [name for group in GROUPS.values() for name in group]
    if unknown := sorted(set(names) - set(known)):
        write(f"no such pattern or preset: {', '.join(unknown)}")
        write(f"there are: {', '.join(known)}")
        return 2
    ranks, fine = RankPool(max(CP_SIZES)), True
    try:
        for kind, group in GROUPS.items():
            if chosen := [name for name in group if not names or name in names]:
                fine &= print_group(ranks, kind, chosen)
                write("")
    finally:
        ranks.close()
    limits = f"{OUTPUT_RTOL:g} in float32, {LOW_PRECISION_FACTOR:g} in bfloat16"
    write(f"{'all within' if fine else 'OUT OF'} tolerance: {limits}")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
