"""A causal language model as a policy: what it wrote, re-scored token by token at the sampling temperature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rebel.errors import RebelError
from rebel.policies.footprint import Footprint, footprint
from rebel.policies.layouts import Apart, Layout
from rebel.policies.rows import WHOLE, Rows, Stretches
from rebel.policies.scorer import Former, LanguageModel, Scorer, divergence_of, most_logits
from rebel.policies.sparing import Sparing
from rebel.policies.trial import check_head, leanest
from rebel.policies.wrapping import unwrapped
from rebel.types import Completion, Content, Prompt, TokenTrace


@dataclass(frozen=True)
class CausalLM:
    """A Hugging Face causal language model (full or with a peft adapter) and its tokenizer."""

    scorer: nn.Module
    tokenizer: PreTrainedTokenizerBase
    eos_ids: frozenset[int]
    chat_template_kwargs: dict
    layout: Layout = field(default_factory=Apart)
    """How traces go through the model."""
    footprint: Footprint = field(default_factory=Footprint)
    """What a backward pass keeps of what goes through the model."""
    sparing: Sparing = nullcontext
    """How a backward pass keeps less in memory."""
    stretches: Stretches = WHOLE
    """The segments of a completion."""

    @property
    def bare(self) -> Scorer:
        """The scorer without what wraps it for distribution."""
        return unwrapped(self.scorer, Scorer)

    @property
    def model(self) -> LanguageModel:
        return self.bare.model

    @property
    def device(self) -> torch.device:
        return self.bare.device

    def log_prob(self, traces: Sequence[TokenTrace]) -> Float[Tensor, "N S"]:
        """log pi of the segments of every trace in nats. Independent of the batch a trace is in."""
        return self.scorer(self.rows(traces), self.stretches)

    def rows(self, traces: Sequence[TokenTrace]) -> Rows:
        """The traces as tensors for the model."""
        return self.layout.rows(traces, self.device)

    def backward(
        self,
        traces: Sequence[TokenTrace],
        weigh: Callable[[Tensor], Tensor],
        backward: Callable[[Tensor], None],
    ) -> Float[Tensor, "N S"]:
        """Back-propagate sum(c * log_prob) with c = weigh(log_prob); returns the log-probabilities."""
        with self.sparing(self.model):
            logp = self.log_prob(traces)
            backward((weigh(logp.detach()) * logp).sum())
        return logp.detach()

    @torch.no_grad()
    def divergence(self, traces: Sequence[TokenTrace], before: Sequence[Tensor]) -> Float[Tensor, "N 1"]:
        """Sum over the written tokens of the KL between the next token's distribution now and `before`, in nats."""
        given = self.rows(traces)
        scorer, former = self.bare, Former(self.bare, before)
        row, _, hidden = scorer.places(given)
        hidden_then = former.part("places", given).hidden
        kl = torch.cat(
            [
                divergence_of(former.part("logits", h).log_softmax(-1), scorer.logits(g).log_softmax(-1))
                for g, h in zip(hidden.split(scorer.piece), hidden_then.split(scorer.piece), strict=True)
            ]
        )
        return kl.new_zeros(len(traces)).index_add(0, row, kl)[:, None]

    def cost(self, traces: Sequence[TokenTrace]) -> int:
        """Tokens that go through the model for these traces in one micro-batch.

        Copies of the keys and values of prompts, masks and logits count as the tokens that take as much memory.
        """
        return self.footprint.tokens(self.layout.load(traces))

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt: text as the tokenizer takes it, messages through the chat template."""
        if isinstance(prompt.content, str):
            ids = self.tokenizer(prompt.content, verbose=False).input_ids
            return ids[:-1] if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id else ids
        encoded: Any = self.tokenizer.apply_chat_template(
            prompt.content, add_generation_prompt=True, return_dict=True, **self.chat_template_kwargs
        )
        return list(encoded["input_ids"])

    def recorded(self, prompt: Prompt, prompt_ids: Sequence[int], content: Content) -> list[int]:
        """Token ids of a completion that was written elsewhere, up to and with its end of sequence.

        Text follows its prompt directly; it is tokenised together with it unless a token would span both. Messages go
        through the chat template behind the prompt; what the template writes after the end of sequence is no part.
        """
        if isinstance(content, str):
            return self.ended(self.following(str(prompt.content), prompt_ids, content))
        assert isinstance(prompt.content, list), "messages answer messages"
        encoded: Any = self.tokenizer.apply_chat_template(
            [*prompt.content, *content], return_dict=True, **self.chat_template_kwargs
        )
        ids = list(encoded["input_ids"])
        if ids[: len(prompt_ids)] != list(prompt_ids):
            raise RebelError(
                "the chat template renders the prompt differently once an answer follows it, so that the tokens of the "
                "answer are not known; use a template whose prompt with add_generation_prompt begins every conversation"
            )
        return self.ended(ids[len(prompt_ids) :])

    def following(self, prompt: str, prompt_ids: Sequence[int], text: str) -> list[int]:
        """Token ids of text behind a prompt of plain text."""
        both = self.tokenizer(prompt + text, verbose=False).input_ids
        if both[: len(prompt_ids)] == list(prompt_ids):
            return both[len(prompt_ids) :]
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def ended(self, ids: Sequence[int]) -> list[int]:
        """The ids with one end of sequence: what a template has behind it is cut off, a missing one is added."""
        last = max((k for k, i in enumerate(ids) if i in self.eos_ids), default=None)
        if last is not None and not str(self.tokenizer.decode(list(ids[last + 1 :]), skip_special_tokens=True)).strip():
            return list(ids[: last + 1])
        end: Any = self.tokenizer.eos_token_id
        return [*ids, min(self.eos_ids) if end is None else end]

    def completion(self, prompt: Prompt, prompt_ids: Sequence[int], ids: Sequence[int]) -> Completion[TokenTrace]:
        """What was drawn, with the ids as they were drawn; finished if it ends with one of the ends of sequence."""
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        assert isinstance(text, str), "one sequence of ids is one text"
        content: Content = text if isinstance(prompt.content, str) else [{"role": "assistant", "content": text}]
        trace = TokenTrace(tuple(prompt_ids), tuple(ids))
        return Completion(content, trace, finished=bool(ids) and ids[-1] in self.eos_ids)


def causal_lm(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    temperature: float = 1.0,
    chat_template_kwargs: dict | None = None,
    shared_prefix: bool = True,
) -> CausalLM:
    """A policy from a loaded model: evaluation mode, ends of sequence from generation config and tokenizer.

    `shared_prefix` computes a prompt once for its completions, if the model can.
    """
    eos = ends_of_sequence(model, tokenizer)
    disable_dropout(model.eval())
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    scorer = Scorer(model, temperature)
    check_head(scorer)
    layout = leanest(scorer, shared_prefix)
    return CausalLM(scorer, tokenizer, eos, chat_template_kwargs or {}, layout, footprint_of(scorer, layout))


def footprint_of(scorer: Scorer, layout: Layout, recomputed: bool = False) -> Footprint:
    """What a model keeps of a micro-batch in a layout."""
    masks = 1 if layout.one_mask or recomputed else scorer.shape.num_hidden_layers
    return footprint(scorer.shape, most_logits(scorer.device), recomputed, masks)


def ends_of_sequence(model: LanguageModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every id that ends a completion: the generation config's and the tokenizer's."""
    config = getattr(model, "generation_config", None)
    given = config.eos_token_id if config is not None else None
    ids: list[Any] = [*(given if isinstance(given, list | tuple) else [given]), tokenizer.eos_token_id]
    found = frozenset(i for i in ids if i is not None)
    if not found:
        raise RebelError(
            "the tokenizer has no EOS token, so no completion could ever end: "
            "set eos_token in its tokenizer_config.json"
        )
    return found


def disable_dropout(model: nn.Module) -> None:
    """Score and train without dropout, so that log pi_theta equals log pi_t at the anchor."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):  # the rates that some models apply without a module
                setattr(module, name, 0.0)
