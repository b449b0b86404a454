"""Imports run one way: every arrow between packages is allowed here, and no modules import one another in a circle.

Imports inside functions and under TYPE_CHECKING count like all others.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GROUND = {"config", "errors", "extension", "files", "models"}
# What each part of the package may import, besides itself.
ALLOWED = {
    "errors": set(),
    "files": set(),
    "extension": {"errors"},
    "config": {"errors"},
    "models": {"errors"},
    "kernels": set(),
    "losses": {*GROUND, "kernels"},
    "prefix": GROUND,
    "data": GROUND,
    "evaluation": {*GROUND, "data", "prefix"},
    "training": {*GROUND, "data", "evaluation", "losses", "prefix"},
    "cli": {*GROUND, "data", "evaluation", "losses", "prefix", "training"},
}


def modules() -> dict[str, Path]:
    """Every module by its dotted name; kernels/ is installed as opsdl.kernels."""
    found = {}
    for folder, package in ((ROOT / "opsdl", "opsdl"), (ROOT / "kernels", "opsdl.kernels")):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


def imported(name: str, path: Path, known: set[str]) -> set[str]:
    """The modules of this package that a module imports."""
    out = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            out |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import in line {node.lineno}"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            out |= {x if x in known else node.module for x in full}
    return {x for x in out & known if x != name}


MODULES = modules()
ARROWS = {name: imported(name, path, set(MODULES)) for name, path in MODULES.items()}


def part(name: str) -> str:
    """The part of the package that a module belongs to; "" for the package's own __init__."""
    return name.partition(".")[2].partition(".")[0]


@pytest.mark.parametrize("source", [name for name in sorted(MODULES) if part(name)])
def test_no_arrow_runs_up(source):
    for target in ARROWS[source] - {"opsdl"}:
        assert part(target) in {*ALLOWED[part(source)], part(source)}, f"{source} imports {target}"


def test_every_part_has_its_place():
    assert {part(name) for name in MODULES} - {""} == set(ALLOWED)


def test_no_circle():
    """The package's own __init__ is left out: it imports its public names when they are first used."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for target in sorted(ARROWS[name] - {"opsdl"}):
                visit(target, [*path, name])
            done.add(name)

    for name in sorted(MODULES):
        if name != "opsdl":
            visit(name, [])


def test_the_prefix_in_cpp_includes_nothing_of_the_losses():
    sources = [path for path in (ROOT / "csrc" / "cpu").rglob("*") if path.suffix in (".h", ".cpp")]
    assert sources
    for path in sources:
        own = path.parent.name
        for line in path.read_text().splitlines():
            if line.startswith('#include "'):
                assert line.split('"')[1].split("/")[0] in {"common", own}, f"{path}: {line}"
