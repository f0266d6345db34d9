"""How much of the time that hops take lies under kernels.

    torchrun --nproc-per-node 2 benchmarks/overlap.py --trace traces
    torchrun --nproc-per-node 2 benchmarks/overlap.py --llama

Causal attention, eight in a graph, forward and backward, as attention.py measures them,
or training steps of llama.py's model, under torch's profiler. A hop's time is that of
its copies between GPUs, or of NCCL's sends; what waits for a peer that is late is none,
nor are the sums of parameters' gradients that end a training step. Of four steps the
first is not counted: it starts on GPUs that are idle, and ranks are not in step yet.
Prints a line for each rank and size; ``--trace`` is a folder for what Perfetto shows.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from attention import PEERS
from measure import Sizes, make_mesh
from torch.distributed.device_mesh import DeviceMesh
from torch.profiler import ProfilerActivity, profile
from traces import find_share, skip_first_step, split_events
from training import TRAINERS, Llama

_STEPS = 4
_LAYERS = 4
_ATTENTIONS = 8  # the first hop of a backward has nothing before it to fly under


def trace_steps(step: Callable[[], object], path: Path) -> None:
    """Write a trace of this rank's steps."""

    def run() -> None:
        for _ in range(_STEPS):
            step()
        torch.cuda.synchronize()

    run()
    dist.barrier()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run()
    profiled.export_chrome_trace(str(path))


@contextmanager
def _attend(
    sizes: Sizes, mesh: DeviceMesh, peer: str
) -> Iterator[Callable[[], object]]:
    with PEERS[peer](sizes, mesh) as call:
        grads = [torch.randn_like(out) for out in call.forward()]
        yield lambda: torch.autograd.grad(call.forward(), call.inputs, grads)


@contextmanager
def _train(sizes: Sizes, mesh: DeviceMesh, peer: str) -> Iterator[Callable[[], object]]:
    shape = {"heads": sizes.heads, "kv_heads": sizes.kv_heads, "tokens": sizes.tokens}
    llama = Llama(layers=_LAYERS, num_ranks=mesh.size(), **shape)
    with TRAINERS[peer](llama, mesh) as step:
        yield step.run


def main() -> None:
    """Trace each size and print what lies under kernels."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--heads", default="32:8")
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096, 8192, 16384])
    parser.add_argument("--peer", choices=PEERS, default="ring")
    parser.add_argument("--llama", action="store_true", help="training steps")
    parser.add_argument("--trace", type=Path, help="a folder, which traces go to")
    args = parser.parse_args()
    if args.llama and args.peer not in TRAINERS:
        parser.error(f"--llama has no peer {args.peer}")
    mesh = make_mesh("cuda")
    heads, kv_heads = map(int, args.heads.split(":"))
    with ExitStack() as stack:
        folder = args.trace or Path(stack.enter_context(TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        for tokens in args.tokens:
            sizes = Sizes(heads, kv_heads, tokens, mesh.size(), _ATTENTIONS)
            path = folder / f"{tokens}_tokens_rank_{dist.get_rank()}.json"
            with (_train if args.llama else _attend)(sizes, mesh, args.peer) as step:
                trace_steps(step, path)
            hops, kernels = split_events(json.loads(path.read_text())["traceEvents"])
            hops = skip_first_step(hops, _STEPS)
            share = find_share(hops, kernels)
            print(
                f"{args.peer}{', Llama' * args.llama}, {sizes}, rank {dist.get_rank()}:"
                f" {len(hops)} transfers, {share:.1%} of their time under kernels",
                flush=True,
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
