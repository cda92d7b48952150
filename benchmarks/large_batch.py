"""5,000 prompts x 5 completions on the story model: memory over time, and what is left after SIGKILL.

    python benchmarks/large_batch.py                     all of it: about half an hour on one core
    python benchmarks/large_batch.py --sizes 100 200     a small one

The commands are those that a user gives: `rebel rollout`, `rebel score`, `rebel train --from_rollouts`, each a process
of its own whose resident memory is read ten times a second. The largest set is made a second time with both first
stages killed by SIGKILL in the middle and given again, and all its files are compared with those of the first time.
Needs psutil and, for the chart, matplotlib; $REBEL_DATA is the folder of stories260K and tinystories.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy
import psutil
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DATA = Path(os.environ.get("REBEL_DATA") or ROOT.parent / "shared" / "data")
MODEL = DATA / "stories260K"
LONGEST = 40
MIB = 2**20
SETTINGS = {
    "model_name_or_path": MODEL,
    "num_generations": 5,
    "max_prompt_length": LONGEST,
    "max_completion_length": 64,
    "temperature": 0.8,
    "eval_prompts": 0,
}
REGRESSION = {
    "pairing": "extremes",
    "prompts_per_iteration": 128,
    "steps_per_iteration": 1,
    "num_iterations": 1,
    "learning_rate": 2e-4,
}


def beginnings(count: int) -> list[str]:
    """So many different beginnings of stories of at most LONGEST tokens: whole sentences first, then so many words."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    stories = []
    for name in ("prompts", "train", "valid"):
        for line in (DATA / "tinystories" / f"{name}.jsonl").read_text().splitlines():
            row = json.loads(line)
            stories.append(
                re.split(r"(?<=[.!?])\s+", (row.get("text") or f"{row['prompt']} {row['reference']}").strip())
            )
    found: dict[str, None] = {}
    cuts = [lambda story, n=n: " ".join(story[:n]) for n in range(1, 5)]
    cuts += [lambda story, n=n: " ".join(" ".join(story).split()[:n]) for n in (12, 9, 6)]
    for cut in cuts:
        for text in map(cut, stories):
            if 10 < len(text) < 200 and len(tokenizer(text).input_ids) <= LONGEST:
                found[text] = None
    if len(found) < count:
        raise SystemExit(f"there are {len(found)} beginnings, not {count}")
    return list(found)[:count]


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "rebel", *map(str, words)]


def flags(settings: dict[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


def watched(words: list[str], log: Path, made: Path, kill_after: int | None = None) -> dict[str, Any]:
    """Run a command; its resident memory in MiB over its seconds, and the second from which it was at work.

    That is when the second file of what it makes is there; once there are `kill_after` it is killed.
    """
    began, curve, at_work = time.monotonic(), [], 0.0
    with open(log, "a") as output:
        child = subprocess.Popen(words, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        process = psutil.Process(child.pid)
        while child.poll() is None:
            try:
                memory = process.memory_info()
                curve.append([round(time.monotonic() - began, 2), memory.rss / MIB, (memory.rss - memory.shared) / MIB])
            except psutil.Error:
                break
            count = shards_in(made)
            at_work = at_work or (time.monotonic() - began if count >= 2 else 0.0)
            if kill_after and count >= kill_after:
                child.send_signal(signal.SIGKILL)
            time.sleep(0.02 if kill_after else 0.1)
        child.wait()
    if child.returncode != (-signal.SIGKILL if kill_after else 0):
        raise SystemExit(f"{' '.join(words)} ended with {child.returncode}: {log.read_text()[-2000:]}")
    return {"seconds": time.monotonic() - began, "at_work": at_work, "curve": curve}


def shards_in(folder: Path) -> int:
    """Files of a stage; of a training run, rows of its metrics."""
    if folder.suffix == ".jsonl":
        return len(folder.read_text().splitlines()) if folder.exists() else 0
    return len(list(folder.glob("*.arrow")))


def hashed(folder: Path) -> str:
    """One hash of all columns: of every byte of every shard of completions and of rewards."""
    found = hashlib.sha256()
    for path in sorted([*folder.glob("completions/*.arrow"), *folder.glob("rewards/*.arrow")]):
        found.update(f"{path.parent.name}/{path.name}\n".encode() + path.read_bytes())
    return found.hexdigest()


def stages(folder: Path, prompts: Path) -> dict[str, list[str]]:
    """The commands of the three stages."""
    rollouts = folder / "rollouts"
    return {
        "rollout": command("rollout", *flags(SETTINGS | {"dataset_name": prompts, "to": rollouts}), "--use_cpu"),
        "score": command("score", rollouts, "--reward_funcs", "examples/sentiment.py:sentiment"),
        "train": command(
            "train",
            *flags({"model_name_or_path": MODEL, "from_rollouts": rollouts, "output_dir": folder / "run"} | REGRESSION),
            *("--eval_prompts", 0, "--use_cpu", "--temperature", SETTINGS["temperature"]),
        ),
    }


def uninterrupted(size: int, texts: list[str], folder: Path) -> dict[str, Any]:
    """Memory of each stage for so many prompts."""
    prompts = written(texts[:size], folder)
    made = {
        "rollout": folder / "rollouts" / "completions",
        "score": folder / "rollouts" / "rewards",
        "train": folder / "run" / "metrics.jsonl",
    }
    found = {}
    for name, words in stages(folder, prompts).items():
        found[name] = measured(watched(words, folder / "log", made[name]), size)
        numbers = {key: value for key, value in found[name].items() if key != "curve"}
        print(f"{size} prompts, {name}: {numbers}", flush=True)
    return found


def measured(stage: dict[str, Any], size: int) -> dict[str, Any]:
    """Peak, growth while at work (least squares over that time, for each thousand prompts) and a thinned curve."""
    curve = numpy.array([row for row in stage["curve"] if row[1] > 0])  # a process that has just ended has no memory
    work = curve[curve[:, 0] >= stage["at_work"]]
    lasted = float(work[-1, 0] - work[0, 0])
    growth = float(numpy.polyfit(work[:, 0], work[:, 1], 1)[0]) * lasted / (size / 1000)
    return {
        "seconds": round(stage["seconds"], 1),
        "seconds_at_work": round(lasted, 1),
        "peak_mib": round(float(curve[:, 1].max()), 1),
        "peak_private_mib": round(float(curve[:, 2].max()), 1),
        "growth_mib_a_thousand_prompts": round(growth, 3),
        "curve": curve[:: max(1, len(curve) // 300)].round(2).tolist(),
    }


def interrupted(texts: list[str], folder: Path) -> dict[str, Any]:
    """The first two stages, each killed in its middle and given again."""
    words = stages(folder, written(texts, folder))
    shards = -(-len(texts) // 64)
    kept = {}
    for stage, part, after in (("rollout", "completions", shards * 2 // 5), ("score", "rewards", shards // 2)):
        made = folder / "rollouts" / part
        watched(words[stage], folder / "log", made, kill_after=after)
        kept[stage] = f"{len(list(made.glob('*.arrow')))} of {shards} shards when killed"
        watched(words[stage], folder / "log", made)
        print(f"killed, {stage}: {kept[stage]}", flush=True)
    return kept


def written(texts: list[str], folder: Path) -> Path:
    folder.mkdir(parents=True)
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return path


def chart(found: dict[int, dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(next(iter(found.values())))
    figure, axes = pyplot.subplots(1, len(names), figsize=(4.2 * len(names), 3), sharey=True)
    for axis, name in zip(axes, names, strict=True):
        for size, parts in found.items():
            curve = numpy.array(parts[name]["curve"])
            axis.plot(curve[:, 0], curve[:, 1], label=f"{size:,} prompts")
        axis.set(title=name, xlabel="seconds")
    axes[0].set(
        ylabel="resident memory, MiB", ylim=(0, 1.1 * max(s["peak_mib"] for p in found.values() for s in p.values()))
    )
    axes[-1].legend(frameon=False, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 2500, 5000])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of large_batch.json and large_batch.png")
    chosen = parser.parse_args()
    texts = beginnings(max(chosen.sizes))
    with TemporaryDirectory() as scratch:
        home = Path(scratch)
        found = {size: uninterrupted(size, texts, home / str(size)) for size in sorted(chosen.sizes)}
        kept = interrupted(texts, home / "killed")
        hashes = [hashed(home / name / "rollouts") for name in (str(max(chosen.sizes)), "killed")]
        disk = sum(path.stat().st_size for path in (home / str(max(chosen.sizes)) / "rollouts").rglob("*.arrow"))
    result = {
        "command": "python benchmarks/large_batch.py",
        "killed": kept,
        "sha256_uninterrupted": hashes[0],
        "sha256_killed_and_resumed": hashes[1],
        "bit_identical": hashes[0] == hashes[1],
        "mib_on_disk": round(disk / MIB, 1),
        "curve": "seconds, resident MiB, resident MiB that no other process shares",
        "stages": found,
    }
    (chosen.results / "large_batch.json").write_text(json.dumps(result) + "\n")
    chart(found, chosen.results / "large_batch.png")
    print("bit-identical" if result["bit_identical"] else "NOT THE SAME", *hashes)


if __name__ == "__main__":
    main()
