"""Give each attention its pattern, by the name of the module that it lies in.

Globs are tried in the user's order and the first that matches holds; an attention that
none matches stays exact. Invariant: a name that may be that of several modules is used
only where their patterns agree; else it is an ``OptionError``.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from ringcompile.config import RingOptions
from ringcompile.errors import (
    OptionError,
    UnsupportedAttentionError,
    format_error,
)
from ringcompile.passes.places import UNKNOWN, find_place
from ringcompile.passes.regions import Refusal, Region
from ringcompile.torch_private import find_running_modules

_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})


@dataclass(frozen=True, slots=True)
class ChosenPatterns:
    """What ``options["attention"]`` says of the attentions of one graph.

    Attributes:
        patterns: ``"exact"`` or a pattern, for each region.
        unused: a warning for each glob that none of them got its pattern by, and for
            what stays exact.
    """

    patterns: tuple[object, ...]
    unused: tuple[str, ...] = ()


def choose_patterns(
    regions: Sequence[Region], refusals: Sequence[Refusal], options: RingOptions
) -> ChosenPatterns:
    """Choose a pattern for each region; cross attention stays exact.

    Args:
        regions: the attentions that become rings.
        refusals: those that do not; a glob may be meant for them.
        options: the user's.

    Raises:
        OptionError: a glob matches no module of the model, or an attention may lie in
            several modules whose patterns differ.
        UnsupportedAttentionError: a cross attention would get a pattern and
            ``unsupported="error"``.
    """
    chosen = _choose_by_name(regions, refusals, options)
    spared = [
        region
        for region, pattern in zip(regions, chosen.patterns, strict=True)
        if region.is_cross and pattern != "exact"
    ]
    if not spared:
        return chosen
    error = UnsupportedAttentionError(
        f"{_name_cross(spared[0])}, under a pattern",
        at=", ".join(dict.fromkeys(region.where for region in spared)),
        because="patterns are of one sequence's positions, and its keys are another's",
        instead='attention={"encoder.*": pattern}, with globs of self-attentions alone',
    )
    if options.unsupported == "error":
        raise error
    patterns = (
        "exact" if region.is_cross else pattern
        for region, pattern in zip(regions, chosen.patterns, strict=True)
    )
    return ChosenPatterns(tuple(patterns), (*chosen.unused, f"stays exact: {error}"))


def _name_cross(region: Region) -> str:
    lengths = (o.shape[2] for o in (region.q, region.k))
    return "attention of {} queries over {} keys".format(*lengths)


def _choose_by_name(
    regions: Sequence[Region], refusals: Sequence[Refusal], options: RingOptions
) -> ChosenPatterns:
    globs = options.attention_globs
    if len({pattern for _, pattern in globs}) == 1 and globs[-1][0] == "*":
        return ChosenPatterns((globs[-1][1],) * len(regions))
    model = _Model(find_running_modules())
    names = [_find_name(r, model, globs) for r in regions]
    chosen = [_first_match(name, globs) for name in names]
    used = {glob for glob, _ in chosen}
    known = [*names, *(_clean(find_place(r.output).module) for r in refusals)]
    unused = [glob for glob, _ in globs if glob not in used and glob != "*"]
    notes = tuple(_judge_unused(glob, known, model) for glob in unused)
    return ChosenPatterns(
        tuple(pattern for _, pattern in chosen), tuple(note for note in notes if note)
    )


_Globs = tuple[tuple[str, object], ...]


def _first_match(name: str, globs: _Globs) -> tuple[str, object]:
    found = (pair for pair in globs if fnmatchcase(name, pair[0]))
    return next(found, ("", "exact"))


def _clean(name: str) -> str:
    """Without what compiling and checkpointing put around modules, as FSDP names."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


class _Model:
    """The compiled model, as far as the modules that are running show it."""

    def __init__(self, running: Sequence[nn.Module]) -> None:
        self.root = running[0] if running else None
        self._inner = running[-1] if len(running) > 1 else None
        self.modules: dict[str, nn.Module] = {}
        if self.root is not None:
            self.modules.update(self.root.named_modules(remove_duplicate=False))
        self.names = tuple(map(_clean, self.modules))

    def find_names(self, name: str) -> list[str]:
        """The full names that a module of this graph may have; none if unknown.

        Args:
            name: its name within the module whose call Dynamo compiled: the model, or,
                where a graph breaks inside of it, an inner module. What is compiled for
                one of those serves all that run the same code.
        """
        if self._inner is None:
            return [] if name.endswith(UNKNOWN) else [_clean(name)]
        code = type(self._inner).forward
        below = f".{name}" if name else ""
        alike = (n for n, m in self.modules.items() if type(m).forward is code)
        return [_clean(n + below) for n in alike if n + below in self.modules]

    def has_kin(self, glob: str, names: Sequence[str]) -> bool:
        """Whether the glob matches a module of the kind of one of ``names``."""
        kinds = {type(m) for n, m in self.modules.items() if _clean(n) in names}
        return any(
            type(m) in kinds and fnmatchcase(_clean(n), glob)
            for n, m in self.modules.items()
        )


def _find_name(region: Region, model: _Model, globs: _Globs) -> str:
    name = find_place(region.output).module
    names = model.find_names(name)
    if names and len({_first_match(n, globs)[1] for n in names}) == 1:
        return names[0]
    served = ", ".join(names[:4]) + (" and more" if len(names) > 4 else "")  # noqa: PLR2004
    because = (
        f"Dynamo compiled this code once for {served}, whose patterns differ, since a "
        "graph breaks in or around them"
        if names
        else "modules share this code, and Dynamo does not tell for which it runs"
    )
    raise OptionError(
        "attention patterns by module",
        at=region.where,
        because=because,
        instead='mend the break (TORCH_LOGS="graph_breaks" shows it), or compile each '
        "layer by itself with its own pattern",
    )


def _judge_unused(glob: str, names: Sequence[str], model: _Model) -> str:
    """What to tell the user of a glob that no attention of the graph got; or nothing.

    Raises:
        OptionError: the model has no module of that name.
    """
    takers = [n for n in names if fnmatchcase(n, glob)]
    nearest = _nearest(glob, names)
    is_module = any(fnmatchcase(n, glob) for n in model.names)
    if model.root is not None and not (is_module or takers):
        raise OptionError(
            f"attention={{{glob!r}: ...}}",
            at="options",
            because=f"{type(model.root).__name__} has no module of such a name",
            instead=f"did you mean {nearest!r}?",
        )
    if not takers and model.has_kin(glob, names):
        return ""  # such an attention as these, in another graph of the model
    because, instead = (
        ("globs before it take all that it matches", "put it first")
        if takers
        else (
            "no attention of this graph lies in a module of such a name",
            f"the nearest is {nearest!r}; a glob matches whole names, so end it in *",
        )
    )
    return format_error(
        f"attention={{{glob!r}: ...}} changes nothing",
        at="options",
        because=because,
        instead=instead,
    )


def _nearest(glob: str, names: Sequence[str]) -> str:
    found = difflib.get_close_matches(glob, list(names), n=1, cutoff=0.0)
    return found[0] if found else ""
