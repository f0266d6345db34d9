"""``python -m ringcompile demo | explain | plan | simulate | doctor``.

Commands import what they need when they run, so that ``--help`` is quick.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ringcompile.errors import RingCompileError

if TYPE_CHECKING:
    from ringcompile.commands.plan import Question

INTERRUPTED = 130
LAYOUTS = ("auto", "contiguous", "zigzag", "striped", "hilbert")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: as typed; None: those of the process.

    Returns:
        The exit status: 0 if all is well, 1 if something is wrong, 2 if something that
        was typed is.
    """
    given = _build_parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = given.command
    try:
        return command(given)
    except RingCompileError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader has seen enough; nothing more is written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ringcompile", description="Ring attention as a torch.compile backend."
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_demo(commands.add_parser("demo", help=_demo.__doc__))
    _add_explain(commands.add_parser("explain", help=_explain.__doc__))
    for name, command in (("plan", _plan), ("simulate", _simulate)):
        question = commands.add_parser(name, help=command.__doc__)
        question.set_defaults(ulysses=1)
        _add_question(question, command)
        if command is _plan:
            question.add_argument(
                "--picture", action="store_true", help="draw the mask too"
            )
            question.add_argument(
                "--ulysses", type=_count, default=1, help="so many ranks deal out heads"
            )
    doctor = commands.add_parser("doctor", help=_doctor.__doc__)
    doctor.set_defaults(command=_doctor)
    return parser


# ---- demo ----------------------------------------------------------------------------


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=_count, default=4, help="CPU ranks")
    parser.add_argument("--layers", type=_count, default=4, help="layers of the model")
    parser.add_argument("--seq", type=_count, default=1024, help="tokens")
    parser.set_defaults(command=_demo)


def _demo(given: argparse.Namespace) -> int:
    """Run a random-weight Llama on several CPU ranks and compare it with eager."""
    from rich.console import Console  # noqa: PLC0415

    from ringcompile.demo import run_demo  # noqa: PLC0415
    from ringcompile.demo.records import DemoSize  # noqa: PLC0415

    size = DemoSize(ranks=given.ranks, layers=given.layers, length=given.seq)
    return run_demo(size, Console())


# ---- explain -------------------------------------------------------------------------


def _add_explain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        choices=("bert", "gpt2", "llama", "mistral"),
        default="llama",
        help="a small model of transformers' with random weights",
    )
    parser.add_argument("--world-size", type=_count, default=4, help="ranks")
    parser.add_argument("--layers", type=_count, default=2, help="layers of the model")
    parser.add_argument("--seq", type=_count, default=512, help="tokens")
    parser.add_argument("--layout", choices=LAYOUTS, default="auto")
    parser.add_argument(
        "--graph", metavar="PASS", help="print the graph after this pass instead"
    )
    parser.add_argument("--rank", type=int, default=0, help="whose graph")
    parser.add_argument("--json", action="store_true", help="print JSON instead")
    parser.set_defaults(command=_explain)


def _explain(given: argparse.Namespace) -> int:
    """Say what the backend does to a model, without peers."""
    from ringcompile.commands.explain import ModelSize, explain_model  # noqa: PLC0415

    report = explain_model(
        given.model,
        ModelSize(layers=given.layers, length=given.seq),
        world_size=given.world_size,
        options={"layout": given.layout},
    )
    if given.graph is None:
        print(report.to_json() if given.json else report)
        return 0
    try:
        print(report.graph(given.graph, given.rank))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


# ---- plan and simulate ---------------------------------------------------------------


def _add_question(
    parser: argparse.ArgumentParser, command: Callable[[argparse.Namespace], int]
) -> None:
    parser.add_argument(
        "--mask",
        default="causal",
        help="all, causal, window(left[, right]), prefix(n), chunked(n), and, or, not",
    )
    parser.add_argument("--layout", choices=LAYOUTS, default="auto")
    parser.add_argument("--ranks", type=_count, default=4)
    length = 8192 if command is _plan else 96
    parser.add_argument("--seq", type=_count, default=length, help="tokens S")
    heads, kv_heads, features = (32, 8, 128) if command is _plan else (4, 2, 16)
    parser.add_argument("--heads", type=_count, default=heads)
    parser.add_argument("--kv-heads", type=_count, default=kv_heads)
    parser.add_argument("--head-size", type=_count, default=features)
    parser.add_argument("--stages", type=_count, help="group the steps into so many")
    parser.add_argument(
        "--machine",
        choices=("cpu", "h200"),
        default="cpu",
        help="whose rates the cost model takes",
    )
    parser.set_defaults(command=command)


def _plan(given: argparse.Namespace) -> int:
    """Draw the schedule of one attention, with its bytes and cost."""
    from ringcompile.commands.plan import (  # noqa: PLC0415
        draw_question,
        format_plan_answer,
    )

    question = _read_question(given)
    if given.picture:
        print(draw_question(question))
    print(format_plan_answer(question))
    return 0


def _simulate(given: argparse.Namespace) -> int:
    """Run a schedule's ranks in one process against the dense reference."""
    from ringcompile.commands.plan import simulate_answer  # noqa: PLC0415

    text, is_right = simulate_answer(_read_question(given))
    print(text)
    return 0 if is_right else 1


def _read_question(given: argparse.Namespace) -> "Question":
    from ringcompile.commands.masks import read_mask_text  # noqa: PLC0415
    from ringcompile.commands.plan import Question  # noqa: PLC0415
    from ringcompile.plan.cost import Sizes  # noqa: PLC0415

    sizes = Sizes(given.heads, given.kv_heads, given.head_size)
    return Question(
        mask=read_mask_text(given.mask),
        layout=given.layout,
        ranks=given.ranks,
        length=given.seq,
        sizes=sizes,
        num_stages=given.stages,
        ulysses=given.ulysses,
        machine=given.machine,
    )


# ---- doctor --------------------------------------------------------------------------


def _doctor(_given: argparse.Namespace) -> int:
    """Look at versions, the backend, and whether ranks can talk."""
    from ringcompile.commands.doctor import examine  # noqa: PLC0415

    is_well = True
    for finding in examine():
        print(finding, flush=True)
        is_well = is_well and finding.is_well
    return 0 if is_well else 1


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        message = f"{value} is less than 1"
        raise argparse.ArgumentTypeError(message)
    return value


if __name__ == "__main__":
    sys.exit(main())
