"""A causal language model as a policy: what it wrote, re-scored token by token at the sampling temperature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from peft import PeftModel
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.kernels import ChunkedLogProbFunction
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE

from rebel.errors import RebelError
from rebel.policies.footprint import (
    Footprint,
    Load,
    footprint,
    load_apart,
    load_packed,
    load_shared,
    load_unpadded,
    saves,
)
from rebel.policies.rows import (
    WHOLE,
    Padded,
    Places,
    Rows,
    Stretches,
    full_attention,
    packed,
    padded,
    rows,
    shared_prefix,
    shares,
)
from rebel.policies.sparing import Sparing
from rebel.policies.unpadded import separable, unpadded
from rebel.policies.wrapping import unwrapped
from rebel.types import Completion, Content, Prompt, TokenTrace

LanguageModel = PreTrainedModel | PeftModel
"""As transformers loads it, or with an adapter around it."""

CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**26}
"""Most logits held at once, whatever the vocabulary: 64 and 256 MiB in fp32.

On a GPU every piece reads the whole output layer again.
"""


def most_logits(device: torch.device) -> int:
    """How many logits are held at once on such a device."""
    return CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["cpu"])


class Scorer(nn.Module):
    """The module whose forward is log_prob, so that the hooks of DDP and FSDP fire for it."""

    def __init__(self, model: LanguageModel, temperature: float) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature

    @property
    def causal(self) -> PreTrainedModel:
        if not isinstance(self.model, PeftModel):
            return self.model
        base: Any = self.model.get_base_model()  # which peft calls a Module
        return base

    def forward(self, rows: Rows, stretches: Stretches = WHOLE) -> Float[Tensor, "N S"]:
        """Sum over the tokens that the policy wrote of log pi(token | what stands before it), in nats and >= fp32.

        One column for each stretch of a completion.
        """
        trace, targets, hidden = self.places(rows)
        logp = self.chunked_logp(hidden, targets)
        segment = trace * stretches.count + stretches.of(trace)
        return logp.new_zeros(rows.traces * stretches.count).index_add(0, segment, logp).view(rows.traces, -1)

    def places(self, rows: Rows) -> Places:
        """Every token that the policy wrote, with the hidden state that predicts it."""
        return rows.places(self.causal)

    def chunked_logp(self, hidden: Float[Tensor, "K H"], targets: Int[Tensor, " K"]) -> Float[Tensor, " K"]:
        """log pi of each target: logits of one piece at a time, made again in the backward pass."""
        if len(hidden) <= self.piece:  # one piece: holding it costs no more than the bound
            return self.token_logp(hidden, targets)
        if type(self.head) is nn.Linear and hidden.dtype != torch.float64:  # TRL's pieces are in fp32
            return self.tiled_logp(hidden, targets)
        pieces = zip(hidden.split(self.piece), targets.split(self.piece), strict=True)
        return torch.cat([checkpoint(self.token_logp, h, y, use_reentrant=False) for h, y in pieces])

    def tiled_logp(self, hidden: Float[Tensor, "K H"], targets: Int[Tensor, " K"]) -> Float[Tensor, " K"]:
        """The same in tiles of tokens and vocabulary, by TRL: in Triton on a GPU. The gradient is summed in place."""
        tile = max(1, most_logits(hidden.device) // TOKEN_CHUNK_SIZE)
        weight, bias = self.head.weight, self.head.bias
        given = (hidden, weight, bias, targets, self.temperature, tile, self.softcap, 1.0, ())
        found: Any = ChunkedLogProbFunction.apply(*given)
        return found[0]

    @property
    def piece(self) -> int:
        """How many tokens' logits are held at once."""
        return max(1, most_logits(self.causal.device) // self.causal.config.get_text_config().vocab_size)

    def token_logp(self, hidden: Float[Tensor, "K H"], targets: Int[Tensor, " K"]) -> Float[Tensor, " K"]:
        """log pi of each target, in nats."""
        return -cross_entropy(self.logits(hidden), targets, reduction="none")

    def logits(self, hidden: Float[Tensor, "K H"]) -> Float[Tensor, "K V"]:
        """Logits at the sampling temperature, in at least fp32."""
        logits = self.head(hidden)
        logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits if self.temperature == 1 else logits / self.temperature

    @property
    def head(self) -> nn.Module:
        """The output layer."""
        head = self.causal.get_output_embeddings()
        assert head is not None, "a causal language model has an output layer"
        return head

    @property
    def softcap(self) -> float | None:
        """The bound that some models put on their logits."""
        return getattr(self.causal.config.get_text_config(), "final_logit_softcapping", None)


class Former(nn.Module):
    """A scorer as it was: its parts, computed with former values of the parameters that are trained."""

    def __init__(self, scorer: Scorer, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.scorer = scorer
        trained = [name for name, weight in self.named_parameters() if weight.requires_grad]
        self.weights = dict(zip(trained, weights, strict=True))

    def forward(self, part: str, given: Rows | Tensor) -> Any:
        return getattr(self.scorer, part)(given)

    def part(self, name: str, given: Rows | Tensor) -> Any:
        """What the scorer's method of this name returned then."""
        return functional_call(self, self.weights, (name, given))


@dataclass(frozen=True)
class CausalLM:
    """A Hugging Face causal language model (full or with a peft adapter) and its tokenizer."""

    scorer: nn.Module
    tokenizer: PreTrainedTokenizerBase
    eos_ids: frozenset[int]
    chat_template_kwargs: dict
    shared_prefix: bool = False
    """Whether a prompt goes through the model once for all its completions in a micro-batch."""
    packed: bool = False
    """Whether it does so in one row without padding, by FlexAttention."""
    unpadded: bool = False
    """Whether tokens go through the model in one row where much would be padding, and attention block by block."""
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
        return next(self.model.parameters()).device

    def log_prob(self, traces: Sequence[TokenTrace]) -> Float[Tensor, "N S"]:
        """log pi of the segments of every trace in nats. Independent of the batch a trace is in."""
        return self.scorer(self.rows(traces), self.stretches)

    def rows(self, traces: Sequence[TokenTrace]) -> Rows:
        """The traces as tensors for the model."""
        prompted = all(trace.prompt for trace in traces)
        if self.packed and prompted:
            return packed(traces, self.device)
        if self.unpadded and prompted and saves(traces, self.shared_prefix):
            return unpadded(traces, self.device, self.shared_prefix)
        return rows(traces, self.device, self.shared_prefix)

    def load(self, traces: Sequence[TokenTrace]) -> Load:
        """What of them goes through the model."""
        if self.packed:
            return load_packed(traces)
        if self.unpadded:
            return load_unpadded(traces, self.shared_prefix)
        return load_shared(traces) if self.shared_prefix and shares(traces) else load_apart(traces)

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
        return self.footprint.tokens(self.load(traces))

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
        both = self.tokenizer(prompt + text).input_ids
        if both[: len(prompt_ids)] == list(prompt_ids):
            return both[len(prompt_ids) :]
        return self.tokenizer(text, add_special_tokens=False).input_ids

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


def divergence_of(before: Float[Tensor, "K V"], now: Float[Tensor, "K V"]) -> Float[Tensor, " K"]:
    """KL(now || before) of distributions given by their log-probabilities."""
    return (now.exp() * (now - before)).sum(dim=-1)


def causal_lm(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    temperature: float = 1.0,
    chat_template_kwargs: dict | None = None,
) -> CausalLM:
    """A policy from a loaded model: evaluation mode, ends of sequence from generation config and tokenizer."""
    eos = ends_of_sequence(model, tokenizer)
    disable_dropout(model.eval())
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    policy = CausalLM(Scorer(model, temperature), tokenizer, eos, chat_template_kwargs or {})
    check_head(policy)
    policy = replace(policy, shared_prefix=shares_prefix(policy), unpadded=needs_no_padding(policy))
    return replace(policy, footprint=footprint_of(policy))


def footprint_of(policy: CausalLM, recomputed: bool = False) -> Footprint:
    """What its layout and its model keep of a micro-batch."""
    shape = policy.bare.causal.config.get_text_config()
    masks = 1 if policy.unpadded or recomputed else shape.num_hidden_layers  # behind a cache every layer makes its own
    return footprint(shape, most_logits(policy.device), recomputed, masks)


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


@torch.no_grad()
def check_head(policy: CausalLM) -> None:
    """Refuse a model whose logits are not its output embedding of its last hidden state."""
    scorer, model = policy.bare, policy.model
    ids = probe_ids(policy, 8)
    logits = (model(input_ids=ids, use_cache=False).logits[0, :-1].float() / scorer.temperature).log_softmax(-1)
    expected = logits.gather(-1, ids[0, 1:, None]).sum()
    found = scorer(Padded(ids, torch.ones_like(ids, dtype=torch.bool))).float().sum()
    if not torch.allclose(found, expected, rtol=closeness(policy), atol=closeness(policy)):
        raise RebelError(
            f"{type(scorer.causal).__name__} changes its logits after the output layer in a way that rebel does not "
            "know (it knows final_logit_softcapping): its log-probabilities would be wrong"
        )


def shares_prefix(policy: CausalLM) -> bool:
    """Whether completions can go on from one pass over their prompt: tried, with prompts of two lengths.

    Models that keep no keys and values, or that take no positions, fail in ways of their own.
    """
    return agrees(policy, shared_prefix)


def needs_no_padding(policy: CausalLM) -> bool:
    """Whether attention can be computed block by block: tried in the same way. On a GPU it has no figures yet."""
    return policy.device.type == "cpu" and separable(policy.bare.causal) and agrees(policy, unpadded)


def packs(policy: CausalLM) -> bool:
    """Whether FlexAttention computes everything in one row: tried in the same way."""
    return full_attention(policy.bare.causal) and agrees(policy, packed)


@torch.no_grad()
def agrees(policy: CausalLM, layout: Callable[[Sequence[TokenTrace], torch.device], Rows]) -> bool:
    """Whether the hidden states of a layout, which every mistake in a mask or a position moves, are those of rows."""
    ids = tuple(probe_ids(policy, 12)[0].tolist())
    traces = [TokenTrace(ids[:6], ids[6:9]), TokenTrace(ids[:6], ids[7:12]), TokenTrace(ids[1:4], ids[4:8])]
    apart = policy.bare.places(padded(traces, policy.device)).hidden.float()
    try:
        found = policy.bare.places(layout(traces, policy.device)).hidden.float()
    except Exception:  # whatever a model raises that was not made for it
        return False
    # by norms: in half precision single numbers differ between two kernels, while a mistake turns the whole state
    away = (found - apart).norm(dim=-1) / apart.norm(dim=-1)
    return bool((away < (0.1 if in_half(policy) else 1e-3)).all())


def probe_ids(policy: CausalLM, count: int) -> Int[Tensor, "1 T"]:
    """Some ids of the model's vocabulary."""
    return (
        torch.arange(2, 2 + count, device=policy.device)[None] % policy.bare.causal.config.get_text_config().vocab_size
    )


def closeness(policy: CausalLM) -> float:
    """By how much two ways to the same log-probabilities may differ in the precision of the weights."""
    return 1e-2 if in_half(policy) else 1e-3


def in_half(policy: CausalLM) -> bool:
    """Whether the weights have 16 bits."""
    return next(policy.model.parameters()).dtype in (torch.bfloat16, torch.float16)
