"""A tokenizer that ends every text, as the reward model behind it was trained to read it."""

from __future__ import annotations

from pathlib import Path

from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rebel.errors import RebelError


def end_texts(tokenizer: PreTrainedTokenizerBase, folder: Path, end: str | None = None) -> None:
    """Save the tokenizer so that it puts its end of sequence (or the token `end`) behind a text by itself.

    RewardTrainer writes that token behind every plain text, and the reward is read at the last token. A chat's template
    writes its own ending, which `add_special_tokens=False` leaves as it is.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise _cannot(tokenizer, "it is no fast tokenizer")
    end = end or str(tokenizer.eos_token)
    number = tokenizer.get_vocab().get(end)
    if number is None:
        raise RebelError(f"--eos_token {end} is no token of the tokenizer")
    wanted = tokenizer("Once" + end)["input_ids"]
    tokenizer.backend_tokenizer.post_processor = around(tokenizer, end)
    tokenizer.save_pretrained(folder)
    read = AutoTokenizer.from_pretrained(folder)("Once")["input_ids"]
    if read != wanted:
        raise _cannot(tokenizer, f"it reads {read} where TRL trains on {wanted}")


def around(tokenizer: PreTrainedTokenizerFast, end: str) -> processors.TemplateProcessing:
    """The special tokens that the tokenizer puts around a text by now, with `end` right behind the text."""
    bare, whole = (tokenizer("Once", add_special_tokens=added)["input_ids"] for added in (False, True))
    start = next((k for k in range(len(whole)) if whole[k : k + len(bare)] == bare), 0)
    before, after = (tokenizer.convert_ids_to_tokens(ids) for ids in (whole[:start], whole[start + len(bare) :]))
    tokens = [*before, "$A", end, *after]
    numbers = {token: tokenizer.convert_tokens_to_ids(token) for token in tokens if token != "$A"}
    return processors.TemplateProcessing(single=tokens, special_tokens=list(numbers.items()))


def _cannot(tokenizer: PreTrainedTokenizerBase, reason: str) -> RebelError:
    return RebelError(
        f"{type(tokenizer).__name__} cannot be saved so that it ends plain texts as RewardTrainer does ({reason}); use "
        "chat messages, or another model"
    )
