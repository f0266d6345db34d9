"""How a module's function is run: compiled, checkpointed, its gradients watched.

Invariant: what a module was asked for is never lost: code that was not compiled raises
instead of running dense.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count
from types import FunctionType

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ringcompile.config import RingOptions
from ringcompile.errors import OptionError, RingCompileError
from ringcompile.mesh import find_group, find_ranks
from ringcompile.preset import RingAttentionConfig, read_options
from ringcompile.torch_private import mode_patches


@dataclass(frozen=True, slots=True)
class Runner:
    """How a module's function is run: compiled once for all modules of equal options.

    Attributes:
        options: the backend's.
        config: the rest of what was asked for.
        layer: number of the layer; a copy has the same.
        name: what errors call the module.
        rank: of this process.
    """

    options: RingOptions
    config: RingAttentionConfig
    layer: int
    name: str
    rank: int = field(default=0)

    def __deepcopy__(self, _memo: object) -> "Runner":
        return self  # a process group can't be copied, and nothing here changes

    @property
    def is_exact(self) -> bool:
        """Whether no pattern is put on top of the user's mask."""
        return self.options.is_exact

    def run(
        self, function: Callable[..., Tensor], *args: object, training: bool
    ) -> Tensor:
        """Call ``function`` compiled, tensors that are to be watched first.

        Raises:
            RingCompileError: what the backend refuses.
        """
        group = find_group(self.options.mesh)
        ranks = find_ranks(self.options.mesh)
        length = self._fixed_length(args[0], ranks.size)
        around = (torch.is_grad_enabled(), id(group), ranks, length)
        kind = (*around, *map(_kind_of, args))
        compiled = _compile(function, self.options, kind)
        config = self.config
        if config.validate_gradients:
            args = tuple(map(self._watch, args))
        is_due = self.layer % config.checkpoint_frequency == 0
        try:
            if not (training and config.use_checkpointing and is_due):
                return compiled(*args)
            out: Tensor = checkpoint(compiled, *args, use_reentrant=False)
        except RuntimeError as failure:  # Dynamo wraps what a backend raises
            refusal = getattr(failure, "inner_exception", None)
            if isinstance(refusal, RingCompileError):
                raise refusal from None
            raise
        return out

    def _fixed_length(self, x: object, cp_size: int) -> int | None:
        """The length, if a plan serves no other; ``x`` is ``(B, S, ...)``."""
        assert isinstance(x, Tensor), "queries come first"
        serves_all = self.is_exact and (cp_size == 1 or x.shape[1] % (2 * cp_size) == 0)
        return None if serves_all else int(x.shape[1])

    def _watch(self, x: object) -> object:
        """The same tensors, whose gradients raise if they are not finite."""
        if type(x) is tuple:
            return tuple(map(self._watch, x))
        if not (isinstance(x, Tensor) and x.requires_grad):
            return x
        x = x.view_as(x)  # a hook on the user's own tensor would stay there
        x.register_hook(self._require_finite)
        return x

    def _require_finite(self, grad: Tensor) -> None:
        bad = ~grad.isfinite()
        if bad.any():
            first = tuple(bad.nonzero()[0].tolist())
            raise RingCompileError(
                f"{int(bad.sum())} of {grad.numel()} gradients are not finite",
                at=f"rank {self.rank}, {self.name}, layer {self.layer}, "
                f"a gradient of shape {tuple(grad.shape)}, first at {first}",
                because="validate_gradients=True checks what backward gives",
                instead="look for the step whose loss or scores overflow",
            )


def make_runner(
    options: Mapping[str, object],
    config: RingAttentionConfig,
    *,
    mesh: object,
    layer: int,
    name: str,
) -> Runner:
    """Read what a module was asked for.

    Raises:
        OptionError: the options are off, or there are other ranks than ``ring_size``.
    """
    ranks = find_ranks(mesh)
    if config.ring_size not in {None, ranks.size}:
        raise OptionError(
            f"ring_size={config.ring_size} over {ranks.size} ranks",
            at=name,
            because="the ring goes over all ranks of its mesh",
            instead=f"ring_size={ranks.size}, or a mesh of {config.ring_size} ranks",
        )
    given: dict[str, object] = {"mesh": mesh, **options}
    if config.compile_mode is not None:
        RingOptions(mode=config.compile_mode)  # raises if there is no such mode
        given["inductor"] = mode_patches(config.compile_mode)
    read = read_options(given)
    if not read.is_exact:  # gathered, it would run without its pattern
        read = read_options(given | {"unsupported": "error"})
    return Runner(read, config, layer, name, ranks.rank)


_number = count()


def _kind_of(x: object) -> object:
    """What a graph is compiled for, beside batch and length."""
    if isinstance(x, Tensor):
        sizes = tuple(x.shape[2:]) if x.is_floating_point() else ()
        return x.dtype, x.device, x.requires_grad, x.dim(), sizes
    return tuple(map(_kind_of, x)) if isinstance(x, tuple) else x


@lru_cache(maxsize=1024)
def _compile(
    function: Callable[..., Tensor], options: RingOptions, kind: object
) -> Callable[..., Tensor]:
    """The function compiled.

    Dynamo counts what it compiled by code object and stops after a few, and by its name
    it remembers which sizes change. So each kind of arguments has code of its own, and
    its graphs differ in batch and length alone.
    """
    del kind
    assert isinstance(function, FunctionType), "a function of this module"
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_number)}")
    own = FunctionType(code, function.__globals__, code.co_name)
    given = {
        name: getattr(options, name)
        for name in RingOptions.__dataclass_fields__
        if name not in {"mode", "local_scale"}
    }
    given["inductor"] = options.inductor_patches
    compiled: Callable[..., Tensor] = torch.compile(
        own, backend="ring", options=given, fullgraph=True
    )
    return compiled


def require_compiled() -> None:
    """Raise where Dynamo passed over the code and it runs eagerly."""
    if not torch.compiler.is_compiling():
        raise RingCompileError(
            "ring attention in code that was not compiled",
            at="ringcompile.modules",
            because="run eagerly it would be dense attention on every rank",
            instead="let Dynamo compile: no force_eager, no TORCH_COMPILE_DISABLE",
        )
