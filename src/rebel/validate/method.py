"""The method: the step and the KL, what may be drawn from, minibatches, and which iterate counts."""

from __future__ import annotations

from math import inf

from rebel.config import RebelConfig
from rebel.validate.said import Complaints, said

TRUNCATIONS = {"top_p": (1.0,), "top_k": (None, 0), "min_p": (None, 0.0), "repetition_penalty": (1.0,)}


def step(config: RebelConfig) -> Complaints:
    """A step that is given or chosen, not both, and that converges."""
    eta, beta = config.eta, config.beta
    if eta == "auto":
        if config.kl == "shaped":
            yield "--kl shaped keeps the step at --eta, and --eta auto chooses it: give --eta as a number"
        return
    if config.kl_per_iteration is not None:
        yield f"{said(config, 'kl_per_iteration', 'eta')}: a stated KL chooses the step itself; use --eta auto"
    elif not eta > 0:
        yield f"{said(config, 'eta')}: use a positive number of nats per unit of reward, or auto"
    elif eta == inf and not beta > 0:
        yield "--eta inf needs a --beta above 0, which then sets the step: 1 / beta"
    elif config.kl == "shaped" and eta * beta >= 2:
        yield (
            f"{said(config, 'kl', 'eta', 'beta')} does not converge: eta * beta must stay below 2. "
            "Use --kl proximal, which is stable for every eta, or lower one of them"
        )


def credit(config: RebelConfig) -> Complaints:
    """Steps are of images, stretches of text whose beginnings a reward is asked about as they are drawn."""
    if config.credit == "step" and not config.pipeline_name_or_path:
        yield "--credit step is for pipelines (--pipeline_name_or_path); for text use trajectory or stretch"
    if config.credit != "stretch":
        return
    if config.pipeline_name_or_path:
        yield "--credit stretch is for stretches of text; for the steps of a pipeline use --credit step"
    if config.pairing == "extremes":
        yield (
            f"{said(config, 'credit', 'pairing')}: who is best and worst is known at the end, which biases what "
            "earlier stretches are credited with; use --pairing all, or --credit trajectory"
        )
    for name in ("offline", "rounds", "from_rollouts", "judge"):
        if getattr(config, name):
            yield (
                f"{said(config, 'credit', name)}: beginnings of completions are scored by reward functions, in the "
                "iteration that draws them; use --credit trajectory"
            )


def sampling(config: RebelConfig) -> Complaints:
    """Completions come from the distribution whose log-probabilities are regressed."""
    for name, neutral in TRUNCATIONS.items():
        if getattr(config, name) not in neutral:
            yield (
                f"{said(config, name)} is refused in training: completions would come from another "
                "distribution than the one whose log-probabilities are regressed. Leave it out; "
                "--temperature is accounted for"
            )
    if config.missing_eos_penalty and config.drop_truncated:
        yield (
            f"{said(config, 'missing_eos_penalty')} has no effect with --drop_truncated, which leaves the "
            "completions it is for out; use one of them"
        )


def minibatches(config: RebelConfig) -> Complaints:
    """Each optimiser step has prompts left to train on."""
    prompts, steps = config.prompts_per_iteration, config.steps_per_iteration
    if 0 < prompts < steps:
        yield (
            f"{said(config, 'steps_per_iteration', 'prompts_per_iteration')}: each step takes the "
            f"completions of one prompt or more. Use at most {prompts} steps, or more passes with --num_iterations"
        )
    elif config.early_stop and not config.held_out:
        yield "--early_stop watches completions that are not trained on; give --held_out a share above 0"
    elif config.early_stop and steps > prompts * (1 - config.held_out):
        yield (
            f"{said(config, 'steps_per_iteration', 'prompts_per_iteration', 'held_out')}: fewer prompts "
            "than steps are left to train on. Use fewer steps, more prompts, or hold out less"
        )


def mixture(config: RebelConfig) -> Complaints:
    """One policy is evaluated: the last, the average, the best, or the mixture."""
    if config.mixture and config.average:
        yield f"{said(config, 'mixture', 'average')}: both say what is evaluated; use one of them"
    if config.mixture and config.load_best_model_at_end:
        yield f"{said(config, 'mixture')} evaluates no single policy that --load_best_model_at_end could keep"
