"""vLLM in this process, on the device of the trainer."""

from __future__ import annotations

import copy
import importlib
import os
import random
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from rebel.errors import RebelError
from rebel.policies.causal_lm import CausalLM
from rebel.samplers.vllm import check_version, installed

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, whose tensors it takes as they are
    "VLLM_NO_USAGE_STATS": "1",  # nothing phones home
}
DEFAULTS = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the cores are the trainer's too
}


@dataclass
class Colocated:
    """An engine of this process. Where it `sleeps` between phases its memory is free for the training."""

    llm: Any
    parameters: Callable[..., Any]
    sleeps: bool
    asleep: bool = False

    def draw(self, prompts: Sequence[Sequence[int]], parameters: Sequence[Mapping[str, Any]]) -> list[list[list[int]]]:
        self.wake()
        asked = [self.parameters(**own, detokenize=False) for own in parameters]
        found = self.llm.generate(as_ids(prompts), asked, use_tqdm=False)
        return [[list(completion.token_ids) for completion in request.outputs] for request in found]

    def token_logp(self, ids: Sequence[int]) -> list[float]:
        self.wake()
        asked = self.parameters(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        (found,) = self.llm.generate(as_ids([ids]), asked, use_tqdm=False)
        return [known[token].logprob for token, known in zip(ids[1:], found.prompt_logprobs[1:], strict=True)]

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.wake()
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        self.llm.reset_prefix_cache()  # keys and values of prompts by the former weights

    def rest(self) -> None:
        if self.sleeps and not self.asleep:
            self.llm.sleep(level=1)
            self.asleep = True

    def wake(self) -> None:
        if self.asleep:
            self.llm.wake_up()
            self.asleep = False


def as_ids(prompts: Sequence[Sequence[int]]) -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": list(ids)} for ids in prompts]


def colocated(
    policy: CausalLM, longest: int, dtype: torch.dtype, memory: float, sleeps: bool, trust_remote_code: bool = False
) -> Colocated:
    """An engine for sequences of up to `longest` tokens of this policy, in `memory`, a share of the device's.

    It begins with random weights: what it draws from is sent. Raises RebelError where vLLM is missing, of an untested
    version, or cannot take the model.
    """
    check_version(installed(), "in this environment")
    os.environ.update(ENVIRONMENT)
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    cuda = policy.device.type == "cuda"
    with tempfile.TemporaryDirectory() as folder, as_it_was(), in_our_words():
        vllm: Any = importlib.import_module("vllm")  # only here, since it may be missing and takes seconds
        config_of(policy).save_pretrained(folder)
        llm = vllm.LLM(
            model=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            generation_config="vllm",  # the model's own may truncate
            dtype=str(dtype).removeprefix("torch."),
            max_model_len=longest,
            gpu_memory_utilization=memory,
            enable_sleep_mode=sleeps and cuda,
            enforce_eager=not cuda,
            disable_log_stats=True,
            trust_remote_code=trust_remote_code,
        )
        engine = Colocated(llm, vllm.SamplingParams, sleeps and cuda)
        engine.token_logp((0, 1))  # what it cannot compute, it may not find out before
    engine.rest()
    return engine


def config_of(policy: CausalLM) -> Any:
    """The configuration of the policy's model, with the name by which vLLM knows its architecture."""
    config = copy.deepcopy(policy.bare.causal.config)
    config.architectures = [type(policy.bare.causal).__name__]
    return config


@contextmanager
def as_it_was() -> Iterator[None]:
    """vLLM seeds the generators of its process; afterwards they are as before. Its warnings are its own business."""
    python, arrays = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(), warnings.catch_warnings(action="ignore"):
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(arrays)


REASONS = {
    r"head.?(size|dim)": "vLLM cannot compute heads of this model's size; use --sampler generate",
    r"kv.?cache|cache blocks|free memory on device": "there is no room for the keys and values of --max_prompt_length "
    "and --max_completion_length; change --vllm_gpu_memory_utilization (without a GPU: the environment variable "
    "VLLM_CPU_KVCACHE_SPACE, in GiB), or lower a length",
}
"""What to do, by what vLLM's error speaks of."""


@contextmanager
def in_our_words() -> Iterator[None]:
    """Whatever keeps vLLM from starting, as one line with what to set."""
    try:
        yield
    except Exception as error:  # of any kind: memory, architecture, libraries
        text = " ".join(str(error).split()) or type(error).__name__
        advice = next((say for what, say in REASONS.items() if re.search(what, text, re.IGNORECASE)), None)
        raise RebelError(
            f"--sampler vllm: vLLM does not start with this model: {advice or 'use --sampler generate'}. It says: "
            f"{text[:400]}"
        ) from error
