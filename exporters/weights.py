"""One weight file for all graphs of all budgets: every distinct tensor once, found by its bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir

FILE = "weights.bin"
_INLINE = 1024  # bytes; smaller tensors stay in the graph file
_PAGE = 4096  # alignment, so that a runtime can map a tensor


class WeightFile:
    """Collects initializers of graphs and writes each distinct content once."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self._folder = folder
        self._ranges: dict[str, tuple[int, int]] = {}
        self._file = self.path.open("wb")

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def save(self, model: ir.Model, name: str) -> Path:
        """Move the weights of a graph into the file and write the graph beside it."""
        for value in model.graph.initializers.values():
            tensor = value.const_value
            assert tensor is not None and value.name
            if tensor.nbytes < _INLINE:
                continue
            offset, length = self._add(tensor)
            value.const_value = ir.ExternalTensor(
                FILE, offset, length, tensor.dtype, shape=tensor.shape, name=value.name, base_dir=self._folder  # type: ignore[arg-type]
            )  # fmt: skip
        path = self._folder / name
        ir.save(model, path)
        return path

    def _add(self, tensor: ir.TensorProtocol) -> tuple[int, int]:
        data = np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8).data
        key = hashlib.sha256(data).hexdigest()
        if key not in self._ranges:
            self._file.write(b"\0" * (-self._file.tell() % _PAGE))
            self._ranges[key] = (self._file.tell(), len(data))
            self._file.write(data)
        return self._ranges[key]


def tensor_digests(paths: list[Path]) -> Iterator[str]:
    """sha256 of the bytes of every initializer that the graph files name."""
    seen = set()
    for path in paths:
        for value in ir.load(path).graph.initializers.values():
            tensor = value.const_value
            assert tensor is not None
            place = (tensor.offset, tensor.length) if isinstance(tensor, ir.ExternalTensor) else None
            if place is None or place not in seen:
                seen.add(place)
                yield hashlib.sha256(np.ascontiguousarray(tensor.numpy()).tobytes()).hexdigest()
