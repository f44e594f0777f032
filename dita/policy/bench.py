"""How long one control tick of a checkpoint takes on this machine, on made-up observations of its contract."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dita.checkpoint import blank_weights
from dita.config import PolicyConfig
from dita.embodiment import embodiment_from_dict
from dita.normalize import fit
from dita.policy.fast import PolicySession
from dita.policy.policy import DitaPolicy
from dita.preprocess import Contract
from dita.types import EmbodimentSpec, RawObservation

INSTRUCTION = "pick up the cup"
WARM_UP = 5  # ticks: lazy initialisation, capture


@dataclass(frozen=True)
class PolicyTiming:
    """Seconds of a tick: image in, chunk out; p50, p95, p99 over the measured ones."""

    p50: float
    p95: float
    p99: float
    ticks: int
    rate: float  # [Hz] asked for
    misses: int  # ticks longer than one period of it
    path: str
    refused: dict[str, str]  # faster paths, and why not
    device: str
    precision: str
    num_inference_steps: int


def bench_policy(
    policy: DitaPolicy,
    *,
    embodiment: str | None,
    num_inference_steps: int | None,
    path: Literal["auto", "graph", "compiled", "eager"],
    rate: float,
    ticks: int,
    seed: int = 0,
) -> PolicyTiming:
    """Time ticks in a steady state: one new frame per camera, the instruction unchanged.

    A checkpoint that knows no embodiment is timed with one made up from its sizes.

    Raises:
        ValueError: `embodiment` is not the checkpoint's, or a count or the rate is not positive.
    """
    if ticks < 1 or rate <= 0:
        raise ValueError(f"ticks must be at least 1 and the rate positive, got {ticks} and {rate}")
    if not policy.specs:
        policy = with_stand_in(policy)
    session = PolicySession(policy, embodiment=embodiment, num_inference_steps=num_inference_steps, path=path)
    spec = policy.specs[session.embodiment]
    rng = np.random.default_rng(seed)
    if policy.config.language.kind == "transformers" and policy.config.language.pretrained is None:
        session.instruct(INSTRUCTION, torch.zeros(1, policy.config.language.max_tokens, policy.config.dim))
    frames = [make_observation(spec, rng, i) for i in range(policy.config.n_obs_steps)]
    seconds = []
    for i in track(range(WARM_UP + ticks), "ticks", console=Console(stderr=True), transient=True):
        began = time.perf_counter()
        session.predict(frames, seed=i)
        seconds.append(time.perf_counter() - began)
        frames = [*frames[1:], make_observation(spec, rng, i + len(frames))]
    steady = seconds[WARM_UP:]
    p50, p95, p99 = (float(p) for p in np.percentile(steady, (50, 95, 99)))
    return PolicyTiming(
        p50, p95, p99, ticks, rate, sum(s > 1 / rate for s in steady), session.path, session.refused,
        device_name(policy.device), str(policy.model.dtype).removeprefix("torch."), session.steps,
    )  # fmt: skip


def make_observation(spec: EmbodimentSpec, rng: np.random.Generator, tick: int) -> RawObservation:
    """Make up one observation of an embodiment: noise for pictures, states within their limits."""
    images = {c.name: rng.integers(0, 256, (c.height, c.width, 3), np.uint8) for c in spec.cameras}
    low, high = (np.array([v for f in spec.state for v in getattr(f, end)], np.float32) for end in ("low", "high"))
    state = (low + (high - low) * rng.random(len(low), np.float32)).astype(np.float32)
    return RawObservation(images, state, INSTRUCTION, tick * spec.obs_dt)


def with_stand_in(policy: DitaPolicy) -> DitaPolicy:
    """Return the network with a made-up embodiment of its sizes, for checkpoints that know none."""
    spec = stand_in(policy.config)
    zeros = np.linspace(-1, 1, 8, dtype=np.float32)[:, None]
    stats = fit(spec, [(zeros.repeat(spec.state_dim, 1), zeros.repeat(spec.action_dim, 1))])
    p = policy.contract.preprocess
    contract = Contract(p, {spec.name: spec}, {spec.name: stats})
    with blank_weights(policy.config):
        twin = DitaPolicy(policy.config, policy.diffusion.config, contract, policy.diffusion.alphas_cumprod)
    twin.load_state_dict(policy.state_dict(), assign=True)
    return twin.to(policy.device).eval()


def stand_in(config: PolicyConfig) -> EmbodimentSpec:
    """Make up an embodiment that fills a policy's cameras, actions and at most seven states."""
    field: dict[str, Any] = {
        "kind": "joint_position", "unit": "rad", "frame": "joint", "mode": "absolute", "reference": None, "scale": 1.0,
        "slot": 0,
    }  # fmt: skip
    states = min(7, config.state_dim)
    size, z = config.action_dim, config.vision.image_size
    return embodiment_from_dict(
        {
            "name": "stand_in", "robot": "made up to measure speed",
            "obs_dt": 0.1, "action_dt": 0.1, "control_hz": 10.0,
            "state": [{**field, "name": "joints", "size": states, "low": [-1.0] * states, "high": [1.0] * states}],
            "action": [{**field, "name": "joints", "size": size, "low": [-1.0] * size, "high": [1.0] * size}],
            "cameras": [{"name": f"camera{i}", "height": z, "width": z, "slot": i} for i in range(config.cameras)],
            "limits": None,
        }
    )  # fmt: skip


def print_timing(timing: PolicyTiming) -> None:
    """Print a table."""
    table = Table(title="one control tick: image in, chunk out", show_header=False)
    for name in ("p50", "p95", "p99"):
        table.add_row(name, f"{getattr(timing, name) * 1e3:.1f} ms")
    table.add_row("ticks", str(timing.ticks))
    table.add_row(f"misses at {timing.rate:g} Hz", f"{timing.misses} of {timing.ticks}")
    table.add_row("path", timing.path)
    for path, why in timing.refused.items():
        table.add_row(f"not {path}", why)
    table.add_row("device", timing.device)
    table.add_row("precision, steps", f"{timing.precision}, {timing.num_inference_steps}")
    Console().print(table)


def device_name(device: torch.device) -> str:
    """Say which device it is: "NVIDIA ...", or "cpu, 2 threads"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device}, {torch.get_num_threads()} threads"
