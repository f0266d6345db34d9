"""Where in the user's program a node comes from, read from what Dynamo noted on it.

Invariant: a place always has a line or the node's name; paths are as Python knows them.
"""

import re
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from torch.fx import Node

ModuleStack = Mapping[str, tuple[str, object]]
"""What Dynamo notes of the modules that a node lies in: ``(path, class)``, inmost last.
"""
UNKNOWN = "?"
"""The name of a module of which Dynamo does not tell which one it is."""

_FRAME = re.compile(r'^\s*File "([^"]+)", line (\d+), in ', re.MULTILINE)
_CHILD = re.compile(r"(?:\._modules|\.__dict__\['_modules'\])\['([^']+)'\]")
_ARGUMENT = re.compile(r"(?<=^L\['args'\])\[0\]")
_OWN = str(Path(__file__).resolve().parent.parent / "ringcompile")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a node comes from.

    Attributes:
        module: path of the innermost module, e.g. ``model.layers.0.self_attn``; empty
            outside of modules.
        line: the user's ``file:line``. With no line of the user's on the stack, that of
            the library's model rather than of a helper it calls.
        call_line: the ``file:line`` that calls the op itself, in a library or not.
    """

    module: str
    line: str
    call_line: str


@dataclass(frozen=True, slots=True)
class Move:
    """A second caller of what was traced once: the paths of both, as Dynamo writes.

    Attributes:
        traced: the module whose call was traced; empty if that tells nothing.
        caller: the module that calls it now.
    """

    traced: str
    caller: str


def move_modules(stack: ModuleStack, move: Move) -> dict[str, tuple[str, object]]:
    """The same stack below another module; ``UNKNOWN`` there if it was not below."""
    paths = [path for path, _ in stack.values()]
    rest = paths[-1].removeprefix(move.traced)
    if not move.traced or rest == paths[-1] or rest[:1] not in {"", ".", "["}:
        return {UNKNOWN: (f"{move.caller}.{UNKNOWN}", None)}
    return {
        key: (move.caller + path.removeprefix(move.traced), kind)
        for key, (path, kind) in stack.items()
        if path.startswith(move.traced)
    }


def innermost_module(meta: Mapping[str, object]) -> str:
    """The path of a node's module as Dynamo writes it; empty outside of modules."""
    stack = meta.get("nn_module_stack")
    return str([*stack.values()][-1][0]) if isinstance(stack, Mapping) and stack else ""


def find_place(node: Node) -> Place:
    """Read the place of a node; every line is its name if no stack was noted."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    frames = [(file, line) for file, line in frames if not file.startswith(_OWN)]
    if not frames:
        return Place(_module_path(node), node.name, node.name)
    file, line = _choose_frame(frames, _module_file(node))
    return Place(_module_path(node), f"{file}:{line}", ":".join(frames[-1]))


def where(node: Node) -> str:
    """The user's ``file:line`` that made ``node``, and the node's name."""
    line = find_place(node).line
    return node.name if line == node.name else f"{line} ({node.name})"


def _choose_frame(
    frames: Sequence[tuple[str, str]], module_file: str | None
) -> tuple[str, str]:
    own = [frame for frame in frames if not _is_library(frame[0])]
    in_module = [frame for frame in frames if frame[0] == module_file]
    return (own or in_module or frames)[-1]


@lru_cache(maxsize=1024)
def _is_library(file: str) -> bool:
    paths = sysconfig.get_paths()
    folders = {paths[name] for name in ("purelib", "platlib", "stdlib", "platstdlib")}
    is_inside = any(Path(file).is_relative_to(folder) for folder in folders)
    return is_inside or "site-packages" in Path(file).parts or file.startswith("<")


def _module_file(node: Node) -> str | None:
    """The file of the innermost module's class."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    kind = stack[-1][1] if stack else None
    module = sys.modules.get(kind.__module__) if isinstance(kind, type) else None
    return getattr(module, "__file__", None)


def _module_path(node: Node) -> str:
    # "L['self'].model.layers.0", or, of older torch, "..._modules['layers'][0]"; behind
    # a decorator of forward, "L['args'][0].model.layers.0".
    path = _ARGUMENT.sub("", innermost_module(node.meta))
    path = _CHILD.sub(r".\1", path)
    path = re.sub(r"\[(\d+)\]", r".\1", path)
    return str(path).partition(".")[2].removeprefix("__self__.")
