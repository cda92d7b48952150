"""log pi_0 of recorded completions, computed once and kept on disk for the runs that have the same to compute."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

VERSION = "1"
"""Changes when log-probabilities are computed differently."""


def hash_of_weights(module: nn.Module) -> str:
    """A hash of every parameter and buffer of a model, adapters included, with their names and types."""
    total = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        plain = tensor.detach().cpu().contiguous().flatten()
        total.update(plain.view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


@dataclass(frozen=True, slots=True)
class AnchorFile:
    """Where the anchors of one model on one data set are kept: `key` has all that they depend on."""

    folder: Path
    key: Mapping[str, str]

    @property
    def path(self) -> Path:
        words = json.dumps({**self.key, "version": VERSION}, sort_keys=True)
        return self.folder / f"anchors-{hashlib.blake2b(words.encode(), digest_size=8).hexdigest()}.safetensors"

    def read(self, count: int) -> tuple[Float[Tensor, " N"] | None, str]:
        """The anchors of `count` completions, or None and what is wrong with the file ("" where there is none)."""
        if not self.path.exists():
            return None, ""
        try:
            with safe_open(self.path, "pt") as file:
                notes, logp = json.loads((file.metadata() or {}).get("notes", "{}")), file.get_tensor("logp")
        except (OSError, SafetensorError, ValueError) as error:
            return None, f"{self.path} cannot be read ({str(error).splitlines()[0]})"
        if {name: notes.get(name) for name in self.key} != dict(self.key):
            return None, f"{self.path} belongs to another model, data set or setting"
        if logp.shape != (count,) or not logp.isfinite().all() or notes.get("checksum") != checksum(logp):
            return None, f"{self.path} is damaged"
        return logp, ""

    def write(self, logp: Float[Tensor, " N"]) -> None:
        """Keep the anchors; the name appears only once all of them are on disk."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        notes = json.dumps({**self.key, "checksum": checksum(logp)}, sort_keys=True)
        save_file({"logp": logp.double().contiguous()}, partial, {"notes": notes})
        partial.replace(self.path)


def checksum(logp: Float[Tensor, " N"]) -> str:
    return hashlib.blake2b(logp.double().contiguous().numpy().tobytes(), digest_size=16).hexdigest()
