"""Blocks chosen by their content, anew in every run (SEMANTICS.md section 3)."""

from dataclasses import dataclass, replace

import sympy
from sympy.core.function import AppliedUndef
from sympy.logic.boolalg import Boolean
from torch import nn

from ringcompile.errors import OptionError
from ringcompile.ir.mask import (
    FALSE,
    TRUE,
    B,
    BlockChoice,
    H,
    K,
    Mask,
    Q,
    conjunction,
    conjuncts,
    is_capture,
    is_listed,
    later_keys,
)
from ringcompile.patterns.base import (
    AttentionSpec,
    Parts,
    require_positive,
    without_mean,
)
from ringcompile.plan.check_pairs import replace_unknown
from ringcompile.plan.kept import count_kept


@dataclass(frozen=True, slots=True)
class Adaptive:
    """Each block of queries sees its own block and those whose keys fit it best.

    The score of a block is ``scale * <q, k>``: k the mean of K over the block's visible
    tokens, q the mean of Q over the query block or, under a causal mask, the Q of its
    first token. K and V move as in the dense ring: which tiles are needed is known only
    when it runs.

    Attributes:
        keep: blocks that each row of blocks keeps, its own among them.
        scorer: a module that gives the scores instead. It is called with the q and the
            k above, ``(B, H, num_blocks, D)`` each, without a gradient, and returns
            ``(B, H, num_blocks, num_blocks)``. Its parameters learn: on kept blocks
            the log-softmax of the scores over the candidates adds to the gradient of
            attention's scores, and not to their value. None: no gradient.
        block: tokens in a block.
    """

    keep: int
    scorer: nn.Module | None = None
    block: int = 64

    def __post_init__(self) -> None:
        require_positive("Adaptive", keep=self.keep, block=self.block)
        if self.scorer is not None and not isinstance(self.scorer, nn.Module):
            raise OptionError(
                f"scorer={self.scorer!r}",
                at="Adaptive",
                because="it is no torch.nn.Module, so nothing of it could learn",
                instead="a module, or scorer=None for <q, k>",
            )

    def build_parts(self, mask: Mask, spec: AttentionSpec) -> Parts:
        """One part, whose mask reads the choice as its last capture."""
        if mask.choice is not None:
            raise OptionError(
                f"two patterns that choose {mask.choice.keep} and {self.keep} blocks",
                at="Adaptive",
                because="an attention has one choice of blocks",
                instead="one of the two, or the other as a fixed layout",
            )
        if any(map(_reads_pairs, mask.keeps.atoms(AppliedUndef))):
            raise OptionError(
                "a mask of pairs that is passed in as a tensor",
                at="Adaptive",
                because="it may hide the future, which a block of queries would then be"
                " summed up with",
                instead="is_causal=True, or a mask built from positions in the graph",
            )
        is_learned = self.scorer is not None
        number = mask.num_captures + (2 if is_learned else 0)
        i, j = sympy.floor(Q / self.block), sympy.floor(K / self.block)
        visible = (p for p in conjuncts(mask.keeps) if not p.has(Q, H))
        choice = BlockChoice(
            *(self.keep, self.block, _hides_all_later(mask.keeps, spec)),
            *(conjunction(*visible), is_learned),
        )
        chosen = replace(without_mean(mask), num_captures=number + 1, choice=choice)
        return ((chosen & is_listed(number, j, B, H, i), None),)


def _hides_all_later(keeps: Boolean, spec: AttentionSpec) -> bool:
    """Whether no query sees a later key, by the user's mask and patterns on top.

    If captures might let one see it, none is hidden. Where the length is open, the
    first tokens stand for all.
    """
    later = replace_unknown(later_keys(keeps), TRUE)
    length = spec.length if isinstance(spec.length, int) else _SAMPLE
    heads = range(spec.num_heads if H in later.free_symbols else 1)
    return later == FALSE or not any(count_kept(later, length, head=h) for h in heads)


_SAMPLE = 1024


def _reads_pairs(read: AppliedUndef) -> bool:
    """Whether a capture is read at a query and a key at once."""
    return is_capture(read) and {Q, K} <= read.free_symbols
