"""What a fresh process loads: the package is light, and words never need torch."""

import subprocess
import sys

import pytest

HEAVY = ("transformers", "diffusers", "vllm", "torchvision", "accelerate", "peft", "datasets")


def loaded_after(code):
    """Names of the top-level modules that a fresh interpreter has loaded after the code."""
    report = "; import sys; print(*{name.partition('.')[0] for name in sys.modules})"
    result = subprocess.run(
        [sys.executable, "-c", code + report], capture_output=True, text=True, check=True
    )
    return set(result.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("code", ["import mmgrpo", "import mmgrpo; mmgrpo.core.Trajectories"])
def test_the_package_does_not_load_heavy_libraries(code):
    assert not loaded_after(code) & set(HEAVY)


@pytest.mark.parametrize(
    "code",
    [
        "import mmgrpo.config",
        "from mmgrpo.config import load_config; load_config('text/qwen2.5-7b-gsm8k')",
        "import mmgrpo.registry, mmgrpo.protocols, mmgrpo.errors",
        "from mmgrpo.cli.main import main; main(['--help'])",
        "from mmgrpo.cli.main import main; main(['train', '--help'])",
        "from mmgrpo.cli.main import main; main(['train', 'quickstart/text', 'seed=x'])",
        "from mmgrpo.cli.main import main; main(['build', 'no-such-task'])",
    ],
)
def test_words_do_not_load_torch(code):
    assert not loaded_after(code) & {"torch", *HEAVY}


def test_the_public_names_are_lazy_sorted_and_real():
    import mmgrpo

    assert mmgrpo.__all__ == sorted(mmgrpo.__all__)
    assert set(mmgrpo._LAZY) | {"__version__"} == set(mmgrpo.__all__)
    assert dir(mmgrpo) == mmgrpo.__all__
    for name in mmgrpo.__all__:
        assert getattr(mmgrpo, name)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = mmgrpo.no_such_name
