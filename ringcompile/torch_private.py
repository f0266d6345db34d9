"""Private APIs of torch that we use, for torch 2.11 and 2.13.

Those of Inductor's passes are in ``inductor_passes``; there are no others.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from itertools import chain
from types import FrameType, MappingProxyType
from typing import Any, NamedTuple

import sympy
import torch
from torch import SymInt, Tensor, nn
from torch._C import DispatchKey
from torch._C._distributed_c10d import (
    AllgatherOptions,
    Work,
    _register_work,
)
from torch._C._distributed_c10d import _SymmetricMemory as SymmetricMemory
from torch._dynamo.source import ConstantSource
from torch._guards import TracingContext
from torch._logging._internal import trace_structured
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed import ProcessGroup, distributed_c10d
from torch.distributed import _symmetric_memory as symmetric_memory
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv, statically_known_true
from torch.fx.passes.graph_transform_observer import GraphTransformObserver
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

__all__ = ["SymmetricMemory", "Work"]  # the rest is defined here

ENCODER_LAYER = torch._transformer_encoder_layer_fwd  # noqa: SLF001
SET_GRAD_ENABLED = torch._C._set_grad_enabled  # noqa: SLF001
"""The call by which a graph turns gradients on and off."""

AUTOGRAD_GRAD = torch._functorch.eager_transforms._autograd_grad  # noqa: SLF001
"""The call by which ``torch.func.grad`` and ``vjp`` go back inside of a forward."""

ENTER_AUTOCAST = torch.amp.autocast_mode._enter_autocast  # noqa: SLF001
"""The call by which a graph enters autocast."""

EXIT_AUTOCAST = torch.amp.autocast_mode._exit_autocast  # noqa: SLF001
"""The call by which it leaves what that returned."""

AUTOCAST_CALLS = frozenset({ENTER_AUTOCAST, EXIT_AUTOCAST})

WHOLE_BLOCK = 1 << 30
"""Tokens in the one block of ``flex_attention`` without a block mask."""

FLEX_BLOCK = 128
"""Queries and keys of a block of its kernels."""

WAIT_TENSOR = torch.ops._c10d_functional.wait_tensor.default  # noqa: SLF001
"""The op that ends communication."""

# ---- tracing -------------------------------------------------------------------------


def is_fake(value: object) -> bool:
    """Whether a tensor has a shape and no numbers."""
    return isinstance(value, FakeTensor)


def fake_inputs(
    gm: GraphModule, example_inputs: Sequence[object]
) -> tuple[FakeTensorMode, list[object]]:
    """Fake versions of a Dynamo graph's inputs in the mode of the compile at hand.

    The placeholders' ``example_value`` belong to a mode that Dynamo has left, and
    mixing modes fails; so each input is made fake anew, with its own symbols.
    """
    context = TracingContext.try_get()
    placeholders = gm.graph.find_nodes(op="placeholder")
    assert len(placeholders) == len(example_inputs), "one example per placeholder"
    if context is None or context.fake_mode is None:
        found = [x.fake_mode for x in example_inputs if isinstance(x, FakeTensor)]
        mode = found[0] if found else _new_fake_mode()
        return mode, [
            mode.from_tensor(x, static_shapes=True) if isinstance(x, Tensor) else x
            for x in example_inputs
        ]
    mode = context.fake_mode
    return mode, [
        _fake_input(mode, context, x, node.meta.get("example_value", x))
        for node, x in zip(placeholders, example_inputs, strict=True)
    ]


def _new_fake_mode() -> FakeTensorMode:
    return FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())


def _fake_input(
    mode: FakeTensorMode, context: TracingContext, value: object, example: object
) -> object:
    if not isinstance(value, Tensor):
        return example
    if isinstance(value, FakeTensor) and value.fake_mode is mode:
        return value
    symbolic = context.tensor_to_context.get(value)
    return mode.from_tensor(
        value,
        static_shapes=symbolic is None,
        symbolic_context=symbolic,
        source=getattr(symbolic, "tensor_source", None),
    )


def find_running_modules() -> tuple[nn.Module, ...]:
    """Modules that are being called while Dynamo compiles, the outermost first.

    The first is the compiled model, or one that a compiled function calls; none if no
    module's call leads here. There are more than one where a graph breaks: then the
    code of the last, or a function that it calls, is compiled by itself.
    """
    found: list[nn.Module] = []
    frame: FrameType | None = sys._getframe()  # noqa: SLF001 - only the stack knows
    while frame is not None and frame.f_code.co_name != "compile_wrapper":
        if frame.f_code.co_name == "_call_impl":
            module = frame.f_locals.get("self")
            found += [module] if isinstance(module, nn.Module) else []
        frame = frame.f_back
    return tuple(reversed(found)) if frame is not None else ()


def is_vmap_call(target: object) -> bool:
    """Whether a call of a Dynamo graph starts, ends or maps over a dim of ``vmap``."""
    return getattr(target, "__module__", "") == "torch._functorch.predispatch"


def flex_is_autocast() -> bool:
    """Whether autocast changes the operands of ``flex_attention``: not before 2.12."""
    from torch._higher_order_ops.flex_attention import (  # noqa: PLC0415
        flex_attention,
    )

    return DispatchKey.AutocastCPU in flex_attention.py_kernels


def is_split_by_ddp() -> bool:
    """Whether the graph at hand is a piece that DDP's optimizer has cut out of one."""
    frame: FrameType | None = sys._getframe()  # noqa: SLF001 - only the stack knows
    while frame is not None:
        if frame.f_code.co_name == "compile_submod":
            return True
        frame = frame.f_back
    return False


def observe_pass(gm: GraphModule, name: str) -> AbstractContextManager[object]:
    """Name a pass to torch's own tools: dumps, provenance, ``disabled_passes``."""
    return GraphTransformObserver(gm, f"ringcompile.{name}", "ringcompile")


def size_hint(size: int | SymInt) -> int:
    """A size as the number it has in the call at hand; adds no guard."""
    return size if isinstance(size, int) else int(size.node.hint)


def sizes_equal(a: int | SymInt, b: int | SymInt) -> bool:
    """Whether two sizes are equal in every call; adds no guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(statically_known_true(a == b))


def settle_size(size: int | SymInt) -> int:
    """A size as ``torch.Size`` has it, which is a number where a guard made it one."""
    if isinstance(size, SymInt) and not size.node.expr.is_number:
        return size  # type: ignore[return-value]  # a symbol passes for a number there
    return int(size)


def size_expression(size: int | SymInt) -> sympy.Expr:
    """A size as a sympy expression of the graph's size symbols."""
    return sympy.Integer(size) if isinstance(size, int) else size.node.expr


# ---- lowering ------------------------------------------------------------------------


def outside_tracing() -> AbstractContextManager[object]:
    """Where tensors are real and no op is recorded, though a trace may be under way."""
    context: AbstractContextManager[object] = _disable_current_modes()
    return context


@contextmanager
def without_saved_tensor_hooks() -> Iterator[None]:
    """Let what is only traced save nothing: a checkpoint around it would count that."""
    set_tracing = torch._C._autograd._saved_tensors_hooks_set_tracing  # noqa: SLF001
    before = set_tracing(True)
    try:
        yield
    finally:
        set_tracing(before)


def find_group(name: str) -> ProcessGroup:
    """The process group that functional collectives know by ``name``."""
    resolve: Callable[[str], ProcessGroup] = distributed_c10d.__dict__[
        "_resolve_process_group"  # typed for a NewType of str in 2.13
    ]
    return resolve(name)


def start_all_gather(
    group: ProcessGroup, gathered: Tensor, x: Tensor, timeout_s: float
) -> Work:
    """Gather every rank's ``x`` into ``gathered``; fails after ``timeout_s``."""
    options = AllgatherOptions()
    options.timeout = timedelta(seconds=timeout_s)
    return group._allgather_base(gathered.view(-1), x.view(-1), options)  # noqa: SLF001


def can_share_memory(device: torch.device) -> bool:
    """Whether torch maps the memory of other GPUs by CUDA's own means."""
    return symmetric_memory.get_backend(device) in {None, "CUDA"}


def allocate_symmetric(num_bytes: int, device: torch.device) -> Tensor:
    """Memory that other GPUs can read once ``rendezvous`` has told them."""
    return symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device)


def current_stream_handle(device: int) -> int:
    """The driver's handle of the current stream: torch's object takes 8 us to make."""
    handle: int = torch._C._cuda_getCurrentRawStream(device)  # noqa: SLF001
    return handle


def rendezvous(memory: Tensor, group: ProcessGroup) -> SymmetricMemory:
    """Exchange memory between the ranks of a group; all of them must come."""
    return symmetric_memory.rendezvous(memory, group.group_name)


def register_work(result: Tensor, work: Work) -> None:
    """Let ``wait_tensor(result)`` end ``work``."""
    _register_work(result, work)


def compile_with_inductor(
    gm: GraphModule,
    example_inputs: Sequence[object],
    patches: dict[str, object],
    **options: object,
) -> Callable[..., object]:
    """Compile a graph with Inductor, which takes ``gm`` over.

    Args:
        gm: the graph.
        example_inputs: its inputs.
        patches: Inductor's config patches.
        options: further arguments of ``compile_fx``.
    """
    from torch._inductor.compile_fx import compile_fx  # noqa: PLC0415

    compile_graph: Any = compile_fx  # takes more than its types say
    compiled: Callable[..., object] = compile_graph(
        gm, example_inputs, config_patches=patches or None, **options
    )
    return compiled


def keep_input_notes(new: GraphModule, old: GraphModule) -> None:
    """Note on a graph's inputs what Dynamo did on those of the one it is made of.

    That is where they come from, and which stay in their memory (parameters and the
    graph's own constants do): a CUDA graph copies all others at each call.
    """
    sources = getattr(old, "_param_name_to_source", None)
    if sources is None or "dynamo_compile_id" not in old.meta:
        return
    inputs = (gm.graph.find_nodes(op="placeholder") for gm in (new, old))
    for node, noted in zip(*inputs, strict=True):
        node._dynamo_source = noted._dynamo_source  # noqa: SLF001
        if "tensor_dict" in noted.meta:
            node.meta["tensor_dict"] = noted.meta["tensor_dict"]
    for key in ("dynamo_compile_id", "cudagraph_annotation"):
        if key in old.meta:
            new.meta[key] = old.meta[key]
    held: Any = new  # it knows no such attribute
    held._param_name_to_source = {  # noqa: SLF001
        name: sources.get(name, ConstantSource(name))
        for name, _ in chain(new.named_parameters(), new.named_buffers())
    }


def mode_patches(mode: str | None) -> dict[str, object]:
    """Inductor's config patches for one of its modes."""
    if mode in (None, "default"):
        return {}
    from torch._inductor import list_mode_options  # noqa: PLC0415

    return dict(list_mode_options(mode))


def emit_structured_trace(name: str, text: str) -> None:
    """Put text into torch's structured trace, where tlparse shows it."""
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "string"},
        payload_fn=lambda: text,
    )


# ---- flex_attention ------------------------------------------------------------------

_FLEX_DTYPES = (torch.bfloat16, torch.float16)
_FLEX_HEAD_SIZES = (16, 32, 64, 128, 256)
_FLEX_OPTIONS = MappingProxyType(
    {
        "OUTPUT_LOGSUMEXP": True,
        "OUTPUT_MAX": False,
        "PRESCALE_QK": False,
        "ROWS_GUARANTEED_SAFE": False,
        "BLOCKS_ARE_CONTIGUOUS": False,
        "WRITE_DQ": True,
    }
)
MaskMod = Callable[..., Tensor]


class BlockLists(NamedTuple):
    """Of each row of blocks of 128 pairs which columns, and of each column which rows.

    All int32; numbers are ``(B or 1, H or 1, rows)``, which ones ``(..., rows, n)``
    with those that count first, n the longest list or more, the same for ``partial``
    and ``full``; of queries, with rows and columns exchanged.

    Attributes:
        num_partial: how many are under the mask.
        partial: which.
        num_full: how many need no mask.
        full: which.
        num_partial_q: how many blocks of queries are, of each block of keys.
        partial_q: which.
        num_full_q: how many of those need no mask.
        full_q: which.
    """

    num_partial: Tensor
    partial: Tensor
    num_full: Tensor
    full: Tensor
    num_partial_q: Tensor
    partial_q: Tensor
    num_full_q: Tensor
    full_q: Tensor


def has_flex_kernel(q: Tensor, v: Tensor) -> bool:
    """Whether a fast kernel is generated for queries and values like those.

    That is while a graph is being compiled, rather than run. Symbolic sizes are not
    compared, which would add guards.
    """
    if not q.is_cuda or TracingContext.try_get() is None:
        return False
    sizes = (q.shape[-1], v.shape[-1])
    fits = all(type(n) is int and n in _FLEX_HEAD_SIZES for n in sizes)
    return fits and q.dtype in _FLEX_DTYPES


def flex_forward(  # noqa: PLR0913 - one attention's tensors
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    mask_mod: MaskMod,
    buffers: tuple[Tensor, ...],
    *,
    scale: float,
    fills_blocks: bool,
) -> tuple[Tensor, Tensor]:
    """Out and the lse, to the base 2, of ``flex_attention`` without its autograd.

    Args:
        q: ``(B, H, n, D)``.
        k: ``(B, G, m, D)``.
        v: ``(B, G, m, E)``.
        lists: which blocks.
        mask_mod: whether a pair counts, of b, h, q, k and ``buffers``.
        buffers: what it reads.
        scale: factor of the scores.
        fills_blocks: that n and m are multiples of ``FLEX_BLOCK``: a kernel that checks
            bounds takes twice as long.
    """
    from torch._higher_order_ops.flex_attention import (  # noqa: PLC0415
        flex_attention,
    )

    options = {**_FLEX_OPTIONS, "IS_DIVISIBLE": fills_blocks}
    mask = _as_tuple(q, k, lists, mask_mod)
    with torch._C._AutoDispatchBelowAutograd():  # noqa: SLF001
        out, lse, *_ = flex_attention(
            *(q, k, v, _same_score, mask, scale, options, (), buffers)
        )
    return out, lse


def flex_backward(  # noqa: PLR0913, PLR0917 - one attention's tensors
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    lists: BlockLists,
    mask_mod: MaskMod,
    buffers: tuple[Tensor, ...],
    *,
    scale: float,
    fills_blocks: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, of ``out`` and ``lse`` (to the base 2) over all keys there are."""
    from torch._higher_order_ops.flex_attention import (  # noqa: PLC0415
        flex_attention_backward,
    )

    mask = _as_tuple(q, k, lists, mask_mod)
    backward: Any = flex_attention_backward
    options = {**_FLEX_OPTIONS, "IS_DIVISIBLE": fills_blocks}
    dq, dk, dv, *_ = backward(
        *(q, k, v, out, lse, grad_out, None, _same_score, _same_gradient, mask),
        *(scale, options, (), buffers),
    )
    return dq, dk, dv


def _same_score(score: Tensor, *_: object) -> Tensor:
    return score


def _same_gradient(
    _score: Tensor, _b: Tensor, _h: Tensor, _q: Tensor, _k: Tensor, grad: Tensor
) -> list[Tensor | None]:
    """Gradients of ``_same_score`` by what it is called with."""
    return [grad, None, None, None, None]


def _as_tuple(
    q: Tensor, k: Tensor, lists: BlockLists, mask_mod: MaskMod
) -> tuple[object, ...]:
    from torch.nn.attention.flex_attention import BlockMask  # noqa: PLC0415

    sizes = (q.shape[2], k.shape[2])
    mask = BlockMask(
        sizes, *lists, BLOCK_SIZE=(FLEX_BLOCK, FLEX_BLOCK), mask_mod=mask_mod
    )
    return (*mask.as_tuple()[:-1], mask_mod)  # its own would take no buffers


# ---- reports -------------------------------------------------------------------------


class CallObserver(TorchDispatchMode):
    """Shows every call of an op that is run inside, with its result, to ``note``."""

    def __init__(self, note: Callable[[OpOverload, Any, Any], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._note = note

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Any,  # noqa: ANN401 - any tensors
        args: Any = (),  # noqa: ANN401
        kwargs: Any = None,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        result = func(*args, **(kwargs or {}))
        self._note(func, args, result)
        return result


def storage_key(x: Tensor) -> int:
    """The same for tensors that share memory, fake ones too, while they live."""
    return int(x.untyped_storage()._cdata)  # noqa: SLF001


def register_backend(name: str, compile_graph: Callable[..., object]) -> None:
    """Make ``torch.compile(..., backend=name)`` work, unless it does already."""
    from torch._dynamo import list_backends  # noqa: PLC0415
    from torch._dynamo import register_backend as register  # noqa: PLC0415

    if name not in list_backends(exclude_tags=()):
        register(compile_graph, name=name)  # type: ignore[arg-type]
