"""Align a small text-to-image flow model with a reward that looks at the picture.

``python examples/train_image.py`` takes about a minute on a laptop CPU. The policy is any Stable
Diffusion 3 or FLUX pipeline folder; the reward gets PIL images and the row's other columns.
"""

import mmgrpo
from mmgrpo.config.paths import locate

SETTINGS = {"steps": 60, "learning_rate": 2e-4, "group_size": 16, "prompts_per_step": 8}
PICTURE = {"num_steps": 10, "height": 8, "width": 16, "max_prompt_tokens": 4}


def main(**options: object) -> dict:
    """Train, and return the last step's metrics."""
    trainer = mmgrpo.Trainer(
        policy=locate("playground:image/model"),
        reward={
            "name": "classifier_score",
            "options": {"path": locate("playground:image/reward_classifier")},
        },
        data=locate("playground:image/train.jsonl"),
        eval_data=locate("playground:image/eval.jsonl"),
        method={"id": "flow-grpo", "regulariser": {"kl": {"coefficient": 0.0}}},
        **{**SETTINGS, **PICTURE, "run_dir": "runs/example-image", **options},
    )
    return trainer.train()


if __name__ == "__main__":
    print(main())
