"""The peers learn and act, see the same data and starts, and the page claims what its records allow."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from conftest import make_policy, make_window

import dita.envs
from benchmarks import peers, peers_low_dim, peers_networks, peers_robomimic, peers_run
from benchmarks.peers_methods import BUDGETS, METHODS, Job, jobs
from benchmarks.peers_page import comparisons, page, read_results
from benchmarks.peers_suite import low_dim_env
from dita.checkpoint import save_policy
from dita.config import CollectConfig, EnvConfig
from dita.datasets.store import Store
from dita.envs.collect import collect
from dita.policy.policy import DitaPolicy
from dita.types import RawObservation

DEMONSTRATIONS = 6
ENV = EnvConfig("choice", "choice_hand", ("touch-red",), 80, True)


def unet_policy(spec, **changes) -> DitaPolicy:
    policy = make_policy(spec, {"prediction_type": "sample"}, chunk_size=8, **changes)
    return peers_networks.replace_network(policy, "unet")


def test_the_unet_overfits_a_batch_and_comes_back_from_its_checkpoint(spec, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(peers_networks, "CHANNELS", (16, 32, 64))
    policy = unet_policy(spec)
    batch = policy.preprocessor.batch([make_window(spec, seed, 8) for seed in range(4)])
    optimizer = torch.optim.Adam(policy.parameters(), 2e-3)
    losses = []
    for step in range(40):
        loss = policy.loss(batch, 4, torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-5:]) < 0.2 * losses[0]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in policy.parameters())
    save_policy(policy, tmp_path / "policy")
    loaded = peers_networks.load_peer(tmp_path / "policy", "unet")
    history = [RawObservation({"cam0": np.zeros((32, 32, 3), np.uint8)}, np.zeros(4, np.float32), "press", 0.0)]
    a, b = (p.predict(history, seed=3).values for p in (policy, loaded))
    np.testing.assert_array_equal(a, b)
    assert a.shape == (8, 4)


def test_the_unet_is_told_picture_state_sentence_and_time(spec) -> None:
    policy = unet_policy(spec)
    with torch.no_grad():
        for layer in policy.model.vision.qformer.layers:  # they start as the identity: no sentence in the pictures
            torch.nn.init.normal_(layer.film_scale.weight)

    def prediction(t: float = 5.0, **changes) -> torch.Tensor:
        observation = policy.preprocessor.observe([make_window(spec, 0, 8, **changes)])
        x = torch.zeros(1, 1, 8, 7)
        tau = policy.model.time_tokens(torch.tensor(t))
        with torch.no_grad():
            return policy.model.denoise(x, tau, policy.model.suffix(policy.model.context(observation), None, 1))

    black = {"cam0": np.zeros((2, 32, 32, 3), np.uint8)}
    still = np.zeros((2, 4), np.float32)
    others = [{"images": black}, {"state": still}, {"instruction": "open the drawer"}, {"t": 50.0}]
    first = prediction()
    assert torch.equal(first, prediction())
    assert all((prediction(**other) - first).abs().max() > 1e-4 for other in others)


def test_noise_samples_of_a_context_do_not_see_each_other(spec) -> None:
    policy = unet_policy(spec)
    observation = policy.preprocessor.observe([make_window(spec, seed, 8) for seed in range(2)])
    x, t = torch.randn(2, 3, 8, 7, generator=torch.Generator().manual_seed(0)), torch.tensor([[1.0, 30, 90]] * 2)
    with torch.no_grad():
        context = policy.model.context(observation)
        together = policy.model.denoise(x, policy.model.time_tokens(t), context)
        alone = policy.model.denoise(x[1:, 2:], policy.model.time_tokens(t[1:, 2:]), context[1:])
    torch.testing.assert_close(together[1:, 2:], alone)


def test_the_unet_refuses_what_it_cannot_halve(spec) -> None:
    with pytest.raises(ValueError, match=r"divide by 4.*got 6"):
        peers_networks.replace_network(make_policy(spec), "unet")


def test_every_method_has_a_recipe_that_differs_in_its_part_only(tmp_path) -> None:
    configs = {}
    for name, method in METHODS.items():
        assert method.against is None or METHODS[method.against].low_dim == method.low_dim
        if method.network != "robomimic":
            config = peers_run.train_config(Job("full", "touch-red", name, 1), tmp_path, tmp_path)
            assert (config.steps, config.seed, config.diffusion.num_inference_steps) == (600, 1, 10)
            configs[name] = config
    assert configs["unet"] == configs["dita"] == configs["one_action"] and METHODS["one_action"].plays == "dita"
    assert configs["dita_state"].policy.cameras == 0
    for name in ("flow", "behaviour_cloning"):
        assert configs[name].diffusion.objective == name
        assert replace(configs[name], diffusion=configs["dita"].diffusion) == configs["dita"]


# ---- low-dimensional demonstrations


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Demonstrations with pictures, and the same ones with objects as numbers."""
    folder = tmp_path_factory.mktemp("stores")
    collect(CollectConfig(str(folder / "seen.zarr"), ENV, DEMONSTRATIONS, 0, 0.15, 1, "raw"), exist="error")
    env = low_dim_env(ENV, folder)
    peers_low_dim.low_dim_store(folder / "seen.zarr", folder / "low_dim.zarr", env, 0.15)
    return folder, env


def test_the_low_dimensional_store_holds_the_same_demonstrations_and_the_objects(stores) -> None:
    folder, env = stores
    seen, low = Store(folder / "seen.zarr"), Store(folder / "low_dim.zarr")
    assert [e.source for e in low.episodes] == [e.source for e in seen.episodes] and not low.spec.cameras
    played = dita.envs.make(env, "touch-red")
    for i in range(DEMONSTRATIONS):
        np.testing.assert_array_equal(low.action(i), seen.action(i))
        np.testing.assert_array_equal(low.state(i)[:, :3], seen.state(i))
        played.reset(seed=int(low.episodes[i].source.rpartition("=")[2]))
        red = np.array(played.places["red"], np.float32)  # pyright: ignore[reportAttributeAccessIssue]
        np.testing.assert_array_equal(low.state(i)[0, 3:5], red)
    played.close()


def test_demonstrations_that_come_out_differently_are_refused(stores, tmp_path) -> None:
    folder, env = stores
    with pytest.raises(ValueError, match=r"episode 0 .*comes out differently"):
        peers_low_dim.low_dim_store(folder / "seen.zarr", tmp_path / "low_dim.zarr", env, 0.05)


def test_meta_world_shows_object_and_goal(tmp_path) -> None:
    env = EnvConfig("metaworld", "metaworld_sawyer", ("reach-v3",), 20, True)
    plain, low = dita.envs.make(env, "reach-v3"), dita.envs.make(low_dim_env(env, tmp_path), "reach-v3")
    for e in (plain, low):
        e.reset(seed=7)
    assert low.start_hash == plain.start_hash  # both groups of methods play the same starts
    np.testing.assert_array_equal(low.state[:4], plain.state)
    np.testing.assert_allclose(low.state[7:], plain._env._target_pos, atol=1e-6)  # pyright: ignore
    assert low.observation_space["state"].contains(low.state)  # pyright: ignore[reportIndexIssue]
    for e in (plain, low):
        e.close()


def test_the_hdf5_is_as_robomimic_reads_it(stores, tmp_path) -> None:
    h5py = pytest.importorskip("h5py")
    store = Store(stores[0] / "low_dim.zarr")
    peers_low_dim.export_robomimic(store, tmp_path / "low_dim.hdf5")
    with h5py.File(tmp_path / "low_dim.hdf5") as file:
        assert file["data"].attrs["total"] == sum(store.length(i) for i in range(DEMONSTRATIONS))
        assert json.loads(file["data"].attrs["env_args"])["env_name"] == "choice_hand_low_dim"
        for i in range(DEMONSTRATIONS):
            demo = file[f"data/demo_{i}"]
            assert demo.attrs["num_samples"] == store.length(i) == len(demo["actions"])
            assert np.abs(demo["actions"][:]).max() <= 1 + 1e-6
            np.testing.assert_allclose(demo["actions"][:] * 0.02, store.action(i), atol=1e-8)  # limits: 2 cm a step
            np.testing.assert_array_equal(demo["obs/cylinders"][:], store.state(i)[:, 3:])
            assert demo["dones"][:].tolist() == [0] * (store.length(i) - 1) + [1]


# ---- the whole road


def test_a_tiny_campaign_runs_and_is_not_run_twice(tmp_path, monkeypatch) -> None:
    methods = ["unet", "dita_state"]
    if peers_robomimic.missing() is None:
        methods.append("robomimic_bc_rnn_gmm")
    asked = ["--tasks", "touch-red", "--budget", "tiny", "--seeds", "0", "--out", str(tmp_path / "out")]
    asked += ["--evidence", str(tmp_path), "--methods", *methods]
    peers.main(asked)
    records = json.loads((tmp_path / "peers.json").read_text())
    assert sorted(records) == [f"tiny/touch-red/{m}/0" for m in sorted(methods)]
    assert len({r["starts"] for r in records.values()}) == 1  # paired
    assert all(len(r["outcomes"]) == 2 and r["parameters"] > 0 and r["train_cpu_s"] > 0 for r in records.values())
    text = (tmp_path / "peers.md").read_text()
    assert "| touch-red | *unet*" in text and "0 have not been made" in text
    monkeypatch.setattr(peers_run, "run", lambda *_: pytest.fail("it is there already"))
    peers.main(asked)
    assert (tmp_path / "peers.md").read_text() == text


def test_robomimics_policies_act_as_in_its_own_rollouts(stores, tmp_path) -> None:
    if why := peers_robomimic.missing():
        pytest.skip(why)
    store = Store(stores[0] / "low_dim.zarr")
    peers_low_dim.export_robomimic(store, tmp_path / "low_dim.hdf5")
    for method in peers_robomimic.PUBLISHED:
        run = tmp_path / method
        peers_robomimic.train_robomimic(method, tmp_path / "low_dim.hdf5", store.spec, run, 0, 1, 1)
        policy = peers_robomimic.RobomimicPolicy(run, store.spec)
        states = store.state(0)[:23].copy()
        frames = [RawObservation({}, s, "touch", i / store.spec.control_hz) for i, s in enumerate(states)]
        ours = [policy.predict_batch([frames[max(0, i - 9) : i + 1]], [i])[0].values for i in range(23)]
        np.testing.assert_allclose(np.concatenate(ours), stateful(policy, states), atol=2e-4)


def stateful(policy: peers_robomimic.RobomimicPolicy, states: np.ndarray) -> np.ndarray:
    """Drive robomimic's own RolloutPolicy and FrameStackWrapper's stacking through an episode."""
    rollout = peers_robomimic._robomimic()["algo"].RolloutPolicy(policy._algo)
    rollout.start_episode()
    actions, stack = [], [states[0]] * peers_robomimic.CONTEXT
    for i, state in enumerate(states):
        stack = [*stack[1:], state]
        seen = np.stack(stack) if policy.name.endswith("transformer") else state
        torch.manual_seed(i)
        actions.append(rollout(peers_low_dim.state_fields(policy.spec, seen)))
    low, high = policy.low, policy.high
    return low + (np.clip(actions, -1, 1) + 1) / 2 * (high - low)


# ---- what the page claims


def record(outcomes: str, starts: str = "s", **changes) -> dict:
    return {
        "method": "", "settings": json.loads(json.dumps(asdict(BUDGETS["full"]))), "outcomes": outcomes,
        "starts": starts, "parameters": 1000, "train_cpu_s": 1.0, "inference_p50_s": 0.01, **changes,
    }  # fmt: skip


def results(**by_method: list[str]) -> dict:
    return {
        f"full/reach-v3/{name}/{seed}": record(outcomes)
        for name, runs in by_method.items()
        for seed, outcomes in enumerate(runs)
    }


def verdicts(**by_method: list[str]) -> dict[str, str]:
    return {row["b"]: row["verdict"] for row in comparisons(results(**by_method), "full")}


def test_the_words_fit_the_evidence() -> None:
    good, bad, half = "1" * 50, "0" * 50, "10" * 25
    assert verdicts(dita=[half], unet=[half]) == {"unet": "these checkpoints: not distinguishable"}
    assert verdicts(dita=[good], unet=[bad], flow=[good]) == {
        "unet": "these checkpoints: dita is better", "flow": "these checkpoints: not distinguishable",
    }  # fmt: skip
    assert verdicts(dita=[good] * 3, unet=[bad] * 3, flow=[good] * 3) == {
        "unet": "dita is better", "flow": "equivalent within 10%",
    }  # fmt: skip
    assert verdicts(dita=[good, bad, half], unet=[half, good, bad]) == {"unet": "not distinguishable"}
    assert verdicts(dita_state=[bad] * 3, robomimic_bc=[good] * 3) == {"robomimic_bc": "robomimic_bc is better"}
    assert verdicts(unet=[good]) == {}  # nothing to compare with


def test_asking_often_costs() -> None:
    six_of_six = ["0" * 6 + "1" * 44]  # McNemar: p = 0.031
    alone = verdicts(dita=["1" * 50], unet=six_of_six)
    among = verdicts(dita=["1" * 50], unet=six_of_six, flow=["1" * 50], behaviour_cloning=["1" * 50])
    assert alone == {"unet": "these checkpoints: dita is better"}
    assert among["unet"] == "these checkpoints: not distinguishable"


def test_other_starts_are_not_compared() -> None:
    both = results(dita=["11"], unet=["11"])
    both["full/reach-v3/unet/0"]["starts"] = "others"
    with pytest.raises(ValueError, match="played other starts"):
        comparisons(both, "full")


def test_the_page_lists_what_is_missing_and_pools_seeds() -> None:
    plan = jobs("full", ["reach-v3"], ["dita", "unet"], [0, 1])
    text = page(results(dita=["1" * 50, "1" * 25 + "0" * 25], unet=["1" * 50]), plan)
    assert "| reach-v3 | *dita*: Dita: DDIM, 8 of 16 actions per inference | 75/100 | 66% .. 82% | 2 |" in text
    assert "1 have not been made" in text and "- full/reach-v3/unet/1" in text


def test_records_of_other_settings_are_refused(tmp_path) -> None:
    path = tmp_path / "peers.json"
    path.write_text(json.dumps({"full/reach-v3/dita/0": record("1", settings={"steps": 7})}))
    with pytest.raises(ValueError, match="its budget is"):
        read_results(path)


def test_robomimic_that_is_missing_says_how_to_get_it(monkeypatch) -> None:
    def fail() -> None:
        raise ModuleNotFoundError("No module named 'robomimic'")

    monkeypatch.setattr(peers_robomimic, "_robomimic", fail)
    assert "pip install --no-deps --target build/peers robomimic==0.3.0" in str(peers_robomimic.missing())
