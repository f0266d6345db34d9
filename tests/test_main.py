"""The command line, command by command."""

import json
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
from expecttest import assert_expected_inline

from ringcompile.__main__ import main
from ringcompile.commands import extras
from ringcompile.commands.masks import read_mask_text
from ringcompile.errors import OptionError


def test_plan_draws_and_weighs(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--seq", "1024", "--heads", "8", "--kv-heads", "2", "--head-size", "32"]
    assert main(["plan", "--layout", "zigzag", "--ranks", "2", *small]) == 0
    text = capsys.readouterr().out.rpartition("  forward and backward take")[0]
    assert_expected_inline(
        text,
        """\
schedule zigzag x2
  part 0: k <= q
    step 0: kv0/ kv1/
    step 1: kv1/ kv0/
  layout: as asked; checked; serves every S without padding
  bytes sent, forward + backward:
    part 0, step 1: 64 KiB + 320 KiB, 128 KiB + 256 KiB
  bytes sent for B batches, G KV heads, S tokens, D and E features:
    rank 0: forward B*G*S*item_bytes*(D + E)/4, backward B*G*S*(D + E)*(item_bytes + 8)/4
    rank 1: forward B*G*S*item_bytes*(D + E)/2, backward B*G*S*(D + E)*(item_bytes + 2)/2
""",
    )


def test_plan_draws_the_mask(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--mask", "causal and window(3)", "--ranks", "2", "--seq", "16"]
    assert main(["plan", "--picture", *asked]) == 0
    picture, _, rest = capsys.readouterr().out.partition("schedule")
    rows = picture.splitlines()
    assert rows == [
        "".join("#" if 0 <= q - k <= 3 else "." for k in range(16)) for q in range(16)
    ]
    assert "part 0: " in rest


def test_a_window_talks_to_one_neighbour(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--mask", "causal and window(100)", "--layout", "contiguous"]
    assert main(["plan", *asked, "--ranks", "4", "--seq", "4096"]) == 0
    steps = [x for x in capsys.readouterr().out.splitlines() if "step" in x]
    assert [x.split(":")[0].strip() for x in steps] == [
        "step 0",
        "step 1",
        "part 0, step 1",
    ]


@pytest.mark.parametrize(
    "layout", ["auto", "contiguous", "zigzag", "striped", "hilbert"]
)
@pytest.mark.parametrize("mask", ["all", "causal", "not chunked(7) or window(3, 2)"])
def test_simulate_agrees_with_the_reference(
    mask: str, layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--mask", mask, "--layout", layout, "--ranks", "3", "--seq", "41"]
    assert main(["simulate", *asked]) == 0
    out = capsys.readouterr().out
    assert "dv " in out
    assert out.endswith("  right\n")


def test_masks_are_read_by_meaning() -> None:
    both = read_mask_text("causal and window(4)")
    assert both == read_mask_text("window(4, 0)")
    assert str(read_mask_text("not (causal)")) == "q < k"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("causl", "'causl' is no mask"),
        ("window", "window takes 1 to 2 numbers, not 0"),
        ("window(1.5)", "'1.5' is no whole number"),
        ("causal + 1", "'causal + 1' is no mask"),
        ("causal and", "invalid syntax"),
        ("__import__(0)", "'__import__' is no mask"),
    ],
)
def test_wrong_masks_are_named(text: str, reason: str) -> None:
    with pytest.raises(OptionError) as caught:
        read_mask_text(text)
    assert caught.value.because == reason


def test_errors_are_told_without_a_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["plan", "--mask", "causl"]) == 2
    assert capsys.readouterr().err.startswith("OptionError: mask 'causl'\n  at: --mask")


def test_explain_prints_report_graph_and_json(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("transformers")
    asked = ["explain", "--model", "bert", "--layers", "1", "--seq", "64"]
    assert main([*asked, "--world-size", "2", "--layout", "contiguous"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("2 ranks, 1 graph, 1 of 1 attentions ring\n")
    assert "  mask     c0[0, k] != 0\n" in out
    assert main([*asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["world_size"] == 4
    assert main([*asked, "--graph", "rewrite", "--rank", "3"]) == 0
    assert "rank=3 " in capsys.readouterr().out
    assert main([*asked, "--graph", "nothing"]) == 2
    assert "the passes are 'shadow'" in capsys.readouterr().err


def test_transformers_is_asked_for_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda _: None)
    for command in (["demo"], ["explain", "--model", "gpt2"]):
        assert main(command) == 2
        assert "pip install 'ringcompile[demo]'" in capsys.readouterr().err


@pytest.mark.dist
def test_doctor_sends_a_hop(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert 'ok   backend "ring": registered' in lines
    assert "ok   a hop between 2 gloo ranks: arrived" in lines


@pytest.mark.skipif(
    "ring" not in entry_points(group="torch_dynamo_backends").names,
    reason="a checkout that is not installed registers the backend with torch",
)
def test_importing_the_package_is_cheap() -> None:
    code = "import sys, ringcompile; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


def test_without_an_entry_point_the_import_registers() -> None:
    code = """if True:
        import importlib.metadata as metadata
        metadata.entry_points = lambda **_: metadata.EntryPoints()
        import torch
        import ringcompile
        assert "ring" in torch.compiler.list_backends()
        torch.compile(lambda x: x + 1, backend="ring")  # finds the backend, or raises
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
