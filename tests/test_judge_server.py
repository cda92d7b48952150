"""The judge's client against a real OpenAI-compatible server with a real model: `transformers serve`."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rebel.rewards.functions import Notes
from rebel.rewards.judge_load import Service, load_judge
from rebel.rewards.judges import ask
from rebel.rewards.winrate import WinRate
from rebel.types import Comparison, Completion, Prompt, Rollout

MISSING = [name for name in ("openai", "fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
COMMAND = Path(sys.executable).with_name("transformers")
pytestmark = pytest.mark.skipif(
    bool(MISSING) or not COMMAND.exists(),
    reason=f"transformers serve needs {', '.join(MISSING) or COMMAND}: pip install 'rebel-rl[dev]'",
)

GOOD, BAD = [f"good{k}" for k in range(6)], [f"bad{k}" for k in range(6)]
WORDS = ["<pad>", "<s>", "</s>", "user", "assistant", "A", "B", "tie", "or", "?", *GOOD, *BAD]
TEMPLATE = "{prompt} ? {first} or {second} ?"
CHAT = (
    "{% for m in messages %}{{ '<s> ' + m['role'] + ' ' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' assistant' }}{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    made.chat_template = CHAT
    return made


def example(source: random.Random) -> tuple[str, str]:
    """A question and its right answer: good beats bad, and two of a kind are a tie."""
    pools, said = source.choice([((GOOD, BAD), "A"), ((BAD, GOOD), "B"), ((GOOD, GOOD), "tie"), ((BAD, BAD), "tie")])
    first, second = (source.choice(pool) for pool in pools)
    return TEMPLATE.format(prompt=source.choice(["good0", "bad1", "or"]), first=first, second=second), said


@pytest.fixture(scope="module")
def tiny_judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model of one layer that has learnt to answer A, B or tie."""
    torch.manual_seed(0)
    source, words = random.Random(0), tokenizer()
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = LlamaConfig(
        vocab_size=len(WORDS),
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,  # learns within seconds
        **sizes,
        **special,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(200):
        rows = [example(source) for _ in range(64)]
        texts = [f"<s> user {question} assistant {said} </s>" for question, said in rows]
        ids = words(texts, return_tensors="pt", add_special_tokens=False)["input_ids"]
        labels = ids.clone()
        labels[:, :-2] = -100  # what is learnt is the answer and its end
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05, "the judge has learnt its lesson"
    folder = tmp_path_factory.mktemp("judge")
    model.eval().save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(tiny_judge: Path) -> Iterator[str]:
    """The address of a server of that model, which ends with the tests."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [COMMAND, "serve", tiny_judge, "--host", "127.0.0.1", "--port", port, "--device", "cpu"]
    log = tiny_judge / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            list(map(str, words)), stdout=out, stderr=subprocess.STDOUT, env={**os.environ, "HF_HUB_OFFLINE": "1"}
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for(url: str, process: subprocess.Popen, log: Path, seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the server ended by itself:\n{log.read_text()[-2000:]}"
        try:
            with urllib.request.urlopen(url, timeout=2) as response:
                assert json.load(response) == {"status": "ok"}
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    pytest.fail(f"no answer within {seconds:g} seconds:\n{log.read_text()[-2000:]}")


def test_a_real_model_behind_a_real_server(server: str, tiny_judge: Path, tmp_path: Path) -> None:
    (tmp_path / "template.txt").write_text(TEMPLATE)
    notes = Notes()
    service = Service(base_url=server, cache=tmp_path / "answers.sqlite", deadline=60.0, concurrency=4)
    judge = load_judge(f"openai:{tiny_judge}", notes, str(tmp_path / "template.txt"), service)
    asked = [Comparison(Prompt("good0"), *pair) for pair in (("good1", "bad2"), ("bad3", "good4"), ("good1", "good2"))]
    found = ask(judge, asked)
    assert found.probabilities == [1.0, 0.0, 0.5]
    assert found.metrics == {"unanswered": 0, "swap_gap": 0, "contradictions": 0}
    first = notes.take_metrics()
    assert first["judge/unparsable"] == 0 and first["judge/ties"] == pytest.approx(1 / 3)

    rollout = Rollout(Prompt("good0"), tuple(Completion(y, None) for y in ("good1", "bad2", "bad3")))
    (scored,) = WinRate(judge, notes=notes)([rollout])
    assert scored.rewards is not None
    assert scored.rewards.tolist() == pytest.approx([2.5 / 3, 1 / 3, 1 / 3])
    assert notes.take_metrics()["judge/cached"] == pytest.approx(2 / 6), "one pair had been asked about"
    shutil.rmtree(tmp_path)


def test_the_same_model_in_this_process(tiny_judge: Path, tmp_path: Path) -> None:
    (tmp_path / "template.txt").write_text(TEMPLATE)
    judge = load_judge(str(tiny_judge), template=str(tmp_path / "template.txt"), device="cpu")
    answers = judge([Comparison(Prompt("good0"), "good1", "bad2"), Comparison(Prompt("good0"), "bad3", "good4")])
    assert answers[0] is not None and answers[0] > 0.95
    assert answers[1] is not None and answers[1] < 0.05
