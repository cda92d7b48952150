"""The weights of the model: their type, 4 bits, and the adapter."""

from __future__ import annotations

from rebel.config import RebelConfig
from rebel.settings import known
from rebel.validate.said import Complaints, said

DTYPES = ("auto", "float32", "bfloat16", "float16")


def precision(config: RebelConfig) -> Complaints:
    """One type, which the device has."""
    if config.dtype not in DTYPES:
        yield f"{said(config, 'dtype')}: {', '.join(DTYPES[:-1])} or {DTYPES[-1]} is expected"
    if config.bf16 and config.fp16:
        yield "--bf16 and --fp16 exclude each other; use one of them"
    if config.fp16 and config.use_cpu:
        yield "--fp16 needs a CUDA device, and --use_cpu stays on the CPU; use --bf16, or neither"


OF_ADAPTER = ("lora_r", "lora_alpha", "lora_target_modules")


def adapter(config: RebelConfig) -> Complaints:
    """There is an adapter where one is needed."""
    if not config.adapter:
        for name in OF_ADAPTER:
            if getattr(config, name) != known()[name].default:
                yield f"{said(config, name)} is for an adapter, and none is trained; add --use_peft, or leave it out"
    if config.load_in_4bit and not config.adapter:
        yield "--load_in_4bit without --use_peft: 4-bit weights cannot be trained themselves; add --use_peft"
    if config.reference == "base" and not config.adapter:
        yield "--reference base is the model without its adapter: add --use_peft, or use --reference model"
    if config.reference == "initial_adapter" and not config.adapter_path:
        yield "--reference initial_adapter is the trained adapter of --adapter_path, which is not given"
