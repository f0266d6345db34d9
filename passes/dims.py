"""Dims as products of factors: how the sequence runs through a graph.

A factor is one extent that ops pass around whole: batch, sequence, heads, features. A
dim is a tuple of factors (empty for size 1): ``view(B * S, E)`` has dims ``((b, s),
(e,))``. Factors that must be equal are united, so the factor of Q's sequence names the
sequence everywhere. Invariant: a dim's size is the product of its factors' sizes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ringcompile.torch_private import size_hint, sizes_equal

Size = int | torch.SymInt
Dim = tuple[int, ...]
Dims = tuple[Dim, ...]


@dataclass(slots=True)
class Factors:
    """All factors of one graph, and which of them are the same."""

    sizes: list[Size] = field(default_factory=list)
    _parent: list[int] = field(default_factory=list)

    def new(self, size: Size) -> Dim:
        """A dim of one new factor; the empty dim for size 1."""
        if isinstance(size, int) and size == 1:
            return ()
        self.sizes.append(size)
        self._parent.append(len(self._parent))
        return (len(self.sizes) - 1,)

    def new_dims(self, shape: Sequence[Size]) -> Dims:
        """New dims for a tensor that nothing is known of."""
        return tuple(self.new(size) for size in shape)

    def find(self, factor: int) -> int:
        """The representative of all factors united with this one."""
        while self._parent[factor] != factor:
            self._parent[factor] = self._parent[self._parent[factor]]
            factor = self._parent[factor]
        return factor

    def unite(self, a: Dim, b: Dim) -> None:
        """Say that two dims of the same size are the same, where both are cut alike."""
        if len(a) != len(b):
            return
        if all(
            sizes_equal(self.sizes[x], self.sizes[y]) for x, y in zip(a, b, strict=True)
        ):
            for x, y in zip(a, b, strict=True):
                self._parent[self.find(y)] = self.find(x)

    def place_of(self, dims: Dims, axis: int) -> list[tuple[int, int]]:
        """Each ``(dim, place within the dim)`` where the factor ``axis`` occurs."""
        axis = self.find(axis)
        return [
            (d, i)
            for d, dim in enumerate(dims)
            for i, factor in enumerate(dim)
            if self.find(factor) == axis
        ]

    def product(self, factors: Dim) -> Size:
        """The size of a dim made of these factors."""
        size: Size = 1
        for factor in factors:
            size = size * self.sizes[factor]
        return size

    def view(self, dims: Dims, shape: Sequence[Size]) -> Dims:
        """Dims after a view: factors are laid end to end and cut anew.

        A factor that the new shape cuts in two is replaced by new factors. Of an empty
        value nothing can be told.
        """
        if any(size_hint(size) == 0 for size in shape):
            return self.new_dims(shape)
        rest = [factor for dim in dims for factor in dim]
        out: list[Dim] = []
        for place, size in enumerate(shape):
            taken = self._take(rest, size)
            if taken is None:
                return (*out, *self.new_dims(shape[place:]))
            out.append(taken)
        return tuple(out)

    def _take(self, rest: list[int], size: Size) -> Dim | None:
        """Take leading factors whose product is ``size``; split the last if needed."""
        taken: list[int] = []
        have: Size = 1
        while not sizes_equal(have, size):
            if not rest:
                return None
            factor = rest.pop(0)
            grown = have * self.sizes[factor]
            if size_hint(grown) <= size_hint(size):
                taken.append(factor)
                have = grown
                continue
            if size_hint(size) % size_hint(have) or size_hint(grown) % size_hint(size):
                return None
            head, tail = self.new(size // have), self.new(grown // size)
            rest[:0] = tail
            return (*taken, *head)
        return tuple(taken)
