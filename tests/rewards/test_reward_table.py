"""The table lists every reward, each documents its range, and the folder keeps its name."""

import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import mmgrpo.rewards
from mmgrpo.registry import load_target
from mmgrpo.rewards import REWARDS

HELPERS = {
    "clip_models", "digit_tracking", "frames", "image_reward_weights", "judge_endpoint",
    "judge_marks", "mask_files", "object_detection", "scene_rules", "shape_finding", "text",
    "torchvision_shim",
}  # fmt: skip


def test_every_file_is_in_the_table():
    files = {module.name for module in pkgutil.iter_modules(mmgrpo.rewards.__path__)}
    assert files - HELPERS == set(REWARDS)
    assert all(target.startswith(f"mmgrpo.rewards.{name}:") for name, target in REWARDS.items())


@pytest.mark.parametrize("name", REWARDS)
def test_every_reward_documents_its_range(name):
    assert "Range" in inspect.getdoc(load_target(REWARDS[name]))


def test_a_bare_import_of_the_folder_is_refused():
    root = Path(mmgrpo.rewards.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", "import rewards"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    if root.joinpath("rewards").is_dir():
        assert "import this package as `mmgrpo.rewards`" in done.stderr


def test_the_table_imports_nothing_heavy():
    code = (
        "import sys, mmgrpo.rewards\n"
        "assert not {'torch', 'transformers', 'sympy', 'math_verify'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
