"""REBEL from Python: python examples/trainer.py MODEL PROMPTS.jsonl

MODEL is the name or folder of a causal language model, PROMPTS.jsonl has lines {"prompt": "Once upon a time"}.
"""

import argparse

from datasets import load_dataset
from sentiment import sentiment

from rebel import RebelConfig, RebelTrainer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model")
parser.add_argument("prompts")
parser.add_argument("--iterations", type=int, default=20)
parser.add_argument("--output_dir", default="trainer-run")
given = parser.parse_args()

rows = load_dataset("json", data_files=given.prompts, split="train").train_test_split(64, seed=0)
trainer = RebelTrainer(
    model=given.model,
    reward_funcs=sentiment,
    args=RebelConfig(
        output_dir=given.output_dir,
        iterations=given.iterations,
        max_prompt_length=40,
        max_completion_length=64,
        beta=0.05,
        learning_rate=1e-4,
    ),
    train_dataset=rows["train"],
    eval_dataset=rows["test"],
)
trainer.train()
print(trainer.evaluate())
