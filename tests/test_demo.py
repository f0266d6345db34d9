"""The demo: what it shows, what it returns, and that nothing outlives it."""

import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from ringcompile import demo
from ringcompile.demo.processes import RankFailedError, run_ranks
from ringcompile.demo.records import (
    DemoSize,
    Errors,
    Plan,
    RankResult,
    Run,
    Stage,
)

TWO = DemoSize(ranks=2, layers=1, length=64, hidden=64, vocabulary=128)
COMMAND = [sys.executable, "-m", "ringcompile", "demo"]


def result(plan: Plan | None = None, **errors: float) -> RankResult:
    found = {"loss_error": 1e-8, "logits": 1e-7, "gradient": 1e-6, **errors}
    run = Run(Errors(loss=5.0, gradient_name="head.weight", **found), 2**29, 30.0, 0.5)
    return RankResult(run, eager=run if plan else None, plan=plan)


def show(
    results: tuple[RankResult, ...], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, str]:
    def pretend(
        _size: DemoSize, on_stage: Callable[[int, Stage], None]
    ) -> tuple[RankResult, ...]:
        on_stage(0, Stage.FORWARD)
        return results

    monkeypatch.setattr(demo, "run_ranks", pretend)
    out = StringIO()
    status = demo.run_demo(TWO, Console(file=out, width=80))
    return status, out.getvalue()


GOOD = Plan(rings=1, attentions=1, sent_bytes=(1024, 2048))


def test_the_table_shows_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    status, text = show((result(GOOD), result()), monkeypatch)
    assert status == 0
    assert "rank 0: compiling and running forward" in text
    rows = [re.split(r"  +", line.strip()) for line in text.splitlines()]
    assert ["eager float32", "rank 0", "rank 1"] in rows
    assert ["gradient error", "1.0e-06", "1.0e-06", "1.0e-06"] in rows
    assert ["rings", "1 of 1", "1 of 1"] in rows
    assert ["bytes sent", "1 KiB", "2 KiB"] in rows
    assert ["peak memory", "512 MiB", "512 MiB", "512 MiB"] in rows
    assert text.rstrip().endswith("right")


@pytest.mark.parametrize(
    "bad",
    [
        {"gradient": 2e-5},
        {"logits": math.nan},
        {"loss_error": math.inf},
    ],
)
def test_one_wrong_rank_fails_it(
    bad: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, text = show((result(GOOD), result(None, **bad)), monkeypatch)
    assert status == 1
    assert text.rstrip().endswith("WRONG")


@pytest.mark.parametrize("rings", [0, 1])
def test_an_attention_that_is_no_ring_fails_it(
    rings: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = replace(GOOD, rings=rings, attentions=2 * rings)
    status, _ = show((result(plan), result()), monkeypatch)
    assert status == 1


@pytest.mark.dist
def test_a_rank_that_fails_is_named() -> None:
    pytest.importorskip("transformers")
    odd = replace(TWO, heads=3, kv_heads=2)
    with pytest.raises(RankFailedError, match=r"rank \d failed: Traceback"):
        run_ranks(odd, lambda *_: None)


@pytest.mark.dist
def test_ctrl_c_leaves_no_rank() -> None:
    pytest.importorskip("transformers")
    # A shell's background jobs ignore SIGINT, and hand that on; a handler is not.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        COMMAND, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    signal.signal(signal.SIGINT, before)
    ranks = _wait_for(lambda: _children_of(process.pid), 4)
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=60)
    assert (process.returncode, printed.strip()) == (130, "interrupted")
    _wait_for(lambda: [pid for pid in ranks if _is_alive(pid)], 0)


@pytest.mark.dist
def test_ranks_end_with_a_parent_that_is_killed() -> None:
    pytest.importorskip("transformers")
    process = subprocess.Popen(COMMAND, stdout=subprocess.DEVNULL)
    ranks = _wait_for(lambda: _children_of(process.pid), 4)
    process.kill()
    process.wait()
    _wait_for(lambda: [pid for pid in ranks if _is_alive(pid)], 0)


@pytest.mark.dist
def test_it_runs() -> None:
    pytest.importorskip("transformers")
    small = ["--ranks", "2", "--layers", "1", "--seq", "64"]
    done = subprocess.run(
        [*COMMAND, *small], capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 1" in done.stdout
    assert done.stdout.rstrip().endswith("right")


def _children_of(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    if not listed.exists():
        pytest.skip("needs /proc")
    return [int(child) for child in listed.read_text().split()]


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return (
        "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    )


def _wait_for(find: Callable[[], list[int]], count: int) -> list[int]:
    deadline = time.monotonic() + 60
    while len(found := find()) != count:
        assert time.monotonic() < deadline, f"{len(found)} processes, not {count}"
        time.sleep(0.1)
    return found
