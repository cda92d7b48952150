"""The judge's client against a scripted server: slow, gone, garbage, rate-limited, half an answer."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from rebel.config import RebelConfig
from rebel.errors import RebelError, RunStopped
from rebel.rewards.functions import Notes
from rebel.settings import dump
from rebel.types import Comparison, Prompt

pytest.importorskip("openai", reason="the judge's client needs openai: pip install 'rebel-rl[judge]'")

from rebel.rewards import judge_client
from rebel.rewards.judge_client import OpenAIJudge, key_of_request
from rebel.rewards.judge_load import Service, load_judge
from rebel.rewards.judges import ask

KEY = "sk-very-secret-0123456789"
Reply = tuple[int, dict[str, str], bytes]
Script = Callable[[dict[str, Any], int], Reply]


def completion(text: str | None, **changes: Any) -> bytes:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    return json.dumps(
        {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], **changes}
    ).encode()


def answer(text: str | None, status: int = 200, **headers: str) -> Reply:
    return status, headers, completion(text)


def failure(status: int, message: str, **headers: str) -> Reply:
    return status, headers, json.dumps({"error": {"message": message, "type": "x"}}).encode()


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, script: Script) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script = script
        self.lock = threading.Lock()
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.now = self.most = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that gave up are part of the script."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.keys.append(self.headers["authorization"])
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
            number = len(self.server.bodies)
        status, headers, content = self.server.script(body, number)
        with self.server.lock:
            self.server.now -= 1
        self.send_response(status)
        length = headers.pop("claimed", str(len(content)))
        for name, value in {"content-type": "application/json", "content-length": length, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Silence."""


@contextmanager
def serving(script: Script) -> Iterator[Server]:
    server = Server(script)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_client, "FIRST_PAUSE", 0.02)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def judge(server: Server, **settings: Any) -> OpenAIJudge:
    return OpenAIJudge("m", server.url, **{"deadline": 5.0, **settings})


def pairs(count: int) -> list[Comparison]:
    return [Comparison(Prompt(f"prompt {k}"), f"good {k}", f"bad {k}") for k in range(count)]


def prefers_good(body: dict[str, Any], number: int) -> Reply:
    text = body["messages"][0]["content"]
    first, second = text.index("good"), text.index("bad")
    return answer("A" if first < second else "B")


def test_both_orders_of_a_pair() -> None:
    with serving(prefers_good) as server:
        found = ask(judge(server), pairs(3))
    assert found.probabilities == [1.0, 1.0, 1.0]
    assert found.metrics == {"unanswered": 0, "swap_gap": 0, "contradictions": 0}
    assert len(server.bodies) == 6 and {body["model"] for body in server.bodies} == {"m"}
    assert server.bodies[0]["temperature"] == 0 and server.bodies[0]["max_tokens"] == 16
    assert set(server.keys) == {f"Bearer {KEY}"}


def test_a_judge_of_the_first_place_contradicts_itself() -> None:
    with serving(lambda body, number: answer("A")) as server:
        found = ask(judge(server), pairs(2))
    assert found.probabilities == [0.5, 0.5] and found.metrics["contradictions"] == 1.0


def test_ties_and_answers_that_cannot_be_understood_are_counted() -> None:
    said = {"prompt 0": "tie", "prompt 1": "I cannot decide", "prompt 2": "A", "prompt 3": ""}
    notes = Notes()
    with serving(lambda body, n: answer(next(v for k, v in said.items() if k in str(body)))) as server:
        assert judge(server, notes=notes)(pairs(4)) == [0.5, None, 1.0, None]
    expected = {"judge/unparsable": 0.5, "judge/ties": 0.25, "judge/no_answer": 0, "judge/cached": 0}
    assert notes.take_metrics() == expected | {"judge/retries": 0}


def test_a_rate_limit_is_waited_out_as_the_server_asks() -> None:
    def limited(body: dict[str, Any], number: int) -> Reply:
        return failure(429, "too many", retry_after="0.3") if number <= 2 else answer("B")

    notes = Notes()
    began = time.monotonic()
    with serving(limited) as server:
        assert judge(server, notes=notes, concurrency=1)(pairs(1)) == [0.0]
    assert 0.6 <= time.monotonic() - began < 4 and notes.take_metrics()["judge/retries"] == 2


@pytest.mark.parametrize(
    "bad",
    [
        (200, {}, b"<html>not json</html>"),
        (200, {"content_type": "text/html"}, b"<html>a proxy</html>"),
        (200, {}, b'{"choices": []}'),
        (200, {}, b"[]"),
        (200, {}, completion(None)),
        (200, {}, b""),
        (200, {"claimed": "5000"}, completion("A")[:40]),
        (500, {}, b"oops"),
        (503, {}, b""),
    ],
    ids=["html", "text", "empty", "list", "no text", "nothing", "half", "500", "503"],
)
def test_garbage_and_half_answers_are_asked_for_again(bad: Reply) -> None:
    with serving(lambda body, number: (bad[0], dict(bad[1]), bad[2]) if number == 1 else answer("A")) as server:
        assert judge(server)(pairs(1)) == [1.0]
    assert len(server.bodies) == 2


def test_one_that_is_never_answered_is_missing_and_the_others_count() -> None:
    def hangs(body: dict[str, Any], number: int) -> Reply:
        if "prompt 1" in str(body):
            return failure(500, "always")
        time.sleep(0.2)
        return answer("A")

    notes = Notes()
    with serving(hangs) as server:
        assert judge(server, deadline=1.0, notes=notes, concurrency=2)(pairs(8)) == [1.0, None, *[1.0] * 6]
    assert notes.take_metrics()["judge/no_answer"] == 1 / 8


def test_a_slow_server_runs_into_the_deadline() -> None:
    def slow(body: dict[str, Any], number: int) -> Reply:
        time.sleep(3)
        return answer("A")

    began = time.monotonic()
    with serving(slow) as server, pytest.raises(RunStopped, match="no answer within --judge_deadline 1 seconds"):
        judge(server, deadline=1.0)(pairs(2))
    assert time.monotonic() - began < 5


def test_a_server_that_is_gone_stops_the_run_at_the_deadline() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(RunStopped, match=r"gave no answer within .*[Cc]onnection"):
        OpenAIJudge("m", url, deadline=0.5)(pairs(3))


def test_what_is_refused_for_good_ends_at_once_and_names_no_key() -> None:
    def refuse(body: dict[str, Any], number: int) -> Reply:
        return failure(401, f"Incorrect API key provided: {KEY}")

    with serving(refuse) as server, pytest.raises(RebelError, match="OPENAI_API_KEY") as refused:
        judge(server)(pairs(20))
    assert "Incorrect API key provided: ***" in str(refused.value) and len(server.bodies) < 20
    assert KEY not in str(refused.value) and KEY not in repr(refused.value.__cause__)


def test_a_comparison_that_is_refused_is_missing_and_all_of_them_stop_the_run() -> None:
    def long(body: dict[str, Any], number: int) -> Reply:
        return failure(400, "context too long") if "prompt 0" in str(body) else answer("A")

    with serving(long) as server:
        assert judge(server)(pairs(2)) == [None, 1.0]
        assert len(server.bodies) == 2, "no use in asking again"
        with pytest.raises(RunStopped, match=r"refuses every request: .*context too long"):
            judge(server)(pairs(1))


def test_no_more_requests_at_once_than_allowed() -> None:
    def slow(body: dict[str, Any], number: int) -> Reply:
        time.sleep(0.05)
        return answer("A")

    with serving(slow) as server:
        assert judge(server, concurrency=3)(pairs(12)) == [1.0] * 12
    assert server.most == 3


def test_answers_are_kept_by_content_and_never_asked_for_twice(tmp_path: Path) -> None:
    cache = tmp_path / "run" / "answers.sqlite"
    notes = Notes()
    with serving(prefers_good) as server:
        assert judge(server, cache=cache)(pairs(3)) == [1.0] * 3
        again = judge(server, cache=cache, notes=notes)
        assert again([*pairs(4), pairs(1)[0]]) == [1.0] * 5
        assert len(server.bodies) == 4 and notes.take_metrics()["judge/cached"] == 4 / 5
        judge(server, cache=cache, request={"temperature": 0.5})(pairs(1))
        judge(server, cache=cache, template="{prompt} {first} or {second}")(pairs(1))
        assert len(server.bodies) == 6, "another request is another question"
    assert KEY.encode() not in cache.read_bytes()


def test_answers_before_a_failure_are_kept(tmp_path: Path) -> None:
    with serving(lambda body, number: answer("A") if number <= 3 else failure(500, "down")) as server:
        with pytest.raises(RunStopped, match="The answers so far are kept"):
            judge(server, cache=tmp_path / "a", deadline=0.5, concurrency=1)(pairs(5))
        assert len(judge(server, cache=tmp_path / "a").recall(keys(server, 5))) == 3


def keys(server: Server, count: int) -> list[str]:
    asked = judge(server)
    return [key_of_request(asked.address, asked.body(pair)) for pair in pairs(count)]


def test_a_file_that_is_no_cache_is_named(tmp_path: Path) -> None:
    (tmp_path / "answers").write_text("something else entirely, and long enough to be no database")
    with serving(prefers_good) as server, pytest.raises(RebelError, match=r"cannot be used: .*move it away"):
        judge(server, cache=tmp_path / "answers")(pairs(1))


def test_the_key_is_of_the_environment_and_nowhere_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("MY_KEY", "other-secret")
    caplog.set_level(logging.DEBUG)
    with serving(prefers_good) as server:
        service = Service(server.url, "MY_KEY", {"max_tokens": None}, cache=tmp_path / "answers")
        made = load_judge("openai:m", service=service)
        assert made(pairs(1)) == [1.0]
    assert server.keys == ["Bearer other-secret"] and "max_tokens" not in server.bodies[0]
    config = RebelConfig(judge="openai:m", judge_api_key_env="MY_KEY", judge_base_url=server.url)
    for shown in (caplog.text, repr(made), repr(service), dump(config), str(vars(made))):
        assert "other-secret" not in shown and KEY not in shown


def test_a_server_of_ones_own_needs_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with serving(prefers_good) as server:
        assert judge(server)(pairs(1)) == [1.0]
