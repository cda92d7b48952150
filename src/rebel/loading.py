"""What Hugging Face loads, by name or folder, with errors in one line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from rebel.errors import RebelError
from rebel.policies.causal_lm import CausalLM, causal_lm


def loaded(name: str, what: str, load: Callable[[], Any], flag: str = "--model_name_or_path") -> Any:
    """What transformers or diffusers loads, or an error in one line."""
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().exists():
        raise RebelError(f"{flag} {name}: there is no such folder")
    try:
        return load()
    except Exception as error:  # of many kinds: files, network, configuration
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RebelError(f"{flag} {name}: its {what} cannot be loaded: {reason}") from error


def load_policy(
    name: str,
    chat_template_kwargs: Mapping[str, Any],
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
) -> CausalLM:
    """The policy of a finished run, of a checkpoint or of any model: folder or name, whole or with an adapter."""
    adapter = (Path(name) / "adapter_config.json").exists()
    kind: Any = AutoPeftModelForCausalLM if adapter else AutoModelForCausalLM
    load = {"trust_remote_code": trust_remote_code}
    model = loaded(name, "model", partial(kind.from_pretrained, name, **load))
    tokenizer = loaded(name, "tokenizer", partial(AutoTokenizer.from_pretrained, name, **load))
    return causal_lm(model.eval().to(device), tokenizer, chat_template_kwargs=dict(chat_template_kwargs))
