"""The client of a vLLM server against a scripted one: slow, gone, another model, another program."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from rebel.errors import RebelError, RunStopped
from rebel.samplers import server as client
from rebel.samplers.server import Server, server
from rebel.samplers.weights import weights_of

Body = dict[str, Any]
Script = dict[str, Any]
"""What is answered at each path: JSON with status 200, (status, JSON), or a function of the request that gives one."""

GOOD: Script = {
    "/version": {"version": "0.31.0"},
    "/v1/models": {"data": [{"id": "org/policy", "root": "/models/policy", "max_model_len": 64}]},
    "/is_sleeping": {"is_sleeping": False},
    "/collective_rpc": {"results": [None]},
    "/reset_prefix_cache": {"success": True},
}


class Scripted(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, script: Script) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script = {**GOOD, **script}
        self.seen: list[tuple[str, Body]] = []
        self.keys: set[str | None] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that gave up are part of the script."""


class Handler(BaseHTTPRequestHandler):
    server: Scripted

    def do_GET(self) -> None:
        self.answer({})

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("content-length") or 0))
        self.answer(json.loads(content) if content else {})

    def answer(self, body: Body) -> None:
        self.server.seen.append((self.path, body))
        self.server.keys.add(self.headers["authorization"])
        reply = self.server.script.get(self.path, (404, {"detail": "Not Found"}))
        reply = reply(body) if callable(reply) else reply
        if reply is None:  # hung up in the middle
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        status, found = reply if isinstance(reply, tuple) else (200, reply)
        content = found if isinstance(found, bytes) else json.dumps(found).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        for part in range(0, len(content), 8) if status == 299 else ():
            self.wfile.write(content[part : part + 8])
            time.sleep(0.1)
        if status != 299:
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Silence."""


@contextmanager
def serving(script: Script | None = None) -> Iterator[Scripted]:
    scripted = Scripted(script or {})
    threading.Thread(target=scripted.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield scripted
    finally:
        scripted.shutdown()
        scripted.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "PAUSE", 0.05)


def found(scripted: Scripted, folder: Path = Path(), deadline: float = 5.0, longest: int = 64) -> Server:
    return server(scripted.url, "somewhere/policy", folder, longest, deadline)


def completions(body: Body) -> Any:
    """As many as are asked for, in an order of the server's own, made of the prompt and the seed."""
    choices = [{"index": k, "token_ids": [*body["prompt"], body["seed"] + k]} for k in range(body["n"])]
    return {"choices": choices[::-1]}


# -- what is asked and sent ------------------------------------------------------------------------------------------


def test_token_ids_go_in_and_out_in_their_order() -> None:
    with serving({"/v1/completions": completions}) as scripted:
        drawn = found(scripted).draw([[5, 6], [7]], [{"n": 2, "seed": 10}, {"n": 1, "seed": 20}])
    assert drawn == [[[5, 6, 10], [5, 6, 11]], [[7, 20]]]
    asked = [body for path, body in scripted.seen if path == "/v1/completions"]
    assert all(body["model"] == "org/policy" and body["return_token_ids"] for body in asked)


def test_prompts_are_asked_for_together() -> None:
    together = threading.Barrier(120, timeout=10)

    def all_at_once(body: Body) -> Any:
        together.wait()
        return completions(body)

    with serving({"/v1/completions": all_at_once}) as scripted:
        drawn = found(scripted).draw([[k] for k in range(120)], [{"n": 1, "seed": 0}] * 120)
    assert drawn == [[[k, 0]] for k in range(120)]


def test_log_probabilities_are_those_of_the_tokens_themselves() -> None:
    def scored(body: Body) -> Any:
        logp = [None, {"6": {"logprob": -1.5}, "9": {"logprob": -0.1}}, {"7": {"logprob": -2.5}}]
        return {"choices": [{"index": 0, "prompt_logprobs": logp if body["prompt_logprobs"] == 0 else None}]}

    with serving({"/v1/completions": scored}) as scripted:
        assert found(scripted).token_logp([5, 6, 7]) == [-1.5, -2.5]


@pytest.mark.parametrize("most", [2**32, 5000])
def test_weights_lie_in_the_folder_while_they_are_loaded(
    most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = tiny.policy("llama", tie_word_embeddings=True)
    files: list[int] = []
    read: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(client, "FILE_BYTES", most)

    def load(body: Body) -> Any:
        assert body["method"] == "reload_weights"
        for file in sorted(Path(body["kwargs"]["weights_path"]).glob("*.safetensors")):
            files.append(file.stat().st_size)
            read.update(load_file(file))
        return {"results": [None]}

    with serving({"/collective_rpc": load}) as scripted:
        found(scripted, tmp_path / "new").load(weights_of(policy))
    paths = [path for path, _ in scripted.seen]
    assert paths.index("/collective_rpc") < paths.index("/reset_prefix_cache")
    assert len(files) == 1 if most > 5000 else len(files) > 2
    expected = dict(weights_of(policy))
    assert read.keys() == expected.keys() and all(torch.equal(read[name], expected[name]) for name in read)
    assert not list((tmp_path / "new").iterdir())


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "very-secret")
    with serving() as scripted:
        found(scripted)
    assert scripted.keys == {"Bearer very-secret"}


# -- servers that a run cannot use: an error before any work ---------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ({"/version": {"version": "0.22.0"}}, r"the server at http\S+ is vLLM 0\.22\.0, which is too old"),
        ({"/version": {"version": "0.40.0"}}, "too new"),
        ({"/version": (404, {"detail": "Not Found"})}, r"asked for its version, what answers there says: HTTP 404"),
        ({"/version": b"<html>hello</html>"}, r"what it says is no JSON: '<html>hello"),
        ({"/version": [1, 2]}, r"asked for its version, what answers there says"),
        ({"/v1/models": {"data": []}}, r"holds no model, and --model_name_or_path is somewhere/policy"),
        (
            {"/v1/models": {"data": [{"id": "other", "root": "/x/other-policy"}]}},
            r"holds other, and --model_name_or_path is somewhere/policy: start it with that model.*--served-model-name",
        ),
        (
            {"/v1/models": {"data": [{"id": "policy", "max_model_len": 63}]}},
            r"takes 63 tokens.*--max_prompt_length with --max_completion_length may need 64: start it with --max-model",
        ),
        ({"/is_sleeping": (404, {"detail": "Not Found"})}, r"takes weights \(VLLM_SERVER_DEV_MODE=1 .*HTTP 404"),
        ({"/version": (401, {"error": "Unauthorized"})}, "HTTP 401"),
    ],
)
def test_a_server_that_cannot_be_used_is_refused(script: Script, words: str) -> None:
    with serving(script) as scripted, pytest.raises(RebelError, match=words):
        found(scripted)
    assert not any(path in ("/collective_rpc", "/v1/completions") for path, _ in scripted.seen)


def test_a_server_that_is_not_there_is_waited_for() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    began = time.monotonic()
    with pytest.raises(RebelError, match=r"no vLLM server answered within --vllm_deadline 0\.4 seconds .*its version"):
        server(address, "policy", Path(), 64, 0.4)
    assert 0.3 < time.monotonic() - began < 3


def test_a_server_that_comes_late_is_taken() -> None:
    calls: list[int] = []

    def late(body: Body) -> Any:
        calls.append(1)
        return None if len(calls) < 4 else GOOD["/version"]

    with serving({"/version": late}) as scripted:
        assert found(scripted).model == "org/policy"
    assert len(calls) == 4


# -- servers that fail in the middle of a run ------------------------------------------------------------------------


def draw(given: Server) -> Any:
    return given.draw([[5], [6]], [{"n": 3, "seed": 0}] * 2)


def load(given: Server) -> Any:
    return given.load({"a": torch.zeros(2)}.items())


def probe(given: Server) -> Any:
    return given.token_logp([1, 2])


WAITS = [
    (draw, "/v1/completions", "6 completions of 2 prompts"),
    (probe, "/v1/completions", "log-probabilities of the probe"),
    (load, "/collective_rpc", r"loading the policy's weights from \S+ \(it must see that folder too\)"),
    (load, "/reset_prefix_cache", "loading the policy's weights"),
]


@pytest.mark.parametrize(("ask", "path", "what"), WAITS)
def test_every_wait_has_a_deadline_and_says_what_it_was_for(
    ask: Callable[[Server], Any], path: str, what: str, tmp_path: Path
) -> None:
    with serving({path: lambda body: time.sleep(3)}) as scripted:
        waiting = found(scripted, tmp_path, deadline=0.5)
        began = time.monotonic()
        with pytest.raises(
            RunStopped, match=rf"no answer within --vllm_deadline 0\.5 seconds; waited for: {what}"
        ) as stopped:
            ask(waiting)
    assert time.monotonic() - began < 2 and scripted.url in str(stopped.value)


def test_a_server_that_sends_a_little_at_a_time_does_not_stretch_the_deadline() -> None:
    with serving({"/v1/completions": lambda body: (299, completions(body))}) as scripted:
        began = time.monotonic()
        with pytest.raises(RunStopped, match="no answer within"):
            draw(found(scripted, deadline=0.5))
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(("ask", "path", "what"), WAITS)
def test_a_server_that_hangs_up_is_gone(ask: Callable[[Server], Any], path: str, what: str, tmp_path: Path) -> None:
    with (
        serving({path: lambda body: None}) as scripted,
        pytest.raises(RunStopped, match=rf"is gone \(.*; waited for: {what}.*Start it again and resume"),
    ):
        ask(found(scripted, tmp_path))


def test_a_server_that_refuses_says_why(tmp_path: Path) -> None:
    failed = (500, {"error": {"message": "Worker failed with error 'no such folder'"}})
    words = r"refuses loading .*HTTP 500: .*no such folder.*to be started again"
    with serving({"/collective_rpc": failed}) as scripted, pytest.raises(RunStopped, match=words):
        load(found(scripted, tmp_path))
    assert "/reset_prefix_cache" not in [path for path, _ in scripted.seen]


def test_what_was_computed_with_former_weights_must_be_forgotten(tmp_path: Path) -> None:
    words = "kept what it had computed with former weights"
    with serving({"/reset_prefix_cache": {"success": False}}) as scripted, pytest.raises(RunStopped, match=words):
        load(found(scripted, tmp_path))
