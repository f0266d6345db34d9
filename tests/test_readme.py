"""The README against what it speaks of: targets, options, variables, names, code."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

from ringcompile import config
from ringcompile.config import RingOptions
from ringcompile.errors import OptionError
from ringcompile.preset import presets

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def option_rows() -> dict[str, tuple[str, str]]:
    text = README.split("## Options")[1].split("###")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \|$", text, flags=re.MULTILINE)
    return {name: (values, default) for name, values, default in rows}


def quoted(text: str) -> list[object]:
    return [ast.literal_eval(code) for code in re.findall(r"`([\"{\d][^`:]*)`", text)]


def refused() -> list[tuple[str, str]]:
    text = README.split("### Not built yet")[1].split("##")[0]
    return re.findall(r'`"(\w+)":\s"(\w+)"`', text)


def test_make_targets_exist() -> None:
    named = set(re.findall(r"(?:^|`)make ([a-z]+)", README, flags=re.MULTILINE))
    targets = set(re.findall(r"^([a-z]+):", MAKEFILE, flags=re.MULTILINE))
    phony = set(re.findall(r"^\.PHONY: (.*)$", MAKEFILE, flags=re.MULTILINE)[0].split())
    assert {"demo", "test", "lint"} <= named <= targets
    assert targets == phony


def test_ci_runs_the_tests_by_the_same_command() -> None:
    lines = (ROOT / ".ci/run").read_text().splitlines()
    assert lines[:2] == ["#!/usr/bin/env bash", "set -euo pipefail"]
    assert lines[-1] == "make test"


def test_torch_is_pinned_as_the_readme_says() -> None:
    pinned = re.findall(r"^TORCH \?= (\S+)$", MAKEFILE, flags=re.MULTILINE)
    assert [f"torch {version}" in README for version in pinned] == [True]


def test_all_options_are_listed_with_their_defaults() -> None:
    own = {f.name: f.default for f in fields(RingOptions) if f.name != "mode"}
    told = {name: quoted(default) for name, (_, default) in option_rows().items()}
    own["inductor"] = {}  # kept as pairs
    assert told == {n: [] if value is None else [value] for n, value in own.items()}


@pytest.mark.parametrize(
    "name", [f.name for f in fields(RingOptions) if f.name != "mode"]
)
def test_listed_values_are_built(name: str) -> None:
    values = [v for v in quoted(option_rows()[name][0]) if isinstance(v, str)]
    beside: dict[str, dict[str, object]] = {
        "local_scale": {"grads": "local"},
        "inputs": {"layout": "zigzag"},
    }
    extra = beside.get(name, {})
    for value in values:
        assert getattr(RingOptions.from_user({name: value} | extra), name) == value


@pytest.mark.parametrize(("name", "value"), refused())
def test_what_is_not_built_is_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(OptionError, match="not built yet"):
        RingOptions.from_user({name: value})


def test_all_that_is_refused_is_told() -> None:
    later = {(name, v) for name, c in config._CHOICES.items() for v in c.later}
    assert set(refused()) == later


def test_environment_variables_are_those_that_are_read() -> None:
    source = (ROOT / "ringcompile/config.py").read_text()
    told = set(re.findall(r"^\| `(RINGCOMPILE_\w+)`", README, flags=re.MULTILINE))
    assert told == set(re.findall(r'get\("(RINGCOMPILE_\w+)"\)', source))


def test_names_of_the_package_exist() -> None:
    package = importlib.import_module("ringcompile")
    for name in sorted(set(re.findall(r"\bringcompile\.(\w+)\(", README))):
        assert callable(getattr(package, name)), name


def test_presets_are_told() -> None:
    told = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", README, flags=re.MULTILINE))
    for name, preset in presets().items():
        assert told[name] == preset.means
    assert "auto" in told


def test_code_is_python() -> None:
    for code in blocks("python"):
        ast.parse(code)


def test_changelog_has_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    newest = re.findall(r"^## \[([\d.]+)\]", changelog, flags=re.MULTILINE)[0]
    assert newest == PROJECT["project"]["version"]


@pytest.mark.slow
@pytest.mark.dist
def test_the_training_script_runs(tmp_path: Path) -> None:
    (script,) = (code for code in blocks("python") if "init_process_group" in code)
    path = tmp_path / "train.py"
    path.write_text(script)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, str(path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^step (\d) loss \d", done.stdout, flags=re.MULTILINE) == [
        "0",
        "1",
        "2",
    ]
