"""A run from its first line to its last: `rebel train` and `rebel sample`."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import transformers
from torch import Tensor

from rebel.build.job import Job, build_job
from rebel.build.model import build_model, build_tokenizer
from rebel.build.offline import Rows, build_rows
from rebel.build.prompts import build_prompts
from rebel.build.rewards import ANSWERS, reward_if_any
from rebel.build.rounds import stored
from rebel.build.subject import Data
from rebel.checkpoint import Progress, all_checkpoints, load
from rebel.config import RebelConfig
from rebel.errors import RebelError, RunStopped
from rebel.evaluate import text as text_of
from rebel.iterates import FOLDER as ITERATES
from rebel.iterates import Iterates
from rebel.loading import load_policy
from rebel.record import Recorder, fingerprint
from rebel.report import write_report
from rebel.rewards.functions import Notes, RewardFailed
from rebel.rounds.rollouts import Prompts
from rebel.run_folder import (
    BEST,
    FAILED,
    JUDGED,
    METRICS,
    OPPONENTS,
    ROUNDS,
    SETTINGS,
    check_folder,
    checkpoint_to_resume,
    claim_folder,
)
from rebel.samplers.generate import Generate
from rebel.samplers.mixture import Mixture
from rebel.samplers.server import PREFIX as SENT
from rebel.settings import read_yaml, resolve
from rebel.train import train
from rebel.types import Prompt, Sampler


def carry_out(job: Job, resume: Path | None = None) -> Progress:
    """Train until the end, or until something stops it: then what resumes the run is on disk."""
    recorder, run = job.recorder, job.run
    recorder.learner.accelerator.wait_for_everyone()  # until all have looked at the folder and found no other run
    for recordings in job.parts.recordings:  # what needs the initial policy, before a checkpoint takes its place
        recordings.prepare(run.learner, recorder)
    for check in job.parts.checks:
        check(run.learner)
    progress = load(resume, run.learner, fingerprint(job.config)) if resume else Progress()
    if resume:
        recorder.terminal.say(f"{resume}: {standing(job, progress)}")
    recorder.begin(progress, job.iterations * run.regression.steps * run.regression.passes)
    try:
        with recorder.heeding_signals():
            train(run, progress, job.iterations)
    except RebelError as wrong:
        if not run.learner.steps:  # wrong input, found before anything was learnt
            raise
        raise explained(wrong, job, progress) from wrong
    except RunStopped as stopped:
        raise explained(stopped, job, progress) from stopped
    if progress.iteration < job.iterations and recorder.signalled:
        recorder.checkpoint(progress)
        finish(recorder)
        raise RunStopped(f"{recorder.signalled} after iteration {progress.iteration}. {how_to_resume(job)}")
    if job.config.save_strategy == "steps":  # as transformers does, so that a run can go on beyond its end
        recorder.checkpoint(progress)
    keep_result(job)
    finish(recorder)
    return progress


def standing(job: Job, progress: Progress) -> str:
    """How far a resumed run has come, and what to do where nothing is left."""
    done = f"{progress.iteration} of {job.iterations} iterations are done"
    return done if progress.iteration < job.iterations else f"{done}; to go on, ask for more"


def explained(stopped: Exception, job: Job, progress: Progress) -> RunStopped:
    """The reason with what is on disk: the checkpoint, and what a reward function failed on."""
    job.recorder.checkpoint(progress)
    note = ""
    if isinstance(stopped, RewardFailed):
        note = f" Prompt and completion are in {job.recorder.write_failure(stopped)}."
    finish(job.recorder)
    return RunStopped(f"{str(stopped).removesuffix('.')}.{note} {how_to_resume(job)}")


def how_to_resume(job: Job) -> str:
    found = all_checkpoints(job.recorder.folder)
    if not found:
        return "There is no checkpoint yet: start again"
    again = job.again or f"rebel train {job.recorder.folder / SETTINGS} --resume"
    return f"{found[-1]} is complete; go on with: {again}"


def keep_result(job: Job) -> None:
    """The tuned model in memory and in the output folder itself: the last iterate, or the best one evaluated."""
    recorder = job.recorder
    recorder.learner.accelerator.wait_for_everyone()
    recorder.go_back_to_best()
    if recorder.main:
        recorder.save_model(recorder.folder)


def finish(recorder: Recorder) -> None:
    """Close what listens, and write the report of what there is."""
    recorder.trackers.end()
    if recorder.main and (recorder.folder / METRICS).exists():
        recorder.terminal.say(f"report: {write_report(recorder.folder)}")


def run_training(config: RebelConfig, dry_run: bool = False) -> None:
    """`rebel train`: everything from its settings. Prints the plan, and with `dry_run` nothing more."""
    quiet()
    resume = checkpoint_to_resume(config)
    if not dry_run:
        check_folder(config, resume is not None)
    job = prepare(config)
    for line in job.plan:
        job.recorder.terminal.say(line)
    if dry_run:
        return
    check_hub(config)
    claim_folder(config, resume is not None)
    carry_out(job, resume)
    job.recorder.terminal.say(f"model:  {job.recorder.folder}")
    if config.push_to_hub and job.recorder.main:
        push(job)


def prepare(config: RebelConfig) -> Job:
    """A run that is ready to start; what is quick to find wrong is looked at before the model is loaded."""
    if config.pipeline_name_or_path:
        return prepare_images(config)
    data = data_of(config)
    tokenizer = build_tokenizer(config)
    reward = reward_if_any(config, Notes())
    seen = data[1] if config.from_rollouts else data[0]  # by the reward
    if reward and seen and not isinstance(seen, Rows):
        reward.check(seen)
    return build_job(config, build_model(config), tokenizer, partial(reward_if_any, config), data)


def prepare_images(config: RebelConfig) -> Job:
    """A run of a pipeline that is ready to start."""
    need_diffusers()
    from rebel.build.images import build_image_job
    from rebel.build.pipeline import build_pipeline

    prompts = build_prompts(config)
    reward = partial(reward_if_any, config)
    made: Any = reward(Notes())
    made.check(prompts[0])
    return build_image_job(config, build_pipeline(config), reward, prompts)


def need_diffusers() -> None:
    if importlib.util.find_spec("diffusers") is None:
        raise RebelError('--pipeline_name_or_path needs the package diffusers: pip install "rebel-rl[diffusion]"')


def data_of(config: RebelConfig) -> Data:
    """What the settings name to train and to evaluate on."""
    if config.offline:
        return build_rows(config)
    return stored_prompts(config) if config.from_rollouts else build_prompts(config)


def stored_prompts(config: RebelConfig) -> tuple[Sequence[Prompt], Sequence[Prompt]]:
    """The prompts of given rollouts, and those of evaluation where a dataset and a reward are named for it."""
    training = Prompts(stored(str(config.from_rollouts)))
    return training, build_prompts(config)[1] if config.dataset_name and config.reward_funcs else []


def quiet() -> None:
    """Leave the terminal to the run's own table: no bars for loading and writing files."""
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def check_hub(config: RebelConfig) -> None:
    """Whether the result could be uploaded, asked before there is one."""
    if not config.push_to_hub:
        return
    from huggingface_hub import HfApi

    try:
        HfApi().whoami()
    except Exception as error:  # no account, no network
        raise RebelError(
            f"--push_to_hub: the hub does not know who you are ({str(error).splitlines()[0]}); log in by `hf auth "
            "login`, or leave it out and upload the folder later"
        ) from error


def push(job: Job) -> str:
    """Upload the output folder's model; the address of it."""
    from huggingface_hub import HfApi

    try:
        return upload(job, HfApi())
    except Exception as error:  # of many kinds: account, network, repository
        folder = job.recorder.folder
        raise RunStopped(
            f"the model is in {folder}, and could not be uploaded: {str(error).splitlines()[0]}. Later: hf upload "
            f"{job.config.hub_model_id or folder.name} {folder}"
        ) from error


def upload(job: Job, api: Any) -> str:
    """The address of what was uploaded: the folder without checkpoints and what only the run itself needs."""
    name = job.config.hub_model_id or job.recorder.folder.name
    repository = api.create_repo(name, exist_ok=True).repo_id
    ignore = ["checkpoint-*/*", *(f"{name}/*" for name in (BEST, ITERATES, ROUNDS))]
    ignore += [FAILED, ANSWERS, JUDGED, OPPONENTS, f"{SENT}*/*"]
    return api.upload_folder(repo_id=repository, folder_path=job.recorder.folder, ignore_patterns=ignore)


def sample(
    run_dir: Path,
    prompts: Sequence[str],
    n: int,
    temperature: float | None,
    max_new_tokens: int | None,
    mixture: bool = False,
) -> list[list[str]]:
    """`rebel sample`: completions of the prompts by the tuned model of a run, or by the mixture of its iterates."""
    quiet()
    config = resolve(read_yaml(run_dir / SETTINGS)) if (run_dir / SETTINGS).exists() else RebelConfig()
    if config.pipeline_name_or_path:
        return sample_images(run_dir, config, prompts, n)
    policy = load_policy(str(run_dir), config.chat_template_kwargs)
    chat = policy.tokenizer.chat_template is not None
    asked = [Prompt([{"role": "user", "content": text}] if chat else text) for text in prompts]
    heat = config.temperature if temperature is None else temperature
    draw: Sampler = Generate(policy, max_new_tokens or config.max_completion_length, heat)
    if mixture:
        draw = Mixture(draw, stored_iterates(run_dir, dict(policy.model.named_parameters())), config.sampling_batch)
    return [[text_of(c.content) for c in rollout.completions] for rollout in draw(asked, n, config.seed)]


def sample_images(run_dir: Path, config: RebelConfig, prompts: Sequence[str], n: int) -> list[list[str]]:
    """Images of the prompts by the tuned pipeline of a run: the names of their files in its folder samples."""
    need_diffusers()
    from rebel.build.pipeline import saved_pipeline, to_diffusion
    from rebel.samplers.denoise import Denoise

    policy = to_diffusion(saved_pipeline(run_dir, config), config)
    draw = Denoise(policy, config.images_per_micro_batch, config.same_noise)
    folder = run_dir / "samples"
    folder.mkdir(exist_ok=True)
    names: list[list[str]] = []
    for rollout in draw([Prompt(text) for text in prompts], n, config.seed):
        files = [folder / f"{len(names) + 1}-{k}.png" for k in range(1, n + 1)]
        for file, completion in zip(files, rollout.completions, strict=True):
            completion.content.save(file)
        names.append([str(file) for file in files])
    return names


def stored_iterates(run_dir: Path, weights: dict[str, Tensor]) -> Iterates:
    iterates = Iterates(run_dir / ITERATES, weights)
    if not iterates.stored():
        raise RebelError(f"--mixture: {run_dir} has kept no iterates; train with --mixture K to keep some")
    return iterates
