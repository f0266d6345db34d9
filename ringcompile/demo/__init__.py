"""The demo: an unmodified Llama on a few CPU ranks, compared with eager."""

from importlib.util import find_spec

from rich.console import Console

from ringcompile.demo.processes import RankFailedError, run_ranks
from ringcompile.demo.records import DemoSize
from ringcompile.demo.show import Display, format_results
from ringcompile.errors import RingCompileError


def run_demo(size: DemoSize, console: Console) -> int:
    """Run the demo and print its table.

    Args:
        size: what to run.
        console: where to show it.

    Returns:
        0 if everything is within tolerance, else 1.

    Raises:
        RingCompileError: transformers is missing.
    """
    if find_spec("transformers") is None:
        raise RingCompileError(
            "the demo without transformers",
            at="python -m ringcompile demo",
            because="its model is transformers' Llama",
            instead="pip install 'ringcompile[demo]'",
        )
    try:
        with Display(size, console) as display:
            results = run_ranks(size, display.on_stage)
    except RankFailedError as error:
        console.print(str(error), markup=False, highlight=False)
        return 1
    console.print(format_results(size, results))
    return 0 if all(r.is_right for r in results) else 1
