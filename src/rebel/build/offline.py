"""Settings -> the parts of a run that learns from recorded completions."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel

from rebel.build.online import Parts
from rebel.config import RebelConfig
from rebel.data import load_rows
from rebel.errors import RebelError
from rebel.learner import Learner
from rebel.offline.anchors import AnchorFile, hash_of_weights
from rebel.offline.collector import ByPairs, EtaOfData, Offline, Recordings
from rebel.offline.preferences import Reading, format_of, read, reading_of
from rebel.offline.recorded import Groups, Tokens, groups_of
from rebel.plan import Memory, counted, last_lines, length_in_words, step_in_words
from rebel.policies.causal_lm import CausalLM
from rebel.rewards.combine import Weighted
from rebel.stepsize import AutoEta, GivenEta, StepRule
from rebel.types import Pairing

RowsIn = Dataset | Sequence[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of recorded completions and how to read them, not yet in tokens; `shared` were kept out of training."""

    rows: RowsIn
    numbers: Sequence[int]
    how: Reading
    name: str
    shared: int = 0


def rows_of(rows: RowsIn, config: RebelConfig, by_reward: bool, name: str) -> Rows:
    """All rows of a data set, its format taken from its columns."""
    if not len(rows):
        raise RebelError(f"{name} has no rows, so there is nothing to learn from")
    columns = rows.column_names if isinstance(rows, Dataset) else list(rows[0])
    how = Reading(
        format_of(columns, config.data_format, config.margin_column, by_reward, name),
        prompt_column=config.prompt_column,
        margin_column=config.margin_column,
        margin_type=config.margin_type,
        constant=config.constant_margin,
        clip=config.margin_clip,
        by_reward=by_reward,
    )
    return Rows(rows, range(len(rows)), reading_of(columns, how), name)


def build_rows(config: RebelConfig) -> tuple[Rows, Rows | None]:
    """(training, evaluation) rows as the settings name them."""
    name, scored = str(config.dataset_name), bool(config.reward_funcs)
    load = partial(load_rows, name, config=config.dataset_config)
    training = rows_of(load(split=config.dataset_train_split), config, scored, name)
    if not config.eval_prompts:
        return training, None
    if config.dataset_test_split:
        test = rows_of(load(split=config.dataset_test_split), config, scored, f"{name} ({config.dataset_test_split})")
        return training, first_rows(test, config.eval_prompts)
    return apart(training, config.eval_prompts)


def first_rows(rows: Rows, count: int) -> Rows:
    return Rows(rows.rows, rows.numbers[:count], rows.how, rows.name)


def apart(rows: Rows, count: int) -> tuple[Rows, Rows]:
    """(training, evaluation) rows: the first `count` are kept out, and so are later rows with a prompt of theirs."""
    if len(rows.numbers) <= count:
        raise RebelError(
            f"--eval_prompts {count} leaves none of the {len(rows.numbers)} rows for training; lower it, or name a "
            "--dataset_test_split"
        )

    def prompt(number: int) -> str:
        found = read(rows.rows[number], rows.how, f"{rows.name}, row {number}")
        return "" if isinstance(found, str) else json.dumps(found.prompt.content)

    held = {prompt(number) for number in rows.numbers[:count]} - {""}
    training = [number for number in rows.numbers[count:] if prompt(number) not in held]
    shared = len(rows.numbers) - count - len(training)
    return Rows(rows.rows, training, rows.how, rows.name, shared), first_rows(rows, count)


def build_groups(rows: Rows, policy: CausalLM, config: RebelConfig) -> Groups:
    """The usable groups of the rows in the tokens of the policy."""
    positions = getattr(policy.bare.causal.config.get_text_config(), "max_position_embeddings", None) or math.inf
    tokens = Tokens(
        policy.encode, policy.recorded, config.max_prompt_length, config.max_completion_length, float(positions)
    )
    return groups_of(rows.rows, rows.numbers, rows.how, rows.name, tokens)


def anchor_key(policy: CausalLM, groups: Groups, config: RebelConfig, precision: str) -> dict[str, str]:
    """All that log pi_0 of the data depends on: weights with adapters, architecture, ids, temperature, number types."""
    model = policy.model
    shape = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    adapters = {name: c.to_dict() for name, c in model.peft_config.items()} if isinstance(model, PeftModel) else {}
    words = json.dumps([shape, adapters], sort_keys=True, default=str)
    return {
        "weights": hash_of_weights(model),
        "architecture": hashlib.blake2b(words.encode(), digest_size=16).hexdigest(),
        "data": groups.hash,
        "temperature": repr(config.temperature),
        "precision": precision,
    }


def build_recordings(
    groups: Groups, learner: Learner, config: RebelConfig, reward: Weighted | None, say: Callable[[str], None]
) -> Recordings:
    """The groups with the place where their anchors are kept."""
    policy, folder = learner.policy, config.anchor_cache_dir
    assert isinstance(policy, CausalLM), "build_policy made it"
    key = anchor_key(policy, groups, config, str(learner.accelerator.mixed_precision))
    return Recordings(groups, AnchorFile(Path(folder or Path(config.output_dir) / "anchors"), key), reward, say)


def offline_parts(
    training: Groups,
    held_out: Groups | None,
    learner: Learner,
    config: RebelConfig,
    pairing: Pairing,
    reward: Weighted | None,
    say: Callable[[str], None],
) -> Parts:
    """Collector, evaluator and step of a run over recorded completions."""
    if config.scale_rewards != "none" and reward is None and training[0].rewards is None:
        raise RebelError(
            f"--scale_rewards {config.scale_rewards} divides rewards, and these data have margins of pairs; use none"
        )
    if reward:
        reward.check([training[0].rollout.prompt])
    build = partial(build_recordings, learner=learner, config=config, reward=reward, say=say)
    mine = build(training)
    rule = offline_step(mine, config)
    held = build(held_out) if held_out is not None else None
    return Parts(
        collector=Offline(mine, config.prompts_per_iteration, config.seed, config.scale_rewards),
        evaluator=ByPairs(held, pairing, rule, config.scale_rewards) if held else None,
        step_rule=rule,
        recordings=(mine, held) if held else (mine,),
    )


def offline_step(recordings: Recordings, config: RebelConfig) -> StepRule:
    """The step from the spread of the whole data set, or the given one."""
    if config.eta != "auto":
        return GivenEta(float(config.eta), config.beta, config.kl)
    return EtaOfData(recordings, config.beta) if config.scale_rewards == "none" else AutoEta(config.beta)


KINDS = {"preferences": "pairs", "groups": "scored groups", "comparisons": "groups of compared completions"}


def describe_offline(
    config: RebelConfig,
    recordings: Sequence[Recordings],
    shared: int,
    iterations: int,
    world: int,
    memory: Memory,
    layout: str,
) -> list[str]:
    """The plan of a run over recorded completions, a line for each thing a user may want to check."""
    training, *held = (each.groups for each in recordings)
    lost = sum((groups.dropped for groups in held), training.dropped)
    reasons = [f"{count:,} {reason}" for reason, count in lost.items() if count]
    reasons += [f"{shared:,} rows with a prompt of the evaluation"] if shared else []
    steps, taken = config.steps_per_iteration * config.passes, iterations * config.prompts_per_iteration
    return [
        f"data         {len(training):,} {KINDS[training.how.format]} ({training.completions:,} completions) to train "
        f"on, {sum(map(len, held)):,} to evaluate on; left out: {'; '.join(reasons) or 'nothing'}",
        f"margins      {margins_in_words(training.how, config)}",
        f"anchor       the initial policy: {'; '.join(map(anchor_in_words, recordings))}",
        f"regression   {counted(steps, 'optimiser step')} for {counted(config.prompts_per_iteration, 'group')}, about "
        f"{config.prompts_per_iteration / config.steps_per_iteration:g} each, {config.pairing} pairs",
        f"step         {step_in_words(config)}",
        f"run          {length_in_words(iterations, steps)}, {taken / len(training):.2f} epochs",
        *last_lines(config, world, memory, layout),
    ]


def margins_in_words(how: Reading, config: RebelConfig) -> str:
    if how.by_reward:
        return f"differences of the rewards of {', '.join(map(str, config.reward_funcs)) or 'the reward functions'}"
    if how.format == "groups":
        return f"differences of {how.margin_column or 'the rewards in the completions'}"
    if how.margin_column is None:
        return f"{how.constant:g} for chosen over rejected in every pair"
    if how.margin_type == "margin":
        return f"column {how.margin_column}"
    return f"logit of the {how.margin_type} in {how.margin_column}, in nats, clipped at {how.clip:g}"


def anchor_in_words(recordings: Recordings) -> str:
    found, wrong = recordings.file.read(recordings.groups.completions)
    if found is not None:
        return f"kept in {recordings.file.path}"
    return f"to be computed: {wrong or recordings.file.path}"
