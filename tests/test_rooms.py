"""The rooms and their arrows: who may import whom, read from the sources."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEAVES = {"errors", "manifest", "prompt", "vocabulary"}  # root modules that every room may use
ARROWS: dict[str, set[str]] = {
    "processors": set(),
    "surgery": {"processors"},
    "passes": {"surgery"},
    "exporters": {"passes", "surgery"},
    "runtime": {"processors"},
    "validation": {"exporters", "passes", "runtime", "surgery"},
}
HEAVY = {"torch", "transformers", "onnx", "onnxscript", "onnx_ir", "onnxruntime", "tensorrt", "tensorrt_rtx"}


# Lives in a room's folder, but is installed into optimum's: a verb of another command line, which may call ours.
GUEST = ROOT / "exporters" / "optimum_register"


def sources(room: str) -> list[Path]:
    return [p for p in sorted((ROOT / room).rglob("*.py")) if GUEST not in p.parents]


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, anywhere in it; ours start with `vlmcut.`."""
    home = ("vlmcut", *path.relative_to(ROOT).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [*home[: len(home) - node.level + 1]] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from .. import x` and `from ..errors import X` both name what they need.
            found |= {module} if node.module else {f"{module}.{alias.name}" for alias in node.names}
            found |= {f"{module}.{alias.name}" for alias in node.names if module == "vlmcut"}
    return found


def ours(path: Path) -> set[str]:
    """First names below `vlmcut` that a file imports."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("vlmcut.")}


def test_the_reader_of_imports_reads(tmp_path: Path) -> None:
    """Negative control: every way to write an import is seen."""
    path = ROOT / "exporters" / "__init__.py"
    assert imports(path) == set()
    assert ours(ROOT / "passes" / "folder.py") >= {"errors", "surgery", "passes"}
    assert ours(ROOT / "passes" / "tokens" / "methods.py") == {"surgery", "passes"}
    assert "pipeline" in ours(ROOT / "api.py") and "errors" in ours(ROOT / "cli.py")


def test_every_room_has_its_arrows() -> None:
    folders = {p.parent.name for p in ROOT.glob("*/__init__.py")}
    assert folders == set(ARROWS)


@pytest.mark.parametrize("room", ARROWS)
def test_arrows_point_one_way(room: str) -> None:
    allowed = ARROWS[room] | {room} | LEAVES
    assert len(sources(room)) > 2
    wrong = {str(p.relative_to(ROOT)): ours(p) - allowed for p in sources(room)}
    assert {path: names for path, names in wrong.items() if names} == {}


@pytest.mark.parametrize("leaf", sorted(LEAVES))
def test_leaves_import_no_room(leaf: str) -> None:
    assert ours(ROOT / f"{leaf}.py") <= LEAVES
    assert not {name.split(".")[0] for name in imports(ROOT / f"{leaf}.py")} & HEAVY


def top_level(path: Path) -> set[str]:
    """Packages that a file imports as soon as it is imported itself."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").split(".")[0])
    return found


def test_the_runtime_knows_no_torch() -> None:
    for path in [*sources("runtime"), *sources("processors")]:
        assert not {name.split(".")[0] for name in imports(path)} & {"torch", "onnx", "onnx_ir", "onnxscript"}, (
            path.name
        )


def test_help_is_fast() -> None:
    for name in ("__init__.py", "__main__.py", "cli.py", "flags.py", "errors.py"):
        assert not top_level(ROOT / name) & (HEAVY | {"numpy", "PIL"}), name


def test_the_guest_only_calls_the_command_line() -> None:
    (path,) = GUEST.glob("*.py")
    assert ours(path) == {"cli"} and "vlmcut" not in top_level(path)  # and no more than that, when it is called


def test_nobody_imports_the_command_line() -> None:
    rooms = [p for room in ARROWS for p in sources(room)]
    for path in [*rooms, *(ROOT / f"{n}.py" for n in ("api", "pipeline", *LEAVES))]:
        assert not {"cli", "flags"} & ours(path), path


def test_no_cycle_inside_a_room() -> None:
    """Between the modules of one room, and of the root, imports form no ring."""
    graph: dict[str, set[str]] = {}
    paths = [p for room in ARROWS for p in sources(room)] + sorted(ROOT.glob("*.py"))
    names = {p: ".".join(["vlmcut", *p.relative_to(ROOT).with_suffix("").parts]) for p in paths}
    known = set(names.values())
    for path, name in names.items():
        if path.name == "__init__.py":  # the package's own file only forwards
            continue
        seen = set()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom):
                home = ("vlmcut", *path.relative_to(ROOT).parent.parts)
                base = list(home[: len(home) - node.level + 1]) if node.level else []
                module = ".".join([*base, *([node.module] if node.module else [])])
                seen |= {module, *(f"{module}.{alias.name}" for alias in node.names)} & known
        graph[name] = seen

    def reach(start: str) -> set[str]:
        found, todo = set(), [start]
        while todo:
            for name in graph.get(todo.pop(), ()):
                if name not in found:
                    found.add(name)
                    todo.append(name)
        return found

    assert [name for name in graph if name in reach(name)] == []
    assert sum(map(len, graph.values())) > 50  # it did find imports
