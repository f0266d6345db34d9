"""Largest memory of a GPU in a training step of two layers of the 8B shape.

    torchrun --nproc-per-node 4 benchmarks/memory.py --json memory.json
    torchrun --nproc-per-node 2 benchmarks/memory.py --json memory.json --total 32768
    python benchmarks/memory.py --json memory.json --longest --ranks 4
    torchrun --nproc-per-node 2 benchmarks/memory.py --device cpu --tokens 256 512

The first command has four lengths of so many ranks. The second, run with 1, 2 and 4
ranks, has one length that ever more of them share. Peaks of tensors, in GiB, of all
rows that the file has are then fitted by a + b S / P, by least squares, S / P in
thousands of tokens: what a rank holds anyway, and what its rows cost. The third finds
the longest sequence that trains: lengths are doubled until one fails, then halved in
between to an eighth. Each length has processes of its own, since peers of a rank whose
memory ran out would wait for it. CPUs have no such count of bytes: there the step runs,
and its row says nothing of memory.
"""

import argparse
import re
from collections.abc import Callable, Mapping
from functools import partial
from statistics import linear_regression

import torch.distributed as dist
from measure import (
    Row,
    fill_rows,
    is_known,
    make_mesh,
    make_parser,
    print_row,
    ran_out,
    read_rows,
    run_ranks,
    speaks,
    write_rows,
)
from training import SMALL, TRAINERS, Llama, try_training

_LAYERS = 2
_TRIAL_S = 300.0
_PEERS = ("ring", "torch CP, all-to-all", "torch CP, all-to-all, compiled")


def fit(rows: Mapping[str, Row], peer: str, device: str) -> Row | None:
    """``peak = a + b S / P`` of that peer's rows, if they have two lengths or more."""
    end = re.compile(
        rf"{re.escape(peer)}, \d+ layers, .*, (\d+) tokens x \d+, {device}"
    )
    points = {
        key: (int(found[1]) / 1000, row["peak_gib"])
        for key, row in rows.items()
        if (found := end.fullmatch(key)) and "peak_gib" in row
    }
    if len({x for x, _ in points.values()}) < 2:  # noqa: PLR2004 - a line has two points
        return None
    b, a = linear_regression(*zip(*points.values(), strict=True))
    residuals = {key: y - (a + b * x) for key, (x, y) in points.items()}
    return {"a": a, "b": b, "residuals": residuals}


def find_longest(trains: Callable[[int], bool], start: int, most: int) -> int:
    """The most tokens that train, to an eighth; 0 if ``start`` does not."""
    if not trains(start):
        return 0
    good = start
    while 2 * good <= most and trains(2 * good):
        good *= 2
    if 2 * good > most:
        return good
    for step in (good // 2, good // 4, good // 8):
        if trains(good + step):
            good += step
    return good


def _sizes(tokens: int, num_ranks: int, args: argparse.Namespace) -> Llama:
    shape = SMALL if args.device == "cpu" else {}
    return Llama(
        **(shape | {"layers": _LAYERS, "tokens": tokens}),
        num_ranks=num_ranks,
        is_checkpointed=args.checkpoint,
    )


def _measure_all(args: argparse.Namespace) -> None:
    """Rows of this many ranks, then the fit of all that the file has."""
    mesh = make_mesh(args.device, args.last_of)
    lengths = [args.total // mesh.size()] if args.total else args.tokens

    def measure(name: str, sizes: Llama) -> Row:
        return try_training(name, sizes, mesh, args.rounds)

    cases = {
        f"{name}, {sizes}, {args.device}": partial(measure, name, sizes)
        for name in args.peers
        for sizes in [_sizes(n, mesh.size(), args) for n in lengths]
    }
    rows = fill_rows(args, mesh, cases)
    if args.device == "cpu":
        print_row("memory", {"error": "not measured on CPU"})
    for name in args.peers:
        peer = f"{name}, checkpointed" if args.checkpoint else name
        if found := fit(rows, peer, args.device):
            rows[f"fit of {peer}"] = found
            print_row(f"fit of {peer}", found)
            for key, wrong in found["residuals"].items():
                print_row(f"  residual, {key}", {"GiB": wrong})
    if speaks():
        write_rows(args.json, rows)
    dist.destroy_process_group()


def _find_all(args: argparse.Namespace) -> None:
    """The longest sequence of each peer."""
    for name in args.peers:

        def trains(tokens: int, name: str = name) -> bool:
            key = f"{name}, {_sizes(tokens, args.ranks, args)}, {args.device}"
            if not is_known(read_rows(args.json).get(key)):
                _run_trial(name, tokens, args)
            row = read_rows(args.json).get(key, {"error": "its process ended"})
            if "error" in row and not ran_out(row):
                raise RuntimeError(f"{key}: {row['error']}")
            return "error" not in row

        try:
            longest = find_longest(trains, max(args.tokens), args.most)
            found: Row = {"tokens": longest}
        except RuntimeError as error:
            found = {"error": str(error)}
        peer = f"{name}, checkpointed" if args.checkpoint else name
        key = f"longest of {peer}, {args.ranks} ranks, {args.device}"
        write_rows(args.json, read_rows(args.json) | {key: found})
        print(f"{key}: {found.get('error') or found['tokens']}", flush=True)


def _run_trial(name: str, tokens: int, args: argparse.Namespace) -> None:
    """One row, in processes of its own."""
    options = ["--device", args.device, "--json", str(args.json), "--rounds", "1"]
    options += ["--peers", name, "--tokens", str(tokens)]
    options += ["--checkpoint"] if args.checkpoint else []
    run_ranks("memory.py", args.ranks, options, _TRIAL_S)


def main() -> None:
    """Measure what the file has not, or look for the longest sequence."""
    parser = make_parser(__doc__)
    parser.set_defaults(rounds=1)
    parser.add_argument(
        "--tokens", nargs="+", type=int, default=[4096, 8192, 16384, 32768]
    )
    parser.add_argument("--total", type=int, help="tokens of all ranks together")
    parser.add_argument("--checkpoint", action="store_true", help="every layer")
    parser.add_argument("--peers", nargs="+", choices=TRAINERS, default=list(_PEERS))
    parser.add_argument("--longest", action="store_true")
    parser.add_argument("--ranks", type=int, default=1, help="of --longest")
    parser.add_argument("--most", type=int, default=2**22, help="tokens of --longest")
    args = parser.parse_args()
    if args.longest and not args.json:
        parser.error("--longest needs --json")
    (_find_all if args.longest else _measure_all)(args)


if __name__ == "__main__":
    main()
