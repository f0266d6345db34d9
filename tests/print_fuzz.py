"""Run many seeds of the fuzzer and print what became of them.

python tests/print_fuzz.py --count 20000 --start 0
"""

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support.fuzz_checks import Verdict, check_program  # noqa: E402
from support.fuzz_models import write_program  # noqa: E402
from support.fuzz_shrink import shrink  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--no-shrink", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    counts: Counter[Verdict] = Counter()
    refusals: Counter[str] = Counter()
    began, cpu = time.monotonic(), time.process_time()
    for seed in range(options.start, options.start + options.count):
        program = write_program(seed, is_small=options.small)
        found = check_program(program)
        counts[found.verdict] += 1
        if found.verdict is Verdict.REFUSED:
            refusals[found.text.splitlines()[0]] += 1
        if found.verdict.is_find:
            if not options.no_shrink:
                program = shrink(program, found.verdict)
            found = check_program(program)
            _say(f"seed {seed}: {found.verdict.value}\n{program}\n{found.text}\n")
    wall, busy = time.monotonic() - began, time.process_time() - cpu
    _say(f"{options.count} programs in {wall:.0f} s ({busy:.0f} s of CPU)")
    for verdict in Verdict:
        _say(f"{counts[verdict]:7d}  {verdict.value}")
    for text, count in refusals.most_common(20):
        _say(f"{count:7d}  refused: {text}")
    return int(any(v.is_find for v in counts))


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
