"""Rewards that read pictures, against values computed by hand; prompts for them; judges that are never the reward."""

from __future__ import annotations

import math
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from rebel.build.rewards import build_reward
from rebel.config import RebelConfig
from rebel.data import empty_lines, load_prompts
from rebel.errors import RebelError
from rebel.evaluate import evaluate
from rebel.evaluators import verdicts
from rebel.rewards.clip import SOURCES
from rebel.rewards.combine import Weighted
from rebel.rewards.functions import Notes, PerCompletion
from rebel.rewards.load import load_reward
from rebel.types import Completion, Prompt, Rollout

WORDS = ["<pad>", "<start>", "a", "red", "blue", "square", "noise", "<end>"]
END = len(WORDS) - 1  # the largest id, where a CLIP's text model looks for the end of a text


def noise(seed: int = 0, size: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def plain(colour: str = "red") -> Image.Image:
    return Image.new("RGB", (32, 32), colour)


def drawn(*groups: list[Image.Image], prompts: tuple[str, ...] = ("a red square", "a blue square")) -> list[Rollout]:
    """A prompt with its pictures for each group."""
    return [
        Rollout(Prompt(prompt, {"wanted": k}), tuple(Completion(image, trace=None) for image in group))
        for k, (prompt, group) in enumerate(zip(prompts, groups, strict=False))
    ]


def rewards(reward: Any, rollouts: list[Rollout]) -> list[float]:
    return torch.cat([group.rewards for group in reward(rollouts)]).tolist()


def kilobytes(image: Image.Image) -> float:
    buffer = BytesIO()
    image.save(buffer, format="JPEG", quality=95)
    return len(buffer.getvalue()) / 1000


def test_jpeg_rewards_are_kilobytes_at_quality_95_with_the_sign_of_their_name() -> None:
    rollouts = drawn([noise(), plain()])
    sizes = [kilobytes(noise()), kilobytes(plain())]
    assert sizes[0] > 2 * sizes[1] > 0.5
    assert rewards(load_reward("jpeg_incompressibility"), rollouts) == pytest.approx(sizes)
    assert rewards(load_reward("jpeg_compressibility"), rollouts) == pytest.approx([-size for size in sizes])


def test_a_picture_that_jpeg_has_no_mode_for_is_measured_as_rgb() -> None:
    clear = noise().convert("RGBA")
    assert rewards(load_reward("jpeg_incompressibility"), drawn([clear])) == pytest.approx([kilobytes(noise())])


def test_a_function_gets_pictures_under_both_names_and_the_columns() -> None:
    seen: dict[str, Any] = {}

    def score(images: list[Image.Image], prompts: list[str], **columns: Any) -> list[float]:
        seen.update(columns, images=images, prompts=prompts)
        return [float(image.getpixel((0, 0))[0]) for image in images]

    assert rewards(PerCompletion(score), drawn([plain(), plain("black")], [plain("blue")])) == [255.0, 0.0, 0.0]
    assert seen["images"] is seen["completions"] and seen["wanted"] == [0, 0, 1]
    assert seen["prompts"] == ["a red square", "a red square", "a blue square"]


def test_a_reward_of_images_is_refused_where_completions_are_text() -> None:
    text = [Rollout(Prompt("x"), (Completion("a text", trace=None),))]
    with pytest.raises(RebelError, match="jpeg_compressibility reads images, and the completions are text"):
        load_reward("jpeg_compressibility")(text)


def test_several_rewards_have_weights() -> None:
    config = RebelConfig(reward_funcs=["jpeg_compressibility", "jpeg_incompressibility"], reward_weights=[1.0, 3.0])
    scored = build_reward(config, Notes())(drawn([noise()]))[0]
    assert scored.rewards is not None
    assert float(scored.rewards) == pytest.approx(2 * kilobytes(noise()))
    assert float(scored.components["jpeg_compressibility"]) == pytest.approx(-kilobytes(noise()))


@pytest.mark.parametrize(
    ("values", "complaint"),
    [([1.0], "returned 1 values for 2 completions"), (["good", 1.0], "a value that is no number"), (7, "returned int")],
)
def test_a_reward_that_returns_something_else_is_one_clear_error(values: Any, complaint: str) -> None:
    with pytest.raises(RebelError, match=complaint):
        PerCompletion(lambda images, **kwargs: values, "odd")(drawn([noise(), plain()]))


def test_a_value_that_is_none_or_no_number_leaves_a_reward_of_nan() -> None:
    found = rewards(PerCompletion(lambda images, **kwargs: [math.nan, None, 2.0], "odd"), drawn([noise()] * 3))
    assert math.isnan(found[0]) and math.isnan(found[1]) and found[2] == 2.0


# -- rewards with weights -------------------------------------------------------------------------------------------


def tiny_clip(folder: Path, seed: int = 0) -> CLIPModel:
    """A random CLIP with what belongs to it, saved as those of the hub are."""
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(WORDS), "max_position_embeddings": 6, "eos_token_id": END, "bos_token_id": 1}
    vision = {**small, "image_size": 16, "patch_size": 8}
    torch.manual_seed(seed)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    with torch.no_grad():
        for weight in model.parameters():  # far from each other, so that a mistake shows
            weight.add_(torch.randn_like(weight) * 0.2)
    core = Tokenizer(models.WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", END)]
    )
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<end>", bos_token="<start>", model_max_length=6
    ).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CLIPModel]:
    folder = tmp_path_factory.mktemp("clip")
    return folder, tiny_clip(folder)


def by_hand(model: CLIPModel, folder: Path, images: list[Image.Image], ids: list[list[int]]) -> Any:
    """Cosines of each picture with its text, each alone and through the model's own forward pass."""
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    cosines, embeddings = [], []
    with torch.no_grad():
        for image, tokens in zip(images, ids, strict=True):
            pixels = processor([image], return_tensors="pt")["pixel_values"]
            output = model(input_ids=torch.tensor([tokens]), pixel_values=pixels)
            cosines.append(float((output.image_embeds * output.text_embeds).sum()))
            embeddings.append(output.image_embeds[0])
    return np.array(cosines), torch.stack(embeddings)


IDS = [[1, 2, 3, 5, END], [1, 2, 3, 5, END], [1, 4, 5, END]]
"""Of the prompts of `three`; texts of several lengths, so that padding shows."""


def three() -> tuple[list[Image.Image], list[Rollout]]:
    images = [plain("red"), noise(1), noise(2)]
    return images, drawn(images[:2], images[2:], prompts=("a red square", "blue square"))


@pytest.mark.parametrize("name", ["clip_score", "pickscore", "hpsv2"])
def test_agreement_is_the_cosine_in_its_scale(clip: tuple[Path, CLIPModel], name: str) -> None:
    folder, model = clip
    images, rollouts = three()
    cosines, _ = by_hand(model, folder, images, IDS)
    scale = {"clip_score": 100.0, "pickscore": math.exp(float(model.logit_scale.detach())), "hpsv2": 1.0}[name]
    reward = load_reward(f"{name}:{folder}", device="cpu")
    assert rewards(reward, rollouts) == pytest.approx(scale * cosines, rel=1e-4)
    assert reward.name == name  # pyright: ignore[reportAttributeAccessIssue]
    assert np.ptp(cosines) > 1e-3


def test_prompts_longer_than_the_model_reads_are_cut_to_what_it_does(clip: tuple[Path, CLIPModel]) -> None:
    reward = load_reward(f"clip_score:{clip[0]}", device="cpu")
    long, cut = "a red blue square square square", "a red blue square"  # six places, two of them for the ends
    assert rewards(reward, drawn([noise()], prompts=(long,))) == rewards(reward, drawn([noise()], prompts=(cut,)))


@pytest.mark.parametrize("file", ["head.safetensors", "sac+logos+ava1-l14-linearMSE.pth"])
def test_aesthetic_is_the_head_on_the_embedding_of_length_one(tmp_path: Path, file: str) -> None:
    model = tiny_clip(tmp_path)
    torch.manual_seed(1)
    mlp = nn.Sequential(nn.Linear(8, 6), nn.Dropout(), nn.Linear(6, 4), nn.Dropout(), nn.Linear(4, 1)).eval()
    weights = {f"layers.{name}": weight.detach() for name, weight in mlp.named_parameters()}
    save_file(weights, tmp_path / file) if file.endswith("safetensors") else torch.save(weights, tmp_path / file)
    images, rollouts = three()
    _, embeddings = by_hand(model, tmp_path, images, IDS)
    wanted = mlp(embeddings)[:, 0].tolist()
    assert rewards(load_reward(f"aesthetic:{tmp_path}", device="cpu"), rollouts) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("name", ["hpsv2", "aesthetic"])
def test_weights_without_a_name_on_the_hub_have_to_be_given(name: str) -> None:
    with pytest.raises(RebelError, match=f"--reward_funcs {name}: say where its weights are, {name}:SOURCE, a folder"):
        load_reward(name)


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_weights_that_are_not_there_are_one_clear_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(RebelError, match=r"cannot be loaded: .* It has to be a folder.* with a CLIP as transformers"):
        load_reward(f"{name}:{tmp_path}", device="cpu")


def test_a_clip_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    model = tiny_clip(tmp_path)
    kept = {name: weight for name, weight in model.state_dict().items() if "text_projection" not in name}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RebelError, match=r"lacks the weights text_projection.weight: its scores would be random"):
        load_reward(f"clip_score:{tmp_path}", device="cpu")


def test_aesthetic_needs_one_head_that_fits(tmp_path: Path) -> None:
    tiny_clip(tmp_path)
    with pytest.raises(RebelError, match="holds 0 heads"):
        load_reward(f"aesthetic:{tmp_path}", device="cpu")
    wrong = nn.Sequential(nn.Linear(9, 1))
    save_file(
        {f"layers.{name}": weight.detach() for name, weight in wrong.named_parameters()}, tmp_path / "head.safetensors"
    )
    with pytest.raises(RebelError, match="does not lead from 8 numbers to one score"):
        load_reward(f"aesthetic:{tmp_path}", device="cpu")
    (tmp_path / "head.safetensors").rename(tmp_path / "kept")
    (tmp_path / "other.pth").write_bytes(b"no weights")
    with pytest.raises(RebelError, match=r"other\.pth cannot be read"):
        load_reward(f"aesthetic:{tmp_path}", device="cpu")
    (tmp_path / "kept").rename(tmp_path / "head.safetensors")
    with pytest.raises(RebelError, match="holds 2 heads"):
        load_reward(f"aesthetic:{tmp_path}", device="cpu")


# -- prompts --------------------------------------------------------------------------------------------------------


def test_empty_lines_of_a_file_of_prompts_are_skipped_and_counted(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\na cat\n   \n\na dog\n")
    assert [prompt.content for prompt in load_prompts(str(file), "train", "prompt")] == ["a cat", "a dog"]
    assert empty_lines(str(file)) == 3
    file.write_text("\n\n")
    with pytest.raises(RebelError, match="has no rows"):
        load_prompts(str(file), "train", "prompt")


def test_the_animals_come_with_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [str(prompt.content) for prompt in load_prompts("animals", "train", "prompt")]
    assert len(set(prompts)) == 45 and empty_lines("animals") == 0
    assert all(prompt.split(" ")[0] in ("a", "an") for prompt in prompts)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "animals").mkdir()
    (tmp_path / "animals" / "train.jsonl").write_text('{"prompt": "mine"}\n')
    assert [prompt.content for prompt in load_prompts("animals", "train", "prompt")] == ["mine"]


# -- judges that nothing is trained on ------------------------------------------------------------------------------


def test_judges_give_means_over_prompts_and_their_error() -> None:
    def red(images: list[Image.Image], **kwargs: Any) -> list[float | None]:
        return [None if image.size == (8, 8) else image.getpixel((0, 0))[0] / 255 for image in images]

    def large(images: list[Image.Image], **kwargs: Any) -> list[float]:
        return [float(image.size > (8, 8)) for image in images]

    rollouts = drawn([plain(), plain("black")], [plain(), noise(size=8)])
    found = verdicts(Weighted([PerCompletion(red), PerCompletion(large)])(rollouts))
    assert found["eval/judges/red"] == pytest.approx(0.75)
    assert found["eval/judges/red_stderr"] == pytest.approx(np.std([0.5, 1.0], ddof=1) / math.sqrt(2))
    assert found["eval/judges/large"] == pytest.approx(0.75)
    assert set(found) == {f"eval/judges/{name}{end}" for name in ("red", "large") for end in ("", "_stderr")}


def test_an_evaluation_keeps_pictures_as_pictures() -> None:
    scored = load_reward("jpeg_incompressibility")(drawn([plain(), noise()], [noise()]))
    rows = evaluate(scored, lambda traces: torch.zeros(len(traces)), None).samples
    assert [row["prompt"] for row in rows] == ["a red square", "a blue square"]
    assert isinstance(rows[0]["image"], Image.Image) and "completion" not in rows[0]
