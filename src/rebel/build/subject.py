"""What a run tunes, a language model or a pipeline, with all that depends on which of them it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from rebel.build.offline import Rows
from rebel.build.online import Parts
from rebel.learner import Learner
from rebel.offline.recorded import Groups
from rebel.types import LogProb, Policy, Prompt

Data = tuple[Sequence[Prompt], Sequence[Prompt]] | tuple[Rows, Rows | None]
"""What to train and to evaluate on: prompts, or offline rows with completions."""


@dataclass(frozen=True, slots=True)
class Subject:
    """The policy that is tuned; the model in it and what trackers get as its processing class.

    `budget` is the cost of one micro-batch in the policy's own unit, `training` what is trained on. `parts` makes the
    parts of the run from (learner, reward, notes, iterates, say), `plan` its plan in words from (parts, iterations,
    whether an average is kept); `save` writes the policy of a learner into a folder.
    """

    policy: Policy
    model: nn.Module
    processing: Any
    reference: LogProb | None
    budget: int
    training: Sequence[Prompt] | Groups
    parts: Callable[..., Parts]
    plan: Callable[[Parts, int, bool], list[str]]
    save: Callable[[Learner, Path], None]
