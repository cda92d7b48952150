"""Reward models: sequence classifiers with one output, read with their own tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rebel.errors import RebelError
from rebel.rewards.groups import in_groups
from rebel.types import Completion, Prompt, Rollout, Scored


class RewardModel:
    """The score of a model for prompt and completion together; NaN where they do not fit into the model, never cut.

    Messages go through the model's own chat template. Plain text is prompt and completion in a row, with the special
    tokens that the tokenizer puts around a text by itself.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        name: str | None = None,
        tokens_per_batch: int = 16384,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        trust_remote_code: bool = False,
    ) -> None:
        source = model.config._name_or_path if isinstance(model, PreTrainedModel) else str(model)
        self.name = name or Path(source).name or "reward_model"
        self.tokenizer = tokenizer or _load_tokenizer(source, trust_remote_code)
        if not isinstance(model, PreTrainedModel):
            model = _load_model(source, dtype, trust_remote_code)
        _check_labels(model.config, source)
        self.device = torch.device(device or default_device())
        # transformers' annotation of `to` takes the device for self
        self.model = model.to(self.device).eval().requires_grad_(False)  # pyright: ignore[reportArgumentType]
        self.tokens_per_batch = tokens_per_batch
        self.pad_id = _share_pad_token(self.model, self.tokenizer, source)
        self.longest = longest_input(self.model, self.tokenizer)

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Scored]:
        self.check([rollout.prompt for rollout in rollouts])
        texts = [self.ids(rollout.prompt, y) for rollout in rollouts for y in rollout.completions]
        rewards = torch.full((len(texts),), torch.nan)
        fitting = [k for k, ids in enumerate(texts) if 0 < len(ids) <= self.longest]
        for batch in batches_by_length(fitting, [len(ids) for ids in texts], self.tokens_per_batch):
            rewards[batch] = self._scores([texts[k] for k in batch])
        return in_groups(rollouts, rewards, {self.name: rewards})

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises RebelError where prompts are chats and the model has no template for them."""
        if self.tokenizer.chat_template is None and any(not isinstance(p.content, str) for p in prompts):
            raise RebelError(
                f"the prompts are chat messages, but the tokenizer of the reward model {self.name} has no chat "
                "template; add one to it (chat_template.jinja in its folder) or use prompts of plain text"
            )

    def ids(self, prompt: Prompt, completion: Completion) -> list[int]:
        """What the model reads: token ids of prompt and completion."""
        return ids_of(self.tokenizer, prompt, completion)

    @torch.no_grad()
    def _scores(self, texts: Sequence[list[int]]) -> Float[Tensor, " N"]:
        """Padded on the right, where a causal model's positions are not moved by it; the mask is from the lengths."""
        ids = pad_sequence([torch.tensor(t) for t in texts], batch_first=True, padding_value=self.pad_id)
        lengths = torch.tensor([len(text) for text in texts])
        mask = torch.arange(ids.shape[1])[None, :] < lengths[:, None]
        output = self.model(input_ids=ids.to(self.device), attention_mask=mask.long().to(self.device))
        return output.logits[:, 0].float().cpu()


def ids_of(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: Completion) -> list[int]:
    """What a reward model with this tokenizer reads: token ids of prompt and completion."""
    if isinstance(prompt.content, str):
        return tokenizer(prompt.content + completion.content)["input_ids"]
    text: Any = tokenizer.apply_chat_template([*prompt.content, *completion.content], tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def batches_by_length(which: Sequence[int], lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, none with more tokens than given once padded (but for one alone)."""
    batch: list[int] = []
    for k in sorted(which, key=lambda k: lengths[k]):
        if batch and lengths[k] * (len(batch) + 1) > tokens:
            yield batch
            batch = []
        batch.append(k)
    if batch:
        yield batch


def longest_input(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The number of tokens that the model has positions for, as far as it or its tokenizer says."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    said = [limit for limit in (positions, tokenizer.model_max_length) if limit and limit > 0]
    return int(min(said))


def _load_tokenizer(source: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise _not_loaded(source, "tokenizer", error) from error


def _load_model(source: str, dtype: str | torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    settings: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(source, **settings)
        _check_labels(config, source)
        model, found = AutoModelForSequenceClassification.from_pretrained(
            source, config=config, dtype=dtype, output_loading_info=True, **settings
        )
    except RebelError:
        raise
    except Exception as error:
        raise _not_loaded(source, "reward model", error) from error
    if found["missing_keys"]:
        missing = ", ".join(sorted(found["missing_keys"])[:3])
        raise RebelError(
            f"--reward_funcs {source} lacks the weights {missing}: it is not a trained reward model, and its scores "
            "would be random"
        )
    return model


def _not_loaded(source: str, what: str, error: Exception) -> RebelError:
    return RebelError(f"--reward_funcs {source}: its {what} cannot be loaded: {reason_of(error)}")


def reason_of(error: Exception) -> str:
    """The first line of what a library says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _check_labels(config: Any, source: str) -> None:
    if config.num_labels != 1:
        kind = ", ".join(config.architectures or []) or type(config).__name__
        raise RebelError(
            f"--reward_funcs {source} is a {kind} with {config.num_labels} labels; "
            "a reward model is a sequence classification model with one (num_labels=1)"
        )


def default_device() -> torch.device:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def _share_pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str) -> int:
    """The padding token, the same for tokenizer and model: causal classifiers read the last token that is not it."""
    config = model.config.get_text_config()
    if tokenizer.pad_token_id is None and getattr(config, "pad_token_id", None) is not None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.pad_token_id)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise RebelError(f"--reward_funcs {source}: its tokenizer has neither a padding nor an end-of-text token")
    pad: Any = tokenizer.pad_token_id
    config.pad_token_id = pad
    return pad
