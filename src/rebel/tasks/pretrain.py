"""A small Llama that learns worked examples by ordinary supervised learning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, get_linear_schedule_with_warmup

EOS = "<eos>"
IGNORED = -100


@dataclass(frozen=True, slots=True)
class Recipe:
    """Size of the model and how it is taught. The wide start (transformers' own is 0.02) halves the steps."""

    hidden_size: int = 96
    layers: int = 2
    heads: int = 4
    initializer_range: float = 0.05
    learning_rate: float = 4e-3
    warmup: int = 20
    weight_decay: float = 0.0
    batch: int = 256
    examples: int = 800 * 256
    memory: float = 0.95


@dataclass(frozen=True, slots=True)
class Lessons:
    """Worked examples as ids, and the next token to learn at each place (of the answers alone)."""

    ids: Int[Tensor, "N T"]
    targets: Int[Tensor, "N T"]

    def __len__(self) -> int:
        return len(self.ids)


def character_tokenizer(alphabet: str) -> PreTrainedTokenizerFast:
    """One token for each character of the alphabet, and the end of sequence."""
    vocabulary = {symbol: number for number, symbol in enumerate([EOS, *alphabet])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=EOS))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=EOS, pad_token=EOS)


def small_llama(tokenizer: PreTrainedTokenizerFast, recipe: Recipe, positions: int) -> LlamaForCausalLM:
    """An untrained model for the tokenizer's alphabet; its weights come from torch's random numbers."""
    end = tokenizer.get_vocab()[EOS]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=2 * recipe.hidden_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        max_position_embeddings=positions,
        initializer_range=recipe.initializer_range,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
    )
    return LlamaForCausalLM(config)


def lessons(tokenizer: PreTrainedTokenizerFast, examples: Sequence[tuple[str, str]]) -> Lessons:
    """Pairs of prompt and answer as rows of equal length; the prompts are read and not learnt."""
    end = tokenizer.get_vocab()[EOS]
    texts = list(dict.fromkeys(text for pair in examples for text in pair))
    known = dict(zip(texts, tokenizer(texts).input_ids, strict=True))
    pairs = [(known[prompt], [*known[answer], end]) for prompt, answer in examples]
    length = max(len(prompt) + len(answer) for prompt, answer in pairs)
    ids, targets = [], []
    for prompt, answer in pairs:
        rest = length - len(prompt) - len(answer)
        ids.append(prompt + answer + [end] * rest)
        targets.append([IGNORED] * (len(prompt) - 1) + answer + [IGNORED] * (rest + 1))
    return Lessons(torch.tensor(ids), torch.tensor(targets))


@torch.no_grad()
def greedy_accuracy(model: nn.Module, exam: Lessons) -> float:
    """Share of answers that greedy decoding gets right to the end: those whose every token is the likeliest."""
    likeliest = model(input_ids=exam.ids).logits.argmax(dim=-1)
    return float(((likeliest == exam.targets) | (exam.targets == IGNORED)).all(dim=1).float().mean())


def teach(model: LlamaForCausalLM, course: Lessons, recipe: Recipe) -> None:
    """One pass of supervised learning over the course; the model is left with the running average of its weights."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=recipe.weight_decay
    )
    schedule = get_linear_schedule_with_warmup(optimizer, recipe.warmup, len(course) // recipe.batch)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.memory))
    for rows in torch.arange(len(course)).split(recipe.batch):
        logits = model(input_ids=course.ids[rows], use_cache=False).logits
        cross_entropy(logits.flatten(0, 1), course.targets[rows].flatten(), ignore_index=IGNORED).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        average.update_parameters(model)
    model.load_state_dict(average.module.state_dict())


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write both as Hugging Face loads them."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
