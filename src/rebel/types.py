"""The nouns of REBEL and what it asks of a model, a sampler and a reward.

Letters in the shapes: G completions of one prompt, N traces of a batch, M pairs, S segments of a trace, C columns of a
regression (none for that of the whole trajectory).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Protocol, TypeVar, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor, nn

Trace = TypeVar("Trace")
TraceIn = TypeVar("TraceIn", contravariant=True)
TraceOut = TypeVar("TraceOut")

Content = str | list[dict[str, str]]
"""Plain text, or the messages of a chat."""

OWN, DATA = "policy", "data"
"""Sources of completions: drawn by the policy that is trained, or written by somebody else."""

LogProb = Callable[[Sequence[Any]], Float[Tensor, "N S"]]
"""log pi(y|x) of every trace, in nats: a policy, or anything that stands in for one, such as a reference."""

Pairing = Callable[[Float[Tensor, "G G"]], Int[Tensor, "M 2"]]
"""Which completions of one prompt to compare, from their margins (antisymmetric, NaN where nobody compared)."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """x: text or chat messages, and the other columns of its row."""

    content: Content
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Completion(Generic[Trace]):
    """y: what a reward reads, what a policy re-scores, who drew it, and whether it came to its own end.

    Text comes to its own end where no length limit cuts it off, an image where no safety checker blacks it out.
    """

    content: Any
    trace: Trace
    source: str = OWN
    finished: bool = True


@dataclass(frozen=True, slots=True)
class Rollout(Generic[Trace]):
    """A prompt with its completions."""

    prompt: Prompt
    completions: tuple[Completion[Trace], ...]

    @property
    def traces(self) -> list[Trace]:
        return [completion.trace for completion in self.completions]


@dataclass(frozen=True, slots=True)
class Scored(Generic[Trace]):
    """A rollout with either a reward for each completion or a margin for each pair of them.

    Margins are antisymmetric, margins[i, j] = "i over j", and NaN where nobody compared.
    """

    rollout: Rollout[Trace]
    rewards: Float[Tensor, " G"] | None = None
    margins: Float[Tensor, "G G"] | None = None
    components: Mapping[str, Float[Tensor, " G"]] = field(default_factory=dict)
    beginnings: Float[Tensor, "G K"] | None = None
    """The reward of the first stretch of a completion, of its first two, ...; NaN where it has ended by then."""
    gains: Float[Tensor, "G C"] | None = None
    """What each stretch changed in the reward to be expected. A row sums to the reward less the group's mean."""

    def pair_margins(self) -> Float[Tensor, "G G"]:
        """r_i - r_j of every pair: a margin matrix as it is, rewards as their differences."""
        if self.margins is not None:
            return self.margins
        assert self.rewards is not None, "a scored rollout has rewards or margins"
        return self.rewards[:, None] - self.rewards[None, :]


@dataclass(frozen=True, slots=True)
class RegressionBatch(Generic[Trace]):
    """What one least-squares step needs. `margin` is of the shaped reward r~; the weights sum to one over a step.

    With a margin of its own for each of C columns the weights sum to 1 / C: the loss is the sum of the columns' losses.
    """

    traces: tuple[Trace, ...]
    anchor_logp: Float[Tensor, "N *C"]
    pairs: Int[Tensor, "M 2"]
    margin: Float[Tensor, "M *D"]
    weight: Float[Tensor, " M"]


@dataclass(frozen=True, slots=True)
class TokenTrace:
    """Token ids as they were sampled, never re-tokenised; `mask` marks those of the completion the policy wrote."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    mask: tuple[bool, ...] | None = None

    def __post_init__(self) -> None:
        if self.mask is not None and len(self.mask) != len(self.completion):
            raise ValueError(f"a mask of {len(self.mask)} flags for a completion of {len(self.completion)} tokens")

    @property
    def written(self) -> tuple[bool, ...]:
        return self.mask if self.mask is not None else (True,) * len(self.completion)

    @property
    def tokens_written(self) -> int:
        """How many tokens of the completion the policy wrote."""
        return len(self.completion) if self.mask is None else sum(self.mask)

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


@dataclass(frozen=True, slots=True, eq=False)
class LatentTrace:
    """A denoising path as it was drawn: x_T, ..., x_0 in the precision in which the model saw them, and its prompt.

    `drawn_logp` is log p of each step that had noise as the sampler found it: to compare with, never to regress on.
    """

    prompt: str
    latents: Float[Tensor, "T1 ..."]
    drawn_logp: Float[Tensor, " S"] | None = None

    def __len__(self) -> int:
        """Denoising steps."""
        return len(self.latents) - 1


Credit = Callable[[Float[Tensor, "N S"]], Float[Tensor, "N *C"]]
"""The columns that a regression makes of the segments of a trace: see `rebel.credit`."""


@runtime_checkable
class Policy(Protocol[TraceIn]):
    """A model that can be re-scored: log pi_theta(y|x), differentiable.

    `scorer` is the module that accelerate prepares: its forward computes the log-probabilities. A policy is a
    dataclass, so that the learner can replace its scorer by the prepared one.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def scorer(self) -> nn.Module: ...

    def log_prob(self, traces: Sequence[TraceIn]) -> Float[Tensor, "N S"]:
        """Sums of log-probabilities in nats, one column for each segment of a trace."""
        ...

    def backward(
        self,
        traces: Sequence[TraceIn],
        weigh: Callable[[Float[Tensor, "N S"]], Float[Tensor, "N S"]],
        backward: Callable[[Tensor], None],
    ) -> Float[Tensor, "N S"]:
        """Back-propagate sum(c * log_prob) with c = weigh(log_prob, detached); returns the log-probabilities."""
        ...

    def divergence(self, traces: Sequence[TraceIn], before: Sequence[Tensor]) -> Float[Tensor, "N S"]:
        """KL in nats to the policy with the trainable parameters `before`, along each trace.

        Of the whole distribution at every place that the policy wrote, and not of what was drawn there alone.
        """
        ...

    def cost(self, traces: Sequence[TraceIn]) -> int:
        """What traces cost together in one micro-batch: tokens for text, images for images."""
        ...


@runtime_checkable
class Sampler(Protocol[TraceOut]):
    """Draws groups of completions; streams, so that scoring can begin before the last prompt is done."""

    def __call__(self, prompts: Sequence[Prompt], group_size: int, seed: int) -> Iterator[Rollout[TraceOut]]: ...

    def refresh(self) -> None:
        """Make the sampler draw from the policy as it is now (weight synchronisation)."""
        ...

    def close(self) -> None:
        """Nothing is drawn for a while: memory that only drawing needs may be given back until it goes on."""
        ...


@runtime_checkable
class Reward(Protocol[Trace]):
    """Scores whole groups, so that a judge of pairs needs no second path.

    A completion without any value has the reward NaN and leaves its group.
    """

    def __call__(self, rollouts: Sequence[Rollout[Trace]]) -> list[Scored[Trace]]: ...


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two completions of a prompt, as a reward reads them, in the order in which a judge is to see them."""

    prompt: Prompt
    first: Any
    second: Any


@runtime_checkable
class Judge(Protocol):
    """P(first > second | x) of each comparison, from 0 to 1 with 0.5 for a tie; None where it has no answer.

    Nothing requires that the preferences are transitive, or that they come from a reward.
    """

    @property
    def name(self) -> str: ...

    def __call__(self, comparisons: Sequence[Comparison]) -> list[float | None]: ...
