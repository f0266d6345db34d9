"""``MultiheadRingAttention`` and torch's own module on one case, one step of each.

References are float64: torch's own module where attention is exact, and projections
around dense attention, written out, under a pattern.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ringcompile import MultiheadRingAttention, RingAttentionConfig, backend
from ringcompile.patterns import LocalWindow
from support.pattern_cases import longnet
from support.tolerances import assert_gradients_equal, assert_output_equal

B, H, E = 2, 4, 16


@contextmanager
def rewritten_only() -> Iterator[list[Mapping[str, object]]]:
    """Run what the passes made eagerly; a list of the patches Inductor would get."""
    patches: list[Mapping[str, object]] = []

    def keep(
        gm: torch.fx.GraphModule, _inputs: object, given: Mapping[str, object]
    ) -> Callable[..., object]:
        patches.append(given)
        return gm.forward

    torch.compiler.reset()
    with mock.patch.object(backend, "compile_with_inductor", keep):
        yield patches
    torch.compiler.reset()


def compiled_by(compiler: str) -> AbstractContextManager[object]:
    return nullcontext() if compiler == "inductor" else rewritten_only()


# ---- cases, and what they mean -------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Case:
    """One way to make a module and to call it.

    Attributes:
        name: of the case.
        length: tokens S.
        attn_mask: ``bool``, ``by head``, ``float`` (0 and -inf) or ``bias``, or none.
        padding: ``bool`` or ``float``, or none.
        is_causal: the argument.
        batch_first: of the module.
        is_batched: whether tensors have a batch.
        bias: of the module.
        kdim: of the module; if given, q, k and v are three tensors.
        vdim: of the module.
        attention: a key of ``PATTERNS``.
    """

    name: str
    length: int = 13
    attn_mask: str = ""
    padding: str = ""
    is_causal: bool = False
    batch_first: bool = True
    is_batched: bool = True
    bias: bool = True
    kdim: int | None = None
    vdim: int | None = None
    attention: str = "exact"

    def __str__(self) -> str:
        return f"{self.attention}: {self.name}"

    @property
    def batch(self) -> int:
        return B if self.is_batched else 1

    def make_inputs(self) -> dict[str, Tensor]:
        """Query, key and value, or one tensor for all, and the output's gradient."""
        random = torch.Generator().manual_seed(1)
        tokens = (self.batch, self.length) if self.is_batched else (self.length,)
        if not self.batch_first and self.is_batched:
            tokens = tokens[::-1]
        widths = {"query": E, "grad": E}
        if self.kdim:
            widths |= {"key": self.kdim, "value": self.vdim or E}
        return {
            name: torch.randn(*tokens, width, generator=random, dtype=torch.float64)
            for name, width in widths.items()
        }

    def hidden_pairs(self) -> Tensor | None:
        """What ``attn_mask`` hides; each query sees itself and the first key."""
        if self.attn_mask not in {"bool", "by head", "float"}:
            return None
        q, k = torch.arange(self.length)[:, None], torch.arange(self.length)[None]
        h = torch.arange(self.batch * H if self.attn_mask == "by head" else 1)
        hidden = (7 * q + 3 * k + h[:, None, None]) % 5 < 2
        hidden &= (q != k) & (k > 0)
        return hidden if self.attn_mask == "by head" else hidden[0]

    def hidden_keys(self) -> Tensor | None:
        if not self.padding:
            return None
        hidden = torch.zeros(self.batch, self.length, dtype=torch.bool)
        hidden[0, -4:] = True
        hidden[-1, 2:4] = True
        return hidden if self.is_batched else hidden[0]

    def masks(self, dtype: torch.dtype) -> dict[str, Any]:
        """The arguments as a user writes them."""
        masks: dict[str, Any] = {}
        if (pairs := self.hidden_pairs()) is not None:
            masks["attn_mask"] = as_added(pairs, dtype)
            if self.attn_mask != "float":
                masks["attn_mask"] = pairs
        if self.attn_mask == "bias":
            masks["attn_mask"] = self.make_bias().to(dtype)
        if (keys := self.hidden_keys()) is not None:
            is_float = self.padding == "float"
            masks["key_padding_mask"] = as_added(keys, dtype) if is_float else keys
        return masks | ({"is_causal": True} if self.is_causal else {})

    def make_bias(self) -> Tensor:
        random = torch.Generator().manual_seed(2)
        shape = (self.length, self.length)
        return torch.randn(shape, generator=random, dtype=torch.float64)


def as_added(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, -torch.inf)


def later_keys(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)


# Both written from SEMANTICS.md: a window of 8 tokens in blocks of 4 reaches one block
# to each side (section 3), and the preset is that window within LongNet (section 6).
CONFIG = RingAttentionConfig(
    block_size=4, window_size=8, segment_lengths=(8, 16), dilation_rates=(1, 2)
)


def count_window(S: int) -> Tensor:
    i, j = torch.arange(S)[:, None] // 4, torch.arange(S)[None] // 4
    return ((i - j).abs() <= 1).expand(H, S, S).int()


def count_preset(S: int) -> Tensor:
    return count_window(S) * longnet((8, 16), (1, 2), "paper").counts(H, H, S)


PATTERNS: dict[str, tuple[dict[str, Any], Callable[[int], Tensor]]] = {
    "window": ({"attention": LocalWindow(8, 4)}, count_window),
    "preset": ({"config": CONFIG}, count_preset),
}


def attend_exact(module: nn.MultiheadAttention, case: Case, *qkv: Tensor) -> Tensor:
    """By torch's own module: every mask added up."""
    masks = case.masks(torch.float64)
    added = masks.get("attn_mask")
    if added is not None and added.dtype is torch.bool:
        added = as_added(added, torch.float64)
    if case.is_causal:
        later = as_added(later_keys(case.length), torch.float64)
        added = later if added is None else added + later
    keys = case.hidden_keys()
    padding = None if keys is None else as_added(keys, torch.float64)
    out, _ = module(*qkv, attn_mask=added, key_padding_mask=padding, need_weights=False)
    assert isinstance(out, Tensor)
    return out


def attend_pattern(module: nn.MultiheadAttention, case: Case, *qkv: Tensor) -> Tensor:
    """``softmax(A + log C) V`` between projections, 0 where C is 0; batch first."""
    S = case.length
    counts = PATTERNS[case.attention][1](S).expand(B, H, S, S).clone()
    if (pairs := case.hidden_pairs()) is not None:
        counts *= ~(pairs.view(B, H, S, S) if pairs.dim() == 3 else pairs)
    if (keys := case.hidden_keys()) is not None:
        counts *= ~keys[:, None, None]
    if case.is_causal:
        counts *= ~later_keys(S)
    weights, biases = module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3)
    q, k, v = (
        F.linear(x, w, b).unflatten(-1, (H, E // H)).transpose(1, 2)
        for x, w, b in zip(qkv, weights, biases, strict=True)
    )
    pairs_weights = counts * (q @ k.mT * (E // H) ** -0.5).exp()
    out = pairs_weights / pairs_weights.sum(-1, keepdim=True).clamp(min=1e-300) @ v
    return F.linear(
        out.transpose(1, 2).flatten(2), module.out_proj.weight, module.out_proj.bias
    )


# ---- one step of both ----------------------------------------------------------------

Outcome = tuple[Tensor, dict[str, Tensor | None]]


def make_pair(
    case: Case, group: ProcessGroup | None = None
) -> tuple[MultiheadRingAttention, nn.MultiheadAttention]:
    """Ours in float32 and torch's in float64, of the same weights."""
    widths: dict[str, Any] = {"bias": case.bias, "kdim": case.kdim, "vdim": case.vdim}
    options = PATTERNS.get(case.attention, ({"attention": "exact"},))[0]
    first = case.batch_first
    ours = MultiheadRingAttention(
        E, H, batch_first=first, **widths, **options, mesh=group
    )
    theirs = nn.MultiheadAttention(E, H, batch_first=first, **widths)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for x in ours.parameters():  # biases begin as 0, which would hide them
            x.copy_(torch.randn(x.shape, generator=random) * 0.4)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs.double()


def run_step(
    module: nn.Module, case: Case, call: Callable[..., Tensor], dtype: torch.dtype
) -> Outcome:
    """Output, and gradients of parameters and inputs."""
    module.zero_grad()
    inputs = {name: x.to(dtype) for name, x in case.make_inputs().items()}
    grad = inputs.pop("grad")
    leaves = [x.requires_grad_() for x in inputs.values()]
    out = call(*(leaves if len(leaves) == 3 else leaves * 3))
    out.backward(grad)
    named = dict(module.named_parameters()) | inputs
    return out.detach(), {name: x.grad for name, x in named.items()}


def run_reference(module: nn.MultiheadAttention, case: Case) -> Outcome:
    attend = attend_exact if case.attention == "exact" else attend_pattern
    return run_step(module, case, lambda *x: attend(module, case, *x), torch.float64)


def run_ours(module: MultiheadRingAttention, case: Case) -> Outcome:
    def call(*qkv: Tensor) -> Tensor:
        out, weights = module(*qkv, **case.masks(torch.float32))
        assert isinstance(out, Tensor)
        assert weights is None
        return out

    return run_step(module, case, call, torch.float32)


def find_faults(got: Outcome, want: Outcome) -> list[str]:
    checks: tuple[Callable[[], None], ...] = (
        lambda: assert_output_equal(got[0], want[0]),
        lambda: assert_gradients_equal(got[1], want[1]),
    )
    faults = []
    for check in checks:
        try:
            check()
        except AssertionError as error:
            faults.append(str(error))
    return faults


EXACT = [
    Case("plain"),
    Case("sequence first", length=10, batch_first=False),
    Case("unbatched", is_batched=False),
    Case(
        "unbatched under masks", attn_mask="by head", padding="bool", is_batched=False
    ),
    Case("other widths", length=11, kdim=12, vdim=20),
    Case("no bias", length=19, bias=False),
    Case("no bias and other widths", bias=False, kdim=5, vdim=8, batch_first=False),
    Case("padding", padding="bool"),
    Case("float padding", padding="float", batch_first=False),
    Case("mask", attn_mask="bool"),
    Case("mask by head", length=11, attn_mask="by head"),
    Case("float mask", attn_mask="float"),
    Case("causal", length=14, is_causal=True),
    Case("mask and padding", attn_mask="bool", padding="bool"),
    Case("float masks", length=17, attn_mask="float", padding="float"),
    Case("causal and padding", padding="bool", is_causal=True),
    Case("causal and mask", attn_mask="by head", is_causal=True),
    Case("causal, mask, padding", attn_mask="bool", padding="float", is_causal=True),
    Case("bias", attn_mask="bias"),
    Case("bias and causal", length=10, attn_mask="bias", is_causal=True),
]
BY_NAME = {case.name: case for case in EXACT}
