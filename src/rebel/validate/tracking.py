"""Experiment trackers, by the names that transformers has for them."""

from __future__ import annotations

import difflib

from rebel.config import RebelConfig
from rebel.validate.said import Complaints

TRACKERS = (
    *("azure_ml", "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "flyte", "kubeflow", "mlflow", "neptune"),
    *("swanlab", "tensorboard", "trackio", "wandb"),
)


def tracking(config: RebelConfig) -> Complaints:
    """Every name is one that transformers knows; whether its package is there is seen when it starts."""
    names = ("none", "all", *TRACKERS)
    for name in config.report_to:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"{', '.join(names[:-1])} or {names[-1]} is expected"
            yield f"--report_to {name} is no tracker of transformers; {hint}"
