"""TRL's GRPOTrainer and RLOOTrainer on the task of story.py, tuned as REBEL is.

    python benchmarks/peers.py run --method grpo --learning_rate 1e-4 --seed 1
    python benchmarks/peers.py grid

Each finished run is one line of benchmarks/results/frontier.jsonl; a run that is there already is skipped.

What is matched: prompts, completions drawn, optimiser steps on each batch (`steps_per_generation` minibatches of
shuffled completions, `num_iterations` passes), AdamW without weight decay, gradients clipped at 1, constant
learning rate, fp32, temperature 1, 64 new tokens. Everything else is TRL's default (clipping range 0.2, loss type
"dapo"). Completions of this task are 64 tokens nearly always, so GRPO's loss types differ by a constant factor
only, which Adam ignores.

The price of KL. Here beta is what one nat of KL(pi || pi_ref) of a whole completion costs, in units of the reward:
the objective is J = E r - beta KL. TRL's beta is a coefficient of a KL per token. What that comes to:

* RLOOTrainer subtracts beta * sum_t log(pi_t / pi_ref) of the whole completion from its reward and leaves rewards
  unscaled (`normalize_advantages=False`). Its gradient at the anchor is that of J, without bias. beta_trl = beta.
* GRPOTrainer adds beta * KL_t to the loss of each token. The loss of a token is -A_i * ratio + beta * KL_t, and both
  are summed over the completion and divided by the same number (all the batch's tokens with "dapo" and "bnpo", a
  constant with "dr_grpo", the length of the completion with "grpo"): the division cancels, no factor of the length
  remains, and the price of a completion's summed KL is beta_trl for an advantage in units of the reward, that is
  with scale_rewards="none". Two differences remain. A_i = r_i - mean(r) with i in the mean has (G-1)/G of the
  gradient of E r, so the price in force is G/(G-1) * beta_trl: 0.057 for 0.05 at G = 8. And at the anchor the
  gradient of KL_t is log(pi_t / pi_ref) * grad log pi_t of that token alone (TRL's `use_bias_correction_kl`): a
  token pays for itself and not for the expensive prefix it leads to, so the fixed point is not pi_ref * exp(r / beta).
* With scale_rewards="group" the advantage is in standard deviations of the group, so beta_trl = beta / sigma, sigma
  the mean of the groups' standard deviations under the initial policy. As training makes groups more alike the
  price in units of the reward falls with their deviation: only the start is matched, nothing else can be.

So `--price` is one of: "trl", beta_trl = beta (over sigma for groups), what a user of TRL sets; "exact", GRPO's times
(G-1)/G; "reward", beta_trl = 0 and the reward function itself subtracts beta * log(pi_t / pi_ref) of the completion:
GRPO then climbs J as RLOO and REBEL do, keeping its ratios per token.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any, Literal

import story
import torch
import transformers
import trl
from datasets import Dataset
from transformers import TrainerCallback

MILESTONES = (320, 640, 1280, 2560, 5120)
METHODS = {"grpo": (trl.GRPOConfig, trl.GRPOTrainer), "rloo": (trl.RLOOConfig, trl.RLOOTrainer)}


@dataclass(frozen=True, slots=True)
class Settings:
    """One run of a peer, apart from its seed. An iteration draws prompts x group completions."""

    method: Literal["grpo", "rloo"] = "grpo"
    task: str = "sentiment"
    scale_rewards: Literal["none", "group"] = "none"
    learning_rate: float = 1e-4
    prompts: int = 8
    group: int = 8
    steps_per_generation: int = 8
    num_iterations: int = 1
    beta: float = 0.0
    price: Literal["trl", "exact", "reward"] = "trl"
    samples: int = 1280

    @property
    def per_iteration(self) -> int:
        return self.prompts * self.group

    @property
    def steps(self) -> int:
        """Optimiser steps on each iteration's batch."""
        return self.steps_per_generation * self.num_iterations


def trl_beta(settings: Settings) -> float:
    """TRL's beta for a price of settings.beta per nat of a completion; see the head of this file."""
    if settings.price == "reward":
        return 0.0
    beta = settings.beta
    if settings.method == "grpo" and settings.price == "exact":
        beta *= (settings.group - 1) / settings.group
    if settings.method == "grpo" and settings.scale_rewards == "group" and beta:
        beta /= float(story.initial_rewards(settings.task).std(dim=1).mean())
    return beta


def reward_function(settings: Settings, model: Any, tokenizer: Any) -> story.RewardFunction:
    """The task's reward, less the price of the completion's KL where the reward is to carry it."""
    task = story.REWARDS[settings.task]
    if settings.price != "reward":
        return task

    def priced(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        prompt_ids = tokenizer(prompts)["input_ids"]
        rows = zip(prompts, prompt_ids, completion_ids, completions, strict=True)
        draws = [story.Draw(prompt, tuple(ids), tuple(own), text) for prompt, ids, own, text in rows]
        log_ratio = story.log_probs(model, draws) - story.log_probs(story.initial_policy(), draws)
        rewards = torch.tensor(task(prompts=prompts, completions=completions))
        return (rewards - settings.beta * log_ratio).tolist()

    return priced


def trl_config(settings: Settings, seed: int, output_dir: str) -> Any:
    """The peer's own configuration object."""
    config, _ = METHODS[settings.method]
    scaling = {"scale_rewards": settings.scale_rewards} if settings.method == "grpo" else {}
    return config(
        output_dir=output_dir,
        seed=seed,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant",
        max_steps=-(-settings.samples // settings.per_iteration) * settings.steps,
        per_device_train_batch_size=settings.per_iteration // settings.steps_per_generation,
        steps_per_generation=settings.steps_per_generation,
        num_iterations=settings.num_iterations,
        num_generations=settings.group,
        max_completion_length=story.MAX_NEW_TOKENS,
        temperature=1.0,
        beta=trl_beta(settings),
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **scaling,
    )


class Curve(TrainerCallback):
    """Evaluates at the ends of iterations where the number of samples is a milestone."""

    def __init__(self, settings: Settings, tokenizer: Any, prompts: Sequence[str], seed: int) -> None:
        self.settings, self.tokenizer, self.prompts, self.seed = settings, tokenizer, prompts, seed
        self.points: list[dict[str, float]] = []
        self.seconds = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        iterations, rest = divmod(state.global_step, self.settings.steps)
        samples = iterations * self.settings.per_iteration
        if rest or samples not in MILESTONES:
            return
        begin = time.perf_counter()
        reward = story.REWARDS[self.settings.task]
        result = story.evaluate(model, self.tokenizer, self.prompts, reward, seed=self.seed)
        self.points.append({"samples": samples, "steps": state.global_step} | asdict(result))
        self.seconds += time.perf_counter() - begin


def run(settings: Settings, seed: int) -> dict[str, Any]:
    """Train and evaluate one peer; the row for the results file."""
    begin, begin_cpu = time.perf_counter(), time.process_time()
    tokenizer = story.load_tokenizer()
    held_out, train = story.load_prompts(tokenizer)
    curve = Curve(settings, tokenizer, held_out, seed)
    model = story.load_policy()
    _, trainer = METHODS[settings.method]
    with TemporaryDirectory() as folder:
        trainer(
            model=model,
            reward_funcs=reward_function(settings, model, tokenizer),
            args=trl_config(settings, seed, folder),
            train_dataset=Dataset.from_dict({"prompt": train}),
            processing_class=tokenizer,
            callbacks=[curve],
        ).train()
    seconds = time.perf_counter() - begin
    return identity(settings, seed) | {
        "beta_trl": trl_beta(settings),
        "curve": curve.points,
        "seconds": {"training": round(seconds - curve.seconds, 1), "evaluation": round(curve.seconds, 1)},
        "cpu_seconds": round(time.process_time() - begin_cpu, 1),
        "versions": {"trl": trl.__version__, "transformers": transformers.__version__},
    }


def identity(settings: Settings, seed: int) -> dict[str, Any]:
    """What tells a run from all others."""
    named = asdict(settings)
    return {"method": named.pop("method"), "task": named.pop("task"), "settings": named, "seed": seed}


def run_once(settings: Settings, seed: int) -> dict[str, Any]:
    """The row of this run: from the results file, or run now and added to it."""
    done = story.finished_run(story.read_runs(), **identity(settings, seed))
    if done:
        return dict(done)
    row = run(settings, seed)
    story.add_run(row)
    show(row)
    return row


def show(row: dict[str, Any]) -> None:
    """One line for the log."""
    settings = row["settings"]
    points = "  ".join(f"{p['samples']}: {p['reward']:.3f} at {p['kl']:.2f}" for p in row["curve"])
    names = (row["method"], settings["scale_rewards"], f"lr {settings['learning_rate']:g}")
    batch = f"{settings['prompts']}x{settings['group']}/{settings['steps_per_generation']}x{settings['num_iterations']}"
    price = f"beta {settings['beta']:g} ({settings['price']})"
    print(
        f"{' '.join(names)} {batch} {price} seed {row['seed']}  {points}  {row['cpu_seconds']} CPU seconds", flush=True
    )


FREE = Settings(prompts=8, samples=1280)
"""Without a KL term: 8 prompts x 8 completions and 8 steps an iteration."""
PRICED = Settings(prompts=32, samples=5120, beta=0.05)
"""With a KL term: 32 prompts x 8 completions and 8 steps an iteration."""
LEARNING_RATES = (1e-4, 3e-5, 3e-4)
SEEDS = (1, 2, 3, 4, 5)

Runs = Iterator[tuple[Settings, int]]


def regularised_gain(row: dict[str, Any]) -> float:
    """The fraction of the regularised gain at the end of a run."""
    last, settings = row["curve"][-1], row["settings"]
    return story.regularised_gain(last["reward"], last["kl"], settings["beta"], row["task"])


def rates(settings: Settings, seeds: Sequence[int], of: Sequence[float] = LEARNING_RATES) -> Runs:
    """These seeds of each learning rate."""
    yield from ((replace(settings, learning_rate=rate), seed) for rate in of for seed in seeds)


def best_rate(settings: Settings, seeds: Sequence[int]) -> Settings:
    """The learning rate with the largest regularised gain over these seeds."""
    candidates = [replace(settings, learning_rate=rate) for rate in LEARNING_RATES]
    return max(candidates, key=lambda one: fmean(regularised_gain(run_once(one, seed)) for seed in seeds))


def grid() -> Runs:
    """Every run of the comparison, the most telling ones first; a stopped grid goes on where it was."""
    rloo, rloo_priced = replace(FREE, method="rloo"), replace(PRICED, method="rloo")
    yield from ((FREE, seed) for seed in SEEDS)
    yield from rates(PRICED, SEEDS[:2])
    yield from ((best_rate(PRICED, SEEDS[:2]), seed) for seed in SEEDS)
    yield from ((rloo, seed) for seed in SEEDS)
    yield from rates(rloo_priced, SEEDS[:1])
    yield from ((best_rate(rloo_priced, SEEDS[:1]), seed) for seed in SEEDS[:3])
    yield from ((replace(best_rate(PRICED, SEEDS[:2]), price="reward"), seed) for seed in SEEDS[:2])
    yield from ((replace(FREE, scale_rewards="group"), seed) for seed in SEEDS[:3])
    yield from ((replace(FREE, steps_per_generation=2, num_iterations=4), seed) for seed in SEEDS[:2])
    yield from ((replace(FREE, num_iterations=4, learning_rate=5e-5), seed) for seed in SEEDS[:3])
    yield from ((replace(PRICED, num_iterations=4, learning_rate=3e-5), seed) for seed in SEEDS[:2])
    yield from ((replace(FREE, task="word_length"), seed) for seed in SEEDS[:3])
    yield from ((replace(FREE, task="word_length", num_iterations=4, learning_rate=5e-5), seed) for seed in SEEDS[:3])
    yield from rates(FREE, SEEDS[:2], of=LEARNING_RATES[1:])
    yield from rates(rloo, SEEDS[:2], of=LEARNING_RATES[1:])


def remaining_seeds() -> Runs:
    """The seeds that the grid leaves out for time."""
    rloo, rloo_priced = replace(FREE, method="rloo"), replace(PRICED, method="rloo")
    yield from ((best_rate(rloo_priced, SEEDS[:1]), seed) for seed in SEEDS[3:])
    yield from ((replace(FREE, scale_rewards="group"), seed) for seed in SEEDS[3:])
    yield from rates(FREE, SEEDS[2:], of=LEARNING_RATES[1:])
    yield from rates(rloo, SEEDS[2:], of=LEARNING_RATES[1:])


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="TRL's trainers on the story task")
    commands = parser.add_subparsers(dest="command", required=True)
    several = commands.add_parser("grid", help="the runs of the comparison")
    several.add_argument("--all", action="store_true", help="and the seeds that are left out for time")
    one = commands.add_parser("run", help="one run", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    one.add_argument("--seed", type=int, default=1)
    choices = {"method": ["grpo", "rloo"], "scale_rewards": ["none", "group"], "task": list(story.REWARDS)}
    choices["price"] = ["trl", "exact", "reward"]
    for name, value in asdict(Settings()).items():
        one.add_argument(f"--{name}", type=type(value), default=value, choices=choices.get(name), help=" ")
    return parser.parse_args(arguments)


def main() -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    options = vars(parse())
    if options.pop("command") == "grid":
        runs = chain(grid(), remaining_seeds() if options["all"] else ())
    else:
        seed = options.pop("seed")
        runs = iter([(Settings(**options), seed)])
    for settings, seed in runs:
        run_once(settings, seed)


if __name__ == "__main__":
    main()
