"""Random steps between attentions: on each token, along the sequence, on the dims."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from support.fuzz_attentions import Stream, to_order
from support.fuzz_writer import FLOAT, TakeBack, Var, Writer

Step = Callable[[Writer, Var], Var]

ALL = slice(None)

# ---- on each token: any order of dims, features last ---------------------------------


def project(w: Writer, x: Var) -> Var:
    return w.linear(x, w.width)


def normalize(w: Writer, x: Var) -> Var:
    weight = w.parameter(w.width) if w.chance(0.6) else None
    if w.chance(0.3):
        return w.call(F.rms_norm, x, (w.width,), weight)
    if w.chance(0.3):  # as Llama spells it
        square = w.call("mean", w.call("pow", x, 2), -1, keepdim=True)
        y = w.call("__mul__", x, w.call(torch.rsqrt, w.call("__add__", square, 1e-3)))
        return y if weight is None else w.call("__mul__", weight, y)
    bias = w.parameter(w.width) if weight is not None and w.chance(0.6) else None
    return w.call(F.layer_norm, x, (w.width,), weight, bias, 1e-3)


def activate(w: Writer, x: Var) -> Var:
    kinds = (F.gelu, F.silu, "tanh", "sigmoid", "sin", F.softplus, F.elu, F.leaky_relu)
    return w.call(w.pick(*kinds, torch.relu), x)


def gate(w: Writer, x: Var) -> Var:
    """A gated unit."""
    both = w.linear(x, 2 * w.width)
    if w.chance(0.3):
        return w.call(F.glu, both, -1)
    split = w.pick(
        ("chunk", 2, -1), ("split", w.width, -1), ("split", [w.width, w.width], -1)
    )
    a, b = w.items(w.call(split[0], both, *split[1:]))
    return w.call("__mul__", w.call(F.silu, a), b)


def scale_features(w: Writer, x: Var) -> Var:
    return w.call("__mul__", x, w.parameter(w.width, scale=1.0))


def use_scalar(w: Writer, x: Var) -> Var:
    if w.chance(0.4):
        return w.call("__mul__", x, w.parameter(1, scale=1.0))
    kinds = (
        ("__mul__", 0.5),
        ("__add__", 0.25),
        ("__rsub__", 1.0),
        ("__truediv__", 2.0),
    )
    kind = w.pick(*kinds, ("clamp", -1.5, 1.5), ("pow", 2), ("__neg__",))
    return w.call(kind[0], x, *kind[1:])


def over_features(w: Writer, x: Var) -> Var:
    kind = w.rng.randrange(4)
    if kind == 0:
        return w.call(w.pick(torch.softmax, torch.log_softmax), x, -1)
    if kind == 1:
        return w.call("__sub__", x, w.call("mean", x, -1, keepdim=True))
    if kind == 2:
        return w.call("__mul__", x, w.call(torch.logsumexp, x, -1, keepdim=True))
    size = w.call("norm", x, 2, -1, True)
    return w.call("__truediv__", x, w.call("__add__", size, 1.0))


def move_features(w: Writer, x: Var) -> Var:
    move = w.pick(("cumsum", -1), ("roll", 1, -1), ("flip", -1))
    return w.call(move[0], x, *move[1:])


def cut_features(w: Writer, x: Var) -> Var:
    half = w.width // 2
    kind = w.rng.randrange(5)
    if kind == 0:
        a, b = w.items(w.call("chunk", x, 2, -1))
        return w.call(torch.cat, (b, w.call("tanh", a)), -1)
    if kind == 1:
        parts = w.items(w.call("split", x, [1, w.width - 1], -1))
        return w.call(torch.cat, parts[::-1], dim=-1)
    if kind == 2:
        return w.call(F.pad, w.item(x, Ellipsis, slice(half, None)), (half, 0))
    if kind == 3:
        pair = w.call(torch.stack, (x, w.call("sin", x)), w.pick(0, -1, 1))
        dim = pair.value.shape.index(2) if pair.value.shape.count(2) == 1 else None
        if dim is None:
            raise TakeBack("which dim was stacked is not seen")
        return w.call("sum", pair, dim)
    index = w.call(torch.arange, w.width - 1, -1, -1)
    return w.call("index_select", x, -1, index)


def compare(w: Writer, x: Var) -> Var:
    """What depends on signs of values."""
    if not w.is_distinct:
        raise TakeBack("tokens may be alike")
    positive = w.call("__gt__", x, 0)
    kind = w.rng.randrange(3)
    if kind == 0:
        return w.call(torch.where, positive, x, w.call("__mul__", x, 0.1))
    if kind == 1:
        return w.call("__mul__", x, w.call("to", positive, FLOAT))
    best = w.call("argmax", x, -1)
    table = w.parameter(w.width, w.width)
    return w.call("__add__", x, w.call(F.embedding, best, table))


def write_in_place(w: Writer, x: Var) -> Var:
    y = w.call("__mul__", x, 2.0)
    kind = w.rng.randrange(3)
    if kind == 0:
        return w.call("add_", y, 1.0)
    if kind == 1:
        w.call("mul_", w.item(y, Ellipsis, 0), 0.5)
        return w.call("__add__", y, 0.0)
    return w.call("relu_", y)


def leave_graph(w: Writer, x: Var) -> Var:
    kind = w.rng.randrange(5)
    if kind == 0:
        return w.call("__add__", x, w.call("tanh", w.call("detach", x)))
    if kind == 1:
        return w.call("clone", x)
    if kind == 2:
        return w.call("type_as", w.call("to", x, torch.float64), x)
    if kind == 3:
        return w.call(F.dropout, x, 0.5, False)
    return w.call("to", w.call("contiguous", x), FLOAT)


def route(w: Writer, x: Var) -> Var:
    """Experts mixed by a softmax: no attention."""
    weights = w.call("softmax", w.linear(x, 3), -1)
    table = w.parameter(3, w.width)
    return w.call("__add__", x, w.call(torch.matmul, weights, table))


TOKENWISE: tuple[Step, ...] = (
    *(project, normalize, normalize, activate, activate, gate, scale_features),
    *(
        use_scalar,
        over_features,
        move_features,
        cut_features,
        compare,
        leave_graph,
        route,
    ),
    write_in_place,
)

# ---- along the sequence: (B, S, E) ---------------------------------------------------


def _alike(w: Writer, x: Var, y: Var) -> Var:
    return w.call("__add__", x, w.call("expand", y, w.batch, w.length, w.width))


def add_mean(w: Writer, x: Var) -> Var:
    kind = w.rng.randrange(4)
    if kind == 0:
        return w.call("__sub__", x, w.call("mean", x, 1, keepdim=True))
    if kind == 1:
        pooled = w.call(w.pick("mean", "sum"), x, w.pick(1, (0, 1), [1]))
        shape = (-1, 1, w.width)
        return w.call("__add__", w.call("view", pooled, *shape), x)
    if kind == 2:
        return w.call("__mul__", x, w.call("tanh", w.call("mean", x)))
    spread = w.call("var", x, 1, keepdim=True, unbiased=False)
    return w.call("__truediv__", x, w.call("__add__", spread, 1.0))


def add_pooled(w: Writer, x: Var) -> Var:
    """One token, or a masked mean, added to all."""
    kind = w.rng.randrange(5)
    if kind == 0:
        y = w.item(x, ALL, w.pick(0, -1, w.length // 2))
    elif kind == 1:
        real = w.call("to", w.call("unsqueeze", w.keep(), -1), FLOAT)
        total = w.call("sum", w.call("__mul__", x, real), 1)
        y = w.call("__truediv__", total, w.call("sum", real, 1))
    elif kind == 2:
        y = w.call("select", x, 1, w.pick(0, -1))
    elif kind == 3:
        last = w.call("__sub__", w.call("sum", w.keep(), 1), 1)
        y = w.item(x, w.call(torch.arange, w.batch), last)
    else:
        if not w.is_distinct:
            raise TakeBack("tokens may be alike")
        y = w.call("amax", x, 1)
    y = w.linear(y, w.width) if w.chance(0.4) else y
    return _alike(w, x, w.call("unsqueeze", y, 1))


def shift(w: Writer, x: Var) -> Var:
    kind = w.rng.randrange(4)
    if kind == 0:
        return w.call(F.pad, w.item(x, ALL, slice(1, None)), (0, 0, 0, 1))
    if kind == 1:
        return w.call(F.pad, w.item(x, ALL, slice(None, -1)), (0, 0, 1, 0))
    if kind == 2:
        first, rest = w.item(x, ALL, slice(None, 1)), w.item(x, ALL, slice(1, None))
        return w.call(torch.cat, (rest, first), 1)
    order = w.argument(torch.randperm(w.length, generator=w.generator))
    return w.call("__add__", x, w.item(x, ALL, order))


def along(w: Writer, x: Var) -> Var:
    """One op that runs along the sequence."""
    kinds = (
        ("cumsum", 1),
        ("roll", 1, 1),
        ("roll", -1, 1),
        ("flip", 1),
        ("softmax", 1),
    )
    kind = w.pick(*kinds)
    return w.call(kind[0], x, *kind[1:])


def by_position(w: Writer, x: Var) -> Var:
    """Something that positions, masks or ids decide, on each token."""
    kind = w.rng.randrange(6)
    if kind == 0:
        ramp = w.call(
            "__truediv__", w.call("to", w.positions(), FLOAT), float(w.length)
        )
        return w.call("__mul__", x, w.call("unsqueeze", ramp, -1))
    if kind == 1:
        return w.call(
            "__mul__", x, w.call("to", w.call("unsqueeze", w.keep(), -1), FLOAT)
        )
    if kind == 2:
        dropped = w.call("__invert__", w.item(w.keep(), ALL, ALL, None))
        return w.call("masked_fill", x, dropped, w.pick(0.0, 0.5))
    if kind == 3:
        zeros = w.call(torch.zeros, w.width, dtype=FLOAT)
        return w.call(torch.where, w.item(w.keep(), Ellipsis, None), x, zeros)
    if kind == 4:
        table = w.parameter(w.length + 3, w.width)
        rows = w.call(F.embedding, w.documents(), table)
        return w.call("__add__", x, rows)
    sizes = (w.length, w.width)
    return w.call("__add__", x, w.parameter(*w.pick(sizes, (1, *sizes))))


def mix(w: Writer, x: Var) -> Var:
    """Products along the sequence that are no attention."""
    kind = w.rng.randrange(3)
    turned = w.call("transpose", x, 1, 2)
    if kind == 0:
        return w.call(torch.matmul, w.parameter(w.length, w.length), x)
    if kind == 1:
        both = w.call("__truediv__", w.call(torch.bmm, turned, x), float(w.length))
        return w.call(torch.bmm, x, both)
    weight = w.parameter(w.width, 1, 3)
    y = w.call(F.conv1d, turned, weight, None, 1, 1, 1, w.width)
    return w.call("transpose", y, 1, 2)


def turn(w: Writer, x: Var) -> Var:
    """Dims moved there and back, something done on the way."""
    kind = w.rng.randrange(4)
    if kind == 0:
        y = w.call("sin", w.call("transpose", x, 1, 2))
        return w.call("transpose", y, -1, -2)
    if kind == 1:
        dim = w.rng.randrange(3)
        return w.call("squeeze", w.call("cos", w.call("unsqueeze", x, dim)), dim)
    if kind == 2:
        y = w.call("permute", x, 2, 1, 0)
        y = w.call("__mul__", y, w.parameter(w.width, 1, 1, scale=1.0))
        return w.call("permute", y, 2, 1, 0)
    y = w.call("reshape", w.call("transpose", x, 0, 1), w.length * w.batch, w.width)
    y = w.call("view", w.linear(y, w.width), w.length, w.batch, w.width)
    return w.call("transpose", y, 0, 1)


def regroup(w: Writer, x: Var) -> Var:
    """Dims joined or split and restored, something done on the way."""
    sizes, half = (w.batch, w.length, w.width), w.width // 2
    kind = w.rng.randrange(3)
    if kind == 0:
        y = w.call("__mul__", w.call("reshape", x, -1), 1.5)
        return w.call("view", y, *sizes)
    if kind == 1:
        y = w.call("reshape", x, w.batch, w.length * 2, half)
        return w.call("reshape", w.call("tanh", y), *sizes)
    y = w.call("reshape", x, w.batch, w.length, 2, half)
    y = w.call("permute", y, 2, 0, 1, 3)
    return w.call("__add__", x, w.call("repeat", w.item(y, 1), 1, 1, 2))


ALONG_SEQUENCE: tuple[Step, ...] = (
    *(add_mean, add_mean, add_pooled, add_pooled, shift, along, by_position),
    *(by_position, mix, turn, regroup),
)


def step(w: Writer, stream: Stream) -> Stream:
    """One random step of the stream."""
    if w.chance(0.1):
        return to_order(w, stream, w.pick("bse", "sbe", "ne"))
    if w.chance(0.6):
        return Stream(w.rng.choice(TOKENWISE)(w, stream.x), stream.order)
    stream = to_order(w, stream, "bse")
    return Stream(w.rng.choice(ALONG_SEQUENCE)(w, stream.x))


def pool(w: Writer, x: Var) -> Var:
    """``(B, E)`` of ``(B, S, E)``, or fewer dims."""
    kind = w.rng.randrange(6)
    if kind == 0:
        return w.call("mean", x, 1)
    if kind == 1:
        return w.item(x, ALL, w.pick(0, -1))
    if kind == 2:
        real = w.call("to", w.keep(), FLOAT)
        total = w.call(torch.einsum, "bse,bs->be", x, real)
        return w.call("__truediv__", total, w.call("sum", real, -1, keepdim=True))
    if kind == 3:
        scores = w.call("softmax", w.call("squeeze", w.linear(x, 1), -1), -1)
        return w.call("sum", w.call("__mul__", x, w.call("unsqueeze", scores, -1)), 1)
    if kind == 4:
        return w.call("sum", x)
    return w.call("__truediv__", w.call("sum", x, (0, 1)), math.sqrt(w.length))
