"""The wheel: one top-level name, nothing missing, and it works far from the checkout."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

import mmgrpo
from mmgrpo.config.paths import config_name, packaged_configs

ROOT = Path(__file__).parents[2]
SOURCES = {"mmgrpo": "mmgrpo", "mmgrpo/configs": "configs", "mmgrpo/rewards": "rewards"}
"""Folder in the wheel -> folder in the checkout."""


def files_of(folder):
    """Relative paths of everything in a folder, but for what tools leave behind."""
    return {
        file.relative_to(folder).as_posix()
        for file in folder.rglob("*")
        if file.is_file()
        and not any(part.startswith((".", "__")) for part in _folders(file, folder))
    }


def _folders(file, top):
    return file.relative_to(top).parent.parts


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy so that the checkout stays clean."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for name in sorted(set(SOURCES.values())):
        ignored = shutil.ignore_patterns("__pycache__", ".*", "*.egg-info")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    pip("wheel", "--no-build-isolation", "--wheel-dir", str(folder), str(source))
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def elsewhere(wheel, tmp_path_factory):
    """Runs ``python -m mmgrpo`` on the installed wheel, in an empty folder."""
    site, empty = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("empty")
    pip("install", "--target", str(site), str(wheel))
    libraries = sysconfig.get_paths()["purelib"]

    def run(*arguments):
        # -S: the editable install of the checkout stays out of the way
        return subprocess.run(
            [sys.executable, "-S", *arguments],
            cwd=empty, capture_output=True, text=True, check=False,
            env={**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{libraries}"},
        )  # fmt: skip

    return run


def pip(*arguments):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    subprocess.run([*command, "--no-deps", "--no-index"], check=True, capture_output=True)


def test_the_wheel_holds_every_file_under_one_name(wheel):
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    wanted = {
        f"{inside}/{file}" for inside, folder in SOURCES.items() for file in files_of(ROOT / folder)
    }
    assert found == wanted
    assert {name.partition("/")[0] for name in found} == {"mmgrpo"}


def test_the_package_list_is_complete_and_ordered():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {
        (inside + "/" + file).removesuffix("/__init__.py").replace("/", ".")
        for inside, folder in SOURCES.items()
        for file in files_of(ROOT / folder)
        if file.endswith("__init__.py")
    }
    assert listed == sorted({name.removesuffix(".__init__.py") for name in folders})


def test_the_command_line_works_elsewhere(elsewhere):
    assert "quickstart" in elsewhere("-m", "mmgrpo", "--help").stdout
    shown = elsewhere("-m", "mmgrpo", "--version").stdout
    assert shown == f"mmgrpo {mmgrpo.__version__}\n"
    methods = json.loads(elsewhere("-m", "mmgrpo", "methods", "--json").stdout)
    assert {"grpo", "flow-grpo"} <= {method["id"] for method in methods}


def test_configurations_playground_and_rewards_are_found_elsewhere(elsewhere):
    names = [config_name(file) for file in packaged_configs()]
    code = f"""if True:
        from pathlib import Path
        import mmgrpo.rewards
        from mmgrpo.config import load_config
        print(mmgrpo.__file__, mmgrpo.rewards.__file__)
        for name in {names}:
            config = load_config(name)
            if name.startswith("quickstart/"):
                assert Path(config.model.path, "model_index.json").exists() or Path(
                    config.model.path, "config.json"
                ).exists()
                assert Path(config.data.train).is_file() and Path(config.data.eval).is_file()
    """
    result = elsewhere("-c", code)
    assert result.returncode == 0, result.stderr
    assert str(ROOT) not in result.stdout


def test_a_plain_import_of_rewards_names_the_right_one():
    result = subprocess.run(
        [sys.executable, "-c", "import rewards"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 1
    assert "mmgrpo.rewards" in result.stderr
