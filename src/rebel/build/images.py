"""Settings -> a run that tunes a pipeline of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from accelerate import Accelerator
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from rebel.build.job import Job, assembled
from rebel.build.online import Parts, build_source, build_step_rule
from rebel.build.pipeline import build_diffusion, build_reference, save_pipeline
from rebel.build.rewards import build_judges
from rebel.build.subject import Subject
from rebel.collect import Online, Source
from rebel.config import RebelConfig
from rebel.evaluators import ByReward, WithJudges
from rebel.learner import Learner
from rebel.plan import describe_images
from rebel.policies.diffusion import Diffusion
from rebel.rewards.combine import Weighted
from rebel.rewards.functions import Notes
from rebel.samplers.denoise import Denoise, text_of
from rebel.samplers.replay import check_replay
from rebel.train import Evaluator
from rebel.types import Prompt

SHOWN = 40
"""Images of an evaluation that are kept."""

Prompts = tuple[Sequence[Prompt], Sequence[Prompt]]
"""Those to train on, and those to evaluate on."""


def build_image_job(
    config: RebelConfig,
    pipeline: DiffusionPipeline,
    reward: Callable[[Notes], Weighted | None],
    prompts: Prompts,
    callbacks: Sequence[Any] = (),
) -> Job:
    """All parts of a run of a pipeline, which `build_pipeline` or `trainable` has made ready. Touches no file."""
    return assembled(config, partial(images, pipeline=pipeline, prompts=prompts), reward, callbacks)


def images(config: RebelConfig, accelerator: Accelerator, pipeline: DiffusionPipeline, prompts: Prompts) -> Subject:
    """The pipeline with what it is trained and evaluated on."""
    for prompt in (*prompts[0], *prompts[1]):
        text_of(prompt)
    before = type(pipeline.scheduler).__name__
    policy = build_diffusion(pipeline, config, accelerator)

    def plan(parts: Parts, iterations: int, averages: bool) -> list[str]:
        lines = describe_images(config, len(prompts[0]), len(prompts[1]), iterations, accelerator.num_processes)
        return [*about(policy, before), *lines, *parts.notes]

    return Subject(
        policy=policy,
        model=policy.denoiser,
        processing=None,
        reference=build_reference(policy, config),
        budget=config.images_per_micro_batch,
        training=prompts[0],
        parts=partial(parts_of, config, prompts),
        plan=plan,
        save=partial(save_pipeline, config),
    )


def about(policy: Diffusion, scheduler: str) -> list[str]:
    """Which pipeline it is, what of it is trained, and where its steps take their noise from."""
    used = type(policy.pipeline.scheduler).__name__
    instead = f" in place of {scheduler}, which has no noise" if used != scheduler else ""
    trained, total = (sum(w.numel() for w in ws) for ws in (policy.trained, policy.denoiser.parameters()))
    lines = [
        f"pipeline     {type(policy.pipeline).__name__}, {trained:,} of {total:,} weights of its "
        f"{type(policy.denoiser).__name__} trained",
        f"noise        {used}{instead}, level {policy.bare.noise.level:g}",
    ]
    if getattr(policy.pipeline, "safety_checker", None) is not None:
        lines.append("safety       images that its safety checker blacks out are left out, counted under unfinished")
    return lines


def parts_of(
    config: RebelConfig,
    prompts: Prompts,
    learner: Learner,
    reward: Weighted,
    notes: Notes,
    iterates: None,
    say: Callable[[str], None],
) -> Parts:
    """Groups drawn from the policy, which is evaluated by the reward of what it draws."""
    policy = learner.policy
    assert isinstance(policy, Diffusion), "build_diffusion made it"
    reward.check(prompts[0])
    precision: Any = learner.accelerator.autocast  # whose annotation contradicts its default
    sampler = Denoise(policy, config.images_per_micro_batch, config.same_noise, precision)
    # a black image has no say in what is learnt, whatever a reward thinks of it
    source = replace(build_source(config, learner, sampler, reward, prompts[0]), drop_unfinished=True)

    def check(learner: Learner) -> None:
        gap = check_replay(sampler, prompts[0], config.seed)
        say(f"replay       log-probabilities of drawn and replayed steps differ by at most {gap:.1g} nats")

    return Parts(
        Online(source, config.prompts_per_iteration, config.replace_flat_groups),
        evaluation(config, source, prompts[1], notes) if prompts[1] else None,
        build_step_rule(config),
        checks=(check,),
    )


def evaluation(config: RebelConfig, source: Source, prompts: Sequence[Prompt], notes: Notes) -> Evaluator:
    """By the reward of images of held-out prompts, and by the judges that are never the reward."""
    by_reward = ByReward(replace(source, group_size=config.eval_generations), prompts, show=SHOWN)
    if not config.judge_funcs:
        return by_reward
    judges = build_judges(config, notes)
    judges.check(prompts)
    return WithJudges(by_reward, judges)
