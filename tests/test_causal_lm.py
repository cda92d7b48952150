"""A causal language model as a policy: log pi(y|x) is right, whatever the batch, the padding and the architecture."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import BOS, CONFIGS, EOS, PAD, SCALED, VOCABULARY
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import scaled_dot_product_attention
from transformers import GenerationConfig, PreTrainedConfig
from transformers.integrations import flex_attention
from transformers.integrations.sdpa_attention import repeat_kv
from trl.kernels import chunked_logprob

from rebel.build import model as build_model
from rebel.build.model import build_policy
from rebel.config import RebelConfig
from rebel.errors import RebelError
from rebel.policies import scorer as module
from rebel.policies import unpadded
from rebel.policies.causal_lm import CausalLM, causal_lm, footprint_of
from rebel.policies.footprint import Load, footprint
from rebel.policies.layouts import Apart, Flex, Layout, NoPadding, PromptOnce
from rebel.policies.packed import Packed
from rebel.policies.references import frozen_copy, initial_adapter, without_adapter
from rebel.policies.rows import Padded, SharedPrefix, padded
from rebel.policies.sparing import recomputable
from rebel.policies.trial import check_head, packs
from rebel.policies.unpadded import Unpadded
from rebel.types import LogProb, Policy, Prompt, TokenTrace

KINDS = list(CONFIGS)


def naive(policy: CausalLM, trace: TokenTrace) -> Tensor:
    """log pi(y|x) from all logits of this one sequence, token by token."""
    ids = trace.prompt + trace.completion
    logits = policy.model(torch.tensor([ids])).logits[0].double() / policy.bare.temperature
    logp = logits.log_softmax(dim=-1)
    start = len(trace.prompt)
    written = [start + k for k, own in enumerate(trace.written) if own]
    return sum((logp[place - 1, ids[place]] for place in written), torch.zeros((), dtype=torch.float64))


def in_double(kind: str | PreTrainedConfig, temperature: float = 1.0) -> CausalLM:
    return causal_lm(tiny.model(kind).double(), tiny.tokenizer(), temperature)


def with_lora(policy: CausalLM, seed: int = 0, dropout: float = 0.0) -> CausalLM:
    """The policy with an adapter that already does something."""
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=dropout)
    adapted = get_peft_model(copy.deepcopy(policy.model), lora)
    torch.manual_seed(seed)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight.data, std=0.1)
    return causal_lm(adapted, policy.tokenizer, policy.bare.temperature)


def train_a_little(policy: CausalLM, steps: int = 3) -> None:
    weights = [weight for weight in policy.model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=0.05)
    for _ in range(steps):
        policy.backward(tiny.traces(), torch.ones_like, lambda loss: loss.backward())
        optimizer.step()
        optimizer.zero_grad()


# -- the sum over the completion -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_log_prob_is_that_of_all_logits_and_independent_of_batch_padding_and_order(kind: str) -> None:
    for policy, tolerance in ((tiny.policy(kind, 0.7), 1e-5), (in_double(kind, 0.7), 1e-10)):
        traces = tiny.traces()
        alone = torch.stack([naive(policy, trace) for trace in traces])
        together = policy.log_prob(traces)
        assert together.shape == (len(traces), 1)
        turned = policy.log_prob(traces[::-1]).flip(0)
        single = torch.cat([policy.log_prob([trace]) for trace in traces])
        for logp in (together, turned, single):
            torch.testing.assert_close(logp[:, 0].double(), alone, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_probabilities_of_all_one_token_answers_sum_to_one(kind: str) -> None:
    policy = in_double(kind, 1.3)
    for prompt in ((5,), (4, EOS, PAD, 9)):
        answers = [TokenTrace(prompt, (token,)) for token in range(VOCABULARY)]
        other = [tiny.trace(3, 9)]  # padding does not take part
        assert policy.log_prob(answers + other)[:-1].exp().sum().item() == pytest.approx(1.0, abs=1e-10)


@torch.no_grad()
def test_probabilities_of_all_answers_of_up_to_two_tokens_sum_to_one() -> None:
    policy = in_double("llama", 0.6)
    answers = [(EOS,), *((a, b) for a in range(VOCABULARY) if a != EOS for b in range(VOCABULARY))]
    logp = policy.log_prob([TokenTrace((8, 9), answer) for answer in answers])
    assert logp.exp().sum().item() == pytest.approx(1.0, abs=1e-10)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "lora"])
@torch.no_grad()
def test_divergence_is_the_kl_of_all_answers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all one-token answers it is sum pi log(pi / pi_before); along a longer one, the sum over its prefixes."""
    policy = with_lora(in_double("llama", 0.7)) if kind == "lora" else in_double(kind, 0.7)
    trained = [weight for weight in policy.scorer.parameters() if weight.requires_grad]
    before = [weight.clone() for weight in trained]
    whole = tiny.trace(3, 5)
    steps = [TokenTrace(whole.prompt + whole.completion[:k], whole.completion[k : k + 1]) for k in range(5)]
    answers = [TokenTrace(step.prompt, (token,)) for step in steps for token in range(VOCABULARY)]
    then = policy.log_prob(answers).view(5, VOCABULARY)
    torch.manual_seed(3)
    for weight in trained:
        weight.add_(0.1 * torch.randn_like(weight))
    now = policy.log_prob(answers).view(5, VOCABULARY)
    expected = (now.exp() * (now - then)).sum(dim=1)
    assert expected.min() > 1e-4
    for size in (2**24, 3 * VOCABULARY):
        monkeypatch.setitem(module.CHUNK_ELEMENTS, "cpu", size)
        torch.testing.assert_close(policy.divergence(steps, before)[:, 0], expected, rtol=1e-8, atol=1e-10)
        both = policy.divergence([whole, tiny.trace(2, 9)], before)[0, 0]
        torch.testing.assert_close(both, expected.sum(), rtol=1e-8, atol=1e-10)
    assert policy.divergence([whole], trained).item() == 0.0
    torch.testing.assert_close(policy.log_prob(answers).view(5, VOCABULARY), now, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_temperature_divides_the_logits_and_not_the_log_probability() -> None:
    trace = [tiny.trace(4, 6)]
    cold, plain = (in_double("llama", t).log_prob(trace).item() for t in (0.5, 1.0))
    assert cold != pytest.approx(2 * plain, rel=1e-3)
    assert cold == pytest.approx(naive(in_double("llama", 0.5), trace[0]).item(), abs=1e-10)


@torch.no_grad()
def test_several_written_stretches_are_the_sum_of_their_tokens() -> None:
    policy = in_double("qwen3", 0.9)
    whole = tiny.trace(3, 9)
    masks = [
        (True, True, False, False, True, True, True, False, True),
        (False,) * 8 + (True,),
        (False,) * 9,
    ]
    traces = [TokenTrace(whole.prompt, whole.completion, mask) for mask in masks]
    expected = torch.stack([naive(policy, trace) for trace in traces])
    torch.testing.assert_close(policy.log_prob([*traces, whole])[:-1, 0], expected, rtol=1e-10, atol=1e-10)
    steps = [TokenTrace(whole.prompt + whole.completion[:k], whole.completion[k : k + 1]) for k in range(9)]
    each = policy.log_prob(steps)[:, 0]
    by_hand = torch.stack([each[torch.tensor(mask)].sum() for mask in masks])
    torch.testing.assert_close(expected, by_hand, rtol=1e-10, atol=1e-10)


def test_masks_come_from_lengths_and_never_from_token_values() -> None:
    traces = [TokenTrace((PAD, BOS), (PAD, EOS, PAD, 7, EOS)), TokenTrace((PAD,), (PAD,)), tiny.trace(4, 6)]
    ids, written = padded(traces, torch.device("cpu"))
    assert written.sum(dim=1).tolist() == [5, 1, 6]
    assert written.nonzero()[:5, 1].tolist() == [2, 3, 4, 5, 6]
    assert ids[0, :7].tolist() == [PAD, BOS, PAD, EOS, PAD, 7, EOS]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_special_tokens_inside_a_completion_count_like_any_other(kind: str) -> None:
    policy = in_double(kind)
    special = [TokenTrace((PAD, BOS, 8), (PAD, EOS, PAD, 7, EOS, EOS)), TokenTrace((EOS,), (PAD, PAD))]
    expected = torch.stack([naive(policy, trace) for trace in special])
    torch.testing.assert_close(policy.log_prob([*special, tiny.trace(1, 12)])[:-1, 0], expected)


# -- in chunks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "qwen3"])  # tied, softcapped and free output layers
def test_chunks_change_neither_values_nor_gradients(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for tokens in (10**6, 5):
        monkeypatch.setitem(module.CHUNK_ELEMENTS, "cpu", tokens * VOCABULARY)
        policy = in_double(kind, 0.8)
        heads: list[int] = []
        policy.model.get_output_embeddings().register_forward_hook(lambda m, i, o, seen=heads: seen.append(len(i[0])))
        logp = policy.backward(tiny.traces(), lambda logp: logp.cos(), lambda loss: loss.backward())
        results.append((logp, {n: p.grad for n, p in policy.model.named_parameters()}, heads))
    (logp, gradients, one), (chunked, chunked_gradients, many) = results
    assert len(one) == 1 and max(many) <= 5 and len(many) == 2 * -(-one[0] // 5)  # once more in the backward pass
    torch.testing.assert_close(chunked, logp, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(chunked_gradients, gradients, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "qwen3"])
@pytest.mark.parametrize("frozen", [False, True])
def test_tiles_of_the_vocabulary_are_as_good_as_whole_logits(
    kind: str, frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked_logprob, "TOKEN_CHUNK_SIZE", 7)
    monkeypatch.setattr(module, "TOKEN_CHUNK_SIZE", 7)
    results = []
    for elements in (10**6, 7 * 9):  # tiles of 9 of the 56 words
        monkeypatch.setitem(module.CHUNK_ELEMENTS, "cpu", elements)
        policy = tiny.policy(kind, 0.8)
        policy.bare.head.requires_grad_(not frozen)
        assert len(tiny.traces()) and policy.bare.piece == elements // VOCABULARY
        results.append(gradients(policy, tiny.traces()))
    torch.testing.assert_close(results[1], results[0], rtol=2e-5, atol=2e-5)


# -- a prompt shared by its completions ----------------------------------------------------------------------------


def families(seed: int = 0) -> list[TokenTrace]:
    """Completions of three prompts of different lengths, in mixed order; one of a single token, one with a gap."""
    prompts = [tiny.trace(length, 1, seed=seed + 50 + length).prompt for length in (9, 2, 5)]
    lengths = [(0, 4), (1, 7), (0, 1), (2, 6), (0, 9), (2, 3), (1, 1)]
    traces = [TokenTrace(prompts[k], tiny.trace(1, n, seed=seed + n).completion) for k, n in lengths]
    return [
        *traces,
        TokenTrace(prompts[0], traces[4].completion, (True, True, False, False, True, True, True, False, True)),
    ]


def gradients(policy: CausalLM, traces: list[TokenTrace]) -> tuple[Tensor, dict[str, Tensor]]:
    policy.model.zero_grad()
    # by weights that do not depend on log-probabilities, whose rounding they would pass on
    logp = policy.backward(traces, lambda logp: torch.arange(len(logp))[:, None].cos(), lambda loss: loss.backward())
    return logp, {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_a_shared_prompt_changes_neither_values_nor_gradients(kind: str) -> None:
    # in double too, transformers' norms and rotations are in fp32
    for policy, tolerance in ((tiny.policy(kind, 0.7), 1e-5), (in_double(kind, 0.7), 1e-6)):
        assert policy.layout.shares, "the architecture can go on from one pass over a prompt"
        policy = replace(policy, layout=PromptOnce())
        traces = families()
        assert isinstance(policy.rows(traces), SharedPrefix)
        logp, gradient = gradients(policy, traces)
        apart, expected = gradients(replace(policy, layout=Apart()), traces)
        torch.testing.assert_close(logp, apart, rtol=tolerance, atol=10 * tolerance)
        assert gradient.keys() == expected.keys()
        for name, value in expected.items():
            assert (gradient[name] - value).norm() <= tolerance * max(value.norm(), 1.0), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spare", [0.0, 0.25, 1.0])  # from a block for each length to one for all
def test_one_row_without_padding_changes_neither_values_nor_gradients(
    kind: str, spare: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpadded, "SPARE", spare)
    monkeypatch.setattr(unpadded, "CALL", 0)
    # those of `traces` have a prompt of their own each, and go through as whole rows; the block of a short completion
    # of a long prompt and a long one of a short prompt has padding that sees no key within its window
    long = [TokenTrace(tiny.trace(20, 1).prompt, tiny.trace(1, count, seed=count).completion) for count in (2, 3)]
    traces = [*long, *families(), *tiny.traces(), TokenTrace((5,), (7,)), tiny.trace(3, 5, mask=(False,) * 5)]
    for policy, tolerance in ((tiny.policy(kind, 0.7), 1e-5), (in_double(kind, 0.7), 1e-6)):
        assert isinstance(policy.layout, NoPadding), "it is what there is on a CPU"
        plain_rows = replace(policy, layout=Apart())
        assert isinstance(plain_rows.rows(traces), Padded)
        apart, expected = gradients(plain_rows, traces)
        for rows in (Apart(), PromptOnce()):
            one_row = replace(policy, layout=NoPadding(rows))
            assert isinstance(one_row.rows(traces), Unpadded)
            logp, gradient = gradients(one_row, traces)
            torch.testing.assert_close(logp, apart, rtol=tolerance, atol=2 * tolerance)
            assert gradient.keys() == expected.keys()
            for name, value in expected.items():
                assert (gradient[name] - value).norm() <= tolerance * max(value.norm(), 1.0), name
        assert policy.bare.causal.config._attn_implementation == "sdpa"


def test_no_padding_goes_through_the_model() -> None:
    policy = tiny.policy()
    seen: list[int] = []
    policy.bare.causal.get_input_embeddings().register_forward_hook(lambda m, i, o: seen.append(i[0].numel()))
    traces = families()
    prompts, completions = 9 + 2 + 5, sum(len(trace.completion) - 1 for trace in traces)
    policy.log_prob(traces)
    assert seen == [prompts + completions] == [policy.layout.load(traces).tokens]
    assert policy.layout.load(traces).copied == sum(len(trace.prompt) for trace in traces)
    apart = replace(policy, layout=NoPadding(Apart()))
    apart.log_prob(traces)
    assert seen[1] == sum(len(trace) - 1 for trace in traces) == apart.layout.load(traces).tokens


def test_stretches_are_of_like_length_and_have_every_token_once() -> None:
    lengths = (1, 2, 3, 30, 31, 60, 63, 64)
    traces = [TokenTrace((3, 4), tiny.trace(1, n + 1, seed=n).completion) for n in lengths]
    row = unpadded.unpadded(traces, torch.device("cpu"))
    assert [tuple(block.query.shape) for block in row.blocks] == [(1, 2), (4, 64), (2, 30), (2, 2)]
    assert [tuple(block.key.shape) for block in row.blocks] == [(1, 2), (4, 66), (2, 32), (2, 4)]
    outcomes = torch.cat([block.query.flatten() for block in row.blocks])
    assert outcomes[row.order].tolist() == list(range(row.ids.numel()))


def test_models_whose_attention_cannot_be_taken_apart_have_their_rows_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    eager = tiny.model()
    eager.set_attn_implementation("eager")
    assert causal_lm(eager, tiny.tokenizer()).layout == PromptOnce()
    chunked = tiny.model()
    chunked.config.layer_types = ["chunked_attention", "full_attention"]
    assert not isinstance(causal_lm(chunked, tiny.tokenizer()).layout, NoPadding)
    monkeypatch.setattr(unpadded.Block, "mask", lambda *_: None)
    assert tiny.policy().layout == PromptOnce(), "a prompt that is not seen is noticed"
    monkeypatch.setattr(unpadded.Block, "mask", lambda *_: 1 / 0)
    assert isinstance(tiny.policy().rows(families()), SharedPrefix)


def test_a_prompt_is_computed_anew_for_each_completion_if_that_is_asked_for() -> None:
    policy = build_policy(tiny.model(), tiny.tokenizer(), RebelConfig(shared_prefix=False))
    assert policy.layout == NoPadding(Apart())


def dense_attention(query: Tensor, key: Tensor, value: Tensor, **how: Any) -> Tensor:
    """What FlexAttention computes, which takes gradients on a GPU alone, with its mask written out."""
    places = torch.arange(query.shape[2])
    mask = how["block_mask"].mask_mod(None, None, places[:, None], places[None, :])
    key, value = (repeat_kv(states, query.shape[1] // key.shape[1]) for states in (key, value))
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=how["scale"])


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "qwen2", "qwen3"])
def test_packed_into_one_row_nothing_changes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex_attention.WrappedFlexAttention, "__call__", lambda self: dense_attention)
    policy = in_double(kind, 0.7)
    assert packs(policy.bare)
    traces = [*families(), TokenTrace(families()[1].prompt, tiny.trace(1, 3).completion, (False, False, False))]
    one_row = replace(policy, layout=Flex())
    assert isinstance(one_row.rows(traces), Packed)
    assert one_row.layout.load(traces).tokens == 16 + sum(len(trace.completion) for trace in traces), "no padding"
    logp, gradient = gradients(one_row, traces)
    apart, expected = gradients(replace(policy, layout=Apart()), traces)
    torch.testing.assert_close(logp, apart, rtol=1e-6, atol=1e-5)
    for name, value in expected.items():
        assert (gradient[name] - value).norm() <= 1e-6 * max(value.norm(), 1.0), name
    assert policy.bare.causal.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("kind", ["mistral", "gemma2", "gpt2"])
def test_windows_of_attention_and_models_that_take_no_blocks_are_not_packed(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flex_attention.WrappedFlexAttention, "__call__", lambda self: dense_attention)
    assert not packs(tiny.policy(kind).bare)


def test_flex_attention_without_a_gpu_is_refused() -> None:
    with pytest.raises(RebelError, match=r"--attn_implementation flex_attention packs .* takes a GPU"):
        build_policy(tiny.model(), tiny.tokenizer(), RebelConfig(attn_implementation="flex_attention"))


def test_a_shared_prompt_goes_through_the_model_once() -> None:
    policy = replace(tiny.policy(), layout=PromptOnce())
    seen: list[int] = []
    policy.bare.causal.get_input_embeddings().register_forward_hook(lambda m, i, o: seen.append(i[0].numel()))
    traces = [TokenTrace(tuple(range(10, 22)), (5, 6, 7 + k)) for k in range(8)]
    policy.log_prob(traces)
    assert seen == [12, 8 * 2], "the prompt, and all but the last token of every completion"
    assert policy.layout.load(traces) == Load(tokens=12 + 8 * 3, copied=8 * 12, pairs=8 * 3 * 15, written=8 * 3)
    assert policy.layout.load([tiny.trace(2, 9), tiny.trace(7, 3, seed=1)]).tokens == 22, (
        "nothing to share: padded rows"
    )


def test_divergence_does_not_depend_on_the_layout() -> None:
    policy = with_lora(in_double("llama", 0.7))
    before = [weight.detach().clone() for weight in policy.scorer.parameters() if weight.requires_grad]
    train_a_little(policy)
    apart = replace(policy, layout=Apart()).divergence(families(), before)
    assert apart.min() > 1e-4
    torch.testing.assert_close(policy.divergence(families(), before), apart, rtol=1e-8, atol=1e-10)


def test_a_model_that_cannot_share_a_prompt_computes_whole_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: SharedPrefix, *given: object) -> Tensor:
        return right(self._replace(real=torch.ones_like(self.real)), *given)

    right = SharedPrefix.after_prompts
    assert tiny.policy().layout == NoPadding(PromptOnce())
    monkeypatch.setattr(SharedPrefix, "after_prompts", wrong)
    assert tiny.policy().layout == NoPadding(Apart()), "padding that is attended to is noticed"
    monkeypatch.setattr(SharedPrefix, "after_prompts", lambda *_: 1 / 0)
    policy = tiny.policy()
    assert policy.layout == NoPadding(Apart())
    assert policy.layout.load(families()).copied == 0


# -- what models and tokenizers there are --------------------------------------------------------------------------


def test_it_is_a_policy_and_costs_tokens() -> None:
    policy = tiny.policy()
    assert isinstance(policy, Policy)
    kept = 2 * (10 * 16 + 4 * 32) + 6 * 16  # of a token: two layers and what is outside of them
    logits = 3 * VOCABULARY / kept
    assert policy.cost([tiny.trace(4, 6)]) == int(9 + 6 * logits)
    assert policy.cost([tiny.trace(4, 6), tiny.trace(2, 9)]) == int(19 + 15 * logits), "the last tokens are not read"
    rows = replace(policy, layout=PromptOnce(), footprint=footprint_of(policy.bare, PromptOnce()))
    assert rows.cost([tiny.trace(4, 6), tiny.trace(2, 9)]) == int(22 + 15 * logits), "two rows, padded to the longer"
    shared = [TokenTrace(tuple(range(10, 22)), (5, 6, 7 + k)) for k in range(8)]
    copies, pairs = 8 * 12 * 2 * 2 * 16 / kept, 8 * 2 * 14 / kept
    assert policy.cost(shared) == int(12 + 8 * 2 + copies + pairs + 24 * logits)
    assert rows.cost(shared) == int(12 + 8 * 3 + copies + 2 * 8 * 3 * 15 / kept + 24 * logits)


def test_what_a_large_vocabulary_takes_is_bounded() -> None:
    def shape(words: int) -> PreTrainedConfig:
        return tiny.model(vocab_size=words).config

    costs = [footprint(shape(words), most_logits=2**21).logits for words in (128, 256, 1024)]
    assert costs[1] == pytest.approx(2 * costs[0])
    assert costs[2] == costs[1], "2**21 logits of 8,192 tokens are 256 of each"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
@torch.no_grad()
def test_bf16_weights_give_fp32_log_probs(kind: str) -> None:
    policy = causal_lm(tiny.model(kind).bfloat16(), tiny.tokenizer(), 0.7)
    traces = tiny.traces()
    logp = policy.log_prob(traces)
    assert logp.dtype == torch.float32
    expected = torch.stack([naive(policy, trace) for trace in traces])
    torch.testing.assert_close(logp[:, 0].double(), expected, rtol=2e-2, atol=2e-2)
    sums = logp[:, 0]
    assert not torch.equal(sums, sums.bfloat16().float()), "sums rounded to bf16"


@pytest.mark.parametrize("kind", list(SCALED))
def test_a_model_that_scales_its_logits_in_its_own_way_is_refused(kind: str) -> None:
    with pytest.raises(RebelError, match="changes its logits after the output layer"):
        tiny.policy(SCALED[kind])


def test_a_small_scale_of_small_logits_is_refused_too() -> None:
    with pytest.raises(RebelError, match="GraniteForCausalLM"):
        tiny.policy(SCALED["granite"], initializer_range=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_models_as_they_are_pass_the_check(kind: str) -> None:
    for policy in (tiny.policy(kind), causal_lm(tiny.model(kind).bfloat16(), tiny.tokenizer(), 0.5)):
        check_head(policy.bare)


@pytest.mark.parametrize(
    ("tokenizer", "generation", "expected"),
    [
        ({"pad": "</s>"}, None, {EOS}),
        ({"pad": None}, None, {EOS}),
        ({}, [1, 2], {1, 2}),
        ({}, 9, {2, 9}),
        ({"eos": None}, [7], {7}),
    ],
)
def test_ends_of_sequence_and_padding(tokenizer: dict, generation: int | list[int] | None, expected: set[int]) -> None:
    model = tiny.model()
    model.generation_config = GenerationConfig(eos_token_id=generation)
    policy = causal_lm(model, tiny.tokenizer(**tokenizer))
    assert policy.eos_ids == expected
    for end in expected:
        assert policy.completion(Prompt("w1"), [8], [9, end]).finished
    assert not policy.completion(Prompt("w1"), [8], [EOS if EOS not in expected else 3, 11]).finished
    torch.testing.assert_close(
        policy.log_prob(tiny.traces()), tiny.policy().log_prob(tiny.traces()), rtol=1e-6, atol=1e-6
    )


def test_a_tokenizer_without_any_end_is_refused() -> None:
    model = tiny.model(eos_token_id=None)
    model.generation_config = GenerationConfig()
    with pytest.raises(RebelError, match="no EOS token"):
        causal_lm(model, tiny.tokenizer(eos=None))


def test_prompts_are_encoded_as_text_or_through_the_chat_template() -> None:
    policy = causal_lm(tiny.model(), tiny.tokenizer(chat=True))
    assert policy.encode(Prompt("w0 w1 nonsense")) == [7, 8, 3]
    assert policy.encode(Prompt("w0 </s>")) == [7], "an end of sequence that the tokenizer adds is no prompt"
    messages = [{"role": "user", "content": "w0 w1"}]
    assert policy.encode(Prompt(messages)) == [BOS, 4, 7, 8, BOS, 5]
    assert policy.completion(Prompt(messages), [BOS], [9, EOS]).content == [{"role": "assistant", "content": "w2"}]
    drawn = policy.completion(Prompt("w0"), [7], [9, EOS])
    assert drawn.content == "w2" and drawn.trace == TokenTrace((7,), (9, EOS))


# -- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "opt"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_is_off_also_where_gradients_are_taken(kind: str, checkpointing: bool) -> None:
    model = tiny.model(tiny.OPT if kind == "opt" else kind).train()
    policy = build_policy(model, tiny.tokenizer(), RebelConfig(gradient_checkpointing=checkpointing))
    plain = tiny.policy(tiny.OPT if kind == "opt" else kind).log_prob(tiny.traces()).detach()
    for _ in range(2):
        logp = policy.backward(tiny.traces(), torch.ones_like, lambda loss: loss.backward())
        torch.testing.assert_close(logp, plain, rtol=1e-6, atol=1e-6)
        policy.model.train()  # as a callback may do


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("layout", [Apart(), PromptOnce(), NoPadding(PromptOnce())], ids=str)
def test_gradient_checkpointing_recomputes_every_layer_and_changes_no_gradient(
    kind: str, lora: bool, layout: Layout
) -> None:
    found, calls, kept = [], [], []
    for checkpointing in (False, True):
        policy = in_double(kind)
        policy = with_lora(policy) if lora else policy
        policy = build_policy(
            policy.model,
            policy.tokenizer,
            RebelConfig(gradient_checkpointing=checkpointing),
        )
        policy = replace(policy, layout=layout)
        seen: list[int] = []
        layers = recomputable(policy.model)
        assert len(layers) == 2
        for layer in layers:
            layer.mlp.register_forward_pre_hook(lambda m, i, seen=seen: seen.append(1))
        sizes: list[int] = []
        with saved_tensors_hooks(
            lambda tensor, sizes=sizes: sizes.append(tensor.numel()) or tensor, lambda tensor: tensor
        ):
            found.append(gradients(policy, families()))
        calls.append(len(seen))
        kept.append(sum(sizes))
        assert not any(m.training or "forward" in vars(m) for m in policy.model.modules()), "as it was before"
    passes = 2 if layout == PromptOnce() else 1  # over the prompts, and over what follows them
    assert calls == [2 * passes, 4 * passes]
    assert kept[1] < 0.6 * kept[0], "little is kept"
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-10)


def test_a_model_without_layers_that_can_be_recomputed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_model, "recomputable", lambda model: [])
    with pytest.raises(RebelError, match="--gradient_checkpointing: LlamaForCausalLM has no layers"):
        build_policy(tiny.model(), tiny.tokenizer(), RebelConfig(gradient_checkpointing=True))


def test_offloading_without_a_gpu_is_refused() -> None:
    with pytest.raises(RebelError, match=r"--activation_offloading moves activations from a GPU .* leave it out"):
        build_policy(tiny.model(), tiny.tokenizer(), RebelConfig(activation_offloading=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offloaded_activations_change_no_gradient_and_leave_the_gpu() -> None:
    found, peaks = [], []
    for offload in (False, True):
        model = tiny.model("llama", hidden_size=256, intermediate_size=1024, num_hidden_layers=8).cuda()
        policy = build_policy(model, tiny.tokenizer(), RebelConfig(activation_offloading=offload))
        torch.cuda.reset_peak_memory_stats()
        found.append(gradients(policy, [tiny.trace(8, 50, seed=k) for k in range(64)]))
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < 0.8 * peaks[0]
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lora", [False, True])
def test_gradient_reaches_every_trained_parameter(kind: str, lora: bool) -> None:
    policy = with_lora(tiny.policy(kind)) if lora else tiny.policy(kind)
    policy.backward(tiny.traces(), lambda logp: logp.cos(), lambda loss: loss.backward())
    trained = {name: p.grad for name, p in policy.model.named_parameters() if p.requires_grad}
    assert trained and all(("lora_" in name) == lora for name in trained)
    assert [name for name, gradient in trained.items() if gradient is None or not gradient.abs().sum() > 0] == []


def test_backward_is_the_gradient_of_the_weighted_sum() -> None:
    policy, other = in_double("llama"), in_double("llama")
    given: list[Tensor] = []

    def weigh(logp: Tensor) -> Tensor:
        assert not logp.requires_grad
        given.append(logp)
        return logp.square()

    returned = policy.backward(tiny.traces(), weigh, lambda loss: loss.backward())
    logp = other.log_prob(tiny.traces())
    (logp.detach().square() * logp).sum().backward()
    torch.testing.assert_close(returned, given[0])
    assert not returned.requires_grad
    for own, expected in zip(policy.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(own.grad, expected.grad)


# -- references ------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["model", "base", "initial_adapter"])
def reference(request: pytest.FixtureRequest) -> Iterator[tuple[CausalLM, LogProb, Tensor]]:
    """A policy, a reference of it, and what the reference has to say for ever."""
    start = tiny.policy("llama", 0.8)
    if request.param == "model":
        yield start, frozen_copy(start), start.log_prob(tiny.traces()).detach()
        return
    adapted = with_lora(start, dropout=0.5)
    base = start.log_prob(tiny.traces()).detach()
    trained = adapted.log_prob(tiny.traces()).detach()
    assert (base - trained).abs().max() > 0.05
    if request.param == "base":
        yield adapted, without_adapter(adapted), base
    else:
        yield adapted, initial_adapter(adapted), trained


def test_the_reference_is_the_initial_policy_and_stays_where_it_is(reference: tuple[CausalLM, LogProb, Tensor]) -> None:
    policy, log_prob, expected = reference
    trained = [name for name, weight in policy.model.named_parameters() if weight.requires_grad]
    before = policy.log_prob(tiny.traces()).detach()
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(log_prob(tiny.traces()), expected, rtol=1e-6, atol=1e-6)
        assert [name for name, weight in policy.model.named_parameters() if weight.requires_grad] == trained
        train_a_little(policy)
    assert not any("reference" in name for name in trained)
    assert (policy.log_prob(tiny.traces()) - before).abs().max() > 0.1
    torch.testing.assert_close(log_prob(tiny.traces()).detach(), expected, rtol=1e-6, atol=1e-6)


def test_asking_the_reference_leaves_the_policy_as_it_is(reference: tuple[CausalLM, LogProb, Tensor]) -> None:
    policy, log_prob, _ = reference
    train_a_little(policy)
    before = policy.log_prob(tiny.traces()).detach()
    log_prob(tiny.traces())
    torch.testing.assert_close(policy.log_prob(tiny.traces()).detach(), before)
    if isinstance(policy.model, PeftModel):
        assert policy.model.active_adapter == "default"


def test_a_frozen_copy_needs_no_gradient_and_shares_nothing() -> None:
    policy = tiny.policy()
    log_prob = frozen_copy(policy)
    before = log_prob(tiny.traces())
    assert not before.requires_grad
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.zero_()
    torch.testing.assert_close(log_prob(tiny.traces()), before)
