"""The module that computes log-probabilities of tokens, and never holds the logits of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from peft import PeftModel
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel
from trl.kernels import ChunkedLogProbFunction
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE

from rebel.policies.rows import WHOLE, Places, Rows, Stretches

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
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def shape(self) -> PreTrainedConfig:
        """The numbers of layers, of words and the like."""
        return self.causal.config.get_text_config()

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
        return max(1, most_logits(self.device) // self.shape.vocab_size)

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
        return getattr(self.shape, "final_logit_softcapping", None)


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


def divergence_of(before: Float[Tensor, "K V"], now: Float[Tensor, "K V"]) -> Float[Tensor, " K"]:
    """KL(now || before) of distributions given by their log-probabilities."""
    return (now.exp() * (now - before)).sum(dim=-1)
