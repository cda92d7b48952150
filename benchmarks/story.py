"""The task on which the methods are compared: a small pretrained story teller, rewards of its stories, exact limits.

The policy is stories260K, the prompts are first sentences of TinyStories. The folder with both is $REBEL_DATA, or
../shared/data beside the repository.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("REBEL_DATA") or ROOT.parent / "shared" / "data")
RESULTS = ROOT / "benchmarks" / "results"
RUNS = RESULTS / "frontier.jsonl"

EOS_IDS = (1, 2)
"""Stories end with BOS in this model's training data, so id 1 ends a completion as well."""
MAX_NEW_TOKENS = 64
HELD_OUT, TRAIN = 64, 836

RewardFunction = Callable[..., list[float]]
"""TRL's convention: fn(prompts=..., completions=..., **columns) -> one number for each completion."""


@dataclass(frozen=True, slots=True)
class Draw:
    """A completion as it was sampled; its ids include the EOS that ended it."""

    prompt: str
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    text: str

    @property
    def finished(self) -> bool:
        return self.completion_ids[-1] in EOS_IDS


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Means over completions of the policy, with standard errors over prompts; KL to the initial policy in nats."""

    reward: float
    reward_stderr: float
    kl: float
    """Mean log-ratio of a whole completion, its EOS included: unbiased, may be negative."""
    kl_stderr: float
    kl_k3: float
    """The same KL as the mean of exp(-log-ratio) - 1 + log-ratio: unbiased, never negative."""
    length: float
    finished: float
    """Share of completions that ended with EOS within the length limit."""


def folder(name: str) -> Path:
    """A folder of the data, or an error that says how to point to it."""
    path = DATA / name
    if not path.is_dir():
        raise SystemExit(f"{path} is missing; set REBEL_DATA to the folder that contains {name}/")
    return path


def load_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder("stories260K"), padding_side="left")


def load_policy() -> PreTrainedModel:
    """A fresh copy of the initial policy in fp32."""
    return AutoModelForCausalLM.from_pretrained(folder("stories260K"), dtype=torch.float32).eval()


@cache
def initial_policy() -> PreTrainedModel:
    """The one frozen copy that KL is measured against."""
    return load_policy().requires_grad_(False)


def load_prompts(tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], list[str]]:
    """The held-out prompts and the training prompts: those of fewer than 40 tokens, BOS included.

    First sentences repeat in the source, so a training prompt that is also held out is passed over.
    """
    rows = (folder("tinystories") / "prompts.jsonl").read_text().splitlines()
    prompts = [json.loads(row)["prompt"] for row in rows]
    ids = tokenizer(prompts)["input_ids"]
    assert all(row[0] == tokenizer.bos_token_id for row in ids), "the tokenizer must begin a prompt with BOS"
    short = [prompt for prompt, row in zip(prompts, ids, strict=True) if len(row) < 40]
    held_out = short[:HELD_OUT]
    others = [prompt for prompt in short[HELD_OUT:] if prompt not in set(held_out)]
    return held_out, others[:TRAIN]


@cache
def _vader() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()


def sentiment(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """VADER's compound sentiment of each completion, from -1 to 1: saturates, and single words decide it."""
    return [_vader().polarity_scores(text)["compound"] for text in completions]


def word_length(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """Mean number of letters in the words of each completion: every word counts a little, no ceiling."""
    words = [re.findall(r"[a-z]+", text.lower()) for text in completions]
    return [sum(map(len, found)) / max(len(found), 1) for found in words]


# half a story has a sentiment, and words
sentiment.judges_beginnings = word_length.judges_beginnings = True  # pyright: ignore[reportFunctionMemberAccess]

REWARDS: Mapping[str, RewardFunction] = {"sentiment": sentiment, "word_length": word_length}


@torch.no_grad()
def draw(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    completions_per_prompt: int,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[Draw]:
    """Completions of each prompt in turn. The caller's random numbers are left as they were."""
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        output = model.generate(  # pyright: ignore[reportCallIssue]
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=MAX_NEW_TOKENS,
            num_return_sequences=completions_per_prompt,
            eos_token_id=list(EOS_IDS),
            pad_token_id=tokenizer.pad_token_id,
        )
    prompt_ids = [tuple(ids) for ids in tokenizer(list(prompts))["input_ids"]]
    completions = [until_eos(row) for row in output[:, batch["input_ids"].shape[1] :].tolist()]
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    rows = [k // completions_per_prompt for k in range(len(texts))]
    return [
        Draw(prompts[row], prompt_ids[row], ids, text) for row, ids, text in zip(rows, completions, texts, strict=True)
    ]


def until_eos(ids: Sequence[int]) -> tuple[int, ...]:
    """The ids up to and including the first EOS."""
    ends = [place for place, token in enumerate(ids) if token in EOS_IDS]
    return tuple(ids[: ends[0] + 1]) if ends else tuple(ids)


@torch.no_grad()
def log_probs(model: PreTrainedModel, draws: Sequence[Draw], temperature: float = 1.0) -> Tensor:
    """log pi(y|x) of each completion in nats, summed over its tokens; masks come from lengths."""
    sums = []
    for start in range(0, len(draws), 64):
        chunk = draws[start : start + 64]
        ids = pad_sequence([torch.tensor(d.prompt_ids + d.completion_ids) for d in chunk], batch_first=True)
        begins = torch.tensor([len(d.prompt_ids) for d in chunk])[:, None]
        ends = begins + torch.tensor([len(d.completion_ids) for d in chunk])[:, None]
        place = torch.arange(ids.shape[1])[None]
        logits = model(input_ids=ids, attention_mask=(place < ends).long()).logits[:, :-1].float()
        logp = torch.log_softmax(logits / temperature, dim=-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        written = (place >= begins) & (place < ends)
        sums.append((logp * written[:, 1:]).sum(dim=1))
    return torch.cat(sums)


def score(draws: Sequence[Draw], reward: RewardFunction) -> Tensor:
    """The reward of each completion."""
    return torch.tensor(reward(prompts=[d.prompt for d in draws], completions=[d.text for d in draws]))


def clustered(values: Tensor, prompts: int) -> tuple[float, float]:
    """Mean of values that lie prompt by prompt, and its standard error with prompts as the clusters."""
    means = values.double().view(prompts, -1).mean(dim=1)
    return float(means.mean()), float(means.std() / prompts**0.5)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    reward: RewardFunction,
    completions_per_prompt: int = 8,
    temperature: float = 1.0,
    seed: int = 0,
) -> Evaluation:
    """Reward and KL to the initial policy of fresh completions; the model's mode is left as it was."""
    training = model.training
    model.eval()
    draws = draw(model, tokenizer, prompts, completions_per_prompt, temperature, seed)
    log_ratio = log_probs(model, draws, temperature) - log_probs(initial_policy(), draws, temperature)
    model.train(training)
    reward_mean, reward_stderr = clustered(score(draws, reward), len(prompts))
    kl, kl_stderr = clustered(log_ratio, len(prompts))
    return Evaluation(
        reward=reward_mean,
        reward_stderr=reward_stderr,
        kl=kl,
        kl_stderr=kl_stderr,
        kl_k3=float((torch.exp(-log_ratio) - 1 + log_ratio).mean()),
        length=sum(len(d.completion_ids) for d in draws) / len(draws),
        finished=sum(d.finished for d in draws) / len(draws),
    )


def initial_rewards(reward: str, completions_per_prompt: int = 256, path: Path | None = None) -> Tensor:
    """Rewards (held-out prompts, completions) of the initial policy; drawn once, then read from a file."""
    path = path or RESULTS / "initial_rewards.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(_draw_initial_rewards(completions_per_prompt)))
    return torch.tensor(json.loads(path.read_text())[reward], dtype=torch.float64)


def _draw_initial_rewards(completions_per_prompt: int) -> dict[str, list[list[float]]]:
    tokenizer = load_tokenizer()
    held_out, _ = load_prompts(tokenizer)
    rows: dict[str, list[list[float]]] = {name: [] for name in REWARDS}
    for seed, prompt in enumerate(held_out):
        draws = draw(initial_policy(), tokenizer, [prompt], completions_per_prompt, seed=seed)
        for name, reward in REWARDS.items():
            rows[name].append([round(value, 4) for value in score(draws, reward).tolist()])
    return rows


def best_value(rewards: Tensor, beta: float) -> float:
    """J*(beta) = beta * log mean exp(r / beta), over prompts: the most that E r - beta KL can be."""
    samples = torch.tensor(float(rewards.shape[1]), dtype=rewards.dtype)
    return float(beta * (torch.logsumexp(rewards / beta, dim=1) - samples.log()).mean())


def optimum(rewards: Tensor, beta: float) -> tuple[float, float]:
    """(reward, KL) of the exact optimum for this beta: the initial policy's completions weighted by exp(r / beta)."""
    weight = torch.softmax(rewards / beta, dim=1)
    kl = torch.xlogy(weight, weight * rewards.shape[1])
    return float((weight * rewards).sum(dim=1).mean()), float(kl.sum(dim=1).mean())


def optimum_line(reward: str, longest: float = 3.0, points: int = 80) -> list[dict[str, float]]:
    """The most reward that any policy has at each KL up to `longest` nats; beyond, too few completions carry it.

    Reweighted samples cannot show what they do not hold, so the line is a lower bound. Halving 256 completions a
    prompt to 128 lowers it at 2 and 3 nats by 0.002 and 0.003 for sentiment, by 0.014 and 0.028 for word_length.
    """
    rewards = initial_rewards(reward)
    spread = float(rewards.std(dim=1).mean())
    line = [{"beta": float("inf"), "reward": float(rewards.mean()), "kl": 0.0, "value": float(rewards.mean())}]
    for beta in (spread * torch.logspace(1.5, -2.5, points)).tolist():
        best, kl = optimum(rewards, beta)
        line.append({"beta": beta, "reward": best, "kl": kl, "value": best_value(rewards, beta)})
    return [point for point in line if point["kl"] <= longest]


def regularised_gain(reward: float, kl: float, beta: float, task: str = "sentiment") -> float:
    """(J - J_0) / (J* - J_0) with J = E r - beta KL: 0 for the initial policy, 1 for the exact optimum."""
    rewards = initial_rewards(task)
    start = float(rewards.mean())
    return (reward - beta * kl - start) / (best_value(rewards, beta) - start)


def read_runs(path: Path = RUNS) -> list[dict[str, Any]]:
    """The finished runs: method, task, settings, seed and curve of each."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def finished_run(runs: Sequence[Mapping[str, Any]], **wanted: Any) -> Mapping[str, Any] | None:
    """The run with this method, task, settings and seed, if there is one."""
    return next((run for run in runs if all(run.get(key) == value for key, value in wanted.items())), None)


def add_run(run: Mapping[str, Any], path: Path = RUNS) -> None:
    """Append one run in one write, so that two processes may share the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(run) + "\n")
