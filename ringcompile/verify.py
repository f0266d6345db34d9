"""What ranks must agree on before they run: the same plans, inputs and random state.

Invariant: the check is two gathers of a few integers at the first call of a graph, and
nothing after.
"""

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule

from ringcompile.errors import RankMismatchError
from ringcompile.mesh import Ranks
from ringcompile.ops import ALL_GATHER
from ringcompile.passes.pipeline import Rewritten
from ringcompile.torch_private import WAIT_TENSOR

_RANDOM_STATE = "the random state"


def agree_at_first_call(
    compiled: Callable[..., object],
    made: Rewritten,
    gm: GraphModule,
    ranks: Ranks,
    *,
    timeout_s: float,
    then: Callable[[], None],
) -> Callable[..., object]:
    """Wrap ``compiled`` so that its first call compares ranks.

    Args:
        compiled: the rank's program.
        made: what the passes made; its plan hash is compared.
        gm: the user's graph, whose placeholders name the inputs.
        ranks: this rank's place.
        timeout_s: a rank that does not come within this time is named.
        then: what ranks that agree do together, before the first call.

    Returns:
        A callable that raises ``RankMismatchError`` at the first call if ranks differ.
    """
    if ranks.is_alone:
        return compiled
    names = [node.name for node in gm.graph.find_nodes(op="placeholder")]
    pending = True

    def run(*args: object) -> object:
        nonlocal pending
        if pending:
            _compare(ranks, made, (names, args), timeout_s)
            then()
            pending = False
        return compiled(*args)

    return run


def _compare(
    ranks: Ranks,
    made: Rewritten,
    inputs: tuple[Sequence[str], Sequence[object]],
    timeout_s: float,
) -> None:
    names, args = inputs
    mine = [_number(made.plan_hash), _number(repr(names))]
    for rank, theirs in enumerate(_exchange(ranks, mine, timeout_s)):
        if theirs != mine:
            raise RankMismatchError(
                f"rank {rank} has another graph, or planned other schedules, than"
                f" rank {ranks.rank}",
                at="the first call",
                because="models, options, shapes or versions differ between ranks",
                instead="give every rank the same model, options and input shapes",
            )
    marks = {
        name: _mark_shard(a) if name in made.shards else _fingerprint(a)
        for name, a in zip(names, args, strict=True)
    }
    if made.draws:
        marks[_RANDOM_STATE] = _fingerprint(_random_state(ranks))
    mine = list(marks.values())
    for rank, theirs in enumerate(_exchange(ranks, mine, timeout_s)):
        for name, here, there in zip(marks, mine, theirs, strict=True):
            if here != there:
                pair = (ranks.rank, rank)
                raise _mismatch(name, *pair, is_shard=name in made.shards)


def _mismatch(name: str, here: int, there: int, *, is_shard: bool) -> RankMismatchError:
    if name == _RANDOM_STATE:
        return RankMismatchError(
            f"{name} differs between rank {here} and rank {there}",
            at="the first call",
            because="ops on every rank draw random numbers, which must agree",
            instead="call torch.manual_seed with the same seed on every rank",
        )
    if is_shard:
        return RankMismatchError(
            f"shape or dtype of {name} differs between rank {here} and rank {there}",
            at="the first call",
            because='inputs="sharded" needs as many rows on every rank',
            instead="cut all inputs with ringcompile.shard",
        )
    return RankMismatchError(
        f"input {name} differs between rank {here} and rank {there}",
        at="the first call",
        because='inputs="replicated" needs the same tensors on every rank',
        instead="seed all ranks alike, and give each the whole batch",
    )


def _exchange(ranks: Ranks, mine: list[int], timeout_s: float) -> list[list[int]]:
    """Every rank's numbers; as many on each."""
    numbers = torch.tensor(mine, dtype=torch.int64, device=ranks.device_type)
    started = ALL_GATHER(numbers, ranks.size, 0, ranks.group_name, timeout_s)
    gathered: Tensor = WAIT_TENSOR(started)
    return [[int(n) for n in row] for row in gathered.tolist()]


def _random_state(ranks: Ranks) -> Tensor:
    on_gpu = ranks.device_type == "cuda"
    return torch.cuda.get_rng_state() if on_gpu else torch.get_rng_state()


def _fingerprint(value: object) -> int:
    """Equal for equal values; cheap, and not meant to withstand an adversary."""
    if not isinstance(value, Tensor):
        return _number(repr(value))
    flat = value.detach().contiguous().view(-1)
    total = 0
    for part in flat.view(torch.uint8).split(_PART):  # int64 sums take 8x the bytes
        weight = torch.arange(1, part.numel() + 1, device=part.device) % _PRIME
        total = total * _PRIME + int((part * (weight + 1)).sum())
    return _number(f"{tuple(value.shape)} {value.dtype} {total}")


def _mark_shard(value: object) -> int:
    """Shards differ, but not in shape or dtype."""
    kind = (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value
    return _number(repr(kind))


def _number(text: str) -> int:
    """63 bits of a hash."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


_PRIME = 8191
_PART = 1 << 24
