"""The errors a user can meet; each says what, where, why and what to do instead.

Invariant: every text is built by ``format_error``. Own bugs are asserts, not these.
"""

from functools import partial


def format_error(what: str, *, at: str, because: str, instead: str) -> str:
    """Build the text of an error; a part that is empty has no line.

    Args:
        what: What was refused or went wrong, with the offending value.
        at: Where: the user's ``file:line`` and node, an option, a rank and step.
        because: Why it can't be done.
        instead: What the user can do about it.

    Returns:
        ``what`` on the first line, then one indented line for each other part.
    """
    parts = (("at", at), ("because", because), ("instead", instead))
    return "\n".join([what, *(f"  {name}: {text}" for name, text in parts if text)])


class RingCompileError(Exception):
    """Base of all errors of this package, carrying the parts of its text."""

    def __init__(
        self, what: str, *, at: str = "", because: str = "", instead: str = ""
    ) -> None:
        super().__init__(format_error(what, at=at, because=because, instead=instead))
        self.what = what
        self.at = at
        self.because = because
        self.instead = instead

    def __reduce__(self) -> tuple[object, ...]:
        """Let an error travel between processes: by default only ``args`` do."""
        kind = partial(
            type(self), at=self.at, because=self.because, instead=self.instead
        )
        return kind, (self.what,)


class UnsupportedAttentionError(RingCompileError):
    """An attention can't become a ring, and the user asked not to gather it."""


class ShardingError(RingCompileError):
    """An op can't run on shards, and the user asked not to gather it."""


class OptionError(RingCompileError):
    """An option is unknown, has an unknown value, or is not built yet."""


class PlanError(RingCompileError):
    """A schedule breaks a rule that every schedule must obey."""


class RankMismatchError(RingCompileError):
    """Ranks that must agree (on inputs, plans, lengths) do not."""


class TransportError(RingCompileError):
    """A hop or collective failed or took longer than ``timeout_s``."""
