"""vLLM in this process: it draws from the weights that are trained, and says so where it does not."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_causal_lm import with_lora
from test_generate import surprise

from rebel.errors import RebelError, RunStopped
from rebel.policies.causal_lm import CausalLM
from rebel.report import read_rows
from rebel.samplers.generate import Generate
from rebel.samplers.vllm import VLLM, Engine, installed, probe_of, token_logp
from rebel.samplers.weights import weights_of
from rebel.types import Prompt

if installed() is None:
    pytest.skip("vLLM is not installed: make test-vllm", allow_module_level=True)

from rebel.build import sampler as builder
from rebel.samplers.colocated import colocated

SHAPE: dict[str, Any] = {"head_dim": 64, "initializer_range": 0.2, "max_position_embeddings": 256}
"""vLLM computes heads of 64, and keeps what it has computed of a prompt in blocks of 128 tokens."""
LONGEST = 200


def policy(tied: bool = True, seed: int = 0) -> CausalLM:
    return tiny.policy("llama", tie_word_embeddings=tied, seed=seed, **SHAPE)


@pytest.fixture(scope="module")
def engines() -> dict[bool, Engine]:
    """An engine for a tied output layer and one for a free one."""
    return {tied: colocated(policy(tied), LONGEST, torch.float32, 0.3, sleeps=True) for tied in (True, False)}


@pytest.fixture(params=[True, False], ids=["tied", "free"])
def engine(request: pytest.FixtureRequest, engines: dict[bool, Engine]) -> tuple[Engine, CausalLM]:
    return engines[request.param], policy(request.param)


@pytest.fixture
def tied(engines: dict[bool, Engine]) -> tuple[Engine, CausalLM]:
    return engines[True], policy()


def sampler(engine: Engine, policy: CausalLM, tokens: int = 10, temperature: float = 1.0) -> VLLM:
    return VLLM(policy, engine, tokens, temperature, probe_of(policy, tiny.prompts(5)[0], LONGEST), 1e-3)


def ids(drawn: Iterable) -> list[tuple[int, ...]]:
    return [completion.trace.completion for rollout in drawn for completion in rollout.completions]


@torch.no_grad()
def move(policy: CausalLM, by: float = 0.1) -> None:
    for weight in policy.model.parameters():
        if weight.requires_grad:
            weight.add_(by * torch.randn_like(weight))


# -- what is drawn from ----------------------------------------------------------------------------------------------


def test_greedy_completions_follow_every_change_of_the_weights(engine: tuple[Engine, CausalLM]) -> None:
    own = engine[1]
    prompts = tiny.prompts(3, 150, 1, 180, 7)  # what is kept of the long ones must not outlive the weights
    seen = []
    for _ in range(3):
        drawn = sampler(engine[0], own, temperature=0.0)
        drawn.refresh()
        seen.append(ids(drawn(prompts, 2, 0)))
        assert seen[-1] == ids(Generate(own, 10, 0.0)(prompts, 2, 0))
        move(own)
    assert seen[0] != seen[1] != seen[2]


def test_log_probabilities_are_the_trainers(engine: tuple[Engine, CausalLM]) -> None:
    noted: dict[str, float] = {}
    drawn = replace(sampler(*engine), note=noted.__setitem__)
    move(engine[1])
    drawn.refresh()
    assert engine[0].token_logp(drawn.probe) == pytest.approx(token_logp(engine[1], drawn.probe), abs=1e-4)
    assert noted["sampler/mismatch"] < 1e-4


def test_an_adapter_reaches_the_sampler_and_the_model_stays_as_it_is(tied: tuple[Engine, CausalLM]) -> None:
    adapted = with_lora(tied[1])
    before = [weight.detach().clone() for weight in adapted.model.parameters()]
    drawn = sampler(tied[0], adapted, temperature=0.0)
    prompts = tiny.prompts(3, 150, 7)
    seen = []
    for _ in range(2):
        drawn.refresh()
        seen.append(ids(drawn(prompts, 1, 0)))
        assert seen[-1] == ids(Generate(adapted, 10, 0.0)(prompts, 1, 0))
        assert all(torch.equal(a, b) for a, b in zip(before, adapted.model.parameters(), strict=True))
        move(adapted)
        before = [weight.detach().clone() for weight in adapted.model.parameters()]
    assert seen[0] != seen[1]


@pytest.mark.parametrize("temperature", [0.7, 1.6])
def test_tokens_come_from_the_softmax_at_the_temperature(tied: tuple[Engine, CausalLM], temperature: float) -> None:
    drawn = sampler(*tied, tokens=1, temperature=temperature)
    drawn.refresh()
    prompt = Prompt("w1 w2 w3")
    counts = Counter(token for (token,) in ids(drawn([prompt], 4000, 0)))
    with torch.inference_mode():
        logits = tied[1].model(torch.tensor([tied[1].encode(prompt)])).logits[0, -1].double()
    counted = [counts[token] for token in range(tiny.VOCABULARY)]
    assert abs(surprise(counted, (logits / temperature).softmax(-1))) < 4
    assert surprise(counted, (logits / (temperature * 1.3)).softmax(-1)) > 4, "the test sees a wrong temperature"


def test_a_seed_is_of_each_prompt_and_completion(tied: tuple[Engine, CausalLM]) -> None:
    drawn = sampler(*tied)
    drawn.refresh()
    same = [Prompt("w1 w2 w3")] * 3
    first, again, other = (ids(drawn(same, 4, seed)) for seed in (7, 7, 8))
    assert first == again != other
    assert len(set(first)) == len(first), "neither prompts nor completions share random numbers"


def test_completions_end_where_the_policy_says_so_and_keep_their_end(tied: tuple[Engine, CausalLM]) -> None:
    ends = frozenset([10, 11, 12, 13, 14, 15])
    drawn = sampler(tied[0], replace(tied[1], eos_ids=ends))
    drawn.refresh()
    found = [c for rollout in drawn(tiny.prompts(2, 3), 40, 1) for c in rollout.completions]
    assert {completion.finished for completion in found} == {True, False}
    for completion in found:
        written = completion.trace.completion
        assert ends.isdisjoint(written[:-1])
        assert completion.finished == (written[-1] in ends) == (len(written) < 10 or written[-1] in ends)
    assert any(tiny.EOS in completion.trace.completion[:-1] for completion in found), "no other end counts"


# -- what goes wrong -------------------------------------------------------------------------------------------------


def test_weights_that_do_not_arrive_stop_the_run(
    tied: tuple[Engine, CausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = sampler(*tied)
    drawn.refresh()
    move(tied[1])

    def without_head(policy: CausalLM) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, weight) for name, weight in weights_of(policy) if name != "lm_head.weight")

    monkeypatch.setattr("rebel.samplers.vllm.weights_of", without_head)
    with pytest.raises(RunStopped, match=r"vLLM does not draw from the policy.*--vllm_max_mismatch allows 0\.001"):
        drawn.refresh()


def test_an_adapter_that_stays_behind_stops_the_run(
    tied: tuple[Engine, CausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted = with_lora(tied[1])
    monkeypatch.setattr("rebel.samplers.weights.with_delta", lambda weight, layer: weight)
    with pytest.raises(RunStopped, match="vLLM does not draw from the policy"):
        sampler(tied[0], adapted).refresh()


def test_heads_that_vllm_cannot_compute_are_found_out_at_the_start() -> None:
    with pytest.raises(RebelError, match=r"cannot compute heads of this model's size; use --sampler generate"):
        colocated(tiny.policy("llama"), 32, torch.float32, 0.3, sleeps=True)


def test_no_room_for_keys_and_values_is_found_out_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "100000")
    with pytest.raises(RebelError, match=r"no room for the keys and values.*VLLM_CPU_KVCACHE_SPACE"):
        colocated(policy(), 32, torch.float32, 0.3, sleeps=True)


# -- whole runs ------------------------------------------------------------------------------------------------------


def test_a_run_learns_from_what_vllm_draws(
    tied: tuple[Engine, CausalLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "colocated", lambda *settings: tied[0])
    lm = tiny.model("llama", tie_word_embeddings=True, **{**SHAPE, "initializer_range": 0.1})
    run = {"iterations": 12, "sampler": "vllm", "temperature": 0.8, "average": 0.3, "learning_rate": 1e-2, "eta": 10.0}
    tiny.carry_out(tiny.job(tmp_path, lm=lm, **run))
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert all("sampler/mismatch" in row for row in rows[1:])
    assert "eval/sampler/mismatch" in rows[0], "measured at evaluations of the average too"
    assert all(apart < 1e-4 for apart in tiny.mismatches(rows))
    rewards = [row["reward"] for row in rows[1:]]
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.1


def test_a_run_comes_to_the_same_weights_when_it_is_resumed(
    tied: tuple[Engine, CausalLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "colocated", lambda *settings: tied[0])
    monkeypatch.setattr(tiny, "small", lambda: tiny.model("llama", tie_word_embeddings=True, **SHAPE))
    run = {"sampler": "vllm", "save_steps": 6}
    whole = tiny.trained(tmp_path / "whole", iterations=4, **run)
    tiny.trained(tmp_path / "halves", iterations=2, **run)
    halves = tiny.trained(tmp_path / "halves", iterations=4, resume=True, **run)
    assert all(torch.equal(a, b) for a, b in zip(tiny.weights(whole), tiny.weights(halves), strict=True))


def test_a_run_makes_its_engine_and_keeps_its_random_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states: list[tuple[Any, torch.Tensor]] = []

    def watched(*settings: Any) -> Engine:
        states.append((random.getstate(), torch.get_rng_state()))
        made = colocated(*settings)
        states.append((random.getstate(), torch.get_rng_state()))
        return made

    monkeypatch.setattr(builder, "colocated", watched)
    lm = tiny.model("llama", tie_word_embeddings=True, **SHAPE)
    own = tiny.job(tmp_path, lm=lm, sampler="vllm", iterations=1)
    assert states[0][0] == states[1][0] and torch.equal(states[0][1], states[1][1])
    assert any("vLLM in this process" in line for line in own.plan)
    tiny.carry_out(own)
    assert read_rows(tmp_path / "metrics.jsonl")[-1]["sampler/mismatch"] < 1e-4


def test_in_16_bits_it_differs_by_less_than_the_bound(tmp_path: Path) -> None:
    lm = tiny.model("llama", tie_word_embeddings=True, **SHAPE)
    tiny.carry_out(tiny.job(tmp_path, lm=lm, sampler="vllm", iterations=2, bf16=True))
    apart = tiny.mismatches(read_rows(tmp_path / "metrics.jsonl"))
    assert all(1e-4 < each < builder.MISMATCH_16_BITS for each in apart)
