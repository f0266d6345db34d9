"""All figures of several ranks: every script, its file, the README's tables, a plot.

    python benchmarks/run_all.py --ranks 4 --out DIR --readme README.md
    python benchmarks/run_all.py --ranks 2 --device cpu --out DIR

Each script runs by ``torchrun`` in processes of its own, so that one that fails takes
no other along, and starts no row after ``--minutes``. Run it again for rows that are
missing: files keep what they have. ``--longest`` looks for the longest sequences too,
which takes a process for each length that is tried.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from measure import run_ranks

_GRACE_S = 300.0  # for the row that is being measured when time is up
_TOTAL = {"cuda": 32768, "cpu": 1024}  # tokens that ever more ranks share


def main() -> None:
    """Run the scripts in turn, then the report; fail if one of them did."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--readme", type=Path, help="whose tables are written")
    parser.add_argument("--minutes", type=float, default=4.0, help="of each script")
    parser.add_argument("--only", nargs="+", help="parts of names of scripts")
    parser.add_argument("--longest", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for script, num_ranks, options in _list_jobs(args):
        if args.only and not any(part in script for part in args.only):
            continue
        given = ["--device", args.device, "--minutes", str(args.minutes)]
        given += ["--json", str(args.out / f"{script}.json"), *options]
        title = " ".join([f"{script}.py", f"x {num_ranks}", *options])
        print(f"== {title}", flush=True)
        seconds = 60 * args.minutes + _GRACE_S
        if not run_ranks(f"{script}.py", num_ranks, given, seconds):
            failed.append(title)
    if args.longest:
        longest = [str(Path(__file__).with_name("memory.py")), "--longest"]
        longest += ["--ranks", str(args.ranks), "--device", args.device]
        longest += ["--json", str(args.out / "memory.json")]
        longest += [] if args.device == "cuda" else ["--tokens", "256", "--most", "512"]
        if subprocess.run([sys.executable, *longest], check=False).returncode:
            failed.append("memory.py --longest")
    report = [str(Path(__file__).with_name("report.py")), str(args.out)]
    report += ["--readme", str(args.readme)] if args.readme else []
    if subprocess.run([sys.executable, *report], check=False).returncode:
        failed.append("report.py")
    sys.exit(f"failed: {'; '.join(failed)}" if failed else 0)


def _list_jobs(args: argparse.Namespace) -> list[tuple[str, int, list[str]]]:
    """Scripts, their ranks and options."""
    small = args.device == "cpu"
    tokens = ["--tokens", "256"] if small else []
    total = str(_TOTAL[args.device])
    fewer = [2**n for n in range(args.ranks.bit_length()) if 2**n <= args.ranks]
    return [
        ("attention", args.ranks, tokens),
        ("sparse", args.ranks, ["--tokens", "1024"] if small else []),
        ("llama", args.ranks, tokens),
        ("llama", args.ranks, ["--checkpoint", *tokens]),
        ("memory", args.ranks, tokens),
        *(("memory", n, ["--total", total]) for n in fewer),
    ]


if __name__ == "__main__":
    main()
