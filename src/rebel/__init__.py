"""REBEL: reinforcement learning as least squares, for generative models tuned with rewards or preferences."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rebel.config import RebelConfig
    from rebel.errors import RebelError, RunStopped
    from rebel.trainer import RebelTrainer

HOMES = {
    "RebelConfig": "rebel.config",
    "RebelTrainer": "rebel.trainer",
    "RebelError": "rebel.errors",
    "RunStopped": "rebel.errors",
}
__all__ = ["RebelConfig", "RebelError", "RebelTrainer", "RunStopped"]


def __getattr__(name: str) -> Any:
    """Public names load when they are first used, so that `import rebel` costs nothing."""
    if name not in HOMES:
        raise AttributeError(f"module 'rebel' has no attribute {name!r}")
    return getattr(import_module(HOMES[name]), name)
