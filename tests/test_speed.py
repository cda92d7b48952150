"""Nothing is computed that the mathematics does not need, memory stays where it is, and settings that spare are on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny import COMMON
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig

from rebel.checkpoint import Progress
from rebel.errors import RebelError
from rebel.learner import Learner, learner
from rebel.policies import scorer as module
from rebel.policies import trial
from rebel.policies.causal_lm import causal_lm
from rebel.policies.rows import Rows, Stretches
from rebel.policies.scorer import Scorer
from rebel.samplers.prefilled import Prefilled, RoomyLayer
from rebel.train import iterate

# -- forward passes ------------------------------------------------------------------------------------------------


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool, bool]]:
    """(traces, with gradient, adapter on) of every time that log-probabilities are computed."""
    seen: list[tuple[int, bool, bool]] = []

    def forward(self: Scorer, rows: Rows, *stretches: Stretches) -> Tensor:
        adapters = [m for m in self.model.modules() if isinstance(m, BaseTunerLayer)]
        seen.append((rows.traces, torch.is_grad_enabled(), not any(m.disable_adapters for m in adapters)))
        return usual(self, rows, *stretches)

    usual = Scorer.forward
    monkeypatch.setattr(Scorer, "forward", forward)
    return seen


def iterated(folder: Path, passes: list[tuple[int, bool, bool]], **settings: Any) -> None:
    """One iteration of 6 prompts x 4 completions, counted."""
    made = tiny.job(folder, **{"kl_per_iteration": None, "eta": 2.0, "track_kl": False, **settings})
    passes.clear()
    iterate(made.run, Progress())


def traces(passes: Sequence[tuple[int, bool, bool]], gradient: bool) -> int:
    return sum(count for count, with_gradient, _ in passes if with_gradient == gradient)


def test_the_only_step_of_an_iteration_needs_no_anchor_and_no_reference(tmp_path: Path, passes: list) -> None:
    iterated(tmp_path, passes, steps_per_iteration=1)
    assert traces(passes, gradient=True) == 24
    assert traces(passes, gradient=False) == 4, "the group that is measured after the step"


def test_of_several_steps_all_but_the_first_need_anchors(tmp_path: Path, passes: list) -> None:
    iterated(tmp_path, passes, steps_per_iteration=3)
    assert traces(passes, gradient=True) == 24
    assert traces(passes, gradient=False) == 16 + 4, "anchors of two minibatches, and a measured group"
    iterated(tmp_path, passes, steps_per_iteration=3, num_iterations=2)
    assert traces(passes, gradient=True) == 48
    assert traces(passes, gradient=False) == 16 + 8, "the second pass needs none"


def test_a_reference_is_one_more_pass_and_with_an_adapter_no_second_model(tmp_path: Path, passes: list) -> None:
    iterated(tmp_path, passes, steps_per_iteration=1, beta=0.1)
    assert traces(passes, gradient=False) == 24 + 4
    adapted = get_peft_model(tiny.small(), LoraConfig(r=2, target_modules="all-linear"))
    made = tiny.job(tmp_path, eta=2.0, kl_per_iteration=None, beta=0.1, steps_per_iteration=1, lm=adapted)
    before = len(list(made.recorder.learner.module.parameters()))
    passes.clear()
    iterate(made.run, Progress())
    assert sum(count for count, _, adapter in passes if not adapter) == 24, "by the same weights, the adapter off"
    assert len(list(made.recorder.learner.module.parameters())) == before


def test_only_groups_beyond_a_micro_batch_are_scored_before_they_are_regressed(tmp_path: Path, passes: list) -> None:
    iterated(tmp_path, passes, steps_per_iteration=1, tokens_per_micro_batch=24, max_prompt_length=8)
    split = traces(passes, gradient=False) - 4
    assert 0 < split <= 24 and traces(passes, gradient=True) == 24


# -- memory --------------------------------------------------------------------------------------------------------


def peak(action: Callable[[], Any]) -> int:
    """Most bytes that tensors made by the action take at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        action()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def update_of(
    group: int, completions: int, budget: int, vocabulary: int = 512, prompt: int = 24, length: int = 48
) -> Callable[[], Any]:
    """An optimiser step on so many completions, in groups with a prompt of 24 tokens."""
    shape = COMMON | {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "vocab_size": vocabulary}
    policy = causal_lm(tiny.model(LlamaConfig(**shape | {"max_position_embeddings": 256})), tiny.tokenizer())
    mover: Learner = learner(
        Accelerator(cpu=True),
        policy,
        lambda weights: torch.optim.SGD(weights, lr=1e-3),
        lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
        budget=budget,
    )
    groups = [
        [
            replace(tiny.trace(prompt, length, seed=99 * k + i), prompt=tiny.trace(prompt, 1, seed=k).prompt)
            for i in range(group)
        ]
        for k in range(completions // group)
    ]
    return lambda: mover.update(groups, lambda places, logp: torch.ones_like(logp))


def test_memory_does_not_grow_with_the_group() -> None:
    # of micro-batches that groups of each size fill to 94% and more
    peaks = [peak(update_of(group, 64, budget=1230)) for group in (2, 8, 64)]
    assert max(peaks) < 1.1 * min(peaks)
    assert peak(update_of(64, 64, budget=4 * 1230)) > 2 * max(peaks), "it is the micro-batch that it grows with"


def test_memory_does_not_grow_with_copies_of_a_long_prompt() -> None:
    peaks = [peak(update_of(group, 64, budget=830, prompt=192, length=16)) for group in (2, 64)]
    assert max(peaks) < 1.1 * min(peaks)


def test_memory_does_not_grow_with_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.CHUNK_ELEMENTS, "cpu", 2**20)
    # apart from the gradient of the output layer; that of the embedding comes when activations have gone
    peaks = [peak(update_of(8, 16, 4096, words)) - 4 * 64 * words for words in (4_000, 32_000)]
    assert max(peaks) < 1.1 * min(peaks)


def test_a_cache_is_claimed_once_and_written_in_place() -> None:
    policy = tiny.policy()
    with torch.inference_mode():
        batch = Prefilled.of(policy, [(5, 6, 7), (8, 9)], group_size=2, tokens=4)
        places = [layer.keys.data_ptr() for layer in batch.cache.layers]
        for _ in range(3):
            batch = batch.then(torch.tensor([9, 10, 11, 12]))
    assert all(isinstance(layer, RoomyLayer) for layer in batch.cache.layers)
    assert [layer.keys.data_ptr() for layer in batch.cache.layers] == places
    assert batch.cache.get_seq_length() == 3 + 3


# -- settings that are really on -------------------------------------------------------------------------------------


def test_mixed_precision_computes_in_bf16_and_keeps_weights_and_moments_in_fp32(tmp_path: Path) -> None:
    made = tiny.job(tmp_path, bf16=True)
    computed: list[torch.dtype] = []
    block = made.recorder.learner.policy.bare.causal.model.layers[0].mlp.gate_proj
    block.register_forward_hook(lambda layer, given, found: computed.append(found.dtype))
    iterate(made.run, Progress())
    assert set(computed) == {torch.bfloat16}
    optimizer = made.recorder.learner.optimizer
    assert {weight.dtype for weight in made.recorder.learner.weights} == {torch.float32}
    assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {torch.float32}


@pytest.mark.skipif("bitsandbytes" in sys.modules, reason="is about its absence")
def test_an_8_bit_optimiser_without_its_library_is_named(tmp_path: Path) -> None:
    with pytest.raises(RebelError, match=r"--optim adamw_bnb_8bit.*bitsandbytes.*pip install"):
        tiny.job(tmp_path, optim="adamw_bnb_8bit")


def test_an_8_bit_optimiser_keeps_its_moments_in_8_bits(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    lm = tiny.model(hidden_size=64, intermediate_size=256, vocab_size=1024)  # small tensors stay in fp32
    made = tiny.job(tmp_path, optim="adamw_bnb_8bit", lm=lm)
    iterate(made.run, Progress())
    states = [state["state1"].dtype for state in made.recorder.learner.optimizer.state.values()]
    assert torch.uint8 in states


# -- bad input -------------------------------------------------------------------------------------------------------


def test_a_micro_batch_too_small_for_one_completion_is_refused_before_any_work(tmp_path: Path, passes: list) -> None:
    with pytest.raises(
        RebelError, match=r"--tokens_per_micro_batch 20 is less .* \(22 = prompt and completion\); raise it"
    ):
        tiny.job(tmp_path, tokens_per_micro_batch=20)
    assert passes == [] or max(count for count, *_ in passes) <= 3, "nothing but the trial of the model"


def test_a_model_that_cannot_share_a_prompt_says_so_in_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "shares_prefix", lambda scorer: False)
    assert "a prompt anew for each completion (this model cannot share it)" in "\n".join(tiny.job(tmp_path).plan)
