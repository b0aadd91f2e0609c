"""Outputs exist whole or not at all: failures, signals and full disks leave nothing behind."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from vlmcut.errors import ExportError
from vlmcut.exporters.staging import refuse_existing, staged, staged_file
from vlmcut.exporters.weights import WeightFile
from vlmcut.pipeline import Request, convert, save_cut

REQUEST = Request(model="tiny:llava", prune=0.7, text_tokens=24, new_tokens=20)


def test_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "er" / "out"
    with staged(out) as folder:
        assert not out.exists() and folder.parent == out.parent
        (folder / "a").write_text("1")
    assert (out / "a").read_text() == "1"
    assert out.stat().st_mode & 0o777 == 0o755
    assert list(out.parent.iterdir()) == [out]


def test_file_appears_whole(tmp_path: Path) -> None:
    with staged_file(tmp_path / "out.png") as path:
        path.write_text("1")
        assert not (tmp_path / "out.png").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out.png"]


FAILURES = [ValueError("x"), KeyboardInterrupt(), SystemExit(3), OSError(errno.EACCES, "no"), OSError("no number")]


@pytest.mark.parametrize("failure", FAILURES, ids=repr)
@pytest.mark.parametrize("parent", ["", "new/deep"])
def test_failure_leaves_nothing(failure: BaseException, parent: str, tmp_path: Path) -> None:
    with pytest.raises(type(failure)) as caught, staged(tmp_path / parent / "out") as folder:
        (folder / "a" / "b").mkdir(parents=True)
        (folder / "a" / "b" / "c").write_text("1")
        raise failure
    assert caught.value is failure
    assert list(tmp_path.iterdir()) == []


FULL = [
    OSError(errno.ENOSPC, "full"),
    OSError(errno.EDQUOT, "quota"),
    OSError(errno.EFBIG, "limit"),
    Exception("No space left on device (os error 28)"),  # tokenizers and safetensors, from Rust
]


@pytest.mark.parametrize("failure", FULL, ids=repr)
def test_full_disk_is_one_error_with_numbers(failure: Exception, tmp_path: Path) -> None:
    with (
        pytest.raises(ExportError, match=r"no space left for .*: 1,234 bytes written, [0-9,]+ free") as caught,
        staged(tmp_path / "new" / "out") as folder,
    ):
        (folder / "a").write_bytes(bytes(1234))
        raise failure
    assert caught.value.__cause__ is failure
    assert list(tmp_path.iterdir()) == []


def test_parents_of_others_stay(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="x"), staged(tmp_path / "new" / "out"):
        (tmp_path / "new" / "theirs").write_text("1")
        raise ValueError("x")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["theirs"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_appeared_meanwhile_is_not_replaced(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ExportError, match="exists"), staged(out) as folder:
        (folder / "a").write_text("ours")
        if kind == "file":
            out.write_text("theirs")
        else:
            out.mkdir()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert out.is_dir() or out.read_text() == "theirs"


def test_refusal_writes_nothing(tmp_path: Path) -> None:
    refuse_existing(tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), RuntimeError("bug")], ids=repr)
def test_convert_that_fails_while_writing(
    failure: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(WeightFile, "_add", fail)
    with pytest.raises(type(failure)):
        convert(REQUEST, tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["write_graphs", "_save_processor", "prove", "seal", "report.write"])
def test_convert_that_fails_at_a_later_step(
    step: str, tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    from vlmcut.manifest import read

    def copy(model: object, budgets: object, keeps: object, forms: object, folder: Path, progress: object) -> object:
        shutil.copytree(bundle / "graphs", folder / "graphs")
        return read(bundle).graphs

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr("vlmcut.pipeline.write_graphs", copy)
    monkeypatch.setattr(f"vlmcut.pipeline.{step}", fail)
    request = Request(model="tiny:llava", prune=0.7, images=2, text_tokens=24, new_tokens=20)
    with pytest.raises(ExportError, match="no space left"):
        convert(request, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --- real processes, real limits ---


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 600 kB."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root on Linux")
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if made.returncode != 0:
        pytest.skip(f"mount: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_really_full_disk(small_disk: Path) -> None:
    """weights.bin alone needs 1.1 MB; the cut model, written by safetensors, needs 1.1 MB too."""
    with pytest.raises(ExportError, match="no space left"):
        convert(REQUEST, small_disk / "out")
    assert list(small_disk.iterdir()) == []
    with pytest.raises(ExportError, match="no space left"):
        save_cut(REQUEST, small_disk / "out")
    assert list(small_disk.iterdir()) == []


COMMAND = [sys.executable, "-m", "vlmcut"]
FLAGS = ["tiny:llava", "--prune", "0.7", "--text-tokens", "24", "--new-tokens", "20", "-o", "out"]


@pytest.mark.parametrize("verb", ["convert", "cut"])
def test_file_size_limit(verb: str, tmp_path: Path) -> None:
    flags = FLAGS if verb == "convert" else [f for f in FLAGS if f not in ("--text-tokens", "24", "--new-tokens", "20")]
    done = subprocess.run(
        [*COMMAND, verb, *flags],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)),
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("error: no space left for `out`") == 1
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    with subprocess.Popen(
        [*COMMAND, "convert", *FLAGS], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        seen = []
        for line in process.stderr:
            seen.append(line)
            if "exporting" in line:
                break
        assert "exporting" in seen[-1], seen
        assert [p.name.startswith(".out.partial-") for p in tmp_path.iterdir()] == [True]
        process.send_signal(number)
        rest = process.stderr.read()
        assert process.wait(60) != 0
    assert "Traceback" not in "".join(seen) + rest
    assert list(tmp_path.iterdir()) == []
