"""A mask as one types it: ``causal and window(127)``, ``causal or prefix(64)``."""

import ast
from collections.abc import Callable
from functools import reduce

from sympy.logic.boolalg import Boolean

from ringcompile.errors import OptionError
from ringcompile.ir.mask import (
    TRUE,
    Mask,
    causal,
    chunked,
    conjunction,
    disjunction,
    negate,
    prefix,
    window,
)

_WORDS: dict[str, tuple[int, int, Callable[..., Boolean]]] = {
    # word: least and most arguments, what it means
    "all": (0, 0, lambda: TRUE),
    "causal": (0, 0, causal),
    "window": (1, 2, window),
    "prefix": (1, 1, prefix),
    "chunked": (1, 1, chunked),
}

SPELLING = (
    "all, causal, window(left[, right]), prefix(n) and chunked(n), joined by and, or,"
    " not"
)


def read_mask_text(text: str) -> Mask:
    """Read a mask.

    Args:
        text: words of masks joined by ``and``, ``or``, ``not`` and brackets.

    Raises:
        OptionError: the text is something else.
    """
    try:
        return Mask(_read(ast.parse(text, mode="eval").body))
    except (SyntaxError, ValueError) as error:
        raise OptionError(
            f"mask {text!r}",
            at="--mask",
            because=str(error.args[0]),
            instead=SPELLING,
        ) from None


def _read(node: ast.expr) -> Boolean:
    if isinstance(node, ast.BoolOp):
        join = conjunction if isinstance(node.op, ast.And) else disjunction
        return reduce(join, map(_read, node.values))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return negate(_read(node.operand))
    if isinstance(node, ast.Name):
        return _apply(node.id, [])
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return _apply(node.func.id, [_read_number(a) for a in node.args])
    message = f"{ast.unparse(node)!r} is no mask"
    raise ValueError(message)


def _apply(word: str, numbers: list[int]) -> Boolean:
    if word not in _WORDS:
        message = f"{word!r} is no mask"
        raise ValueError(message)
    least, most, build = _WORDS[word]
    if not least <= len(numbers) <= most:
        expected = str(least) if least == most else f"{least} to {most}"
        message = f"{word} takes {expected} numbers, not {len(numbers)}"
        raise ValueError(message)
    return build(*numbers)


def _read_number(node: ast.expr) -> int:
    value = ast.literal_eval(node)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    message = f"{ast.unparse(node)!r} is no whole number"
    raise ValueError(message)
