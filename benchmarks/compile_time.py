"""CPU seconds that compiling takes: ``backend="ring"`` against ``backend="inductor"``.

    python benchmarks/compile_time.py

A Llama of 4, 8 and 16 layers, forward and backward, as rank 0 of 4 on torch's fake
process group, so that one process is measured and no peer. Each number is of a process
of its own with empty caches and one compile thread: its CPU time from the call of the
compiled model to the end of backward, and that of the C++ compilers that it starts;
medians of ``--rounds``. Kernels are as many at any depth, so the compilers' times do
not grow with layers, but vary by more than a layer takes. Wall time would be that of a
machine with others on it.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from itertools import product
from statistics import median
from typing import Any, NamedTuple

WORLD_SIZE = 4
BACKENDS = ("inductor", "ring")


class Seconds(NamedTuple):
    """CPU seconds of the process itself and of the compilers that it started."""

    own: float
    compilers: float


def measure(backend: str, num_layers: int) -> Seconds:
    """Compile in this process."""
    import torch  # noqa: PLC0415 - the parent process needs none of it
    import torch.distributed as dist  # noqa: PLC0415
    from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: PLC0415
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD_SIZE)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=num_layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    ids = torch.randint(256, (2, 256))
    _warm_up(torch, backend)
    options: dict[str, Any] = {"verify": "plan"} if backend == "ring" else {}
    compiled = torch.compile(model, backend=backend, options=options or None)
    start = _cpu_seconds()
    compiled(input_ids=ids, labels=ids).loss.backward()
    own, compilers = _cpu_seconds()
    return Seconds(own - start.own, compilers - start.compilers)


def _warm_up(torch: Any, backend: str) -> None:  # noqa: ANN401
    """Imports and the first call of the C++ compiler are not what is measured."""
    layer = torch.nn.Linear(8, 8)
    torch.compile(layer, backend=backend)(torch.ones(8, 8)).sum().backward()


def _cpu_seconds() -> Seconds:
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return Seconds(*(u.ru_utime + u.ru_stime for u in used))


def measure_apart(backend: str, num_layers: int) -> Seconds:
    """Measure in a fresh process with empty caches."""
    with tempfile.TemporaryDirectory() as cache:
        env = os.environ | {
            "TORCHINDUCTOR_CACHE_DIR": cache,
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, __file__, "--one", backend, str(num_layers)]
        done = subprocess.run(
            command, env=env, check=True, capture_output=True, text=True
        )
    own, compilers = done.stdout.split()[-2:]
    return Seconds(float(own), float(compilers))


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description="CPU seconds of compiling")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", nargs=2, metavar=("BACKEND", "LAYERS"))
    chosen = parser.parse_args()
    if chosen.one:
        backend, num_layers = chosen.one
        print(*measure(backend, int(num_layers)))
        return
    cases = [*product(chosen.layers, BACKENDS)]
    found: dict[tuple[int, str], list[Seconds]] = {case: [] for case in cases}
    # By turns: a machine that is slower for a while is so for all of them.
    for _ in range(chosen.rounds):
        for num_layers, backend in cases:
            found[num_layers, backend] += [measure_apart(backend, num_layers)]
    print("| layers | inductor: own + compilers, CPU s | ring | ratio |")
    print("|---|---|---|---|")
    for num_layers in chosen.layers:
        both = [found[num_layers, backend] for backend in BACKENDS]
        inductor, ring = (median(map(sum, runs)) for runs in both)
        cells = [_format(runs) for runs in both]
        print(f"| {num_layers} | {' | '.join(cells)} | {ring / inductor:.2f} |")
    print(found)


def _format(runs: list[Seconds]) -> str:
    own, compilers = (median(column) for column in zip(*runs, strict=True))
    return f"{own:.1f} + {compilers:.1f} = {median(map(sum, runs)):.1f}"


if __name__ == "__main__":
    main()
