"""A run's language model: its policy and reference, the prompts or rows in tokens that fit, and how it is saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from rebel.build.evaluation import judge_of_evaluation
from rebel.build.model import build_policy, build_reference, reference_is_copy
from rebel.build.offline import Rows, build_groups, describe_offline, offline_parts
from rebel.build.online import PAIRINGS, Parts, online_parts
from rebel.build.prompts import fitting
from rebel.build.rounds import whose
from rebel.build.subject import Data, Subject
from rebel.config import RebelConfig
from rebel.iterates import Iterates
from rebel.learner import Learner
from rebel.model_card import model_card
from rebel.offline.recorded import Groups
from rebel.plan import Memory, describe, estimate, layout_in_words
from rebel.policies.causal_lm import CausalLM
from rebel.policies.scorer import LanguageModel
from rebel.rewards.combine import Weighted
from rebel.rewards.functions import Notes
from rebel.rounds.rollouts import Prompts
from rebel.types import Judge, Prompt


def language_model(
    config: RebelConfig,
    accelerator: Accelerator,
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
) -> Subject:
    """The model with what it is trained and evaluated on."""
    policy = build_policy(model.to(accelerator.device), tokenizer, config)
    material = encoded(data, policy, config)
    # offline the anchor is the initial policy, and there are no completions of the policy's own to measure a KL on
    reference = None if config.offline else build_reference(policy, config)

    def plan(parts: Parts, iterations: int, averages: bool) -> list[str]:
        memory = estimate(policy.model, config, reference_is_copy(reference, policy, config), averages)
        lines = material.plan(config, parts, iterations, accelerator.num_processes, memory, policy.layout.shares)
        return [*lines, *parts.notes, *material.notes]

    return Subject(
        policy=policy,
        model=policy.model,
        processing=tokenizer,
        reference=reference,
        budget=config.tokens_per_micro_batch,
        training=material.training,
        parts=partial(material.parts, config),
        plan=plan,
        save=partial(save_model, config),
    )


@dataclass(frozen=True, slots=True)
class Material:
    """What a run is trained and evaluated on, prompts or groups, in tokens that fit; `dropped` did not."""

    training: Sequence[Prompt] | Groups
    held_out: Any
    dropped: int = 0
    notes: tuple[str, ...] = ()

    def parts(
        self,
        config: RebelConfig,
        learner: Learner,
        reward: Weighted | None,
        notes: Notes,
        iterates: Iterates | None,
        say: Callable[[str], None],
    ) -> Parts:
        """The parts that take their groups from it."""
        if isinstance(self.training, Groups):
            held_out = self.held_out if isinstance(self.held_out, Groups) else None
            return offline_parts(self.training, held_out, learner, config, PAIRINGS[config.pairing], reward, say)
        held = () if isinstance(self.held_out, Groups) else self.held_out
        seen = held if isinstance(self.training, Prompts) else self.training  # by the reward
        if reward and seen:
            reward.check(seen)
        judge: Judge | None = judge_of_evaluation(config, notes, held)
        prompts = (self.training, held)
        return online_parts(config, learner, reward, prompts, judge, iterates, say, notes)

    def plan(
        self, config: RebelConfig, parts: Parts, iterations: int, world: int, memory: Memory, shared: bool
    ) -> list[str]:
        """The plan of the run in words."""
        layout = layout_in_words(config, shared)
        if parts.recordings:
            return describe_offline(config, parts.recordings, self.dropped, iterations, world, memory, layout)
        return describe(config, len(self.training), len(self.held_out), self.dropped, iterations, world, memory, layout)


def encoded(data: Data, policy: CausalLM, config: RebelConfig) -> Material:
    """The prompts, or the groups of the rows, that fit into the lengths."""
    if isinstance(data[0], Rows):
        held_out = build_groups(data[1], policy, config) if isinstance(data[1], Rows) else ()
        return Material(build_groups(data[0], policy, config), held_out, data[0].shared)
    held = fitting(data[1], policy, config)[0] if data[1] else []  # pyright: ignore[reportArgumentType]
    if isinstance(data[0], Prompts):
        return Material(data[0], held, notes=tuple(whose(config, data[0].rollouts, policy)))
    training, dropped = fitting(data[0], policy, config)
    return Material(training, held, dropped)


def save_model(config: RebelConfig, learner: Learner, folder: Path) -> None:
    """Write the policy (its average, if one is kept) as Hugging Face loads it, with tokenizer and model card."""
    policy = learner.policy
    assert isinstance(policy, CausalLM), "build_policy made it"
    folder.mkdir(parents=True, exist_ok=True)
    with learner.use_average():
        names: dict[str, Any] = {"selected_adapters": ["default"]} if isinstance(policy.model, PeftModel) else {}
        policy.model.save_pretrained(str(folder), **names)
    policy.tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(model_card(config, learner))
