"""Train a small language model to do arithmetic; a reward is any function of the completions.

``python examples/train_text.py`` takes about a minute on a laptop CPU. Put your own model folder
and JSONL file in place of the playground's to train a real model.
"""

import re

import mmgrpo
from mmgrpo.config.paths import locate
from mmgrpo.rewards.text import text_of

SETTINGS = {"steps": 60, "learning_rate": 2e-4, "group_size": 16, "prompts_per_step": 16}


def right_answer(completions: list[str], answer: list[str], **columns: list) -> list[float]:
    """1 where the text between the answer tags is the row's ``answer``."""
    found = [re.search(r"<answer>(.*?)</answer>", text_of(c)) for c in completions]
    return [float(m is not None and m[1] == a) for m, a in zip(found, answer, strict=True)]


def main(**options: object) -> dict:
    """Train, and return the last step's metrics."""
    trainer = mmgrpo.Trainer(
        policy=locate("playground:text/model"),
        reward=right_answer,
        data=locate("playground:text/train.jsonl"),
        eval_data=locate("playground:text/eval.jsonl"),
        method="dapo",
        **{**SETTINGS, "max_new_tokens": 40, "run_dir": "runs/example-text", **options},
    )
    return trainer.train()


if __name__ == "__main__":
    print(main())
