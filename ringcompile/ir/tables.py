"""Tables: which blocks are on, where no formula says it.

A predicate reads one as ``name(h, i, j) != 0`` with ``i`` and ``j`` numbers of blocks.
The name is the whole recipe, so that equal tables read alike and the text of a plan
holds all of them. Invariant: a table is the same on every rank.
"""

from dataclasses import dataclass
from functools import lru_cache

import sympy
from sympy.logic.boolalg import Boolean
from torch import Tensor

from ringcompile.ir.mask import TABLE_MARK, equals_zero, negate, table_function


@dataclass(frozen=True, slots=True)
class RandomBlocks:
    """Random blocks of each row of blocks (SEMANTICS.md section 3).

    Attributes:
        seed: of the hash that orders the candidates.
        count: how many blocks each row takes.
        num_heads: query heads; each has its own blocks.
        num_blocks: blocks of the sequence.
        is_causal: whether later blocks are no candidates.
        taken: blocks that are no candidates: a predicate on ``q`` and ``k``, counted
            in blocks, as ``ir.text.format_sexpr`` writes it.
    """

    seed: int
    count: int
    num_heads: int
    num_blocks: int
    is_causal: bool
    taken: str

    def __str__(self) -> str:
        sizes = (self.seed, self.count, self.num_heads, self.num_blocks)
        # One word without brackets, as s-expressions want it.
        words = (*sizes, int(self.is_causal), self.taken.translate(_QUOTED))
        return TABLE_MARK.join(["random", *map(str, words)])

    @classmethod
    def parse(cls, text: str) -> "RandomBlocks":
        """Read back what ``str`` gave."""
        _, *numbers, causal, taken = text.split(TABLE_MARK)
        seed, count, num_heads, num_blocks = map(int, numbers)
        taken = taken.translate(_UNQUOTED)
        return cls(seed, count, num_heads, num_blocks, causal == "1", taken)


@dataclass(frozen=True, slots=True)
class GivenBlocks:
    """Blocks that a user lists.

    Attributes:
        shape: heads (or 1 for all alike), query blocks, key blocks.
        bits: one for each block, the first the most significant, as hexadecimal digits.
    """

    shape: tuple[int, int, int]
    bits: str

    @classmethod
    def of(cls, on: Tensor) -> "GivenBlocks":
        """Record a bool tensor ``(heads or 1, num_blocks, num_blocks)``."""
        assert on.dim() == 3, f"a table of {on.dim()} dims"  # noqa: PLR2004
        heads, rows, columns = on.shape
        bits = "".join("01"[bit] for bit in on.flatten().int().tolist())
        return cls((heads, rows, columns), f"{int(bits, 2):x}")

    @property
    def flags(self) -> list[bool]:
        """Whether each block is on, in order."""
        heads, rows, columns = self.shape
        bits = f"{int(self.bits, 16):0{heads * rows * columns}b}"
        return [bit == "1" for bit in bits]

    def __str__(self) -> str:
        return TABLE_MARK.join(["given", *map(str, self.shape), self.bits])

    @classmethod
    def parse(cls, text: str) -> "GivenBlocks":
        """Read back what ``str`` gave."""
        _, heads, rows, columns, bits = text.split(TABLE_MARK)
        return cls((int(heads), int(rows), int(columns)), bits)


Table = RandomBlocks | GivenBlocks

_QUOTED = str.maketrans(" ()", "_[]")
_UNQUOTED = str.maketrans("_[]", " ()")
_KINDS: dict[str, type[Table]] = {"random": RandomBlocks, "given": GivenBlocks}


@lru_cache(maxsize=256)
def parse_table(name: str) -> Table:
    """The table of a name."""
    return _KINDS[name.partition(TABLE_MARK)[0]].parse(name)


def is_on(table: Table, h: sympy.Expr, i: sympy.Expr, j: sympy.Expr) -> Boolean:
    """The table is on for query head ``h``, query block ``i`` and key block ``j``."""
    return negate(equals_zero(table_function(str(table))(h, i, j)))
