"""One instant through MuJoCo, through a Zarr store and through ROS messages gives one and the same Observation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import contract_of, policy_config

from dita.batch import Observation
from dita.config import EnvConfig
from dita.datasets.dataset import WindowDataset
from dita.datasets.store import Store, StoreWriter
from dita.embodiment import embodiment_to_dict
from dita.envs import make
from dita.preprocess import Preprocessor
from dita.types import Episode, RawObservation

pytest.importorskip("cyclonedds")

TASK = "drawer-open-v3"
STRIDE = 4  # control steps between observation frames


class LoopBus:
    """The bus without a network: every message still becomes CDR bytes and back."""

    def __init__(self) -> None:
        self.subscribers: dict[str, list[Callable[[Any], None]]] = {}
        self.time = 0.0

    def msg(self, type: str, **fields: Any) -> Any:
        from robot_io.bus_dds import message

        return message(type, **fields)

    def publisher(self, topic: str, type: str, qos: Any) -> Any:
        from robot_io.bus_dds import TYPES

        def publish(message: Any) -> None:
            for callback in self.subscribers.get(topic, []):
                callback(TYPES.deserialize_cdr(bytes(TYPES.serialize_cdr(message, type)), type))

        return _Publisher(publish)

    def subscribe(self, topic: str, type: str, qos: Any, callback: Callable[[Any], None], urgent: bool = True) -> None:
        self.subscribers.setdefault(topic, []).append(callback)

    def now(self) -> float:
        return self.time

    steady = now

    def timer(self, period: float, callback: Callable[[], None]) -> None: ...

    def log(self, *args: Any) -> None: ...

    def shutdown(self) -> None: ...

    def close(self) -> None: ...


class _Publisher:
    def __init__(self, publish: Callable[[Any], None]) -> None:
        self.publish = publish


@pytest.fixture(scope="module")
def instants() -> list[RawObservation]:
    env = make(EnvConfig("metaworld", "metaworld_sawyer", (TASK,), 100, True), TASK)
    env.reset(seed=3)
    frames = []
    for _ in range(2 * STRIDE + 1):
        frames.append(env.observe())
        env.step(env.expert_action())
    env.close()
    return frames


def through_zarr(instants: list[RawObservation], path: Any, preprocessor: Preprocessor) -> Observation:
    spec = next(iter(preprocessor.specs.values()))
    camera = spec.cameras[0].name
    episode = Episode(
        images={camera: np.stack([o.images[camera] for o in instants])},
        state=np.stack([o.state for o in instants]),
        action=np.zeros((len(instants), spec.action_dim), np.float32),
        stamp=np.arange(len(instants)) / spec.control_hz,
        instruction=instants[0].instruction,
        success=True,
        source="parity",
    )
    with StoreWriter.create(path, spec, source="parity", licence="CC0-1.0") as writer:
        writer.add(episode)
    dataset = WindowDataset(Store(path), n_obs_steps=2, chunk_size=4, pad_end="mask")
    return preprocessor.observe([dataset[2 * STRIDE]])


def through_ros(instants: list[RawObservation], preprocessor: Preprocessor) -> Observation:
    from robot_io.nodes.policy import PolicyNode
    from robot_io.nodes.twin import TwinNode

    spec = next(iter(preprocessor.specs.values()))
    seen: list[list[RawObservation]] = []
    bus = LoopBus()

    class Policy:
        def predict(self, history: Any, *, seed: int) -> Any:
            raise AssertionError("the loop is not started")

    class Env:
        instruction, commanded_position = instants[0].instruction, np.zeros(3)
        success = False
        frame = instants[0]

        def reset(self, **options: Any) -> None: ...

        def warnings(self) -> dict[str, int]:
            return {}

        def observe(self) -> RawObservation:
            return self.frame

    values = embodiment_to_dict(spec)
    node = PolicyNode(
        bus, Policy(), values, "hash", RawObservation,  # pyright: ignore
        n_obs_steps=2, seed=0, slop=0.001, max_age=1.0, interval=0.0,
    )  # fmt: skip
    node._loop.stop()
    node._loop.offer = lambda observation: seen.append([*(seen[-1:] and seen[-1][-1:]), observation])  # type: ignore
    node._armed = True
    env = Env()
    twin = TwinNode(bus, env, values, command_timeout=0.1)  # pyright: ignore
    twin.reset({"episode": 1, "task": TASK, "seed": 3})
    seen.clear()
    for i in (STRIDE, 2 * STRIDE):
        env.frame, bus.time = instants[i], i / spec.control_hz
        twin._send_state(bus.time, env.frame.state)
        twin._send_images(bus.time, env.frame)
    return preprocessor.observe([preprocessor.window(seen[-1], spec.name)])


def test_three_sources_one_observation(instants, tmp_path) -> None:
    from dita.embodiment import load_embodiment

    spec = load_embodiment("metaworld_sawyer")
    config = policy_config(
        vision=dataclasses.replace(policy_config().vision, image_size=96, tokens=9), state_dim=16, action_dim=7
    )
    preprocessor = Preprocessor(contract_of([spec], config))
    history = [instants[STRIDE], instants[2 * STRIDE]]
    simulated = preprocessor.observe([preprocessor.window(history, spec.name)])
    stored = through_zarr(instants, tmp_path / "parity.zarr", preprocessor)
    wired = through_ros(instants, preprocessor)
    assert not torch.equal(simulated.images[:, 0], simulated.images[:, 1])
    for name in (f.name for f in dataclasses.fields(simulated)):
        assert torch.equal(getattr(simulated, name), getattr(stored, name)), f"Zarr: {name}"
        assert torch.equal(getattr(simulated, name), getattr(wired, name)), f"ROS: {name}"
