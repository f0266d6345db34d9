"""What only looks like attention over the sequence, and must be left alone.

Each row is a module on (B, S, E) that gives (B, S, E); ``beside_attention`` puts it into
a model with one real attention.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.spellings import D, E, H, Heads, S, Spelling

EXPERTS = 4


class Router(nn.Module):
    """Mixture of experts: weights over experts, then a product with what those give."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(E, EXPERTS, bias=False)
        self.experts = nn.Parameter(torch.randn(EXPERTS, E, E) * E**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(x @ self.gate.weight.T, dim=-1)
        given = torch.einsum("bse,nef->bsnf", x, self.experts)
        return (weights.unsqueeze(-2) @ given).squeeze(-2)


class SoftMemory(nn.Module):
    """``softmax(q W) W2``: rows of a parameter, not tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.randn(E, S))
        self.values = nn.Parameter(torch.randn(S, E))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.keys * E**-0.5).softmax(-1) @ self.values  # type: ignore[no-any-return]


class MemoryOfHeads(nn.Module):
    """The same with four dims: external attention."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.randn(H, S, D))
        self.values = nn.Parameter(torch.randn(H, S, D))

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (H, D)).transpose(1, 2)
        mixed = (q @ self.keys.mT * D**-0.5).softmax(-1) @ self.values
        return mixed.transpose(1, 2).flatten(2)  # type: ignore[no-any-return]


class Gate(nn.Module):
    """A softmax over features."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(E, E), nn.Linear(E, E)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x).softmax(-1) * x)  # type: ignore[no-any-return]


class Linear(nn.Module):
    """Linear attention: features of k and v are summed over the tokens first."""

    def __init__(self, features: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.features = features
        self.q, self.k, self.v = (nn.Linear(E, E) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            f(x).unflatten(-1, (H, D)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        q, k = self.features(q), self.features(k)
        total = q @ k.sum(2, keepdim=True).mT
        return ((q @ (k.mT @ v)) / total).transpose(1, 2).flatten(2)  # type: ignore[no-any-return]


class Efficient(Linear):
    """Efficient attention: q over features, k over tokens, each a softmax of its own."""

    def __init__(self) -> None:
        super().__init__(lambda t: t)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            f(x).unflatten(-1, (H, D)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        context = k.softmax(dim=2).mT @ v
        return (q.softmax(dim=-1) @ context).transpose(1, 2).flatten(2)  # type: ignore[no-any-return]


class OverHeads(nn.Module):
    """Each token's heads look at each other."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(E, E) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (H, D)) for f in (self.q, self.k, self.v))
        return ((q @ k.mT * D**-0.5).softmax(-1) @ v).flatten(2)  # type: ignore[no-any-return]


class OverChannels(nn.Module):
    """XCiT: scores of channels with channels, summed over the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(E, 3 * E)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = self.qkv(x).view(b, s, 3, H, D).permute(2, 0, 3, 4, 1).unbind(0)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        mixed = (q @ k.mT).softmax(-1) @ v
        return mixed.permute(0, 3, 1, 2).reshape(b, s, E)  # type: ignore[no-any-return]


class Pooled(nn.Module):
    """One learned query: a softmax over tokens of one score each."""

    def __init__(self) -> None:
        super().__init__()
        self.score, self.out = nn.Linear(E, 1), nn.Linear(E, E)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.score(x).squeeze(-1).softmax(dim=1)
        pooled = torch.bmm(weights.unsqueeze(1), x)
        return x + self.out(pooled)  # type: ignore[no-any-return]


class Gathered(nn.Module):
    """Squeeze and excite: the mean of all tokens, a gate for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(E, D), nn.Linear(D, E)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.up(F.relu(self.down(x.mean(1)))).softmax(-1)
        return x * gate.unsqueeze(1)  # type: ignore[no-any-return]


class Classifier(nn.Module):
    """A softmax over a vocabulary, and the mean embedding by it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(19, E)

    def forward(self, x: Tensor) -> Tensor:
        weights = F.softmax(F.linear(x, self.table.weight), dim=-1)
        return torch.matmul(weights, self.table.weight)


class Mixture(nn.Module):
    """A mixture of softmaxes over the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.prior, self.latent = nn.Linear(E, EXPERTS), nn.Linear(E, EXPERTS * E)
        self.table = nn.Parameter(torch.randn(19, E))

    def forward(self, x: Tensor) -> Tensor:
        latent = self.latent(x).unflatten(-1, (EXPERTS, E)).tanh()
        each = (latent @ self.table.T).softmax(-1)
        mixed = (self.prior(x).softmax(-1).unsqueeze(-2) @ each).squeeze(-2)
        return mixed @ self.table  # type: ignore[no-any-return]


class Contrastive(nn.Module):
    """Logits of every sample of the batch with every other, at each token."""

    def forward(self, x: Tensor) -> Tensor:
        rows = F.normalize(x, dim=-1).transpose(0, 1)
        weights = (rows @ rows.mT * 5).softmax(-1)
        return (weights @ rows).transpose(0, 1)


class ContrastiveOfMeans(nn.Module):
    """The same of whole sequences."""

    def forward(self, x: Tensor) -> Tensor:
        means = F.normalize(x.mean(1), dim=-1)
        weights = (means @ means.T * 5).softmax(-1)
        return x + (weights @ means).unsqueeze(1)


class ContrastiveLogits(nn.Module):
    """CLIP's: which sample of the batch is which, as a gate."""

    def forward(self, x: Tensor) -> Tensor:
        means = F.normalize(x.mean(1), dim=-1)
        own = (means @ means.T * 5).softmax(-1).diagonal()
        return x * own[:, None, None]


class Quantised(nn.Module):
    """A codebook looked up softly, with a fixed noise: Gumbel's softmax."""

    noise: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.randn(11, E))
        noise = torch.rand(11, generator=torch.Generator().manual_seed(4))
        self.register_buffer("noise", -(-(noise.clamp(1e-3).log())).log())

    def forward(self, x: Tensor) -> Tensor:
        weights = ((x @ self.codes.T + self.noise) / 0.7).softmax(-1)
        return weights @ self.codes


class SigmoidScores(nn.Module):
    """No softmax: it mixes tokens, so it runs whole, and exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(E, E), nn.Linear(E, E)

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.q(x) @ self.k(x).mT * E**-0.5).sigmoid()
        return weights @ x / S  # type: ignore[no-any-return]


class SoftmaxOfSamples(nn.Module):
    """A softmax over the batch, of scores of tokens."""

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.einsum("bse,cse->bcs", x, x) * E**-0.5
        return torch.einsum("bcs,cse->bse", scores.softmax(1), x)


class DynamicFilter(nn.Module):
    """A softmax over the taps of a small filter, made by each token."""

    def __init__(self) -> None:
        super().__init__()
        self.taps = nn.Linear(E, 3)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.taps(x).softmax(-1)
        padded = F.pad(x, (0, 0, 1, 1))
        pieces = torch.stack([padded[:, i : i + x.shape[1]] for i in range(3)], dim=2)
        return (weights.unsqueeze(2) @ pieces).squeeze(2)  # type: ignore[no-any-return]


class Slots(nn.Module):
    """Slot attention: a few learned slots compete for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = nn.Parameter(torch.randn(1, 5, E))
        self.k, self.v = nn.Linear(E, E), nn.Linear(E, E)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.k(x) @ self.slots.mT * E**-0.5
        weights = logits.softmax(-1)
        weights = weights / weights.sum(1, keepdim=True)
        filled = weights.mT @ self.v(x)
        return logits.softmax(-1) @ filled  # type: ignore[no-any-return]


class PooledBySums(nn.Module):
    """One learned query, by products that are summed."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.out = nn.Parameter(torch.randn(E)), nn.Linear(E, E)

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.query * x).sum(-1).softmax(dim=1)
        pooled = (weights[..., None] * x).sum(1)
        return x + self.out(pooled)[:, None]  # type: ignore[no-any-return]


class OverHeadsBySums(nn.Module):
    """Each token's heads look at each other, by products that are summed."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(E, E) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (H, D)) for f in (self.q, self.k, self.v))
        weights = (q[..., None, :] * k[..., None, :, :]).sum(-1).softmax(-1)
        return (weights[..., None] * v[..., None, :, :]).sum(-2).flatten(2)  # type: ignore[no-any-return]


class DividedLate(Linear):
    """Exps of features, divided by their own sum once they met a context."""

    def __init__(self) -> None:
        super().__init__(torch.exp)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            f(x).unflatten(-1, (H, D)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        e = self.features(q)
        mixed = (e @ (k.softmax(2).mT @ v)) / e.sum(-1, keepdim=True)
        return mixed.transpose(1, 2).flatten(2)  # type: ignore[no-any-return]


class GateOfExps(nn.Module):
    """Exps of features over one more than their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(E, E), nn.Linear(E, E)

    def forward(self, x: Tensor) -> Tensor:
        e = self.inner(x).exp()
        return self.outer(e / (1 + e.sum(-1, keepdim=True)) * x)  # type: ignore[no-any-return]


def _elu(x: Tensor) -> Tensor:
    return F.elu(x) + 1


LOOKALIKES: dict[str, Callable[[], nn.Module]] = {
    "router": Router,
    "softmax(q W) W2": SoftMemory,
    "softmax(q W) W2 of heads": MemoryOfHeads,
    "gate of features": Gate,
    "linear attention": lambda: Linear(_elu),
    "linear attention of exp": lambda: Linear(torch.exp),
    "efficient attention": Efficient,
    "over heads": OverHeads,
    "over channels": OverChannels,
    "pooling": Pooled,
    "squeeze and excite": Gathered,
    "classifier": Classifier,
    "mixture of softmaxes": Mixture,
    "logits of the batch": ContrastiveLogits,
    "codebook": Quantised,
    "sigmoid scores": SigmoidScores,
    "dynamic filter": DynamicFilter,
    "slots": Slots,
    "pooling by sums": PooledBySums,
    "over heads by sums": OverHeadsBySums,
    "divided late": DividedLate,
    "gate of exps": GateOfExps,
}

# Attention, but over the batch.
OTHER_AXES: dict[str, Callable[[], nn.Module]] = {
    "contrastive": Contrastive,
    "contrastive of means": ContrastiveOfMeans,
    "over the batch": SoftmaxOfSamples,
}


class Beside(nn.Module):
    """A real attention, then the look-alike, then the attention again."""

    def __init__(self, lookalike: nn.Module) -> None:
        super().__init__()
        self.first, self.second = Heads(_causal), Heads(_causal)
        self.lookalike = lookalike

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        x = x + self.lookalike(x)
        return x + self.second(x)  # type: ignore[no-any-return]


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _find(name: str) -> Callable[[], nn.Module]:
    return (LOOKALIKES | OTHER_AXES)[name]


def alone(name: str) -> Spelling:
    """The look-alike as a model of its own: nothing in it is an attention."""
    return Spelling(name, _find(name), num_regions=0)


def beside_attention(name: str) -> Spelling:
    """The look-alike between two attentions."""
    return Spelling(name, lambda: Beside(_find(name)()), num_regions=2)
