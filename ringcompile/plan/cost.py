"""Cost: seconds that a schedule takes on a machine, by flops and by alpha-beta hops.

A stage is computed while the hops of the next fly, so it takes the longer of the two on
the slowest rank. What the host takes is not counted, nor what models do beside.
"""

from dataclasses import dataclass, replace
from itertools import count

from ringcompile.ir.layout import Side
from ringcompile.ir.schedule import Kernel, Part, Schedule, Step
from ringcompile.plan.backward import Phase, communications
from ringcompile.plan.pairs import count_pairs
from ringcompile.plan.traffic import GRAD_BYTES, count_sent_rows


@dataclass(frozen=True, slots=True)
class Rate:
    """What calls of a kernel take.

    Attributes:
        call_s: seconds of any call.
        flops: useful flops of forward per second, of backward too, which has 2.5 times
            as many.
        row_s: seconds for each element of Q: what is prepared, merged and summed.
    """

    call_s: float
    flops: float
    row_s: float = 0.0

    def find_seconds(self, flops: float, elements: float) -> float:
        """Of one call."""
        return self.call_s + flops / self.flops + elements * self.row_s


@dataclass(frozen=True, slots=True)
class Machine:
    """Measured rates of one rank and its link.

    Attributes:
        name: what reports call it.
        full: of a tile in which all pairs count, forward and backward.
        causal: of a causal square.
        masked: of a masked tile.
        hop_s: what a hop costs beside its bytes.
        link_bytes: bytes per second of a hop.
        trade_s: seconds for each element that ranks trade, beside its hop: it is laid
            out before and behind. 0 where nothing of the kind was measured.
    """

    name: str
    full: tuple[Rate, Rate]
    causal: tuple[Rate, Rate]
    masked: tuple[Rate, Rate]
    hop_s: float
    link_bytes: float
    trade_s: float = 0.0


_FULL = (Rate(14e-6, 620e12, 1.5e-12), Rate(38e-6, 215e12, 5.5e-12))
_CAUSAL = (Rate(19e-6, 550e12, 1.5e-12), Rate(50e-6, 201e12, 7.5e-12))
_MASKED = (Rate(20e-6, 398e12, 1.5e-12), Rate(50e-6, 154e12, 5.5e-12))

H200 = Machine("H200, copies", _FULL, _CAUSAL, _MASKED, 30e-6, 370e9, 2e-12)
"""cuDNN's kernels, flex for masked tiles, copies between GPUs, bfloat16, D = 128.

Source: least squares over kernel calls of 1,024 to 32,768 rows and 4 to 32 heads, alone
on one H200 (torch 2.11); their rates times 0.885, as a GPU that does nothing else gets
slower, which is fitted to rings of 16,384 tokens on each of two; copies as FACTS.md
section 1 has them. Of 14 other rings and trades there, of 4,096 to 32,768 tokens, half
are predicted within 6 %, all within 16 %.
"""

H200_SENDS = replace(H200, name="H200, NCCL", hop_s=170e-6, link_bytes=323e9)
"""The same, with NCCL's sends: 4 MB at 22 GB/s take that long beyond 323 GB/s."""

CPU = Machine(
    "CPU, gloo",
    (Rate(1e-3, 25e9), Rate(3.1e-3, 8e9)),
    (Rate(1e-3, 14e9), Rate(3.1e-3, 4.5e9)),
    (Rate(1e-3, 3e9), Rate(3.1e-3, 0.97e9)),
    0.4e-3,
    0.3e9,
)
"""aten's CPU flash kernel and the blocked loop in float32, D = 64, one thread.

Source: measured on two cores of a busy x86 server, torch 2.13, S = 512 to 2,048; gloo
between two processes of it, 4 bytes and 1 MB to 16 MB.
"""


def find_machine(device_type: str, transport: str) -> Machine:
    """What to reckon with on ranks of that device, by that option ``transport``.

    ``auto`` is taken for copies, as between GPUs of one host.
    """
    if device_type != "cuda":
        return CPU
    return H200_SENDS if transport == "p2p" else H200


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
    def elements_per_query(self) -> int:
        """Elements of Q in one row, all heads and batches."""
        return self.head_size * self.num_heads * self.batch

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

        def fly(phase: Phase, stage: int, numbers: list[list[int]] = numbers) -> float:
            """Hops of a stage; of one that isn't there, none."""
            of_stage = numbers[stage] if 0 <= stage < len(numbers) else ()
            return sum(hops.get((phase, n), 0.0) for n in of_stage)

        total += fly(Phase.FORWARD_KV, 0)
        for n, (forward, _) in enumerate(compute):
            total += max(forward, fly(Phase.FORWARD_KV, n + 1))
        # An own tile is the last of backward: what is fetched first then flies under
        # what comes before the ring. What the last one sends home, nothing hides.
        is_own_alone = not any(step.shift for step in part.stages[0])
        order = list(range(len(compute)))
        order = [*order[1:], 0] if is_own_alone else order
        total += 0.0 if is_own_alone else fly(Phase.BACKWARD_KV, 0)
        total += fly(Phase.BACKWARD_DKV, order[-1])
        ends = zip([-1, *order[:-1]], order, [*order[1:], -1], strict=True)
        for before, n, after in ends:
            ahead = fly(Phase.BACKWARD_KV, after)
            home = fly(Phase.BACKWARD_DKV, before)
            total += max(compute[n][1], ahead + home)
    return total


def _find_exchange_seconds(
    schedule: Schedule, length: int, sizes: Sizes, machine: Machine
) -> float:
    """What ranks that deal out heads wait for, before and behind the ring."""
    size = schedule.ulysses.size
    if size == 1:
        return 0.0
    rows = schedule.layout.shard_size(length) / size
    row_elements = 2 * (sizes.num_heads + sizes.num_kv_heads) * sizes.head_size
    elements = rows * row_elements * sizes.batch
    num_bytes = elements * sizes.item_bytes * (size - 1) / size
    hops = 2 * (size - 1) * machine.hop_s + num_bytes / machine.link_bytes
    return hops + elements * machine.trade_s


def _compute_seconds(
    part: Part,
    stage: tuple[Step, ...],
    sides: tuple[Side, Side],
    sizes: Sizes,
    machine: Machine,
) -> tuple[float, float]:
    """Forward and backward of a stage, each on the slowest rank."""
    rates = {
        Kernel.FULL: machine.full,
        Kernel.CAUSAL: machine.causal,
        Kernel.MASKED: machine.masked,
    }
    cp_size = sides[0].layout.cp_size
    seconds = [[0.0] * cp_size for _ in "fb"]
    for step in stage:
        for rank, tile in enumerate(step.tiles):
            ranks = (rank, (rank - step.shift) % cp_size)
            for piece in tile.pieces:
                flops = sizes.flops_per_pair * count_pairs(
                    part, piece, *sides, ranks=ranks
                )
                start, stop = piece.q.resolve(sides[0].chunk or 0)
                elements = sizes.elements_per_query * (stop - start)
                for total, rate in zip(seconds, rates[piece.kernel], strict=True):
                    total[rank] += rate.find_seconds(flops, elements)
    forward, backward = map(max, seconds)
    return forward, backward


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
