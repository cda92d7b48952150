"""Small random language models of several architectures, with tokenizers of whole words, made on the spot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from rebel.build.job import Job, build_job
from rebel.config import RebelConfig
from rebel.job import carry_out
from rebel.policies.causal_lm import CausalLM, causal_lm
from rebel.report import read_rows
from rebel.rewards.combine import Weighted
from rebel.rewards.functions import PerCompletion
from rebel.run_folder import checkpoint_to_resume, claim_folder
from rebel.types import Prompt, TokenTrace

PAD, BOS, EOS, UNK = range(4)
VOCABULARY = 56
TEMPLATE = (
    "{% for m in messages %}{{ '<s> ' + m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s> assistant' }}{% endif %}"
)

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,  # far from uniform, so that a wrong log-probability shows
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
GROUPED: dict[str, Any] = COMMON | {"intermediate_size": 32, "num_key_value_heads": 1}

CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**GROUPED),
    "gpt2": GPT2Config(**COMMON),  # its default has dropout
    "gpt_neox": GPTNeoXConfig(**COMMON, intermediate_size=32, hidden_dropout=0.3, attention_dropout=0.3),
    "qwen2": Qwen2Config(**GROUPED),
    "qwen3": Qwen3Config(**GROUPED, head_dim=8),
    "gemma2": Gemma2Config(
        **GROUPED, head_dim=8, sliding_window=5, final_logit_softcapping=3.0, attn_logit_softcapping=2.0
    ),
    "mistral": MistralConfig(**GROUPED, sliding_window=5, attention_dropout=0.3),
}
SCALED: dict[str, PreTrainedConfig] = {
    "cohere": CohereConfig(**GROUPED, logit_scale=0.25),
    "granite": GraniteConfig(**GROUPED, logits_scaling=4.0),
}
OPT = OPTConfig(
    **{k: v for k, v in COMMON.items() if k != "initializer_range"},
    init_std=0.4,
    ffn_dim=32,
    word_embed_proj_dim=16,
    dropout=0.3,
)


def model(kind: str | PreTrainedConfig = "llama", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model in evaluation mode; gradients of tied and of free output layers both occur among the kinds."""
    config = CONFIGS[kind] if isinstance(kind, str) else kind
    config = type(config)(**{**config.to_dict(), **changes})
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def tokenizer(chat: bool = False, pad: str | None = "<pad>", eos: str | None = "</s>") -> PreTrainedTokenizerFast:
    """Words by white space: four special tokens, the roles of a chat, and w0, w1, ..."""
    words = ["<pad>", "<s>", "</s>", "<unk>", "user", "assistant", "system"]
    words += [f"w{k}" for k in range(VOCABULARY - len(words))]
    inner = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    outer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token=eos, pad_token=pad, unk_token="<unk>"
    )
    outer.chat_template = TEMPLATE if chat else None
    return outer


def policy(kind: str | PreTrainedConfig = "llama", temperature: float = 1.0, **changes: Any) -> CausalLM:
    return causal_lm(model(kind, **changes), tokenizer(), temperature)


def trace(prompt: int, completion: int, seed: int = 0, mask: Sequence[bool] | None = None) -> TokenTrace:
    """Random ids, special ones among them."""
    source = torch.Generator().manual_seed(1000 + seed)
    ids = torch.randint(0, VOCABULARY, (prompt + completion,), generator=source).tolist()
    return TokenTrace(tuple(ids[:prompt]), tuple(ids[prompt:]), None if mask is None else tuple(mask))


def traces(seed: int = 0) -> list[TokenTrace]:
    """Prompts and completions of many lengths."""
    shapes = [(1, 1), (9, 1), (1, 9), (4, 6), (7, 3), (2, 12), (12, 2), (3, 3)]
    return [trace(*shape, seed=10 * seed + k) for k, shape in enumerate(shapes)]


def prompts(*lengths: int) -> list[Prompt]:
    """Plain text of these many words."""
    return [Prompt(" ".join(f"w{(3 * k + i) % 40}" for i in range(n)), {"row": k}) for k, n in enumerate(lengths)]


# -- whole runs ----------------------------------------------------------------------------------------------------

SETTINGS: dict[str, Any] = {
    "eta": 2.0,
    "num_generations": 4,
    "prompts_per_iteration": 6,
    "steps_per_iteration": 3,
    "num_iterations": 1,
    "max_completion_length": 6,
    "max_prompt_length": 16,
    "tokens_per_micro_batch": 128,
    "sampling_batch": 8,
    "iterations": 3,
    "learning_rate": 3e-3,
    "max_grad_norm": 1.0,
    "average": 0.0,
    "kl_per_iteration": 0.1,
    "eval_prompts": 3,
    "eval_steps": 3,
    "save_steps": 3,
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 1,
}


def evenness(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """The share of even tokens: a reward that differs between nearly any two completions."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def noted_evenness(completion_ids: list[list[int]], log_metric: Callable[..., None], **kwargs: Any) -> list[float]:
    """The same, and each value written down too."""
    values = evenness(completion_ids)
    for value in values:
        log_metric("even", value)
    return values


def longer(prompts: list[Any], first: list[str], second: list[str], **columns: Any) -> list[float]:
    """A judge: the longer text is better."""
    return [0.5 + 0.5 * ((len(a) > len(b)) - (len(a) < len(b))) for a, b in zip(first, second, strict=True)]


def small() -> PreTrainedModel:
    """The model of the runs, near enough to uniform that it can learn anything."""
    return model(initializer_range=0.1, num_hidden_layers=1)


def job(
    folder: Path, reward: Callable[..., Any] = evenness, lm: Any = None, callbacks: Any = (), **settings: Any
) -> Job:
    """A run of a random model in `folder`, ready to be carried out."""
    config = RebelConfig(**{**SETTINGS, "output_dir": str(folder), **settings})
    given = prompts(*[1 + k % 7 for k in range(20)])
    return build_job(
        config,
        lm or small(),
        tokenizer(),
        lambda notes: Weighted([PerCompletion(reward, notes=notes)]),
        (given[: -config.eval_prompts], given[-config.eval_prompts :]),
        callbacks,
    )


def trained(folder: Path, resume: bool = False, **settings: Any) -> Job:
    """The run in `folder`, carried out to its end or on from its last checkpoint."""
    made = job(folder, resume_from_checkpoint=resume, **settings)
    claim_folder(made.config, resume)
    carry_out(made, checkpoint_to_resume(made.config))
    return made


def weights(made: Job) -> list[torch.Tensor]:
    return [weight.detach().clone() for weight in made.recorder.learner.weights]


def rows(folder: Path) -> list[dict[str, Any]]:
    """What was measured, but for the times."""
    timed = ("seconds/", "tokens_per_second", "images_per_second")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in read_rows(folder / "metrics.jsonl")]


def mismatches(rows: Sequence[dict[str, Any]]) -> list[float]:
    """How far vLLM was from the trainer in each iteration and in each evaluation: a row has at least one of them."""
    names = ("sampler/mismatch", "eval/sampler/mismatch")
    of_rows = [[row[name] for name in names if name in row] for row in rows]
    assert of_rows and all(of_rows)
    return [value for values in of_rows for value in values]
