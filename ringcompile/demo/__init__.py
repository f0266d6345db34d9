"""The demo: an unmodified Llama on a few CPU ranks, compared with eager."""

from rich.console import Console

from ringcompile.commands.extras import check_transformers
from ringcompile.demo.processes import RankFailedError, run_ranks
from ringcompile.demo.records import DemoSize, Results
from ringcompile.demo.show import Display, format_results


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
    check_transformers("the demo")
    try:
        with Display(size, console) as display:
            results = Results.of(run_ranks(size, display.on_stage))
    except RankFailedError as error:
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        return 1
    console.print(format_results(results))
    return 0 if results.is_right else 1
