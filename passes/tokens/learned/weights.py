"""What every module with weights is, and the file that they come from.

A file is a safetensors file. Its tensors are the module's own, under the names of its state_dict; its metadata name the
method and give each argument of the module as JSON: {"method": "tokenflex", "hidden": "128", "blocks": "[5]", …}. The
names are ours: a published checkpoint has to be renamed.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ....errors import PassError, nearest
from ....surgery.anatomy import Anatomy

ATTRIBUTE = "vlmcut_method"  # of the model: its weights are the model's, so export, casts and folders carry them
FIX = "give a file made for this model, as method:weights=FILE; see examples/scenes/scorers"


class Learned(nn.Module):
    """A module with weights. Its constructor takes keyword arguments: ints and lists of ints, all in the metadata.

    Two arguments have a meaning that every module shares: `hidden` is the width of the language model, `width` that of
    the tower rows that it reads. It reads the outputs of the tower blocks `blocks`, counted from 0.
    """

    method: ClassVar[str]  # its row
    blocks: tuple[int, ...] = ()

    def refuse(self, rows: int, columns: int, keep: int) -> str | None:
        """Why it cannot make `keep` tokens of a grid, with both numbers."""
        return None

    def exported(self) -> nn.Module:
        """What takes its place in the model."""
        return self


@dataclass(frozen=True)
class Header:
    """A file's metadata and shapes, and the module that they make, without values."""

    arguments: Mapping[str, Any]
    module: Learned  # on the meta device


def save(module: Learned, arguments: Mapping[str, Any], path: Path) -> None:
    """Write a file that `read` reads."""
    metadata = {"method": module.method} | {name: json.dumps(value) for name, value in arguments.items()}
    save_file({name: t.detach().contiguous() for name, t in module.state_dict().items()}, path, metadata=metadata)


def head(kind: type[Learned], path: str) -> Header:
    """Check a file by its header alone.

    Raises:
        PassError: no file, not safetensors, made for another method, or arguments and tensors that do not fit.
    """
    method = kind.method
    metadata, shapes = _open(method, path)
    if (made := metadata.get("method")) != method:
        raise PassError(f"`{path}` holds weights of `{made}`, not of `{method}`", hint=FIX)
    arguments = _arguments(kind, path, metadata)
    with torch.device("meta"):
        module = kind(**arguments)
    wanted = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    for what, left in (("lacks", wanted.keys() - shapes.keys()), ("has unknown", shapes.keys() - wanted.keys())):
        if left:
            raise PassError(
                f"`{path}` {what} `{min(left)}`: it has {len(shapes)} tensors, `{method}` {len(wanted)}", hint=FIX
            )
    for name, shape in wanted.items():
        if shapes[name] != shape:
            raise PassError(f"`{path}`: `{name}` is {list(shapes[name])}, its metadata say {list(shape)}", hint=FIX)
    return Header(arguments, module)


def read(kind: type[Learned], path: str) -> Learned:
    """The module with its weights, in float32, in eval mode; raises as `head`."""
    arguments = head(kind, path).arguments
    module = kind(**arguments)
    with safe_open(path, "pt") as file:
        module.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()})  # noqa: SIM118
    return module.eval().requires_grad_(False)


def refuse_widths(header: Header, a: Anatomy) -> tuple[str, str] | None:
    """Refuse weights of another model's widths and depth."""
    for name, what, have in (
        ("hidden", "a language model", a.language.hidden),
        ("width", "a tower", a.tower.hidden),
    ):
        if header.arguments.get(name, have) != have:
            return f"the weights are for {what} of width {header.arguments[name]}, `{a.family}` has {have}", FIX
    blocks = header.module.blocks
    if blocks and not 0 <= min(blocks) <= max(blocks) < a.tower.feature_layer:
        return f"the weights read tower blocks {list(blocks)}, of which 0 to {a.tower.feature_layer - 1} run", FIX
    return None


def _open(method: str, path: str) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    if not path:
        raise PassError(f"`{method}` needs weights", hint=f"write {method}:weights=FILE")
    if not Path(path).is_file():
        raise PassError(f"`{method}`: no file `{path}`", hint=f"write {method}:weights=FILE with a safetensors file")
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            return file.metadata() or {}, shapes
    except SafetensorError as error:
        raise PassError(f"`{path}` is not a safetensors file: {error}", hint="make or copy it again") from error


def _arguments(kind: type[Learned], path: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    known = {p.name: p.annotation for p in inspect.signature(kind).parameters.values()}
    given = {name: value for name, value in metadata.items() if name not in ("method", "format")}
    if unknown := sorted(given.keys() - known.keys()):
        raise PassError(f"`{path}`: unknown metadata `{unknown[0]}`", hint=nearest(unknown[0], known))
    if missing := sorted(known.keys() - given.keys()):
        raise PassError(f"`{path}`: its metadata lack `{missing[0]}`", hint=f"it needs {', '.join(sorted(known))}")
    found: dict[str, Any] = {}
    for name, text in given.items():
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        numbers = value if isinstance(value, list) else [value]
        least = 0 if name == "blocks" else 1
        one = known[name] in (int, "int")
        if not numbers or one == isinstance(value, list) or any(type(n) is not int or n < least for n in numbers):
            many = "a whole number" if one else "a list of whole numbers"
            raise PassError(f"`{path}`: {name} = {text!r} is not {many} from {least}", hint=FIX)
        found[name] = value
    if found.get("inner", 0) % found.get("heads", 1):
        raise PassError(f"`{path}`: {found['heads']} heads do not divide a width of {found['inner']}", hint=FIX)
    return found


def seeded(kind: type[Learned], arguments: Mapping[str, Any], seed: int) -> Learned:
    """The module with random weights, none of them zero or one: to try an export before anything is trained."""
    rng = torch.Generator().manual_seed(seed)
    module = kind(**arguments)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=rng)
        if parameter.dim() > 1:
            parameter.data = noise * parameter[0].numel() ** -0.5
        else:
            parameter.data = float(name.endswith("weight")) + 0.1 * noise  # of a norm, or a bias
    return module
