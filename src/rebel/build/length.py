"""How long a run is."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rebel.build.rounds import in_rounds, iterations_of_rounds, round_size
from rebel.config import RebelConfig
from rebel.offline.recorded import Groups
from rebel.types import Prompt


def iterations_of(config: RebelConfig, training: Sequence[Prompt] | Groups) -> int:
    """Iterations of the run, from --rounds, --iterations, --num_train_epochs or --max_steps."""
    if in_rounds(config) and not isinstance(training, Groups):
        return iterations_of_rounds(config, round_size(config, training))
    if config.iterations is not None:
        return config.iterations
    if config.num_train_epochs is not None:
        return math.ceil(config.num_train_epochs * len(training) / config.prompts_per_iteration)
    return math.ceil(config.max_steps / (config.steps_per_iteration * config.passes))
