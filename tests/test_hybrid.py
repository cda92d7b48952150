"""Completions of the data beside the policy's own: who drew what, what is measured of whom, and the same minimiser."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from rebel import RebelConfig, RebelTrainer, job
from rebel.algorithm import regression_batch, step_size, trace_weights
from rebel.errors import RebelError
from rebel.measures import drawn_by_policy, of_draws
from rebel.pairing import all_pairs
from rebel.policies.causal_lm import causal_lm
from rebel.report import read_rows
from rebel.samplers.hybrid import FromColumns, Hybrid
from rebel.types import DATA, OWN, Completion, Prompt, Rollout, Scored, TokenTrace
from rebel.validate import validate
from rebel.way import probe

F64 = torch.float64


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "write_report", lambda folder: folder)


# -- the exact minimiser ---------------------------------------------------------------------------------------------


def exact(logits: Tensor, rewards: Tensor, drawn: Tensor, step: float, beta: float, reference: Tensor) -> Tensor:
    """log pi minimising the expected loss over pairs drawn independently from `drawn`, solved in the logits."""
    anchor, count = logits.log_softmax(-1), len(logits)
    rollout = Rollout(Prompt("x"), tuple(Completion(str(i), i) for i in range(count)))
    batch = regression_batch(Scored(rollout, rewards=rewards), all_pairs, anchor, reference, beta)
    weight = 2 * drawn[batch.pairs[:, 0]] * drawn[batch.pairs[:, 1]]
    rows = torch.zeros(len(batch.pairs), count, dtype=F64)
    rows[torch.arange(len(rows)), batch.pairs[:, 0]] = 1.0
    rows[torch.arange(len(rows)), batch.pairs[:, 1]] = -1.0
    target = step * batch.margin + rows @ anchor
    root = weight.sqrt()[:, None]
    found = torch.linalg.lstsq(root * rows, root[:, 0] * target, driver="gelsd").solution.log_softmax(-1)
    pull = trace_weights(found, type(batch)(batch.traces, anchor, batch.pairs, batch.margin, weight), step)
    assert pull.abs().max() < 1e-10, "the gradient of the loss is zero there"
    return found


@pytest.mark.parametrize(("eta", "beta"), [(2.0, 0.0), (5.0, 0.3)])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.9])
def test_the_minimiser_is_the_same_for_any_mixture_of_sources_with_full_support(
    share: float, eta: float, beta: float
) -> None:
    """pi_t exp(eta' r~), whoever drew: no importance weights are needed, and none are used."""
    logits, others, rewards, far = (torch.randn(7, dtype=F64) for _ in range(4))
    anchor, reference, step = logits.log_softmax(-1), far.log_softmax(-1), step_size(eta, beta)
    drawn = (1 - share) * logits.softmax(-1) + share * (3 * others).softmax(-1)
    shaped = rewards - beta * (anchor - reference)
    expected = (anchor + step * shaped).log_softmax(-1)
    torch.testing.assert_close(exact(logits, rewards, drawn, step, beta, reference), expected, rtol=1e-9, atol=1e-9)


# -- sampling --------------------------------------------------------------------------------------------------------


class Counting:
    """Draws the numbers 0, 1, ... and notes how many it was asked for."""

    def __call__(self, prompts: Sequence[Prompt], group_size: int, seed: int) -> Iterator[Rollout]:
        for prompt in prompts:
            yield Rollout(prompt, tuple(Completion(str(k), TokenTrace((1,), (k,))) for k in range(group_size)))

    def refresh(self) -> None: ...

    def close(self) -> None: ...


def hybrid(count: int, columns: Sequence[str] = ("chosen", "more"), longest: int = 9) -> Hybrid:
    policy = causal_lm(tiny.small(), tiny.tokenizer(chat=True))
    return Hybrid(Counting(), FromColumns(policy, tuple(columns), longest), count)


def test_a_group_has_the_stated_share_of_each_source() -> None:
    prompt = Prompt("w1", {"chosen": " w2", "more": [" w3", " w4", " w5"], "label": 3})
    (rollout,) = hybrid(2)([prompt], 5, seed=0)
    assert [c.source for c in rollout.completions] == [OWN] * 3 + [DATA] * 2
    assert {c.content for c in rollout.completions[3:]} < {" w2", " w3", " w4", " w5"}
    assert all(c.finished and c.trace.completion[-1] == tiny.EOS for c in rollout.completions[3:])


def test_the_same_seed_takes_the_same_completions_and_others_take_others() -> None:
    prompts = [Prompt("w1", {"more": [f" w{k}" for k in range(9)]})] * 4

    def taken(seed: int) -> list[list[Any]]:
        return [[c.content for c in rollout.completions[1:]] for rollout in hybrid(2, ["more"])(prompts, 3, seed)]

    assert taken(1) == taken(1) != taken(2)
    assert len({tuple(chosen) for chosen in taken(1)}) > 1


def test_where_a_prompt_has_fewer_the_group_is_smaller_and_nothing_is_cut() -> None:
    prompt = Prompt("w1", {"chosen": None, "more": [" w3", " w4" * 20]})
    (rollout,) = hybrid(2)([prompt], 4, seed=0)
    assert [c.content for c in rollout.completions] == ["0", "1", " w3"]


def test_messages_answer_messages() -> None:
    talk = [{"role": "user", "content": "w1"}]
    said = [{"role": "assistant", "content": "w2"}]
    prompt = Prompt(talk, {"text": "w2", "messages": said, "whole": talk + said, "two": [said, said]})
    for column, count in (("text", 1), ("messages", 1), ("whole", 1), ("two", 2)):
        beside = FromColumns(causal_lm(tiny.small(), tiny.tokenizer(chat=True)), (column,), 9)
        found = beside(prompt)
        assert [c.content for c in found] == [said] * count
    with pytest.raises(RebelError, match=r"--data_columns messages: .* is no answer to 'w1'"):
        hybrid(1, ["messages"])([Prompt("w1", prompt.meta)], 2, 0).__next__()
    with pytest.raises(RebelError, match="--data_columns none: the data have only text, messages"):
        hybrid(1, ["none"])([prompt], 2, 0).__next__()


# -- measures --------------------------------------------------------------------------------------------------------


def mixed() -> Scored:
    sources, lengths = [OWN, OWN, DATA], [2, 4, 9]
    completions = [Completion("y", tiny.trace(2, n), source=s) for s, n in zip(sources, lengths, strict=True)]
    return Scored(Rollout(Prompt("x"), tuple(completions)), rewards=torch.tensor([1.0, 3.0, 8.0]))


def test_lengths_and_rewards_of_the_policy_are_of_its_own_completions_alone() -> None:
    found = of_draws([mixed()], [mixed()])
    assert (found["reward"], found["length"]) == (2.0, 3.0) == (found["policy/reward"], found["policy/length"])
    assert (found["data/reward"], found["data/length"]) == (8.0, 9.0)
    assert drawn_by_policy(mixed()).tolist() == [True, True, False]
    assert probe([mixed()]) == mixed().rollout.traces[:2]
    alone = Scored(Rollout(Prompt("x"), mixed().rollout.completions[:2]), rewards=torch.tensor([1.0, 3.0]))
    assert not any("/" in name for name in of_draws([alone], [alone]))


def run(folder: Path, **settings: Any) -> RebelTrainer:
    config = {**tiny.SETTINGS, "output_dir": str(folder), "kl_per_iteration": None}
    config |= {"data_columns": ["demo"], "data_completions": 1, **settings}
    rows = [{"prompt": f"w{k % 5}", "demo": [" w1 w3 w5 w7", " w9 w11"]} for k in range(14)]
    trainer = RebelTrainer(
        tiny.small(),
        tiny.evenness,
        args=RebelConfig(**config),
        train_dataset=rows,
        eval_dataset=rows[:3],
        processing_class=tiny.tokenizer(),
    )
    trainer.train()
    return trainer


def test_a_hybrid_run_separates_its_sources(tmp_path: Path) -> None:
    made = run(tmp_path, track_kl=True, num_generations=4, learning_rate=1e-2)
    assert any(line.startswith("hybrid       1 of 4 completions are the data's") for line in made.job.plan)
    last = read_rows(tmp_path / "metrics.jsonl")[-1]
    assert last["data/reward"] == 1.0 and 3 <= last["data/length"] <= 5
    assert last["samples"] == 3 * 6 * 4
    for name in ("reward", "length", "unfinished", "logratio", "logratio_initial"):
        assert math.isfinite(last[f"policy/{name}"]) and math.isfinite(last[f"data/{name}"])
    assert last["kl_initial"] == pytest.approx(last["policy/logratio_initial"], rel=1e-5)
    assert last["reward"] == last["policy/reward"]
    assert not any(name.startswith("eval/data") for name in last), "the evaluation is of the policy alone"


def test_a_hybrid_run_learns_from_what_it_would_not_draw(tmp_path: Path) -> None:
    run(tmp_path, iterations=12, eta=3.0, learning_rate=1e-2)
    rows = [row for row in read_rows(tmp_path / "metrics.jsonl") if "data/logratio" in row]
    assert sum(row["data/logratio"] for row in rows[-6:]) > sum(row["policy/logratio"] for row in rows[-6:])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"data_completions": 1}, "give both"),
        ({"data_columns": ["chosen"]}, "give both"),
        ({"data_completions": 8, "data_columns": ["c"]}, "leaves nothing for the policy to draw"),
        ({"data_completions": 1, "data_columns": ["c"], "rounds": 1}, "rounds are of completions that the policy drew"),
        ({"data_completions": -1, "data_columns": ["c"]}, "--data_completions -1: use 0 or more"),
    ],
)
def test_shares_that_make_no_sense_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(RebelError, match=words):
        validate(RebelConfig(iterations=1, **settings), inputs=False)


def test_columns_without_any_completion_that_fits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RebelError, match="no prompt has a completion there of at most --max_completion_length 2"):
        run(tmp_path, max_completion_length=2)
