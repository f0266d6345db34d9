"""What the demo runs, what its ranks say meanwhile, and what comes out."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

TOLERANCE = 1e-5
"""Outputs, loss and gradients against eager in float64, as a share of the largest."""

SMALL_GRADIENT = 1e-2
"""A gradient is compared with at least this share of the model's largest: one that is 0
in exact arithmetic has no relative error."""


@dataclass(frozen=True, slots=True)
class DemoSize:
    """What the demo runs.

    Attributes:
        ranks: processes, P.
        layers: of the model.
        length: tokens S.
        hidden: width of the model.
        heads: query heads H.
        kv_heads: KV heads G.
        vocabulary: tokens there are.
    """

    ranks: int = 4
    layers: int = 4
    length: int = 1024
    hidden: int = 256
    heads: int = 8
    kv_heads: int = 2
    vocabulary: int = 1024


class Stage(Enum):
    """What a rank is doing now."""

    IMPORT = "importing torch and transformers"
    MEET = "meeting the other ranks"
    FORWARD = "compiling and running forward"
    BACKWARD = "compiling and running backward"
    AGAIN = "running both again"
    EAGER = "running eager in float32 and float64"
    WAIT = "waiting for eager's results"
    COMPARE = "comparing with eager"
    EXPLAIN = "reading the plan"
    DONE = "done"


@dataclass(frozen=True, slots=True)
class Errors:
    """How far a run is from eager in float64, as shares of the largest value.

    Attributes:
        loss: the loss itself.
        loss_error: of the loss.
        logits: worst of all logits.
        gradient: worst of all parameters' gradients.
        gradient_name: the parameter it belongs to.
    """

    loss: float
    loss_error: float
    logits: float
    gradient: float
    gradient_name: str

    @property
    def is_small(self) -> bool:
        """Whether all are within tolerance; NaN is not."""
        worst = (self.loss_error, self.logits, self.gradient)
        return all(error <= TOLERANCE for error in worst)


@dataclass(frozen=True, slots=True)
class Run:
    """One run of the model.

    Attributes:
        errors: against eager in float64.
        peak_bytes: resident memory of the process at its peak so far.
        first_s: seconds of the first forward and backward, compiling included.
        next_s: seconds of the second.
    """

    errors: Errors
    peak_bytes: int
    first_s: float
    next_s: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What ``explain`` says of the model.

    Attributes:
        rings: attentions that became rings.
        attentions: attentions there are.
        sent_bytes: sent in one forward and backward, by rank.
    """

    rings: int
    attentions: int
    sent_bytes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RankResult:
    """What came out on one rank.

    Attributes:
        compiled: the run of the compiled model.
        eager: eager's in float32; rank 0 has it, the others None.
        plan: what was planned; likewise.
    """

    compiled: Run
    eager: Run | None = None
    plan: Plan | None = None


@dataclass(frozen=True, slots=True)
class Results:
    """What came out.

    Attributes:
        ranks: the run of the compiled model on each rank.
        eager: eager's in float32.
        plan: what was planned.
    """

    ranks: tuple[Run, ...]
    eager: Run
    plan: Plan

    @classmethod
    def of(cls, results: Sequence[RankResult]) -> "Results":
        """Join what ranks report."""
        eager, plan = results[0].eager, results[0].plan
        assert eager is not None, "rank 0 runs eager"
        assert plan is not None, "rank 0 reads the plan"
        return cls(tuple(r.compiled for r in results), eager, plan)

    @property
    def is_right(self) -> bool:
        """Whether the compiled model did what it should on every rank."""
        all_ring = 0 < self.plan.attentions == self.plan.rings
        return all_ring and all(run.errors.is_small for run in self.ranks)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a rank gave up: a traceback."""

    text: str
