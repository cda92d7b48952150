"""vLLM as a server, on another device or machine: HTTP for tokens, files in a folder that both see for weights.

Every answer is waited for until a deadline, and what fails is named by what was asked.
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from safetensors.torch import save_file
from torch import Tensor

from rebel.errors import RebelError, RunStopped
from rebel.rewards.functions import event_loop
from rebel.samplers.vllm import check_version

KEY = "VLLM_API_KEY"
"""The environment variable with the server's key, for vLLM itself and for us."""

FILE_BYTES = 4 * 2**30
"""Weights that one file holds at most, and this process at once beside the model."""

PAUSE = 0.5
"""Seconds between two looks at a server that is not there yet."""

PREFIX = "weights-for-vllm-"

Ask = Callable[[httpx.AsyncClient], Awaitable[Any]]


@dataclass(frozen=True)
class Server:
    """The vLLM server at `address` that serves `model`; weights reach it through `folder`."""

    address: str
    model: str
    folder: Path
    deadline: float

    def draw(self, prompts: Sequence[Sequence[int]], parameters: Sequence[Mapping[str, Any]]) -> list[list[list[int]]]:
        async def all_of_them(client: httpx.AsyncClient) -> list[dict[str, Any]]:
            asked = zip(prompts, parameters, strict=True)
            return await asyncio.gather(*(self.complete(client, ids, how) for ids, how in asked))

        count = sum(how["n"] for how in parameters)
        answers = self.waited(all_of_them, f"{count} completions of {len(prompts)} prompts")
        return [[choice["token_ids"] for choice in choices(answer)] for answer in answers]

    def token_logp(self, ids: Sequence[int]) -> list[float]:
        how = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        answer = self.waited(lambda client: self.complete(client, ids, how), "log-probabilities of the probe")
        known = choices(answer)[0]["prompt_logprobs"][1:]
        return [found[str(token)]["logprob"] for token, found in zip(ids[1:], known, strict=True)]

    async def complete(self, client: httpx.AsyncClient, ids: Sequence[int], how: Mapping[str, Any]) -> Any:
        body = {"model": self.model, "prompt": list(ids), "return_token_ids": True, **how}
        return await answer_of(client.post("/v1/completions", json=body))

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=PREFIX) as folder:
            Path(folder).chmod(0o755)  # the server may be another user's
            write(weights, Path(folder))
            order = {"method": "reload_weights", "kwargs": {"weights_path": str(Path(folder).resolve())}}

            async def reload(client: httpx.AsyncClient) -> Any:
                await answer_of(client.post("/collective_rpc", json=order))
                return await answer_of(client.post("/reset_prefix_cache"))  # keys and values by the former weights

            kept = self.waited(reload, f"loading the policy's weights from {folder} (it must see that folder too)")
        if not (kept or {}).get("success", True):
            raise RunStopped(
                f"the vLLM server at {self.address} kept what it had computed with former weights, since it is still "
                "at work for somebody: let nobody else use it"
            )

    def rest(self) -> None:
        """It has memory of its own."""

    def waited(self, ask: Ask, what: str) -> Any:
        """The answer, or RunStopped with `what` was waited for."""
        try:
            return self.asked(ask, self.deadline)
        except TimeoutError:
            raise RunStopped(
                f"the vLLM server at {self.address} gave no answer within --vllm_deadline {self.deadline:g} seconds; "
                f"waited for: {what}"
            ) from None
        except httpx.TransportError as error:
            reason = str(error) or type(error).__name__
            raise RunStopped(
                f"the vLLM server at {self.address} is gone ({reason}); waited for: {what}. Start it again and resume"
            ) from None
        except Refused as refusal:
            raise RunStopped(
                f"the vLLM server at {self.address} refuses {what}: {refusal}. Look into its log; after a failed "
                "loading of weights it has to be started again"
            ) from None

    def asked(self, ask: Ask, seconds: float) -> Any:
        """The answer within this time, as it is."""
        key = os.environ.get(KEY)
        headers = {"Authorization": f"Bearer {key}"} if key else {}

        async def answered() -> Any:
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
            async with httpx.AsyncClient(
                base_url=self.address, headers=headers, timeout=None, limits=limits, trust_env=False
            ) as client:
                return await asyncio.wait_for(ask(client), seconds)

        return asyncio.run_coroutine_threadsafe(answered(), event_loop()).result()


class Refused(Exception):
    """The server answered, and said no."""


async def answer_of(request: Awaitable[httpx.Response]) -> Any:
    """The JSON of an answer; None where there is none."""
    response = await request
    if response.status_code != 200:
        raise Refused(f"HTTP {response.status_code}: {' '.join(response.text.split())[:400]}")
    try:
        return response.json() if response.content else None
    except json.JSONDecodeError:
        raise Refused(f"what it says is no JSON: {response.text[:100]!r}") from None


def choices(answer: Any) -> list[dict[str, Any]]:
    """The completions of an answer, in the order of their seeds."""
    return sorted(answer["choices"], key=lambda choice: choice["index"])


def write(weights: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """The weights in safetensors files of a size that memory has room for."""
    for number, part in enumerate(parts(weights)):
        save_file(part, folder / f"model-{number:05d}.safetensors")


def parts(weights: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Weights by name, as many at a time as one file holds."""
    held: dict[str, Tensor] = {}
    for name, weight in weights:
        own = weight.detach().cpu().contiguous()
        if held and sum(w.nbytes for w in held.values()) + own.nbytes > FILE_BYTES:
            yield held
            held = {}
        held[name] = own.clone() if own.data_ptr() in {w.data_ptr() for w in held.values()} else own  # tied weights
    yield held


# -- before any work -------------------------------------------------------------------------------------------------


def server(address: str, name: str, folder: Path, longest: int, deadline: float) -> Server:
    """The server at `address`, found fit for a run of the model `name` with sequences of up to `longest` tokens.

    One that is not there yet is waited for. Raises RebelError for one that is no vLLM of a tested version, holds
    another model, takes shorter sequences only, or takes no weights.
    """
    found = Server(address, name, folder, deadline)
    check_version(known(found, "/version", "its version").get("version"), f"the server at {address}")
    served = known(found, "/v1/models", "its models").get("data") or []
    mine = [model for model in served if same_model(name, model)]
    if not mine:
        held = ", ".join(str(model.get("id")) for model in served) or "no model"
        raise RebelError(
            f"the vLLM server at {address} holds {held}, and --model_name_or_path is {name}: start it with that model "
            "(one that lies elsewhere over there: with --served-model-name and this name)"
        )
    if mine[0].get("max_model_len", longest) < longest:
        raise RebelError(
            f"the vLLM server at {address} takes {mine[0]['max_model_len']} tokens, and --max_prompt_length with "
            f"--max_completion_length may need {longest}: start it with --max-model-len {longest}, or lower those"
        )
    known(found, "/is_sleeping", "whether it takes weights (VLLM_SERVER_DEV_MODE=1 in its environment lets it)")
    return Server(address, mine[0]["id"], folder, deadline)


def known(server: Server, path: str, what: str) -> dict[str, Any]:
    """What the server says at `path`, waited for until the deadline where it is not there yet."""
    until = time.monotonic() + server.deadline
    while True:
        try:
            left = max(until - time.monotonic(), PAUSE)
            return dict(server.asked(lambda client: answer_of(client.get(path)), left))
        except (httpx.TransportError, TimeoutError) as error:
            reason = str(error) or type(error).__name__
        except (Refused, TypeError, ValueError) as error:
            raise RebelError(
                f"--vllm_server_base_url {server.address}: asked for {what}, what answers there says: {error}"
            ) from None
        if time.monotonic() + PAUSE > until:
            raise RebelError(
                f"--vllm_server_base_url {server.address}: no vLLM server answered within --vllm_deadline "
                f"{server.deadline:g} seconds ({reason}); waited for: {what}. Start one as in docs/vllm.md"
            )
        time.sleep(PAUSE)


def same_model(name: str, served: Mapping[str, Any]) -> bool:
    """Whether a served model is the one of this name, of the same folder or repository wherever that lies."""
    last = name.rstrip("/").rpartition("/")[2]
    given = [str(served.get(key) or "").rstrip("/") for key in ("id", "root")]
    return any(found and found.rpartition("/")[2] == last for found in given)
