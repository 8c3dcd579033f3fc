"""Train a small language model to do arithmetic: a reward is any function of the completions.

Run it with ``python examples/train_text.py``; it takes about two minutes on a laptop CPU. Put
your own model folder and JSONL file in place of the playground's to train a real model.
"""

import re

import mmgrpo
from mmgrpo.config.paths import locate


def right_answer(completions: list[str], answer: list[str], **columns: list) -> list[float]:
    """1 where the text between the answer tags is the row's ``answer``."""
    found = [re.search(r"<answer>(.*?)</answer>", text) for text in completions]
    return [float(m is not None and m[1] == a) for m, a in zip(found, answer, strict=True)]


def main(**options: object) -> dict:
    """Train, and return the last step's metrics."""
    settings = {"steps": 120, "learning_rate": 4e-4, "group_size": 16, "prompts_per_step": 16,
                "max_new_tokens": 32, "run_dir": "runs/example-text"}  # fmt: skip
    trainer = mmgrpo.Trainer(
        policy=locate("playground:text/model"),
        reward=right_answer,
        data=locate("playground:text/train.jsonl"),
        eval_data=locate("playground:text/eval.jsonl"),
        method="dapo",
        **{**settings, **options},
    )
    return trainer.train()


if __name__ == "__main__":
    print(main())
