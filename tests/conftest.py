"""Small worlds shared by the tests: an embodiment, its statistics, a tiny policy."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

from dita.config import DiffusionConfig, LanguageConfig, PolicyConfig, PreprocessConfig, VisionConfig
from dita.embodiment import embodiment_from_dict
from dita.normalize import fit
from dita.policy.policy import DitaPolicy
from dita.preprocess import Contract, make_contract
from dita.types import EmbodimentSpec, RawObservation, Window

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shapes", action="store_true", help="check jaxtyping shapes at run time")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--shapes"):
        from jaxtyping import install_import_hook

        install_import_hook(["dita"], "typeguard.typechecked")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that have slow tests: one that comes last runs alone, while the other worker waits."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def field(name: str, kind: str, size: int, slot: int, mode: str = "absolute", bound: float = 1.0) -> dict:
    return {
        "name": name, "kind": kind, "size": size, "unit": "m", "frame": "base", "mode": mode,
        "reference": "commanded" if mode == "delta" else None, "scale": 1.0, "slot": slot,
        "low": [-bound] * size, "high": [bound] * size,
    }  # fmt: skip


def embodiment_dict(name: str = "arm", cameras: int = 1, size: int = 32) -> dict:
    return {
        "name": name, "robot": "a test arm",
        "state": [field("hand", "ee_position", 3, 0), field("gripper", "gripper_position", 1, 9)],
        "action": [field("delta", "ee_position", 3, 0, "delta", 0.01), field("grip", "gripper_effort", 1, 6)],
        "cameras": [{"name": f"cam{i}", "height": size, "width": size, "slot": i} for i in range(cameras)],
        "obs_dt": 0.05, "action_dt": 0.0125, "control_hz": 80.0, "limits": None,
    }  # fmt: skip


@pytest.fixture
def spec() -> EmbodimentSpec:
    return embodiment_from_dict(embodiment_dict())


def policy_config(**changes) -> PolicyConfig:
    vision = VisionConfig("conv_qformer", 32, 4, 1, None, True, 16, 0, 0, None, False)
    values = {
        "name": "test", "dim": 64, "layers": 2, "heads": 2, "ffn_dim": 96, "n_obs_steps": 2, "chunk_size": 6,
        "n_action_steps": 3, "past_action_slots": 0, "max_committed_slots": 0,
        "action_dim": 7, "state_dim": 12, "cameras": 1,
        "state_tokens": True, "embodiment_token": False, "embodiment_dropout": 0.0,
        "action_embedding": "linear", "action_attention": "causal",
        "vision": vision, "language": LanguageConfig("bytes", 8, 1, None),
    }  # fmt: skip
    return PolicyConfig(**(values | changes))


def diffusion_config(**changes) -> DiffusionConfig:
    values = {
        "objective": "diffusion", "num_train_timesteps": 100, "beta_schedule": "squaredcos_cap_v2",
        "prediction_type": "epsilon", "timestep_spacing": "leading", "zero_terminal_snr": False, "clip_sample": 1.0,
        "solver": "ddim",
        "num_inference_steps": 5,
    }  # fmt: skip
    return DiffusionConfig(**(values | changes))


def make_stats(spec: EmbodimentSpec, seed: int = 0):
    rng = np.random.default_rng(seed)
    state = rng.uniform(-1, 1, (200, spec.state_dim)).astype(np.float32)
    action = rng.uniform(-0.01, 0.01, (200, spec.action_dim)).astype(np.float32)
    return fit(spec, [(state, action)])


def contract_of(
    specs: list[EmbodimentSpec], config: PolicyConfig, normalization: str = "min_max", actions: str = "stored"
) -> Contract:
    return make_contract(
        PreprocessConfig(normalization, "squash", actions), config, specs, [make_stats(s) for s in specs]
    )


def make_policy(spec: EmbodimentSpec, diffusion: dict | None = None, **changes) -> DitaPolicy:
    torch.manual_seed(0)
    config = policy_config(**changes)
    return DitaPolicy(config, diffusion_config(**(diffusion or {})), contract_of([spec], config))


def make_window(
    spec: EmbodimentSpec, seed: int, n: int = 6, instruction: str = "press the button", **changes
) -> Window:
    rng = np.random.default_rng(seed)
    values = {
        "images": {c.name: rng.integers(0, 256, (2, c.height, c.width, 3), np.uint8) for c in spec.cameras},
        "frame_valid": np.array([True, True]),
        "state": rng.uniform(-1, 1, (2, spec.state_dim)).astype(np.float32),
        "instruction": instruction, "embodiment": spec.name, "stamp": 1.0,
        "actions": rng.uniform(-0.01, 0.01, (n, spec.action_dim)).astype(np.float32),
        "step_valid": np.ones(n, bool),
    }  # fmt: skip
    return Window(**(values | changes))


def make_history(spec: EmbodimentSpec, seed: int, length: int = 2) -> list[RawObservation]:
    rng = np.random.default_rng(seed)
    return [
        RawObservation(
            {c.name: rng.integers(0, 256, (c.height, c.width, 3), np.uint8) for c in spec.cameras},
            rng.uniform(-1, 1, spec.state_dim).astype(np.float32),
            "press the button",
            0.05 * i,
        )
        for i in range(length)
    ]


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """Return a function: width -> folder of a small CLIP text model with random weights, written by transformers."""

    def write(width: int) -> Path:
        from benchmarks.process_rows import write_clip

        folder = tmp_path_factory.mktemp("clip")
        write_clip(folder, width, "quick")
        return folder

    return write
