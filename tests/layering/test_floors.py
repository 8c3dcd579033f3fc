"""Who may import whom: a module imports only from floors below its own; siblings never meet."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLOORS = (
    {"errors"},
    {"core", "config"},
    {"protocols", "registry"},
    {"data", "methods", "policies", "rewards", "rollout", "scoring", "tracking"},
    {"trainer"},
    {"checks", "plan", "modalities"},
    {"build"},
    {"api", "compare", "playground"},
    {"cli"},
)
FLOOR = {name: level for level, names in enumerate(FLOORS) for name in names}
FOREIGN = {
    "core": {"torch"},
    "errors": set(),
    "config": {"annotated_types", "pydantic", "pydantic_core", "yaml"},
    "registry": set(),
    "protocols": {"PIL", "torch"},
    "cli": {"rich", "typer"},
}
"""What else the lower floors and the doors may import, beside the standard library."""
PARTS = FLOORS[3]
MODULES = [*sorted((ROOT / "mmgrpo").rglob("*.py")), *sorted((ROOT / "rewards").rglob("*.py"))]


def package_of(file):
    """The package a relative import in the file starts from, and the file's place in FLOORS."""
    parts = ("mmgrpo", *file.relative_to(ROOT).parts)[-len(file.relative_to(ROOT).parts) - 1 :]
    parts = parts[1:] if parts[1] == "mmgrpo" else parts
    return parts[:-1], parts[1].removesuffix(".py")


def imports(file):
    """Dotted names of everything the file imports: at the top, inside functions, for types."""
    package, _ = package_of(file)
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*start, *filter(None, [node.module])))
            yield from (f"{module}.{alias.name}" for alias in node.names)


def violations(file):
    _, part = package_of(file)
    if part in ("__init__", "__main__"):
        return
    for name in imports(file):
        top, _, inner = name.partition(".")
        other = inner.partition(".")[0]
        if top != "mmgrpo":
            foreign = FOREIGN.get(part)
            if foreign is not None and top not in foreign | set(sys.stdlib_module_names):
                yield f"{part} imports {name}"
        elif other == "rewards" and part != "rewards":
            yield f"{part} imports {name}: rewards are found by name"
        elif other in FLOOR and other != part and FLOOR[other] >= FLOOR[part]:
            yield f"{part} imports {name}, which is not below it"
        elif part == "trainer" and other in PARTS:
            yield f"trainer imports {name}: it knows the parts by their protocols"


@pytest.mark.parametrize("file", MODULES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_a_module_imports_only_from_below(file):
    assert list(violations(file)) == []


def test_every_module_has_a_floor():
    parts = {package_of(file)[1] for file in MODULES} - {"__init__", "__main__"}
    assert parts == set(FLOOR)


def test_an_import_upwards_is_seen(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "mmgrpo/core").mkdir(parents=True)
    (tmp_path / "rewards").mkdir()
    file = tmp_path / "mmgrpo/core/x.py"
    file.write_text("def f():\n    from ..trainer import loop\n    import numpy\n    import math\n")
    assert list(violations(file)) == [
        "core imports mmgrpo.trainer.loop, which is not below it",
        "core imports numpy",
    ]
    file = tmp_path / "rewards/y.py"
    file.write_text("from .z import f\nfrom mmgrpo.scoring import g\n")
    assert list(violations(file)) == ["rewards imports mmgrpo.scoring.g, which is not below it"]
