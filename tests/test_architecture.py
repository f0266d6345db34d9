"""The order of imports, and what else of the design can be read off the files.

A module may import its own layer and those below it. ``passes`` and ``lowering`` share
a layer but not imports: they meet in ``ops``, which only declares ops; ``lowering``
gives them their kernels. That is the one place where a lower module names something
that a higher one implements.
"""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 500

# DESIGN.md section 4, lowest first.
LAYERS: tuple[frozenset[str], ...] = tuple(
    frozenset(names.split())
    for names in (
        "errors",
        "config mesh",
        "ir",
        "patterns preset plan reference",
        "autocast ops torch_private inductor_passes",
        "passes lowering",
        "services verify backend",
        "report modules shards",
        "commands demo __main__ __init__",
    )
)
LAYER_OF = {name: i for i, names in enumerate(LAYERS) for name in names}
STRANGERS = {("passes", "lowering"), ("lowering", "passes")}
PURE_DATA = {"ir", "plan"}
NOT_DATA = ("torch.distributed", "torch.fx", "torch.cuda")

PRIVATE_TORCH = {"ringcompile.torch_private", "ringcompile.inductor_passes"}

# Underscored, yet documented or a type that torch offers under no other name.
PUBLIC_ENOUGH = ("torch._check", "torch._ops")


@dataclass(frozen=True, slots=True)
class Use:
    """A dotted name that a module imports or spells out."""

    line: int
    name: str


@dataclass(frozen=True, slots=True)
class Module:
    """One source file of the package."""

    name: str
    path: Path
    tree: ast.Module

    @property
    def part(self) -> str:
        """The file or folder directly under the package that it lies in."""
        return part_of(self.name)

    def imports(self) -> Iterator[Use]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from (Use(node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = "." * node.level + (node.module or "")
                yield from (Use(node.lineno, f"{base}.{a.name}") for a in node.names)

    def dotted_names(self) -> Iterator[Use]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Attribute) and (name := dotted(node)):
                yield Use(node.lineno, name)


def skip_type_checking(tree: ast.Module) -> ast.Module:
    """The same without what only type checkers import."""
    kept = [
        node
        for node in tree.body
        if not (isinstance(node, ast.If) and dotted(node.test) == "TYPE_CHECKING")
    ]
    return ast.Module(kept, [])


def dotted(node: ast.expr) -> str | None:
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return base and f"{base}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else None


def part_of(name: str) -> str:
    return name.split(".")[1] if "." in name else "__init__"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    inside = parts if parts[0] == "ringcompile" else ("ringcompile", *parts)
    return ".".join(inside[:-1] if inside[-1] == "__init__" else inside)


def find_modules() -> list[Module]:
    # Not through the links: each file once, where it lies.
    files = [
        path
        for folder in ("ringcompile", "passes", "lowering")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if not any(p.is_symlink() for p in path.parents)
    ]
    return [Module(module_name(p), p, ast.parse(p.read_text())) for p in files]


MODULES = find_modules()
NAMES = {module.name for module in MODULES}


def resolve(name: str) -> str:
    """The module that ``from package import name`` really needs."""
    return name if name in NAMES else name.rpartition(".")[0]


def own_imports(module: Module) -> Iterator[Use]:
    for use in module.imports():
        if use.name.split(".")[0] == "ringcompile":
            yield Use(use.line, resolve(use.name))


def find_upward_imports(modules: list[Module]) -> list[str]:
    return [
        f"{module.name}:{use.line} imports {use.name}"
        for module in modules
        for use in own_imports(module)
        if not may_import(module.part, part_of(use.name))
    ]


def may_import(importer: str, imported: str) -> bool:
    if (importer, imported) in STRANGERS:
        return False
    return LAYER_OF[imported] <= LAYER_OF[importer]


def find_private_torch(modules: list[Module]) -> list[str]:
    return [
        f"{module.name}:{use.line} uses {use.name}"
        for module in modules
        if module.name not in PRIVATE_TORCH
        for use in (*module.imports(), *module.dotted_names())
        if is_private_torch(use.name)
    ]


def is_private_torch(name: str) -> bool:
    if any(name == ok or name.startswith(f"{ok}.") for ok in PUBLIC_ENOUGH):
        return False
    root, *rest = name.split(".")
    if root in {"functorch", "torchgen"}:
        return True
    if root != "torch" or (rest and rest[0] == "ops"):  # torch.ops._namespace.op
        return False
    return any(p.startswith("_") and not p.startswith("__") for p in rest)


def parse(name: str, source: str) -> Module:
    return Module(name, Path(), ast.parse(source))


def test_there_is_something_to_test() -> None:
    assert {"ringcompile.errors", "ringcompile.passes", "ringcompile.lowering"} <= NAMES


def test_every_module_has_a_layer() -> None:
    assert {m.part for m in MODULES} - set(LAYER_OF) == set()


def test_nothing_imports_upward() -> None:
    assert find_upward_imports(MODULES) == []


def test_upward_imports_are_found() -> None:
    found = find_upward_imports(
        [
            parse("ringcompile.ir.mask", "from ringcompile import config, ops"),
            parse(
                "ringcompile.passes.x", "def f():\n import ringcompile.lowering.ring"
            ),
            parse("ringcompile.lowering.x", "from ringcompile.passes import shadow"),
            parse("ringcompile.passes.y", "from ringcompile.backend import ring"),
            parse("ringcompile.backend", "from ringcompile.passes import shadow"),
            parse("ringcompile.errors", "from ringcompile import stats"),
        ]
    )
    assert [text.split()[0] for text in found] == [
        "ringcompile.ir.mask:1",
        "ringcompile.passes.x:2",
        "ringcompile.lowering.x:1",
        "ringcompile.passes.y:1",
        "ringcompile.errors:1",
    ]


def test_no_cycles() -> None:
    graph: nx.DiGraph[str] = nx.DiGraph()
    for module in (replace(m, tree=skip_type_checking(m.tree)) for m in MODULES):
        graph.add_edges_from((module.name, use.name) for use in own_imports(module))
    graph.remove_edges_from(list(nx.selfloop_edges(graph)))
    assert [
        sorted(c) for c in nx.strongly_connected_components(graph) if len(c) > 1
    ] == []


def test_no_relative_imports() -> None:
    found = [
        f"{module.name}:{use.line}"
        for module in MODULES
        for use in module.imports()
        if use.name.startswith(".")
    ]
    assert found == []


def test_private_torch_is_in_two_files() -> None:
    assert find_private_torch(MODULES) == []


def test_examples_use_what_users_have() -> None:
    files = sorted((ROOT / "examples").glob("*.py"))
    examples = [Module(p.stem, p, ast.parse(p.read_text())) for p in files]
    own = {use.name for x in examples for use in own_imports(x)}
    assert own <= {"ringcompile", "ringcompile.patterns"}
    assert find_private_torch(examples) == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch._inductor.config",
        "from torch._inductor.compile_fx import compile_fx",
        "from torch import _guards",
        "import functorch",
        "import torch.distributed._functional_collectives as funcol",
        "import torch\ntorch._dynamo.reset()",
        "import torch\ntorch._C._distributed_c10d._register_work(x, work)",
    ],
)
def test_private_torch_is_found(source: str) -> None:
    assert find_private_torch([parse("ringcompile.backend", source)])
    assert not find_private_torch([parse("ringcompile.torch_private", source)])


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.ops._c10d_functional.wait_tensor(x)",
        "import torch\ntorch.__version__",
        "from torch._ops import OpOverload",
        "import torch\ntorch._check(True)",
    ],
)
def test_what_torch_offers_to_all_is_not_private(source: str) -> None:
    assert not find_private_torch([parse("ringcompile.backend", source)])


def test_ir_and_plan_are_pure_data() -> None:
    found = [
        f"{module.name}:{use.line} uses {use.name}"
        for module in MODULES
        if module.part in PURE_DATA
        for use in (*module.imports(), *module.dotted_names())
        if use.name.startswith(NOT_DATA)
    ]
    assert found == []


def test_environment_is_read_in_one_file() -> None:
    found = [
        f"{module.name}:{use.line} uses {use.name}"
        for module in MODULES
        if module.name != "ringcompile.config"
        for use in (*module.imports(), *module.dotted_names())
        if use.name in {"os.environ", "os.getenv"}
    ]
    assert found == []


def test_files_are_short() -> None:
    files = [m.path for m in MODULES]
    files += [
        p for f in ("tests", "examples") for p in sorted((ROOT / f).rglob("*.py"))
    ]
    sizes = {str(f.relative_to(ROOT)): f.read_text().count("\n") for f in files}
    assert {name: n for name, n in sizes.items() if n >= MAX_LINES} == {}


def test_packages_of_the_project_file_are_the_folders() -> None:
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    listed = setup["packages"]
    folders = {m.name for m in MODULES if m.path.name == "__init__.py"}
    assert sorted(listed) == sorted(folders)
    # Sub-packages of a mapped package are found through it.
    assert setup["package-dir"] == {
        "ringcompile": "ringcompile",
        "ringcompile.lowering": "lowering",
        "ringcompile.passes": "passes",
    }


def test_every_folder_of_sources_is_a_package() -> None:
    assert [
        str(m.path) for m in MODULES if not (m.path.parent / "__init__.py").exists()
    ] == []


@pytest.mark.parametrize("name", ["passes", "lowering"])
def test_links_lead_to_the_root(name: str) -> None:
    link = ROOT / "ringcompile" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name


@pytest.mark.parametrize("name", ["passes", "lowering"])
def test_root_folders_have_one_name(name: str) -> None:
    code = f"import ringcompile.{name}; import {name}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert f"ImportError: import 'ringcompile.{name}', not '{name}'" in done.stderr


def test_no_backups_of_expected_texts() -> None:
    found = [
        str(path.relative_to(ROOT))
        for folder in ("ringcompile", "passes", "lowering", "tests", "examples")
        for path in (ROOT / folder).rglob("*.bak")
    ]
    assert found == []


def test_every_test_file_is_collected(pytestconfig: pytest.Config) -> None:
    skipped = pytestconfig.getini("norecursedirs")
    files = [path.relative_to(ROOT) for path in (ROOT / "tests").rglob("test_*.py")]
    assert [
        f for f in files if any(fnmatch(p, s) for p in f.parts for s in skipped)
    ] == []
