"""Reward functions with the calling convention of TRL: arguments by name, a number or None for each completion."""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, SupportsFloat

import torch
from jaxtyping import Float
from torch import Tensor

from rebel.errors import RebelError, RunStopped
from rebel.rewards.groups import in_groups
from rebel.types import Completion, Prompt, Rollout, Scored, TokenTrace

Case = tuple[Prompt, Completion]
Values = list[float | None]

NOT_COLUMNS = {"prompt", "completion", "completion_ids"}
PASSED = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
PICTURES = "images"
"""Passed beside `completions`, and the same, where those are pictures."""
SECONDS_OF_SEARCH = 30.0


class RewardFailed(RunStopped):
    """A reward function raised. `cases` are what it was called with: the one at fault where that could be found out."""

    def __init__(self, name: str, cases: Sequence[Case], cause: Exception) -> None:
        self.name = name
        self.cases = tuple(cases)
        given = "1 completion" if len(cases) == 1 else f"one of {len(cases)} completions"
        super().__init__(f"the reward function {name} raised {type(cause).__name__} for {given}: {cause}")


@dataclass(slots=True)
class Notes:
    """What reward functions may read of the run (`trainer_state`) and write down for it, under TRL's names."""

    trainer_state: Any = field(
        default_factory=lambda: SimpleNamespace(global_step=0, max_steps=0, epoch=0.0, is_world_process_zero=True)
    )
    columns: dict[str, list[Any]] = field(default_factory=dict)
    metrics: dict[str, list[float]] = field(default_factory=dict)

    def log_extra(self, column: str, values: Iterable[Any]) -> None:
        """Keep a value for each completion; the latest batch replaces the one before."""
        self.columns[column] = list(values)

    def log_metric(self, name: str, value: SupportsFloat) -> None:
        """Keep a number of this batch, until `take_metrics`."""
        self.metrics.setdefault(name, []).append(float(value))

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Within this context nothing that is written down is kept."""
        columns, metrics = dict(self.columns), {name: list(values) for name, values in self.metrics.items()}
        try:
            yield
        finally:
            self.columns, self.metrics = columns, metrics

    def take_metrics(self, gather: Callable[[list[Any]], list[Any]] = list) -> dict[str, float]:
        """The mean of each number written down since the last call, on all processes that `gather` collects from."""
        taken, self.metrics = self.metrics, {}
        everywhere: dict[str, list[float]] = {}
        for written in gather([taken]):
            for name, values in written.items():
                everywhere.setdefault(name, []).extend(values)
        return {name: sum(values) / len(values) for name, values in everywhere.items()}


@dataclass(frozen=True, slots=True)
class PerCompletion:
    """A reward from a function (sync or async) that is called once with all completions of a batch.

    None means that the function does not apply to that completion; NaN and infinity are values nobody can use.
    """

    fn: Callable[..., Any]
    name: str = ""
    notes: Notes = field(default_factory=Notes)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or name_of(self.fn))
        _check_arguments(self.fn, self.name)

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Scored]:
        rewards = as_rewards(self.begin(rollouts)())
        return in_groups(rollouts, rewards, {self.name: rewards})

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises RebelError where the function needs a column that these prompts lack, or takes no such columns."""
        columns = columns_of(prompts)
        parameters = parameters_of(self.fn)
        lacking = [name for name in required(parameters) if name not in (*columns, *PASSED, PICTURES)]
        if lacking:
            raise RebelError(
                f"the reward function {self.name} needs the column {' and '.join(lacking)}; "
                f"the dataset has {', '.join(columns) or 'no column'} beside the prompt"
            )
        too_many = [name for name in columns if name not in parameters]
        if parameters and too_many and not takes_any(parameters):
            raise RebelError(
                f"the reward function {self.name} does not take the column {too_many[0]} of the dataset: "
                "end its arguments with **kwargs"
            )

    def begin(self, rollouts: Sequence[Rollout]) -> Callable[[], Values]:
        """A call that gives the values in the order of the completions. An async function is under way before it."""
        cases = [(rollout.prompt, completion) for rollout in rollouts for completion in rollout.completions]
        if not cases:
            return list
        self.check([rollout.prompt for rollout in rollouts])
        arguments = _arguments(cases, self.notes)
        if PICTURES in required(parameters_of(self.fn)) and PICTURES not in arguments:
            raise RebelError(f"the reward function {self.name} reads images, and the completions are text")
        if not is_async(self.fn):
            return functools.partial(self._values, functools.partial(self.fn, **arguments), cases)
        future = asyncio.run_coroutine_threadsafe(self.fn(**arguments), event_loop())
        return functools.partial(self._values, future.result, cases)

    def _values(self, call: Callable[[], Any], cases: list[Case]) -> Values:
        try:
            values = call()
        except Exception as cause:
            raise RewardFailed(self.name, self._at_fault(cases, cause), cause) from cause
        return _checked(values, len(cases), self.name)

    def _at_fault(self, cases: list[Case], cause: Exception) -> list[Case]:
        """The first case on which the function fails in the same way alone; all of them where it is not to be found.

        Async functions mostly ask a service, where another call may cost money and end differently: not repeated.
        """
        if len(cases) == 1 or is_async(self.fn):
            return cases
        deadline = time.monotonic() + SECONDS_OF_SEARCH
        for case in cases:
            if time.monotonic() > deadline:
                break
            try:
                self.fn(**_arguments([case], self.notes))
            except Exception as error:
                if type(error) is type(cause):
                    return [case]
        return cases


def as_rewards(values: Values) -> Float[Tensor, " N"]:
    """Values as rewards: NaN where there is none, or none that can be used."""
    rewards = torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float32)
    return rewards.masked_fill(~rewards.isfinite(), math.nan)


@functools.cache
def event_loop() -> asyncio.AbstractEventLoop:
    """One loop for the whole process, in a thread of its own.

    The clients of services belong to the loop that they were first used in, so a new loop for each batch would break
    them at the second one; and in a notebook the main thread's loop is already running.
    """
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rebel-rewards", daemon=True).start()
    return loop


def _arguments(cases: Sequence[Case], notes: Notes) -> dict[str, Any]:
    """The arguments of a reward function, one entry a completion in each list."""
    columns = columns_of([prompt for prompt, _ in cases])
    arguments = {name: [prompt.meta.get(name) for prompt, _ in cases] for name in columns}
    drawn = [completion.content for _, completion in cases]
    pictures = {} if any(isinstance(content, str | list) for content in drawn) else {PICTURES: drawn}
    return (
        arguments
        | pictures
        | {
            "prompts": [prompt.content for prompt, _ in cases],
            "completions": drawn,
            "completion_ids": [_ids(completion.trace) for _, completion in cases],
            "trainer_state": notes.trainer_state,
            "log_extra": notes.log_extra,
            "log_metric": notes.log_metric,
        }
    )


def _ids(trace: Any) -> list[int] | None:
    return list(trace.completion) if isinstance(trace, TokenTrace) else None


def columns_of(prompts: Sequence[Prompt]) -> list[str]:
    names = dict.fromkeys(name for prompt in prompts for name in prompt.meta)
    return [name for name in names if name not in NOT_COLUMNS]


def _checked(values: Any, count: int, name: str) -> Values:
    """What a reward function returned, as one float or None for each completion."""
    wanted = f"return a list with a number or None for each of the {count} completions"
    if isinstance(values, str | Mapping) or not isinstance(values, Iterable):
        raise RebelError(f"the reward function {name} returned {type(values).__name__}; {wanted}")
    values = list(values)
    if len(values) != count:
        raise RebelError(f"the reward function {name} returned {len(values)} values for {count} completions; {wanted}")
    try:
        return [None if value is None else _number(value) for value in values]
    except (TypeError, ValueError) as error:
        raise RebelError(f"the reward function {name} returned a value that is no number ({error}); {wanted}") from None


def _number(value: Any) -> float:
    if isinstance(value, str):
        raise TypeError(f"the text {value!r}")
    return float(value)


def name_of(fn: Callable[..., Any]) -> str:
    while isinstance(fn, functools.partial):
        fn = fn.func
    return getattr(fn, "__name__", type(fn).__name__)


def is_async(fn: Callable[..., Any]) -> bool:
    while isinstance(fn, functools.partial):
        fn = fn.func
    return inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(getattr(fn, "__call__", None))  # noqa: B004


def parameters_of(fn: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """The parameters of a function; none where it does not tell (some built into Python)."""
    try:
        return inspect.signature(fn).parameters
    except (TypeError, ValueError):
        return {}


def takes_any(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


def required(parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty and parameter.kind not in optional
    ]


def _check_arguments(fn: Callable[..., Any], name: str) -> None:
    """Raises RebelError where the function cannot be called as reward functions are, whatever the dataset."""
    if inspect.isclass(fn):
        raise RebelError(f"the reward function {name} is a class; make an object of it and name that instead")
    parameters = parameters_of(fn)
    by_position = [p for p in parameters.values() if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
    refused = [passed for passed in PASSED if passed not in parameters]
    if by_position or (parameters and refused and not takes_any(parameters)):
        raise RebelError(
            f"the reward function {name} takes ({', '.join(map(str, parameters))}), but it is called by name with "
            f"{', '.join(PASSED)} and the dataset's columns: name those it needs and end its arguments with **kwargs"
        )
