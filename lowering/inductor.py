"""What Inductor must know: our ops' lowerings, what to save, what not to reorder.

Invariant: communication starts and ends where the ring loop put it.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path

from torch import Tensor
from torch.fx import Graph

from ringcompile import ops
from ringcompile.errors import OptionError
from ringcompile.inductor_passes import (
    first_pass,
    mark_saved_pass,
    order_pass,
    pass_uuid,
    passes_of,
    register_collective_lowering,
    register_identity_lowering,
    register_join_lowering,
    register_store_lowering,
)
from ringcompile.lowering.expand import COMMUNICATING, communicates, expand_rings

_FOLDERS = ("lowering", "ir", "plan")
_FILES = ("ops.py", "torch_private.py", "inductor_passes.py")


def inductor_patches(
    user: Mapping[str, object], graph: Graph | None = None
) -> dict[str, object]:
    """Config patches under which Inductor compiles rewritten graphs.

    Args:
        user: the user's own patches; they win, and their passes run before ours.
        graph: what is compiled, if checkpoints in it may be tags of its nodes.

    Returns:
        All patches for ``compile_fx``.
    """
    _register_lowerings()
    patches: dict[str, object] = {
        # These move a wait up to its start, and nothing overlaps (FACTS.md 2.3b).
        "reorder_for_peak_memory": False,
        "reorder_for_locality": False,
    }
    passes: dict[str, Callable[..., object]] = {
        "joint_custom_pre_pass": partial(mark_saved_pass, ops.KEEP),
        "post_grad_custom_pre_pass": partial(first_pass, expand_rings),
        "_pre_fusion_custom_pass": partial(order_pass, communicates),
    }
    tags = "" if graph is None else _describe_checkpoints(graph)
    ours = dict[str, object]()
    for name, make in passes.items():
        others = passes_of(user, name)
        uuids = [pass_uuid(other) for other in others]
        uuid = repr((sources_hash(), tags, *uuids)) if all(uuids) else ""
        ours[name] = make(uuid, others)
    return patches | dict(user) | ours


def _describe_checkpoints(graph: Graph) -> str:
    """A hash of which nodes are recomputed, and together with which; "" if none are.

    Compile caches read ops and not tags: without it they give a checkpointed model what
    the same ops without checkpoints were compiled to.
    """
    numbers = dict[object, int]()
    tags = [
        (n, str(policy), numbers.setdefault(node.meta.get("ac_graph_id"), len(numbers)))
        for n, node in enumerate(graph.nodes)
        if (policy := node.meta.get("recompute")) is not None
    ]
    return hashlib.sha256(repr(tags).encode()).hexdigest()[:16] if tags else ""


def require_kernel(kernel: str, example_inputs: Sequence[object]) -> None:
    """Refuse a kernel that Inductor does not generate for these inputs' device.

    Raises:
        OptionError: ``flex`` on CPU, where it has neither gradients nor an LSE.
    """
    tensors = [x for x in example_inputs if isinstance(x, Tensor)]
    if kernel == "flex" and not any(x.is_cuda for x in tensors):
        raise OptionError(
            "kernel='flex' on CPU",
            at="options",
            because="Inductor generates flex_attention for GPUs, with a backward",
            instead="kernel='auto', or 'math'",
        )


@lru_cache(maxsize=1)
def sources_hash() -> str:
    """A hash of the sources that give a plan its meaning.

    Compile caches see no Python body, so it is part of what they do see.
    """
    digest = hashlib.sha256()
    for file in source_files():
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def source_files() -> list[Path]:
    """The sources that give a plan its meaning."""
    root = Path(ops.__file__).parent
    files = [root / name for name in _FILES]
    for folder in _FOLDERS:
        files += sorted((root / folder).rglob("*.py"))
    return files


@lru_cache(maxsize=1)
def _register_lowerings() -> None:
    for op in COMMUNICATING:
        register_collective_lowering(op)
    register_identity_lowering(ops.KEEP)
    register_join_lowering(ops.JOIN)
    register_store_lowering(ops.STORE)
