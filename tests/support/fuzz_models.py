"""Random small models: a stream of tokens through attentions and what stands between.

What a seed means is fixed by the fuzzer's files alone: no clock, no global state.
"""

import torch
import torch.nn.functional as F

from ringcompile.config import RingOptions
from support.fuzz_attentions import Stream, attend, to_order
from support.fuzz_program import Program
from support.fuzz_steps import ALL, pool, step
from support.fuzz_writer import FLOAT, Var, Writer

VOCABULARY = 11
IGNORED = -100


def write_program(seed: int, *, is_small: bool = False) -> Program:
    """The model of that seed."""
    w = Writer(seed, is_small=is_small)
    stream = _embed(w)
    outputs: list[Var] = []
    past: list[Stream] = [stream]
    num_attentions = (1, 1, 1, 1, 1, 1, 1, 2) if is_small else (1, 1, 1, 2, 2, 3)
    num_steps = (0, 0, 1, 1) if is_small else (0, 1, 1, 2, 3)
    for number in range(w.pick(*num_attentions)):
        for _ in range(w.pick(*num_steps)):
            stream = _advance(w, stream, past)
        made = None
        while made is None:
            made = w.attempt(_attention_block, stream)
        stream = made
        past.append(stream)
        if w.chance(0.1):
            outputs.append(stream.x)
        if number and w.chance(0.3):
            stream = _advance(w, stream, past)
    for _ in range(w.pick(*num_steps)):
        stream = _advance(w, stream, past)
    outputs += _finish(w, stream)
    return _close(w, outputs).without_dead_code()


def _advance(w: Writer, stream: Stream, past: list[Stream]) -> Stream:
    made = w.attempt(step, stream)
    if made is None:
        return stream
    if w.chance(0.2):
        summed = w.attempt(_add_past, made, w.rng.choice(past))
        made = summed or made
    past.append(made)
    return made


def _add_past(w: Writer, stream: Stream, earlier: Stream) -> Stream:
    earlier = to_order(w, earlier, stream.order)
    return Stream(w.call(w.pick("__add__", "add"), stream.x, earlier.x), stream.order)


def _attention_block(w: Writer, stream: Stream) -> Stream:
    """An attention, mostly around a residual."""
    if w.chance(0.3):
        stream = to_order(w, stream, w.pick("bse", "sbe", "ne"))
    x = Stream(w.call(F.layer_norm, stream.x, (w.width,)), stream.order)
    out = attend(w, x if w.chance(0.7) else stream)
    return _add_past(w, out, stream) if w.chance(0.7) else out


def _embed(w: Writer) -> Stream:
    """Tokens from float inputs, or from ids and positions."""
    sizes = (w.batch, w.length, w.width)
    kind = w.rng.randrange(5)
    if kind == 0:
        w.is_distinct = True
        x = w.argument(w.randn(*sizes), needs_grad=w.chance(0.6))
        return Stream(x)
    if kind == 1:
        w.is_distinct = True
        turned = w.randn(w.length, w.batch, w.width)
        return Stream(w.argument(turned, needs_grad=w.chance(0.5)), "sbe")
    ids = w.argument(w.randint(VOCABULARY, w.batch, w.length))
    table = w.once("table", lambda: w.parameter(VOCABULARY, w.width, scale=1.0))
    x = w.call(F.embedding, ids, table)
    if w.chance(0.75):
        w.is_distinct = True
        x = w.call("__add__", x, _positions(w))
    return Stream(x)


def _positions(w: Writer) -> Var:
    kind = w.rng.randrange(4)
    if kind == 0:
        return w.call(F.embedding, w.positions(), w.parameter(w.length + 2, w.width))
    if kind == 1:
        table = w.parameter(w.length + 2, w.width)
        return w.item(table, slice(None, w.length))
    if kind == 2:
        return w.parameter(1, w.length, w.width)
    at = w.call("__add__", w.call("to", w.positions(), FLOAT), 0.5)
    rates = w.argument(w.randn(w.width // 2))
    angles = w.call(torch.outer, at, rates)
    return w.call(torch.cat, (w.call("sin", angles), w.call("cos", angles)), -1)


# ---- endings -------------------------------------------------------------------------


def _finish(w: Writer, stream: Stream) -> list[Var]:
    """What the model returns."""
    found: list[Var] = []
    kinds = (_return_stream, _return_stream, _return_pooled, _return_loss, _return_loss)
    for kind in w.rng.sample(kinds, w.pick(1, 1, 2)):
        found += w.attempt(kind, stream) or []
    return found or [stream.x]


def _return_stream(_w: Writer, stream: Stream) -> list[Var]:
    return [stream.x]


def _return_pooled(w: Writer, stream: Stream) -> list[Var]:
    return [pool(w, to_order(w, stream, "bse").x)]


def _return_loss(w: Writer, stream: Stream) -> list[Var]:
    x = to_order(w, stream, "bse").x
    kind = w.rng.randrange(6)
    if kind == 0:
        target = w.argument(w.randn(w.batch, w.length, w.width))
        loss = w.call(w.pick(F.mse_loss, F.l1_loss, F.smooth_l1_loss), x, target)
        return [loss]
    if kind == 1:
        square = w.call("pow", w.call("__sub__", x, w.argument(w.randn(w.width))), 2)
        return [w.call("mean", w.call("sum", square, -1))]
    logits = _logits(w, x)
    return [*([logits] if w.chance(0.4) else []), _cross_entropy(w, logits, kind)]


def _logits(w: Writer, x: Var) -> Var:
    table = w.once("table", lambda: w.parameter(VOCABULARY, w.width, scale=1.0))
    if w.chance(0.4):
        return w.call(F.linear, x, table)
    return w.linear(x, VOCABULARY)


def _cross_entropy(w: Writer, logits: Var, kind: int) -> Var:
    value = w.randint(VOCABULARY, w.batch, w.length)
    if w.chance(0.6):
        ignored = w.randint(3, w.batch, w.length) == 0
        ignored[0, -1] = False
        value[ignored] = IGNORED
    labels = w.argument(value)
    if kind == 2:
        shifted = w.item(logits, ALL, slice(None, -1))
        logits = w.call("contiguous", shifted) if w.chance(0.5) else shifted
        labels = w.item(labels, ALL, slice(1, None))
    elif kind == 3:
        labels = w.call(
            F.pad, w.item(labels, ALL, slice(1, None)), (0, 1), value=IGNORED
        )
    reduction = w.pick("mean", "mean", "sum")
    options = {"ignore_index": IGNORED, "reduction": reduction}
    if w.chance(0.2):
        options["label_smoothing"] = 0.1
    if w.chance(0.15):
        options["weight"] = w.argument(w.randn(VOCABULARY).abs() + 0.1)
    if kind == 4 and w.chance(0.5):
        turned = w.call("transpose", logits, 1, 2)
        return w.call(F.cross_entropy, turned, labels, **options)
    flat = w.call("reshape", logits, -1, VOCABULARY)
    labels = w.call("reshape", labels, -1)
    if kind == 5:
        options["reduction"] = "none"
        each = w.call(F.cross_entropy, flat, labels, **options)
        weights = w.call("to", w.call("reshape", w.keep(), -1), FLOAT)
        total = w.call("sum", w.call("__mul__", each, weights))
        return w.call("__truediv__", total, w.call("sum", weights))
    return w.call(F.cross_entropy, flat, labels, **options)


def _close(w: Writer, outputs: list[Var]) -> Program:
    size = w.pick(1, 2, 2, 2, 2, 2, 3, 3, 4, 4)
    layout = w.pick("auto", "auto", "auto", "contiguous", "zigzag", "striped")
    options = RingOptions(
        layout=layout,
        stages=w.pick("auto", "auto", 1, 2),
        kernel=w.pick("auto", "auto", "math"),
    )
    return Program(
        tuple(w.inputs.values()),
        tuple(w.lines),
        tuple(dict.fromkeys(x.name for x in outputs)),
        size,
        options,
        torch.float32 if w.chance(0.2) else torch.float64,
    )
