"""Rollouts on disk: shards of a fixed composition of prompts, with what they are of, read back as they are needed.

A folder of rollouts has

    manifest.json            what they are of: policy, prompts, settings, seed
    completions/00000.arrow  a row for each prompt: text and token ids as they were drawn
    rewards/00000.arrow      the same rows' rewards
    anchors/00000.arrow      the same rows' log pi_t

A shard of rewards or anchors carries the checksum of the completions that it belongs to.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor, nn

from rebel.errors import RebelError
from rebel.rounds.shards import DIGITS, Shards, digest, sync
from rebel.types import Completion, Prompt, Rollout, Scored, TokenTrace

MANIFEST = "manifest.json"
COMPONENT = "reward: "
SCHEMA = pa.schema(
    [
        ("prompt", pa.string()),
        ("chat", pa.bool_()),
        ("meta", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("completions", pa.list_(pa.string())),
        ("completion_ids", pa.list_(pa.list_(pa.int32()))),
        ("written", pa.list_(pa.list_(pa.bool_()))),
        ("finished", pa.list_(pa.bool_())),
        ("source", pa.list_(pa.string())),
    ]
)
"""A row of completions. Messages of a chat and the other columns of a prompt's row are JSON."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What rollouts are of: only where all of it is the same do shards belong together.

    `policy`, `prompt_set` and `tokenizer` are fingerprints; `shard` is the number of prompts of one. `drawn_by` is for
    people to read and may differ.
    """

    prompts: int
    shard: int
    policy: str
    tokenizer: str
    prompt_set: str
    seed: int = 0
    round: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    drawn_by: str = ""

    @property
    def identity(self) -> str:
        return digest(json.dumps({**asdict(self), "drawn_by": ""}, sort_keys=True))

    def differences(self, other: Manifest) -> list[str]:
        """What is different, in words: of `self` first."""
        mine, its = flattened(self), flattened(other)
        return [f"{k} {mine.get(k)}, not {its.get(k)}" for k in {**mine, **its} if mine.get(k) != its.get(k)]


def flattened(manifest: Manifest) -> dict[str, Any]:
    values = {f.name.replace("_", " "): getattr(manifest, f.name) for f in fields(manifest) if f.name != "drawn_by"}
    settings = values.pop("settings")
    return values | {f"--{name}": value for name, value in settings.items()}


@dataclass(frozen=True, slots=True)
class Rollouts:
    """The scored groups of a folder, each read when it is asked for: memory does not grow with their number."""

    folder: Path
    manifest: Manifest

    @property
    def completions(self) -> Shards:
        return Shards(self.folder / "completions")

    @property
    def rewards(self) -> Shards:
        return Shards(self.folder / "rewards")

    @property
    def shards(self) -> int:
        return -(-self.manifest.prompts // self.manifest.shard)

    def size(self, shard: int) -> int:
        """Prompts of a shard; the last one may have fewer."""
        return min(self.manifest.shard, self.manifest.prompts - shard * self.manifest.shard)

    def __len__(self) -> int:
        return self.manifest.prompts

    def __getitem__(self, index: int) -> Scored:
        """A scored group. Being read from disk, it is another object each time."""
        shard, row = self.place(index)
        return scored_of(rollout_of(self.completions.table(shard), row), self.rewards.table(shard), row)

    def place(self, index: int) -> tuple[int, int]:
        """(shard, row in it) of a group."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return divmod(index, self.manifest.shard)

    def drawn(self, shard: int) -> list[Rollout]:
        """All rollouts of a shard."""
        table = self.completions.table(shard)
        return [rollout_of(table, row) for row in range(len(table))]

    def of_completions(self, shard: int) -> str:
        """What shards of rewards and anchors are made of: the completions of that number."""
        return self.completions.checksum(shard) if self.completions.path(shard).exists() else "0" * DIGITS


@dataclass(frozen=True, slots=True)
class Prompts(Sequence[Prompt]):
    """The prompts of rollouts on disk, each read when it is asked for."""

    rollouts: Rollouts

    def __len__(self) -> int:
        return len(self.rollouts)

    def __getitem__(self, index: Any) -> Any:
        """One prompt, or a list of them."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        shard, row = self.rollouts.place(index)
        return rollout_of(self.rollouts.completions.table(shard), row).prompt


# -- what they are of ------------------------------------------------------------------------------------------------


def claim(folder: Path, manifest: Manifest) -> Rollouts:
    """The rollouts of this description in `folder`, begun or to begin; an error where it has others."""
    path = folder / MANIFEST
    if path.exists():
        held = read_manifest(folder)
        if held.identity != manifest.identity:
            raise RebelError(
                f"{folder} holds other rollouts: {'; '.join(held.differences(manifest))}. Rollouts are never mixed: "
                "name another folder, or delete this one to draw anew"
            )
        return Rollouts(folder, held)
    if folder.is_dir() and any(folder.iterdir()):
        raise RebelError(f"{folder} holds something else than rollouts ({MANIFEST} is not in it); name another folder")
    write_json(path, asdict(manifest))
    return Rollouts(folder, manifest)


def read_manifest(folder: Path) -> Manifest:
    """What the rollouts of a folder are of."""
    path = folder / MANIFEST
    if not path.exists():
        raise RebelError(f"{folder} holds no rollouts: there is no {MANIFEST} in it. `rebel rollout` draws some")
    try:
        return Manifest(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise RebelError(f"{path} cannot be read: {error}. The rollouts have to be drawn again") from None


def write_json(path: Path, content: Any) -> None:
    """Write a file that is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)
    sync(path.parent)


def of_weights(module: nn.Module) -> str:
    """The fingerprint of a model's weights. An adapter that changes nothing yet makes no difference."""
    named = list(module.named_parameters())
    idle = not any(bool(w.any()) for name, w in named if ".lora_B." in name or ".lora_embedding_B." in name)
    found = blake2b(digest_size=DIGITS // 2)
    for name, weight in named:
        if idle and ".lora_" in name:
            continue
        found.update(f"{tuple(weight.shape)} {weight.dtype}".encode())
        found.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def of_prompts(prompts: Iterable[Prompt]) -> str:
    """The fingerprint of prompts with their other columns, in their order."""
    found = blake2b(digest_size=DIGITS // 2)
    for prompt in prompts:
        found.update((as_json(prompt.content) + "\n" + as_json(dict(prompt.meta)) + "\n").encode())
    return found.hexdigest()


# -- rows ------------------------------------------------------------------------------------------------------------


def table_of(rollouts: Sequence[Rollout[TokenTrace]]) -> pa.Table:
    """Rollouts as rows."""
    return pa.Table.from_pylist([row_of(rollout) for rollout in rollouts], SCHEMA)


def row_of(rollout: Rollout[TokenTrace]) -> dict[str, Any]:
    chat = not isinstance(rollout.prompt.content, str)
    text = as_json if chat else str
    completions = rollout.completions
    masks = [c.trace.mask for c in completions]
    return {
        "prompt": text(rollout.prompt.content),
        "chat": chat,
        "meta": as_json(dict(rollout.prompt.meta)),
        "prompt_ids": list(completions[0].trace.prompt),
        "completions": [text(c.content) for c in completions],
        "completion_ids": [list(c.trace.completion) for c in completions],
        "written": [None if mask is None else list(mask) for mask in masks],
        "finished": [c.finished for c in completions],
        "source": [c.source for c in completions],
    }


def rollout_of(table: pa.Table, row: int) -> Rollout[TokenTrace]:
    """The rollout of a row."""
    found = {name: table[name][row].as_py() for name in SCHEMA.names}
    text = json.loads if found["chat"] else str
    start = tuple(found["prompt_ids"])
    columns = (found[name] for name in ("completions", "completion_ids", "written", "source", "finished"))
    completions = tuple(
        Completion(
            text(content), TokenTrace(start, tuple(ids), None if mask is None else tuple(mask)), source, finished
        )
        for content, ids, mask, source, finished in zip(*columns, strict=True)
    )
    return Rollout(Prompt(text(found["prompt"]), json.loads(found["meta"])), completions)


def as_json(value: Any) -> str:
    """JSON of a prompt's columns; what it cannot hold is an error, since a reward would read something else."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError as error:
        raise RebelError(
            f"rollouts on disk keep the columns of a prompt as JSON, and one of them cannot be: {error}. Take that "
            "column out of the data, or write it as text or numbers"
        ) from None


def rewards_table(scored: Sequence[Scored]) -> pa.Table:
    """Rewards (or margins, row by row of their matrix) and their components as rows."""
    columns = {name: [group.components[name] for group in scored] for name in scored[0].components}
    columns = {COMPONENT + name: values for name, values in columns.items()}
    if scored[0].rewards is not None:
        columns["rewards"] = [group.rewards for group in scored if group.rewards is not None]
    else:
        columns["margins"] = [group.pair_margins().reshape(-1) for group in scored]
    return numbers_table(columns)


def numbers_table(columns: Mapping[str, Sequence[Tensor]]) -> pa.Table:
    """A list of numbers a row in each column, in the tensors' own type."""
    return pa.table({name: pa.array([exact(values) for values in rows]) for name, rows in columns.items()})


def exact(values: Tensor) -> Any:
    """The numbers as numpy has them; float32 for the types it does not know."""
    return (values if values.dtype in (torch.float32, torch.float64) else values.float()).detach().cpu().numpy()


def scored_of(rollout: Rollout, table: pa.Table, row: int) -> Scored:
    """The rollout with the rewards of its row."""
    known = {name.removeprefix(COMPONENT): name for name in table.column_names if name.startswith(COMPONENT)}
    components = {name: numbers(table, column, row) for name, column in known.items()}
    if "rewards" in table.column_names:
        return Scored(rollout, rewards=numbers(table, "rewards", row), components=components)
    size = len(rollout.completions)
    return Scored(rollout, margins=numbers(table, "margins", row).reshape(size, size), components=components)


def numbers(table: pa.Table, column: str, row: int) -> Float[Tensor, " N"]:
    """The numbers of one row of a column."""
    values: Any = table[column][row]
    return torch.from_numpy(values.values.to_numpy(zero_copy_only=False).copy())
