"""Models whose attentions read another sequence, and one step of each."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

E, H, VOCABULARY = 32, 4, 50


class Attention(nn.Module):
    """Queries of one sequence over keys of another, or of the same.

    ``spelling``: ``sdpa``, ``grouped`` (two KV heads) or ``eager``.
    """

    def __init__(self, spelling: str, dropout: float = 0.0) -> None:
        super().__init__()
        self.spelling = spelling
        self.dropout = dropout
        self.kv_heads = 2 if spelling == "grouped" else H
        size = self.kv_heads * E // H
        self.q, self.out = nn.Linear(E, E), nn.Linear(E, E)
        self.k, self.v = nn.Linear(E, size), nn.Linear(E, size)

    def forward(
        self, x: Tensor, y: Tensor, kept: Tensor | None, *, is_causal: bool = False
    ) -> Tensor:
        q = self.q(x).unflatten(2, (H, -1)).transpose(1, 2)
        k, v = (
            project(y).unflatten(2, (self.kv_heads, -1)).transpose(1, 2)
            for project in (self.k, self.v)
        )
        out = self._attend(q, k, v, kept, is_causal=is_causal)
        mixed: Tensor = self.out(out.transpose(1, 2).flatten(2))
        return mixed

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, kept: Tensor | None, *, is_causal: bool
    ) -> Tensor:
        if self.spelling != "eager":
            return F.scaled_dot_product_attention(
                *(q, k, v),
                attn_mask=kept,
                is_causal=is_causal,
                enable_gqa=self.spelling == "grouped",
                dropout_p=self.dropout,
            )
        scores = q @ k.mT / 8**0.5
        lowest = torch.finfo(scores.dtype).min
        if is_causal:
            ahead = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(ahead, lowest)
        if kept is not None:
            scores = scores.masked_fill(~kept, lowest)
        return scores.softmax(-1) @ v


class Layer(nn.Module):
    """A layer of an encoder, or with keys of another sequence of a decoder."""

    def __init__(self, spelling: str, *, is_cross: bool) -> None:
        super().__init__()
        self.own = Attention(spelling)
        self.cross = Attention(spelling) if is_cross else None
        self.norms = nn.ModuleList(nn.LayerNorm(E) for _ in range(3))
        self.feed = nn.Sequential(nn.Linear(E, 2 * E), nn.GELU(), nn.Linear(2 * E, E))

    def forward(self, x: Tensor, memory: Tensor | None, kept: Tensor | None) -> Tensor:
        of_own = kept if self.cross is None else None
        y = self.norms[0](x)
        x = x + self.own(y, y, of_own, is_causal=self.cross is not None)
        if self.cross is not None:
            assert memory is not None
            x = x + self.cross(self.norms[1](x), memory, kept)
        out: Tensor = x + self.feed(self.norms[2](x))
        return out


class Decoder(nn.Module):
    """Reads a memory that is passed in, as ``nn.TransformerDecoder`` does."""

    def __init__(self, spelling: str, *, is_checkpointed: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(spelling, is_cross=True) for _ in range(2))
        self.is_checkpointed = is_checkpointed

    def forward(self, x: Tensor, memory: Tensor, padding: Tensor | None) -> Tensor:
        kept = None if padding is None else padding[:, None, None]
        for layer in self.layers:
            if self.is_checkpointed:
                x = checkpoint(layer, x, memory, kept, use_reentrant=False)
            else:
                x = layer(x, memory, kept)
        return x


class EncoderDecoder(nn.Module):
    """Both sequences are computed here; one table of learned positions for both."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, E)
        self.places = nn.Embedding(128, E)
        self.encoder = Layer(spelling, is_cross=False)
        self.norm = nn.LayerNorm(E)
        self.decoder = Decoder(spelling)

    def forward(self, source: Tensor, target: Tensor, padding: Tensor) -> Tensor:
        memory = self.norm(
            self.encoder(self._embed(source), None, padding[:, None, None])
        )
        y = self.decoder(self._embed(target), memory, padding)
        logits: Tensor = y @ self.tokens.weight.mT
        return logits

    def _embed(self, ids: Tensor) -> Tensor:
        places = self.places(torch.arange(ids.shape[1]))
        embedded: Tensor = self.tokens(ids) + places
        return embedded


class Latents(nn.Module):
    """Learned queries read a long input, then themselves (as in a Perceiver)."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(12, E))
        self.read, self.mix = Attention(spelling), Attention(spelling)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        latents = self.latents.expand(x.shape[0], -1, -1)
        latents = latents + self.read(latents, x, padding[:, None, None])
        out: Tensor = latents + self.mix(latents, latents, None)
        return out


class Pixels(nn.Module):
    """Tokens read the rows and columns of an image, which are no single extent."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, E, 2, 2)
        self.layer = Layer(spelling, is_cross=True)

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        memory = self.patches(image).flatten(2).transpose(1, 2)
        out: Tensor = self.layer(x, memory, None)
        return out


class Cached(nn.Module):
    """New tokens read those before them, whose keys are passed in, and themselves."""

    def __init__(self, _spelling: str) -> None:
        super().__init__()
        self.project = nn.Linear(E, 3 * E)

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        q, k, v = (
            y.unflatten(2, (H, -1)).transpose(1, 2)
            for y in self.project(x).chunk(3, -1)
        )
        k, v = torch.cat([past, k], 2), torch.cat([past.sin(), v], 2)
        at = torch.arange(k.shape[2])
        kept = at[past.shape[2] :, None] >= at
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=kept)
        return out.transpose(1, 2).flatten(2)


class Plain(nn.Module):
    """A norm without eps right behind attention, so that zeros there would be NaN."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.read, self.norm = Attention(spelling), nn.LayerNorm(E, eps=0.0)
        self.out = nn.Linear(E, E)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        q, k = (t.unflatten(2, (H, -1)).transpose(1, 2) for t in (x, memory))
        y = self.read._attend(q, k, k, None, is_causal=False)
        out: Tensor = self.out(self.norm(y.transpose(1, 2).flatten(2)))
        return out


class Biased(nn.Module):
    """A learned bias is added to each score of 10 queries and 17 keys."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.read, self.bias = Attention(spelling), nn.Parameter(torch.randn(H, 10, 17))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        out: Tensor = self.read(x, memory, self.bias)
        return out


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one step gives.

    Attributes:
        out: the model's output.
        grads: by name, of parameters and of inputs that require one.
    """

    out: Tensor
    grads: dict[str, Tensor | None] = field(default_factory=dict)


def make_model(name: str, spelling: str) -> nn.Module:
    torch.manual_seed(3)
    kinds: dict[str, Callable[[], nn.Module]] = {
        "pair": lambda: EncoderDecoder(spelling),
        "decoder": lambda: Decoder(spelling),
        "checkpointed decoder": lambda: Decoder(spelling, is_checkpointed=True),
        "latents": lambda: Latents(spelling),
        "pixels": lambda: Pixels(spelling),
        "cached": lambda: Cached(spelling),
        "plain": lambda: Plain(spelling),
        "biased": lambda: Biased(spelling),
    }
    return kinds[name]()


def make_inputs(name: str, lengths: tuple[int, int]) -> tuple[Tensor, ...]:
    """Of so many queries and keys (of ``cached``: earlier ones), padded on the right."""
    S, keys = lengths
    random = torch.Generator().manual_seed(1)
    padding = torch.ones(2, keys, dtype=torch.bool)
    padding[1, keys - keys // 3 :] = False
    if name == "pair":
        sizes = ((2, keys), (2, S))
        ids = (torch.randint(VOCABULARY, s, generator=random) for s in sizes)
        return *ids, padding
    if name in {"pixels", "cached"}:
        x = torch.randn(2, S, E, generator=random)
        size = (2, 3, 4, keys) if name == "pixels" else (2, H, keys, E // H)
        return x.double(), torch.randn(size, generator=random).double()
    x, memory = (torch.randn(2, n, E, generator=random).double() for n in lengths)
    if name in {"plain", "biased"}:
        return x, memory
    return (memory, padding) if name == "latents" else (x, memory, padding)


def run_step(
    model: nn.Module,
    call: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    *,
    needs_grad: bool = True,
) -> Outcome:
    """Forward, and backward of a loss of the whole output."""
    dtype = next(model.parameters()).dtype
    own = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
    own = [x.clone().requires_grad_(needs_grad and x.is_floating_point()) for x in own]
    model.zero_grad()
    if not needs_grad:
        with torch.no_grad():
            return Outcome(call(*own))
    out = call(*own)
    weights = torch.linspace(0.5, 1.5, out.numel(), dtype=torch.float64).view(out.shape)
    (out * weights.to(dtype)).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    grads |= {f"input {n}": x.grad for n, x in enumerate(own) if x.requires_grad}
    return Outcome(out.detach(), grads)
