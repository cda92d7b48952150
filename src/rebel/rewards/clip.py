"""Rewards that read pictures with a CLIP model: agreement with the prompt, human preference, aesthetics.

Nothing is downloaded unless a hub name is given: the weights are the user's. Each of these is a CLIP as transformers
saves it (config.json, model.safetensors, tokenizer and preprocessor_config.json in one folder); `aesthetic` has its
small head beside it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from rebel.errors import RebelError
from rebel.rewards.functions import Notes, PerCompletion
from rebel.rewards.models import default_device, reason_of

LAYOUT = (
    "a folder or hub name with a CLIP as transformers saves it (config.json, model.safetensors, a tokenizer and "
    "preprocessor_config.json)"
)
SOURCES = {
    "clip_score": "openai/clip-vit-large-patch14",
    "pickscore": "yuvalkirstain/PickScore_v1",
    "hpsv2": "",
    "aesthetic": "",
}
"""The rewards by name, each with the hub name of its weights where those are published in that layout."""

PICTURES_AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class Clip:
    """A CLIP model with what prepares its inputs."""

    model: Any
    tokenizer: Any
    processor: Any
    device: torch.device

    @torch.no_grad()
    def pictures(self, images: Sequence[Any]) -> Float[Tensor, "N D"]:
        """Embeddings of pictures, of length one."""
        found = []
        for some in chunks(images, PICTURES_AT_ONCE):
            pixels = self.processor([image.convert("RGB") for image in some], return_tensors="pt")["pixel_values"]
            found.append(self.model.vision_model(pixel_values=pixels.to(self.device)).pooler_output)
        return nn.functional.normalize(self.model.visual_projection(torch.cat(found)).float(), dim=1)

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Float[Tensor, "N D"]:
        """Embeddings of texts, of length one; each is cut at the number of tokens that the model has places for."""
        longest = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=longest, return_tensors="pt"
        ).to(self.device)
        output = self.model.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return nn.functional.normalize(self.model.text_projection(output.pooler_output).float(), dim=1)


@dataclass(frozen=True, slots=True)
class Agreement:
    """`scale` times the cosine between the embeddings of a picture and of its prompt."""

    clip: Clip
    scale: float

    def __call__(self, images: Sequence[Any], prompts: Sequence[str], **kwargs: Any) -> list[float]:
        distinct = list(dict.fromkeys(prompts))
        place = {prompt: k for k, prompt in enumerate(distinct)}
        texts = self.clip.texts(distinct)[[place[prompt] for prompt in prompts]]
        return (self.scale * (self.clip.pictures(images) * texts).sum(dim=1)).tolist()


@dataclass(frozen=True, slots=True)
class Aesthetic:
    """What LAION's predictor makes of the embedding of a picture: about 1 to 10, whatever the prompt."""

    clip: Clip
    head: nn.Module

    @torch.no_grad()
    def __call__(self, images: Sequence[Any], **kwargs: Any) -> list[float]:
        return self.head(self.clip.pictures(images))[:, 0].tolist()


def clip_reward(
    spec: str,
    notes: Notes | None = None,
    flag: str = "--reward_funcs",
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
) -> PerCompletion | None:
    """The reward of NAME:SOURCE, or of NAME alone where its weights have a name on the hub; None for other names.

    `clip_score` is 100 times the cosine, `hpsv2` the cosine, and `pickscore` the cosine in the model's own scale.
    """
    name, _, source = spec.partition(":")
    if name not in SOURCES:
        return None
    source = source or SOURCES[name]
    if not source:
        raise RebelError(f"{flag} {name}: say where its weights are, {name}:SOURCE, {expected(name)}")
    clip = load_clip(source, f"{flag} {spec}", name, torch.device(device or default_device()), trust_remote_code)
    return PerCompletion(reward_of(name, clip, source, f"{flag} {spec}"), name, notes or Notes())


def reward_of(name: str, clip: Clip, source: str, given: str) -> Agreement | Aesthetic:
    """The reward of that name from its loaded CLIP."""
    if name == "aesthetic":
        return Aesthetic(clip, load_head(Path(source).expanduser(), clip, given))
    scales = {"clip_score": 100.0, "hpsv2": 1.0}
    return Agreement(clip, scales.get(name) or float(clip.model.logit_scale.exp()))


def expected(name: str) -> str:
    """What a user has to have."""
    if name == "aesthetic":
        return f"{LAYOUT.replace(' or hub name', '')} and the predictor's head, one .pth or head.safetensors file"
    return f"{LAYOUT}; weights in open_clip's format have to be converted to it" if name == "hpsv2" else LAYOUT


@functools.cache
def load_clip(source: str, given: str, name: str, device: torch.device, trust_remote_code: bool) -> Clip:
    """A CLIP of transformers, loaded once, its errors in one line. Raises RebelError where weights are missing."""
    settings: Any = {"trust_remote_code": True} if trust_remote_code else {}
    try:
        model, found = AutoModel.from_pretrained(source, output_loading_info=True, **settings)
        tokenizer = AutoTokenizer.from_pretrained(source, **settings)
        # AutoImageProcessor insists on torchvision, and importing this one by name would speak of it in every run
        processor = transformers.CLIPImageProcessor.from_pretrained(source)
    except Exception as error:  # of many kinds: files, network, configuration
        raise RebelError(f"{given} cannot be loaded: {reason_of(error)}. It has to be {expected(name)}") from error
    if not all(hasattr(model, part) for part in ("visual_projection", "text_projection", "logit_scale")):
        raise RebelError(f"{given} is a {type(model).__name__} and no CLIP; it has to be {expected(name)}")
    if found["missing_keys"]:
        missing = ", ".join(sorted(found["missing_keys"])[:3])
        raise RebelError(f"{given} lacks the weights {missing}: its scores would be random")
    return Clip(model.to(device).eval().requires_grad_(False), tokenizer, processor, device)


def load_head(folder: Path, clip: Clip, given: str) -> nn.Module:
    """The predictor's head: linear layers one after another, as LAION trained it, from the file of their weights."""
    files = sorted([*folder.glob("*.pth"), *folder.glob("head.safetensors")])
    if len(files) != 1:
        raise RebelError(
            f"{given}: {folder} holds {len(files)} heads (*.pth, head.safetensors), and one is needed; "
            f"it has to be {expected('aesthetic')}"
        )
    layers = list(linear_layers(read_weights(files[0], given)))
    widths = [clip.model.config.projection_dim, *(layer.out_features for layer in layers)]
    if not layers or [layer.in_features for layer in layers] != widths[:-1] or widths[-1] != 1:
        raise RebelError(f"{given}: the head in {files[0].name} does not lead from {widths[0]} numbers to one score")
    return nn.Sequential(*layers).to(clip.device).eval().requires_grad_(False)


def read_weights(file: Path, given: str) -> dict[str, Tensor]:
    """The tensors of a file, which is never run as code."""
    try:
        found = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
        return {str(name): tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}
    except Exception as error:  # of many kinds: files, pickles that would run code, what is no dictionary
        raise RebelError(f"{given}: {file.name} cannot be read: {reason_of(error)}") from error


def linear_layers(weights: dict[str, Tensor]) -> Iterator[nn.Linear]:
    """The layers in the order of the numbers in their names: layers.0.weight, layers.2.weight, ..."""
    numbered = {int(name.split(".")[-2]): name for name in weights if re.fullmatch(r"(.*\.)?\d+\.weight", name)}
    for _, name in sorted(numbered.items()):
        weight, bias = weights[name], weights.get(name.removesuffix("weight") + "bias")
        layer = nn.Linear(weight.shape[-1], weight.shape[0], bias=bias is not None)
        layer.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
        yield layer


def chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
