"""One read-only view of an ONNX file for the lint rules: nodes of all inner graphs, inferred types, constants."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, TypeProto, helper, numpy_helper
from onnx.checker import ValidationError
from onnx.external_data_helper import load_external_data_for_tensor
from onnx.shape_inference import InferenceError

from .trt_ops import Profile

SMALL_BYTES = 1 << 16  # constants up to here are read by value: masks, scales, shape operands; not weights
_BITS = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}
_STANDARD = ("", "ai.onnx")
# Constant inputs do not make the results of these constant: they draw numbers, or their inner graphs read more.
_NEVER_CONSTANT = frozenset(
    {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial"}
    | {"If", "Loop", "Scan"}
)


@dataclass(frozen=True)
class Node:
    """One node. `op` of a foreign domain carries the domain, so that no rule for a standard operator matches it."""

    name: str  # or its number and operator, when it has no name
    named: bool
    domain: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any] = field(repr=False)
    parents: tuple[str, ...]  # operators of the nodes whose inner graph this is in, outermost first

    @property
    def foreign(self) -> bool:
        return self.domain not in _STANDARD

    def input(self, i: int) -> str:
        """Name of input i, empty when it is not given."""
        return self.inputs[i] if i < len(self.inputs) else ""


class Graph:
    """The file `path` as rules see it. Names of inner graphs live in the same tables: TRT009 keeps them unique.

    Attributes:
        nodes: in file order, inner graphs before the node that owns them.
        inputs, outputs: of the main graph; initializers are not inputs.
        dtypes: name -> ONNX dtype such as "FLOAT16", of every tensor where it is known.
        shapes: name -> sizes, only of tensors whose every size is known.
        constants: names whose value does not depend on inputs, shapes of fixed tensors included.
        constant_dtypes: initializers and results of Constant.
        invalid: what the ONNX checker or strict shape inference says first, or None.
    """

    def __init__(self, path: Path, model: ModelProto, profile: Profile) -> None:
        self.path, self.model, self.profile = path, model, profile
        self.initializers: dict[str, TensorProto] = {}
        self.not_tensors: list[str] = []
        self.defined: list[str] = []  # one entry per definition
        self.nodes: list[Node] = list(self._walk(model.graph, ()))
        self.inputs = [v.name for v in model.graph.input if v.name not in self.initializers]
        self.outputs = [v.name for v in model.graph.output]
        self.defined += [v.name for v in model.graph.input if v.name not in self.initializers]
        self.producer = {o: node for node in self.nodes for o in node.outputs if o}
        self.consumers: dict[str, list[tuple[Node, int]]] = {}
        for node in self.nodes:
            for i, name in enumerate(node.inputs):
                if name:
                    self.consumers.setdefault(name, []).append((node, i))
        self._made = {n.outputs[0]: _constant(n) for n in self.nodes if n.op == "Constant" and n.outputs}
        self.constant_dtypes = {n: _dtype(t.data_type) for n, t in self.initializers.items()}
        self.constant_dtypes |= {n: _dtype(t.data_type) for n, t in self._made.items() if t is not None}
        self.dtypes: dict[str, str] = dict(self.constant_dtypes)
        self.shapes: dict[str, tuple[int, ...]] = {n: tuple(t.dims) for n, t in self.initializers.items()}
        self._open: dict[str, str] = {}
        self.invalid: str | None = None
        self._infer()

    def _walk(self, graph: GraphProto, parents: tuple[str, ...]) -> Iterator[Node]:
        for tensor in graph.initializer:
            self.initializers[tensor.name] = tensor
            self.defined.append(tensor.name)
        for sparse in graph.sparse_initializer:
            self.not_tensors.append(sparse.values.name)
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.WhichOneof("value") not in (None, "tensor_type"):
                self.not_tensors.append(value.name)
        for i, proto in enumerate(graph.node):
            op = proto.op_type if proto.domain in _STANDARD else f"{proto.domain}.{proto.op_type}"
            for attribute in proto.attribute:
                for inner in (attribute.g, *attribute.graphs) if _has_graph(attribute) else ():
                    yield from self._walk(inner, (*parents, op))
            self.defined += [o for o in proto.output if o]
            yield Node(
                name=proto.name or f"#{i} ({op})",
                named=bool(proto.name),
                domain=proto.domain,
                op=op,
                inputs=tuple(proto.input),
                outputs=tuple(proto.output),
                attributes={a.name: helper.get_attribute_value(a) for a in proto.attribute if not _has_graph(a)},
                parents=parents,
            )
            if any(a.name == "sparse_value" for a in proto.attribute):
                self.not_tensors.append(proto.output[0])

    def _infer(self) -> None:
        """Fill dtypes and shapes. Weights take no part by value, so that no size limit of protobuf is met."""
        bare = ModelProto(ir_version=self.model.ir_version, producer_name=self.model.producer_name)
        bare.opset_import.extend(self.model.opset_import)
        bare.functions.extend(self.model.functions)
        source, graph = self.model.graph, bare.graph
        graph.name = source.name
        graph.node.extend(source.node)
        graph.input.extend(source.input)
        graph.output.extend(source.output)
        graph.value_info.extend(source.value_info)
        graph.sparse_initializer.extend(source.sparse_initializer)
        declared = {v.name for v in source.input}
        for tensor in source.initializer:
            small = self._read(tensor)
            if small is not None:
                graph.initializer.append(small)
            elif tensor.name not in declared:
                graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
        try:
            onnx.checker.check_model(bare, full_check=True)
            inferred = onnx.shape_inference.infer_shapes(bare, check_type=True, strict_mode=True, data_prop=True)
        except (ValidationError, InferenceError) as error:
            self.invalid = " ".join(str(error).split())[:400]
            try:
                inferred = onnx.shape_inference.infer_shapes(bare)
            except (ValidationError, InferenceError):  # told as TRT015 already; what the file declares remains
                inferred = bare
        for inner in _graphs(inferred.graph):
            for value in (*inner.input, *inner.output, *inner.value_info):
                self._learn(value.name, value.type)

    def _learn(self, name: str, kind: TypeProto) -> None:
        if kind.WhichOneof("value") != "tensor_type":
            return
        if kind.tensor_type.elem_type:
            self.dtypes[name] = _dtype(kind.tensor_type.elem_type)
        dims = [d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in kind.tensor_type.shape.dim]
        if kind.tensor_type.HasField("shape") and all(isinstance(d, int) and d >= 0 for d in dims):
            self.shapes[name] = tuple(int(d) for d in dims)
        elif kind.tensor_type.HasField("shape"):
            self._open[name] = f"[{', '.join(map(str, dims))}]"

    @cached_property
    def constants(self) -> frozenset[str]:
        known = set(self.initializers)
        for node in self.nodes:
            shape = node.op in ("Shape", "Size") and self.is_static(node.input(0))
            if shape or (node.op not in _NEVER_CONSTANT and all(i in known for i in node.inputs if i)):
                known.update(node.outputs)
        return frozenset(known)

    def value(self, name: str) -> np.ndarray | None:
        """The value of an initializer or Constant of at most `SMALL_BYTES` that can be read, or None."""
        tensor = self.initializers.get(name) or self._made.get(name)
        small = self._read(tensor) if tensor is not None else None
        return None if small is None or small.data_type == TensorProto.STRING else numpy_helper.to_array(small)

    def _read(self, tensor: TensorProto) -> TensorProto | None:
        if nbytes(tensor) > SMALL_BYTES:
            return None
        if tensor.data_location != TensorProto.EXTERNAL:
            return tensor
        if self.external_fault(tensor):
            return None
        copy = TensorProto()
        copy.CopyFrom(tensor)
        load_external_data_for_tensor(copy, str(self.path.parent))
        copy.data_location = TensorProto.DEFAULT
        del copy.external_data[:]
        return copy

    def external_fault(self, tensor: TensorProto) -> str | None:
        """What is wrong with where an external tensor says its bytes are, or None."""
        if tensor.data_location != TensorProto.EXTERNAL:
            return None
        told = {e.key: e.value for e in tensor.external_data}
        unknown = sorted(told.keys() - {"location", "offset", "length", "checksum"})
        if unknown:
            return f"external data has unknown keys {unknown}"
        where = told.get("location", "")
        posix, windows = PurePosixPath(where), PureWindowsPath(where)
        file, folder = self.path.parent / where, self.path.parent.resolve()
        escapes = posix.is_absolute() or windows.drive or windows.root or ".." in windows.parts
        if not where or escapes or not file.resolve().is_relative_to(folder):
            return f"external data at `{where}` is outside the folder of the model"
        if not file.is_file():
            return f"external data file `{where}` is missing"
        offset, length, need = told.get("offset", "0"), told.get("length", ""), nbytes(tensor)
        if not offset.isdigit() or length != str(need):
            return f"external data has offset `{offset}` and length `{length}`, but the tensor has {need} bytes"
        if int(offset) + need > file.stat().st_size:
            return f"external data ends at byte {int(offset) + need}, but `{where}` has {file.stat().st_size}"
        return None

    def is_static(self, name: str) -> bool:
        return name in self.shapes

    def describe(self, name: str) -> str:
        """The shape as far as it is known, for messages."""
        return str(list(self.shapes[name])) if name in self.shapes else self._open.get(name, "of unknown rank")

    def blame(self, name: str) -> str:
        """The node to name for a tensor: its producer, else its first consumer, else the tensor itself."""
        if name in self.producer:
            return self.producer[name].name
        users = self.consumers.get(name)
        return users[0][0].name if users else name


def nbytes(tensor: TensorProto) -> int:
    """Bytes of a tensor in a data file; strings count as 0."""
    if tensor.data_type in (TensorProto.STRING, TensorProto.UNDEFINED):
        return 0
    bits = _BITS.get(_dtype(tensor.data_type)) or 8 * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return math.ceil(math.prod(tensor.dims) * bits / 8)


def _constant(node: Node) -> TensorProto | None:
    """The tensor of a Constant node, or None for a sparse or a string one."""
    a = node.attributes
    if "value" in a:
        return a["value"]
    for key, dtype in (("value_int", np.int64), ("value_ints", np.int64), ("value_float", np.float32)):
        if key in a:
            return numpy_helper.from_array(np.array(a[key], dtype))
    return numpy_helper.from_array(np.array(a["value_floats"], np.float32)) if "value_floats" in a else None


def _dtype(code: int) -> str:
    return TensorProto.DataType.Name(code)


def _has_graph(attribute: AttributeProto) -> bool:
    return attribute.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS)


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    for node in graph.node:
        yield from _inner(node)


def _inner(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield from _graphs(attribute.g)
        for inner in attribute.graphs:
            yield from _graphs(inner)
