"""Pictures of the first and of the last evaluation of a run, as a page can hold them in itself.

A row names a file of the run's own folder of images. Nothing else is read, and only PNG gets into the page.
"""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rebel.report.words import finite

Row = Mapping[str, Any]

NAME = re.compile(r"images/([\w-]+\.png)")
SIGNATURE = b"\x89PNG\r\n\x1a\n"
MOST_PICTURES = 40
LARGEST_FILE = 8 * 2**20
SMALL = 96
"""Pictures up to this width are shown with their pixels as squares, and close together."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture as a data URI, what was asked for and its reward."""

    uri: str
    width: int
    prompt: str
    reward: float | None


@dataclass(frozen=True, slots=True)
class Gallery:
    """The pictures after one iteration."""

    iteration: float
    pictures: tuple[Picture, ...]

    @property
    def title(self) -> str:
        return "before training" if self.iteration == 0 else f"after iteration {self.iteration:.0f}"

    @property
    def small(self) -> bool:
        return all(picture.width <= SMALL for picture in self.pictures)


def galleries(samples: Sequence[Row], folder: Path) -> list[Gallery]:
    """Those of the first evaluation and of the last, each picture in its place; none where a run draws none."""
    rows = [row for row in samples if isinstance(row.get("image"), str)]
    iterations = sorted({at for row in rows if (at := finite(row.get("iteration"))) is not None})
    shown = dict.fromkeys(iterations[:1] + iterations[-1:])
    found = [Gallery(at, tuple(_of(rows, at, folder))) for at in shown]
    return [gallery for gallery in found if gallery.pictures]


def _of(rows: Sequence[Row], iteration: float, folder: Path) -> list[Picture]:
    own = [row for row in rows if finite(row.get("iteration")) == iteration][:MOST_PICTURES]
    found = [(row, png(folder, str(row["image"]))) for row in own]
    return [
        Picture(_uri(data), _width(data), str(row.get("prompt", "")), finite(row.get("reward")))
        for row, data in found
        if data is not None
    ]


def png(folder: Path, name: str) -> bytes | None:
    """The file of that name in the run's images, the small copy of it if there is one; None for anything else."""
    named = NAME.fullmatch(name)
    if named is None:
        return None
    for path in (folder / "images" / "small" / named[1], folder / "images" / named[1]):
        if path.is_file() and not path.is_symlink() and path.stat().st_size <= LARGEST_FILE:
            data = path.read_bytes()
            return data if data.startswith(SIGNATURE) and len(data) > 24 else None
    return None


def _uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def _width(data: bytes) -> int:
    """From the header, which begins every PNG file."""
    return struct.unpack(">I", data[16:20])[0]
