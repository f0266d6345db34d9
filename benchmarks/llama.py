"""A training step of a Llama of the 8B shape, four layers of it, beside its peers.

    torchrun --nproc-per-node 4 benchmarks/llama.py --json llama.json
    torchrun --nproc-per-node 2 benchmarks/llama.py --device cpu --tokens 256

Forward, loss and backward in bfloat16 with random weights: milliseconds, the median of
``--rounds`` on the slowest rank, tokens per second and GPU, MFU (useful work over the
989 TFLOP/s of an H200) and the largest memory of a GPU. A peer whose loss or gradients
are not the ring's has an error; both are in the file. ``of ring`` is a peer's speed by
the ring's, of the same run. On CPU the model is small and float32, and it is one eager
rank that the ring is compared with, since torch's context_parallel has no kernel there.
"""

from functools import cache, partial

import torch.distributed as dist
from measure import Row, fill_rows, make_mesh, make_parser
from training import SMALL, TRAINERS, Llama, compare, try_training


def main() -> None:
    """Measure all rows that the file has not, and print a table."""
    parser = make_parser(__doc__)
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096, 16384, 32768])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--checkpoint", action="store_true", help="every layer")
    parser.add_argument("--peers", nargs="+", choices=TRAINERS)
    args = parser.parse_args()
    mesh = make_mesh(args.device, args.last_of)
    on_gpu = args.device == "cuda"
    shape = {"vocab": args.vocab} if on_gpu else SMALL

    @cache
    def measure(name: str, sizes: Llama) -> Row:
        row = try_training(name, sizes, mesh, args.rounds)
        if name == "ring" or "error" in row:
            return row
        ring = measure("ring", sizes)
        if "error" not in ring:
            row["of ring"] = ring["step_ms"] / row["step_ms"]
        return compare(row, ring, args.device)

    cases = {
        f"{name}, {sizes}, {args.device}": partial(measure, name, sizes)
        for n in args.tokens
        for sizes in [
            Llama(
                **(shape | {"layers": args.layers, "tokens": n}),
                num_ranks=mesh.size(),
                is_checkpointed=args.checkpoint,
            )
        ]
        for name in args.peers or [n for n in TRAINERS if n[:3] != "one" or not on_gpu]
    }
    fill_rows(args, mesh, cases)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
