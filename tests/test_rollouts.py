"""Rollouts on disk: the same whatever interrupts them, never mixed, and regressed with the anchors of their round."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy
import pytest
import tiny
import torch
from conftest import DATA
from peft import LoraConfig, get_peft_model
from test_loop import StopAt, assert_same
from tiny import evenness

from rebel import checkpoint, job
from rebel.build.rounds import description
from rebel.cli import main
from rebel.collect import Interrupted
from rebel.config import RebelConfig
from rebel.errors import RebelError, RunStopped
from rebel.pairing import best_against_worst
from rebel.rewards.functions import PerCompletion
from rebel.rounds.collector import Crew, Rounds, compared, draw, score
from rebel.rounds.elsewhere import DrawnElsewhere
from rebel.rounds.rollouts import (
    Manifest,
    Rollouts,
    claim,
    numbers,
    of_prompts,
    of_weights,
    read_manifest,
    rewards_table,
    rollout_of,
    scored_of,
    table_of,
)
from rebel.rounds.shards import Shards, digest
from rebel.samplers.generate import Generate
from rebel.trainer import RebelTrainer
from rebel.types import Completion, Prompt, Rollout, Scored, TokenTrace

ROOT = Path(__file__).resolve().parents[1]
ROUNDS: dict[str, Any] = {
    **{"rounds": 2, "round_prompts": 10, "round_epochs": 2, "shard_prompts": 4},
    **{"iterations": None, "kl_per_iteration": None},
    **{"prompts_per_iteration": 4, "steps_per_iteration": 2, "eval_steps": 4, "save_steps": 2},
    "save_total_limit": None,
}
"""Two rounds of ten prompts in shards of 4, 4 and 2; each of two laps takes three iterations of 3, 3 and 4 groups."""


@pytest.fixture(autouse=True, scope="module")
def no_report() -> Iterator[None]:
    """Its page is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "write_report", lambda folder: folder)
        yield


class Quiet:
    """Watches without a word, and asks for an end after so many questions whether it does."""

    def __init__(self, stop_after: float = math.inf) -> None:
        self.asked, self.stop_after, self.said = 0, stop_after, []

    def phase(self, name: str, total: int) -> Any:
        return self

    def __enter__(self) -> Callable[..., None]:
        return lambda n, **info: None

    def __exit__(self, *error: object) -> None:
        pass

    def stop(self) -> bool:
        self.asked += 1
        return self.asked > self.stop_after

    def crew(self) -> Crew:
        return Crew(self, self.said.append)


def group(k: int = 0, size: int = 3) -> Rollout:
    """A rollout in which everything that can be kept differs from what it would be by default."""
    content: Any = [{"role": "user", "content": f"é {k}"}] if k % 2 else f"w{k}\nw"
    traces = [tiny.trace(2, 1 + (k + i) % 5, seed=7 * k + i) for i in range(size)]
    traces = [
        TokenTrace(traces[0].prompt, t.completion, (False,) * len(t.completion) if i else None)
        for i, t in enumerate(traces)
    ]
    texts = [f"t{k}.{i}" for i in range(size)]
    return Rollout(
        Prompt(content, {"row": k, "answer": {"x": [1.5, None]}}),
        tuple(
            Completion([{"role": "assistant", "content": t}] if k % 2 else t, trace, f"s{i}", i != 1)
            for i, (t, trace) in enumerate(zip(texts, traces, strict=True))
        ),
    )


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Every file of rollouts by its name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.arrow"))}


# -- files -----------------------------------------------------------------------------------------------------------


def test_rollouts_come_back_as_they_were(tmp_path: Path) -> None:
    shards, groups = Shards(tmp_path), [group(k, size=2 + k % 3) for k in range(5)]
    shards.write(0, table_of(groups), digest(""))
    assert [rollout_of(shards.table(0), row) for row in range(5)] == groups
    assert len(datasets.Dataset.from_file(str(shards.path(0)))) == 5, "the trailer is in the way of other readers"


@pytest.mark.parametrize("margins", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rewards_come_back_bit_for_bit(tmp_path: Path, margins: bool, dtype: torch.dtype) -> None:
    rollout, values = group(), torch.tensor([0.1, math.nan, -3.0], dtype=dtype)
    parts = {"a/b": values.flip(0), "rewards": values + 1}
    known: dict[str, Any] = {"margins": values[:, None] - values} if margins else {"rewards": values}
    shards = Shards(tmp_path)
    shards.write(3, rewards_table([Scored(rollout, components=parts, **known)] * 2), digest(""))
    back = scored_of(rollout, shards.table(3), 1)
    pairs = [(back.margins if margins else back.rewards, *known.values())]
    for mine, its in pairs + [(back.components[name], parts[name]) for name in parts]:
        torch.testing.assert_close(mine, its, rtol=0, atol=0, equal_nan=True)


def test_a_shard_is_whole_or_it_is_told_what_is_wrong_with_it(tmp_path: Path) -> None:
    shards, mine, other = Shards(tmp_path), digest("mine"), digest("other")
    assert shards.state(0, mine) == "missing"
    shards.partial(0).write_bytes(b"half")
    assert shards.state(0, mine) == "half-written"
    shards.write(0, table_of([group()]), mine)
    assert shards.state(0, mine) == "whole" and not shards.partial(0).exists()
    assert shards.state(0, other) == "of others"
    content = shards.path(0).read_bytes()
    for place in range(0, len(content), 97):
        shards.path(0).write_bytes(content[:place])
        assert shards.state(0, mine) == "damaged", f"cut at {place}"
        shards.path(0).write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert shards.state(0, mine) == "damaged", f"one bit changed at {place}"
    shards.path(0).write_bytes(content)
    assert shards.state(0, mine) == "whole"


def test_a_disk_that_takes_no_more_stops_the_run_with_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, full = Shards(tmp_path), OSError(28, "No space left on device")
    shards.write(0, table_of([group()]), digest(""))
    monkeypatch.setattr("rebel.rounds.shards.os.fsync", lambda handle: (_ for _ in ()).throw(full))
    with pytest.raises(RunStopped, match=r"00001\.arrow cannot be written: No space left on device"):
        shards.write(1, table_of([group()]), digest(""))
    assert [shards.state(k, digest("")) for k in (0, 1)] == ["whole", "half-written"]


def test_rollouts_of_different_settings_are_never_mixed(tmp_path: Path) -> None:
    policy, prompts = tiny.policy(), tiny.prompts(3, 4)
    config = RebelConfig(seed=3)

    def about(config: RebelConfig, fingerprint: str = "p") -> Manifest:
        return description(config, 2, of_prompts(prompts), policy, 0, fingerprint)

    claim(tmp_path / "here", about(config))
    claim(tmp_path / "here", about(replace(config, output_dir="elsewhere", learning_rate=3.0, shard_prompts=64)))
    with pytest.raises(RebelError, match=r"holds other rollouts: --temperature 1\.0, not 0\.5\. .*name another folder"):
        claim(tmp_path / "here", about(replace(config, temperature=0.5)))
    with pytest.raises(RebelError, match=r"seed 3, not 4.*"):
        claim(tmp_path / "here", about(replace(config, seed=4)))
    with pytest.raises(RebelError, match=r"policy p, not q"):
        claim(tmp_path / "here", about(config, "q"))
    with pytest.raises(RebelError, match=r"holds something else than rollouts"):
        claim(tmp_path, about(config))
    with pytest.raises(RebelError, match=r"holds no rollouts: there is no manifest.json"):
        read_manifest(tmp_path)
    (tmp_path / "here" / "manifest.json").write_text('{"prompts": 3')
    with pytest.raises(RebelError, match=r"manifest.json cannot be read"):
        read_manifest(tmp_path / "here")


def test_a_fingerprint_is_of_all_weights_and_of_no_adapter_that_changes_nothing() -> None:
    model = tiny.small()
    before = of_weights(model)
    assert of_weights(tiny.small()) == before
    adapted = get_peft_model(tiny.small(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert of_weights(adapted) == before
    last = [w for name, w in adapted.named_parameters() if ".lora_B." in name][-1]
    with torch.no_grad():
        last.view(-1)[-1] = 1e-20
        next(model.parameters()).view(-1)[-1] += 1e-3
    assert len({of_weights(adapted), of_weights(model), before}) == 3


# -- stages ----------------------------------------------------------------------------------------------------------


def begun(folder: Path, **changes: Any) -> Rollouts:
    given = {"prompts": 10, "shard": 4, "policy": "p", "tokenizer": "t", "prompt_set": "x", "seed": 5}
    return claim(folder, Manifest(**{**given, **changes}))


def drawn(rollouts: Rollouts, watch: Quiet | None = None) -> int:
    """Draw what is missing, three completions of each of ten prompts, two prompts at once."""
    prompts = tiny.prompts(*[1 + k % 7 for k in range(10)])
    sampler = Generate(tiny.policy(), 5, 1.0)
    size = rollouts.manifest.shard
    return draw(rollouts, sampler, lambda k: prompts[k * size : (k + 1) * size], 3, 2, (watch or Quiet()).crew())


def noisy(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """A reward with random numbers of every kind in it."""
    chance = random.random() + numpy.random.rand() + float(torch.rand(()))
    return [value + chance for value in evenness(completion_ids)]


REWARD = PerCompletion(noisy)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Rollouts:
    """Rollouts that nobody interrupted."""
    rollouts = begun(tmp_path_factory.mktemp("whole") / "rollouts")
    assert drawn(rollouts) > 0
    score(rollouts, REWARD, Quiet().crew())
    return rollouts


def test_the_groups_are_those_of_the_prompts_in_their_order(whole: Rollouts) -> None:
    assert len(whole) == 10 and whole.shards == 3 and [whole.size(k) for k in range(3)] == [4, 4, 2]
    assert [g.rollout.prompt.meta["row"] for g in whole] == list(range(10))
    assert all(len(g.rollout.completions) == 3 and g.rewards is not None for g in whole)
    assert len({c.trace.completion for g in whole for c in g.rollout.completions}) > 20, "shards repeat each other"
    with pytest.raises(IndexError):
        whole[10]


def test_no_two_chunks_shards_or_rounds_share_their_random_numbers(tmp_path: Path) -> None:
    """Twenty times the same prompt, in two rounds of five chunks of two."""
    found = []
    for number in (0, 1):
        rollouts = begun(tmp_path / str(number), round=number)
        draw(
            rollouts,
            Generate(tiny.policy(), 5, 1.0),
            lambda k: tiny.prompts(2) * (2 if k == 2 else 4),
            3,
            2,
            Quiet().crew(),
        )
        found += [rollout.traces for shard in range(3) for rollout in rollouts.drawn(shard)]
    assert len(found) == 20 and len({tuple(t.completion for t in traces) for traces in found}) == 20


@pytest.mark.parametrize("stop_after", [0, 1, 2, 3, 5, 7])
def test_interrupted_draws_go_on_to_the_same_bytes(whole: Rollouts, tmp_path: Path, stop_after: int) -> None:
    rollouts = begun(tmp_path)
    with pytest.raises(Interrupted):
        drawn(rollouts, Quiet(stop_after))
    before = bytes_of(tmp_path)
    assert len(before) < 3 and not list(tmp_path.rglob("*.partial"))
    assert drawn(rollouts) > 0
    score(rollouts, REWARD, Quiet().crew())
    assert bytes_of(tmp_path) == bytes_of(whole.folder)


@pytest.mark.parametrize("stop_after", [0, 1, 2])
def test_interrupted_scoring_goes_on_to_the_same_bytes(whole: Rollouts, tmp_path: Path, stop_after: int) -> None:
    """Also with a reward that draws random numbers; whoever draws others meanwhile is not disturbed."""
    shutil.copytree(whole.folder, tmp_path / "copy")
    rollouts = Rollouts(tmp_path / "copy", whole.manifest)
    shutil.rmtree(rollouts.rewards.folder)
    random.seed(stop_after), numpy.random.seed(stop_after), torch.manual_seed(stop_after)
    state = torch.get_rng_state()
    with pytest.raises(Interrupted):
        score(rollouts, REWARD, Quiet(stop_after).crew())
    assert len(list(rollouts.rewards.folder.glob("*.arrow"))) == stop_after
    score(rollouts, REWARD, Quiet().crew())
    assert bytes_of(rollouts.folder) == bytes_of(whole.folder)
    assert torch.equal(state, torch.get_rng_state())


def test_a_broken_shard_is_said_and_made_again(whole: Rollouts, tmp_path: Path) -> None:
    shutil.copytree(whole.folder, tmp_path / "copy")
    rollouts, watch = Rollouts(tmp_path / "copy", whole.manifest), Quiet()
    with open(rollouts.completions.path(1), "r+b") as file:
        file.truncate(500)
    with open(rollouts.rewards.path(2), "r+b") as file:
        file.seek(200)
        file.write(b"?")
    rollouts.completions.path(2).rename(rollouts.completions.partial(2))
    drawn(rollouts, watch)
    score(rollouts, REWARD, watch.crew())
    assert [line.split(";")[0].replace(str(rollouts.folder), "R") for line in watch.said] == [
        "sampling: shard 1 of R is damaged",
        "sampling: shard 2 of R is half-written",
        "sampling: 4 of 10 prompts are done already",
        "rewards: shard 2 of R is damaged",
        "rewards: 8 of 10 prompts are done already",
    ]
    assert bytes_of(rollouts.folder) == bytes_of(whole.folder)


def test_rewards_of_other_completions_are_not_taken(whole: Rollouts, tmp_path: Path) -> None:
    other = begun(tmp_path, seed=6)
    drawn(other)
    shutil.copytree(whole.rewards.folder, other.rewards.folder)
    watch = Quiet()
    score(other, REWARD, watch.crew())
    assert [line.partition(" is ")[2] for line in watch.said] == ["of others; it is made again"] * 3
    assert not set(bytes_of(tmp_path).values()) & set(bytes_of(whole.folder).values())


# -- completions of another program ------------------------------------------------------------------------------------


def elsewhere(*rows: dict[str, Any], longest: int = 64) -> DrawnElsewhere:
    return DrawnElsewhere(rows, tiny.policy(), "file.jsonl", 4, longest)


def test_completions_of_another_program_keep_their_ids_or_get_an_end() -> None:
    row = {"prompt": "w1 w2", "completions": ["w3", "w4 w5"], "answer": 7}
    rollout = elsewhere(row | {"finished": [True, False], "source": "bigger"}).rollout(0)
    word = tiny.tokenizer().convert_tokens_to_ids
    assert [c.trace.completion for c in rollout.completions] == [(word("w3"), tiny.EOS), (word("w4"), word("w5"))]
    assert [c.finished for c in rollout.completions] == [True, False]
    assert rollout.prompt == Prompt("w1 w2", {"answer": 7}) and rollout.completions[0].source == "bigger"
    ids = {"prompt_ids": [1, 9], "completion_ids": [[40, 41, tiny.EOS], [42]]}
    rollout = elsewhere(row | ids).rollout(0)
    assert rollout.traces == [TokenTrace((1, 9), (40, 41, tiny.EOS)), TokenTrace((1, 9), (42,))]
    assert [c.finished for c in rollout.completions] == [True, False] and rollout.completions[0].source == "other"


def test_rows_that_cannot_be_taken_are_counted_or_named() -> None:
    good = {"prompt": "w1", "completions": ["w3", "w4"]}
    rows = [
        good,
        good | {"completions": ["w3"]},
        good | {"prompt": "w1 " * 5},
        good | {"completions": ["w3 " * 9, "w1"]},
    ]
    assert elsewhere(*rows, longest=8).usable() == ([0], 2, 1)
    with pytest.raises(RebelError, match=r"no row to take: 0 are longer .* 1 have fewer than two completions"):
        elsewhere(rows[1]).usable()
    for wrong, said in (
        ({"prompt": ""}, "row 0: the column prompt must be text"),
        ({"completions": [3, 4]}, "row 0: the column completions must be a list of texts"),
        ({"completion_ids": [[1]]}, "row 0: the column completion_ids has 1 entries for 2 completions"),
    ):
        with pytest.raises(RebelError, match=said):
            elsewhere(good | wrong).usable()


# -- rounds ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of two rounds that nobody interrupted."""
    return tiny.trained(tmp_path_factory.mktemp("run"), **ROUNDS)


def test_each_round_regresses_all_of_its_rollouts_in_every_lap(run: Any) -> None:
    collector: Rounds = run.run.collector
    assert (collector.per_lap, collector.per_round, run.iterations) == (3, 6, 12)
    for number in (0, 1):
        laps = [[collector.chosen(number, lap, part) for part in range(3)] for lap in (0, 1)]
        assert all(sorted(i for part in lap for i in part) == list(range(10)) for lap in laps)
        assert laps[0] != laps[1] and {len(part) for lap in laps for part in lap} == {3, 4}
    rows = tiny.rows(run.recorder.folder)[1:]
    assert [row["samples"] for row in rows] == [12, 24, 40, 40, 40, 40, 52, 64, 80, 80, 80, 80], (
        "drawn once, counted once"
    )
    assert ["r2_in_sample" in row and "r2_held_out" not in row for row in rows] == [
        False,
        False,
        False,
        True,
        True,
        True,
    ] * 2
    prompts = [[g.rollout.prompt.meta["row"] for g in collector.rollouts(k)] for k in (0, 1)]
    assert len({*prompts[0], *prompts[1]}) == 17 and len(set(prompts[0])) == 10, (
        "prompts of the stream, one after another"
    )


def test_anchors_are_those_of_the_policy_at_the_beginning_of_the_round(run: Any, tmp_path: Path) -> None:
    """The stored log pi_t is that of the policy at iterations 0 and 6; the regression gets it by index."""
    made = tiny.job(tmp_path, **ROUNDS)
    collector: Rounds = run.run.collector
    log_prob = made.run.learner.policy.log_prob
    for number in (0, 1):
        if number:
            steps = 6 * 2
            kept = checkpoint.load_file(run.recorder.folder / f"checkpoint-{steps}" / "trained.safetensors")
            checkpoint.restore(made.run.learner.weights, kept)
        own = collector.rollouts(number)
        found = torch.cat(
            [numbers(collector.anchors(number).table(k), "logp", r) for k in range(3) for r in range(own.size(k))]
        )
        with torch.no_grad():
            wanted = log_prob([t for g in own for t in g.rollout.traces])[:, 0].double()
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        read = collector.read(number, 4)
        for k, regressed in enumerate(read.kept):
            with torch.no_grad():
                torch.testing.assert_close(
                    read.anchor[k], log_prob(regressed.rollout.traces)[:, 0].double(), rtol=1e-5, atol=1e-5
                )
    moved = torch.cat(
        [
            a.detach().flatten() - b.flatten()
            for a, b in zip(run.run.learner.weights, made.run.learner.weights, strict=True)
        ]
    )
    assert float(moved.abs().max()) > 1e-3, "else every policy has the same anchors"


def test_only_what_is_compared_is_regressed_best_against_worst(tmp_path: Path) -> None:
    once = {"pairing": "extremes", "rounds": 1, "round_epochs": 1, "num_generations": 5}
    made = tiny.trained(tmp_path, **ROUNDS | once)
    read = made.run.collector.read(0, 1)
    assert all(len(g.rollout.completions) == 5 for g in read.groups)
    for whole, pair in zip(read.groups, read.kept, strict=True):
        assert whole.rewards is not None and pair.rewards is not None and len(pair.rewards) == 2
        assert {*pair.rewards.tolist()} == {float(whole.rewards.max()), float(whole.rewards.min())}
        (chosen,) = best_against_worst(whole.pair_margins()).tolist()
        assert {whole.rollout.completions[k] for k in chosen} == {*pair.rollout.completions}
    flat = Scored(group(size=4), rewards=torch.zeros(4))
    left = compared(flat, best_against_worst)
    assert left is not None and len(left.rollout.completions) == 2


def assert_same_rounds(one: Any, other: Any) -> None:
    """Bit for bit: weights, rows, samples, the result, and all that is on disk of the rounds."""
    assert_same(one, other)
    mine, its = (bytes_of(made.recorder.folder / "rounds") for made in (one, other))
    assert mine == its and len(mine) == 2 * 3 * 3


@pytest.mark.parametrize("step", [0, 2, 6, 12, 16, 22])
def test_stopped_within_a_round_and_resumed(run: Any, tmp_path: Path, step: int) -> None:
    """In the first lap, in a later one, between the rounds and in the second: all from disk, without former weights."""
    with pytest.raises(RunStopped, match=r"SIGTERM after iteration .*go on with: rebel train .* --resume"):
        tiny.trained(tmp_path, **ROUNDS, callbacks=[StopAt(step)])
    assert_same_rounds(tiny.trained(tmp_path, resume=True, **ROUNDS), run)


@pytest.mark.parametrize("chunk", [2, 5, 9])
def test_stopped_while_a_round_is_drawn_and_resumed(
    run: Any, tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk is two prompts, so that a round is five chunks; the evaluations in between are two."""
    draw_it, count = Generate.__call__, [0]

    def killing(self: Generate, prompts: Any, group_size: int, seed: int) -> Any:
        count[0] += group_size > 1
        if count[0] == chunk:
            os.kill(os.getpid(), signal.SIGINT)
        return draw_it(self, prompts, group_size, seed)

    monkeypatch.setattr(Generate, "__call__", killing)
    with pytest.raises(RunStopped, match=rf"SIGINT after iteration {6 * (chunk > 5)}"):
        tiny.trained(tmp_path, **ROUNDS)
    monkeypatch.undo()
    assert_same_rounds(tiny.trained(tmp_path, resume=True, **ROUNDS), run)


def test_a_reward_that_fails_in_the_middle_of_a_round_is_mended_and_resumed(run: Any, tmp_path: Path) -> None:
    calls = [0]

    def failing(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        calls[0] += 1
        if calls[0] >= 3:  # an evaluation and one shard
            raise ValueError("no more")
        return evenness(completion_ids)

    with pytest.raises(RunStopped, match=r"raised ValueError .*failed_reward.json.*--resume"):
        tiny.trained(tmp_path, reward=failing, **ROUNDS)
    assert len(list((tmp_path / "rounds" / "00000" / "completions").glob("*.arrow"))) == 3
    assert len(list((tmp_path / "rounds" / "00000" / "rewards").glob("*.arrow"))) == 1
    assert_same_rounds_but_names(tiny.trained(tmp_path, resume=True, **ROUNDS), run)


def assert_same_rounds_but_names(one: Any, other: Any) -> None:
    """As above, where the first shard names its reward otherwise."""
    pairs = zip(one.recorder.learner.weights, other.recorder.learner.weights, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_checkpoint_precedes_every_round_whose_rollouts_belong_to_that_policy_alone(tmp_path: Path) -> None:
    tiny.trained(tmp_path, **ROUNDS | {"save_steps": 1000})
    assert [path.name for path in checkpoint.all_checkpoints(tmp_path)] == [
        "checkpoint-0",
        "checkpoint-12",
        "checkpoint-24",
    ]


def test_what_a_run_lost_in_the_middle_of_a_round_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunStopped):
        tiny.trained(tmp_path, **ROUNDS, callbacks=[StopAt(6)])
    (tmp_path / "rounds" / "00000" / "anchors" / "00001.arrow").unlink()
    with pytest.raises(RunStopped, match=r"in the middle of, anchors: 1 missing \(shard 1\).* policy of iteration 0"):
        tiny.trained(tmp_path, resume=True, **ROUNDS)


def test_a_round_is_not_mixed_with_one_of_another_policy(tmp_path: Path) -> None:
    """As after a run on hardware that does not repeat itself."""
    with pytest.raises(RunStopped):
        tiny.trained(tmp_path, **ROUNDS, callbacks=[StopAt(6)])
    shutil.copytree(tmp_path / "rounds" / "00000", tmp_path / "rounds" / "00001")
    with pytest.raises(
        RunStopped, match=r"00001 holds other rollouts: policy \w+, not \w+; round 0, not 1\. Rollouts are"
    ):
        tiny.trained(tmp_path, resume=True, **ROUNDS)


def test_a_new_run_deletes_the_rounds_of_the_former(tmp_path: Path) -> None:
    made = tiny.trained(tmp_path, **ROUNDS | {"rounds": 1})
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(RebelError, match="holds another run"):
        job.claim_folder(made.config, resume=False)
    job.claim_folder(replace(made.config, overwrite_output_dir=True), resume=False)
    assert not (tmp_path / "rounds").exists()


# -- the commands ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, prompts, a reward and the settings of a run in one round."""
    folder = tmp_path_factory.mktemp("files")
    tiny.small().save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    rows = [{"prompt": f"w{k % 30} w{k % 7}", "row": k} for k in range(13)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "even.py").write_text(
        "def even(completion_ids, **kwargs):\n    return [sum(t % 2 for t in i) / len(i) for i in completion_ids]\n"
        "def odd(completion_ids, **kwargs):\n    return [0.5 for ids in completion_ids]\n"
    )
    keys = (
        "eta",
        "num_generations",
        "prompts_per_iteration",
        "steps_per_iteration",
        "num_iterations",
        "sampling_batch",
    )
    keys += ("max_completion_length", "max_prompt_length", "learning_rate", "eval_prompts", "use_cpu", "disable_tqdm")
    settings = {key: tiny.SETTINGS[key] for key in keys} | {
        "model_name_or_path": str(folder / "model"),
        "dataset_name": str(folder / "prompts.jsonl"),
        "reward_funcs": [str(folder / "even.py:even")],
        "shard_prompts": 4,
        "prompts_per_iteration": 5,
        "rounds": 1,
    }
    (folder / "run.yaml").write_text(json.dumps(settings))
    return folder


def rebel(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> str:
    """What a command says."""
    found = main([str(word) for word in words])
    said = capsys.readouterr()
    assert found == code, said.err
    return said.out + said.err


def test_the_stages_by_themselves_are_the_run_in_one_process(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    yaml, rollouts = files / "run.yaml", tmp_path / "rollouts"
    rebel(capsys, "train", yaml, "--output_dir", tmp_path / "one")
    assert "10 prompts x 4 completions in 3 shards" in rebel(capsys, "rollout", yaml, "--to", rollouts)
    rebel(capsys, "score", rollouts, "--reward_funcs", files / "even.py:even")
    said = rebel(capsys, "train", yaml, "--from_rollouts", rollouts, "--output_dir", tmp_path / "two")
    assert "drawn by this policy" in said and "10 to train on, 3 to evaluate on" in said
    mine, its = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert mine == its != (files / "model" / "model.safetensors").read_bytes()
    assert tiny.rows(tmp_path / "one") == tiny.rows(tmp_path / "two")
    assert bytes_of(rollouts).items() <= bytes_of(tmp_path / "one" / "rounds" / "00000").items()

    before = bytes_of(rollouts)
    assert "drawn:" not in rebel(capsys, "rollout", yaml, "--to", rollouts), "nothing is left to draw"
    assert bytes_of(rollouts) == before
    said = rebel(capsys, "score", rollouts, "--reward_funcs", files / "even.py:odd", code=2)
    assert "has rewards of 1 x" in said and "delete that folder to score anew" in said
    named_alike = files / "even.py"
    named_alike.write_text(named_alike.read_text() + "# another edition\n")
    said = rebel(capsys, "score", rollouts, "--reward_funcs", f"{named_alike}:even", code=2)
    assert "has rewards of 1 x" in said and "(edition " in said
    said = rebel(capsys, "rollout", yaml, "--to", rollouts, "--temperature", "0.7", code=2)
    assert "holds other rollouts: --temperature 1.0, not 0.7." in said

    bare = [
        "--model_name_or_path",
        files / "model",
        "--from_rollouts",
        rollouts,
        "--use_cpu",
        "--steps_per_iteration",
        2,
    ]
    said = rebel(capsys, "train", *bare, "--prompts_per_iteration", 5, "--output_dir", tmp_path / "three")
    assert "0 to evaluate on" in said, "without a dataset and a reward it regresses what is there"


def test_another_policy_than_the_one_that_drew_is_said_and_another_tokenizer_refused(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rebel(capsys, "rollout", files / "run.yaml", "--to", tmp_path / "rollouts", "--reward_funcs", "elsewhere.py:f")
    rebel(capsys, "score", tmp_path / "rollouts", "--reward_funcs", files / "even.py:even")
    tiny.model(initializer_range=0.1, num_hidden_layers=1, seed=1).save_pretrained(tmp_path / "other")
    tiny.tokenizer().save_pretrained(tmp_path / "other")
    words = ["train", files / "run.yaml", "--from_rollouts", tmp_path / "rollouts", "--dry_run"]
    said = rebel(capsys, *words, "--model_name_or_path", tmp_path / "other")
    assert f"drawn by another policy ({files / 'model'}); pi_t is the one given here" in said
    assert f"({files / 'model'} at --temperature 1); pi_t" in rebel(capsys, *words, "--temperature", 0.9)
    vocabulary = tmp_path / "other" / "tokenizer.json"
    vocabulary.write_text(vocabulary.read_text().replace('"w9"', '"v9"'))
    said = rebel(capsys, *words, "--model_name_or_path", tmp_path / "other", code=2)
    assert "token ids of another tokenizer" in said


def test_completions_from_a_file_go_the_same_way(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"w{k}", "completions": [f"w{k} w{j}" for j in range(3)], "gold": k} for k in range(9)]
    rows[4] |= {"completions": ["w1"]}
    (tmp_path / "drawn.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        "rollout",
        "--from_file",
        tmp_path / "drawn.jsonl",
        "--model_name_or_path",
        files / "model",
        "--shard_prompts",
        3,
    ]
    said = rebel(capsys, *words, "--to", tmp_path / "rollouts")
    assert "8 prompts of" in said and "left out: 0 too long, 1 with fewer than two completions" in said
    rebel(capsys, *words, "--to", tmp_path / "rollouts")
    rebel(capsys, "score", tmp_path / "rollouts", "--reward_funcs", files / "even.py:even")
    settings = ["--use_cpu", "--prompts_per_iteration", 4, "--steps_per_iteration", 2, "--output_dir", tmp_path / "run"]
    words = ["train", "--model_name_or_path", files / "model", "--from_rollouts", tmp_path / "rollouts", *settings]
    assert "drawn by another policy" in rebel(capsys, *words)
    assert [row["iteration"] for row in tiny.rows(tmp_path / "run")] == [0, 1, 2]
    said = rebel(capsys, "rollout", "--from_file", "gone.jsonl", "--model_name_or_path", "m", "--to", "x", code=2)
    assert "--from_file gone.jsonl: there is no such file" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rollout"], "where to is not given: use --to"),
        (["rollout", "--to", "x"], "no model: give --model_name_or_path"),
        (["rollout", "--to", "x", "--num_generations", "1"], "leaves nothing to compare"),
        (["score", "nowhere", "--reward_funcs", "f"], "nowhere is no folder"),
        (["score", "."], "no reward: give --reward_funcs"),
        (["train", "--rounds", "2", "--iterations", "3"], "leave --iterations out"),
        (["train", "--rounds", "2", "--from_rollouts", "x"], "use --rounds 1"),
        (
            ["train", "--rounds", "2", "--kl_per_iteration", "0.1"],
            "it holds the KL of iterations that begin at their own",
        ),
        (["train", "--rounds", "2", "--replace_flat_groups", "1"], "no others to draw in their place"),
        (["train", "--round_epochs", "2", "--iterations", "3"], "is for large batches; give --rounds"),
        (["train", "--rounds", "0"], "use 1 or more"),
    ],
)
def test_what_cannot_be_is_one_error(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in rebel(capsys, *words, code=2)


def test_rollouts_that_are_not_complete_or_not_scored_are_named(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", files / "run.yaml", "--from_rollouts", tmp_path / "rollouts", "--output_dir", tmp_path / "run"]
    (tmp_path / "rollouts").mkdir()
    assert "holds no rollouts" in rebel(capsys, *words, code=2)
    rebel(capsys, "rollout", files / "run.yaml", "--to", tmp_path / "rollouts")
    assert "is not scored: 3 missing (shard 0 ...) of its 3 shards of rewards" in rebel(capsys, *words, code=2)
    (tmp_path / "rollouts" / "completions" / "00002.arrow").unlink()
    score_it = ["score", tmp_path / "rollouts", "--reward_funcs", files / "even.py:even"]
    assert "not complete: 1 missing (shard 2) of its 3 shards of completions" in rebel(capsys, *score_it, code=2)
    assert not (tmp_path / "run").exists(), "before any work"


# -- killed ----------------------------------------------------------------------------------------------------------


def killed(words: list[str], folder: Path, shards: int) -> int:
    """Start a command, kill it once `folder` has so many shards, and return how many it then has."""
    process = subprocess.Popen([sys.executable, "-m", "rebel", *words], cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while process.poll() is None and len(list(folder.glob("*.arrow"))) < shards and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was done before it could be killed"
    return len(list(folder.glob("*.arrow")))


def test_killed_while_drawing_and_while_scoring_real_rollouts_go_on_to_the_same_bytes(
    stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    lines = (DATA / "tinystories" / "prompts.jsonl").read_text().splitlines(keepends=True)[:60]
    (tmp_path / "prompts.jsonl").write_text("".join(lines))
    (tmp_path / "slow.py").write_text(
        "import time\nfrom examples.sentiment import sentiment as fast\n"
        "def sentiment(completions, **kwargs):\n    time.sleep(0.05)\n    return fast(completions)\n"
    )
    settings = {"max_completion_length": 12, "shard_prompts": 4, "eval_prompts": 0, "num_generations": 5}
    words = ["rollout", f"--model_name_or_path={stories}", f"--dataset_name={tmp_path / 'prompts.jsonl'}", "--use_cpu"]
    words += [f"--{name}={value}" for name, value in settings.items()]
    scoring = ["--reward_funcs", f"{tmp_path / 'slow.py'}:sentiment"]
    one, two = tmp_path / "one", tmp_path / "two"
    rebel(capsys, *words, "--to", one)
    rebel(capsys, "score", one, *scoring)
    count = len(list((one / "completions").glob("*.arrow")))
    assert 3 <= killed([*words, "--to", str(two)], two / "completions", 3) < count
    said = rebel(capsys, *words, "--to", two)
    assert "prompts are done already" in said
    assert 2 <= killed(["score", str(two), *scoring], two / "rewards", 2) < count
    assert "prompts are done already" in rebel(capsys, "score", two, *scoring)
    assert bytes_of(one) == bytes_of(two)


def test_the_trainer_runs_in_rounds_and_from_rollouts(tmp_path: Path) -> None:
    settings = {key: value for key, value in (tiny.SETTINGS | ROUNDS).items() if key not in ("rounds", "round_prompts")}
    args = RebelConfig(**settings | {"rounds": 1, "round_epochs": 1, "output_dir": str(tmp_path / "one")})
    rows = [
        {"prompt": prompt.content, "row": k} for k, prompt in enumerate(tiny.prompts(*[1 + k % 7 for k in range(9)]))
    ]

    def trainer(args: RebelConfig, rows: list[dict[str, Any]] | None) -> RebelTrainer:
        made = RebelTrainer(tiny.small(), evenness, args, rows, processing_class=tiny.tokenizer())
        made.train()
        return made

    one = trainer(args, rows)
    given = replace(args, output_dir=str(tmp_path / "two"), from_rollouts=str(tmp_path / "one" / "rounds" / "00000"))
    two = trainer(given, None)
    assert one.job.iterations == two.job.iterations == 3
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(one.model.parameters(), tiny.small().parameters(), strict=True))
