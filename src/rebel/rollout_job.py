"""`rebel rollout` and `rebel score`: the stages of a round by themselves, each going on where it was interrupted."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset

from rebel.build.model import build_accelerator, build_model, build_policy, build_tokenizer
from rebel.build.prompts import build_prompts, fitting
from rebel.build.rewards import build_reward
from rebel.build.rounds import description, of_tokenizer, round_size
from rebel.build.sampler import build_sampler
from rebel.collect import Interrupted
from rebel.config import RebelConfig
from rebel.data import PromptStream, load_rows
from rebel.errors import RebelError, RunStopped
from rebel.job import quiet
from rebel.report import Terminal
from rebel.report.words import duration
from rebel.rewards.functions import Notes
from rebel.rounds.collector import Crew, by_shard, check_whole, draw, score
from rebel.rounds.elsewhere import DrawnElsewhere
from rebel.rounds.rollouts import (
    Manifest,
    Rollouts,
    as_json,
    claim,
    of_prompts,
    of_weights,
    read_manifest,
    table_of,
    write_json,
)
from rebel.rounds.shards import DIGITS
from rebel.signals import heeding_signals
from rebel.types import Prompt

SCORED_BY = "rewards.json"


@dataclass
class Watcher:
    """Shows the progress of a stage and hears when it is to stop."""

    terminal: Terminal
    world: int = 1
    signalled: str | None = None

    def phase(self, name: str, total: int) -> AbstractContextManager[Callable[..., None]]:
        return self.terminal.phase(name, total)

    def stop(self) -> bool:
        asked = self.signalled is not None
        return any(gather_object([asked])) if self.world > 1 else asked

    def hear(self, name: str) -> None:
        self.signalled = name
        self.terminal.say(f"{name}: stopping at the next safe place; once more to stop at once")


def rollout(config: RebelConfig, from_file: str | None = None) -> None:
    """`rebel rollout`: completions of the training prompts into the folder --from_rollouts, by the policy or a file."""
    quiet()
    if from_file:
        return take_over(config, from_file)
    training = build_prompts(config)[0]
    tokenizer = build_tokenizer(config)
    accelerator = build_accelerator(config)
    policy = build_policy(build_model(config).to(accelerator.device), tokenizer, config)
    prompts, dropped = fitting(training, policy, config)
    crew, watcher = crew_of(config)
    size = round_size(config, prompts)
    manifest = description(config, size, of_prompts(prompts), policy, 0, of_weights(policy.scorer))
    rollouts = crew.agreed(lambda: claim(home(config), manifest))
    lost = f"; {dropped:,} longer than fits were dropped" if dropped else ""
    crew.say(
        f"{rollouts.folder}: {size:,} prompts x {config.num_generations} completions in {rollouts.shards} shards{lost}"
    )
    stream = PromptStream(prompts, config.seed)

    def of_shard(shard: int) -> list[Prompt]:
        return stream.take(shard * manifest.shard, rollouts.size(shard))

    chunk = max(1, config.sampling_batch // config.num_generations)
    sampler = build_sampler(config, policy, accelerator, prompts)
    sampler.refresh()
    began = time.perf_counter()
    with going_on(watcher, rollouts, "rebel rollout"):
        tokens = draw(rollouts, sampler, of_shard, config.num_generations, chunk, crew)
    if tokens:
        took = time.perf_counter() - began
        crew.say(f"drawn: {tokens:,} tokens in {duration(took)}, {tokens / took:,.0f} tokens a second")
    crew.say(f"next: rebel score {rollouts.folder} --reward_funcs ...")


def take_over(config: RebelConfig, file: str) -> None:
    """Completions that another program drew, from a file, as rollouts."""
    rows = rows_of(file, config.dataset_train_split)
    policy = build_policy(build_model(config), build_tokenizer(config), config)
    positions = getattr(policy.bare.causal.config.get_text_config(), "max_position_embeddings", 2**31)
    drawn = DrawnElsewhere(rows, policy, file, config.max_prompt_length, positions)
    takes, long, few = drawn.usable()
    manifest = Manifest(
        prompts=len(takes),
        shard=config.shard_prompts,
        policy="",
        tokenizer=of_tokenizer(policy),
        prompt_set=of_rows(rows),
        drawn_by=file,
        settings={"max_prompt_length": config.max_prompt_length},
    )
    crew, watcher = crew_of(config)
    rollouts = crew.agreed(lambda: claim(home(config), manifest))
    crew.say(
        f"{rollouts.folder}: {len(takes):,} prompts of {file}; left out: {long:,} too long, {few:,} with fewer than "
        "two completions"
    )

    def make(shard: int, done: Callable[..., None]) -> None:
        some = takes[shard * manifest.shard :][: rollouts.size(shard)]
        rollouts.completions.write(shard, table_of([drawn.rollout(k) for k in some]), manifest.identity)
        done(len(some))

    with going_on(watcher, rollouts, "rebel rollout"):
        todo = crew.agreed(lambda: rollouts.completions.states(rollouts.shards, lambda shard: manifest.identity))
        by_shard("reading", rollouts, todo, make, crew)
    crew.say(f"next: rebel score {rollouts.folder} --reward_funcs ...")


def score_rollouts(config: RebelConfig, folder: str) -> None:
    """`rebel score`: rewards of the rollouts of a folder, beside them."""
    quiet()
    reward = build_reward(config, Notes())
    rollouts = Rollouts(Path(folder), read_manifest(Path(folder)))
    crew, watcher = crew_of(config)
    crew.agreed(lambda: check_whole(rollouts))
    crew.agreed(lambda: claim_rewards(rollouts, config))
    reward.check([rollout.prompt for rollout in rollouts.drawn(0)])
    with going_on(watcher, rollouts, f"rebel score {folder}"):
        score(rollouts, reward, crew)
    crew.say(f"next: rebel train --from_rollouts {folder} ...")


def claim_rewards(rollouts: Rollouts, config: RebelConfig) -> None:
    """Note who scores; an error where another reward has begun to."""
    path = rollouts.rewards.folder / SCORED_BY
    now = scored_by(config)
    if path.exists() and json.loads(path.read_text()) != now:
        raise RebelError(
            f"{rollouts.rewards.folder} has rewards of {json.loads(path.read_text())}, not of {now}. Rewards are "
            "never mixed: give the same, or delete that folder to score anew"
        )
    write_json(path, now)


def scored_by(config: RebelConfig) -> str:
    """The rewards by their weights and names, a file's by its content too: it may change and keep its name."""
    weights = config.reward_weights or [1.0] * len(config.reward_funcs)
    return ", ".join(f"{w:g} x {name}{edition(name)}" for w, name in zip(weights, config.reward_funcs, strict=True))


def edition(reward: str) -> str:
    """Which edition of its file a reward is of; nothing where it is not a file's."""
    file = Path(reward.rpartition(":")[0]).expanduser()
    if file.suffix != ".py" or not file.is_file():
        return ""
    return f" (edition {blake2b(file.read_bytes(), digest_size=4).hexdigest()})"


def home(config: RebelConfig) -> Path:
    return Path(str(config.from_rollouts))


def crew_of(config: RebelConfig) -> tuple[Crew, Watcher]:
    """The processes of this command and what they watch."""
    state = PartialState(cpu=config.use_cpu)
    terminal = Terminal(None, disable=config.disable_tqdm, silent=not state.is_main_process)
    watcher = Watcher(terminal, state.num_processes)
    return Crew(watcher, terminal.say, state.process_index, state.num_processes), watcher


def rows_of(file: str, split: str) -> Dataset:
    """The rows of a file of rollouts."""
    try:
        return load_rows(file, split)
    except RebelError as error:
        raise RebelError(str(error).replace("--dataset_name", "--from_file")) from None


def of_rows(rows: Dataset) -> str:
    """The fingerprint of the rows of a file."""
    found = blake2b(digest_size=DIGITS // 2)
    for row in rows:
        found.update(as_json(row).encode())
    return found.hexdigest()


@contextmanager
def going_on(watcher: Watcher, rollouts: Rollouts, again: str) -> Iterator[None]:
    """Within this context a signal ends the work between two files; says what makes it go on."""
    try:
        with heeding_signals(watcher.hear):
            yield
    except Interrupted:
        why = watcher.signalled or "a signal to another process"
        raise RunStopped(
            f"{why}: the files that are complete stay in {rollouts.folder}. Go on with the same command: {again}"
        ) from None
