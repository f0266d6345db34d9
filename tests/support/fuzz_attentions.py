"""Random attentions: projections, heads, masks and spellings."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from support.fuzz_writer import FLOAT, LOWEST, Var, Writer


@dataclass(frozen=True, slots=True)
class Stream:
    """Tokens on their way through a model.

    Attributes:
        x: the value.
        order: its dims: ``bse``, ``sbe``, or ``ne`` with batch and sequence as one.
    """

    x: Var
    order: str = "bse"


def to_order(w: Writer, stream: Stream, order: str) -> Stream:
    """The same tokens with their dims in another order."""
    x = stream.x
    if stream.order == order:
        return stream
    if stream.order == "ne":
        sizes = (w.batch, w.length)
        split = w.pick(("unflatten", 0, sizes), ("view", *sizes, x.shape[-1]))
        return to_order(w, Stream(w.call(split[0], x, *split[1:])), order)
    if stream.order == "bse" and order == "ne":
        flat = w.pick(("flatten", 0, 1), ("reshape", -1, x.shape[-1]))
        return Stream(w.call(flat[0], x, *flat[1:]), order)
    turn = w.pick(("transpose", 0, 1), ("permute", 1, 0, 2), ("swapaxes", 0, 1))
    other = "sbe" if stream.order == "bse" else "bse"
    return to_order(w, Stream(w.call(turn[0], x, *turn[1:]), other), order)


# ---- masks ---------------------------------------------------------------------------


def mask_of_positions(w: Writer) -> Var:
    """Bool ``(S, S)``, a function of positions."""
    if w.chance(0.2):
        return _triangle(w)
    at = w.positions()
    column = w.pick(("unsqueeze", 1), ("unsqueeze", -1), ("view", -1, 1))
    q, k = w.call(column[0], at, *column[1:]), w.call("unsqueeze", at, 0)
    if w.chance(0.3):
        return w.call("__le__", k, q) if w.chance(0.5) else w.call("__ge__", q, k)
    width = w.rng.randrange(1, w.length + 2)
    if w.chance(0.2):
        blocks = [w.call("__floordiv__", x, width) for x in (q, k)]
        return w.call("__eq__", *blocks)
    return _mask_of_distance(w, w.call("__sub__", q, k), k, width)


def _triangle(w: Writer) -> Var:
    if w.chance(0.5):
        ones = w.call(torch.ones, w.length, w.length, dtype=torch.bool)
        return w.call(w.pick(torch.tril, "tril"), ones)
    ones = w.call(torch.ones, w.length, w.length)
    return w.call("__eq__", w.call(torch.triu, ones, diagonal=1), 0)


def _mask_of_distance(w: Writer, distance: Var, k: Var, width: int) -> Var:
    """A window, a prefix, or every other key; ``distance`` is query minus key."""
    kind = w.rng.randrange(4)
    if kind == 0:
        near = w.call("__lt__", distance, width)
        return w.call("__and__", near, w.call("__ge__", distance, 0))
    if kind == 1:
        return w.call("__le__", w.call("abs", distance), width)
    if kind == 2:
        causal = w.call("__ge__", distance, 0)
        return w.call("__or__", causal, w.call("__lt__", k, width))
    return w.call("__eq__", w.call("__mod__", distance, w.pick(2, 3)), 0)


def make_mask(w: Writer) -> Var | None:
    """Bool, broadcastable to ``(B, H, S, S)``; None to see all."""
    terms: list[Var] = []
    if w.chance(0.5 if w.is_small else 0.7):
        mask = mask_of_positions(w)
        if w.chance(0.1 if w.is_small else 0.2):
            other = mask_of_positions(w)
            mask = w.call(w.pick("__and__", "__or__", torch.logical_and), mask, other)
        terms.append(_lift(w, mask))
    if w.chance(0.3):
        terms.append(_mask_of_keys(w))
    if w.chance(0.2):
        at = w.documents()
        q, k = w.call("unsqueeze", at, 2), w.call("unsqueeze", at, 1)
        terms.append(w.call("unsqueeze", w.call("__eq__", q, k), 1))
    if not terms:
        return None
    mask = terms[0]
    for term in terms[1:]:
        mask = w.call(w.pick("__and__", "__mul__", torch.logical_and), mask, term)
    if w.chance(0.25 if w.is_small else 0.6):  # every token sees itself
        at = w.positions()
        own = w.call("__eq__", w.call("unsqueeze", at, 1), w.call("unsqueeze", at, 0))
        mask = w.call("__or__", mask, own)
    if w.chance(0.15):
        mask = w.call("expand", mask, w.batch, 1, w.length, w.length)
    return mask


def _mask_of_keys(w: Writer) -> Var:
    """Which keys are real, ``(B, 1, 1, S)``."""
    keep, spelling = w.keep(), w.rng.randrange(3)
    if spelling == 0:
        return w.item(keep, slice(None), None, None, slice(None))
    if spelling == 1:
        return w.call("view", keep, w.batch, 1, 1, w.length)
    return w.call("unsqueeze", w.call("unsqueeze", keep, 1), 2)


def _lift(w: Writer, mask: Var) -> Var:
    if w.chance(0.3):
        return mask
    if w.chance(0.5):
        return w.item(mask, None, None)
    return w.call("view", mask, 1, 1, w.length, w.length)


# ---- heads ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Heads:
    """Sizes of one attention."""

    num: int
    num_kv: int
    size: int


def _choose_heads(w: Writer) -> Heads:
    if w.is_small:
        num = w.pick(1, 2, 2)
        return Heads(num, w.pick(1, num), 4)
    num = w.pick(1, 2, 2, 4)
    num_kv = w.pick(*(g for g in (1, 2, 4) if num % g == 0), num)
    return Heads(num, num_kv, w.pick(2, 4, 4, 8))


def split_heads(w: Writer, stream: Stream, num: int) -> Var:
    """``(B, H, S, D)`` of features that hold the heads."""
    x = stream.x
    size = x.shape[-1] // num
    if stream.order == "ne":
        return split_heads(w, to_order(w, stream, w.pick("bse", "sbe")), num)
    split = w.pick(
        ("view", *x.shape[:-1], num, size),
        ("reshape", *x.shape[:-1], num, size),
        ("unflatten", -1, (num, size)),
        ("unflatten", 2, (num, -1)),
    )
    contiguous = x if x.value.is_contiguous() else w.call("contiguous", x)
    x = w.call(split[0], contiguous, *split[1:])
    if stream.order == "sbe":
        if w.chance(0.3):  # as fairseq has it
            flat = w.call("reshape", x, w.length, w.batch * num, size)
            turned = w.call("transpose", flat, 0, 1)
            return w.call(
                "view", w.call("contiguous", turned), w.batch, num, w.length, size
            )
        return w.call("permute", x, 1, 2, 0, 3)
    turn = w.pick(("transpose", 1, 2), ("permute", 0, 2, 1, 3), ("movedim", 2, 1))
    return w.call(turn[0], x, *turn[1:])


def merge_heads(w: Writer, x: Var) -> Stream:
    """Heads back to features."""
    if w.chance(0.15):
        x = w.call("permute", x, 2, 0, 1, 3)
        return Stream(w.call("reshape", x, w.length, w.batch, -1), "sbe")
    x = w.call("transpose", x, 1, 2)
    width = x.shape[2] * x.shape[3]
    if w.chance(0.3):
        return Stream(w.call("reshape", x, w.batch * w.length, width), "ne")
    merge = w.pick(
        ("flatten", 2), ("reshape", w.batch, w.length, width), ("flatten", -2, -1)
    )
    return Stream(w.call(merge[0], x, *merge[1:]))


def project(w: Writer, stream: Stream, heads: Heads) -> tuple[Var, Var, Var]:
    """Q, K and V, by one product or by three."""
    sizes = (heads.num * heads.size, *(heads.num_kv * heads.size,) * 2)
    kind = w.pick(0, 1, 1, 2, 2, 3) if w.is_small else w.rng.randrange(4)
    x, order = stream.x, stream.order
    if kind == 0 and heads.num == heads.num_kv:
        parts = w.items(w.call("chunk", w.linear(x, sum(sizes)), 3, -1))
    elif kind == 1:
        parts = w.items(w.call("split", w.linear(x, sum(sizes)), list(sizes), -1))
    elif kind == 2 and heads.num == heads.num_kv and order == "bse":
        y = w.linear(x, sum(sizes))
        y = w.call("reshape", y, w.batch, w.length, 3, heads.num, heads.size)
        if w.chance(0.5):
            q, k, v = w.items(w.call("unbind", w.call("permute", y, 2, 0, 3, 1, 4), 0))
        else:
            q, k, v = (
                w.call("transpose", t, 1, 2) for t in w.items(w.call("unbind", y, 2))
            )
        return q, k, v
    else:
        parts = [w.linear(x, n) for n in sizes]
    counts = (heads.num, heads.num_kv, heads.num_kv)
    q, k, v = (
        split_heads(w, Stream(part, order), n)
        for part, n in zip(parts, counts, strict=True)
    )
    return q, k, v


def rotate(w: Writer, q: Var, k: Var) -> tuple[Var, Var]:
    """Rotary positions."""
    size = q.shape[-1]
    table = w.once("angles", lambda: _angles(w, 8))
    table = w.item(table, slice(None), slice(None, size // 2))
    both = w.call(torch.cat, (table, table), -1)
    cos, sin = w.call("cos", both), w.call("sin", both)

    def turn(x: Var) -> Var:
        low, high = w.items(w.call("chunk", x, 2, -1))
        half = w.call(torch.cat, (w.call("__neg__", high), low), -1)
        return w.call(
            "__add__", w.call("__mul__", x, cos), w.call("__mul__", half, sin)
        )

    return turn(q), turn(k)


def _angles(w: Writer, count: int) -> Var:
    at = w.call("to", w.positions(), FLOAT)
    rates = w.call(
        "pow",
        w.call("add", w.call("to", w.call(torch.arange, count), FLOAT), 1.5),
        -1.0,
    )
    if w.chance(0.5):
        return w.call(torch.outer, at, rates)
    return w.call("__mul__", w.call("unsqueeze", at, -1), rates)


def repeat_heads(w: Writer, x: Var, times: int) -> Var:
    """KV heads, each as often as query heads share it."""
    if times == 1:
        return x
    if w.chance(0.5):
        return w.call("repeat_interleave", x, times, dim=1)
    batch, num, length, size = x.shape
    wide = w.call(
        "expand",
        w.item(x, slice(None), slice(None), None),
        batch,
        num,
        times,
        length,
        size,
    )
    return w.call("reshape", wide, batch, num * times, length, size)


# ---- spellings -----------------------------------------------------------------------


def attend(w: Writer, stream: Stream) -> Stream:
    """One attention over the tokens, its result of the stream's width or of heads'."""
    heads = _choose_heads(w)
    shared = w.shared_kv
    if shared and w.chance(0.25):
        k, v = w.rng.choice(shared)
        heads = Heads(k.shape[1] * w.pick(1, 2), k.shape[1], k.shape[3])
        q = split_heads(
            w,
            Stream(w.linear(stream.x, heads.num * heads.size), stream.order),
            heads.num,
        )
    else:
        q, k, v = project(w, stream, heads)
        if w.chance(0.05 if w.is_small else 0.25):
            q, k = rotate(w, q, k)
        if w.chance(0.12):
            q, k = (w.call(F.normalize, x, dim=-1) for x in (q, k))
        w.shared_kv.append((k, v))
    times = heads.num // heads.num_kv
    spelling = w.pick(_call_sdpa, _call_sdpa, _spell_out)
    out = spelling(w, q, (k, v), times)
    merged = merge_heads(w, out)
    if merged.x.shape[-1] == w.width and w.chance(0.2):
        return merged
    return Stream(w.linear(merged.x, w.width), merged.order)


def _call_sdpa(w: Writer, q: Var, kv: tuple[Var, Var], times: int) -> Var:
    options: dict[str, object] = {}
    if w.chance(0.2):
        options["scale"] = w.pick(0.5, 1.0, 0.3)
    k, v = kv
    if times > 1 and w.chance(0.5):
        options["enable_gqa"] = True
    else:
        k, v = (repeat_heads(w, x, times) for x in kv)
    if w.chance(0.35):
        options["is_causal"] = True
    else:
        mask = make_mask(w)
        if mask is not None and w.chance(0.25):
            fill = w.pick(-torch.inf, LOWEST)
            zeros = w.call(torch.zeros, *mask.shape, dtype=FLOAT)
            dropped = w.call(torch.logical_not, mask)
            mask = w.call("masked_fill", zeros, dropped, fill)
        options["attn_mask"] = mask
    return w.call(F.scaled_dot_product_attention, q, k, v, **options)


def _spell_out(w: Writer, q: Var, kv: tuple[Var, Var], times: int) -> Var:
    k, v = (repeat_heads(w, x, times) for x in kv)
    size = q.shape[-1]
    where_scaled = w.rng.randrange(5)
    if where_scaled == 0:
        q = w.call("__mul__", q, size**-0.5)
    if w.chance(0.2):
        scores = w.call(torch.einsum, "bhqd,bhkd->bhqk", q, k)
    else:
        turn = w.pick(
            ("transpose", -2, -1), ("transpose", 2, 3), ("permute", 0, 1, 3, 2)
        )
        scores = w.call(torch.matmul, q, w.call(turn[0], k, *turn[1:]))
    if where_scaled in (1, 2):
        scores = w.call("__mul__", scores, size**-0.5)
    elif where_scaled == 3:
        scores = w.call("__truediv__", scores, w.pick(2.0, size**0.5))
    mask = make_mask(w)
    if mask is not None:
        scores = _apply_mask(w, scores, mask)
    weights = _softmax(w, scores)
    if w.chance(0.1):
        weights = w.call(F.dropout, weights, 0.0, True)
    if w.chance(0.2):
        return w.call(torch.einsum, "bhqk,bhkd->bhqd", weights, v)
    return w.call(torch.matmul, weights, v)


def _apply_mask(w: Writer, scores: Var, mask: Var) -> Var:
    kind = w.rng.randrange(5)
    fill = w.pick(-torch.inf, LOWEST, LOWEST, -1e9, -1e4)
    if kind == 0:
        return w.call("masked_fill", scores, w.call("__invert__", mask), fill)
    if kind == 1:
        return w.call("masked_fill", scores, w.call("__eq__", mask, 0), fill)
    if kind == 2 and isinstance(fill, float):
        return w.call(torch.where, mask, scores, fill)
    zeros = w.call(torch.zeros, *mask.shape, dtype=FLOAT)
    bias = w.call("masked_fill", zeros, w.call(torch.logical_not, mask), fill)
    return (
        w.call("__add__", scores, bias)
        if kind == 3
        else w.call("__add__", bias, scores)
    )


def _softmax(w: Writer, scores: Var) -> Var:
    kind = w.rng.randrange(8)
    if kind == 0:
        e = w.call(
            "exp", w.call("__sub__", scores, w.call("amax", scores, -1, keepdim=True))
        )
        return w.call("__truediv__", e, w.call("sum", e, -1, keepdim=True))
    if kind == 1:
        total = w.call(torch.logsumexp, scores, -1, keepdim=True)
        return w.call("exp", w.call("__sub__", scores, total))
    if kind == 2:
        return w.call(F.softmax, scores, dim=-1, dtype=FLOAT)
    if kind == 3:
        return w.call("softmax", scores, 3)
    return w.call(w.pick(F.softmax, torch.softmax), scores, dim=-1)
