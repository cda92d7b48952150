"""Evaluations during a run."""

from __future__ import annotations

from rebel.config import RebelConfig
from rebel.validate.said import Complaints, said


def evaluation(config: RebelConfig) -> Complaints:
    """What is asked of an evaluation has prompts, and a judge where it compares."""
    if config.load_best_model_at_end and (config.eval_strategy == "no" or config.eval_prompts == 0):
        yield (
            f"--load_best_model_at_end has nothing to choose: {said(config, 'eval_strategy', 'eval_prompts')}; "
            "use --eval_strategy steps and some --eval_prompts"
        )
    if config.eval_against and not config.eval_judge:
        yield f"{said(config, 'eval_against')} needs somebody who compares: give --eval_judge"
    if config.eval_judge and not config.eval_against:
        yield f"{said(config, 'eval_judge')} has nothing to compare with: give --eval_against"
    if config.eval_against and config.eval_prompts == 0:
        yield f"{said(config, 'eval_against')} needs prompts to compare on; use some --eval_prompts"
