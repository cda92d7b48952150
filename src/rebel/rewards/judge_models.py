"""Judges in this process: a causal language model that is asked "A or B", and a reward model by Bradley and Terry."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rebel.errors import RebelError
from rebel.rewards.judge_text import FORCED, question
from rebel.rewards.judges import Answers, BradleyTerry
from rebel.rewards.models import RewardModel, batches_by_length, default_device, longest_input, reason_of
from rebel.types import Comparison, Judge


class LanguageModelJudge:
    """P(first > second) = P(A) / (P(A) + P(B)) of the next token, after a question that names the two A and B.

    The question goes through the model's chat template as a message of the user; without a template it is followed by
    "Answer:" as plain text. One that does not fit into the model has no answer; none is cut.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        template: str = FORCED,
        tokens_per_batch: int = 16384,
        device: str | torch.device | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        source = model.config._name_or_path if isinstance(model, PreTrainedModel) else str(model)
        self.name = Path(source).name or "judge"
        settings: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        try:
            self.tokenizer = tokenizer or AutoTokenizer.from_pretrained(source, **settings)
            if not isinstance(model, PreTrainedModel):
                model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", **settings)
        except Exception as error:
            raise RebelError(f"--judge {source} cannot be loaded: {reason_of(error)}") from error
        self.device = torch.device(device or default_device())
        # transformers' annotation of `to` takes the device for self
        self.model = model.to(self.device).eval().requires_grad_(False)  # pyright: ignore[reportArgumentType]
        self.template = template
        self.tokens_per_batch = tokens_per_batch
        self.longest = longest_input(self.model, self.tokenizer)
        _, self.letters = self.ids("")

    def __call__(self, comparisons: Sequence[Comparison]) -> Answers:
        asked = [self.ids(question(self.template, comparison))[0] for comparison in comparisons]
        answers: Answers = [None] * len(asked)
        fitting = [k for k, ids in enumerate(asked) if len(ids) <= self.longest]
        for batch in batches_by_length(fitting, [len(ids) for ids in asked], self.tokens_per_batch):
            for place, p in zip(batch, self.probabilities([asked[k] for k in batch]).tolist(), strict=True):
                answers[place] = p
        return answers

    def ids(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """What the model reads before its answer, and the tokens (A, B) with which it may begin one.

        Found by encoding both answers behind the question, with and without a space, so that it holds whatever a
        tokenizer does at their seam.
        """
        if self.tokenizer.chat_template is None:
            start, special = f"{text}\nAnswer:", True
        else:
            messages = [{"role": "user", "content": text}]
            start = str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
            special = False
        found = []
        for seam in ("", " "):
            a, b = (self.tokenizer(start + seam + x, add_special_tokens=special)["input_ids"] for x in "AB")
            same = next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
            if same is not None:
                found.append((list(a[:same]), (a[same], b[same])))
        if not found:
            raise RebelError(f"--judge {self.name}: its tokenizer does not tell the answers A and B apart")
        context = found[0][0]
        return context, sorted({letters for before, letters in found if before == context})

    @torch.no_grad()
    def probabilities(self, texts: Sequence[list[int]]) -> Tensor:
        """P(A) against P(B) after each text. Padded on the right, where a causal model cannot see it."""
        ids = pad_sequence([torch.tensor(text) for text in texts], batch_first=True)
        last = torch.tensor([len(text) - 1 for text in texts])
        mask = torch.arange(ids.shape[1])[None, :] <= last[:, None]
        output = self.model(input_ids=ids.to(self.device), attention_mask=mask.long().to(self.device), use_cache=False)
        logits = output.logits[torch.arange(len(texts)), last.to(output.logits.device)].double().cpu()
        a, b = (logits[:, list(tokens)].logsumexp(dim=-1) for tokens in zip(*self.letters, strict=True))
        return (a - b).sigmoid()


def model_judge(source: str, template: str = FORCED, **settings: Any) -> Judge:
    """The judge of a folder or a hub name: a reward model's Bradley-Terry preferences, or a language model's A or B."""
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=settings.get("trust_remote_code", False))
    except Exception as error:
        raise RebelError(f"--judge {source} cannot be loaded: {reason_of(error)}") from error
    kinds = config.architectures or []
    if any("SequenceClassification" in kind for kind in kinds):
        reward = RewardModel(source, **settings)
        return BradleyTerry(reward, name=reward.name)
    if any(kind.endswith(("CausalLM", "LMHeadModel", "ConditionalGeneration")) for kind in kinds):
        return LanguageModelJudge(source, template=template, **settings)
    raise RebelError(
        f"--judge {source} is a {', '.join(kinds) or 'model of no known kind'}; a judge is a reward model (sequence "
        "classification with one label) or a causal language model"
    )
