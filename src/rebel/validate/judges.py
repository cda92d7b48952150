"""Judges, and those behind an endpoint: nothing that may be a key is shown."""

from __future__ import annotations

import re

from rebel.config import RebelConfig
from rebel.validate.said import Complaints, said


def judge(config: RebelConfig) -> Complaints:
    """An endpoint has an address without a key, and belongs to a judge behind it."""
    if re.fullmatch(r"[A-Za-z_]\w*", config.judge_api_key_env) is None:  # not shown: it may be a key
        yield "--judge_api_key_env is no name of an environment variable; give the name, such as OPENAI_API_KEY"
    if config.judge_base_url is not None:
        if not re.match(r"https?://[^/]", config.judge_base_url):
            yield f"{said(config, 'judge_base_url')}: an address such as http://127.0.0.1:8000/v1 is expected"
        elif "@" in config.judge_base_url or "?" in config.judge_base_url:  # not shown, for the same reason
            yield "--judge_base_url holds more than an address; the key goes into an environment variable"
    secret = [name for name in config.judge_args if re.search(r"key|auth|token$|secret|header", name, re.IGNORECASE)]
    if secret:
        yield f"--judge_args {secret[0]} looks like a key; that goes into an environment variable"
    remote = any((spec or "").startswith("openai:") for spec in (config.judge, config.eval_judge))
    if not remote and (config.judge_base_url or config.judge_args):
        name = "judge_base_url" if config.judge_base_url else "judge_args"
        yield f"--{name} is for a judge behind an endpoint: use --judge openai:MODEL, or leave it out"
