"""Cost: seconds that a schedule takes on a machine, by flops and by alpha-beta hops.

A stage is computed while the hops of the next fly, so it takes the longer of the two on
the slowest rank. It ranks layouts; it does not predict a wall clock.
"""

from dataclasses import dataclass, replace
from itertools import count

from ringcompile.ir.layout import Side
from ringcompile.ir.schedule import Kernel, Part, Schedule, Step
from ringcompile.plan.backward import Phase, communications
from ringcompile.plan.pairs import count_pairs
from ringcompile.plan.traffic import GRAD_BYTES, count_sent_rows


@dataclass(frozen=True, slots=True)
class Machine:
    """Measured rates of one rank and its link.

    Attributes:
        name: what reports call it.
        dense_flops: useful flops per second of a full tile.
        causal_flops: the same of a causal square.
        masked_flops: the same of a masked tile.
        backward_factor: backward's seconds over forward's: five products instead of
            two, at a lower rate.
        kernel_s: what a kernel call costs beside its flops, its merge included.
        hop_s: what a hop costs beside its bytes.
        link_bytes: bytes per second of a hop.
    """

    name: str
    dense_flops: float
    causal_flops: float
    masked_flops: float
    backward_factor: float
    kernel_s: float
    hop_s: float
    link_bytes: float


H200 = Machine("H200, NCCL", 649e12, 620e12, 398e12, 3.1, 20e-6, 170e-6, 323e9)
"""cuDNN at 16k tokens per GPU, masked tiles by flex, NCCL send/recv in bfloat16.

Source: FACTS.md section 1. ``hop_s`` is what 4 MB at 22 GB/s take beyond 323 GB/s.
"""

CPU = Machine("CPU, gloo", 25e9, 14e9, 3e9, 3.1, 1e-3, 0.4e-3, 0.3e9)
"""aten's CPU flash kernel and the blocked loop in float32, D = 64, one thread.

Source: measured on two cores of a busy x86 server, torch 2.13, S = 512 to 2,048; gloo
between two processes of it, 4 bytes and 1 MB to 16 MB.
"""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of one attention.

    Attributes:
        num_heads: query heads H.
        num_kv_heads: KV heads G.
        head_size: D, and E alike.
        item_bytes: bytes of an element.
        batch: B.
    """

    num_heads: int = 32
    num_kv_heads: int = 8
    head_size: int = 128
    item_bytes: int = 2
    batch: int = 1

    def divide(self, size: int) -> "Sizes":
        """Those of one of ``size`` ranks that deal out the heads."""
        return replace(
            self,
            num_heads=self.num_heads // size,
            num_kv_heads=self.num_kv_heads // size,
        )

    @property
    def flops_per_pair(self) -> int:
        """Forward flops of one (query, key) pair, all heads and batches."""
        return 4 * self.head_size * self.num_heads * self.batch

    @property
    def elements_per_row(self) -> int:
        """Elements of K and V together in one row, all KV heads and batches."""
        return 2 * self.head_size * self.num_kv_heads * self.batch


def estimate_seconds(
    schedule: Schedule,
    length: int,
    *,
    sizes: Sizes,
    machine: Machine,
    kv_length: int | None = None,
) -> float:
    """Seconds of forward and backward of one attention.

    Args:
        schedule: what all ranks do.
        length: tokens S.
        sizes: the attention's sizes.
        machine: the rates.
        kv_length: keys, if they lie on another sequence.
    """
    kv_length = kv_length or length
    exchange = _find_exchange_seconds(schedule, length, sizes, machine)
    sizes = sizes.divide(schedule.ulysses.size)
    sides = schedule.q_side.at(length), schedule.kv_side.at(kv_length)
    hops = _find_hop_seconds(schedule, kv_length, sizes, machine)
    number, total = count(), 2 * exchange
    for part in schedule.parts:
        numbers = [[next(number) for _ in stage] for stage in part.stages]
        compute = [
            _compute_seconds(part, stage, sides, sizes, machine)
            for stage in part.stages
        ]
        kv, dkv = (
            [sum(hops.get((phase, n), 0.0) for n in stage) for stage in numbers]
            for phase in (Phase.BACKWARD_KV, Phase.BACKWARD_DKV)
        )
        # Whatever the first stage fetches, nothing hides; what is sent home last too.
        total += 2 * kv[0] + dkv[-1]
        for n, seconds in enumerate(compute):
            ahead = kv[n + 1] if n + 1 < len(kv) else 0.0
            home = dkv[n - 1] if n else 0.0
            total += max(seconds, ahead)
            total += max(seconds * machine.backward_factor, ahead + home)
    return total


def _find_exchange_seconds(
    schedule: Schedule, length: int, sizes: Sizes, machine: Machine
) -> float:
    """What ranks that deal out heads wait for, before and behind the ring."""
    size = schedule.ulysses.size
    rows = schedule.layout.shard_size(length) / size
    row_bytes = 2 * (sizes.num_heads + sizes.num_kv_heads) * sizes.head_size
    num_bytes = rows * row_bytes * sizes.item_bytes * sizes.batch * (size - 1) / size
    return 2 * (size - 1) * machine.hop_s + num_bytes / machine.link_bytes


def _compute_seconds(
    part: Part,
    stage: tuple[Step, ...],
    sides: tuple[Side, Side],
    sizes: Sizes,
    machine: Machine,
) -> float:
    """Forward of a stage on the slowest rank."""
    rates = {
        Kernel.FULL: machine.dense_flops,
        Kernel.CAUSAL: machine.causal_flops,
        Kernel.MASKED: machine.masked_flops,
    }
    cp_size = sides[0].layout.cp_size
    seconds = [0.0] * cp_size
    for step in stage:
        for rank, tile in enumerate(step.tiles):
            ranks = (rank, (rank - step.shift) % cp_size)
            for piece in tile.pieces:
                pairs = count_pairs(part, piece, *sides, ranks=ranks)
                flops = pairs * sizes.flops_per_pair
                seconds[rank] += machine.kernel_s + flops / rates[piece.kernel]
    return max(seconds)


def _find_hop_seconds(
    schedule: Schedule, kv_length: int, sizes: Sizes, machine: Machine
) -> dict[tuple[Phase, int], float]:
    """The slowest rank's part in each hop."""
    chunk = schedule.kv_side.layout.chunk_size(kv_length)
    slowest: dict[tuple[Phase, int], float] = {}
    for rank in range(schedule.cp_size):
        for hop in communications(schedule, rank):
            chunks, rows = count_sent_rows(schedule, hop, rank)
            is_home = hop.phase is Phase.BACKWARD_DKV
            item_bytes = GRAD_BYTES if is_home else sizes.item_bytes
            num_bytes = (
                float(chunks * chunk + rows) * sizes.elements_per_row * item_bytes
            )
            seconds = machine.hop_s + num_bytes / machine.link_bytes
            key = (hop.phase, hop.step)
            slowest[key] = max(seconds if num_bytes else 0.0, slowest.get(key, 0.0))
    return slowest
