"""A clean run prints its own progress and nothing else: no bars, remarks or warnings of others."""

from fixtures_runs import MODALITIES, command, document, finish, merged, write_config

RUNS = """
import sys
from mmgrpo.cli.main import main
for arguments in sys.argv[1:]:
    print(">", main(["train", *arguments.split()]), flush=True)
"""
VARIANTS = {
    "full": {"method": "grpo"},
    "lora": {"model": {"lora": {"rank": 2}, "gradient_checkpointing": True}},
}


def test_nothing_but_progress(models, tmp_path):
    configs = []
    for modality in MODALITIES:
        for name, changes in VARIANTS.items():
            run_dir = tmp_path / f"{modality}-{name}"
            doc = document(models, modality, run_dir, **merged(changes, {"trainer": {"steps": 1}}))
            doc["data"]["eval"] = doc["data"]["train"].replace("train.jsonl", "eval.jsonl")
            configs.append(write_config(tmp_path / f"{modality}-{name}.yaml", doc))
        small = "trainer.steps=1 rollout.prompts_per_step=2 rollout.group_size=2 eval.prompts=2"
        configs.append(f"quickstart/{modality} run_dir={tmp_path}/quickstart-{modality} {small}")
    code, out, err = finish(command(*configs, launcher=("-c", RUNS)))
    assert code == 0
    assert err == ""
    lines = out.splitlines()
    assert len(lines) == 3 * len(configs)
    assert all(line.startswith("train step ") or line == "> 0" for line in lines)
