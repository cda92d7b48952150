"""What a backward pass keeps in memory of a micro-batch, told in tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

USUAL = 8192
"""Tokens in a micro-batch, if nobody says otherwise."""


class Load(NamedTuple):
    """What goes through the model: tokens, padding included; those of prompts whose keys and values are repeated for
    their completions; pairs of tokens for which attention is told what sees what; and tokens that the policy wrote."""

    tokens: int
    copied: int
    pairs: int
    written: int


class Footprint(NamedTuple):
    """Numbers kept for the keys and values of a copied token, a pair, and the logits of a written token, relative to
    those that all layers keep of a token."""

    copied: float = 0.0
    pair: float = 0.0
    logits: float = 0.0

    def tokens(self, load: Load) -> int:
        """As many tokens as keep as much in the layers alone."""
        kept = load.tokens + self.copied * load.copied + self.pair * load.pairs + self.logits * load.written
        return int(kept)  # rounded down: what is not shared costs no less together than apart


def kept_of_token(shape: Any) -> int:
    """About how many numbers a layer keeps of a token for the backward pass."""
    inner = getattr(shape, "intermediate_size", None) or 4 * shape.hidden_size
    return 10 * shape.hidden_size + 4 * inner


def footprint(shape: Any, most_logits: int, recomputed: bool = False, masks: int = 1) -> Footprint:
    """That of a model of this shape; `recomputed` if of a layer its input alone is kept. `masks` are made for a pair.

    Outside of the layers about six numbers of a token's width are kept, and of a logit three while the backward pass
    of the output layer goes on. Logits beyond `most_logits` are not held at once: what a large vocabulary takes is
    spread over the tokens of a usual micro-batch, so that costs add up.
    """
    width, layers = shape.hidden_size, shape.num_hidden_layers
    whole = layers * (2 * width if recomputed else kept_of_token(shape)) + 6 * width
    copied = 0.0 if recomputed else 2 * layers * width / whole  # copies are made again, too
    logits = min(shape.vocab_size, most_logits / USUAL)
    return Footprint(copied, masks / whole, 3 * logits / whole)
