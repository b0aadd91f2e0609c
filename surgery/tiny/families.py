"""Every family by name, grouped by how its images become tokens."""

from __future__ import annotations

from . import anyres, fixed, native, tiled
from .family import Family

FAMILIES: dict[str, Family] = anyres.FAMILIES | native.FAMILIES | tiled.FAMILIES | fixed.FAMILIES
