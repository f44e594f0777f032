"""Demonstrations played again with their low-dimensional state, and exported for robomimic."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32
from rich.progress import track

import dita.envs
from benchmarks.peers_suite import LowDimEnvConfig
from dita.datasets.store import Store, StoreWriter
from dita.embodiment import load_embodiment
from dita.envs.base import RobotEnv
from dita.envs.collect import demonstrate
from dita.types import EmbodimentSpec, Episode


def low_dim_store(source: Path, out: Path, env: LowDimEnvConfig, action_noise: float) -> None:
    """Play a store's demonstrations again, from their seeds, and write them with the low-dimensional state.

    Raises:
        ValueError: an episode is of no scripted expert, or does not come out bit-equal: same actions, same states.
    """
    store, spec = Store(source), load_embodiment(env.embodiment)
    envs: dict[str, RobotEnv] = {}
    about = f"{store.name}, played again with {', '.join(f.name for f in spec.state)}"
    with StoreWriter.create(out, spec, source=about, licence="MIT", exist="resume") as writer:
        for i, entry in enumerate(track(store.episodes, f"low-dimensional states of {store.name}")):
            if entry.source in writer.sources():
                continue
            found = re.fullmatch(r"(\w+)/(.+)/seed=(\d+)", entry.source)
            if found is None:
                raise ValueError(f"{source}: episode {i} is from {entry.source!r}, not from a scripted expert")
            task, seed = found[2], int(found[3])
            envs[task] = envs.get(task) or dita.envs.make(env, task)
            envs[task].reset(seed=seed)
            episode = demonstrate(envs[task], seed, action_noise)
            _require_equal(store, i, episode)
            assert episode is not None
            writer.add(episode)
    for played in envs.values():
        played.close()


def _require_equal(store: Store, i: int, episode: Episode | None) -> None:
    dims = store.spec.state_dim
    if episode is None or not (
        np.array_equal(store.action(i), episode.action) and np.array_equal(store.state(i), episode.state[:, :dims])
    ):
        raise ValueError(
            f"{store.path}: episode {i} ({store.episodes[i].source}) comes out differently here: it was recorded with "
            "another action_noise or with other versions of the simulator; collect it again on this machine"
        )


def export_robomimic(store: Store, out: Path) -> dict[str, Any]:
    """Write a store's low-dimensional part as robomimic's HDF5: `data/demo_<i>/{actions, obs/<field>}`.

    Actions are scaled from the embodiment's limits to -1..1, as robomimic takes them; returns its env_args.
    """
    import h5py

    low, high = action_limits(store.spec)
    env_args = {"env_name": store.spec.name, "type": 2, "env_kwargs": {}}  # 2: a gym environment
    with h5py.File(out, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps(env_args)
        data.attrs["total"] = sum(store.length(i) for i in range(len(store.episodes)))
        for i in range(len(store.episodes)):
            demo, length = data.create_group(f"demo_{i}"), store.length(i)
            demo.attrs["num_samples"] = length
            demo["actions"] = 2 * (store.action(i) - low) / (high - low) - 1
            for name, values in state_fields(store.spec, store.state(i)).items():
                demo[f"obs/{name}"] = values
            demo["rewards"] = np.zeros(length, np.float32)
            demo["dones"] = (np.arange(length) == length - 1).astype(np.int64)
    return env_args


def action_limits(spec: EmbodimentSpec) -> tuple[Float32[np.ndarray, "a"], Float32[np.ndarray, "a"]]:
    """Return the lowest and highest action of an embodiment, SI."""
    return (
        np.concatenate([f.low for f in spec.action]).astype(np.float32),
        np.concatenate([f.high for f in spec.action]).astype(np.float32),
    )


def state_fields(spec: EmbodimentSpec, state: Float32[np.ndarray, "... s"]) -> dict[str, Float32[np.ndarray, "... d"]]:
    """Split a state into its named fields."""
    ends = np.cumsum([f.size for f in spec.state])
    return dict(zip([f.name for f in spec.state], np.split(state, ends[:-1], axis=-1), strict=True))
