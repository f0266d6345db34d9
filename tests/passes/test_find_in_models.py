"""Every attention of the spine's models is found, and its mask read as it is."""

from dataclasses import replace

import pytest
import torch
from support.attentions import trace_model
from support.sampling import one_in
from support.spine_models import (
    SPINE,
    SpineModel,
    build_model,
    find_model,
    left_padded,
    packed,
    right_padded,
)

from ringcompile.ir.mask import EmptyRow
from ringcompile.passes import read_mask
from ringcompile.passes.regions import Region

CAUSAL = "k <= q"
PADDED = "c0[b, k] != 0 and k <= q"
DOCUMENTS = "c0[b, k] == c0[b, q] and k <= q"
WINDOW = "q <= k + 127"
MASKS = {
    "llama": CAUSAL,
    "mistral": f"{CAUSAL} and {WINDOW}",
    "qwen2": CAUSAL,
    "gpt2": CAUSAL,
    "bert padded": "c0[b, k] != 0",
    "llama packed": DOCUMENTS,
    "llama left-padded": PADDED,
    "llama cache": CAUSAL,
    "mistral packed": f"{DOCUMENTS} and {WINDOW}",
    "mistral left-padded": f"{PADDED} and {WINDOW}",
    "gpt2 right-padded": PADDED,
    "bert": "all",
}
LENGTHS = {"mistral": 144, "mistral packed": 144, "mistral left-padded": 144}
ROWS = (
    *SPINE,
    replace(find_model("mistral"), name="mistral packed", make_inputs=packed),
    replace(find_model("mistral"), name="mistral left-padded", make_inputs=left_padded),
    replace(find_model("gpt2"), name="gpt2 right-padded", make_inputs=right_padded),
    replace(
        find_model("bert padded"),
        name="bert",
        make_inputs=find_model("llama").make_inputs,
    ),
)
DYNAMIC = ("mistral packed", "bert padded", "gpt2 right-padded", "llama")


def find_regions(row: SpineModel, attention: str, dynamic: bool | None) -> list[Region]:
    """The regions of a model, each held against what the graph computes."""
    model = build_model(row, attention, torch.float32)
    inputs = row.make_inputs(LENGTHS.get(row.name, 40))
    del inputs["labels"]  # the loss has no attention
    found = trace_model(model, inputs, dynamic=dynamic).find()
    regions = [f for f in found if isinstance(f, Region)]
    assert len(regions) == len(found) == row.num_layers, found
    return regions


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("row", one_in(6, ROWS), ids=lambda row: row.name)
def test_mask_of_model_is_read(row: SpineModel, attention: str) -> None:
    for region in find_regions(row, attention, dynamic=None):
        assert str(region.mask) == MASKS[row.name]
        padded = "!= 0" in MASKS[row.name] and attention == "eager"
        want = EmptyRow.MEAN_ALL if padded else EmptyRow.ZERO
        assert region.mask.empty_row is want


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", one_in(6, DYNAMIC))
def test_mask_of_model_is_read_with_symbolic_sizes(name: str, attention: str) -> None:
    row = next(row for row in ROWS if row.name == name)
    for region in find_regions(row, attention, dynamic=True):
        assert str(region.mask) == MASKS[name]


def test_kv_heads_travel_unrepeated() -> None:
    for attention in ("sdpa", "eager"):
        for region in find_regions(find_model("llama"), attention, dynamic=None):
            heads = [
                o.node.meta["val"].shape[1] for o in (region.q, region.k, region.v)
            ]
            assert heads == [4, 2, 2]


def test_a_mask_shared_by_layers_is_worked_out_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    finish = read_mask.MaskReader._finish

    def count(self: read_mask.MaskReader, *args: object) -> read_mask.ReadMask:
        calls.append(args)
        return finish(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(read_mask.MaskReader, "_finish", count)
    assert len(find_regions(find_model("llama"), "eager", dynamic=None)) == 2
    assert len(calls) == 1
