"""Kernel calls: what one call computes, where that is less than a piece of a plan."""

from dataclasses import dataclass

from ringcompile.ir.schedule import Kernel, Piece, Rows


@dataclass(frozen=True, slots=True)
class Call(Piece):
    """One kernel call.

    Attributes:
        groups: so many equal runs of rows; the first of q meets the first of kv, and so
            on. More than one never under a mask.
        gap: rows between two runs.
        is_upper: of a causal call: row i sees the rows j >= i of its square instead.
        classes: rows are dealt out to so many classes by turns, and meet those of their
            class alone; runs and gaps count rows of one class.
        heads: query heads that take part; None for all.
        mask: of a call under a mask that is not the part's, as text.
    """

    groups: int = 1
    gap: int = 0
    is_upper: bool = False
    classes: int = 1
    heads: tuple[int, int] | None = None
    mask: str | None = None

    @property
    def runs(self) -> tuple[int, int]:
        """Rows of a run, of q and of kv."""
        q, kv = (_size(of) // self.classes + self.gap for of in (self.q, self.kv))
        return q // self.groups - self.gap, kv // self.groups - self.gap

    def join(self, other: "Call") -> "Call | None":
        """This call and one of one run behind it as one call; None: they don't fit."""
        assert self.classes == other.classes == 1, "classes come later"
        if (
            (self.kernel, self.is_upper) != (other.kernel, other.is_upper)
            or self.kernel is Kernel.MASKED
            or other.groups > 1
            or self.runs != other.runs
        ):
            return None
        gaps = {
            theirs.start[1] - mine.stop[1]
            for mine, theirs in ((self.q, other.q), (self.kv, other.kv))
        }
        gap = gaps.pop()
        if gaps or gap < 0 or (self.groups > 1 and gap != self.gap):
            return None
        return Call(
            rows(self.q.start[1], other.q.stop[1]),
            rows(self.kv.start[1], other.kv.stop[1]),
            self.kernel,
            groups=self.groups + 1,
            gap=gap,
            is_upper=self.is_upper,
        )


def rows(start: int, stop: int) -> Rows:
    """Rows by number."""
    return Rows((0, start), (0, stop))


def join_calls(calls: list[Call]) -> list[Call]:
    """Each with the one before it, where they fit."""
    joined: list[Call] = []
    for call in calls:
        both = joined[-1].join(call) if joined else None
        if both is None:
            joined.append(call)
        else:
            joined[-1] = both
    return joined


def _size(of: Rows) -> int:
    return of.stop[1] - of.start[1]
