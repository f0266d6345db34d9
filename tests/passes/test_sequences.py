"""Keys of another sequence than the queries are told from the queries' own."""

import torch
import torch.nn.functional as F
from support.attentions import Traced, trace, trace_model
from support.cross_models import Layer, make_inputs, make_model
from torch import Tensor, nn

from ringcompile.passes.regions import Region

X = torch.randn(2, 4, 10, 8)


def find_cross(traced: Traced) -> list[bool]:
    found = traced.find()
    assert all(isinstance(f, Region) for f in found)
    return [f.is_cross for f in found if isinstance(f, Region)]


def trace_with(model: nn.Module, **inputs: Tensor) -> list[bool]:
    return find_cross(trace_model(model, inputs))


def test_other_lengths_are_other_sequences() -> None:
    traced = trace(F.scaled_dot_product_attention, X, X[:, :, :7], X[:, :, :7])
    assert find_cross(traced) == [True]


def test_two_inputs_of_one_length_count_as_one_sequence() -> None:
    """As a module's that takes Q, K and V."""
    traced = trace(F.scaled_dot_product_attention, X, X + 1, X + 2)
    assert find_cross(traced) == [False]


def test_both_sides_computed_here() -> None:
    """One table of positions serves both, and tokens may be the very same."""
    model = make_model("pair", "sdpa")
    source, target, padding = make_inputs("pair", (40, 40))
    expected = [False, False, True, False, True]
    given = {"target": target, "padding": padding}
    assert trace_with(model, source=source, **given) == expected
    assert trace_with(model, source=target, **given) == expected


def test_a_memory_of_one_length_that_is_passed_in() -> None:
    x, memory, padding = (
        t.float() if t.is_floating_point() else t
        for t in make_inputs("decoder", (40, 40))
    )
    found = trace_with(
        make_model("decoder", "eager"), x=x, memory=memory, padding=padding
    )
    assert found == [False, True] * 2


class SharedKeys(nn.Module):
    """The second layer reads the keys of the first."""

    def forward(self, x: Tensor) -> Tensor:
        k = x.sin()
        x = x + F.scaled_dot_product_attention(x.cos(), k, k)
        return x + F.scaled_dot_product_attention(x.cos(), k, k)


def test_keys_of_an_earlier_layer_are_own() -> None:
    assert trace_with(SharedKeys(), x=X) == [False, False]


class Conditioned(nn.Module):
    """Keys alone read a vector of conditions."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer("sdpa", is_cross=False)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y = self.layer(x, None, None)
        k = (y + time[:, None, None]).unflatten(2, (4, -1)).transpose(1, 2)
        q = y.unflatten(2, (4, -1)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, k)


def test_a_number_for_keys_alone_makes_no_other_sequence() -> None:
    x = torch.randn(2, 10, 32)
    assert trace_with(Conditioned(), x=x, time=torch.randn(2)) == [False, False]
