"""The model card: how the policy in a folder was made, from numbers alone."""

from __future__ import annotations

from importlib.metadata import version

from rebel.config import RebelConfig
from rebel.learner import Learner

CARD = """\
---
library_name: {library}
base_model: {base}
tags: [rebel, reinforcement-learning]
---

# {name}

{base} tuned with [REBEL](https://arxiv.org/abs/2404.16767): {what}, and the
differences of their log-probability ratios to {anchor} are regressed onto the differences of their
rewards.

| setting | value |
| --- | --- |
{rows}

Made with rebel-rl {rebel}, {versions}, after {steps} optimiser steps{average}.
{loading}
```bibtex
@inproceedings{{gao2024rebel,
  title = {{REBEL: Reinforcement Learning via Regressing Relative Rewards}},
  author = {{Gao, Zhaolin and Chang, Jonathan D. and Zhan, Wenhao and Oertell, Owen and Swamy, Gokul and
            Brantley, Kiant{{\\'e}} and Joachims, Thorsten and Bagnell, J. Andrew and Lee, Jason D. and Sun, Wen}},
  booktitle = {{Advances in Neural Information Processing Systems}},
  year = {{2024}}
}}
```
"""

SHOWN = (
    "offline",
    "reward_funcs",
    "dataset_name",
    "eta",
    "kl_per_iteration",
    "beta",
    "credit",
    "pairing",
    "num_generations",
    "prompts_per_iteration",
    "steps_per_iteration",
    "passes",
    "temperature",
    "max_completion_length",
    "learning_rate",
    "seed",
)


SHOWN_OF_IMAGES = (
    *(
        "algorithm",
        "reward_funcs",
        "judge_funcs",
        "dataset_name",
        "eta",
        "kl_per_iteration",
        "beta",
        "credit",
        "pairing",
    ),
    *("num_generations", "prompts_per_iteration", "steps_per_iteration", "passes", "denoising_steps", "guidance_scale"),
    *("noise_level", "noise_floor", "image_size", "learning_rate", "seed"),
)


def model_card(config: RebelConfig, learner: Learner) -> str:
    """Markdown with the settings that made the model."""
    return filled(
        config,
        learner,
        SHOWN,
        library="peft" if config.adapter else "transformers",
        base=config.model_name_or_path or "the initial model",
        what="several recorded completions of a prompt are compared"
        if config.offline
        else "several completions of a prompt are drawn",
        anchor="the initial policy" if config.offline else "the policy that drew them",
    )


def pipeline_card(config: RebelConfig, learner: Learner, pipeline: str) -> str:
    """Markdown with the settings that made the pipeline of that class, and how to load it."""
    base = config.pipeline_name_or_path or "the initial pipeline"
    load = f"pipeline = {pipeline}.from_pretrained({base!r})\npipeline.load_lora_weights(FOLDER)"
    whole = f"pipeline = {pipeline}.from_pretrained(FOLDER)"
    return filled(
        config,
        learner,
        SHOWN_OF_IMAGES,
        library="diffusers",
        base=base,
        what="several images of a prompt are drawn",
        anchor="the policy that drew them",
        loading=f"\n```python\n{load if config.adapter else whole}\n```\n",
    )


def filled(
    config: RebelConfig, learner: Learner, shown: tuple[str, ...], library: str, loading: str = "", **words: str
) -> str:
    libraries = ("diffusers" if library == "diffusers" else "transformers", "torch")
    return CARD.format(
        **words,
        library=library,
        loading=loading,
        name=config.run_name or config.hub_model_id or "REBEL policy",
        rows="\n".join(f"| {name} | {getattr(config, name)} |" for name in shown),
        rebel=version("rebel-rl"),
        versions=", ".join(f"{name} {version(name)}" for name in libraries),
        steps=learner.steps,
        average=f", averaged over about the last {learner.average:.0%} of them" if learner.average else "",
    )
