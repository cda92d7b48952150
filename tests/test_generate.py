"""The sampler draws from the policy that is scored, repeatably, and computes nothing twice."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable

import pytest
import tiny
import torch
from test_causal_lm import with_lora
from tiny import CONFIGS, EOS
from transformers import LlamaConfig

from rebel.build.model import build_policy
from rebel.config import RebelConfig
from rebel.policies.causal_lm import CausalLM, causal_lm
from rebel.samplers.generate import Generate
from rebel.types import Completion, Sampler, TokenTrace

KINDS = list(CONFIGS)


def completions(policy: CausalLM, lengths: tuple[int, ...], group: int, seed: int, **how: float) -> list[Completion]:
    """Completions of prompts of these lengths, all in a row."""
    sampler = Generate(policy, int(how.get("tokens", 12)), float(how.get("temperature", 1.0)))
    return [c for rollout in sampler(tiny.prompts(*lengths), group, seed) for c in rollout.completions]


def ids(drawn: list[Completion]) -> list[tuple[int, ...]]:
    return [completion.trace.completion for completion in drawn]


def surprise(counts: list[int], chances: torch.Tensor) -> float:
    """Pearson's chi-square in standard deviations from what it should be; rare cases are taken together."""
    expected = chances * sum(counts)
    seen = torch.tensor(counts, dtype=torch.float64)
    often = expected >= 5
    expected = torch.cat([expected[often], expected[~often].sum()[None]])
    seen = torch.cat([seen[often], seen[~often].sum()[None]])
    statistic = ((seen - expected).square() / expected.clamp(min=1e-9))[expected > 1].sum()
    freedom = int((expected > 1).sum()) - 1
    return float((statistic - freedom) / (2 * freedom) ** 0.5)


# -- the distribution -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.7, 1.6])
def test_first_tokens_come_from_the_softmax_at_the_temperature(temperature: float) -> None:
    policy = tiny.policy("llama", initializer_range=0.2)
    policy.model.requires_grad_(False)
    prompt = (7, 8, 9, 10)
    drawn = Counter(token for (token,) in drawn_from(Generate(policy, 1, temperature), [prompt], 6000)[0])
    logits = policy.model(torch.tensor([prompt])).logits[0, -1].double()
    counts = [drawn[token] for token in range(tiny.VOCABULARY)]
    assert sum(counts) == 6000
    assert abs(surprise(counts, (logits / temperature).softmax(-1))) < 4
    assert surprise(counts, (logits / (temperature * 1.3)).softmax(-1)) > 4, "the test sees a wrong temperature"


@pytest.mark.parametrize("temperature", [0.8, 1.5])
def test_whole_completions_come_from_the_policy_that_scores_them(temperature: float) -> None:
    """All completions of up to two of six tokens, for padded prompts, against their log-probabilities."""
    config = LlamaConfig(**tiny.GROUPED | {"vocab_size": 6, "initializer_range": 0.3})
    policy = causal_lm(tiny.model(config), tiny.tokenizer(), temperature)
    sampler = Generate(policy, 2, temperature)
    answers = [(EOS,), *((a, b) for a, b in itertools.product(range(6), repeat=2) if a != EOS)]
    for prompt, drawn in zip([(1, 3, 5, 4, 4), (0,)], drawn_from(sampler, [(1, 3, 5, 4, 4), (0,)], 6000), strict=True):
        with torch.no_grad():
            chances = policy.log_prob([TokenTrace(prompt, answer) for answer in answers])[:, 0].double().exp()
        counts = Counter(map(tuple, drawn))
        assert set(counts) <= set(answers)
        assert abs(surprise([counts[answer] for answer in answers], chances)) < 4


def drawn_from(sampler: Generate, prompts: list[tuple[int, ...]], group: int) -> list[list[list[int]]]:
    with torch.inference_mode():
        rows = sampler.draw(prompts, group, seed=5)
    return [rows[k * group : (k + 1) * group] for k in range(len(prompts))]


def test_the_sampled_log_prob_is_minus_the_entropy_at_its_own_temperature_only() -> None:
    """E log pi(y) = -H(pi) for y from pi, by the chain rule over two tokens; another temperature is far off."""
    config = LlamaConfig(**tiny.GROUPED | {"vocab_size": 6, "initializer_range": 0.4})
    model, temperature = tiny.model(config), 1.7
    drawn = drawn_from(Generate(causal_lm(model, tiny.tokenizer()), 2, temperature), [(1, 4)], 4000)[0]
    answers = [(EOS,), *((a, b) for a, b in itertools.product(range(6), repeat=2) if a != EOS)]
    with torch.no_grad():
        scored = causal_lm(model, tiny.tokenizer(), temperature)
        logp = scored.log_prob([TokenTrace((1, 4), tuple(row)) for row in drawn])[:, 0]
        chances = scored.log_prob([TokenTrace((1, 4), answer) for answer in answers])[:, 0].exp()
    entropy = -(chances * chances.log()).sum().item()
    stderr = float(logp.std()) / len(logp) ** 0.5
    assert -float(logp.mean()) == pytest.approx(entropy, abs=4 * stderr)


# -- greedy, padding, seeds -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "how"),
    [*((kind, "plain") for kind in KINDS), ("llama", "checkpointing"), ("gpt2", "checkpointing"), ("mistral", "lora")],
)
def test_greedy_is_that_of_transformers_for_padded_prompts_of_any_length(kind: str, how: str) -> None:
    lengths = (3, 11, 1)
    policy = tiny.policy(kind)
    if how == "lora":
        policy = with_lora(policy)
    expected = [generated(policy, policy.encode(prompt)) for prompt in tiny.prompts(*lengths)]
    if how == "checkpointing":
        policy = build_policy(policy.model, policy.tokenizer, RebelConfig(gradient_checkpointing=True))
    drawn = ids(completions(policy, lengths, 2, seed=0, temperature=0))
    assert drawn[::2] == expected and drawn[1::2] == expected
    assert len(set(expected)) > 1


def generated(policy: CausalLM, prompt: list[int]) -> tuple[int, ...]:
    given = torch.tensor([prompt])
    out = policy.model.generate(
        input_ids=given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=12
    )
    return tuple(out[0, len(prompt) :].tolist())


def test_a_trained_policy_can_be_sampled_and_trained_again() -> None:
    policy = tiny.policy()
    for _ in range(2):
        drawn = completions(policy, (2, 5), 2, seed=0)
        policy.model.zero_grad()
        policy.backward([c.trace for c in drawn], torch.ones_like, lambda loss: loss.backward())
        assert all(bool(weight.grad.abs().any()) for weight in policy.model.parameters())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_the_same_seed_gives_the_same_completions_and_another_one_others(kind: str) -> None:
    policy = tiny.policy(kind)
    first, again, other = (ids(completions(policy, (3, 7), 4, seed)) for seed in (7, 7, 8))
    assert first == again
    assert first != other
    assert len(set(first[:4])) > 1, "completions of one prompt differ"


def test_sampling_leaves_the_random_numbers_of_others_alone() -> None:
    policy, before = tiny.policy(), torch.get_rng_state()
    completions(policy, (3,), 2, seed=1)
    assert torch.equal(before, torch.get_rng_state())


# -- ends -----------------------------------------------------------------------------------------------------------


def ending(policy: CausalLM) -> CausalLM:
    """A policy that ends often, with either of two tokens."""
    return CausalLM(policy.scorer, policy.tokenizer, frozenset(range(2, 8)), {})


def test_the_end_is_kept_and_finished_says_whether_there_is_one() -> None:
    policy = ending(tiny.policy("gpt2"))
    drawn = completions(policy, (2, 9, 4), 32, seed=0, tokens=9)
    for completion in drawn:
        row = completion.trace.completion
        assert completion.finished == (row[-1] in policy.eos_ids)
        assert not set(row[:-1]) & policy.eos_ids
        assert completion.finished or len(row) == 9
    lengths = Counter(len(c.trace.completion) for c in drawn if c.finished)
    assert 9 in lengths, "some end on the very last token, and are finished"
    assert len(lengths) > 5 and any(not c.finished for c in drawn)


def test_the_prompt_of_a_trace_is_the_encoded_one() -> None:
    policy = tiny.policy()
    rollouts = list(Generate(policy, 3, 1.0)(tiny.prompts(2, 5), 3, 0))
    assert [r.prompt for r in rollouts] == tiny.prompts(2, 5)
    assert [c.trace.prompt for r in rollouts for c in r.completions] == [
        tuple(policy.encode(p)) for p in tiny.prompts(2, 5) for _ in range(3)
    ]
    assert isinstance(Generate(policy, 3, 1.0), Sampler)


# -- cost -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> Callable[[CausalLM], list[tuple[int, int]]]:
    """(rows, tokens of a row) of every forward pass of a policy from now on."""

    def watch(policy: CausalLM) -> list[tuple[int, int]]:
        seen: list[tuple[int, int]] = []
        policy.model.get_input_embeddings().register_forward_pre_hook(
            lambda module, given: seen.append(tuple(given[0].shape))
        )
        return seen

    return watch


def test_the_prompt_is_computed_once_for_its_group(fed: Callable) -> None:
    policy = tiny.policy()
    seen = fed(policy)
    completions(policy, (3, 8), 16, seed=0, tokens=4)
    assert seen[0] == (2, 8)
    assert all(tokens == 1 for _, tokens in seen[1:]) and len(seen) == 4  # the last token is not fed


def test_ended_completions_stop_costing(fed: Callable) -> None:
    policy = ending(tiny.policy("gpt2"))
    seen = fed(policy)
    drawn = completions(policy, (3, 8), 64, seed=0, tokens=30)
    alive = [sum(len(row) > position for row in ids(drawn)) for position in range(1, 31)]
    rows = [count for count, _ in seen[1:]]
    assert len(rows) == sum(count > 0 for count in alive[:29])
    for fed_now, living in zip(rows, alive, strict=False):
        assert living <= fed_now <= living / (1 - 0.125)
    assert rows[-1] < 30


def test_the_progress_bar_is_told_every_token() -> None:
    policy, told = ending(tiny.policy("gpt2")), []
    drawn = [
        completion
        for rollout in Generate(policy, 9, 1.0, drawn=told.append)(tiny.prompts(2, 5), 8, 0)
        for completion in rollout.completions
    ]
    assert sum(told) == sum(len(c.trace.completion) for c in drawn)
