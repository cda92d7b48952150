"""Games of preference, in tables and exactly: rock-paper-scissors, and ten models that people preferred in circles.

    python benchmarks/games.py          results/games.json, games.md and games.png

A policy is a distribution over the answers of one prompt, a game the matrix P(row > column). REBEL's iteration is the
exact minimiser of its loss with win rates against the policy as rewards; `tests/test_games.py` holds it against that
loss minimised by number. DPO is the optimum of its loss on all pairs that the initial policy draws: one fixed reward of
Bradley and Terry, and pi proportional to pi_0 * exp(reward / beta).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rebel.algorithm import step_size

RESULTS = Path(__file__).resolve().parent / "results"

ROCK_PAPER_SCISSORS = torch.tensor([[0.5, 0.0, 1.0], [1.0, 0.5, 0.0], [0.0, 1.0, 0.5]], dtype=torch.float64)
STARTS = {
    "0.8 / 0.15 / 0.05": (0.8, 0.15, 0.05),
    "0.999 / 0.0005 / 0.0005": (0.999, 0.0005, 0.0005),
    "0.1 / 0.3 / 0.6": (0.1, 0.3, 0.6),
}


def core_matrix(folder: Path) -> tuple[list[str], Tensor]:
    """Models, and P(row > column) by people's votes: wins and half the ties; 1/2 where nobody compared the two."""
    rows = list(csv.reader((folder / "core_matrix_human.csv").read_text().splitlines()))
    names = rows[0][1:]
    wins = torch.tensor([[float(cell) for cell in row[1:]] for row in rows[1:]], dtype=torch.float64)
    ties = torch.tensor(json.loads((folder / "core_matrix_human.json").read_text())["ties"], dtype=torch.float64)
    votes = wins + wins.T + ties
    return names, torch.where(votes > 0, (wins + ties / 2) / votes.clamp(min=1), 0.5)


def rebel_iterates(game: Tensor, start: Sequence[float], eta: float, iterations: int) -> Tensor:
    """pi_1, ..., pi_T of REBEL: pi_{t+1} proportional to pi_t * exp(eta' * P(y > pi_t))."""
    logp, step = torch.tensor(start, dtype=torch.float64).log(), step_size(eta, beta=0.0)
    iterates = []
    for _ in range(iterations):
        iterates.append(logp.exp())
        logp = (logp + step * game @ logp.exp()).log_softmax(0)
    return torch.stack(iterates)


def bradley_terry(game: Tensor, start: Sequence[float]) -> Tensor:
    """The reward that explains the preferences on pairs of the initial policy best, by Newton's method."""
    p = torch.tensor(start, dtype=torch.float64)
    weight = p[:, None] * p[None, :]
    reward = torch.zeros(len(p), dtype=torch.float64)
    for _ in range(200):
        chance = (reward[:, None] - reward[None, :]).sigmoid()
        slope = (weight * (game - chance)).sum(dim=1)
        curve = weight * chance * (1 - chance)
        step = torch.linalg.pinv(torch.diag(curve.sum(dim=1)) - curve, rtol=1e-14) @ slope
        reward = reward + step * min(1.0, 2.0 / float(step.abs().max().clamp(min=1e-12)))
    return reward - reward.mean()


def dpo_iterates(game: Tensor, start: Sequence[float], beta: float, iterations: int, rate: float = 0.5) -> Tensor:
    """Policies along gradient descent on DPO's loss, all pairs of the initial policy weighted as it draws them.

    The gradient is divided by beta and by the probability of the answer, or rare answers would take for ever.
    """
    p = torch.tensor(start, dtype=torch.float64)
    reward = torch.zeros_like(p)  # beta * log-ratio, up to a constant
    iterates = []
    for _ in range(iterations):
        iterates.append((p.log() + reward / beta).softmax(0))
        chance = (reward[:, None] - reward[None, :]).sigmoid()
        reward = reward + rate * ((game - chance) * p[None, :]).sum(dim=1)
    return torch.stack(iterates)


def exploitability(game: Tensor, policy: Tensor) -> float:
    """How much more than half of the comparisons the best answer to this policy wins."""
    return float((game @ policy).max()) - 0.5


def distance_to_uniform(policy: Tensor) -> float:
    """Total variation."""
    return float((policy - 1 / len(policy)).abs().sum()) / 2


def minimax_winner(game: Tensor) -> Tensor:
    """A policy that no answer beats in more than half of the comparisons, by linear programming."""
    from scipy.optimize import linprog

    n = len(game)
    # x and the value v: least v with game @ x <= v in every row, x a distribution
    found = linprog(
        c=[0.0] * n + [1.0],
        A_ub=torch.cat([game, -torch.ones(n, 1, dtype=game.dtype)], dim=1).numpy(),
        b_ub=[0.0] * n,
        A_eq=[[1.0] * n + [0.0]],
        b_eq=[1.0],
        bounds=[(0, 1)] * n + [(None, None)],
    )
    return torch.tensor(found.x[:n], dtype=torch.float64)


@dataclass(frozen=True, slots=True)
class Row:
    """A policy of one method on one game."""

    game: str
    policy: str
    shares: list[float]
    exploitability: float
    largest: float


def row(name: str, policy: str, game: Tensor, shares: Tensor) -> Row:
    return Row(name, policy, [round(x, 4) for x in shares.tolist()], exploitability(game, shares), float(shares.max()))


def rows_of(name: str, game: Tensor, start: Sequence[float], eta: float, iterations: int, beta: float) -> list[Row]:
    ours, theirs = rebel_iterates(game, start, eta, iterations), dpo_iterates(game, start, beta, iterations)
    optimum = (torch.tensor(start, dtype=torch.float64).log() + bradley_terry(game, start) / beta).softmax(0)
    found = {
        "REBEL, mixture of the iterates": ours.mean(dim=0),
        "REBEL, last iterate": ours[-1],
        f"DPO, optimum (beta {beta:g})": optimum,
        "DPO, last iterate of gradient descent": theirs[-1],
        "DPO, mean of its iterates": theirs.mean(dim=0),
    }
    return [row(name, policy, game, shares) for policy, shares in found.items()]


ETA, ITERATIONS, BETA = 0.1, 20_000, 0.1


def all_rows(data: Path) -> list[Row]:
    rows = []
    for name, start in STARTS.items():
        rows += rows_of(f"rock-paper-scissors from {name}", ROCK_PAPER_SCISSORS, start, ETA, ITERATIONS, BETA)
    names, game = core_matrix(data / "llmfao")
    uniform = [1 / len(names)] * len(names)
    rows += rows_of("ten models, from uniform", game, uniform, ETA, ITERATIONS, BETA)
    return [*rows, row("ten models, from uniform", "minimax winner (linear programme)", game, minimax_winner(game))]


def table(rows: Sequence[Row]) -> str:
    lines = ["| game | policy | exploitability | largest share |", "| --- | --- | --- | --- |"]
    lines += [f"| {r.game} | {r.policy} | {r.exploitability:.4f} | {r.largest:.3f} |" for r in rows]
    return "\n".join(lines) + "\n"


def draw(path: Path) -> None:
    """Rock-paper-scissors: the share of rock of the iterates and of their mixture, and the distance to uniform."""
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    shown = 600
    iterates = rebel_iterates(ROCK_PAPER_SCISSORS, STARTS["0.8 / 0.15 / 0.05"], ETA, ITERATIONS)
    mixture = iterates.cumsum(dim=0) / torch.arange(1, ITERATIONS + 1)[:, None]
    optimum = dpo_iterates(ROCK_PAPER_SCISSORS, STARTS["0.8 / 0.15 / 0.05"], BETA, shown)
    for values, label in ((iterates, "REBEL, iterate"), (mixture, "REBEL, mixture so far"), (optimum, "DPO, iterate")):
        left.plot(values[:shown, 0], label=label)
    left.axhline(1 / 3, color="grey", linewidth=0.8)
    left.set(xlabel="iteration", ylabel="share of rock", title="from 0.8 / 0.15 / 0.05")
    left.legend(frameon=False)
    for name, start in STARTS.items():
        ours = rebel_iterates(ROCK_PAPER_SCISSORS, start, ETA, ITERATIONS)
        mixed = ours.cumsum(dim=0) / torch.arange(1, ITERATIONS + 1)[:, None]
        right.loglog([distance_to_uniform(p) for p in mixed[::20]], label=name)
    right.axhline(0.02, color="grey", linewidth=0.8)
    right.set(xlabel="iteration / 20", ylabel="total variation to uniform", title="mixture of REBEL's iterates")
    right.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    import story

    rows = all_rows(story.DATA)
    settings: dict[str, Any] = {"eta": ETA, "iterations": ITERATIONS, "dpo_beta": BETA}
    found = {"settings": settings, "rows": [{name: getattr(r, name) for name in Row.__slots__} for r in rows]}
    (RESULTS / "games.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "games.md").write_text(table(rows))
    draw(RESULTS / "games.png")
    print(table(rows))


if __name__ == "__main__":
    main()
