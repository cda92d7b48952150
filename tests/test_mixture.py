"""The mixture of iterates: which are kept, that each completion is drawn from one of them, and its probability."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from rebel.build.rewards import build_reward
from rebel.cli import main
from rebel.config import RebelConfig
from rebel.errors import RebelError
from rebel.iterates import Iterates, iteration_of
from rebel.job import sample
from rebel.report import read_rows
from rebel.report.headline import whose
from rebel.rewards.functions import Notes
from rebel.samplers.generate import Generate
from rebel.samplers.mixture import Mixture
from rebel.trainer import RebelTrainer
from rebel.types import Sampler
from rebel.validate import validate


def kept(store: Iterates) -> list[int]:
    return [iteration_of(path) for path in store.stored()]


def filled(folder: Path, most: int, total: int, until: int) -> Iterates:
    """A store after `until` iterations, in each of which the one weight is the iteration's number."""
    weight = torch.zeros(2)
    store = Iterates(folder, {"w": weight}, most, total)
    for iteration in range(1, until + 1):
        weight.fill_(iteration)
        store.keep(iteration)
    return store


@pytest.mark.parametrize(
    ("most", "total", "expected"),
    [(4, 12, [3, 6, 9, 12]), (3, 10, [4, 7, 10]), (8, 3, [1, 2, 3]), (1, 5, [5])],
)
def test_iterates_are_kept_evenly_and_the_last_one_is_among_them(
    tmp_path: Path, most: int, total: int, expected: list[int]
) -> None:
    store = filled(tmp_path, most, total, total)
    assert kept(store) == expected
    for path in store.stored():
        with store.loaded(path):
            assert store.weights["w"].tolist() == [iteration_of(path)] * 2
        assert store.weights["w"].tolist() == [total] * 2


def test_a_longer_run_thins_out_what_the_shorter_one_kept(tmp_path: Path) -> None:
    filled(tmp_path, 4, 8, 8)  # 2 4 6 8
    longer = Iterates(tmp_path, {"w": torch.zeros(2)}, 4, 16)
    longer.begin(8)
    assert kept(longer) == [4, 8]


def test_what_lies_beyond_a_checkpoint_is_forgotten(tmp_path: Path) -> None:
    store = filled(tmp_path, 4, 8, 7)
    store.begin(5)
    assert kept(store) == [2, 4]


def test_iterates_of_another_model_are_refused(tmp_path: Path) -> None:
    filled(tmp_path, 1, 1, 1)
    other = Iterates(tmp_path, {"v": torch.zeros(2)})
    with pytest.raises(RebelError, match="another model: there is no w"), other.loaded(other.stored()[0]):
        pass


def speaking(tmp_path: Path, tokens: list[int]) -> tuple[Generate, Iterates]:
    """A sampler and iterates of which each says one word only."""
    policy = tiny.policy(vocab_size=tiny.VOCABULARY)
    bias = torch.nn.Parameter(torch.zeros(tiny.VOCABULARY))
    head: Any = policy.model.get_output_embeddings()
    head.bias = bias
    store = Iterates(tmp_path, {"lm_head.bias": bias}, len(tokens), len(tokens))
    for iteration, token in enumerate(tokens, 1):
        bias.data.zero_()[token] = 100.0
        store.keep(iteration)
    bias.data.zero_()
    return Generate(policy, max_new_tokens=2, temperature=1.0), store


def test_each_completion_is_drawn_from_one_iterate_and_all_alike(tmp_path: Path) -> None:
    sampler, store = speaking(tmp_path, [10, 11, 12])
    mixture = Mixture(sampler, store, batch=7)
    assert isinstance(mixture, Sampler)
    prompts = tiny.prompts(2, 5, 3)
    groups = list(mixture(prompts, 60, seed=5))
    assert [group.prompt for group in groups] == prompts
    said = [c.trace.completion for group in groups for c in group.completions]
    assert all(a == b for a, b in said), "one policy draws the whole completion"
    shares = [sum(a == token for a, _ in said) / len(said) for token in (10, 11, 12)]
    assert sum(shares) == pytest.approx(1.0) and all(abs(share - 1 / 3) < 0.12 for share in shares)
    again = [c.trace.completion for group in mixture(prompts, 60, seed=5) for c in group.completions]
    other = [c.trace.completion for group in mixture(prompts, 60, seed=6) for c in group.completions]
    assert again == said and other != said


def test_its_probability_is_the_mean_of_theirs(tmp_path: Path) -> None:
    sampler, store = speaking(tmp_path, [10, 11])
    policy = sampler.policy
    traces = [tiny.TokenTrace((1, 5), (10, 10)), tiny.TokenTrace((1, 5), (11, 10)), tiny.trace(3, 4)]

    @torch.no_grad()
    def score(some: Any) -> torch.Tensor:
        return policy.log_prob(some).double().sum(dim=1)

    each = []
    for path in store.stored():
        with store.loaded(path):
            each.append(score(traces).exp())
    mixed = Mixture(sampler, store).scored(score)(traces)
    torch.testing.assert_close(mixed.exp(), torch.stack(each).mean(dim=0))
    assert mixed[0].item() == pytest.approx(-math.log(2), abs=1e-3)
    assert mixed[1].item() < -50, "a mixture of policies, not of next words"


def test_with_nothing_stored_it_is_the_policy(tmp_path: Path) -> None:
    sampler = Generate(tiny.policy(), max_new_tokens=3, temperature=1.0)
    mixture = Mixture(sampler, Iterates(tmp_path, {}))
    assert list(mixture(tiny.prompts(2), 4, 0)) == list(sampler(tiny.prompts(2), 4, 0))
    assert mixture.scored(lambda traces: torch.ones(1))([]).tolist() == [1.0]


# -- in a run ------------------------------------------------------------------------------------------------------


def test_a_run_evaluates_its_mixture_says_so_and_is_resumed_with_it(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = {"mixture": 2, "eval_steps": 3, "save_steps": 3, "eval_generations": 2, "track_kl": True}
    tiny.trained(whole, iterations=4, **settings)
    rows = read_rows(whole / "metrics.jsonl")
    assert [row.get("eval/policy") for row in rows] == ["mixture"] * 5
    assert sorted(p.name for p in (whole / "iterates").iterdir()) == ["2.safetensors", "4.safetensors"]
    tiny.trained(parts, iterations=2, **settings)
    tiny.trained(parts, resume=True, iterations=4, **settings)
    assert sorted(p.name for p in (parts / "iterates").iterdir()) == ["2.safetensors", "4.safetensors"]
    assert tiny.rows(parts)[-1] == tiny.rows(whole)[-1]


@pytest.mark.parametrize(("settings", "policy"), [({}, "last"), ({"average": 0.5}, "averaged")])
def test_every_evaluation_says_which_policy_it_is_of(tmp_path: Path, settings: dict[str, Any], policy: str) -> None:
    tiny.trained(tmp_path, iterations=1, **settings)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert {row["eval/policy"] for row in rows} == {policy}
    assert (policy in whose(rows)) == (policy != "last") and whose([]) == ""


@pytest.mark.parametrize("adapter", [False, True])
def test_samples_of_a_runs_mixture(tmp_path: Path, adapter: bool) -> None:
    small, run = tmp_path / "small", tmp_path / "run"
    tiny.small().save_pretrained(small)
    tiny.tokenizer().save_pretrained(small)
    trained(small, run, adapter)
    files = sorted((run / "iterates").glob("*.safetensors"))
    assert len(files) == 2
    names = set(load_file(files[0]))
    assert all("lora_" in name for name in names) if adapter else "model.embed_tokens.weight" in names
    drawn = sample(run, ["w1 w2"], 6, None, 4, mixture=True)
    assert len(drawn[0]) == 6 and drawn == sample(run, ["w1 w2"], 6, None, 4, mixture=True)
    for file in files:
        file.unlink()
    with pytest.raises(RebelError, match="has kept no iterates"):
        sample(run, ["w1"], 1, None, None, mixture=True)


def trained(model: Path, folder: Path, adapter: bool) -> None:
    settings = {**tiny.SETTINGS, "eta": "auto", "iterations": 2, "mixture": 2, "use_peft": adapter}
    rows = [{"prompt": f"w{k} w{k + 1}"} for k in range(12)]
    RebelTrainer(str(model), tiny.evenness, RebelConfig(**settings, output_dir=str(folder)), rows).train()


def judge(first: list[str], second: list[str], **kwargs: Any) -> list[float]:
    """Prefers the text with the word that comes first in the alphabet, and likes the first place a little."""
    return [min(1.0, 0.2 + (a < b) * 0.7) for a, b in zip(first, second, strict=True)]


def test_a_run_with_a_judge_in_place_of_a_reward(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("from test_mixture import judge\n")
    settings = {
        **tiny.SETTINGS,
        "eta": "auto",
        "iterations": 2,
        "judge": f"{tmp_path}/mine.py:judge",
        "eval_generations": 2,
    }
    config = RebelConfig(**settings, output_dir=str(tmp_path / "run"))
    tiny.small().save_pretrained(tmp_path / "small")
    rows = [{"prompt": f"w{k} w{k + 1}"} for k in range(12)]
    trainer = RebelTrainer(str(tmp_path / "small"), [], config, rows, rows[:3], tiny.tokenizer())
    trainer.train()
    written = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["reward"] for row in written[1:]] == pytest.approx([0.5, 0.5])
    assert all(0.05 < row["judge/swap_gap"] < 0.2 and row["judge/contradictions"] == 0 for row in written[1:])
    assert written[0]["eval/reward"] == pytest.approx(0.5), "the initial policy against itself"
    assert "judge/swap_gap" not in written[0] and 0.05 < written[-1]["eval/judge/swap_gap"] < 0.2
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Held-out judges" not in page, "how sure the judge is of itself is no verdict of another one"
    assert written[-1]["eval/rewards/judge"] == written[-1]["eval/reward"] != 0.5
    opponents = [json.loads(line) for line in (tmp_path / "run" / "opponents.jsonl").read_text().splitlines()]
    assert len(opponents) == 3 and all(len(row["completions"]) == 2 for row in opponents)


def test_a_judge_is_one_more_of_the_weighted_rewards(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("from test_mixture import judge\n")
    config = RebelConfig(judge=f"{tmp_path}/mine.py:judge", reward_weights=[1.0, 0.5], output_dir=str(tmp_path))
    reward = build_reward(config, Notes(), [tiny.evenness])
    assert reward.names == ("evenness", "judge") and reward.weights == [1.0, 0.5]


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text("from test_mixture import judge\n")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"prompt": f"w{k} w{k + 1}"}) + "\n" for k in range(16)))
    tiny.small().save_pretrained(tmp_path / "small")
    tiny.tokenizer().save_pretrained(tmp_path / "small")
    given = {
        "model_name_or_path": tmp_path / "small",
        "dataset_name": tmp_path / "data.jsonl",
        "output_dir": tmp_path / "run",
        "judge": f"{tmp_path}/mine.py:judge",
        "judge_opponents": "shared",
        "judge_unit": "advantage",
        "mixture": 2,
        "average": 0.0,
        **{k: v for k, v in tiny.SETTINGS.items() if k not in ("eta", "average", "use_cpu", "disable_tqdm")},
    }
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    assert main(["train", *words, "--use_cpu", "--disable_tqdm"]) == 0
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert rows[-1]["eval/policy"] == "mixture" and "judge/contradictions" in rows[-1]
    assert rows[0]["eval/reward"] == pytest.approx(0.0), "an advantage against oneself"
    capsys.readouterr()
    assert main(["sample", str(tmp_path / "run"), "--mixture", "--prompt", "w1 w2", "--n", "3"]) == 0
    assert capsys.readouterr().out.count("[") == 3
    assert "mixture of iterates" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"reward_funcs": ["f"], "judge": "j", "reward_weights": [1.0]}, "1 for 1 --reward_funcs and a --judge"),
        ({"judge_api_key_env": "sk-live-123"}, "no name of an environment variable"),
        ({"judge": "openai:m", "judge_base_url": "127.0.0.1"}, "an address such as"),
        ({"judge": "openai:m", "judge_base_url": "http://me:secret@host/v1"}, "holds more than an address"),
        ({"judge": "openai:m", "judge_args": {"api_key": "secret"}}, "looks like a key"),
        ({"judge": "f.py:g", "judge_base_url": "http://host/v1"}, "use --judge openai:MODEL"),
        ({"judge_deadline": 0.0}, "--judge_deadline 0"),
        ({"judge_concurrency": 0}, "--judge_concurrency 0"),
        ({"mixture": -1}, "--mixture -1"),
        ({"mixture": 2, "average": 0.3}, "both say what is evaluated"),
        ({"mixture": 2, "load_best_model_at_end": True}, "evaluates no single policy"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(RebelError, match=said) as refused:
        validate(RebelConfig(iterations=1, **settings), inputs=False)
    assert "secret" not in str(refused.value) and "sk-live" not in str(refused.value)
