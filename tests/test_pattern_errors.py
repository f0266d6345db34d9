"""What each pattern says of numbers that clash: which, why, and two ways out."""

from collections.abc import Callable
from typing import Any

import pytest
from expecttest import assert_expected_inline

from ringcompile.errors import OptionError
from ringcompile.ir.mask import Mask
from ringcompile.patterns import (
    AttentionSpec,
    BigBird,
    DilatedBlocks,
    DilatedWindow,
    Fixed,
    GlobalLocal,
    Hierarchical,
    LocalWindow,
    Longformer,
    LongNet,
    PerHead,
    Sinks,
    Strided,
    Variable,
)

# Some are of wrong types on purpose.
_Fixed: Any = Fixed
_LocalWindow: Any = LocalWindow
_DilatedBlocks: Any = DilatedBlocks
_Hierarchical: Any = Hierarchical
_Variable: Any = Variable
_PerHead: Any = PerHead


def explain_all(*makers: Callable[[], object]) -> str:
    texts = []
    for make in makers:
        with pytest.raises(OptionError) as caught:
            make()
        texts.append(str(caught.value))
    return "\n".join(texts)


def test_windows() -> None:
    assert_expected_inline(
        explain_all(
            lambda: LocalWindow(32),
            lambda: LocalWindow(0, 4),
            lambda: _LocalWindow(64.5),
            lambda: GlobalLocal(-1, 64),
            lambda: GlobalLocal(1, 8, 16),
            lambda: Sinks(-1, 4),
            lambda: Sinks(4, 0),
            lambda: DilatedWindow(-1),
            lambda: DilatedWindow(4, 0),
            lambda: Strided(0),
        ),
        """\
window=32 with block=64
  at: LocalWindow
  because: a window narrower than a block reaches no other block
  instead: block=32 or less, or window=64 or more
window=0
  at: LocalWindow
  because: it counts tokens, blocks or heads, of which 1 is the least
  instead: window=1 or more, or "exact" in place of the pattern
window=64.5
  at: LocalWindow
  because: it counts tokens, blocks or heads, in whole numbers
  instead: window=1 or more, or "exact" in place of the pattern
global_blocks=-1
  at: GlobalLocal
  because: it counts tokens, blocks or heads, of which 0 is the least
  instead: global_blocks=0, or more
window=8 with block=16
  at: GlobalLocal
  because: a window narrower than a block reaches no other block
  instead: block=8 or less, or window=16 or more
sinks=-1
  at: Sinks
  because: it counts tokens, blocks or heads, of which 0 is the least
  instead: sinks=0, or more
window=0
  at: Sinks
  because: it counts tokens, blocks or heads, of which 1 is the least
  instead: window=1 or more, or "exact" in place of the pattern
window=-1
  at: DilatedWindow
  because: it counts tokens, blocks or heads, of which 0 is the least
  instead: window=0, or more
dilation=0
  at: DilatedWindow
  because: it counts tokens, blocks or heads, of which 1 is the least
  instead: dilation=1 or more, or "exact" in place of the pattern
stride=0
  at: Strided
  because: it counts tokens, blocks or heads, of which 1 is the least
  instead: stride=1 or more, or "exact" in place of the pattern""",
    )


def test_layouts_of_blocks() -> None:
    assert_expected_inline(
        explain_all(
            lambda: DilatedBlocks((2, 0)),
            lambda: _DilatedBlocks(2),
            lambda: Fixed(4, 2, 3),
            lambda: Fixed(4, 5, 2),
            lambda: Fixed(2, 3, 3),
            lambda: Variable(()),
            lambda: Variable((2, 0)),
            lambda: Variable((2,), ((5, 3),)),
            lambda: Variable((2,), ((-1, 3),)),
            lambda: _Variable((2,), (1, 3)),
            lambda: BigBird(0, 1, 0),
            lambda: Longformer(1, (0, -2)),
            lambda: Hierarchical(((4, 0),)),
            lambda: _Hierarchical((4, 1)),
        ),
        """\
rates[1]=0
  at: DilatedBlocks
  because: it counts tokens, blocks or heads, of which 1 is the least
  instead: rates[1]=1 or more, or "exact" in place of the pattern
rates=2
  at: DilatedBlocks
  because: there may be several
  instead: a tuple or a list: rates=(2,)
num_patterns=3 of global_blocks=2 in window_blocks=4
  at: Fixed
  because: 6 global blocks do not lie in a window of 4
  instead: num_patterns=2 or less, or window_blocks=6
num_patterns=2 of global_blocks=5 in window_blocks=4
  at: Fixed
  because: 10 global blocks do not lie in a window of 4
  instead: global_blocks=2 or less, or window_blocks=10
num_patterns=3 of global_blocks=3 in window_blocks=2
  at: Fixed
  because: 9 global blocks do not lie in a window of 2
  instead: global_blocks=1 of num_patterns=2, or window_blocks=9
windows=() for 1 block or more
  at: Variable
  because: every block lies in one
  instead: windows=(1,) for the own block alone, or wider ones
windows[1]=0
  at: Variable
  because: it counts tokens, blocks or heads, of which 1 is the least
  instead: windows[1]=1 or more, or "exact" in place of the pattern
global_ranges[0]=(5, 3)
  at: Variable
  because: it ends before block 3, and starts at 5
  instead: (5, 6) for one block, or leave it out
global_ranges[0][0]=-1
  at: Variable
  because: it counts tokens, blocks or heads, of which 0 is the least
  instead: global_ranges[0][0]=0, or more
global_ranges=(1, 3)
  at: Variable
  because: it holds pairs (start, stop), and 1 is none
  instead: global_ranges=((start, stop),), or () for none
window_blocks=0
  at: BigBird
  because: it counts tokens, blocks or heads, of which 1 is the least
  instead: window_blocks=1 or more, or "exact" in place of the pattern
global_indices[1]=-2
  at: Longformer
  because: it counts tokens, blocks or heads, of which 0 is the least
  instead: global_indices[1]=0, or more
levels[0][1]=0
  at: Hierarchical
  because: it counts tokens, blocks or heads, of which 1 is the least
  instead: levels[0][1]=1 or more, or "exact" in place of the pattern
levels=(4, 1)
  at: Hierarchical
  because: it holds pairs (span, stride), and 4 is none
  instead: levels=((span, stride),), or () for none""",
    )


def test_patterns_of_patterns() -> None:
    window = LocalWindow(64)
    assert_expected_inline(
        explain_all(
            lambda: PerHead(()),
            lambda: _PerHead(window),
            lambda: _PerHead((window, LongNet((8,), (2,)))),
            lambda: PerHead((window,) * 3).build_parts(Mask(), AttentionSpec(2, 2, 64)),
            lambda: window | LongNet((8,), (2,)),  # type: ignore[operator]
        ),
        """\
0 patterns for 1 head or more
  at: PerHead
  because: every head has one
  instead: one pattern or more, or "exact" without PerHead
patterns=LocalWindow(window=64, block=64)
  at: PerHead
  because: there may be several
  instead: a tuple or a list: patterns=(LocalWindow(window=64, block=64),)
patterns[1]=LongNet(segments=(8,), rates=(2,), offset='paper', weights='joint')
  at: PerHead
  because: runs of heads are told apart in a mask, and it is none
  instead: patterns that are masks, or GroupedDilated, whose groups of heads differ
3 patterns for 2 heads
  at: PerHead
  because: 1 of them would have no head
  instead: 2 patterns or fewer, or 3 heads
LocalWindow(window=64, block=64) | LongNet(segments=(8,), rates=(2,), offset='paper', weights='joint')
  at: pattern
  because: a dilated pattern counts pairs, and a union of counts is none
  instead: patterns that are masks on both sides, or `&`""",
    )


@pytest.mark.parametrize("other", [3, None, "exact"])
def test_only_patterns_compose(other: Any) -> None:  # noqa: ANN401
    with pytest.raises(TypeError, match="unsupported operand"):
        LocalWindow(64) & other
    with pytest.raises(TypeError, match="unsupported operand"):
        LocalWindow(64) | other
