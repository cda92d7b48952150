"""Drawing by vLLM without vLLM: an engine that is a second model. What the real one does is in tests/with_vllm."""

from __future__ import annotations

import threading
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from test_causal_lm import with_lora
from tiny import CONFIGS
from torch import Tensor

from rebel.build import sampler as builder
from rebel.collect import Drawn
from rebel.errors import RebelError, RunStopped
from rebel.policies.causal_lm import CausalLM, causal_lm
from rebel.policies.references import initial_adapter
from rebel.samplers import vllm
from rebel.samplers.generate import Generate
from rebel.samplers.vllm import VLLM, Engine, check_version, probe_of, token_logp
from rebel.samplers.weights import check_mergeable, weights_of

LONGEST = 40


@dataclass
class Twin:
    """An engine that draws from a model of its own, and takes weights under the names that it knows."""

    policy: CausalLM
    deaf: frozenset[str] = frozenset()
    loads: int = 0
    drawn: list[int] = field(default_factory=list)
    rests: int = 0

    def draw(self, prompts: Sequence[Sequence[int]], parameters: Sequence[Mapping[str, Any]]) -> list[list[list[int]]]:
        self.drawn.append(self.loads)
        found = []
        for ids, how in zip(prompts, parameters, strict=True):
            own = Generate(self.policy, how["max_tokens"], how["temperature"])
            with torch.inference_mode():
                found.append(own.draw([ids], how["n"], how["seed"]))
        return found

    def token_logp(self, ids: Sequence[int]) -> list[float]:
        return token_logp(self.policy, ids)

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.loads += 1
        named = {name: weight for name, weight in weights if name not in self.deaf}
        strict = not self.deaf
        self.policy.model.load_state_dict(named, strict=strict)

    def rest(self) -> None:
        self.rests += 1


def twin(kind: str = "llama", **changes: Any) -> Twin:
    return Twin(tiny.policy(kind, seed=99, **changes))


def sampler(policy: CausalLM, engine: Engine, tokens: int = 6, temperature: float = 1.0, bound: float = 1e-3) -> VLLM:
    return VLLM(policy, engine, tokens, temperature, probe_of(policy, tiny.prompts(5)[0], LONGEST), bound)


def ids(drawn: Iterable) -> list[tuple[int, ...]]:
    return [completion.trace.completion for rollout in drawn for completion in rollout.completions]


@torch.no_grad()
def move(policy: CausalLM, by: float = 0.3) -> None:
    for weight in policy.model.parameters():
        if weight.requires_grad:
            weight.add_(by * torch.randn_like(weight))


# -- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(CONFIGS))
@pytest.mark.parametrize("adapted", [False, True], ids=["whole", "lora"])
def test_weights_are_those_of_a_checkpoint_with_the_adapter_merged(kind: str, adapted: bool) -> None:
    policy, engine = tiny.policy(kind), twin(kind)
    policy = with_lora(policy) if adapted else policy
    before = {name: weight.clone() for name, weight in policy.model.state_dict().items()}
    sampler(policy, engine).refresh()
    assert token_logp(engine.policy, range(3, 20)) == pytest.approx(token_logp(policy, range(3, 20)), abs=1e-4)
    now = policy.model.state_dict()
    assert all(torch.equal(before[name], now[name]) for name in before), "the trainer's weights are as they were"


def test_a_tied_output_layer_comes_by_name() -> None:
    policy = tiny.policy("llama", tie_word_embeddings=True)
    sent = dict(weights_of(policy))
    assert torch.equal(sent["lm_head.weight"], sent["model.embed_tokens.weight"])


def test_layers_trained_whole_beside_an_adapter_are_sent_as_they_are_trained() -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny.model("llama", tie_word_embeddings=False), lora)
    policy = causal_lm(model, tiny.tokenizer())
    move(policy)
    engine = twin(tie_word_embeddings=False)
    sampler(policy, engine).refresh()
    assert token_logp(engine.policy, range(3, 20)) == pytest.approx(token_logp(policy, range(3, 20)), abs=1e-4)


def test_only_the_adapter_that_is_trained_is_merged() -> None:
    policy = with_lora(tiny.policy())
    initial_adapter(policy)
    move(policy)
    engine = twin()
    sampler(policy, engine).refresh()
    assert token_logp(engine.policy, range(3, 20)) == pytest.approx(token_logp(policy, range(3, 20)), abs=1e-4)


@pytest.mark.parametrize("more", [{"use_dora": True}, {"lora_bias": True, "bias": "none"}], ids=["dora", "bias"])
def test_adapters_that_are_more_than_a_product_are_refused(more: dict[str, Any]) -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **more)
    policy = causal_lm(get_peft_model(tiny.model(), lora), tiny.tokenizer())
    with pytest.raises(RebelError, match=r"plain LoRA adapters.*this one is (DoRA|LoRA with a bias). Use --sampler"):
        check_mergeable(policy)


# -- what is drawn ---------------------------------------------------------------------------------------------------


def test_completions_are_the_engines_and_end_as_the_policy_says() -> None:
    policy, engine = tiny.policy(), twin()
    drawn = sampler(policy, engine)
    drawn.refresh()
    prompts = tiny.prompts(2, 5)
    found = list(drawn(prompts, 3, 4))
    assert [rollout.prompt for rollout in found] == prompts
    for rollout in found:
        for completion in rollout.completions:
            assert completion.trace.prompt == tuple(policy.encode(rollout.prompt))
            assert completion.finished == (completion.trace.completion[-1] == tiny.EOS)
    assert ids(drawn(prompts, 3, 4)) == ids(found) != ids(drawn(prompts, 3, 5))
    same = ids(drawn(prompts[:1] * 3, 3, 4))
    assert len({tuple(same[k : k + 3]) for k in (0, 3, 6)}) == 3, "prompts that are alike have seeds of their own"


def test_greedy_completions_are_drawn_once_and_repeated() -> None:
    policy, engine = tiny.policy(), twin()
    asked: list[int] = []

    def draw(prompts: Any, parameters: Sequence[Mapping[str, Any]]) -> list[list[list[int]]]:
        asked.extend(how["n"] for how in parameters)
        return Twin.draw(engine, prompts, parameters)

    engine.draw = draw  # pyright: ignore
    found = [r.completions for r in sampler(policy, engine, temperature=0.0)(tiny.prompts(2, 5), 3, 0)]
    assert asked == [1, 1]
    assert all(len(group) == 3 and len({c.trace for c in group}) == 1 for group in found)


def test_nothing_truncates_and_prompts_share_no_random_numbers() -> None:
    drawn = sampler(tiny.policy(), twin(), temperature=0.7)
    how, other = drawn.parameters(4, 2**63 - 1), drawn.parameters(4, 1)
    assert how["seed"] != other["seed"] and how["seed"] + 4 < 2**63, "vLLM adds the completion's number"
    assert how["temperature"] == 0.7 and how["stop_token_ids"] == [tiny.EOS] and how["ignore_eos"]
    assert (how["top_p"], how["top_k"], how["min_p"], how["repetition_penalty"]) == (1.0, 0, 0.0, 1.0)


# -- the probe -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_one_tensor_that_does_not_arrive_stops_the_run(kind: str) -> None:
    policy = tiny.policy(kind)
    names = [name for name, weight in weights_of(policy) if weight.numel() > 1]
    for name in names:
        engine = Twin(tiny.policy(kind, tie_word_embeddings=False), frozenset([name]))
        move(engine.policy)
        with pytest.raises(RunStopped, match=r"vLLM does not draw from the policy.*--vllm_max_mismatch allows 0\.001"):
            sampler(policy, engine).refresh()


@pytest.mark.parametrize("value", [1e-2, float("nan"), float("inf")])
def test_the_bound_is_on_every_token(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, engine, noted = tiny.policy(), twin(), {}
    real = Twin.token_logp

    def off(self: Twin, given: Sequence[int]) -> list[float]:
        found = real(self, given)
        return [*found[:4], found[4] - value, *found[5:]]

    monkeypatch.setattr(Twin, "token_logp", off)
    drawn = replace(sampler(policy, engine), note=noted.__setitem__)
    with pytest.raises(RunStopped, match=r"token 6: trainer -?\d"):
        drawn.refresh()
    replace(drawn, max_mismatch=2e-2).refresh() if value == 1e-2 else None
    assert noted["sampler/seconds_sync"] > 0 and not noted["sampler/mismatch"] < 9e-3


def test_a_probe_fits_and_reaches_over_the_vocabulary() -> None:
    policy = tiny.policy()
    probe = probe_of(policy, tiny.prompts(50)[0], 1000)
    assert len(probe) == vllm.PROBE and min(probe[-16:]) == 0 and max(probe) >= tiny.VOCABULARY * 15 // 16
    assert len(probe_of(policy, tiny.prompts(50)[0], 9)) == 9


def test_the_probe_is_computed_as_the_trainer_computes_at_temperature_one() -> None:
    policy = tiny.policy("gemma2", temperature=0.5)
    given = tiny.trace(1, 9)
    expected = float(replace(policy, scorer=tiny.policy("gemma2").scorer).log_prob([given]))
    assert sum(token_logp(policy, [*given.prompt, *given.completion])) == pytest.approx(expected, abs=1e-4)


# -- versions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (None, r"there is no vLLM; install 0\.31 or newer, below 0\.32 .*docs/vllm\.md"),
        ("0.22.1", r"vLLM 0\.22\.1, which is too old: it was tested with 0\.31 or newer, below 0\.32\. Install one"),
        ("0.32.0", "too new"),
        ("0.32.0rc1", "too new"),
        ("1.0", "too new"),
    ],
)
def test_versions_that_were_not_tested_are_refused(found: str | None, words: str) -> None:
    with pytest.raises(RebelError, match=words):
        check_version(found, "there")


@pytest.mark.parametrize("found", ["0.31.0", "0.31.4+cpu", "0.31.1.dev3"])
def test_versions_that_were_tested_are_taken(found: str) -> None:
    check_version(found, "there")


def test_the_package_asks_for_the_versions_that_were_tested() -> None:
    settings = tomllib.loads(Path(vllm.__file__).parents[3].joinpath("pyproject.toml").read_text())
    assert settings["project"]["optional-dependencies"]["vllm"] == [f"vllm>={vllm.OLDEST},<{vllm.TOO_NEW}"]


def test_without_vllm_the_error_comes_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rebel.samplers.colocated.installed", lambda: None)
    with pytest.raises(RebelError, match="is no vLLM; install"):
        tiny.job(tmp_path, sampler="vllm")


# -- whole runs ------------------------------------------------------------------------------------------------------


class Faithful(Twin):
    """Draws only from the weights that its policy has now."""

    now: Any = None

    def draw(self, *given: Any) -> list[list[list[int]]]:
        own = self.policy.model.state_dict()
        for name, weight in weights_of(self.now):
            assert torch.equal(own[name], weight), f"{name} is not the policy's"
        return super().draw(*given)


def engine_of_run(monkeypatch: pytest.MonkeyPatch, made: Twin) -> None:
    """Runs draw from this engine, and tell it their policy."""

    def start(policy_or_address: Any, *settings: Any) -> Twin:
        if isinstance(policy_or_address, CausalLM):
            made.now = policy_or_address  # pyright: ignore
        return made

    monkeypatch.setattr(builder, "colocated", start)
    monkeypatch.setattr(builder, "server", start)


def small() -> CausalLM:
    return causal_lm(tiny.small(), tiny.tokenizer())


@pytest.mark.parametrize("how", [{}, {"average": 0.5}, {"mixture": 2}, {"rounds": 2, "round_prompts": 8}])
def test_a_run_draws_from_the_policy_as_it_is_now(
    how: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Faithful(small())
    engine_of_run(monkeypatch, engine)
    tiny.carry_out(tiny.job(tmp_path, sampler="vllm", **how))
    assert engine.loads > 3 and engine.rests > 3
    mismatches = [row["sampler/mismatch"] for row in tiny.rows(tmp_path) if "sampler/mismatch" in row]
    assert mismatches and max(mismatches) < 1e-5


def ahead(folder: Path, **settings: Any) -> list[dict[str, Any]]:
    folder.mkdir()
    tiny.carry_out(tiny.job(folder, sampler="vllm", vllm_mode="server", one_step_ahead=True, **settings))
    return tiny.rows(folder)


def test_one_step_ahead_draws_from_the_policy_of_one_iteration_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Twin(small())
    engine_of_run(monkeypatch, engine)
    rows = ahead(tmp_path / "run", iterations=4)
    chunks = 3  # of an iteration
    assert engine.drawn == [1] * chunks + [1] * chunks + [2] * chunks + [3] * chunks, "and nothing beyond the end"
    assert [row["samples"] for row in rows] == [0, 24, 48, 72, 96]


def test_one_step_ahead_takes_the_same_prompts_and_anchors_at_the_policy_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[bool, tuple[list[list[str]], list[dict[str, Any]]]] = {}
    for early in (False, True):
        prompts: list[list[str]] = []

        def noting(prompts: list[str], seen: list[list[str]] = prompts, **columns: Any) -> list[float]:
            seen.append(list(prompts))
            return tiny.evenness(**columns)

        engine_of_run(monkeypatch, Twin(small()))
        folder = tmp_path / str(early)
        folder.mkdir()
        how = {"sampler": "vllm", "vllm_mode": "server", "one_step_ahead": early, "eval_steps": 100}
        made = tiny.job(folder, noting, **how)
        collected: list[Drawn] = []
        collect = made.run.collector
        made.run = replace(made.run, collector=lambda *given, to=collected, by=collect: to.append(by(*given)) or to[-1])
        tiny.carry_out(made)
        assert all(not drawn.anchor and drawn.fresh for drawn in collected)
        found[early] = prompts, tiny.rows(folder)
    assert found[True][0] == found[False][0], "in the same order"
    now, ahead = found[False][1], found[True][1]
    assert ahead[1]["reward"] == now[1]["reward"] and ahead[1]["loss"] == now[1]["loss"]
    assert ahead[2]["reward"] != now[2]["reward"]


def test_one_step_ahead_draws_while_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, trained = Twin(small()), threading.Event()
    engine_of_run(monkeypatch, engine)
    draw = Twin.draw

    def patient(self: Twin, *given: Any) -> list[list[list[int]]]:
        if len(self.drawn) >= 3:  # those of the second iteration, which begins only when they are there
            assert trained.wait(10), "the first iteration is not trained meanwhile"
        return draw(self, *given)

    monkeypatch.setattr(Twin, "draw", patient)
    folder = tmp_path / "run"
    folder.mkdir()
    made = tiny.job(folder, sampler="vllm", vllm_mode="server", one_step_ahead=True, iterations=2)
    made.run.learner.optimizer.optimizer.register_step_post_hook(lambda *given: trained.set())
    tiny.carry_out(made)
    assert tiny.rows(folder)[-1]["iteration"] == 2


def test_what_fails_ahead_stops_the_iteration_that_needs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Twin(small())
    engine_of_run(monkeypatch, engine)
    draw = Twin.draw

    def failing(self: Twin, *given: Any) -> list[list[list[int]]]:
        if len(self.drawn) == 4:
            raise RunStopped("the server is gone")
        return draw(self, *given)

    monkeypatch.setattr(Twin, "draw", failing)
    with pytest.raises(RunStopped, match=r"the server is gone.*checkpoint-3 is complete"):
        ahead(tmp_path / "run", iterations=3)


def test_a_resumed_run_ahead_begins_as_a_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Twin(small())
    engine_of_run(monkeypatch, engine)
    how = {"sampler": "vllm", "vllm_mode": "server", "one_step_ahead": True}
    tiny.trained(tmp_path / "run", iterations=2, **how)
    loads, engine.drawn[:] = engine.loads, []
    tiny.trained(tmp_path / "run", iterations=4, resume=True, **how)
    assert engine.drawn == [loads + 1] * 6, "the policy of the checkpoint draws for the first two iterations"
    assert [row["iteration"] for row in tiny.rows(tmp_path / "run")] == [0, 1, 2, 3, 4]
