"""Which attention gets which pattern, by the names of modules."""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

from ringcompile import OptionError, explain
from ringcompile.config import RingOptions
from ringcompile.lowering.inductor import sources_hash
from ringcompile.mesh import Ranks
from ringcompile.passes.pipeline import run_passes
from ringcompile.passes.places import find_place
from ringcompile.patterns import LocalWindow, LongNet

WINDOW, LONGNET = LocalWindow(8, 4), LongNet((8, 16), (1, 2))
S, D = 16, 8


def _pass_on(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        return forward(*args, **kwargs)

    return wrapper


class Attention(nn.Module):
    def __init__(self, *, breaks: bool = False) -> None:
        super().__init__()
        self.qkv = nn.Linear(D, 3 * D)
        self.breaks = breaks

    def forward(self, x: Tensor) -> Tensor:
        if self.breaks:
            torch._dynamo.graph_break()
        q, k, v = self.qkv(x).view(1, S, 1, 3 * D).transpose(1, 2).chunk(3, -1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + y.transpose(1, 2).reshape(x.shape)


class Layer(nn.Module):
    def __init__(self, *, breaks: bool = False) -> None:
        super().__init__()
        self.attn = Attention(breaks=breaks)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attn(x)
        return y


class SharedCode(Layer):
    """Dynamo traces this once for all modules that differ in weights alone."""

    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@torch.compiler.nested_compile_region
def call_shared(layer: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = layer(x)
    return y


def call(layer: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = layer(x)
    return y


def call_checkpointed(layer: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = checkpoint(layer, x, use_reentrant=False)
    return y


class Model(nn.Module):
    def __init__(
        self,
        *layers: nn.Module,
        call: Callable[[nn.Module, Tensor], Tensor] = call,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers or (Layer(), Layer(), Layer()))
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.call(layer, x)
        return x


class Decorated(Model):
    """As transformers decorates ``forward``: the model is but an argument there."""

    def __init__(self) -> None:
        super().__init__()

    @_pass_on
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def choose(
    model: Callable[[Tensor], Tensor], attention: Mapping[str, object]
) -> list[tuple[str, object]]:
    """The name and pattern of each attention, in the graphs' order."""
    chosen: list[tuple[str, object]] = []

    def compile_graph(gm: GraphModule, inputs: Sequence[object]) -> Callable[..., Any]:
        made = run_passes(
            gm,
            inputs,
            options=RingOptions.from_user({"attention": attention}),
            ranks=Ranks(0, 2, "none"),
            sources=sources_hash(),
        )
        chosen.extend(
            (find_place(a.region.output).module, a.pattern) for a in made.attentions
        )
        return gm.forward

    torch._dynamo.reset()
    x = torch.zeros(1, S, D, requires_grad=True)
    torch.compile(model, backend=compile_graph)(x)
    return chosen


def refusal(model: Callable[[Tensor], Tensor], attention: Mapping[str, object]) -> str:
    with pytest.raises(Exception, match="attention") as caught:
        choose(model, attention)
    error = getattr(caught.value, "inner_exception", None)
    assert isinstance(error, OptionError)
    return str(error)


def warning(model: Callable[[Tensor], Tensor], attention: Mapping[str, object]) -> str:
    with pytest.warns(UserWarning, match="changes nothing") as caught:
        choose(model, attention)
    (one,) = caught
    return str(one.message)


NAMES = [f"layers.{n}.attn" for n in range(3)]
GLOBS = {"*.[02].*": WINDOW, "*.1.attn": LONGNET}


@pytest.mark.parametrize(
    "model",
    [
        Model(),
        Model(call=call_checkpointed),
        Model(SharedCode(), SharedCode(), SharedCode()),
        Model().forward,
        Decorated(),
    ],
    ids=["plain", "checkpointed", "shared code", "method", "decorated"],
)
def test_modules_get_their_patterns(model: Callable[[Tensor], Tensor]) -> None:
    chosen = choose(model, GLOBS)
    assert [name for name, _ in chosen] == NAMES
    assert [pattern for _, pattern in chosen] == [WINDOW, LONGNET, WINDOW]


def test_the_first_glob_that_matches_holds_and_the_rest_is_exact() -> None:
    chosen = choose(Model(), {"layers.1*": WINDOW, "*[12]*": LONGNET})
    assert [pattern for _, pattern in chosen] == ["exact", WINDOW, LONGNET]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen = choose(Model(), {"layers.*": WINDOW, "*": LONGNET})
    assert [pattern for _, pattern in chosen] == [WINDOW] * 3


def test_wrappers_are_no_part_of_a_name() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (  # noqa: PLC0415
        checkpoint_wrapper,
    )

    chosen = choose(
        Model(checkpoint_wrapper(Layer()), Layer(), Layer()), {"layers.0.attn": WINDOW}
    )
    assert [pattern for _, pattern in chosen] == [WINDOW, "exact", "exact"]


def test_a_glob_that_no_module_matches_is_an_error() -> None:
    assert_expected_inline(
        refusal(Model(), {"layer.0.*": WINDOW, "*": "exact"}),
        """\
attention={'layer.0.*': ...}
  at: options
  because: Model has no module of such a name
  instead: did you mean 'layers.0.attn'?""",
    )


def test_a_glob_that_no_attention_matches_warns() -> None:
    assert_expected_inline(
        warning(Model(), {"layers.1": WINDOW}),
        """\
attention={'layers.1': ...} changes nothing
  at: options
  because: no attention of this graph lies in a module of such a name
  instead: the nearest is 'layers.1.attn'; a glob matches whole names, so end it in *""",
    )


def test_a_glob_that_comes_too_late_warns() -> None:
    assert_expected_inline(
        warning(Model(), {"layers.*": WINDOW, "layers.1.*": LONGNET}),
        """\
attention={'layers.1.*': ...} changes nothing
  at: options
  because: globs before it take all that it matches
  instead: put it first""",
    )


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # Dynamo's own
def test_layers_that_share_code_after_a_graph_break_must_agree() -> None:
    model = Model(*(Layer(breaks=True) for _ in range(2)))
    assert [p for _, p in choose(model, {"*.attn": WINDOW, "*": "exact"})] == [WINDOW]
    assert_expected_inline(
        "\n".join(
            line
            for line in refusal(model, {"layers.0*": WINDOW}).splitlines()
            if "at:" not in line
        ),
        """\
attention patterns by module
  because: Dynamo compiled this code once for layers.0.attn, layers.1.attn, whose patterns differ, since a graph breaks in or around them
  instead: mend the break (TORCH_LOGS="graph_breaks" shows it), or compile each layer by itself with its own pattern""",
    )


def test_a_shared_function_tells_no_names() -> None:
    model = Model(call=call_shared)
    assert "does not tell for which" in refusal(model, {"layers.0*": WINDOW})


class TwoGraphs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Layer(), Layer()

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x)
        torch._dynamo.graph_break()
        y: Tensor = self.decoder(x)
        return y


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # Dynamo's own
def test_globs_may_be_for_several_graphs() -> None:
    with warnings.catch_warnings(record=True) as caught:
        chosen = choose(TwoGraphs(), {"decoder.*": WINDOW, "encoder.*": LONGNET})
    assert not any("changes nothing" in str(w.message) for w in caught)
    assert chosen == [("encoder.attn", LONGNET), ("decoder.attn", WINDOW)]


def test_layers_compiled_one_by_one_have_their_own_options() -> None:
    layers = [Layer(), Layer()]
    seen: list[object] = []

    def backend(
        gm: GraphModule, _inputs: Sequence[object], *, options: dict[str, object]
    ) -> Callable[..., Any]:
        seen.append(RingOptions.from_user(options).attention)
        return gm.forward

    torch._dynamo.reset()
    for layer, pattern in zip(layers, (WINDOW, LONGNET), strict=True):
        options = {"attention": pattern}
        torch.compile(layer, backend=backend, options=options)(  # type: ignore[arg-type]
            torch.zeros(1, S, D)
        )
    assert seen == [WINDOW, LONGNET]


def test_explain_tells_the_pattern_of_each_attention() -> None:
    report = explain(
        Model(),
        torch.zeros(1, S, D),
        world_size=2,
        options={"attention": {"*.0.*": WINDOW, "layers.1": LONGNET}},
    )
    assert [a.pattern for a in report.attentions] == [str(WINDOW), "exact", "exact"]
    assert [a.name for a in report.attentions] == NAMES
    assert len(report.schedules) == 2
    (note,) = report.notes
    assert note.startswith("attention={'layers.1': ...} changes nothing")
