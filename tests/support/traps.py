"""Calls that a careless compiler gets wrong, or hangs in; each is right or a clear error.

A trap gets a ``Setting`` and gives what it saw by name: outputs and gradients. It runs
in eager float64, and compiled in float32.
"""

import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from ringcompile import RingCompileError, backend
from support.tolerances import OUTPUT_RTOL

B, S, H, D = 2, 12, 2, 4
E = H * D
SCALE = D**-0.5

Seen = dict[str, Tensor | None]
Trap = Callable[["Setting"], Seen]


@dataclass(frozen=True, slots=True)
class Setting:
    """How a trap is run.

    Attributes:
        dtype: of its floats.
        rank: this rank, 0 in eager.
        compile: compiles, or gives back what it is given; takes options of the backend.
    """

    dtype: torch.dtype
    rank: int
    compile: Callable[..., Callable[..., Any]]

    def tokens(self, *shape: int, seed: int = 1) -> Tensor:
        """Random numbers, the same in every dtype."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(shape or (B, S, E), generator=generator, dtype=torch.float64)
        return x.to(self.dtype)

    def step(self, fn: Callable[..., Any], *inputs: Tensor) -> Seen:
        """Compile, call, and go back from the first output."""
        return run_step(self.compile(fn), *inputs)


def run_step(call: Callable[..., Any], *inputs: Tensor) -> Seen:
    """Outputs, and gradients of the inputs that are floats."""
    leaves = [x for x in inputs if x.is_floating_point() or x.is_complex()]
    leaves = [x if x.requires_grad else x.requires_grad_() for x in leaves]
    out = call(*inputs)
    outs = out if isinstance(out, tuple) else (out,)
    seen: Seen = {f"out {i}": o for i, o in enumerate(outs) if isinstance(o, Tensor)}
    loss: Any = sum(
        (o.abs() if o.is_complex() else o.sin()).sum()
        for o in outs
        if isinstance(o, Tensor) and o.requires_grad
    )
    if not isinstance(loss, Tensor):
        return seen
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return seen | {f"gradient {i}": g for i, g in enumerate(grads)}


def split(x: Tensor) -> Tensor:
    """(B, S, H * D) to (B, H, S, D)."""
    return x.unflatten(-1, (-1, D)).transpose(1, 2)  # type: ignore[no-any-return]


def merge(x: Tensor) -> Tensor:
    """(B, H, S, D) to (B, S, H * D)."""
    return x.transpose(1, 2).flatten(2)


def attend(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Causal attention, or with this mask, whose q, k and v differ."""
    q = split(x)
    causal = mask is None
    out = F.scaled_dot_product_attention(
        q, q.sin(), q.cos(), attn_mask=mask, is_causal=causal
    )
    return merge(out)


# ---- the run -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Run:
    """How a trap is compiled and compared.

    Attributes:
        rtol: of outputs and gradients.
        dtype: of the compiled run; the reference runs in it too, unless it is None,
            which stands for float32 against float64.
        unsupported: option of the backend.
        timeout_s: another.
    """

    rtol: float = OUTPUT_RTOL
    dtype: torch.dtype | None = None
    unsupported: str = "gather"
    timeout_s: float = 60.0


def run_trap(group: ProcessGroup, rank: int, trap: Trap, run: Run) -> str:
    """``right``, or ``told:`` and the error; else what is wrong."""
    shared: dict[str, Any] = {
        "mesh": group,
        "unsupported": run.unsupported,
        "timeout_s": run.timeout_s,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.compiler.reset()
        want = _attempt(trap, Setting(run.dtype or torch.float64, 0, _leave))
        torch.compiler.reset()
        setting = Setting(
            run.dtype or torch.float32,
            rank,
            lambda f, **more: _compile(f, shared | more),
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backend, "compile_with_inductor", _without_inductor)
            got = _attempt(trap, setting)
    return _judge(got, want, run.rtol)


def _leave(fn: Callable[..., Any], **_options: object) -> Callable[..., Any]:
    return fn


def _compile(fn: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    return torch.compile(fn, backend=backend.ring, options=dict(options))


def _without_inductor(
    gm: Any,  # noqa: ANN401
    inputs: Any,  # noqa: ANN401
    _patches: object,
) -> Callable[..., object]:
    aot_eager: Any = torch._dynamo.lookup_backend("aot_eager")
    return aot_eager(gm, inputs)  # type: ignore[no-any-return]


def _attempt(trap: Trap, setting: Setting) -> Seen | Exception:
    torch.manual_seed(7)
    try:
        return trap(setting)
    except Exception as error:
        return error


def _judge(got: Seen | Exception, want: Seen | Exception, rtol: float) -> str:
    if isinstance(got, Exception):
        text = "".join(traceback.format_exception_only(got)).strip()
        if _is_clear(got) or isinstance(want, Exception):
            return f"told: {text}"
        return (
            f"unclear: {text}\n{''.join(traceback.format_tb(got.__traceback__)[-3:])}"
        )
    if isinstance(want, Exception):
        return f"wrong: eager raises {want!r}"
    if set(got) != set(want):
        return f"wrong: gave {sorted(got)}, not {sorted(want)}"
    differences = [
        f"{n}: {text}" for n in want if (text := _differ(got[n], want[n], rtol))
    ]
    return f"wrong: {differences}" if differences else "right"


def _is_clear(error: BaseException) -> bool:
    """Ours, with a place and a way out; or torch's own word on a limit of its own."""
    inner = getattr(error, "inner_exception", error)
    if isinstance(inner, RingCompileError):
        return bool(inner.at and inner.because and inner.instead)
    return any(text in str(error) for text in _LIMITS_OF_TORCH)


_LIMITS_OF_TORCH = ("does not currently support double backward",)


def _differ(got: Tensor | None, want: Tensor | None, rtol: float) -> str:
    if got is None or want is None:
        return "" if got is want else f"{got} is not {want}"
    if got.shape != want.shape or got.is_floating_point() != want.is_floating_point():
        return f"{got.dtype} {tuple(got.shape)} is not {want.dtype} {tuple(want.shape)}"
    wide = torch.complex128 if want.is_complex() else torch.float64
    a, b = (t.detach().to(wide) for t in (got, want))
    if not torch.equal(a.isnan(), b.isnan()):
        return f"NaN at {a.isnan().sum()} places, not {b.isnan().sum()}"
    a, b = (t.nan_to_num(0.0, 9e9, -9e9) for t in (a, b))
    largest = b.abs().max().item() if b.numel() else 0.0
    error = (a - b).abs().max().item() if b.numel() else 0.0
    return "" if error <= rtol * max(largest, 1e-2) else f"error {error:.3g}"


def run_differing(group: ProcessGroup, rank: int, trap: Trap) -> None:
    """A trap of ranks that differ: always raises, since groups may be torn after it."""
    raise AssertionError(run_trap(group, rank, trap, Run(timeout_s=8.0)))
