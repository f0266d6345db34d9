"""Make a failing program smaller while it fails in the same way."""

import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch.utils._pytree import tree_map_only

from support.fuzz_checks import Verdict, check_program
from support.fuzz_program import Line, Program, Ref


def shrink(program: Program, verdict: Verdict, *, limit_s: float = 60) -> Program:
    """The smallest program found in that time whose check ends in ``verdict``."""
    deadline = time.monotonic() + limit_s
    changed = True
    while changed:
        changed = False
        for smaller in _SHRINKERS:
            for candidate in smaller(program):
                if time.monotonic() > deadline:
                    return program
                if _fails_alike(candidate, verdict):
                    program, changed = candidate, True
                    break
    return program


def _fails_alike(program: Program, verdict: Verdict) -> bool:
    try:
        return check_program(program).verdict is verdict
    except Exception:
        return False


def _single_outputs(program: Program) -> Iterator[Program]:
    if len(program.outputs) > 1:
        for name in program.outputs:
            yield replace(program, outputs=(name,)).without_dead_code()


def _earlier_outputs(program: Program) -> Iterator[Program]:
    """Return what some line in the middle gives; by halves, the last ones last."""
    count = len(program.lines)
    for number in (
        count // 2,
        count * 3 // 4,
        *range(count - 2, max(-1, count - 8), -1),
    ):
        name = program.lines[number].name if number < count else ""
        if name and name not in program.outputs:
            yield replace(program, outputs=(name,)).without_dead_code()


def _fewer_lines(program: Program) -> Iterator[Program]:
    """Give the readers of a line one of its operands in its place."""
    for line in reversed(program.lines):
        for name in dict.fromkeys(line.reads):
            swap = {line.name: name}
            lines = tuple(_rename(x, swap) for x in program.lines if x is not line)
            outputs = tuple(dict.fromkeys(swap.get(n, n) for n in program.outputs))
            yield replace(program, lines=lines, outputs=outputs).without_dead_code()


def _rename(line: Line, swap: dict[str, str]) -> Line:
    def new(ref: Ref) -> Ref:
        return Ref(swap.get(ref.name, ref.name))

    args, kwargs = tree_map_only(Ref, new, (line.args, dict(line.kwargs)))
    return replace(line, args=args, kwargs=kwargs)


def _plain_settings(program: Program) -> Iterator[Program]:
    if program.size > 2:
        yield replace(program, size=2)
    if program.dtype != torch.float64:
        yield replace(program, dtype=torch.float64)
    options = program.options
    for plain in (
        replace(options, layout="contiguous"),
        replace(options, stages="auto"),
        replace(options, kernel="auto"),
    ):
        if plain != options:
            yield replace(program, options=plain)


def _fewer_gradients(program: Program) -> Iterator[Program]:
    for number, x in enumerate(program.inputs):
        if x.needs_grad:
            inputs = list(program.inputs)
            inputs[number] = replace(x, needs_grad=False)
            yield replace(program, inputs=tuple(inputs))


_SHRINKERS = (
    *(_single_outputs, _earlier_outputs, _fewer_lines, _plain_settings),
    _fewer_gradients,
)
