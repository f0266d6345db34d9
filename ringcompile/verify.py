"""What ranks must agree on before they run: the same plans, the same inputs.

Invariant: the check is one collective at the first call of a graph, and nothing after.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.fx import GraphModule

from ringcompile.errors import RankMismatchError
from ringcompile.mesh import Ranks
from ringcompile.passes.pipeline import Rewritten
from ringcompile.torch_private import find_group


def agree_at_first_call(
    compiled: Callable[..., object],
    made: Rewritten,
    gm: GraphModule,
    ranks: Ranks,
    *,
    timeout_s: float,
) -> Callable[..., object]:
    """Wrap ``compiled`` so that its first call compares ranks.

    Args:
        compiled: the rank's program.
        made: what the passes made; its plan hash is compared.
        gm: the user's graph, whose placeholders name the inputs.
        ranks: this rank's place.
        timeout_s: a rank that does not come within this time is named.

    Returns:
        A callable that raises ``RankMismatchError`` at the first call if ranks differ.
    """
    if ranks.is_alone:
        return compiled
    names = [node.name for node in gm.graph.find_nodes(op="placeholder")]
    checked = False

    def run(*args: object) -> object:
        nonlocal checked
        if not checked:
            _compare(ranks, made.plan_hash, names, args, timeout_s=timeout_s)
            checked = True
        return compiled(*args)

    return run


def _compare(
    ranks: Ranks,
    plan_hash: str,
    names: Sequence[str],
    args: Sequence[object],
    *,
    timeout_s: float,
) -> None:
    mine = (plan_hash, tuple(_fingerprint(a) for a in args))
    everyone = _exchange(ranks, mine, timeout_s)
    for rank, (other_hash, other_inputs) in enumerate(everyone):
        if other_hash != plan_hash:
            raise RankMismatchError(
                f"rank {rank} planned other schedules than rank {ranks.rank}",
                at="the first call",
                because="options, shapes or package versions differ between ranks",
                instead="give every rank the same model, options and input shapes",
            )
        for name, here, there in zip(names, mine[1], other_inputs, strict=False):
            if here != there:
                raise RankMismatchError(
                    f"input {name} differs between rank {ranks.rank} and rank {rank}",
                    at="the first call",
                    because='inputs="replicated" needs the same tensors on every rank',
                    instead="seed all ranks alike, and give each the whole batch",
                )


def _exchange(
    ranks: Ranks, mine: tuple[str, tuple[object, ...]], timeout_s: float
) -> list[tuple[str, tuple[object, ...]]]:
    group = find_group(ranks.group_name)
    everyone: list[tuple[str, tuple[object, ...]] | None] = [None] * ranks.size
    dist.all_gather_object(everyone, mine, group=group)
    return [entry for entry in everyone if entry is not None]


def _fingerprint(value: object) -> object:
    """Equal for equal values; cheap, and not meant to withstand an adversary."""
    if not isinstance(value, Tensor):
        return repr(value)
    with torch.no_grad():
        flat = value.detach().contiguous().view(-1)
        bits = flat.view(torch.uint8).to(torch.int64)
        weight = torch.arange(1, bits.numel() + 1, device=bits.device) % _PRIME
        return (tuple(value.shape), str(value.dtype), int((bits * weight).sum()))


_PRIME = 8191
