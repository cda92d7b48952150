"""What accelerate puts around a module for distribution, taken off again."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

Wrapped = TypeVar("Wrapped", bound=nn.Module)


def unwrapped(module: nn.Module, kind: type[Wrapped]) -> Wrapped:
    """The module of this kind within what wraps it (DDP and the like), or the module itself where it is bare."""
    inner: Any = module
    while not isinstance(inner, kind):
        inner = inner.module
    return inner
