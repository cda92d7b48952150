"""Rewards that read pictures and need no weights: how well a picture compresses.

They are ordinary reward functions: `images` has the pictures (PIL), in the order of `prompts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import Any

QUALITY = 95
KILOBYTE = 1000


def jpeg_incompressibility(images: Sequence[Any], **kwargs: Any) -> list[float]:
    """Size of each picture as a JPEG of quality 95, in kilobytes (DDPO, arXiv 2305.13301, section 5.1)."""
    return [jpeg_bytes(image) / KILOBYTE for image in images]


def jpeg_compressibility(images: Sequence[Any], **kwargs: Any) -> list[float]:
    """Minus that size: a reward that a picture without content maximises."""
    return [-size for size in jpeg_incompressibility(images)]


def jpeg_bytes(image: Any) -> int:
    """Bytes of the picture as a JPEG file. Pictures that JPEG has no mode for become RGB first."""
    buffer = BytesIO()
    (image if image.mode in ("L", "RGB", "CMYK") else image.convert("RGB")).save(buffer, "JPEG", quality=QUALITY)
    return len(buffer.getvalue())
