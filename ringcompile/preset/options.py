"""The user's options with presets named in them, as ``RingOptions``."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from ringcompile.config import Environment, RingOptions
from ringcompile.errors import OptionError
from ringcompile.mesh import find_ranks
from ringcompile.preset.choose import Hardware, choose_preset
from ringcompile.preset.config import RingAttentionConfig
from ringcompile.preset.table import Preset, find_preset


def read_options(
    options: Mapping[str, object] | None = None, mode: str | None = None
) -> RingOptions:
    """Read what ``torch.compile`` hands to the backend, presets by name included.

    Args:
        options: the user's dict; None means all defaults.
        mode: ``torch.compile``'s ``mode``, which is Inductor's.

    Raises:
        OptionError: a key or value is unknown, is not built yet, or contradicts the
            preset.
    """
    given = dict(options or {})
    attention = given.get("attention")
    if isinstance(attention, Mapping):
        given["attention"] = {
            glob: _find_pattern(glob, value) for glob, value in attention.items()
        }
    elif is_preset_name(attention):
        preset, _ = pick_preset(attention, find_hardware(given.get("mesh")))
        given = _merge(preset, given)
    return RingOptions.from_user(given, mode)


def is_preset_name(attention: object) -> bool:
    """Whether it is a name, and not that of exact attention."""
    return isinstance(attention, str) and attention != "exact"


def pick_preset(
    name: object,
    hardware: Hardware | None = None,
    config: RingAttentionConfig | None = None,
) -> tuple[Preset, str]:
    """The preset of a name; of ``"auto"`` the one that fits.

    Args:
        name: of a preset, a class name of the original, or ``"auto"``.
        hardware: what there is; None: what this process finds.
        config: what is asked for; None: the defaults.

    Returns:
        The preset, and of ``"auto"`` the reason, else nothing.

    Raises:
        OptionError: there is none of that name.
    """
    if name != "auto":
        return find_preset(str(name)), ""
    return choose_preset(config or RingAttentionConfig(), hardware or find_hardware())


def explain_presets(options: Mapping[str, object], world_size: int) -> tuple[str, ...]:
    """What to tell of the presets that options name: choices, and what is left out."""
    attention = options.get("attention")
    values = attention.values() if isinstance(attention, Mapping) else (attention,)
    notes: list[str] = []
    here = find_hardware()
    for name in filter(is_preset_name, values):
        preset, reason = pick_preset(name, replace(here, cp_size=world_size))
        notes += [f"attention='auto' is {reason}"] if reason else []
        notes += [preset.note()] if preset.services_off else []
    return tuple(notes)


def find_hardware(mesh: object = None) -> Hardware:
    """What this process runs on; torchrun says how many ranks a host has."""
    cp_size = find_ranks(mesh).size
    per_node = Environment.read().ranks_per_node or torch.cuda.device_count()
    return Hardware(cp_size, per_node) if per_node else Hardware(cp_size)


def _merge(preset: Preset, given: dict[str, object]) -> dict[str, object]:
    """The preset's options under the user's; they must not contradict each other."""
    merged = preset.options()
    for name, value in given.items():
        own = preset.compile_options.get(name, value)
        if name != "attention" and value not in (own, "auto"):
            raise OptionError(
                f"{name}={value!r} with attention={preset.name!r}",
                at="options",
                because=f"that preset has {name}={own!r}",
                instead=f"leave {name} out, or another preset",
            )
        if name not in {"attention", *preset.compile_options}:
            merged[name] = value
    return merged


def _find_pattern(glob: object, value: object) -> object:
    """The pattern of a preset, for some modules; it must be nothing but a pattern."""
    if not is_preset_name(value):
        return value
    preset, _ = pick_preset(value)
    if preset.compile_options:
        raise OptionError(
            f"attention={{{glob!r}: {value!r}}}",
            at="options",
            because="that preset has options of the whole model: "
            + ", ".join(f"{k}={v!r}" for k, v in preset.compile_options.items()),
            instead=f"attention={value!r} for all modules, or its pattern alone",
        )
    return preset.options()["attention"]
