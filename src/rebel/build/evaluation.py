"""Evaluation by win rate during a run: who judges, and whose completions ours are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from rebel.against import Contents, references, words
from rebel.build.rewards import build_judge
from rebel.build.sampler import TextSampler
from rebel.collect import Source, draw
from rebel.config import RebelConfig
from rebel.errors import RunStopped
from rebel.evaluate import text
from rebel.evaluators import ByJudge, ByReward, Opponents
from rebel.learner import Learner
from rebel.loading import load_policy
from rebel.policies.causal_lm import CausalLM
from rebel.report.rows import append_rows, read_rows
from rebel.rewards.contest import HigherReward
from rebel.rewards.functions import Notes
from rebel.rewards.winrate import check_judge
from rebel.run_folder import OPPONENTS
from rebel.samplers.generate import Generate
from rebel.train import Evaluator
from rebel.types import Judge, Prompt, Rollout


def judge_of_evaluation(config: RebelConfig, notes: Notes, prompts: Sequence[Prompt]) -> Judge | None:
    """Who compares completions of these prompts for --eval_against; nobody without it."""
    if not config.eval_judge or not prompts:
        return None
    models = {"trust_remote_code": config.trust_remote_code, **({"device": "cpu"} if config.use_cpu else {})}
    judge = build_judge(config.eval_judge, config, notes, models)
    if isinstance(judge, HigherReward):
        judge = replace(judge, aside=notes.aside)
    check_judge(judge, prompts)
    return judge


def build_evaluator(config: RebelConfig, plain: ByReward, judge: Judge | None, sampler: TextSampler) -> Evaluator:
    """Evaluation by reward, and with --eval_against by win rate too."""
    if judge is None:
        return plain
    return ByJudge(plain, judge, build_opponents(config, plain, sampler), partial(tokens_in, sampler.policy))


def build_opponents(config: RebelConfig, plain: ByReward, sampler: TextSampler) -> Opponents:
    """The other side of --eval_against."""
    side = str(config.eval_against)
    if side == "references":
        written = references(plain.prompts, config.reference_column)  # now, since they may be missing
        return lambda learner, ours, seed: written
    drawn = initial_policy if side == "initial" else partial(drawn_by, config, plain.source, sampler)
    return DrawnOnce(drawn, Path(config.output_dir) / OPPONENTS, side)


def drawn_by(
    config: RebelConfig, source: Source, sampler: TextSampler, learner: Learner, ours: Sequence[Rollout], seed: int
) -> Contents:
    """Completions of the same prompts by the model of --eval_against, which is loaded for it and let go."""
    device = learner.accelerator.device
    policy = load_policy(str(config.eval_against), config.chat_template_kwargs, device, config.trust_remote_code)
    own = Generate(policy, sampler.max_new_tokens, sampler.temperature, sampler.precision)
    alone = replace(source, sampler=own, rank=0, world=1)
    drawn = draw(alone, [rollout.prompt for rollout in ours], seed, lambda: False, lambda count: None)
    return [[completion.content for completion in rollout.completions] for rollout in drawn]


def tokens_in(policy: CausalLM, content: Any) -> int:
    """The length of a completion, whoever wrote it, in the tokens of this policy."""
    return len(policy.tokenizer(words(content), add_special_tokens=False, verbose=False)["input_ids"])


@dataclass(frozen=True, slots=True)
class DrawnOnce:
    """The other side's completions, drawn at the first evaluation of a run and kept for all later ones.

    On disk too, for a run that is resumed; what a former run of the folder left is not used.
    """

    draw: Opponents
    file: Path
    side: str
    known: list[Contents] = field(default_factory=list)

    def __call__(self, learner: Learner, ours: Sequence[Rollout], seed: int) -> Contents:
        prompts = [text(rollout.prompt.content) for rollout in ours]
        if not self.known:
            kept = self.kept(prompts) if learner.steps else None
            self.known.append(kept or self.draw(learner, ours, seed))
        if self.file.parent.exists() and self.kept(prompts) != self.known[0]:
            self.file.unlink(missing_ok=True)
            rows = zip(prompts, self.known[0], strict=True)
            append_rows(self.file, [{"side": self.side, "prompt": p, "completions": c} for p, c in rows])
        return self.known[0]

    def kept(self, prompts: Sequence[str]) -> Contents | None:
        """What the file has, if it is of this side and these prompts."""
        rows = read_rows(self.file)
        fits = [(row.get("side"), row.get("prompt")) for row in rows] == [(self.side, prompt) for prompt in prompts]
        return [row["completions"] for row in rows] if fits else None


def initial_policy(learner: Learner, ours: Sequence[Rollout], seed: int) -> Contents:
    """Our own completions, which at the first evaluation of a run are the initial policy's."""
    if learner.steps:
        raise RunStopped(
            "--eval_against initial: the initial policy's completions, eval_opponents.jsonl in its folder, are gone "
            "or belong to other prompts; resume without --eval_against, or with the model that the run began with"
        )
    return [[completion.content for completion in rollout.completions] for rollout in ours]
