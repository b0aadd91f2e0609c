"""The tree that is installed: what pyproject says is what is there, and it starts without torch."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import vlmcut

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ROOT_MODULES = {
    "__init__", "__main__", "api", "cli", "errors", "flags", "manifest", "pipeline", "prompt", "tables", "vocabulary"
}  # fmt: skip
# As on a machine that has none of them: not importable, and `find_spec` finds nothing.
NO_TORCH = """
import sys
sys.modules.update(dict.fromkeys(["torch", "onnx", "onnx_ir", "onnxscript", "torchvision"]))
"""


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter, outside the repository."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd="/", env=environment, timeout=300
    )


def test_packages_are_the_folders() -> None:
    folders = [p.parent.relative_to(ROOT) for p in ROOT.rglob("__init__.py")]
    own = {f for f in folders if not any(part.startswith(".") or part == "build" for part in f.parts)}
    named = {".".join(["vlmcut", *f.parts]) for f in own}
    setuptools = PROJECT["tool"]["setuptools"]
    guest = {"optimum.commands.register": "exporters/optimum_register"}  # a namespace of optimum's
    assert set(setuptools["packages"]) == named | set(guest) and len(setuptools["packages"]) == len(named) + 1
    assert setuptools["package-dir"] == {"vlmcut": "."} | guest
    assert not (ROOT / guest["optimum.commands.register"] / "__init__.py").exists()
    assert not [f for f in own if f.parts and f.parts[0] in {"tests", "examples", "benchmarks", "docs"}]


def test_the_root_holds_what_is_known() -> None:
    """Everything at the root becomes part of the package `vlmcut`: a stray script would be installed."""
    assert {p.stem for p in ROOT.glob("*.py")} == ROOT_MODULES
    assert (ROOT / "py.typed").is_file() and PROJECT["tool"]["setuptools"]["package-data"] == {"vlmcut": ["py.typed"]}


def test_type_checkers_see_the_package() -> None:
    """`.typings/vlmcut` is the tree under its import name, by links."""
    links = {p.name: p for p in (ROOT / ".typings" / "vlmcut").iterdir()}
    rooms = {p.parent.name for p in ROOT.glob("*/__init__.py")}
    assert set(links) == {f"{name}.py" for name in ROOT_MODULES} | rooms | {"py.typed"}
    for name, link in links.items():
        assert link.is_symlink() and link.resolve() == ROOT / name
        assert not Path(os.readlink(link)).is_absolute()


def test_the_version_is_one() -> None:
    assert vlmcut.__version__ == PROJECT["project"]["version"] == importlib.metadata.version("vlmcut")


def test_public_names_exist() -> None:
    for name in vlmcut.__all__:
        assert getattr(vlmcut, name) is not None
    with pytest.raises(AttributeError, match="no attribute `lod`"):
        _ = vlmcut.lod


def test_help_imports_no_torch() -> None:
    code = """
import sys
from vlmcut.cli import main
sys.argv = ["vlmcut", "--help"]
try:
    main()
except SystemExit as exit:
    assert exit.code in (0, None), exit.code
heavy = {"torch", "transformers", "onnx", "onnxruntime", "numpy", "PIL", "matplotlib"} & set(sys.modules)
print("HEAVY", sorted(heavy))
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert "convert" in done.stdout and "HEAVY []" in done.stdout


def test_the_runner_imports_without_torch() -> None:
    done = python(NO_TORCH + "import vlmcut.runtime.bundle, vlmcut; print(vlmcut.Bundle.__name__)")
    assert (done.returncode, done.stdout) == (0, "Bundle\n"), done.stderr
    # Negative control: the block does block.
    assert python(NO_TORCH + "import vlmcut.pipeline").returncode == 1


def test_a_bundle_runs_without_torch(bundle: Path) -> None:
    """The promise itself: images and a prompt in, text out, on a machine that has no torch."""
    code = (
        NO_TORCH
        + """
from PIL import Image
import vlmcut
b = vlmcut.Bundle(sys.argv[1], threads=1)
tokens = list(b.tokens(b.prompt([Image.new("RGB", (40, 30), "red")], "What is left?"), 4))
print(tokens, sys.modules["torch"])
"""
    )
    done = python(code, str(bundle))
    assert done.returncode == 0, done.stderr
    from PIL import Image

    here = vlmcut.Bundle(bundle, threads=1)
    want = list(here.tokens(here.prompt([Image.new("RGB", (40, 30), "red")], "What is left?"), 4))
    assert done.stdout == f"{want} None\n" and len(want) > 0


def test_the_script_and_the_module_are_the_same(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vlmcut", "--help"], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0 and "convert" in done.stdout
    assert PROJECT["project"]["scripts"] == {"vlmcut": "vlmcut.cli:main"}
