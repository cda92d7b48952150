"""vLLM, in this process or as a server, and drawing one step ahead."""

from __future__ import annotations

import re

from rebel.config import RebelConfig
from rebel.validate.said import Complaints, said


def vllm(config: RebelConfig) -> Complaints:
    """Settings of vLLM come with it, and those of a server with a server."""
    if config.sampler != "vllm":
        yield from _no_vllm(config)
        return
    if config.load_in_4bit:
        yield "--sampler vllm with --load_in_4bit: it is not sent weights of 4 bits; use --sampler generate"
    if config.vllm_mode == "server":
        yield from _vllm_server(config)
    else:
        for name in ("vllm_server_base_url", "vllm_weights_dir"):
            if getattr(config, name) is not None:
                yield f"{said(config, name)} is for a server: add --vllm_mode server"


def _no_vllm(config: RebelConfig) -> Complaints:
    for name, value in vars(config).items():
        if name.startswith("vllm_") and value != getattr(RebelConfig, name):
            yield f"--{name} is for vLLM: add --sampler vllm"


def _vllm_server(config: RebelConfig) -> Complaints:
    address = config.vllm_server_base_url
    if address is None:
        yield "--vllm_mode server: where it is is not given; use --vllm_server_base_url, as in http://127.0.0.1:8000"
    elif not re.fullmatch(r"https?://[^/@?]+(/[^@?]*)?", address):  # not shown: it may hold a key
        yield "--vllm_server_base_url: an address such as http://127.0.0.1:8000 is expected, without a key"


def meanwhile(config: RebelConfig) -> Complaints:
    """Something is drawn, and what is drawn ahead is known by then."""
    if config.sampler == "vllm" and (config.offline or config.from_rollouts):
        yield f"--sampler vllm with {'--offline' if config.offline else '--from_rollouts'}: nothing is drawn"
    if not config.one_step_ahead:
        return
    if config.sampler != "vllm" or config.vllm_mode != "server":
        yield "--one_step_ahead is for a vLLM server, which draws meanwhile: add --sampler vllm --vllm_mode server"
    if config.rounds is not None:
        yield "--one_step_ahead with --rounds: a round is drawn before anything is trained; use one of them"
    if config.replace_flat_groups:
        yield (
            f"{said(config, 'replace_flat_groups')} with --one_step_ahead: which prompts come next is not known "
            "before this iteration is scored; use one of them"
        )
