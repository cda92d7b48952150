"""vLLM as a server: the same completions as in this process, deadlines, and what happens when it is gone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from test_causal_lm import with_lora

from rebel.errors import RebelError, RunStopped
from rebel.policies.causal_lm import CausalLM
from rebel.report import read_rows
from rebel.samplers.generate import Generate
from rebel.samplers.server import Server, server
from rebel.samplers.vllm import VLLM, installed, probe_of

if installed() is None:
    pytest.skip("vLLM is not installed: make test-vllm", allow_module_level=True)

SHAPE: dict[str, Any] = {
    "head_dim": 64,
    "initializer_range": 0.2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
NAME, LONGEST, READY = "tiny-policy", 200, 120.0
ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
}


@contextmanager
def serving(folder: Path) -> Iterator[tuple[str, subprocess.Popen]]:
    """The address and the process of a vLLM server of the model in `folder`, with all processes it starts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += [
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--served-model-name",
        NAME,
        "--max-model-len",
        str(LONGEST),
    ]
    command += ["--dtype", "float32", "--enforce-eager"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, env=os.environ | ENVIRONMENT, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield f"http://127.0.0.1:{port}", process
    finally:
        signal_all(process, signal.SIGKILL)
        process.wait()


def signal_all(process: subprocess.Popen, what: signal.Signals) -> None:
    """To the server and to the processes it started, which are a group of their own."""
    try:
        os.killpg(process.pid, what)
    except ProcessLookupError:
        assert process.poll() is not None


def policy(seed: int = 0) -> CausalLM:
    return tiny.policy("llama", seed=seed, **SHAPE)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, subprocess.Popen]]:
    folder = tmp_path_factory.mktemp("served")
    policy().model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    with serving(folder) as found:
        yield found


@pytest.fixture
def engine(running: tuple[str, subprocess.Popen], tmp_path: Path) -> Server:
    return server(running[0], NAME, tmp_path, LONGEST, READY)


def sampler(engine: Server, policy: CausalLM, tokens: int = 10, temperature: float = 1.0) -> VLLM:
    return VLLM(policy, engine, tokens, temperature, probe_of(policy, tiny.prompts(5)[0], LONGEST - 1), 1e-3)


def ids(drawn: Iterator) -> list[tuple[int, ...]]:
    return [completion.trace.completion for rollout in drawn for completion in rollout.completions]


@torch.no_grad()
def move(policy: CausalLM, by: float = 0.1) -> None:
    for weight in policy.model.parameters():
        if weight.requires_grad:
            weight.add_(by * torch.randn_like(weight))


def carried_out(folder: Path, *reward: Any, **given: Any) -> list[dict[str, Any]]:
    """What was measured in a run."""
    folder.mkdir(exist_ok=True)
    tiny.carry_out(tiny.job(folder, *reward, **given))
    return tiny.rows(folder)


def settings(address: str, **more: Any) -> dict[str, Any]:
    lm = tiny.model("llama", **{**SHAPE, "initializer_range": 0.1})
    run = {"sampler": "vllm", "vllm_mode": "server", "vllm_server_base_url": address, "model_name_or_path": NAME}
    return {"lm": lm, "max_prompt_length": 16, "vllm_deadline": READY, **run, **more}


# -- what is drawn from ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapted", [False, True], ids=["whole", "lora"])
def test_greedy_completions_follow_every_change_of_the_weights(engine: Server, adapted: bool) -> None:
    own = with_lora(policy()) if adapted else policy()
    prompts = tiny.prompts(3, 150, 1, 180, 7)  # what is kept of the long ones must not outlive the weights
    seen = []
    for _ in range(3):
        drawn = sampler(engine, own, temperature=0.0)
        drawn.refresh()
        seen.append(ids(drawn(prompts, 2, 0)))
        assert seen[-1] == ids(Generate(own, 10, 0.0)(prompts, 2, 0))
        move(own)
    assert seen[0] != seen[1] != seen[2]
    assert not list(engine.folder.iterdir()), "files of weights are gone once they are loaded"


def test_a_seed_is_of_each_prompt_and_completion(engine: Server) -> None:
    drawn = sampler(engine, policy())
    drawn.refresh()
    same = [tiny.prompts(3)[0]] * 3
    first, again, other = (ids(drawn(same, 4, seed)) for seed in (7, 7, 8))
    assert first == again != other
    assert len(set(first)) == len(first), "neither prompts nor completions share random numbers"


# -- servers that are not what the run needs -------------------------------------------------------------------------


def test_a_server_of_another_model_is_refused(running: tuple[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RebelError, match=rf"holds {NAME}, and --model_name_or_path is meta/other: start it with that"):
        server(running[0], "meta/other", tmp_path, LONGEST, READY)


def test_a_server_of_shorter_sequences_is_refused(running: tuple[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RebelError, match=rf"takes {LONGEST} tokens.*may need 300: start it with --max-model-len 300"):
        server(running[0], NAME, tmp_path, 300, READY)


# -- whole runs ------------------------------------------------------------------------------------------------------


def test_a_run_is_trained_on_what_the_server_draws(running: tuple[str, Any], tmp_path: Path) -> None:
    rows = carried_out(tmp_path, **settings(running[0]))
    assert len(rows) == 4 and all(apart < 1e-4 for apart in tiny.mismatches(rows))


def test_an_adapter_is_trained_on_what_the_server_draws(running: tuple[str, Any], tmp_path: Path) -> None:
    given = settings(running[0], learning_rate=0.1)
    given["lm"] = get_peft_model(given["lm"], LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    rows = carried_out(tmp_path, **given)
    assert all(apart < 1e-4 for apart in tiny.mismatches(rows))
    assert rows[-1]["kl_initial"] > 0.1, "the adapter moved far enough that the sampler without it would be noticed"


def test_a_run_may_draw_one_step_ahead(running: tuple[str, Any], tmp_path: Path) -> None:
    ahead = carried_out(tmp_path / "ahead", one_step_ahead=True, **settings(running[0], iterations=4))
    now = carried_out(tmp_path / "now", **settings(running[0], iterations=4))
    assert ahead[1]["reward"] == now[1]["reward"], "the first iteration is the same"
    assert len(ahead) == len(now) and ahead[2] != now[2]


def test_a_server_that_answers_slowly_is_not_waited_for_longer_than_the_deadline(
    running: tuple[str, subprocess.Popen], tmp_path: Path
) -> None:
    def halt(**columns: Any) -> list[float]:
        signal_all(running[1], signal.SIGSTOP)  # it goes on listening, and says nothing
        return tiny.evenness(**columns)

    made = tiny.job(tmp_path, halt, **settings(running[0], vllm_deadline=3.0))
    began = time.monotonic()
    try:
        with pytest.raises(RunStopped, match=r"no answer within --vllm_deadline 3 seconds; waited for: loading the"):
            tiny.carry_out(made)
    finally:
        signal_all(running[1], signal.SIGCONT)
    assert time.monotonic() - began < 30
    assert httpx.get(f"{running[0]}/health", timeout=READY).status_code == 200


def test_a_server_that_is_killed_leaves_a_run_that_can_be_resumed(
    running: tuple[str, subprocess.Popen], tmp_path: Path
) -> None:
    """The last test of this server."""
    calls: list[int] = []

    def killing(**columns: Any) -> list[float]:
        calls.append(1)
        if len(calls) == 3:  # the evaluation at the start, and two iterations
            signal_all(running[1], signal.SIGKILL)
            running[1].wait()
        return tiny.evenness(**columns)

    made = tiny.job(tmp_path, killing, **settings(running[0], vllm_deadline=20.0, eval_steps=100))
    with pytest.raises(RunStopped, match=r"is gone .*waited for: loading the.*checkpoint-6 is complete; go on with"):
        tiny.carry_out(made)
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 3
    with pytest.raises(RebelError, match=r"no vLLM server answered within --vllm_deadline 1 seconds"):
        server(running[0], NAME, tmp_path, LONGEST, 1.0)
