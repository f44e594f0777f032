"""Three robots in one batch, end to end: other dims, rates and cameras; each with its own statistics."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import embodiment_dict, field, make_history, policy_config
from test_store import create, make_episode
from test_train import config_for

from dita.config import TrainConfig
from dita.datasets.dataset import WindowDataset, iter_low_dim
from dita.datasets.mixture import MixtureSampler, check_rates, loader
from dita.datasets.store import Store
from dita.embodiment import embodiment_from_dict
from dita.normalize import fit
from dita.train import Trainer, build_policy
from dita.types import EmbodimentSpec

NAMES = ("arm", "joints", "base")


def robots() -> dict[str, EmbodimentSpec]:
    """A hand moved by deltas at 80 Hz, seven joints at 20 Hz with two cameras, a mobile base at 40 Hz in m/s."""
    hand = embodiment_dict("arm") | {"action_dt": 0.05}
    joints = embodiment_dict("joints") | {
        "state": [field("q", "joint_position", 7, 0, bound=3.0)],
        "action": [field("q", "joint_position", 7, 0, bound=3.0), field("grip", "gripper_position", 1, 7)],
        "cameras": [
            {"name": "front", "height": 24, "width": 40, "slot": 0},
            {"name": "wrist", "height": 16, "width": 16, "slot": 1},
        ],
        "control_hz": 20.0, "action_dt": 0.05,
    }  # fmt: skip
    base = embodiment_dict("base") | {
        "state": [field("speed", "base_velocity", 2, 8)],
        "action": [field("speed", "base_velocity", 2, 8)],
        "cameras": [{"name": "mast", "height": 48, "width": 32, "slot": 1}],
        "control_hz": 40.0, "action_dt": 0.05,
    }  # fmt: skip
    return {values["name"]: embodiment_from_dict(values) for values in (hand, joints, base)}


SCALES = {"arm": 0.01, "joints": 3.0, "base": 40.0}


def write(path: Path, spec: EmbodimentSpec, scale: float) -> Store:
    with create(path, spec) as writer:
        for number, length in enumerate((60, 40)):
            episode = make_episode(spec, number, length)
            action = np.random.default_rng(number).uniform(0, scale, (length, spec.action_dim)).astype(np.float32)
            writer.add(dataclasses.replace(episode, action=action))
    return Store(path)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[Store]:
    folder = tmp_path_factory.mktemp("mixture")
    return [write(folder / f"{name}.zarr", spec, SCALES[name]) for name, spec in robots().items()]


def mixture_config(run: Path, **changes) -> TrainConfig:
    vision = dataclasses.replace(policy_config().vision, image_size=32)
    policy = policy_config(cameras=2, action_dim=10, state_dim=12, embodiment_token=True, vision=vision, **changes)
    return config_for(Path("-"), run, policy=policy, batch_size=12)


def test_three_robots_in_one_batch(stores: list[Store], tmp_path: Path) -> None:
    config = mixture_config(tmp_path)
    episodes = [range(2)] * 3
    policy = build_policy(config, stores, episodes)
    preprocessor, contract = policy.preprocessor, policy.preprocessor.contract
    for store in stores:
        alone = fit(store.spec, iter_low_dim(store))
        assert contract.stats[store.spec.name] == alone  # nothing averaged over robots
    keys = {"arm": "action/delta", "joints": "action/q", "base": "action/speed"}
    highest = [max(contract.stats[name].fields[key].max) for name, key in keys.items()]
    assert highest[0] < 0.05 and 2.5 < highest[1] < 3 and 30 < highest[2] < 40  # four 80 Hz deltas make one of 0.05 s

    datasets = [WindowDataset(store, n_obs_steps=2, chunk_size=6, pad_end="mask") for store in stores]
    sampler = MixtureSampler([len(d) for d in datasets], [1, 1, 1], seed=0)
    batch = next(iter(loader(datasets, sampler, batch_size=12, preprocess=preprocessor.batch, start_step=0, steps=1,
                             workers=0)))  # fmt: skip
    drawn = sampler.sample(0, 12)
    assert {d for d, _ in drawn} == {0, 1, 2}
    slots = {"arm": [0, 1, 2, 6], "joints": [*range(8)], "base": [8, 9]}
    cameras = {"arm": [0], "joints": [0, 1], "base": [1]}
    for i, (d, window) in enumerate(drawn):
        name, raw = NAMES[d], datasets[d][window]
        dims = batch.action_valid[i].any(0).nonzero().flatten().tolist()
        assert dims == (slots[name] if raw.step_valid.any() else [])  # nothing is left to do at an episode's last frame
        assert batch.observation.image_valid[i].any(0).nonzero().flatten().tolist() == cameras[name]
        assert (batch.observation.images[i][:, [v for v in (0, 1) if v not in cameras[name]]] == 0).all()
        assert batch.observation.embodiment[i] == preprocessor.index[name]
        assert batch.actions[i].abs().max() <= 1 + 1e-5
        assert not raw.step_valid.all() or batch.actions[i][:, dims].std() > 0.2
        chunk = preprocessor.decode_actions(batch.actions[i].numpy(), name, 0.0, raw.state[-1])
        np.testing.assert_allclose(
            chunk.values[raw.step_valid], raw.actions[raw.step_valid], rtol=1e-4, atol=1e-4 * SCALES[name]
        )

    trainer = Trainer(policy, config)
    before = {n: p.detach().clone() for n, p in policy.named_parameters()}
    metrics = trainer.step(0, batch)
    assert np.isfinite(metrics["loss"]) and metrics["clip_rate"] == 0
    assert sum(not torch.equal(p, before[n]) for n, p in policy.named_parameters()) > len(before) / 2
    for name, spec in robots().items():
        chunk = policy.predict(make_history(spec, 1), seed=0, embodiment=name)
        assert chunk.values.shape == (6, spec.action_dim) and chunk.action_dt == 0.05
        field_name = spec.action[0].name
        low, high = (np.array(getattr(contract.stats[name].fields[f"action/{field_name}"], k)) for k in ("min", "max"))
        here = chunk.values[:, : spec.action[0].size]
        assert (here >= low - 1e-4 * SCALES[name]).all() and (here <= high + 1e-4 * SCALES[name]).all()


def test_one_robots_data_does_not_touch_anothers_contract(stores: list[Store], tmp_path: Path) -> None:
    config = mixture_config(tmp_path / "run")
    contracts = []
    for scale in (40.0, 4000.0):
        other = write(tmp_path / f"{scale}.zarr", robots()["base"], scale)
        contracts.append(build_policy(config, [*stores[:2], other], [range(2)] * 3).preprocessor.contract)
    a, b = contracts
    assert a.hash_of("arm") == b.hash_of("arm") and a.hash_of("joints") == b.hash_of("joints")
    assert a.hash_of("base") != b.hash_of("base") and a.root_hash != b.root_hash


def test_the_clip_rate_counts_what_sampling_cannot_reach(stores: list[Store], tmp_path: Path) -> None:
    """Uniform actions between their 1 % and 99 % quantiles: two in a hundred lie outside."""
    config = dataclasses.replace(mixture_config(tmp_path), preprocess=dataclasses.replace(
        mixture_config(tmp_path).preprocess, normalization="q01_q99"))  # fmt: skip
    policy = build_policy(config, stores[1:2], [range(2)])
    dataset = WindowDataset(stores[1], n_obs_steps=2, chunk_size=6, pad_end="mask")
    batch = policy.preprocessor.batch([dataset[i] for i in range(0, 100, 2)])
    rate = Trainer(policy, config).step(0, batch)["clip_rate"]
    outside = (batch.actions.abs() > 1 + 1e-5)[batch.action_valid]
    assert rate == pytest.approx(float(outside.float().mean())) and 0.005 < rate < 0.06


def test_rates_that_the_network_cannot_tell_apart_are_refused() -> None:
    specs = [embodiment_from_dict(embodiment_dict(name)) for name in ("a", "b")]
    check_rates(specs, told=False)
    for key in ("obs_dt", "action_dt"):
        other = [specs[0], dataclasses.replace(specs[1], **{key: 0.1})]
        with pytest.raises(ValueError, match=rf"{key} differs in this mixture \(a 0\.0\d+ s, b 0\.1 s\): .*token=true"):
            check_rates(other, told=False)
        check_rates(other, told=True)


def test_a_batch_pins_every_tensor(stores: list[Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU nothing can be pinned; that torch's loader would ask every tensor can be seen all the same."""
    policy = build_policy(mixture_config(tmp_path), stores[:1], [range(2)])
    batch = policy.preprocessor.batch([WindowDataset(stores[0], n_obs_steps=2, chunk_size=6, pad_end="mask")[3]])
    pinned: list[torch.Tensor] = []

    def pin(tensor: torch.Tensor, *args: object) -> torch.Tensor:
        pinned.append(tensor)
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    from torch.utils.data._utils.pin_memory import pin_memory

    copy = pin_memory(batch)
    assert type(copy) is type(batch) and len(pinned) == len(dataclasses.fields(batch.observation)) + 2
    assert torch.equal(copy.actions, batch.actions) and copy.actions is not batch.actions


def test_each_instruction_is_tokenised_once(stores: list[Store], tmp_path: Path, monkeypatch) -> None:
    policy = build_policy(mixture_config(tmp_path), stores[:1], [range(2)])
    asked: list[str] = []
    from dita.policy.language import tokenizer

    def counting(config):
        tokenize = tokenizer(config)
        return lambda text: (asked.append(text), tokenize(text))[1]

    monkeypatch.setattr("dita.preprocess.tokenizer", counting)
    dataset = WindowDataset(stores[0], n_obs_steps=2, chunk_size=6, pad_end="mask")
    for _ in range(2):
        policy.preprocessor.batch([dataset[i] for i in range(0, 100, 5)])
    assert sorted(asked) == ["open the drawer", "press the button"]
