"""Will this ONNX file build on that TensorRT? Answered on any host, without TensorRT, from measured facts.

`lint` is for graphs of fixed shapes, as vlmcut exports them. A rule is a function that yields one fault after
another, listed under its id in `RULES`; every finding names a node and the fix. An *error* does not build, computes
something else, or cannot be traced to its node when it fails; a *warning* builds and may surprise. A clean file
is no promise: numerics, memory and kernels of a device are known only there.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from ..errors import ExportError
from . import lint_ops
from . import trt_ops as trt
from .lint_ops import Fault
from .trt_graph import Graph, nbytes

Rule = Callable[[Graph], Iterable[Fault]]
MIB = 1 << 20


@dataclass(frozen=True)
class Finding:
    """One fault of one node."""

    rule: str  # such as TRT303
    severity: str  # "error" or "warning"
    node: str  # of a tensor or the file, where no node is to blame
    message: str
    fix: str


def lint(onnx_path: str | os.PathLike[str], profile: str) -> list[Finding]:
    """Check one ONNX file against a target profile, `rtx` or `trt`. Errors come first, then by rule.

    Raises:
        ExportError: no such profile, no such file, or not an ONNX file.
    """
    if profile not in trt.PROFILES:
        raise ExportError(f"no lint profile `{profile}`", hint=f"choose from {', '.join(trt.PROFILES)}")
    path = Path(onnx_path)
    if not path.is_file():
        raise ExportError(f"cannot lint `{path}`: no such file", hint="export the graph first")
    size = path.stat().st_size
    if size > trt.MAX_PROTO_BYTES:
        text = f"the file has {size} bytes, but protobuf reads at most {trt.MAX_PROTO_BYTES}"
        return [Finding("TRT005", "error", path.name, text, "save the weights as external data")]
    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError as broken:
        raise ExportError(f"cannot lint `{path}`: not an ONNX file", hint="give the .onnx file itself") from broken
    graph = Graph(path, model, trt.PROFILES[profile])
    found = [Finding(rule, how, *fault) for rule, (how, check) in RULES.items() for fault in check(graph)]
    return sorted(found, key=lambda f: (f.severity, f.rule))


# --- file and structure ---


def unknown_operator(graph: Graph) -> Iterator[Fault]:
    for node in graph.nodes:
        op = trt.OPS.get(node.op)
        if node.foreign or node.op in trt.DATA_DEPENDENT or (op and op.since):
            continue
        yield node.name, f"TensorRT has no importer for {node.op}", op.fix if op else "lower it to standard operators"


def opset(graph: Graph) -> Iterator[Fault]:
    low, high = trt.MIN_OPSET, graph.profile.max_opset
    versions = sorted({o.version for o in graph.model.opset_import if o.domain in ("", "ai.onnx")})
    if len(versions) != 1:
        yield graph.path.name, f"imports {len(versions)} versions of the default domain: {versions}", "import one"
    for version in versions:
        if not low <= version <= high:
            yield graph.path.name, f"opset {version} is outside {low} to {high}", f"export with opset {high}"


def foreign_domain(graph: Graph) -> Iterator[Fault]:
    local = {f"{f.domain}.{f.name}" for f in graph.model.functions}
    for node in graph.nodes:
        if node.foreign and node.op not in local:
            text = f"{node.op}: the importer ignores the domain and goes by the last part of the name"
            yield node.name, text, "write it in operators of the default domain"


def local_function(graph: Graph) -> Iterator[Fault]:
    for f in graph.model.functions:
        yield f.name, f"local function {f.domain}.{f.name}: a built-in of that name would shadow it", "inline it"


def embedded_weights(graph: Graph) -> Iterator[Fault]:
    inside = {n: nbytes(t) for n, t in graph.initializers.items() if not t.external_data}
    total = sum(nbytes(t) for t in graph.initializers.values())
    for name, size in inside.items():
        if total > 1024 * MIB and size > MIB:
            text = f"{size} bytes inside the file, of {total} in all; protobuf ends at {trt.MAX_PROTO_BYTES}"
            yield name, text, "save the weights as external data"


def external_data(graph: Graph) -> Iterator[Fault]:
    for tensor in graph.initializers.values():
        fault = graph.external_fault(tensor)
        if fault:
            yield tensor.name, fault, "rewrite the table: a file name beside the model, explicit offset and length"


def names(graph: Graph) -> Iterator[Fault]:
    for node in graph.nodes:
        if not node.named:
            yield node.name, f"a {node.op} node without a name: build errors could not name it", "name every node"
    for name, n in Counter(node.name for node in graph.nodes if node.named).items():
        if n > 1:
            yield name, f"{n} nodes have this name", "make node names unique"
    for name, n in Counter(graph.defined).items():
        if n > 1 or name == "_":
            yield name, f"tensor name `{name}` is defined {n} times, inner graphs included", "make it unique, not `_`"


def missing_output(graph: Graph) -> Iterator[Fault]:
    for node in graph.nodes:
        given = [o for o in node.outputs if o]
        if "" in node.outputs or (node.op == "TopK" and len(given) < 2):
            text = f"{node.op} names {len(given)} of {max(2, len(node.outputs))} outputs; the importer gives them all"
            yield node.name, text, "name every output, used or not"
        elif node.op in trt.ONE_OUTPUT and len(given) > 1:
            yield node.name, f"{node.op} has {len(given)} outputs, the importer gives 1", "drop all but the first"


def input_as_output(graph: Graph) -> Iterator[Fault]:
    for name in graph.outputs:
        if name in graph.inputs or name in graph.initializers:
            kind = "input" if name in graph.inputs else "initializer"
            yield name, f"this graph output is an {kind}; the engine would rename it", "insert Identity"


def depth_and_rank(graph: Graph) -> Iterator[Fault]:
    deepest = max((len(node.parents) for node in graph.nodes), default=0)
    if deepest > trt.MAX_SUBGRAPH_DEPTH:
        yield graph.path.name, f"inner graphs nest {deepest} deep, at most {trt.MAX_SUBGRAPH_DEPTH}", "flatten them"
    for name, shape in graph.shapes.items():
        if len(shape) > trt.MAX_RANK:
            text = f"`{name}` has rank {len(shape)}, at most {trt.MAX_RANK}"
            yield graph.blame(name), text, "merge dimensions with Reshape"


def tensor_kinds(graph: Graph) -> Iterator[Fault]:
    for name in graph.not_tensors:
        yield graph.blame(name), f"`{name}` is a sequence, optional, map or sparse tensor", "use plain tensors"
    for name, dtype in graph.constant_dtypes.items():
        if dtype in trt.NO_INITIALIZER:
            yield graph.blame(name), f"constant `{name}` is {dtype}, which the importer refuses", "convert it"


def invalid(graph: Graph) -> Iterator[Fault]:
    if graph.invalid:
        yield graph.path.name, f"not valid ONNX: {graph.invalid}", "repair the graph; other findings may be incomplete"


def zero_sized(graph: Graph) -> Iterator[Fault]:
    for name, shape in graph.shapes.items():
        fixes_shape = [i in trt.SHAPE_OPERANDS.get(node.op, ()) for node, i in graph.consumers.get(name, [])]
        if 0 in shape and not (fixes_shape and all(fixes_shape)):  # an empty shape operand says "scalar"
            yield graph.blame(name), f"`{name}` has no elements: {list(shape)}", "remove the operand"


# --- static shapes and control flow ---


def open_interface(graph: Graph) -> Iterator[Fault]:
    for name in (*graph.inputs, *graph.outputs):
        if not graph.is_static(name):
            text = f"`{name}` has shape {graph.describe(name)}; every size must be a number"
            yield name, text, "export with a token budget that fixes it"


def open_shape(graph: Graph) -> Iterator[Fault]:
    """Blames the node where a size gets lost, not the many behind it."""
    for node in graph.nodes:
        lost = [o for o in node.outputs if o and not graph.is_static(o)]
        known = all(graph.is_static(i) for i in node.inputs if i)
        if lost and known and not node.foreign and node.op not in trt.DATA_DEPENDENT:
            text = f"{node.op} turns fixed shapes into {graph.describe(lost[0])} of `{lost[0]}`"
            yield node.name, text, "fold its shape operand into a constant, run shape inference again"


def runtime_shape_operand(graph: Graph) -> Iterator[Fault]:
    for node in graph.nodes:
        for i in trt.SHAPE_OPERANDS.get(node.op, ()) if node.op != "TopK" else ():
            name = node.input(i)
            if name and name not in graph.constants:
                yield node.name, f"{node.op} takes its operand {i}, `{name}`, at run time", "make it a constant"


def data_dependent(graph: Graph) -> Iterator[Fault]:
    for node in graph.nodes:
        if node.op in trt.DATA_DEPENDENT:
            yield node.name, f"the size of the result of {node.op} depends on values", trt.OPS[node.op].fix


def branch(graph: Graph) -> Iterator[Fault]:
    for node in graph.nodes:
        if node.op == "If" and node.input(0) not in graph.constants:
            yield node.name, f"If decides at run time by `{node.input(0)}`", "compute both sides and use Where"


def loop(graph: Graph) -> Iterator[Fault]:
    for node in graph.nodes:
        if node.op in ("Loop", "Scan"):
            yield node.name, f"{node.op} runs step by step", "unroll it, or use CumSum or MatMul"


# --- target ---


def newer_operator(graph: Graph) -> Iterator[Fault]:
    for node in graph.nodes:
        op = trt.OPS.get(node.op)
        if op and op.since and op.since > graph.profile.importer:
            need, have = (".".join(map(str, v)) for v in (op.since, graph.profile.importer))
            yield node.name, f"{node.op} came with TensorRT {need}, `{graph.profile.name}` promises {have}", op.fix


RULES: dict[str, tuple[str, Rule]] = {
    "TRT001": ("error", unknown_operator),
    "TRT002": ("error", opset),
    "TRT003": ("error", foreign_domain),
    "TRT004": ("error", local_function),
    "TRT005": ("error", embedded_weights),
    "TRT006": ("error", external_data),
    "TRT009": ("error", names),
    "TRT010": ("error", missing_output),
    "TRT012": ("error", input_as_output),
    "TRT013": ("error", depth_and_rank),
    "TRT014": ("error", tensor_kinds),
    "TRT015": ("error", invalid),
    "TRT016": ("warning", zero_sized),
    "TRT101": ("error", open_interface),
    "TRT102": ("error", open_shape),
    "TRT103": ("error", runtime_shape_operand),
    "TRT104": ("error", data_dependent),
    "TRT105": ("error", branch),
    "TRT106": ("error", loop),
    "TRT201": ("error", lint_ops.no_such_dtype),
    "TRT202": ("error", lint_ops.mixed_dtypes),
    "TRT203": ("error", lint_ops.refused_dtype),
    "TRT205": ("error", lint_ops.operand_dtype),
    "TRT208": ("warning", lint_ops.half_range),
    "TRT301": ("error", lint_ops.topk_size),
    "TRT302": ("error", lint_ops.topk_form),
    "TRT303": ("error", lint_ops.attention_form),
    "TRT304": ("error", lint_ops.causal_corner),
    "TRT306": ("error", lint_ops.scatter_form),
    "TRT307": ("error", lint_ops.cache_alias),
    "TRT309": ("error", lint_ops.scatter_reduction),
    "TRT401": ("error", lint_ops.quantized_constant),
    "TRT402": ("error", lint_ops.quantized_edge),
    "TRT403": ("error", lint_ops.scale_and_zero),
    "TRT501": ("error", newer_operator),
}
