"""The command line in this process, and a model folder that tests may copy and damage."""

from __future__ import annotations

import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from vlmcut import cli
from vlmcut.surgery.load import Loaded


@dataclass(frozen=True)
class Result:
    """What one command did."""

    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Call `vlmcut ARGS…` through its entry point; an exception that escapes it fails the test."""
    handler = signal.getsignal(signal.SIGTERM)

    def call(*args: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["vlmcut", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        text = capsys.readouterr()
        return Result(int(stop.value.code or 0), text.out, text.err)

    yield call
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def refuses(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run a command in an own folder; it must fail in one clear way and leave that folder as it was."""
    monkeypatch.chdir(tmp_path)

    def call(*args: object, code: int = 1, says: tuple[str, ...] = ()) -> Result:
        before = listing(tmp_path)
        result = run(*args)
        assert result.code == code, result
        assert listing(tmp_path) == before
        assert "Traceback" not in result.err
        if code == 1:
            assert sum(line.startswith("error: ") for line in result.err.splitlines()) == 1, result.err
            assert "\n\nhint: " in result.err
        else:
            assert "Error: " in result.err
        for part in says:
            assert part in result.err, (part, result.err)
        return result

    return call


def listing(folder: Path) -> dict[str, tuple[int, int] | None]:
    """Everything below a folder, each file with its size and the time of its last change."""
    return {
        str(p.relative_to(folder)): None if p.is_dir() else (p.lstat().st_size, p.lstat().st_mtime_ns)
        for p in sorted(folder.rglob("*"))
    }


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[[str], Loaded]) -> Path:
    """tiny:llava as a Hugging Face folder in several shards; do not write into it."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    loaded = tiny("llava")
    loaded.model.save_pretrained(folder, max_shard_size="400KB")
    loaded.processor.save_pretrained(folder)
    return folder


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path], Path]:
    """Copy a folder to where it may be damaged."""

    def copy(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / folder.name))

    return copy


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A small image file."""
    path = tmp_path / "picture.png"
    image: Any = Image.linear_gradient("L").resize((40, 30)).convert("RGB")
    image.save(path)
    return path
