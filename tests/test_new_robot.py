"""docs/new_robot.md: its commands run on the twin, in its order, at the smallest size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import diffusion_config, policy_config
from convert_inputs import write_zarr2
from test_docs import ROOT, blocks, commands

from dita.checkpoint import load_policy, save_policy
from dita.cli import main
from dita.config import PreprocessConfig
from dita.datasets.store import Store
from dita.embodiment import load_embodiment
from dita.normalize import fit
from dita.policy.policy import DitaPolicy
from dita.preprocess import make_contract

PAGE = ROOT / "docs" / "new_robot.md"
STEPS = ["steps=2", "batch_size=4", "noise_samples_per_context=1", "save_every=2", "threads=1"]
SMALLER = {
    "collect": ["episodes=3", "workers=1"],
    "finetune": [*STEPS, "shots=3"],
    "train": [*STEPS, "policy.layers=1", "policy.vision.tokens=9"],
    "eval": ["episodes=1", "n_envs=1", "env.max_steps=16", "videos=0"],
}
LIVE = [words for words in commands(PAGE) if words[1] == "robot"]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Return a working folder with the page's embodiment and a checkpoint of another robot."""
    monkeypatch.chdir(tmp_path)
    (yaml,) = blocks(PAGE, "yaml")
    Path("my_arm.yaml").write_text(yaml)
    config = policy_config(n_action_steps=6)
    spec = load_embodiment("metaworld_sawyer")
    rng = np.random.default_rng(0)
    low, high = (np.concatenate([getattr(f, k) for f in (*spec.state, *spec.action)]) for k in ("low", "high"))
    rows = rng.uniform(low, high, (500, len(low))).astype(np.float32)
    stats = fit(spec, [(rows[:, : spec.state_dim], rows[:, spec.state_dim :])])
    contract = make_contract(PreprocessConfig("min_max", "squash", "stored"), config, [spec], [stats])
    policy = DitaPolicy(config, diffusion_config(num_inference_steps=1), contract)
    save_policy(policy, Path("outputs/demo/train/policy"))
    return tmp_path


def write_buffer(store: Store) -> None:
    """Write a store's first episode as a ReplayBuffer in the source's units."""
    spec = store.spec
    action = store.action(0) / np.repeat([f.scale for f in spec.action], [f.size for f in spec.action])
    frames = range(store.length(0))
    arrays = {"state": store.state(0), "action": action.astype(np.float32)}
    arrays |= {k: store.read_frames(0, c, frames) for k, c in (("front", "corner4"), ("wrist", "gripperPOV"))}
    for key, values in arrays.items():
        write_zarr2(Path("buffer.zarr"), f"data/{key}", values, 32)
    write_zarr2(Path("buffer.zarr"), "meta/episode_ends", np.array([len(frames)]), 1)
    for group in ("buffer.zarr", "buffer.zarr/data", "buffer.zarr/meta"):
        Path(group, ".zgroup").write_text('{"zarr_format": 2}')


def test_the_page_runs(folder, capsys) -> None:
    record, predict = blocks(PAGE, "python")
    ran = []
    for program, *words in commands(PAGE):
        assert program == "dita"
        if words[0] == "robot":
            continue
        assert main([*words, *SMALLER.get(words[0], [])]) == 0, capsys.readouterr().err
        ran.append(words[0])
        if words[0] == "collect":
            write_buffer(Store("data/my_arm.zarr"))
        if words[0] == "finetune":
            said = " ".join(capsys.readouterr().out.split())
            assert "action.hand_delta reused the checkpoint's metaworld_sawyer" in said
            assert "camera gripperPOV new" in said and "open-loop replay: 3 of 3 solve the task" in said
    assert ran == ["collect", "convert", "inspect", "inspect", "finetune", "eval", "train", "eval", "compare"]
    collected, converted = Store("data/my_arm.zarr"), Store("data/converted.zarr")
    np.testing.assert_allclose(converted.action(0), collected.action(0), atol=1e-7)
    assert set(load_policy("outputs/my_arm/full").specs) == {"metaworld_sawyer", "my_arm"}
    exec(record, {})
    assert len(Store("data/python.zarr").episodes) == 10
    exec(predict, {})
    assert "[[" in capsys.readouterr().out


@pytest.mark.live
def test_the_pages_live_commands_run(folder) -> None:
    (_, *record), (_, *live) = LIVE
    assert main([*record, "episodes=1", "domain_id=77"]) == 0
    store = Store("data/recorded.zarr")
    assert len(store.episodes) == 1 and store.spec == load_embodiment("my_arm.yaml")
    small = [*STEPS, "shots=1", "replay=false", "run=outputs/my_arm/full"]
    assert main(["finetune", "outputs/demo/train", "data=data/recorded.zarr", *small]) == 0
    assert main([*live, "episodes=1", "env.max_steps=40", "domain_id=78"]) == 0
    told = json.loads(Path("outputs/my_arm/live/live.json").read_text())
    assert len(told["episodes"]) == 1 and not any(told["envelope"]["violations"].values())
