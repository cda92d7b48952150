"""Rounds as the settings describe them: what their rollouts are of, where they are, how long they last."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rebel.collect import Source
from rebel.config import RebelConfig
from rebel.errors import RebelError
from rebel.policies.causal_lm import CausalLM
from rebel.rounds.collector import Rounds, Say, check_scored, check_whole
from rebel.rounds.rollouts import Manifest, Prompts, Rollouts, as_json, of_prompts, of_weights, read_manifest
from rebel.rounds.shards import digest
from rebel.run_folder import ROUNDS
from rebel.types import Pairing, Prompt

DECIDING = (
    "num_generations",
    "temperature",
    "max_completion_length",
    "sampling_batch",
    "chat_template_kwargs",
    "sampler",
)
PRECISION = ("bf16", "fp16")
"""Settings that decide what is drawn, beside the policy, the prompts and the seed."""


def in_rounds(config: RebelConfig) -> bool:
    """Whether a run regresses stored rollouts."""
    return config.rounds is not None or config.from_rollouts is not None


def round_size(config: RebelConfig, training: Sequence[Prompt]) -> int:
    """Prompts of a round."""
    if config.from_rollouts or config.round_prompts is None:
        return len(training)
    if config.round_prompts > len(training):
        raise RebelError(
            f"--round_prompts {config.round_prompts}: there are {len(training)} prompts to train on; use at most that"
        )
    return config.round_prompts


def iterations_of_rounds(config: RebelConfig, size: int) -> int:
    """Iterations of the whole run: each round of `size` prompts takes the same number."""
    return (config.rounds or 1) * config.round_epochs * math.ceil(size / config.prompts_per_iteration)


def build_rounds(
    config: RebelConfig,
    source: Source,
    training: Sequence[Prompt],
    pairing: Pairing,
    policy: CausalLM,
    say: Say,
) -> Rounds:
    """The collector of a run in rounds."""
    size = round_size(config, training)
    given = training.rollouts if isinstance(training, Prompts) else None
    about = None if given is not None else partial(description, config, size, of_prompts(training), policy)
    return Rounds(
        source=source,
        home=Path(config.output_dir) / ROUNDS,
        size=size,
        prompts=config.prompts_per_iteration,
        pairing=pairing,
        seed=config.seed,
        say=say,
        laps=config.round_epochs,
        given=given,
        manifest=about,
    )


def description(
    config: RebelConfig, size: int, prompt_set: str, policy: CausalLM, number: int, fingerprint: str
) -> Manifest:
    """What the rollouts of a round are of."""
    return Manifest(
        prompts=size,
        shard=config.shard_prompts,
        policy=fingerprint,
        tokenizer=of_tokenizer(policy),
        prompt_set=prompt_set,
        seed=config.seed,
        round=number,
        settings={name: getattr(config, name) for name in (*DECIDING, *PRECISION)},
        drawn_by=str(config.model_name_or_path),
    )


def of_tokenizer(policy: CausalLM) -> str:
    """The fingerprint of a vocabulary: rollouts are token ids, which mean nothing in another one."""
    return digest(as_json(sorted(policy.tokenizer.get_vocab().items())))


def stored(folder: str) -> Rollouts:
    """Rollouts that were drawn and scored before, looked through from end to end."""
    rollouts = Rollouts(Path(folder), read_manifest(Path(folder)))
    check_whole(rollouts)
    check_scored(rollouts)
    return rollouts


def whose(config: RebelConfig, rollouts: Rollouts, policy: CausalLM) -> list[str]:
    """Lines on who drew given rollouts, if that was not the policy that is tuned now. Raises for other token ids."""
    manifest = rollouts.manifest
    if manifest.tokenizer != of_tokenizer(policy):
        raise RebelError(
            f"--from_rollouts {config.from_rollouts} has token ids of another tokenizer than that of "
            f"--model_name_or_path {config.model_name_or_path}; draw rollouts with this model's"
        )
    now = of_weights(policy.scorer)
    heat = manifest.settings.get("temperature", config.temperature)
    if manifest.policy == now and heat == config.temperature:
        return [f"rollouts     {config.from_rollouts}, drawn by this policy"]
    who = manifest.drawn_by or "another program"
    other = f" at --temperature {heat:g}" if heat != config.temperature else ""
    return [
        f"rollouts     {config.from_rollouts}, drawn by another policy ({who}{other}); pi_t is the one given here, "
        "from which the steps are measured"
    ]


def in_words(config: RebelConfig, size: int) -> str:
    """The line of the plan about rounds."""
    count, laps = config.rounds or 1, config.round_epochs
    drawn = "read from disk" if config.from_rollouts else f"{size * config.num_generations:,} samples drawn first"
    each = math.ceil(size / config.prompts_per_iteration)
    return (
        f"rounds       {count} of {size:,} prompts, {drawn}; regressed in {laps * each} iterations"
        + (f" ({laps} laps)" if laps > 1 else "")
        + (", anchored at the policy of the round's beginning")
    )
