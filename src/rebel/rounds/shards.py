"""Arrow files that are whole or not there: each appears under its name with its last byte, and knows its checksum.

A file is an Arrow stream, as `datasets.Dataset.from_file` reads it, and a trailer behind its end: the checksum of all
before it, and of which file (or description) it was made. Readers of Arrow stop before the trailer.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Literal

import pyarrow as pa

from rebel.errors import RunStopped

MARK = b"rebel-shard:"
DIGITS = 32
TRAILER = len(MARK) + 2 * DIGITS
BLOCK = 2**20

State = Literal["whole", "missing", "half-written", "damaged", "of others"]


@dataclass(frozen=True, slots=True)
class Shards:
    """The files 00000.arrow, 00001.arrow, ... of a folder."""

    folder: Path

    def path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.arrow"

    def partial(self, number: int) -> Path:
        """Where a file is while it is written."""
        return self.folder / f".{number:05d}.arrow.partial"

    def table(self, number: int) -> pa.Table:
        """The rows of a file, mapped into memory: only what is looked at is read."""
        path = self.path(number)
        return opened(path, path.stat().st_mtime_ns)

    def checksum(self, number: int) -> str:
        """What its trailer says; "" where there is none."""
        return trailer(self.path(number))[0]

    def write(self, number: int, table: pa.Table, of: str) -> None:
        """Write a file; its name appears once all of it is on disk."""
        try:
            self.write_whole(number, table, of)
        except OSError as error:
            raise RunStopped(
                f"{self.path(number)} cannot be written: {error.strerror or error}. The files before it are complete"
            ) from error

    def write_whole(self, number: int, table: pa.Table, of: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.partial(number)
        with open(partial, "w+b") as file:
            with pa.ipc.new_stream(file, table.schema) as stream:
                stream.write_table(table)
            file.seek(0)
            checksum = checksum_of(file, of)
            file.seek(0, os.SEEK_END)
            file.write(MARK + checksum.encode() + of.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.path(number))
        sync(self.folder)

    def state(self, number: int, of: str) -> State:
        """Whether a file is there, whole, and made of what it should be; reads all of it."""
        path = self.path(number)
        if not path.exists():
            return "half-written" if self.partial(number).exists() else "missing"
        checksum, made_of = trailer(path)
        with open(path, "rb") as file:
            if not checksum or checksum_of(file, made_of, path.stat().st_size - TRAILER) != checksum:
                return "damaged"
        return "whole" if made_of == of else "of others"

    def states(self, count: int, of: Callable[[int], str]) -> dict[int, State]:
        """The files among the first `count` that have to be made, with what is wrong with them."""
        found: dict[int, State] = {number: self.state(number, of(number)) for number in range(count)}
        return {number: state for number, state in found.items() if state != "whole"}


def digest(text: str) -> str:
    """A fingerprint of this text."""
    return blake2b(text.encode(), digest_size=DIGITS // 2).hexdigest()


def checksum_of(file, of: str, size: int | None = None) -> str:
    """The checksum of the next `size` bytes of an open file (unset: of all that follow) and of `of`."""
    found = blake2b(of.encode(), digest_size=DIGITS // 2)
    left = size if size is not None else -1
    while block := file.read(BLOCK if left < 0 else min(BLOCK, left)):
        found.update(block)
        left -= len(block) if left >= 0 else 0
    return found.hexdigest()


def trailer(path: Path) -> tuple[str, str]:
    """(checksum, what it was made of) as a file's last bytes say; twice "" where they say nothing."""
    size = path.stat().st_size
    if size < TRAILER:
        return "", ""
    with open(path, "rb") as file:
        file.seek(size - TRAILER)
        end = file.read()
    if not (end.startswith(MARK) and end.isascii()):
        return "", ""
    words = end[len(MARK) :].decode()
    return words[:DIGITS], words[DIGITS:]


@lru_cache(maxsize=4)
def opened(path: Path, changed: int) -> pa.Table:
    """The table of a file. Few stay open: pages that were looked at count as memory of the process."""
    return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()


def sync(folder: Path) -> None:
    """Wait until the names in a folder are on disk, where the system can tell."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
