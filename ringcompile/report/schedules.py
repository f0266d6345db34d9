"""A schedule as people read it: drawn, and with the bytes that each step moves."""

from collections.abc import Iterator
from fractions import Fraction
from itertools import accumulate

from ringcompile.ir.schedule import Schedule
from ringcompile.plan.backward import Phase, communications
from ringcompile.plan.traffic import count_sent_rows
from ringcompile.report.records import StepReport


def read_steps(
    schedule: Schedule,
    *,
    kv_bytes: int,
    dkv_bytes: int,
    length: int,
    one_call_bytes: int | None = None,
) -> Iterator[StepReport]:
    """Yield what each step of a schedule moves; the first needs no hop and is left out.

    So is what ranks trade that deal out heads: it is no step's.

    Args:
        schedule: what all ranks do.
        kv_bytes: of one row of K and V, all batches and KV heads together.
        dkv_bytes: the same of their gradients.
        one_call_bytes: the same of gradients that one kernel computes, if it is less.
        length: keys: they travel, queries do not.
    """
    firsts = list(accumulate((len(p.steps) for p in schedule.parts), initial=0))
    sent = _count_rows(schedule, length)
    for step, part in dict.fromkeys((step, part) for _, step, part in sent):
        kv, kv_again, dkv = (sent[phase, step, part] for phase in Phase)
        plan, home_bytes = schedule.parts[part], dkv_bytes
        if one_call_bytes and plan.is_one_call(plan.steps[step - firsts[part]]):
            home_bytes = one_call_bytes
        yield StepReport(
            part=part,
            step=step - firsts[part],
            forward_bytes=tuple(int(rows * kv_bytes) for rows in kv),
            backward_bytes=tuple(
                int(rows * kv_bytes + home * home_bytes)
                for rows, home in zip(kv_again, dkv, strict=True)
            ),
        )


def _count_rows(
    schedule: Schedule, length: int
) -> dict[tuple[Phase, int, int], list[Fraction]]:
    """Rows per KV head that each rank sends, by phase, step and part.

    Of ranks that deal out heads each sends the rows of its own, here on average.
    """
    size = schedule.ulysses.size
    chunk = schedule.kv_side.layout.chunk_size(length)
    sent: dict[tuple[Phase, int, int], list[Fraction]] = {}
    for rank in range(schedule.cp_size):
        for hop in communications(schedule, rank):
            chunks, rows = count_sent_rows(schedule, hop, rank)
            key = (hop.phase, hop.step, hop.part)
            of_rank = (chunks * chunk + rows) / size
            sent.setdefault(key, []).extend([of_rank] * size)
    return sent
