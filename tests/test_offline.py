"""Learning from recorded completions: the same loop, with the initial policy as its anchor from first to last."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback

from rebel import RebelConfig, RebelTrainer, job
from rebel.build.offline import apart, build_groups, rows_of
from rebel.cli import main
from rebel.data import laps
from rebel.errors import RebelError
from rebel.fit import Regression, fit, split
from rebel.from_trl import translate_batch
from rebel.learner import Learner, learner
from rebel.offline.anchors import AnchorFile, hash_of_weights
from rebel.offline.collector import accuracy
from rebel.offline.recorded import Groups
from rebel.pairing import all_pairs
from rebel.policies.causal_lm import causal_lm
from rebel.report import write_report
from rebel.stepsize import REACH, GivenEta
from rebel.types import DATA, Completion, Prompt, Rollout, Scored, TokenTrace
from rebel.validate import validate

SETTINGS: dict[str, Any] = {
    **{k: v for k, v in tiny.SETTINGS.items() if k not in ("iterations", "kl_per_iteration", "num_iterations")},
    "offline": True,
    "num_train_epochs": 2.0,
    "eval_prompts": 4,
}


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "write_report", lambda folder: folder)


def pairs(count: int = 16) -> list[dict[str, Any]]:
    """Even words are better than odd ones; margins differ."""
    return [
        {
            "prompt": f"w{k % 7} w{k % 5}",
            "chosen": " ".join(f" w{2 * (k + j) % 40}" for j in range(1 + k % 4)),
            "rejected": " ".join(f" w{(2 * (k + j) + 1) % 40}" for j in range(1 + k % 3)),
            "margin": 0.5 + k % 3,
        }
        for k in range(count)
    ]


def trainer(folder: Path, rows: Any = None, reward: Any = None, lm: Any = None, callbacks: Any = (), **settings: Any):
    return RebelTrainer(
        lm or tiny.small(),
        reward,
        args=RebelConfig(**{**SETTINGS, "output_dir": str(folder), **settings}),
        train_dataset=pairs() if rows is None else rows,
        eval_dataset=pairs(4),
        processing_class=tiny.tokenizer(),
        callbacks=callbacks,
    )


def groups(rows: Sequence[dict[str, Any]], chat: bool = False, by_reward: bool = False, **settings: Any) -> Groups:
    policy = causal_lm(tiny.small(), tiny.tokenizer(chat))
    config = RebelConfig(**{**SETTINGS, **settings})
    return build_groups(rows_of(rows, config, by_reward, "the data"), policy, config)


def anchor_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("anchors/*")}


# -- tokens ----------------------------------------------------------------------------------------------------------


def test_a_completion_of_text_follows_its_prompt_and_ends_with_the_end_of_sequence() -> None:
    policy = causal_lm(tiny.small(), tiny.tokenizer())
    row = {"prompt": "w1 w2", "chosen": " w3 w4", "rejected": " w5 </s>"}
    (group,) = groups([row])
    chosen, rejected = group.rollout.traces
    ids = policy.tokenizer("w1 w2 w3 w4 w5").input_ids
    assert chosen == TokenTrace(tuple(ids[:2]), (*ids[2:4], tiny.EOS))
    assert rejected.completion == (ids[4], tiny.EOS), "an end that stands there is not doubled"
    assert [c.content for c in group.rollout.completions] == [" w3 w4", " w5 </s>"]
    assert {c.source for c in group.rollout.completions} == {DATA}


def test_a_token_across_the_border_of_prompt_and_completion_belongs_to_the_completion() -> None:
    """Without a space the two are one unknown word together; the prompt's ids stay what sampling begins with."""
    row = {"prompt": "w1", "chosen": "w2", "rejected": "w3"}
    (group,) = groups([row])
    tokenizer = tiny.tokenizer()
    assert group.rollout.traces[0] == TokenTrace(
        tuple(tokenizer("w1").input_ids), (*tokenizer("w2").input_ids, tiny.EOS)
    )


TEMPLATE_WITH_ENDS = (
    "{% for m in messages %}{{ '<s> ' + m['role'] + ' ' + m['content'] + ' </s> ' }}"
    "{% if m['role'] == 'assistant' %}{{ 'w39' if m['content'] == 'w9' else '' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s> assistant ' }}{% endif %}"
)


def test_messages_go_through_the_template_and_end_with_its_end_of_sequence() -> None:
    talk = causal_lm(tiny.small(), tiny.tokenizer(chat=True))
    talk.tokenizer.chat_template = TEMPLATE_WITH_ENDS
    prompt = Prompt([{"role": "user", "content": "w1"}])
    ids = talk.encode(prompt)
    said = talk.recorded(prompt, ids, [{"role": "assistant", "content": "w3 w4"}])
    assert said == [*talk.tokenizer("w3 w4").input_ids, tiny.EOS]
    beyond = talk.recorded(prompt, ids, [{"role": "assistant", "content": "w9"}])
    assert beyond == [*talk.tokenizer("w9 </s> w39").input_ids, tiny.EOS], "words behind an end are no end"


def test_what_stands_behind_an_end_of_sequence_is_cut_off_only_where_it_says_nothing() -> None:
    policy = causal_lm(tiny.small(), tiny.tokenizer())
    assert policy.ended([8, 9, tiny.EOS, tiny.PAD]) == [8, 9, tiny.EOS] == policy.ended([8, 9])
    assert policy.ended([8, tiny.EOS, 9]) == [8, tiny.EOS, 9, tiny.EOS]


def test_a_template_that_writes_the_prompt_differently_before_an_answer_is_refused() -> None:
    row = {"prompt": [{"role": "user", "content": "w1"}]}
    row |= {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    policy = causal_lm(tiny.small(), tiny.tokenizer(chat=True))
    policy.tokenizer.chat_template = TEMPLATE_WITH_ENDS.replace("<s> assistant ", "<s> user ")
    config = RebelConfig(**SETTINGS)
    with pytest.raises(RebelError, match="the data, row 0: the chat template renders the prompt differently"):
        build_groups(rows_of([row], config, False, "the data"), policy, config)


def test_what_does_not_fit_is_dropped_and_counted_and_never_cut() -> None:
    long = " w1" * 9
    rows = [
        {"prompt": "w1", "chosen": " w2", "rejected": " w3"},
        {"prompt": "w1", "chosen": " w2", "rejected": long},
        {"prompt": "w1" + long, "chosen": " w2", "rejected": " w3"},
        {"prompt": "w1", "chosen": " w2", "rejected": " w2"},
    ]
    found = groups(rows, max_prompt_length=8, max_completion_length=8)
    assert len(found) == 1 and found.completions == 2
    expected = {"completions longer than fit": 1, "prompts longer than fit": 1, "chosen equal to rejected": 1}
    assert dict(+found.dropped) == expected
    with pytest.raises(
        RebelError, match=r"none of the 4 rows of the data can be used: 4 completions longer than fit; 1 prompts"
    ):
        groups(rows, max_prompt_length=8, max_completion_length=1)


def test_a_group_loses_the_completion_that_does_not_fit_with_its_reward() -> None:
    row = {"prompt": "w1", "completions": [" w2", " w1" * 9, " w4"], "rewards": [1.0, 2.0, 3.0]}
    (found,) = groups([row], max_completion_length=8)
    assert found.rewards is not None and found.rewards.tolist() == [1.0, 3.0]
    assert [c.content for c in found.rollout.completions] == [" w2", " w4"]
    matrix = {"prompt": "w1", "completions": row["completions"], "comparisons": [[0, 1, 2], [-1, 0, 3], [-2, -3, 0]]}
    (found,) = groups([matrix], max_completion_length=8)
    assert found.margins is not None and found.margins.tolist() == [[0, 2], [-2, 0]]


def test_evaluation_rows_share_no_prompt_with_training() -> None:
    rows = rows_of(pairs(70), RebelConfig(**SETTINGS), False, "the data")
    training, held_out = apart(rows, 4)
    prompts = [row["prompt"] for row in pairs(70)]
    held = {prompts[k] for k in held_out.numbers}
    assert list(held_out.numbers) == [0, 1, 2, 3]
    assert not held & {prompts[k] for k in training.numbers}
    assert training.shared == sum(prompt in held for prompt in prompts[4:]) > 0
    with pytest.raises(RebelError, match="--eval_prompts 70 leaves none of the 70 rows"):
        apart(rows, 70)


# -- the regression away from its anchor -----------------------------------------------------------------------------


def a_learner(budget: int) -> Learner:
    policy = causal_lm(tiny.model("llama").double(), tiny.tokenizer())
    return learner(
        Accelerator(cpu=True),
        policy,
        lambda weights: torch.optim.SGD(weights, lr=1e-3),
        lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
        budget=budget,
    )


@pytest.mark.parametrize("budget", [10**6, 30], ids=["whole groups", "trace by trace"])
def test_with_known_anchors_every_step_is_the_gradient_of_the_loss_to_them(budget: int) -> None:
    """Against autograd and nothing of rebel but its policy; the first minibatch is away from pi_t already."""
    scored = []
    for number, size in enumerate((3, 2, 4, 3)):
        traces = [tiny.trace(3, 2 + k, seed=50 * number + k) for k in range(size)]
        rollout = Rollout(Prompt("x"), tuple(Completion("y", t, source=DATA) for t in traces))
        scored.append(Scored(rollout, rewards=torch.randn(size, dtype=torch.float64)))
    mover, alone = a_learner(budget), a_learner(10**6)
    away = {i: alone.score(alone.policy.log_prob, g.rollout.traces) for i, g in enumerate(scored)}
    known = {i: logp + torch.randn(len(logp), dtype=torch.float64) for i, logp in away.items()}
    how = Regression(steps=2, passes=2, pairing=all_pairs, step_rule=GivenEta(3.0, 0.0))
    fit(mover, None, scored, how, seed=4, phase=lambda name, total: nullcontext(lambda n: None), known=known)
    for minibatch in split(len(scored), how, 4)[1]:
        descend(alone, [scored[i] for i in minibatch], [known[i] for i in minibatch], eta=3.0)
    for mine, theirs in zip(mover.weights, alone.weights, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def descend(mover: Learner, scored: Sequence[Scored], anchors: Sequence[Tensor], eta: float) -> None:
    """One step of plain gradient descent on eta times the paper's loss, written out."""
    loss = torch.zeros((), dtype=torch.float64)
    for group, anchor in zip(scored, anchors, strict=True):
        logp, rewards = mover.policy.log_prob(group.rollout.traces)[:, 0], group.rewards
        assert rewards is not None
        terms = [
            (((logp[i] - anchor[i]) - (logp[j] - anchor[j])) / eta - (rewards[i] - rewards[j])) ** 2
            for i in range(len(logp))
            for j in range(i)
        ]
        loss = loss + torch.stack(terms).mean() / len(scored)
    gradients = torch.autograd.grad(eta * loss, mover.weights)
    with torch.no_grad():
        for weight, gradient in zip(mover.weights, gradients, strict=True):
            weight -= 1e-3 * gradient


def test_the_anchor_stays_the_initial_policy_in_every_epoch(tmp_path: Path) -> None:
    """Three epochs of whole-set minibatches by the trainer are three of gradient descent on one fixed loss."""
    lm = tiny.small().double()
    rows = pairs(6)
    made = trainer(
        tmp_path,
        rows,
        lm=lm,
        eta=3.0,
        num_train_epochs=3.0,
        prompts_per_iteration=6,
        steps_per_iteration=1,
        dtype="float32",
        optim="sgd",
        learning_rate=1e-3,
        max_grad_norm=0.0,
        average=0.0,
    )
    policy = causal_lm(tiny.small().double(), tiny.tokenizer())
    scored = list(made.job.parts.recordings[0])
    made.train()
    weights = list(policy.scorer.parameters())
    anchors = [policy.log_prob(g.rollout.traces)[:, 0].detach() for g in scored]
    for _ in range(3):
        loss = torch.zeros((), dtype=torch.float64)
        for group, anchor in zip(scored, anchors, strict=True):
            moved = policy.log_prob(group.rollout.traces)[:, 0] - anchor
            assert group.margins is not None
            loss = loss + ((moved[0] - moved[1]) / 3.0 - group.margins[0, 1]) ** 2 / len(scored)
        gradients = torch.autograd.grad(3.0 * loss, weights)
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight -= 1e-3 * gradient
    for mine, theirs in zip(made.job.run.learner.weights, weights, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


# -- whole runs ------------------------------------------------------------------------------------------------------


def test_an_iteration_takes_the_next_groups_and_a_lap_is_an_epoch(tmp_path: Path) -> None:
    made = trainer(tmp_path, pairs(12), prompts_per_iteration=6)
    made.train()
    rows = tiny.rows(tmp_path)
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3, 4]  # 2 epochs of 12 pairs, 6 at a time
    assert rows[-1]["samples"] == 24, "a second epoch has no new ones"
    assert [row["r2_in_sample"] is not None and "r2_held_out" in row for row in rows[1:]] == [True, True, False, False]
    assert sorted(laps(12, 1, 0, 12)) == list(range(12)) == sorted(laps(12, 1, 12, 12))


def test_measures_of_own_completions_are_not_claimed_of_others(tmp_path: Path) -> None:
    trainer(tmp_path).train()
    keys = {key for row in tiny.rows(tmp_path) for key in row}
    assert not keys & {"entropy", "kl_initial", "kl_iteration", "eval/kl_initial"}
    assert {"eval/accuracy", "eval/r2", "eval/logratio_best", "eval/loss", "logratio_worst", "grad_norm"} <= keys


def test_it_learns_an_order_that_held_out_pairs_share(tmp_path: Path) -> None:
    trainer(tmp_path, pairs(60), num_train_epochs=6.0, learning_rate=1e-2, eta=4.0).train()
    rows = [row for row in tiny.rows(tmp_path) if "eval/accuracy" in row]
    assert rows[0]["eval/accuracy"] == 0.5 and rows[0]["eval/r2"] == 0
    assert rows[-1]["eval/accuracy"] == 1.0 and rows[-1]["eval/r2"] > 0.3


class StopAt(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == 6


def test_resumed_as_if_never_interrupted(tmp_path: Path) -> None:
    more: dict[str, Any] = {"save_steps": 3, "average": 0.5, "eta": "auto", "beta": 0.1}
    whole = trainer(tmp_path / "whole", **more)
    whole.train()
    trainer(tmp_path / "parts", callbacks=[StopAt], **more).train()
    assert tiny.rows(tmp_path / "parts") != tiny.rows(tmp_path / "whole")
    resumed = trainer(tmp_path / "parts", **more)
    resumed.train(resume_from_checkpoint=True)
    for one, other in zip(whole.job.run.learner.weights, resumed.job.run.learner.weights, strict=True):
        assert torch.equal(one, other)
    rows = tiny.rows(tmp_path / "whole")
    assert tiny.rows(tmp_path / "parts") == rows
    assert {row["eval/policy"] for row in rows if "eval/policy" in row} == {"averaged"}


def test_resumed_without_its_cache_the_anchors_are_still_those_of_the_initial_policy(tmp_path: Path) -> None:
    trainer(tmp_path, callbacks=[StopAt], save_steps=3).train()
    before = anchor_files(tmp_path)
    for name in before:
        (tmp_path / "anchors" / name).unlink()
    trainer(tmp_path, save_steps=3).train(resume_from_checkpoint=True)
    assert anchor_files(tmp_path) == before


def test_eta_auto_is_one_step_from_the_spread_of_all_margins(tmp_path: Path) -> None:
    made = trainer(tmp_path, eta="auto")
    made.train()
    margins = torch.tensor([row["margin"] for row in pairs()])
    step = REACH / float((margins.square().mean() / 2).sqrt())
    assert [row["eta"] for row in tiny.rows(tmp_path)[1:]] == pytest.approx([step] * 6)


def test_reward_functions_may_score_the_pairs(tmp_path: Path) -> None:
    rows = [{k: v for k, v in row.items() if k != "margin"} for row in pairs()]
    made = trainer(tmp_path, rows, reward=tiny.evenness, eta="auto")
    with pytest.raises(AssertionError):
        made.job.parts.recordings[0].anchor(0)
    made.train()
    first = made.job.parts.recordings[0][0]
    expected = tiny.evenness([list(trace.completion) for trace in first.rollout.traces])
    assert first.rewards is not None and first.rewards.tolist() == pytest.approx(expected)
    assert tiny.rows(tmp_path)[-1]["rewards/evenness"] > 0


def test_a_dataset_of_arrow_and_a_list_are_the_same(tmp_path: Path) -> None:
    one = trainer(tmp_path / "list").job.parts.recordings[0].groups
    other = trainer(tmp_path / "arrow", Dataset.from_list(pairs())).job.parts.recordings[0].groups
    assert one.hash == other.hash
    assert [g.rollout for g in one] == [g.rollout for g in other]


def test_the_evaluation_is_the_plain_arithmetic_of_log_ratios(tmp_path: Path) -> None:
    made = trainer(tmp_path, eta=3.0, learning_rate=1e-2)
    made.train()
    initial = causal_lm(tiny.small(), tiny.tokenizer())
    gaps, margins = [], []
    for group in made.job.parts.recordings[1]:
        traces = group.rollout.traces
        moved = (made.job.run.learner.policy.log_prob(traces) - initial.log_prob(traces))[:, 0].detach()
        gaps.append(float(moved[0] - moved[1]))
        margins.append(float(group.pair_margins()[0, 1]))
    found, g, m = made.evaluate(), torch.tensor(gaps), torch.tensor(margins)
    assert found["eval_accuracy"] == pytest.approx(float((g > 0).float().mean()))
    residual = (g / 3.0 - m).square()
    assert found["eval_loss"] == pytest.approx(float(residual.mean()), rel=1e-4)
    assert found["eval_r2"] == pytest.approx(1 - float(residual.sum() / m.square().sum()), rel=1e-4)


def test_accuracy_leaves_ties_out_and_counts_equal_log_ratios_one_half() -> None:
    margins = torch.tensor([[0.0, 1.0, 0.0], [-1.0, 0.0, torch.nan], [0.0, torch.nan, 0.0]])
    assert accuracy(margins, torch.tensor([0.3, 0.1, 5.0])) == 1.0
    assert accuracy(margins, torch.tensor([0.1, 0.1, 5.0])) == 0.5
    assert accuracy(margins, torch.tensor([0.1, 0.3, 5.0])) == 0.0


# -- the cache of anchors --------------------------------------------------------------------------------------------


def test_anchors_are_computed_once_and_shared_by_runs_with_the_same_to_compute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = {"anchor_cache_dir": str(tmp_path / "anchors")}
    assert "to be computed" in " ".join(trainer(tmp_path / "a", **cache).job.plan)
    trainer(tmp_path / "a", **cache).train()
    before = anchor_files(tmp_path)
    assert len(before) == 2
    plan = " ".join(trainer(tmp_path / "b", **cache).job.plan)
    assert "kept in" in plan and "to be computed" not in plan

    def computed(*args: Any) -> Any:
        raise AssertionError("they are on disk")

    monkeypatch.setattr("rebel.offline.collector.Recordings.new_anchors", computed)
    trainer(tmp_path / "b", learning_rate=1e-4, **cache).train()
    assert anchor_files(tmp_path) == before


@pytest.mark.parametrize("changed", ["weights", "architecture", "data", "temperature"])
def test_anchors_of_another_model_data_or_setting_are_never_used(tmp_path: Path, changed: str) -> None:
    def made(**more: Any) -> RebelTrainer:
        return trainer(
            tmp_path / str(len(list(tmp_path.iterdir()))), anchor_cache_dir=str(tmp_path / "anchors"), **more
        )

    made(num_train_epochs=1.0).train()
    lm = tiny.small()
    if changed == "weights":
        with torch.no_grad():
            next(iter(lm.parameters()))[3, 3] += 1e-3
    if changed == "architecture":
        lm.config.rope_parameters = {"rope_type": "default", "rope_theta": 777.0}
    rows = pairs()
    rows[0]["chosen"] = " w39" if changed == "data" else rows[0]["chosen"]
    other = made(lm=lm, rows=rows, temperature=0.5 if changed == "temperature" else 1.0)
    assert "to be computed" in other.job.plan[2]


@pytest.mark.parametrize("damage", ["cut", "bit", "renamed", "garbage"])
def test_a_damaged_or_foreign_file_of_anchors_is_said_and_computed_again(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer(tmp_path).train()
    before = anchor_files(tmp_path)
    one, other = (tmp_path / "anchors" / name for name in before)
    content = bytearray(before[one.name])
    content[-5] ^= 4
    spoiled = {"cut": content[:-9], "bit": content, "renamed": other.read_bytes(), "garbage": b"anchors"}[damage]
    one.write_bytes(bytes(spoiled))
    trainer(tmp_path, overwrite_output_dir=True).train()
    said = {"cut": "cannot be read", "bit": "is damaged", "renamed": "belongs to another model", "garbage": "cannot"}
    assert said[damage] in "".join(capsys.readouterr().out.split("\n")).replace("  ", " ")
    assert anchor_files(tmp_path) == before


def test_a_file_that_is_half_written_has_no_name_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(*args: Any) -> None:
        raise MemoryError

    file = AnchorFile(tmp_path, {"weights": "1"})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", dies)
        with pytest.raises(MemoryError):
            file.write(torch.zeros(3))
    assert file.read(3) == (None, "")
    file.write(torch.ones(3))
    assert torch.equal(file.read(3)[0], torch.ones(3).double())  # pyright: ignore[reportArgumentType]
    assert "damaged" in file.read(4)[1]


def test_the_hash_of_weights_sees_every_weight_and_its_name() -> None:
    one, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    other.load_state_dict(one.state_dict())
    assert hash_of_weights(one) == hash_of_weights(other)
    other.bias.data[1] += 1e-6
    assert hash_of_weights(one) != hash_of_weights(other)
    assert hash_of_weights(torch.nn.Sequential(one)) != hash_of_weights(one)


# -- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run `rebel train --offline` on these rows with a small model."""
    tiny.small().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")

    def run(rows: list[dict], *words: str) -> int:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = {"model_name_or_path": tmp_path / "model", "dataset_name": tmp_path / "rows.jsonl"}
        given |= {"output_dir": tmp_path / "run", "eval_prompts": 4, "max_completion_length": 8}
        given |= {"prompts_per_iteration": 6, "steps_per_iteration": 2, "max_prompt_length": 8}
        flags = [f"--{name}={value}" for name, value in given.items()]
        return main(["train", "--offline", "--use_cpu", "--num_train_epochs=1", *flags, *words])

    return run


def test_a_dry_run_says_what_it_would_learn_from(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*pairs(40), {**pairs(1)[0], "prompt": "w9", "chosen": " w2", "rejected": " w2"}]
    assert command(rows, "--dry_run") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "pairs (" in out and "1 chosen equal to rejected" in out and "rows with a prompt of the evaluation" in out
    assert "margins column margin" in out and "to be computed" in out and "epochs" in out


def test_a_run_from_the_command_line(command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(pairs(30), "--load_best_model_at_end") == 0
    assert "accuracy" in capsys.readouterr().out
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert "recorded completions" in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.parametrize(
    ("change", "words", "said"),
    [
        ({"chosen": None}, [], "rows.jsonl, row 5: chosen is missing"),
        ({"margin": float("nan")}, [], "row 5: margin is nan"),
        ({"margin": -2.0}, [], "by which rejected is better than chosen"),
        ({}, ["--margin_column=score"], "--margin_column score: the data have only the columns"),
        ({}, ["--data_format=groups"], "--data_format groups does not fit"),
        ({}, ["--scale_rewards=group"], "--scale_rewards group divides rewards, and these data have margins"),
        ({}, ["--kl_per_iteration=1"], "--kl_per_iteration 1 with --offline"),
        ({}, ["--track_kl"], "--track_kl with --offline"),
        ({}, ["--eval_against=initial", "--eval_judge=x.py:f"], "--eval_against initial with --offline"),
        ({}, ["--data_completions=2"], "--offline draws no completions"),
        ({}, ["--iterations=2"], "both say how long to train"),
        ({}, ["--margin_clip=0"], "--margin_clip 0: use a positive number"),
    ],
)
def test_wrong_input_is_one_error_before_any_work(
    command: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path, change: dict, words: list[str], said: str
) -> None:
    rows = pairs(12)
    rows[5] |= change
    assert command(rows, *words) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_without_a_reward_the_way_out_is_named() -> None:
    with pytest.raises(RebelError, match="or --offline, if the data have completions"):
        validate(RebelConfig(model_name_or_path="m", dataset_name="d", iterations=1))
    validate(RebelConfig(model_name_or_path="m", dataset_name="d", iterations=1, offline=True))


def test_the_trainer_is_offline_without_a_reward_and_says_what_is_missing(tmp_path: Path) -> None:
    assert trainer(tmp_path, offline=False).args.offline
    with pytest.raises(RebelError, match="train_dataset is missing: rows with chosen and rejected"):
        RebelTrainer(tiny.small(), args=RebelConfig(**SETTINGS), processing_class=tiny.tokenizer())
    with pytest.raises(RebelError, match="train_dataset has no completions to learn from"):
        trainer(tmp_path, [{"prompt": "w1"}])


def test_the_batch_arguments_of_trl_are_rows_a_step() -> None:
    given = RebelConfig(offline=True, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    ours, lines = translate_batch(given, world_size=3)
    assert (ours.prompts_per_iteration, ours.steps_per_iteration) == (24 * 8, 8) and "24 rows a step" in lines[0]
    assert ours.per_device_train_batch_size is None
    with pytest.raises(RebelError, match="--steps_per_generation with --offline"):
        translate_batch(RebelConfig(offline=True, steps_per_generation=2), world_size=1)


def test_an_adapter_has_anchors_of_its_own_and_the_report_shows_the_order_of_pairs(tmp_path: Path) -> None:
    made = trainer(tmp_path, use_peft=True, lora_r=2, learning_rate=3e-2, num_train_epochs=4.0)
    assert {"weights", "architecture"} <= made.job.parts.recordings[0].file.key.keys()
    plain = trainer(tmp_path / "plain").job.parts.recordings[0].file
    assert plain.path.name != made.job.parts.recordings[0].file.path.name
    made.train()
    page = write_report(tmp_path).read_text()
    for words in ("Held-out pairs in order", "Order of held-out pairs", "Recorded completions"):
        assert words in page
    assert "Completions drawn" not in page
