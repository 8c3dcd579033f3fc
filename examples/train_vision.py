"""Train a small vision-language model to read handwritten digits and combine them.

``python examples/train_vision.py`` takes about a minute on a laptop CPU. A row of the data is
``{"prompt": ..., "images": ["a.png"], "answer": "12"}``; several images per prompt are fine.
"""

import mmgrpo
from mmgrpo.config.paths import locate

SETTINGS = {"steps": 80, "learning_rate": 2e-4, "group_size": 16, "prompts_per_step": 16}


def main(**options: object) -> dict:
    """Train, and return the last step's metrics."""
    trainer = mmgrpo.Trainer(
        policy=locate("playground:vision/model"),
        reward=["exact_answer", {"name": "tag_format", "weight": 0.1}],
        data=locate("playground:vision/train.jsonl"),
        eval_data=locate("playground:vision/eval.jsonl"),
        method={"id": "grpo", "regulariser": {"kl": {"coefficient": 0.0}}},
        **{**SETTINGS, "max_new_tokens": 32, "run_dir": "runs/example-vision", **options},
    )
    return trainer.train()


if __name__ == "__main__":
    print(main())
