"""One graph in a process of its own, without torch: runs on demand, and says how much memory that took (Linux).

`passes.py` starts it: each line on stdin is a run, answered by its seconds; the end of stdin by the peak resident
memory in bytes. The inputs lie beside the graph, as .npz.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
from vlmcut.runtime.sessions import open_session


@dataclass(frozen=True)
class Runs:
    """What a graph took."""

    seconds: np.ndarray  # [runs]
    memory: int  # bytes, peak resident memory of its process


class Alone:
    """The other end."""

    def __init__(self, graph: Path, threads: int) -> None:
        command = [sys.executable, __file__, str(graph), str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self) -> float:
        """Seconds of one run."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write("run\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def end(self) -> int:
        """Peak resident memory in bytes."""
        return int(self._process.communicate()[0])


def race(graphs: Sequence[Path], threads: int, runs: int) -> tuple[Runs, ...]:
    """Run graphs in turn, after one run each to warm up."""
    racers = [Alone(graph, threads) for graph in graphs]
    times = np.array([[racer.run() for racer in racers] for _ in range(1 + runs)])[1:]
    return tuple(Runs(times[:, i], racer.end()) for i, racer in enumerate(racers))


def main(graph: Path, threads: int) -> None:
    session = open_session(graph, threads=threads)
    binding, held = session.io_binding(), []
    with np.load(graph.with_suffix(".npz")) as inputs:
        for name in inputs.files:
            value = ort.OrtValue.ortvalue_from_numpy(inputs[name], "cpu", 0)
            held.append(value)
            binding.bind_ortvalue_input(name, value)
            if name.startswith("past_"):
                binding.bind_ortvalue_output(name.replace("past_", "present_", 1), value)
    for output in session.get_outputs():
        if not output.name.startswith("present_"):
            binding.bind_output(output.name, "cpu")
    for _ in sys.stdin:
        start = time.perf_counter()
        session.run_with_iobinding(binding)
        print(time.perf_counter() - start, flush=True)
    # Not getrusage: its peak begins with that of the process that started this one.
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(1024 * int(peak.split()[1]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
