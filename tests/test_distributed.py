"""Two real processes learn what one would: the same weights, whatever falls to whom; and they stop together."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import test_offline
import tiny
import tiny_images
import torch
from peft import LoraConfig, get_peft_model

from rebel.errors import RunStopped

WORLD = 2
DEADLINE = 120.0

RUNS: dict[str, dict[str, Any]] = {
    # 5 prompts in chunks of 2, steps of 3 and 2 groups, and an odd number of micro-batches of one group each
    "odd": {
        **{"prompts_per_iteration": 5, "steps_per_iteration": 2, "tokens_per_micro_batch": 40, "average": 0.6},
        "reward": tiny.noted_evenness,
    },
    # groups that are split, with fillers, a reference and a way that is scaled
    "split": {
        **{"prompts_per_iteration": 3, "steps_per_iteration": 3, "tokens_per_micro_batch": 23, "sampling_batch": 4},
        **{"eta": "auto", "kl_per_iteration": 0.02, "beta": 0.05, "replace_flat_groups": 1.0},
    },
    # five shards of two prompts or one, dealt to two processes
    "rounds": {
        **{"rounds": 1, "round_prompts": 9, "shard_prompts": 2, "prompts_per_iteration": 5, "steps_per_iteration": 2},
        **{"tokens_per_micro_batch": 40, "pairing": "extremes", "iterations": None},
    },
    # recorded completions: rewards and anchors in shares, one file of anchors
    "offline": {"prompts_per_iteration": 8, "steps_per_iteration": 3, "tokens_per_micro_batch": 40},
    "lora": {"prompts_per_iteration": 3, "steps_per_iteration": 2, "tokens_per_micro_batch": 40, "beta": 0.1},
    "judged": {
        **{"prompts_per_iteration": 4, "steps_per_iteration": 2},
        **{"eval_against": "initial", "eval_judge": f"{tiny.__file__}:longer"},
    },
    # denoising paths: groups that are split, with fillers; back-propagated step by step, each step a regression
    "images": {"beta": 0.05, "credit": "step", "images_per_micro_batch": 2, "prompts_per_iteration": 3},
}
COMMON: dict[str, Any] = {"iterations": 2, "save_steps": 1, "eval_steps": 1}


NATS = {"images": 2e-3}
"""How far numbers may lie apart: paths have two thousand nats in fp32, which depend on the batch in the last digits."""


def start(name: str) -> Any:
    if name == "images":
        return tiny_images.job(Path("unused")).recorder.learner.module
    if name != "lora":
        return tiny.small()
    torch.manual_seed(3)
    return get_peft_model(tiny.small(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))


def carried_out(name: str, folder: Path) -> dict[str, Any]:
    """What a run has learnt and measured."""
    if name == "images":
        made = tiny_images.trained(folder, **COMMON | RUNS[name])
    else:
        made = offline(folder) if name == "offline" else tiny.trained(folder, lm=start(name), **COMMON | RUNS[name])
    learner = made.recorder.learner
    return {"weights": tiny.weights(made), "averaged": learner.averaged, "steps": learner.steps}


def offline(folder: Path) -> Any:
    """One epoch of recorded pairs that a reward function scores."""
    one_epoch = {**RUNS["offline"], "num_train_epochs": 1.0}
    trainer = test_offline.trainer(folder, reward=tiny.evenness, lm=start("offline"), eta="auto", **one_epoch)
    trainer.train()
    return trainer.job


def raises_on_one_process(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    if os.environ["RANK"] == "1":
        raise ValueError("only here")
    return tiny.evenness(completion_ids)


def signals_one_process(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return tiny.evenness(completion_ids)


def stopped(folder: Path, reward: Any) -> str:
    try:
        tiny.trained(folder, reward=reward, **COMMON)
    except RunStopped as reason:
        return str(reason)
    return "not stopped"


def work(rank: int, port: int, folder: Path, pipeline: str) -> None:
    """One of the processes. It is given a saved pipeline, since the second process of two cannot save a model."""
    RUNS["images"]["pipeline_name_or_path"] = pipeline
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    try:
        found |= {name: carried_out(name, folder / name) for name in RUNS}
        found["raises"] = stopped(folder / "raises", raises_on_one_process)
        found["signal"] = stopped(folder / "signal", signals_one_process)
    except BaseException:
        found["error"] = traceback.format_exc()
    torch.save(found, folder / f"found-{rank}.pt")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[dict[str, Any]]]]:
    """The folder of the runs and what each process found. They are forked from one that has imported everything."""
    folder = tmp_path_factory.mktemp("both")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_distributed"])
    port = free_port()
    given = (port, folder, tiny_images.saved("sd15"))
    processes = [context.Process(target=work, args=(rank, *given)) for rank in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(DEADLINE)
    late = [process for process in processes if process.is_alive()]
    for process in late:
        process.kill()
    assert not late, "the processes wait for each other"
    found = [torch.load(folder / f"found-{rank}.pt", weights_only=False) for rank in range(WORLD)]
    for own in found:
        assert "error" not in own, own["error"]
    yield folder, found


@pytest.mark.parametrize("name", list(RUNS))
def test_two_processes_learn_what_one_does(name: str, both: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    folder, found = both
    one = carried_out(name, tmp_path)
    first, second = (own[name] for own in found)
    assert all(torch.equal(a, b) for a, b in zip(first["weights"], second["weights"], strict=True))
    assert first["steps"] == second["steps"] == one["steps"]
    for mine, its in zip(one["weights"] + one["averaged"], first["weights"] + first["averaged"], strict=True):
        torch.testing.assert_close(its, mine, rtol=1e-5, atol=1e-5)
    moved = [(w - s).abs().max() for w, s in zip(one["weights"], trainable(name), strict=True)]
    assert max(moved) > 1e-3
    assert len(tiny.rows(tmp_path)) == 3
    for row, its in zip(tiny.rows(tmp_path), tiny.rows(folder / name), strict=True):
        assert its.keys() == row.keys()
        for key, value in row.items():
            near = pytest.approx(value, rel=1e-3, abs=NATS.get(name, 1e-4)) if isinstance(value, float) else value
            assert its[key] == near, key


def test_two_processes_draw_and_score_what_one_does(both: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    carried_out("rounds", tmp_path)
    theirs, own = (path / "rounds" / "00000" for path in (both[0] / "rounds", tmp_path))
    files = sorted(path.relative_to(own) for part in ("completions", "rewards") for path in (own / part).iterdir())
    assert len(files) == 2 * 5
    assert all((own / file).read_bytes() == (theirs / file).read_bytes() for file in files)
    assert len(list((theirs / "anchors").glob("*.arrow"))) == 5


def trainable(name: str) -> list[torch.Tensor]:
    return [weight for weight in start(name).parameters() if weight.requires_grad]


def test_a_checkpoint_of_two_processes_goes_on_with_one(both: tuple[Path, list[Any]], tmp_path: Path) -> None:
    folder, _ = both
    longer = tiny.trained(tmp_path, lm=start("odd"), **COMMON | RUNS["odd"] | {"iterations": 3})
    resumed = tiny.trained(folder / "odd", resume=True, lm=start("odd"), **COMMON | RUNS["odd"] | {"iterations": 3})
    for mine, its in zip(tiny.weights(longer), tiny.weights(resumed), strict=True):
        torch.testing.assert_close(its, mine, rtol=1e-5, atol=1e-5)


def test_a_reward_that_raises_on_one_process_stops_both(both: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, found = both
    for own in found:
        assert "raised ValueError" in own["raises"] and "only here" in own["raises"] and "checkpoint-0" in own["raises"]
    assert (folder / "raises" / "failed_reward.json").exists()


def test_a_signal_to_one_process_stops_both(both: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, found = both
    assert "SIGTERM after iteration 1" in found[1]["signal"]
    assert "a signal to another process after iteration 1" in found[0]["signal"]
    assert (folder / "signal" / "checkpoint-3" / "progress.json").exists()
