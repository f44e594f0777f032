"""The suite `low_dim`: a state that also holds objects and goal, and no camera.

The environments of this project hide objects and goal from the policy, as a camera is there to see them. robomimic's
low-dimensional methods are published with the objects' poses as input, so they get them here, and ours, run state-only,
gets the same fields.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import dita.envs
from dita.config import EnvConfig
from dita.embodiment import embodiment_from_dict, embodiment_to_dict, load_embodiment
from dita.types import EmbodimentSpec

SUITE = "low_dim"
# suite -> what its state gains: name and number of dims
EXTRA = {"metaworld": (("object", 3), ("goal", 3)), "choice": (("cylinders", 6),)}


@dataclass(frozen=True)
class LowDimEnvConfig(EnvConfig):
    """An EnvConfig of this suite; a spawned worker that unpickles it imports this module, which registers the suite."""


def low_dim_embodiment(spec: EmbodimentSpec, suite: str) -> EmbodimentSpec:
    """Return an embodiment without cameras whose state has the suite's extra fields behind its own."""
    values = embodiment_to_dict(spec)
    slot = max(f.slot + f.size for f in spec.state)
    for name, size in EXTRA[suite]:
        values["state"].append({
            "name": name, "kind": "ee_position", "size": size, "unit": "m", "frame": "base", "mode": "absolute",
            "reference": None, "scale": 1.0, "slot": slot, "low": [-2.0] * size, "high": [2.0] * size,
        })  # fmt: skip
        slot += size
    return embodiment_from_dict(values | {"name": f"{spec.name}_{SUITE}", "cameras": [], "limits": None})


def low_dim_env(env: EnvConfig, folder: Path) -> LowDimEnvConfig:
    """Return the low-dimensional twin of an env config; its embodiment goes to a file in `folder`."""
    spec = low_dim_embodiment(load_embodiment(env.embodiment), env.suite)
    path = folder / f"{spec.name}.json"
    path.write_text(json.dumps(embodiment_to_dict(spec), indent=1))
    return LowDimEnvConfig(SUITE, str(path), env.tasks, env.max_steps, env.fast_render)


dita.envs.SUITES[SUITE] = "benchmarks.peers_low_dim_envs"
