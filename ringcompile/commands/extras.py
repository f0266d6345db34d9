"""Optional packages that commands need."""

from importlib.util import find_spec

from ringcompile.errors import RingCompileError


def check_transformers(what: str) -> None:
    """Raise unless transformers is there.

    Args:
        what: wants it.

    Raises:
        RingCompileError: it is missing.
    """
    if find_spec("transformers") is None:
        raise RingCompileError(
            f"{what} without transformers",
            at="python -m ringcompile",
            because="its model is one of transformers'",
            instead="pip install 'ringcompile[demo]'",
        )
