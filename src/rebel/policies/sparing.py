"""Backward passes that keep less in memory: activations made again, or kept in the memory of the host."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from trl.models.activation_offloading import OffloadActivations

from rebel.policies.rows import attention_in, attention_of

Sparing = Callable[[nn.Module], AbstractContextManager[Any]]
"""What holds during the forward and backward pass of a model."""


def recomputable(model: nn.Module) -> list[nn.Module]:
    """The layers of a model that can be computed a second time in the backward pass."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """Within this context every layer keeps its input alone, and is computed again in the backward pass.

    transformers does so in training mode alone and takes the layers their cache away, with which the completions of a
    prompt go on from it.
    """
    layers = recomputable(model)
    for layer in layers:
        layer.forward = partial(computed_again, model, layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def computed_again(model: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What `forward` returns; nothing of how it came about is kept. A cache is each time as it was before, and so is
    the way in which attention is computed."""
    attention = attention_in(model)
    cache = next((given for given in (*args, *kwargs.values()) if isinstance(given, Cache)), None)
    before = [copy.copy(layer) for layer in cache.layers] if cache else []

    def again(*args: Any, **kwargs: Any) -> Any:
        if cache:
            cache.layers[:] = map(copy.copy, before)
        with attention_of(model, attention):
            return forward(*args, **kwargs)

    return checkpoint(again, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


@contextmanager
def offloading(model: nn.Module) -> Iterator[None]:
    """Within this context activations wait in the memory of the host for the backward pass. Needs an accelerator."""
    manager = OffloadActivations()
    manager.update_model_params(model)
    with manager:
        yield


@contextmanager
def all_of(ways: Sequence[Sparing], model: nn.Module) -> Iterator[None]:
    """All of these at once."""
    with ExitStack() as stack:
        for way in ways:
            stack.enter_context(way(model))
        yield
