"""What the cost model says of the rows that attention.py has measured.

    python benchmarks/predict.py attention.json

Milliseconds of forward and backward of each ring and of each trade of heads, and the
errors. It needs no GPU. The rows of 16,384 tokens were fitted to; the median that is
printed last is of all others.
"""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from math import gcd
from pathlib import Path
from statistics import median

from measure import Row, read_rows
from report import KEY

from ringcompile.ir.layout import Layout
from ringcompile.ir.mask import Mask, causal
from ringcompile.ir.schedule import Ulysses
from ringcompile.plan.cost import H200, H200_SENDS, Machine, Sizes, estimate_seconds
from ringcompile.plan.stages import build_schedule

FITTED = 16384
# Of each peer that the model knows: at most how many ranks deal out heads.
_PEERS: Mapping[str, tuple[int, Machine]] = {
    "ring": (1, H200),
    "ring, sends": (1, H200_SENDS),
    "ring, CUDA graphs": (1, H200),
    "ring, Ulysses": (2**20, H200),
    "ring, Ulysses of 2": (2, H200),
}


def predict(peer: str, heads: str, tokens: int, num_ranks: int) -> float:
    """Seconds of a row, as attention.py measures it."""
    most, machine = _PEERS[peer]
    num_heads, num_kv_heads = map(int, heads.split(":"))
    size = gcd(num_kv_heads, num_ranks, min(most, num_ranks))
    layout = Layout("zigzag" if size < num_ranks else "contiguous", num_ranks)
    length = tokens * num_ranks
    merged = layout if size == 1 else layout.merge(size)
    schedule = build_schedule([(Mask(causal()), None)], merged, length)
    if size > 1:
        ulysses = Ulysses(size, layout.chunks_per_rank)
        schedule = replace(schedule, ulysses=ulysses)
    sizes = Sizes(num_heads, num_kv_heads)
    return estimate_seconds(schedule, length, sizes=sizes, machine=machine)


def compare(rows: Mapping[str, Row]) -> dict[str, tuple[int, float, float]]:
    """Of each row that the model knows: tokens, milliseconds measured and predicted."""
    found = {}
    for name, row in rows.items():
        key = KEY.fullmatch(name)
        if key and key[1] in _PEERS and "both_ms" in row:
            tokens, num_ranks = int(key[3]), int(key[4])
            predicted = predict(key[1], key[2], tokens, num_ranks)
            found[name] = (tokens, row["both_ms"], 1e3 * predicted)
    return found


def main() -> None:
    """Print a line for each row, and the median error."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path)
    errors = []
    for name, (tokens, measured, predicted) in compare(
        read_rows(parser.parse_args().file)
    ).items():
        error = predicted / measured - 1
        print(f"{name:56} {measured:8.2f} ms, predicted {predicted:8.2f}: {error:+.1%}")
        if tokens != FITTED:
            errors.append(abs(error))
    if errors:
        print(
            f"median error of {len(errors)} rows that were not fitted to:"
            f" {median(errors):.1%}, the largest {max(errors):.1%}"
        )


if __name__ == "__main__":
    main()
