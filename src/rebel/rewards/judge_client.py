"""A language model behind an OpenAI-compatible endpoint as a judge: patient, in parallel, and never asked twice.

The key comes from the environment. It is in no setting, no file and no message of this package.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai

from rebel.errors import RebelError, RunStopped
from rebel.rewards.functions import Notes, event_loop
from rebel.rewards.judge_text import TEMPLATE, question, verdict
from rebel.rewards.judges import Answers
from rebel.types import Comparison

REQUEST: dict[str, Any] = {"temperature": 0.0, "max_tokens": 16}
"""What is sent along. Reasoning models want more tokens, some under another name: --judge_args."""

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 20.0
ALL_REFUSED = (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError)
"""No use in asking for any comparison."""
ONE_REFUSED = (openai.BadRequestError, openai.UnprocessableEntityError)
"""No use in asking for this comparison again: one that is too long for the model, for example."""
PASSING = (openai.OpenAIError, TimeoutError, ValueError)
"""Rate limits, time-outs, lost connections, errors of the server, answers that are none."""


@dataclass
class OpenAIJudge:
    """P(first > second) from the answers "A", "B" or "tie" of a model that is asked by chat messages.

    A request that fails for a passing reason (rate limit, time-out, connection, server error) is repeated, with pauses
    that grow, until `deadline` seconds after it began. Then it has no answer, and the run stops if nobody else's was
    answered in that time either. Answers are kept in the file `cache` by the content of the whole request.
    """

    model: str
    base_url: str | None = None
    key_variable: str = "OPENAI_API_KEY"
    template: str = TEMPLATE
    request: Mapping[str, Any] = field(default_factory=dict)
    concurrency: int = 8
    deadline: float = 120.0
    cache: Path | None = None
    notes: Notes = field(default_factory=Notes)
    counts: dict[str, int] = field(default_factory=dict)
    answered: float = -1.0

    def __post_init__(self) -> None:
        key = os.environ.get(self.key_variable, "")
        if not key and self.base_url is None and not os.environ.get("OPENAI_BASE_URL"):
            raise RebelError(
                f"--judge openai:{self.model} needs a key: set the environment variable {self.key_variable}, or give "
                "the --judge_base_url of a server that asks for none"
            )
        timeout = max(1.0, self.deadline / 2)
        self.client = openai.AsyncOpenAI(api_key=key or "none", base_url=self.base_url, max_retries=0, timeout=timeout)

    @property
    def name(self) -> str:
        return self.model.rpartition("/")[2] or self.model

    @property
    def address(self) -> str:
        return str(self.client.base_url)

    def __call__(self, comparisons: Sequence[Comparison]) -> Answers:
        bodies = [self.body(comparison) for comparison in comparisons]
        keys = [key_of_request(self.address, body) for body in bodies]
        known = self.recall(keys)
        new = {key: body for key, body in zip(keys, bodies, strict=True) if key not in known}
        self.counts = {"retries": 0}
        if new:
            known |= asyncio.run_coroutine_threadsafe(self.ask_all(new), event_loop()).result()
        answers = [known.get(key) for key in keys]
        verdicts = [None if answer is None else verdict(answer) for answer in answers]
        self.report(answers, verdicts, cached=len(keys) - len(new))
        return verdicts

    def body(self, comparison: Comparison) -> dict[str, Any]:
        """The request: settings of None are left out."""
        messages = [{"role": "user", "content": question(self.template, comparison)}]
        given = {"model": self.model, "messages": messages, **REQUEST, **self.request}
        return {name: value for name, value in given.items() if value is not None}

    def report(self, answers: Sequence[str | None], verdicts: Answers, cached: int) -> None:
        """What becomes a metric of the run; the shares are of all comparisons."""
        count = len(answers)
        if not count:
            return
        unparsable = sum(a is not None and v is None for a, v in zip(answers, verdicts, strict=True))
        found = {
            "unparsable": unparsable / count,
            "no_answer": sum(a is None for a in answers) / count,
            "ties": sum(v == 0.5 for v in verdicts) / count,
            "cached": cached / count,
            "retries": self.counts["retries"],
        }
        for name, value in found.items():
            self.notes.log_metric(f"judge/{name}", value)

    async def ask_all(self, new: Mapping[str, dict[str, Any]]) -> dict[str, str]:
        """The answers of all requests that got one, each kept as soon as it is there."""
        places = asyncio.Semaphore(self.concurrency)
        refusals: list[str] = []
        tasks = [asyncio.create_task(self.ask_one(places, *item, refusals)) for item in new.items()]
        try:
            answers = await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise
        if len(refusals) == len(new):
            raise RunStopped(f"the judge {self.model} at {self.address} refuses every request: {refusals[0]}")
        return {key: answer for key, answer in zip(new, answers, strict=True) if answer is not None}

    async def ask_one(
        self, places: asyncio.Semaphore, key: str, body: dict[str, Any], refusals: list[str]
    ) -> str | None:
        """What the model wrote; None if this one request is refused, or unanswered at its deadline."""
        async with places:
            began, pause = time.monotonic(), FIRST_PAUSE
            while True:
                try:
                    answer = await self.attempt(body, began)
                except ALL_REFUSED as error:
                    raise RebelError(self.refusal(error)) from None
                except ONE_REFUSED as error:
                    refusals.append(self.clean(error))
                    return None
                except PASSING as error:
                    wait = max(pause * random.uniform(0.8, 1.2), asked_to_wait(error))
                    if time.monotonic() + wait - began > self.deadline:
                        return self.give_up(began, error)
                    self.counts["retries"] += 1
                    await asyncio.sleep(wait)
                    pause = min(2 * pause, LONGEST_PAUSE)
                else:
                    self.answered = time.monotonic()
                    self.keep(key, answer)
                    return answer

    async def attempt(self, body: dict[str, Any], began: float) -> str:
        """What the model wrote, within what is left of the time."""
        left = began + self.deadline - time.monotonic()
        return text_of(await asyncio.wait_for(self.client.chat.completions.create(**body), left))

    def give_up(self, began: float, error: Exception) -> None:
        """Nothing, if the server answers others; else the run cannot go on."""
        if self.answered < began:
            raise RunStopped(
                f"the judge {self.model} at {self.address} gave no answer within --judge_deadline {self.deadline:g} "
                f"seconds: {self.clean(error)}. The answers so far are kept"
            )

    def refusal(self, error: Exception) -> str:
        return (
            f"the judge {self.model} at {self.address} refuses: {self.clean(error)}. Check --judge, --judge_base_url, "
            f"and the key in the environment variable {self.key_variable}"
        )

    def clean(self, error: Exception) -> str:
        """The first line of an error, without the key, which servers like to repeat."""
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        key = self.client.api_key
        return text.replace(key, "***")[:300] if key not in ("", "none") else text[:300]

    # -- answers on disk -----------------------------------------------------------------------------------------

    def recall(self, keys: Sequence[str]) -> dict[str, str]:
        """The answers that are on disk already."""
        if self.cache is None or not self.cache.exists():
            return {}
        known: dict[str, str] = {}
        with self.answers() as table:
            for key in keys:
                row = table.execute("SELECT answer FROM answers WHERE request = ?", (key,)).fetchone()
                if row:
                    known[key] = row[0]
        return known

    def keep(self, key: str, answer: str) -> None:
        if self.cache is not None:
            with self.answers() as table:
                table.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, answer))

    @contextmanager
    def answers(self) -> Iterator[sqlite3.Connection]:
        """The table of answers; what is written is on disk when the context ends."""
        assert self.cache is not None, "there is a cache to open"
        self.cache.parent.mkdir(parents=True, exist_ok=True)
        try:
            with closing(sqlite3.connect(self.cache, timeout=60)) as table, table:
                table.execute("CREATE TABLE IF NOT EXISTS answers (request TEXT PRIMARY KEY, answer TEXT NOT NULL)")
                yield table
        except sqlite3.DatabaseError as error:
            raise RebelError(f"the judge's answers in {self.cache} cannot be used: {error}; move it away") from None


def key_of_request(address: str, body: Mapping[str, Any]) -> str:
    """The name of a request in the cache: a digest of all that is asked, and of whom."""
    return hashlib.sha256(json.dumps([address, body], sort_keys=True).encode()).hexdigest()


def text_of(response: Any) -> str:
    """What the model wrote. ValueError for half an answer: no choice in it, or no text."""
    choices = getattr(response, "choices", None)
    content = choices[0].message.content if choices and choices[0].message else None
    if not isinstance(content, str):
        raise ValueError("the answer holds no text")
    return content


def asked_to_wait(error: Exception) -> float:
    """Seconds that a server wants to be left alone (Retry-After), within reason."""
    response = getattr(error, "response", None)
    try:
        return min(float(response.headers["retry-after"]), 60.0) if response is not None else 0.0
    except (KeyError, ValueError):
        return 0.0
