"""YAML -> EmbodimentSpec, and named fields <-> the policy's padded vector."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import dacite
import numpy as np
import yaml
from jaxtyping import Bool, Float32

from dita.types import EmbodimentSpec, FieldSpec

ROTATION_SIZES = {"ee_rotation_6d": 6, "ee_rotation_axis_angle": 3}


def config_folder() -> Path:
    """Return the folder of the shipped YAML files (`configs/` of a checkout, `dita/configs` of a wheel)."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "configs"


def embodiment_file(name_or_path: str | Path) -> Path:
    """Return the file (YAML or JSON) of an embodiment by shipped name or path.

    Raises:
        ValueError: no such name (the shipped ones are listed).
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml", ".json"):
        path = config_folder() / "embodiment" / f"{name_or_path}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in (config_folder() / "embodiment").glob("*.yaml"))
        raise ValueError(f"no embodiment {str(name_or_path)!r}; shipped: {', '.join(known)}; or give a .yaml file")
    return path


def load_embodiment(name_or_path: str | Path) -> EmbodimentSpec:
    """Load an embodiment by shipped name ("metaworld_sawyer") or from a YAML file.

    Raises:
        ValueError: no such name (the shipped ones are listed), or a field is missing, unknown or inconsistent.
    """
    path = embodiment_file(name_or_path)
    return embodiment_from_dict(yaml.safe_load(path.read_text()), where=str(path))


def embodiment_from_dict(values: Mapping[str, Any], where: str = "embodiment") -> EmbodimentSpec:
    """Build and check an EmbodimentSpec from plain values.

    Raises:
        ValueError: naming `where` and the field that is missing, unknown, mistyped or inconsistent.
    """
    config = dacite.Config(strict=True, cast=[tuple, float])
    try:
        spec = dacite.from_dict(EmbodimentSpec, dict(values), config)
    except (dacite.DaciteError, TypeError, ValueError) as e:
        raise ValueError(f"{where}: {e}") from None
    _check(spec, where)
    return spec


def embodiment_to_dict(spec: EmbodimentSpec) -> dict[str, Any]:
    """Return plain JSON values; `embodiment_from_dict` inverts it."""
    return json.loads(json.dumps(dataclasses.asdict(spec)))


def canonical_json(values: Any) -> str:
    """Serialise with sorted keys and repr floats, so that equal values give equal bytes."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)


def sha256_json(values: Any) -> str:
    """Hash plain values by their canonical JSON."""
    return hashlib.sha256(canonical_json(values).encode()).hexdigest()


def slices(fields: tuple[FieldSpec, ...]) -> Iterator[tuple[FieldSpec, slice, slice]]:
    """Yield (field, its slice in the concatenated vector, its slice in the padded vector)."""
    start = 0
    for field in fields:
        yield field, slice(start, start + field.size), slice(field.slot, field.slot + field.size)
        start += field.size


def pad(values: Float32[np.ndarray, "... d"], fields: tuple[FieldSpec, ...], size: int) -> Float32[np.ndarray, "... p"]:
    """Place concatenated fields into a zero vector of `size`, each at its slot."""
    _expect_dim(values, fields)
    padded = np.zeros((*values.shape[:-1], size), np.float32)
    for _, here, there in slices(fields):
        padded[..., there] = values[..., here]
    return padded


def unpad(padded: Float32[np.ndarray, "... p"], fields: tuple[FieldSpec, ...]) -> Float32[np.ndarray, "... d"]:
    """Take the fields back out of a padded vector; inverts `pad`."""
    return np.concatenate([padded[..., there] for _, _, there in slices(fields)], axis=-1)


def pad_mask(fields: tuple[FieldSpec, ...], size: int) -> Bool[np.ndarray, "p"]:
    """Return True where a padded vector of `size` holds a field.

    Raises:
        ValueError: a field does not fit into `size`.
    """
    mask = np.zeros(size, bool)
    for field, _, there in slices(fields):
        if there.stop > size:
            raise ValueError(
                f"field {field.name!r} needs slots {there.start}..{there.stop - 1} but the policy's padded vector has "
                f"{size}; raise policy.action_dim / policy.state_dim or move the field's slot"
            )
        mask[there] = True
    return mask


def _expect_dim(values: np.ndarray, fields: tuple[FieldSpec, ...]) -> None:
    expected = sum(f.size for f in fields)
    if values.shape[-1] != expected:
        names = ", ".join(f"{f.name}[{f.size}]" for f in fields)
        raise ValueError(f"got {values.shape[-1]} values but the embodiment has {expected}: {names}")


def _check(spec: EmbodimentSpec, where: str) -> None:
    for group, fields in (("state", spec.state), ("action", spec.action)):
        _unique([f.name for f in fields], f"{where}: {group} field names")
        used = [i for f in fields for i in range(f.slot, f.slot + f.size)]
        _unique(used, f"{where}: {group} slots")
        for f in fields:
            _check_field(f, f"{where}: {group}.{f.name}")
    if not spec.action:
        raise ValueError(f"{where}: an embodiment needs at least one action field")
    _unique([c.name for c in spec.cameras], f"{where}: camera names")
    _unique([c.slot for c in spec.cameras], f"{where}: camera slots")
    for key in ("obs_dt", "action_dt", "control_hz"):
        if not getattr(spec, key) > 0:
            raise ValueError(f"{where}: {key} must be positive, got {getattr(spec, key)}")


def _check_field(f: FieldSpec, where: str) -> None:
    if (f.mode == "delta") != (f.reference is not None):
        raise ValueError(f"{where}: a delta names its reference (commanded, measured, chunk_start), an absolute none")
    if f.size < 1 or f.slot < 0:
        raise ValueError(f"{where}: size must be >= 1 and slot >= 0, got {f.size} and {f.slot}")
    if f.size != ROTATION_SIZES.get(f.kind, f.size):
        raise ValueError(f"{where}: a {f.kind} has size {ROTATION_SIZES[f.kind]}, got {f.size}")
    if len(f.low) != f.size or len(f.high) != f.size:
        raise ValueError(f"{where}: low and high need {f.size} values each, got {len(f.low)} and {len(f.high)}")
    if not all(lo < hi for lo, hi in zip(f.low, f.high, strict=True)):
        raise ValueError(f"{where}: every low must be below its high, got {f.low} and {f.high}")
    if f.scale == 0:
        raise ValueError(f"{where}: scale must not be zero")


def _unique(values: list, what: str) -> None:
    twice = sorted({v for v in values if values.count(v) > 1})
    if twice:
        raise ValueError(f"{what} must be unique, got twice: {', '.join(map(str, twice))}")
