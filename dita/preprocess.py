"""The one invertible preprocessor: sole owner of layout, dtype, range, resizing and normalisation.

Dataset, simulator and robot all pass through `Preprocessor.observe`; it is saved in the checkpoint as the contract.
Shape legend: b batch, t frames, v camera slots, n actions, a action dims, A padded action dims.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from dita.batch import Batch, Observation
from dita.config import LanguageConfig, PolicyConfig, PreprocessConfig
from dita.embodiment import embodiment_from_dict, embodiment_to_dict, pad, pad_mask, sha256_json, unpad
from dita.normalize import (
    Method,
    Normalizer,
    beyond,
    frozen,
    pool,
    stats_from_dict,
    stats_to_dict,
    usual_range,
)
from dita.policy.language import tokenizer
from dita.relative import anchors, to_absolute, to_relative
from dita.types import (
    ActionChunk,
    CameraSpec,
    EmbodimentSpec,
    FieldSpec,
    FieldStats,
    NormStats,
    RawObservation,
    Window,
)

CONTRACT_VERSION = 1
MEANING = ("kind", "unit", "frame")  # of a field: what a slot of the padded vector holds for good
Statistics = Literal["pretrained", "new", "pooled"]


@dataclass(frozen=True)
class Contract:
    """What a checkpoint, a dataset and a robot must agree on, per embodiment."""

    preprocess: Mapping[str, Any]  # image size, resize, normalisation, padded dims: plain values
    specs: Mapping[str, EmbodimentSpec]  # by name: their order is that of the network's embodiment tokens
    stats: Mapping[str, NormStats]

    def __post_init__(self) -> None:
        for key in ("specs", "stats"):  # as JSON keeps them, or a loaded policy would take one robot for another
            object.__setattr__(self, key, dict(sorted(getattr(self, key).items())))

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; `from_dict` inverts it."""
        return {
            "version": CONTRACT_VERSION,
            "preprocess": dict(self.preprocess),
            "embodiments": {
                name: {"spec": embodiment_to_dict(spec), "stats": stats_to_dict(self.stats[name])}
                for name, spec in self.specs.items()
            },
            "hash": self.root_hash,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Contract:
        """Rebuild a contract.

        Raises:
            ValueError: of another version, or its hash does not fit its content.
        """
        if values.get("version") != CONTRACT_VERSION:
            raise ValueError(f"contract version {values.get('version')!r}, this Dita reads {CONTRACT_VERSION}")
        parts = values["embodiments"].items()
        specs = {name: embodiment_from_dict(part["spec"], f"contract: {name}") for name, part in parts}
        contract = cls(values["preprocess"], specs, {name: stats_from_dict(part["stats"]) for name, part in parts})
        if contract.root_hash != values.get("hash"):
            raise ValueError(f"contract hash is {values.get('hash')}, its content gives {contract.root_hash}: edited?")
        return contract

    def hash_of(self, embodiment: str) -> str:
        """Return the hash that training, evaluation and this robot compare; limits and wording left out."""
        spec = embodiment_to_dict(self.specs[embodiment])
        hashed = {key: value for key, value in spec.items() if key not in ("limits", "driver", "robot")}
        return sha256_json(
            {"preprocess": dict(self.preprocess), "spec": hashed, "stats": stats_to_dict(self.stats[embodiment])}
        )

    @property
    def root_hash(self) -> str:
        """Return one hash over all embodiments."""
        return sha256_json({name: self.hash_of(name) for name in self.specs})

    def check_embodiment(self, spec: EmbodimentSpec) -> None:
        """Refuse a robot, simulator or dataset that is not the one this contract was made for.

        Raises:
            ValueError: the embodiment is unknown, or a field differs (named, with both values).
        """
        if spec.name not in self.specs:
            raise ValueError(f"embodiment {spec.name!r} is not in the checkpoint; it knows {sorted(self.specs)}")
        ours, theirs = embodiment_to_dict(self.specs[spec.name]), embodiment_to_dict(spec)
        found = [
            f"{path}: checkpoint {a!r}, here {b!r}"
            for key in ours
            if key not in ("limits", "driver", "robot")
            for path, a, b in differences(ours[key], theirs[key], key)
        ]
        if found:
            raise ValueError(f"embodiment {spec.name!r} differs from the checkpoint's: " + "; ".join(found[:5]))


def differences(a: Any, b: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """List what differs between two JSON values, as (path, of a, of b)."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [d for k in sorted(a | b) for d in differences(a.get(k), b.get(k), f"{path}.{k}" if path else k)]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [d for i in range(len(a)) for d in differences(a[i], b[i], f"{path}[{i}]")]
    return [] if a == b else [(path, a, b)]


def make_contract(
    config: PreprocessConfig, policy: PolicyConfig, specs: Sequence[EmbodimentSpec], stats: Sequence[NormStats]
) -> Contract:
    """Collect what the preprocessor needs into a contract."""
    language = policy.language
    preprocess = {
        "image_size": policy.vision.image_size,
        "resize": config.resize,
        "normalization": config.normalization,
        "actions": config.actions,
        "n_obs_steps": policy.n_obs_steps,
        "cameras": policy.cameras,
        "state_dim": policy.state_dim,
        "action_dim": policy.action_dim,
        "language": {"kind": language.kind, "max_tokens": language.max_tokens, "pretrained": language.pretrained},
    }
    return Contract(preprocess, {s.name: s for s in specs}, {s.embodiment: s for s in stats})


@dataclass(frozen=True)
class Origin:
    """Where a part of a new embodiment comes from."""

    part: str  # "action.position_delta", "camera wrist", "rate"
    weights: Literal["reused", "new", ""]  # of the network, for this part's slots
    like: tuple[str, ...]  # robots of the checkpoint whose part means the same
    statistics: str  # "pretrained", "new", "pooled"; "" for what has none
    note: str  # why it is not reused, or what else to know


def extend_contract(
    contract: Contract, spec: EmbodimentSpec, seen: NormStats | None, statistics: Statistics
) -> tuple[Contract, tuple[Origin, ...]]:
    """Add a robot to a contract, reusing the padded fields that mean the same on robots it knows.

    A field is reused where slot, size, kind, unit, frame, mode and reference agree; then its statistics are those of
    all such robots pooled (`pretrained`), those of the demonstrations (`new`), or both together (`pooled`). Any other
    field takes the demonstrations'. The padded vectors and camera slots grow where the robot needs more.

    Args:
        contract: of the checkpoint.
        spec: the new robot, or one that the contract knows, which keeps its own statistics.
        seen: statistics of the demonstrations; None: there are none (zero-shot).
        statistics: of reused fields.

    Raises:
        ValueError: a field's slots hold another kind, unit or frame in the checkpoint (named); a field needs statistics
            and there are no demonstrations; or the statistics that are kept are of other data.
    """
    known = contract.specs
    if spec.name in known:
        contract.check_embodiment(spec)
        known = {spec.name: known[spec.name]}
    fields, origins, method = {}, [], contract.preprocess["normalization"]
    for group, mine in (("state", spec.state), ("action", spec.action)):
        others = [(name, f) for name, s in known.items() for f in getattr(s, group)]
        for field in mine:
            _refuse_contradiction(spec, group, field, others)
            key = f"{group}/{field.name}"
            like = [(name, contract.stats[name].fields[f"{group}/{f.name}"]) for name, f in others if _same(f, field)]
            fields[key], told = _choose(spec, key, [s for _, s in like], seen, statistics)
            if told != "new" and seen is not None and field.kind != "ee_rotation_6d":  # which is not normalised
                _refuse_other_data(spec, field, key, fields[key], pool([s for _, s in like]), seen, method)
            robots = tuple(dict.fromkeys(name for name, _ in like))
            weights, why = _compared(field, [f for _, f in others])
            origins.append(Origin(f"{group}.{field.name}", weights, robots, told, "" if like else why))
    grown = {
        "state_dim": max(f.slot + f.size for f in spec.state) if spec.state else 0,
        "action_dim": max(f.slot + f.size for f in spec.action),
        "cameras": max((c.slot + 1 for c in spec.cameras), default=0),
    }
    preprocess = {k: max(v, grown[k]) if k in grown else v for k, v in contract.preprocess.items()}
    specs = {**contract.specs, spec.name: spec}
    stats = {**contract.stats, spec.name: NormStats(spec.name, fields)}
    return Contract(preprocess, specs, stats), (*origins, *_cameras_and_rates(contract, spec))


def _same(a: FieldSpec, b: FieldSpec) -> bool:
    return all(getattr(a, k) == getattr(b, k) for k in (*MEANING, "slot", "size", "mode", "reference"))


def _refuse_contradiction(
    spec: EmbodimentSpec, group: str, field: FieldSpec, others: Sequence[tuple[str, FieldSpec]]
) -> None:
    for slot in range(field.slot, field.slot + field.size):
        there = [(name, f) for name, f in others if f.slot <= slot < f.slot + f.size]
        if not there or any(all(getattr(f, k) == getattr(field, k) for k in MEANING) for _, f in there):
            continue
        name, other = there[0]
        wrong = [(k, getattr(other, k), getattr(field, k)) for k in MEANING if getattr(other, k) != getattr(field, k)]
        listed = ", ".join(f"{k} {a!r} there, {b!r} here" for k, a, b in wrong)
        free = max(f.slot + f.size for _, f in others)
        raise ValueError(
            f"{group}.{field.name} of {spec.name!r} contradicts the checkpoint: slot {slot} holds {name}'s "
            f"{group}.{other.name}: {listed}; correct the field, or give it a slot of its own (free from {free} on)"
        )


def _choose(
    spec: EmbodimentSpec, key: str, known: list[FieldStats], seen: NormStats | None, statistics: Statistics
) -> tuple[FieldStats, str]:
    if seen is None and (not known or statistics != "pretrained"):
        what = "is new to the checkpoint" if not known else f"is asked for with statistics={statistics}"
        raise ValueError(
            f"{key} of {spec.name!r} {what}, and without demonstrations it has no statistics: shots=1 or more"
        )
    if seen is None or (known and statistics == "pretrained"):
        return pool(known), "pretrained"
    if not known or statistics == "new":
        return seen.fields[key], "new"
    return pool([*known, seen.fields[key]]), "pooled"


def _refuse_other_data(
    spec: EmbodimentSpec,
    field: FieldSpec,
    key: str,
    kept: FieldStats,
    known: FieldStats,
    seen: NormStats,
    method: Method,
) -> None:
    """Refuse where the demonstrations are far from the known statistics, or would not move with the kept ones."""
    for i in (*beyond(known, seen.fields[key], method), *frozen(kept, seen.fields[key], method)):
        (low, high), (a, b) = usual_range(known, method, i), (seen.fields[key].q01[i], seen.fields[key].q99[i])
        raise ValueError(
            f"{key}[{i}] of {spec.name!r}: the checkpoint's statistics are of other data: they reach {low:.4g} .. "
            f"{high:.4g} {field.unit}, the demonstrations {a:.4g} .. {b:.4g}; check unit and scale, or use "
            "statistics=new"
        )


def _compared(field: FieldSpec, others: Sequence[FieldSpec]) -> tuple[Literal["reused", "new"], str]:
    """Say whether the checkpoint uses a field's slots, and how its field there differs."""
    there = next((f for f in others if f.slot < field.slot + field.size and field.slot < f.slot + f.size), None)
    if there is None:
        return "new", "new slots"
    keys = [k for k in ("mode", "reference", "slot", "size") if getattr(there, k) != getattr(field, k)]
    return "reused", ", ".join(f"{k} {getattr(there, k)} there, {getattr(field, k)} here" for k in keys)


def _cameras_and_rates(contract: Contract, spec: EmbodimentSpec) -> Iterator[Origin]:
    for camera in spec.cameras:
        like = tuple(n for n, s in contract.specs.items() if any(c.slot == camera.slot for c in s.cameras))
        yield Origin(f"camera {camera.name}", "reused" if like else "new", like, "", f"view slot {camera.slot}")
    for key in ("obs_dt", "action_dt"):
        mine = getattr(spec, key)
        found = {n: getattr(s, key) for n, s in contract.specs.items()}
        like = tuple(n for n, dt in found.items() if abs(dt - mine) < 1e-3 * dt)
        theirs = ", ".join(f"{v:g} s" for v in sorted(set(found.values())))
        yield Origin(key, "", like, "", f"{mine:g} s" if like else f"{mine:g} s here, {theirs or 'none'} there")


class Preprocessor:
    """Windows of raw observations <-> what the network sees, for every embodiment of a contract."""

    def __init__(self, contract: Contract) -> None:
        """Raises KeyError or ValueError if a field has no statistics or no room in the padded vectors."""
        self.contract = contract
        p = contract.preprocess
        self.image_size, self.frames, self.views = p["image_size"], p["n_obs_steps"], p["cameras"]
        self.state_dim, self.action_dim = p["state_dim"], p["action_dim"]
        self.specs, self.relative = contract.specs, p["actions"] == "relative"
        self.index = {name: i for i, name in enumerate(self.specs)}
        method = p["normalization"]
        self._state = {n: Normalizer("state", s.state, contract.stats[n], method) for n, s in self.specs.items()}
        self._action = {n: Normalizer("action", s.action, contract.stats[n], method) for n, s in self.specs.items()}
        self.state_mask = {n: pad_mask(s.state, self.state_dim) for n, s in self.specs.items()}
        self.action_mask = {n: pad_mask(s.action, self.action_dim) for n, s in self.specs.items()}
        for spec in self.specs.values():
            if self.relative:
                list(anchors(spec))  # refuses an action without its state
            too_far = [c.name for c in spec.cameras if c.slot >= self.views]
            if too_far:
                raise ValueError(f"{spec.name!r}: cameras {too_far} have slots beyond policy.cameras={self.views}")
        self._language = p["language"]
        self._tokenize = None  # built on first use: it may import transformers
        self._tokens: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def window(self, history: Sequence[RawObservation], embodiment: str) -> Window:
        """Make a window from at most n_obs_steps observations, oldest first; a shorter history repeats its first.

        Raises:
            ValueError: the history is empty or too long, or its stamps do not rise.
        """
        if not 1 <= len(history) <= self.frames:
            raise ValueError(f"history has {len(history)} observations, the policy takes 1..{self.frames}")
        stamps = [o.stamp for o in history]
        if any(b <= a for a, b in pairwise(stamps)):
            raise ValueError(f"stamps of a history must rise, got {stamps}")
        missing = self.frames - len(history)
        full = [history[0]] * missing + list(history)
        return Window(
            images={c: np.stack([o.images[c] for o in full]) for c in self._camera_names(history, embodiment)},
            frame_valid=np.arange(self.frames) >= missing,
            state=np.stack([o.state for o in full]),
            instruction=history[-1].instruction,
            embodiment=embodiment,
            stamp=history[-1].stamp,
        )

    def observe(self, windows: Sequence[Window]) -> Observation:
        """Make the batched observation; images stay uint8.

        Raises:
            ValueError: unknown embodiment, other cameras, image sizes, state dims, or a state that is not finite.
        """
        tokens = [self.tokens(w.instruction) for w in windows]
        return replace(
            self.low_dim(windows),
            images=self.images(windows),
            language=torch.from_numpy(np.stack([ids for ids, _ in tokens])),
            language_valid=torch.from_numpy(np.stack([valid for _, valid in tokens])),
        )

    def images(self, windows: Sequence[Window]) -> UInt8[Tensor, "b t v 3 z z"]:
        """Fit every frame to the policy's size; a slot without camera is black.

        Raises:
            ValueError: unknown embodiment, other cameras, image sizes or dtypes.
        """
        size = self.image_size
        images = np.zeros((len(windows), self.frames, self.views, size, size, 3), np.uint8)
        for i, w in enumerate(windows):
            for camera in self._spec(w.embodiment).cameras:
                images[i, :, camera.slot] = self._fit(self._frames_of(w, camera))
        return torch.from_numpy(images).permute(0, 1, 2, 5, 3, 4)  # a view: channels-last, as convolutions like it

    def low_dim(self, windows: Sequence[Window]) -> Observation:
        """Make the observation without pictures and words, for a caller that keeps those from tick to tick.

        Raises:
            ValueError: unknown embodiment, wrong number of state dims, or a state that is not finite.
        """
        b = len(windows)
        image_valid = np.zeros((b, self.frames, self.views), bool)
        state = np.zeros((b, self.frames, self.state_dim), np.float32)
        for i, w in enumerate(windows):
            spec = self._spec(w.embodiment)
            image_valid[i, :, [c.slot for c in spec.cameras]] = w.frame_valid
            if not np.isfinite(w.state).all():
                raise ValueError(f"state of {spec.name!r} is not finite: {w.state.tolist()}")
            state[i] = pad(self._state[spec.name].apply(w.state), spec.state, self.state_dim)
        names = [w.embodiment for w in windows]
        none = torch.zeros(b, 0, dtype=torch.long)
        return Observation(
            images=torch.zeros(b, self.frames, self.views, 3, 0, 0, dtype=torch.uint8),
            image_valid=torch.from_numpy(image_valid),
            state=torch.from_numpy(state),
            state_valid=torch.from_numpy(np.stack([self.state_mask[n] for n in names])),
            language=none,
            language_valid=none.bool(),
            embodiment=torch.tensor([self.index[n] for n in names]),
        )

    def frame(self, window: Window, camera: CameraSpec, t: int) -> UInt8[Tensor, "1 3 z z"]:
        """Return frame t of one camera as `observe` would put it into the batch.

        Raises:
            ValueError: another camera, image size or dtype.
        """
        frames = self._fit(self._frames_of(window, camera)[t : t + 1])  # [1 z z 3]
        return torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)

    def batch(self, windows: Sequence[Window]) -> Batch:
        """Make a training batch from windows that carry actions."""
        observation = self.observe(windows)
        actions = np.stack(
            [self.encode_actions(w.actions, w.embodiment, w.state[-1]) for w in windows if w.actions is not None]
        )
        assert len(actions) == len(windows), "training windows carry actions"
        steps = np.stack([w.step_valid for w in windows if w.step_valid is not None])  # [b n]
        dims = np.stack([self.action_mask[w.embodiment] for w in windows])  # [b A]
        valid = steps[:, :, None] & dims[:, None, :]  # [b n A]
        return Batch(observation, torch.from_numpy(actions * valid), torch.from_numpy(valid))

    def encode_actions(
        self, values: Float[np.ndarray, "n a"], embodiment: str, state: Float[np.ndarray, "s"]
    ) -> Float[np.ndarray, "n A"]:
        """Normalise physical actions with their own embodiment's statistics and pad them.

        state: physical, at the chunk's start, for contracts of relative actions.

        Raises:
            ValueError: wrong number of dims, or a value that is not finite.
        """
        spec, normalizer = self._spec(embodiment), self._action[embodiment]
        if not np.isfinite(values).all():
            raise ValueError(f"an action of {embodiment!r} is not finite (first bad row {_bad_row(values)})")
        if self.relative and values.shape[-1] == spec.action_dim:
            values = to_relative(values, state, spec)
        return pad(normalizer.apply(values), spec.action, self.action_dim)

    def decode_actions(
        self, padded: Float[np.ndarray, "n A"], embodiment: str, stamp: float, state: Float[np.ndarray, "s"]
    ) -> ActionChunk:
        """Turn the network's actions back into a physical chunk; inverts `encode_actions`.

        Raises:
            ValueError: a value is not finite: nothing may reach a robot from such a network.
        """
        spec = self._spec(embodiment)
        values = self._action[embodiment].invert(unpad(padded, spec.action))
        if not np.isfinite(values).all():
            raise ValueError(f"the policy's action for {embodiment!r} is not finite (first bad row {_bad_row(values)})")
        if self.relative:
            values = to_absolute(values, state, spec)
        return ActionChunk(values, stamp, spec.action_dt, embodiment)

    def tokens(self, instruction: str) -> tuple[np.ndarray, np.ndarray]:
        """Return (ids, valid) of an instruction, each distinct string tokenised once."""
        if instruction not in self._tokens:
            if self._tokenize is None:
                self._tokenize = tokenizer(LanguageConfig(layers=0, **self._language))
            self._tokens[instruction] = self._tokenize(instruction)
        return self._tokens[instruction]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_tokenize": None}  # closures do not travel to loader workers

    def _spec(self, embodiment: str) -> EmbodimentSpec:
        if embodiment not in self.specs:
            raise ValueError(f"embodiment {embodiment!r} is not in the contract; it knows {sorted(self.specs)}")
        return self.specs[embodiment]

    def _camera_names(self, history: Sequence[RawObservation], embodiment: str) -> list[str]:
        names = [c.name for c in self._spec(embodiment).cameras]
        for o in history:
            if sorted(o.images) != sorted(names):
                raise ValueError(f"observation has cameras {sorted(o.images)}, {embodiment!r} has {sorted(names)}")
        return names

    def _frames_of(self, w: Window, camera: CameraSpec) -> UInt8[np.ndarray, "t h w 3"]:
        if camera.name not in w.images:
            raise ValueError(f"window has cameras {sorted(w.images)}, {w.embodiment!r} needs {camera.name!r}")
        frames = w.images[camera.name]
        expected = (self.frames, camera.height, camera.width, 3)
        if frames.dtype != np.uint8 or frames.shape != expected:
            raise ValueError(
                f"camera {camera.name!r} of {w.embodiment!r}: got {frames.dtype} {list(frames.shape)}, "
                f"needs uint8 {list(expected)}"
            )
        return frames

    def _fit(self, frames: UInt8[np.ndarray, "t h w 3"]) -> UInt8[np.ndarray, "t z z 3"]:
        _, h, w, _ = frames.shape
        size = self.image_size
        if (h, w) == (size, size):
            return frames
        if self.contract.preprocess["resize"] == "letterbox":
            side = max(h, w)
            top, left = (side - h) // 2, (side - w) // 2
            frames = np.pad(frames, ((0, 0), (top, side - h - top), (left, side - w - left), (0, 0)))
        x = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float()
        x = F.interpolate(x, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
        return x.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def _bad_row(values: np.ndarray) -> int:
    return int(np.flatnonzero(~np.isfinite(values).all(-1))[0])
