"""Traces, dumps, logs and warnings, as a user's process leaves them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """\
import torch
import torch.nn.functional as F
import ringcompile
from ringcompile.patterns import LocalWindow

def attend(q, k, v, bias):
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return y + F.scaled_dot_product_attention(q, k, v, attn_mask=bias.cumsum(0) > 0)

def backend(gm, example_inputs):
    options = {"attention": LocalWindow(64, block=32)}
    return ringcompile.rewrite(gm, example_inputs, options).forward

compiled = torch.compile(attend, backend=backend, dynamic=False)
for n in (128, 256):
    compiled(*torch.randn(3, 1, 2, n, 8), torch.randn(n, n))
"""
PASSES = ["shadow", "raise_attention", "rewrite"]


def run(folder: Path, **variables: str) -> str:
    """Run the program in a process of its own; what it printed as errors."""
    path = folder / "program.py"
    path.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, str(path)],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("left")
    printed = run(
        folder,
        TORCH_TRACE=str(folder / "trace"),
        RINGCOMPILE_DUMP=str(folder / "dump"),
        TORCH_LOGS="+ringcompile",
    )
    return folder, printed


def test_trace_has_passes_and_schedules(left: tuple[Path, str]) -> None:
    folder, _ = left
    text = "".join(p.read_text() for p in (folder / "trace").iterdir())
    names = re.findall(r'"name": "ringcompile\.(\w+)"', text)
    assert names == [*PASSES, "schedules"] * 2


def test_dump_has_every_pass_before_and_after(left: tuple[Path, str]) -> None:
    folder, _ = left
    files = {p.name: p.read_text() for p in (folder / "dump").iterdir()}
    for graph in ("graph00", "graph01"):
        own = sorted(n for n in files if f".{graph}." in n)
        assert own == [
            f"rank0.{graph}.00.shadow.after.txt",
            f"rank0.{graph}.01.raise_attention.after.txt",
            f"rank0.{graph}.01.raise_attention.before.txt",
            f"rank0.{graph}.02.rewrite.after.txt",
            f"rank0.{graph}.02.rewrite.before.txt",
            f"rank0.{graph}.schedules.txt",
        ]
        assert files[own[0]] == files[own[2]] != files[own[1]]
        assert "ringcompile.ring_attention" in files[own[3]]
        assert "schedule contiguous x1" in files[own[5]]


def test_torch_logs_shows_graphs(left: tuple[Path, str]) -> None:
    _, printed = left
    assert all(printed.count(f"# after {name}") == 2 for name in PASSES)


def test_a_warning_reaches_the_user_once(left: tuple[Path, str]) -> None:
    _, printed = left
    assert printed.count("runs gathered") == 1
    assert re.search(r"at: \S*program\.py:8 ", printed)


def test_own_variable_sets_the_level(tmp_path: Path) -> None:
    printed = run(tmp_path, RINGCOMPILE_LOG="info")
    lines = [line for line in printed.splitlines() if line.startswith("ringcompile")]
    assert lines == [
        f"ringcompile.passes.artifacts INFO: graph {n}: "
        "1 of 2 attentions ring as contiguous x1"
        for n in (0, 1)
    ]
