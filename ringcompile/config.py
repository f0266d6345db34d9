"""What a user chose: compile options and environment variables, checked once.

Invariant: a ``RingOptions`` that exists holds only values that are built; whatever else
a user writes is an ``OptionError`` that names the nearest right thing.
"""

import difflib
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType

from ringcompile.errors import OptionError


@dataclass(frozen=True, slots=True)
class _Choice:
    """The values of one option that are built, and those that are named but not yet."""

    built: tuple[str, ...]
    later: tuple[str, ...] = ()


_CHOICES: Mapping[str, _Choice] = MappingProxyType(
    {
        "layout": _Choice(("auto", "contiguous", "zigzag", "striped", "hilbert")),
        "inputs": _Choice(("replicated", "sharded")),
        "outputs": _Choice(("gathered", "sharded")),
        "grads": _Choice(("summed", "local")),
        "local_scale": _Choice(("mean", "sum")),
        "unsupported": _Choice(("gather", "error")),
        "kernel": _Choice(("auto", "flex", "math"), ("cudnn", "flash")),
        "transport": _Choice(("auto", "p2p", "copy_engine")),
        "block_order": _Choice(("natural", "hilbert")),
        "verify": _Choice(("off", "plan"), ("numeric",)),
        "mode": _Choice(
            (
                "default",
                "lite",
                "reduce-overhead",
                "max-autotune",
                "max-autotune-no-cudagraphs",
            )
        ),
    }
)


@dataclass(frozen=True, slots=True)
class RingOptions:
    """The options of ``torch.compile(..., backend="ring", options={...})``.

    Attributes:
        mesh: 1-D ``DeviceMesh``, one of the dims ``("ring", "ulysses")``, or process
            group; None is the default group. On GPUs, at fixed lengths, the cost model
            decides for one of one dim whether ranks deal out heads. A group is compared
            by identity, a mesh as ``DeviceMesh`` compares itself.
        attention: ``"exact"``, a hashable pattern of ``ringcompile.patterns``, or pairs
            (glob over modules' names, one of those): the first that matches holds.
        layout: Which positions each rank holds; ``auto`` decides by mask and cost, and
            never for ``hilbert``.
        inputs: ``replicated``: every rank passes the same full tensors; ``sharded``:
            each passes its own rows, laid out as ``layout`` says (``auto`` can't), in a
            graph of symbolic lengths (``torch.compile(dynamic=True)``).
        outputs: ``gathered``: as eager on every rank; ``sharded``: each rank's rows,
            the user's default where ``inputs="sharded"``.
        grads: ``summed``: each ``.grad`` is eager's; ``local``: partial sums, for a
            data-parallel wrapper over a mesh that includes this one.
        local_scale: Under ``grads="local"``, what that wrapper does with gradients:
            it averages (``mean``: multiplied by P here) or sums (``sum``: not).
        unsupported: ``gather`` what can't be cut, exactly and with a warning, or
            ``error``.
        kernel: The tile kernel: ``auto`` is the device's best; ``flex`` what Inductor
            generates for ``flex_attention``, on GPUs (not of selected rows, which run
            dense, nor of tables of blocks, chosen blocks and dropout, which run by
            plain operators); ``math`` plain operators in float32 or more, slow and
            easy to trust.
        transport: How hops travel: ``p2p``, by the process group's sends;
            ``copy_engine``, by the GPUs' own copies of memory that they share; ``auto``
            takes these where each GPU can read every other's memory.
        stages: Stages that the steps are grouped into, or ``"auto"``.
        block_order: The order in which the blocks of a masked tile are computed.
        hilbert_level: Of ``layout="hilbert"``: n of the curve over ``4^n`` cells; None
            is the least that holds a segment.
        verify: ``plan`` checks every schedule and compares plans over ranks.
        timeout_s: A hop or barrier older than this raises.
        inductor: Inductor config patches, as sorted pairs.
        mode: Inductor's mode (``torch.compile(mode=)``), or None.
    """

    mesh: object = None
    attention: object = "exact"
    layout: str = "auto"
    inputs: str = "replicated"
    outputs: str = "gathered"
    grads: str = "summed"
    local_scale: str = "mean"
    unsupported: str = "gather"
    kernel: str = "auto"
    transport: str = "auto"
    stages: int | str = "auto"
    block_order: str = "natural"
    hilbert_level: int | None = None
    verify: str = "plan"
    timeout_s: float = 600.0
    inductor: tuple[tuple[str, object], ...] = field(default=(), hash=False)
    mode: str | None = None

    def __post_init__(self) -> None:
        for name, choice in _CHOICES.items():
            value = getattr(self, name)
            if not (name == "mode" and value is None):
                _check_choice(name, value, choice)
        _check_attention(self.attention)
        _check_stages(self.stages)
        _check_level(self.hilbert_level, self.layout)
        if self.kernel == "flex" and self.block_order != "natural":
            raise OptionError(
                f"kernel='flex' with block_order={self.block_order!r}",
                at="options",
                because="a GPU starts the programs of a generated kernel as it likes",
                instead="kernel='math', or block_order='natural'",
            )
        if self.inputs == "sharded" and self.layout == "auto":
            raise OptionError(
                "inputs='sharded' with layout='auto'",
                at="options",
                because="the shards are cut before the masks are known",
                instead='the layout of ringcompile.shard, "layout": "zigzag"',
            )
        _check_timeout(self.timeout_s)

    @classmethod
    def from_user(
        cls, options: Mapping[str, object] | None = None, mode: str | None = None
    ) -> "RingOptions":
        """Build the options from what ``torch.compile`` hands to a backend.

        Args:
            options: The user's dict; None means all defaults.
            mode: ``torch.compile``'s ``mode``, which is Inductor's.

        Raises:
            OptionError: a key or value is unknown, or is not built yet.
        """
        given = dict(options or {})
        _check_keys(given)
        if "local_scale" in given and given.get("grads", "summed") != "local":
            raise OptionError(
                f"local_scale={given['local_scale']!r}",
                at="options",
                because='it scales local gradients, and grads is not "local"',
                instead='add "grads": "local", or leave local_scale out',
            )
        if given.get("inputs") == "sharded":
            given.setdefault("outputs", "sharded")
        if "inductor" in given:
            given["inductor"] = _freeze_patches(given["inductor"])
        if isinstance(by_module := given.get("attention"), Mapping):
            given["attention"] = tuple(by_module.items())
        # Values are still of any type here; __post_init__ checks each of them.
        return cls(mode=mode, **given)  # type: ignore[arg-type]

    @property
    def attention_globs(self) -> tuple[tuple[str, object], ...]:
        """Globs over modules' names, each with ``"exact"`` or a pattern, in order."""
        # Not isinstance: a user's pattern may be a NamedTuple.
        if type(self.attention) is tuple:
            return self.attention
        return (("*", self.attention),)

    @property
    def is_exact(self) -> bool:
        """Whether no attention gets a pattern."""
        return all(pattern == "exact" for _, pattern in self.attention_globs)

    def replicated_factor(self, cp_size: int) -> float:
        """What a gradient that is whole on every rank is multiplied by."""
        is_summed_later = self.grads == "local" and self.local_scale == "sum"
        return 1.0 / cp_size if is_summed_later else 1.0

    @property
    def inductor_patches(self) -> dict[str, object]:
        """The user's Inductor config patches as a new dict."""
        return dict(self.inductor)


_KEYS = tuple(f.name for f in fields(RingOptions) if f.name != "mode")


def _check_keys(given: Mapping[str, object]) -> None:
    for key in given:
        if key == "mode":
            raise OptionError(
                "unknown option 'mode'",
                at="options",
                because="mode is an argument of torch.compile, Inductor's mode",
                instead='torch.compile(model, backend="ring", mode=...)',
            )
        if key not in _KEYS:
            raise OptionError(
                f"unknown option {key!r}",
                at="options",
                because=f"the options are {', '.join(_KEYS)}",
                instead=f"did you mean {_nearest(key, _KEYS)!r}?",
            )


def _check_choice(name: str, value: object, choice: _Choice) -> None:
    if isinstance(value, str) and value in choice.built:
        return
    if isinstance(value, str) and value in choice.later:
        raise _not_built(f"{name}={value!r}", instead=_one_of(choice.built))
    nearest = _nearest(value, choice.built)
    raise OptionError(
        f"{name}={value!r}",
        at="options",
        because=f"{name} is {_one_of(choice.built)}",
        instead=f"did you mean {nearest!r}?",
    )


def _check_attention(value: object) -> None:
    if type(value) is not tuple:
        _check_pattern(value, "attention")
        return
    for pair in value or ((),):
        if not (type(pair) is tuple and len(pair) == _PAIR and _is_glob(pair[0])):
            raise OptionError(
                f"attention={dict([pair]) if len(pair) == _PAIR else {}!r}",
                at="options",
                because="a dict gives patterns to globs over modules' names",
                instead='for example {"model.layers.0.*": LongNet(...), "*": "exact"}',
            )
        _check_pattern(pair[1], f"attention[{pair[0]!r}]")


_PAIR = 2


def _is_glob(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _check_pattern(value: object, name: str) -> None:
    if isinstance(value, str) and value == "exact":
        return
    instead = "'exact', or a pattern object of ringcompile.patterns"
    if not hasattr(value, "build_parts"):
        raise OptionError(
            f"{name}={value!r}",
            at="options",
            because="it is neither 'exact' nor a pattern",
            instead=instead,
        )
    try:
        hash(value)
    except TypeError as error:
        raise OptionError(
            f"{name}={value!r}",
            at="options",
            because=f"a pattern must be hashable, or each call compiles anew ({error})",
            instead="make it a frozen dataclass of tuples, numbers and bytes",
        ) from None


def _check_stages(value: object) -> None:
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if not (is_count or (isinstance(value, str) and value == "auto")):
        raise OptionError(
            f"stages={value!r}",
            at="options",
            because="stages is 'auto' or a whole number of at least 1",
            instead="did you mean 'auto'?",
        )


def _check_level(value: object, layout: str) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise OptionError(
            f"hilbert_level={value!r}",
            at="options",
            because="a curve of level n goes through 4^n cells",
            instead="a whole number of at least 0, or leave it out for the least",
        )
    if layout != "hilbert":
        raise OptionError(
            f"hilbert_level={value} with layout={layout!r}",
            at="options",
            because="only the layout hilbert goes along a curve",
            instead='layout="hilbert", or leave hilbert_level out',
        )


def _check_timeout(value: object) -> None:
    if isinstance(value, bool) or not (isinstance(value, int | float) and value > 0):
        raise OptionError(
            f"timeout_s={value!r}",
            at="options",
            because="timeout_s is a number of seconds above 0",
            instead="leave it out for 600",
        )


def _freeze_patches(value: object) -> tuple[tuple[str, object], ...]:
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return tuple(sorted(value.items(), key=lambda item: item[0]))
    raise OptionError(
        f"inductor={value!r}",
        at="options",
        because="inductor is a dict of names in torch._inductor.config",
        instead='for example {"max_autotune": True}',
    )


def _not_built(what: str, *, instead: str) -> OptionError:
    return OptionError(what, at="options", because="not built yet", instead=instead)


def _nearest(word: object, known: Iterable[str]) -> str:
    """The known word most like ``word``, however little."""
    return difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.0)[0]


def _one_of(values: tuple[str, ...]) -> str:
    return " or ".join(repr(v) for v in values)


# ---- environment ---------------------------------------------------------------------

_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True, slots=True)
class Environment:
    """What the ``RINGCOMPILE_*`` variables say.

    Attributes:
        log_level: Level for the logger ``ringcompile`` (``RINGCOMPILE_LOG``), or None.
        dump_dir: Folder for the graph before and after each pass
            (``RINGCOMPILE_DUMP``), or None.
        ranks_per_node: Ranks of this host, as torchrun says (``LOCAL_WORLD_SIZE``), or
            None.
    """

    log_level: int | None = None
    dump_dir: Path | None = None
    ranks_per_node: int | None = None

    @classmethod
    def read(cls, environ: Mapping[str, str] = os.environ) -> "Environment":
        """Read the variables; an empty one counts as not set.

        Raises:
            OptionError: ``RINGCOMPILE_LOG`` names no level.
        """
        level, folder = environ.get("RINGCOMPILE_LOG"), environ.get("RINGCOMPILE_DUMP")
        return cls(
            log_level=_read_level(level) if level else None,
            dump_dir=Path(folder) if folder else None,
            ranks_per_node=int(environ.get("LOCAL_WORLD_SIZE") or 0) or None,
        )


def _read_level(text: str) -> int:
    if text.lower() not in _LEVELS:
        raise OptionError(
            f"RINGCOMPILE_LOG={text!r}",
            at="environment",
            because=f"the levels are {_one_of(_LEVELS)}",
            instead=f"did you mean {_nearest(text.lower(), _LEVELS)!r}?",
        )
    return logging.getLevelNamesMapping()[text.upper()]


def set_up_logging(environment: Environment) -> None:
    """Make the logger ``ringcompile`` print from the level that was asked for."""
    if environment.log_level is None:
        return
    logger = logging.getLogger("ringcompile")
    logger.setLevel(environment.log_level)
    if not logger.handlers:  # else TORCH_LOGS="+ringcompile" has given it one
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s %(levelname)s: %(message)s"))
        logger.addHandler(handler)
