"""What an iteration spends on anything but the model, the sampler and the reward.

    python benchmarks/overhead.py                  the 8M works of throughput.py
    python benchmarks/overhead.py --work story

The forward and backward passes, the optimiser's step, drawing tokens and the reward count as work. The rest of the
iteration is overhead: planning micro-batches, laying out rows, coefficients, texts, measures, and the run's record.
Processor seconds of one thread, median of 5 iterations after a warm-up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import throughput
import torch

ITERATIONS = 5
RESULTS = Path(__file__).resolve().parent / "results" / "overhead.json"


class Clock:
    """Seconds inside of the functions that it is put around; inner ones do not count twice."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self.inside = False

    def around(self, owner: Any, name: str, work: str) -> None:
        usual: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self.inside:
                return usual(*args, **kwargs)
            self.inside, began = True, time.process_time()
            try:
                return usual(*args, **kwargs)
            finally:
                self.inside = False
                self.spent[work] = self.spent.get(work, 0.0) + time.process_time() - began

        setattr(owner, name, timed)


def measure(name: str) -> dict[str, Any]:
    """Seconds of an iteration by what they went to."""
    from accelerate import Accelerator

    import rebel.train
    from rebel.policies.scorer import Scorer
    from rebel.rewards.combine import Weighted
    from rebel.samplers import generate, prefilled

    torch.set_num_threads(1)
    clock, rows = Clock(), []
    clock.around(Scorer, "forward", "forward passes")
    clock.around(Accelerator, "backward", "backward passes")
    clock.around(torch.optim.AdamW, "step", "optimiser")
    clock.around(prefilled, "forward", "sampling")
    clock.around(generate, "choose", "sampling")
    clock.around(Weighted, "__call__", "reward")
    usual = rebel.train.iterate

    def iterate(run: Any, progress: Any) -> Any:
        if not rows:
            run.hooks.begin(progress, 10**6)
        clock.spent.clear()
        began = time.process_time()
        found = usual(run, progress)
        rebel.train.finish(run, progress, found, last=False)
        total = time.process_time() - began
        rows.append({**clock.spent, "overhead": total - sum(clock.spent.values()), "total": total})
        return found

    rebel.train.iterate = iterate
    throughput.ITERATIONS = ITERATIONS
    with TemporaryDirectory() as folder:
        model, prompts = throughput.model_and_prompts(throughput.WORKS[name], Path(folder) / "model")
        throughput.run_rebel(throughput.WORKS[name], model, prompts, folder)
    medians = {key: round(statistics.median(row.get(key, 0.0) for row in rows[1:]), 4) for key in rows[-1]}
    share = statistics.median(row["overhead"] / row["total"] for row in rows[1:])
    return {"work": name, "seconds": medians, "overhead_share": round(share, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", choices=throughput.WORKS, action="append")
    given = parser.parse_args()
    found = [measure(name) for name in given.work or ("8M-short", "8M-long", "8M-4-steps")]
    for row in found:
        parts = ", ".join(f"{key} {value:.3f}" for key, value in row["seconds"].items())
        print(f"{row['work']}: overhead {row['overhead_share']:.1%} ({parts})")
    if not given.work:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
