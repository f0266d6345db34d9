"""Plans and masks as canonical text, and back.

A plan is JSON with sorted keys; a predicate is an s-expression in it, a tile one line.
Invariant: equal records give equal ASCII text, and parsing that gives the record back.
"""

import json
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import sympy
from sympy.core.function import AppliedUndef

from ringcompile.ir.attention import Bias, Dropout, RankPlan
from ringcompile.ir.layout import Edge, Layout, Side
from ringcompile.ir.mask import (
    FALSE,
    TABLE_MARK,
    TRUE,
    B,
    BlockChoice,
    EmptyRow,
    H,
    K,
    Mask,
    Q,
    table_function,
)
from ringcompile.ir.schedule import (
    Coverage,
    Kernel,
    Mixing,
    Part,
    Piece,
    Rows,
    Schedule,
    Selection,
    Step,
    Tile,
    Ulysses,
    format_runs,
)
from ringcompile.ir.sums import split_floor

_Json = Any


def format_plan(plan: RankPlan) -> str:
    """Write a rank's plan as canonical ASCII text."""
    return _dump(
        {
            "index": plan.index,
            "name": plan.name,
            "rank": plan.rank,
            "group_name": plan.group_name,
            "scale": plan.scale,
            "timeout_s": plan.timeout_s,
            "schedule": _schedule_to_json(plan.schedule),
            "sources": plan.sources,
            "block_order": plan.block_order,
            "kernel": plan.kernel,
            "transport": plan.transport,
            "dropout": plan.dropout and [plan.dropout.rate, plan.dropout.seed],
            "softcap": plan.softcap,
            "biases": [[bias.is_cut, bias.is_relative] for bias in plan.biases],
            "member": plan.member,
        }
    )


def parse_plan(text: str) -> RankPlan:
    """Read a rank's plan back."""
    fields = json.loads(text)
    fields["schedule"] = _schedule_from_json(fields["schedule"])
    fields["dropout"] = fields["dropout"] and Dropout(*fields["dropout"])
    fields["biases"] = tuple(Bias(*bias) for bias in fields["biases"])
    return RankPlan(**fields)


def rename_plan(text: str, index: int, name: str) -> str:
    """The text of the same plan of another attention."""
    return _dump(json.loads(text) | {"index": index, "name": name})


def format_schedule(schedule: Schedule) -> str:
    """Write a schedule, equal on all ranks, as canonical ASCII text."""
    return _dump(_schedule_to_json(schedule))


def parse_schedule(text: str) -> Schedule:
    """Read a schedule back."""
    return _schedule_from_json(json.loads(text))


def format_mask(mask: Mask) -> str:
    """Write a mask as canonical ASCII text."""
    return _dump(_mask_to_json(mask))


@lru_cache(maxsize=1024)
def parse_mask(text: str) -> Mask:
    """Read a mask back."""
    return _mask_from_json(json.loads(text))


def _dump(value: _Json) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


# Records as JSON.


def _schedule_to_json(schedule: Schedule) -> _Json:
    record = {
        "layout": [schedule.layout.key, schedule.layout.cp_size],
        "length": schedule.length,
        "mixing": [schedule.mixing.divisor, schedule.mixing.is_detached],
        "parts": [_part_to_json(part) for part in schedule.parts],
    }
    if (keys := schedule.keys) is not None:
        record["keys"] = [keys.layout.key, keys.length]
    if schedule.ulysses.size > 1:
        record["ulysses"] = [schedule.ulysses.size, schedule.ulysses.chunks]
    return record


def _schedule_from_json(value: _Json) -> Schedule:
    layout, keys = Layout.parse(*value["layout"]), None
    if "keys" in value:
        key, length = value["keys"]
        keys = Side(Layout.parse(key, layout.cp_size), length)
    return Schedule(
        layout,
        value["length"],
        tuple(map(_part_from_json, value["parts"])),
        Mixing(*value["mixing"]),
        keys,
        Ulysses(*value.get("ulysses", ())),
    )


def _part_to_json(part: Part) -> _Json:
    stages = [
        [[step.shift, *map(_format_tile, step.tiles)] for step in stage]
        for stage in part.stages
    ]
    s = part.selection
    selection = s and [
        *(s.segment, s.rate, list(s.offsets)),
        *(s.num_kv_heads, s.start, s.stop),
    ]
    return {
        "mask": _mask_to_json(part.mask),
        "selection": selection,
        "stages": stages,
    }


def _part_from_json(value: _Json) -> Part:
    selection = value["selection"]
    if selection is not None:
        segment, rate, offsets, *rest = selection
        selection = Selection(segment, rate, tuple(offsets), *rest)
    stages = tuple(
        tuple(Step(shift, tuple(map(_parse_tile, tiles))) for shift, *tiles in stage)
        for stage in value["stages"]
    )
    return Part(_mask_from_json(value["mask"]), selection, stages)


def _mask_to_json(mask: Mask) -> _Json:
    record = [format_sexpr(mask.keeps), mask.num_captures, mask.empty_row.value]
    if (choice := mask.choice) is not None:
        visible = format_sexpr(choice.visible)
        flags = (choice.is_causal, choice.is_learned)
        record.append([choice.keep, choice.block, *flags, visible])
    return record


def _mask_from_json(value: _Json) -> Mask:
    keeps, num_captures, empty_row, *rest = value
    choice = None
    if rest:
        keep, block, is_causal, is_learned, visible = rest[0]
        visible = parse_sexpr(visible)
        choice = BlockChoice(keep, block, is_causal, visible, is_learned)
    return Mask(parse_sexpr(keeps), num_captures, EmptyRow(empty_row), choice)


# Tiles: "/ needs 0:c causal 0:c 0:c"; of several runs: "needs 0:64,128:192".


def _format_tile(tile: Tile) -> str:
    words = [tile.coverage.value]
    if tile.needs:
        words += ["needs", format_runs(tile.needs)]
    for piece in tile.pieces:
        words += [piece.kernel.value, str(piece.q), str(piece.kv)]
    return " ".join(words)


def _parse_tile(text: str) -> Tile:
    coverage, *words = text.split(" ")
    needs: tuple[Rows, ...] = ()
    if words[:1] == ["needs"]:
        needs, words = tuple(map(_parse_rows, words[1].split(","))), words[2:]
    pieces = tuple(
        Piece(_parse_rows(q), _parse_rows(kv), Kernel(kernel))
        for kernel, q, kv in zip(words[::3], words[1::3], words[2::3], strict=True)
    )
    return Tile(Coverage(coverage), pieces, needs)


def _parse_rows(text: str) -> Rows:
    start, stop = text.split(":")
    return Rows(_parse_edge(start), _parse_edge(stop))


def _parse_edge(text: str) -> Edge:
    chunks, c, rows = text.rpartition("c")
    return (int(chunks or 1), int(rows or 0)) if c else (0, int(rows))


# Predicates and integer expressions as s-expressions.

_SYMBOLS = {s.name: s for s in (B, H, Q, K)} | {"true": TRUE, "false": FALSE}
_HEADS: dict[type, str] = {
    sympy.And: "and",
    sympy.Or: "or",
    sympy.GreaterThan: ">=",
    sympy.Equality: "==",
    sympy.Unequality: "!=",
    sympy.Add: "+",
    sympy.Mul: "*",
    sympy.Mod: "mod",
    sympy.Abs: "abs",
    sympy.Max: "max",
    sympy.Min: "min",
}
_SORTED = {sympy.And, sympy.Or, sympy.Add, sympy.Mul, sympy.Max, sympy.Min}


def format_sexpr(e: sympy.Basic) -> str:
    """Write a canonical predicate or an expression in it, e.g. ``(>= (+ q 3) 0)``."""
    if isinstance(e, sympy.floor):
        x, n = split_floor(e)
        return f"(floor {format_sexpr(x)} {n})"
    if not e.args and not isinstance(e, AppliedUndef):
        text = str(e).lower() if e in {TRUE, FALSE} else str(e)
        assert text in _SYMBOLS or e.is_Integer, f"{e} in a mask predicate"
        return text
    args = [format_sexpr(a) for a in e.args]
    head = e.func.__name__ if isinstance(e, AppliedUndef) else _HEADS[e.func]
    return f"({' '.join([head, *(sorted(args) if e.func in _SORTED else args)])})"


def parse_sexpr(text: str) -> sympy.Basic:
    """Read ``format_sexpr`` back."""
    tokens = iter(text.replace("(", " ( ").replace(")", " ) ").split())
    e = _parse_tokens(next(tokens), tokens)
    assert next(tokens, None) is None, f"more than one s-expression: {text}"
    return e


def _parse_tokens(token: str, tokens: Iterator[str]) -> sympy.Basic:
    if token != "(":
        return _SYMBOLS.get(token) if token in _SYMBOLS else sympy.Integer(token)
    head = next(tokens)
    args: list[sympy.Basic] = []
    while (token := next(tokens, "")) != ")":
        assert token, f"an s-expression ({head} without its end"
        args.append(_parse_tokens(token, tokens))
    if head == "floor":
        x, n = args
        return sympy.floor(x / n)
    if head in _BUILDERS:
        return _BUILDERS[head](*args)
    if TABLE_MARK in head:
        return table_function(head)(*args)
    assert head[0] in "cm", f"no such operator: {head}"
    return sympy.Function(head, integer=True)(*args)


def _unevaluated(kind: type) -> Callable[..., sympy.Basic]:
    return lambda *args: kind(*args, evaluate=False)


# Atoms are canonical already, and sympy would try to solve them.
_BUILDERS: dict[str, Callable[..., sympy.Basic]] = {
    name: _unevaluated(kind) if name in {">=", "==", "!=", "mod"} else kind
    for kind, name in _HEADS.items()
}
