"""Every example script runs as it stands, in a small size."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = {"steps": 1, "group_size": 2, "prompts_per_step": 2, "eval": {"prompts": 2}}


@pytest.mark.parametrize("script", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_the_example_trains_and_leaves_a_model(script, tmp_path):
    spec = importlib.util.spec_from_file_location(script.removesuffix(".py"), EXAMPLES / script)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    metrics = example.main(**SMALL, run_dir=str(tmp_path / "run"))
    assert metrics["step"] == 1
    assert 0.0 <= metrics["eval/success"] <= 1.0
    assert any((tmp_path / "run/checkpoints/step_000001/hf").iterdir())
    assert len((EXAMPLES / script).read_text().splitlines()) <= 45
