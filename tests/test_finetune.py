"""Finetuning: what of a contract is reused, what is trained, what is refused, and that only k demonstrations count."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import contract_of, diffusion_config, embodiment_dict, field, make_stats, make_window, policy_config

from dita.batch import Observation
from dita.checkpoint import find_policy, load_policy, load_tensors, save_policy
from dita.cli import compose, main
from dita.config import EnvConfig, FinetuneConfig, LoraConfig
from dita.datasets.store import Store, StoreWriter
from dita.embodiment import embodiment_from_dict
from dita.finetune import describe, finetune, grow, replay, verdict
from dita.lora import PROJECTIONS, add_adapters, merged_weights
from dita.normalize import fit, pool
from dita.policy.policy import DitaPolicy
from dita.preprocess import Contract, extend_contract
from dita.types import EmbodimentSpec, Episode

NOBODY = EnvConfig("metaworld", "metaworld_sawyer", ("reach-v3",), 10, True)


def new_arm(name: str = "new_arm", **changes) -> EmbodimentSpec:
    return embodiment_from_dict({**embodiment_dict(name), **changes})


def pretrained(robots: tuple[str, ...] = ("zebra", "arm"), **changes) -> DitaPolicy:
    torch.manual_seed(0)
    config = policy_config(**changes)
    specs = [new_arm(name) for name in robots]
    return DitaPolicy(config, diffusion_config(prediction_type="sample"), contract_of(specs, config))


def episode(i: int, spec: EmbodimentSpec, frames: int = 16, scale: float = 1.0, seed: int = 0, **changes) -> Episode:
    rng = np.random.default_rng([seed, i])
    images = {c.name: rng.integers(0, 256, (frames, c.height, c.width, 3), np.uint8) for c in spec.cameras}
    values = {
        "images": images,
        "state": (scale * rng.uniform(-0.9, 0.9, (frames, spec.state_dim))).astype(np.float32),
        "action": rng.uniform(-0.009, 0.009, (frames, spec.action_dim)).astype(np.float32),
        "stamp": np.arange(frames) / spec.control_hz, "instruction": "press the button", "success": True,
        "source": f"test/{i}",
    }  # fmt: skip
    return Episode(**(values | changes))


def write_store(path: Path, spec: EmbodimentSpec, episodes: list[Episode]) -> Path:
    with StoreWriter.create(path, spec, source="test", licence="CC0-1.0") as writer:
        for e in episodes:
            writer.add(e)
        writer.seal()
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "policy"
    save_policy(pretrained(), folder)
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    spec = new_arm()
    return write_store(tmp_path_factory.mktemp("data") / "new.zarr", spec, [episode(i, spec) for i in range(4)])


def config_for(checkpoint: Path, store: Path, run: Path, *words: str) -> FinetuneConfig:
    sizes = ["steps=2", "batch_size=4", "noise_samples_per_context=2", "save_every=1", "threads=1", "shots=2"]
    config = compose(
        "finetune", [f"data={store}", f"run={run}", "replay=false", "lora.rank=4", *sizes, *words], FinetuneConfig
    )
    return dataclasses.replace(config, checkpoint=str(checkpoint))


# ---- the contract


def test_pooled_statistics_are_those_of_all_rows() -> None:
    spec, rng = new_arm(), np.random.default_rng(0)
    rows = [
        (rng.normal(i, 1 + i, (n, 4)).astype(np.float32), rng.normal(i, 1, (n, 4)).astype(np.float32))
        for i, n in enumerate((50, 150))
    ]
    whole, parts = fit(spec, rows).fields, [fit(spec, [r]).fields for r in rows]
    for key, expected in whole.items():
        got = pool([p[key] for p in parts])
        assert got.count == expected.count == 200
        for name in ("mean", "std", "min", "max"):
            np.testing.assert_allclose(getattr(got, name), getattr(expected, name), rtol=1e-9)
        assert all(a <= b for a, b in zip(got.q01, expected.q01, strict=True))
        assert all(a >= b for a, b in zip(got.q99, expected.q99, strict=True))
    assert pool([parts[0]["action/grip"]]) is parts[0]["action/grip"]


@pytest.mark.parametrize("statistics", ["pretrained", "new", "pooled"])
def test_what_agrees_is_reused_and_the_rest_is_new(statistics) -> None:
    base = pretrained().contract
    spec = new_arm(
        action=[*embodiment_dict()["action"], field("lift", "base_velocity", 1, 8)],
        cameras=[*embodiment_dict()["cameras"], {"name": "wrist", "height": 32, "width": 32, "slot": 1}],
    )
    seen = make_stats(spec, seed=5)
    contract, origins = extend_contract(base, spec, seen, statistics)
    known = [base.stats[name].fields["action/delta"] for name in ("arm", "zebra")]
    mine = seen.fields["action/delta"]
    expected = {"pretrained": pool(known), "new": mine, "pooled": pool([*known, mine])}
    stats = contract.stats["new_arm"].fields
    assert stats["action/delta"] == expected[statistics]
    assert stats["action/lift"] == seen.fields["action/lift"]
    table = {o.part: o for o in origins}
    assert (table["action.delta"].weights, table["action.delta"].like) == ("reused", ("arm", "zebra"))
    assert table["action.delta"].statistics == statistics
    assert (table["action.lift"].weights, table["action.lift"].statistics) == ("new", "new")
    assert (table["camera cam0"].weights, table["camera wrist"].weights) == ("reused", "new")
    p = contract.preprocess
    assert (p["state_dim"], p["action_dim"], p["cameras"]) == (12, 9, 2)
    assert contract.stats["arm"] == base.stats["arm"]
    assert Contract.from_dict(json.loads(json.dumps(contract.to_dict()))).root_hash == contract.root_hash


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "joint_position"}, "kind 'ee_position' there, 'joint_position' here"),
        ({"unit": "rad"}, "unit 'm' there, 'rad' here"),
        ({"frame": "tool"}, "frame 'base' there, 'tool' here"),
    ],
)
def test_a_field_that_contradicts_the_checkpoint_is_named(change, message, tmp_path, checkpoint, capsys) -> None:
    values = embodiment_dict("new_arm")
    values["action"][0] |= change
    spec = embodiment_from_dict(values)
    store = write_store(tmp_path / "s.zarr", spec, [episode(i, spec) for i in range(2)])
    assert main(["finetune", str(checkpoint), f"data={store}", "shots=2", f"run={tmp_path}/run"]) == 1
    error = capsys.readouterr().err
    assert "action.delta of 'new_arm' contradicts the checkpoint" in error and message in error
    assert error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_another_reference_keeps_the_weights_but_not_the_statistics() -> None:
    values = embodiment_dict("new_arm")
    values["action"][0]["reference"] = "measured"
    spec = embodiment_from_dict(values)
    seen = make_stats(spec, seed=5)
    contract, origins = extend_contract(pretrained().contract, spec, seen, "pretrained")
    (delta,) = [o for o in origins if o.part == "action.delta"]
    assert (delta.weights, delta.statistics, delta.like) == ("reused", "new", ())
    assert "reference commanded there, measured here" in delta.note
    assert contract.stats["new_arm"].fields["action/delta"] == seen.fields["action/delta"]


def test_a_known_robot_must_be_as_it_was() -> None:
    base = pretrained().contract
    same, _ = extend_contract(base, base.specs["arm"], make_stats(base.specs["arm"], 3), "pretrained")
    assert same.root_hash == base.root_hash
    with pytest.raises(ValueError, match=r"'arm' differs from the checkpoint's: obs_dt"):
        extend_contract(base, new_arm("arm", obs_dt=0.1), None, "pretrained")


def test_statistics_of_other_data_are_refused(tmp_path, checkpoint) -> None:
    spec = new_arm()
    millimetres = write_store(tmp_path / "mm.zarr", spec, [episode(i, spec, scale=1000.0) for i in range(2)])
    with pytest.raises(
        ValueError, match=r"state/hand\[0\] of 'new_arm': the checkpoint's statistics are of other data"
    ):
        finetune(config_for(checkpoint, millimetres, tmp_path / "run"))
    with pytest.raises(ValueError, match="statistics are of other"):
        finetune(config_for(checkpoint, millimetres, tmp_path / "run", "statistics=pooled"))
    finetune(config_for(checkpoint, millimetres, tmp_path / "run", "statistics=new", "method=head"))


def test_what_moves_now_but_never_did_is_refused_rather_than_mapped_to_zero() -> None:
    base, spec = pretrained().contract, new_arm()
    still = dataclasses.replace(base.stats["arm"].fields["action/grip"], **dict.fromkeys(("q01", "q99"), (1.0,)),
                                min=(1.0,), max=(1.0,), mean=(1.0,), std=(0.0,))  # fmt: skip
    for name in base.stats:
        base.stats[name].fields["action/grip"] = still  # pyright: ignore
    seen = make_stats(spec, seed=5)
    with pytest.raises(ValueError, match=r"action/grip\[0\] .* they reach 1 .. 1 m, the demonstrations"):
        extend_contract(base, spec, seen, "pretrained")
    contract, _ = extend_contract(base, spec, seen, "pooled")
    assert (
        contract.stats["new_arm"].fields["action/grip"].min[0]
        < 0
        < 1
        == (contract.stats["new_arm"].fields["action/grip"].max[0])
    )


# ---- the network


def test_a_loaded_policy_takes_no_robot_for_another(tmp_path) -> None:
    policy = pretrained(("zebra", "arm"), embodiment_token=True)
    save_policy(policy, tmp_path / "policy")
    loaded = load_policy(tmp_path / "policy")
    for name in ("zebra", "arm"):
        window = make_window(policy.specs[name], seed=1)
        a, b = (p.preprocessor.observe([window]).embodiment for p in (policy, loaded))
        torch.testing.assert_close(policy.model.embodiment(a), loaded.model.embodiment(b))


def padded(observation: Observation, extra: int) -> Observation:
    state = torch.nn.functional.pad(observation.state, (0, extra))
    return dataclasses.replace(
        observation, state=state, state_valid=torch.nn.functional.pad(observation.state_valid, (0, extra))
    )


@pytest.mark.parametrize("embedding", ["linear", "zero_pad"])
def test_growing_changes_nothing_for_the_robots_that_were_there(embedding) -> None:
    base = pretrained(action_embedding=embedding)
    spec = new_arm(
        state=[*embodiment_dict()["state"], field("lift", "joint_position", 1, 14)],
        action=[*embodiment_dict()["action"], field("lift", "base_velocity", 1, 8)],
    )
    contract, origins = extend_contract(base.contract, spec, make_stats(spec, 1), "pretrained")
    sizes = dataclasses.replace(base.config, state_dim=15, action_dim=9)
    big = grow(base, sizes, contract, origins, spec.name).eval()
    window = make_window(base.specs["arm"], seed=3)
    observation = base.preprocessor.observe([window])
    noise = torch.randn(1, 2, 6, 7, generator=torch.Generator().manual_seed(1))
    wide = torch.nn.functional.pad(noise, (0, 2))
    expected = base.eval().sample(observation, noise, 3)
    got = big.sample(padded(observation, 3), wide, 3)
    torch.testing.assert_close(got[..., :7], expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(padded(observation, 3).state, big.preprocessor.observe([window]).state)


def test_the_unknown_token_learns_by_dropout_and_is_where_a_new_robot_starts() -> None:
    base = pretrained(embodiment_token=True, embodiment_dropout=0.5)
    windows = [make_window(base.specs[n], seed=i) for i, n in enumerate(("arm", "zebra") * 4)]
    batch = base.preprocessor.batch(windows)
    table = base.model.embodiment.weight
    assert len(table) == 3
    torch.manual_seed(1)
    for training, learns in ((True, True), (False, False)):
        base.train(training).zero_grad()
        base.loss(batch, 1, torch.Generator().manual_seed(0)).backward()
        assert bool(table.grad[2].abs().sum() > 0) is learns
        assert bool(table.grad[:2].abs().sum() > 0)
    spec = new_arm()
    contract, origins = extend_contract(base.contract, spec, None, "pretrained")
    big = grow(base, base.config, contract, origins, spec.name)
    order = list(contract.specs)
    assert order == ["arm", "new_arm", "zebra"]
    rows = dict(zip(order, big.model.embodiment.weight, strict=False))
    assert torch.equal(rows["new_arm"], table[-1]) and torch.equal(big.model.embodiment.weight[-1], table[-1])
    assert torch.equal(rows["arm"], table[0]) and torch.equal(rows["zebra"], table[1])


def test_without_an_unknown_token_a_new_robot_starts_between_those_it_resembles() -> None:
    base = pretrained(embodiment_token=True)
    contract, origins = extend_contract(base.contract, new_arm(), None, "pretrained")
    big = grow(base, base.config, contract, origins, "new_arm")
    torch.testing.assert_close(big.model.embodiment.weight[1], base.model.embodiment.weight.mean(0))


# ---- training


def changed(run: Path, checkpoint: Path) -> set[str]:
    after, before = (load_tensors(find_policy(p) / "model.safetensors") for p in (run, checkpoint))
    assert after.keys() == before.keys()
    return {name for name in after if not torch.equal(after[name], before[name])}


def test_head_trains_only_the_projections(tmp_path, checkpoint, store) -> None:
    run = finetune(config_for(checkpoint, store, tmp_path / "run", "method=head"))
    names = changed(run, checkpoint)
    assert names == {"model.state.weight", "model.state.bias", "model.action.weight", "model.action.bias",
                     "model.head.weight"}  # fmt: skip


def test_full_trains_everything(tmp_path, checkpoint, store) -> None:
    names = changed(finetune(config_for(checkpoint, store, tmp_path / "run")), checkpoint)
    trainable = {n for n, p in pretrained().named_parameters() if p.requires_grad}
    assert names <= trainable and {"model.trunk.blocks.0.qkv.weight", "model.vision.patches.stem.weight"} <= names


def test_merged_adapters_compute_what_they_computed_apart(checkpoint) -> None:
    pytest.importorskip("peft")
    policy, plain = load_policy(checkpoint), load_policy(checkpoint)
    before = {n: t.clone() for n, t in policy.state_dict().items()}
    add_adapters(policy, LoraConfig(4, 32.0), seed=0)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if ".lora_B" in name:
                p.normal_(std=0.05, generator=torch.Generator().manual_seed(len(name)))
    merged = merged_weights(policy, policy.state_dict())
    assert merged.keys() == before.keys()
    block = dict(policy.named_modules())["model.trunk.blocks.0.o"]
    a, b = block.lora_A["default"].weight, block.lora_B["default"].weight
    torch.testing.assert_close(
        merged["model.trunk.blocks.0.o.weight"], before["model.trunk.blocks.0.o.weight"] + 32 / 4 * b @ a
    )
    plain.load_state_dict(dict(merged))
    observation = plain.preprocessor.observe([make_window(plain.specs["arm"], seed=3)])
    noise = torch.randn(1, 2, 6, 7, generator=torch.Generator().manual_seed(1))
    outputs = [p.eval().sample(observation, noise, 3) for p in (policy, plain)]
    assert float((outputs[0] - outputs[1]).abs().max()) < 1e-5
    unadapted = load_policy(checkpoint).sample(observation, noise, 3)
    assert float((outputs[0] - unadapted).abs().max()) > 1e-3  # the adapters do something


def test_lora_exports_an_ordinary_policy_and_resumes_bit_equal(tmp_path, checkpoint, store) -> None:
    pytest.importorskip("peft")
    whole = finetune(config_for(checkpoint, store, tmp_path / "whole", "method=lora"))
    names = changed(whole, checkpoint)
    adapted = {n for n in names if not n.startswith(PROJECTIONS)}
    assert adapted and all(n.startswith(("model.trunk.", "model.vision.qformer.")) for n in adapted)
    assert load_policy(whole).embodiment_name("new_arm") == "new_arm"
    cut = finetune(config_for(checkpoint, store, tmp_path / "cut", "method=lora"))
    for path in sorted((cut / "checkpoints" / "0000002").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (cut / "checkpoints" / "0000002").rmdir()
    finetune(config_for(checkpoint, store, cut, "method=lora"), "resume")
    a, b = (load_tensors(find_policy(r) / "model.safetensors") for r in (whole, cut))
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_nothing_but_the_chosen_demonstrations_is_used(tmp_path, checkpoint, store) -> None:
    spec = new_arm()
    run = finetune(config_for(checkpoint, store, tmp_path / "a"))
    chosen = json.loads((run / "finetune.json").read_text())["demonstrations"]
    assert len(chosen) == 2
    others = [
        episode(i, spec) if f"test/{i}" in chosen else episode(i, spec, frames=31, seed=9, success=False)
        for i in range(4)
    ]
    other = write_store(tmp_path / "other.zarr", spec, others)
    again = finetune(config_for(checkpoint, other, tmp_path / "b"))
    a, b = (load_policy(r) for r in (run, again))
    assert a.contract.root_hash == b.contract.root_hash
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    files = [json.loads((r / "finetune.json").read_text()) for r in (run, again)]
    assert files[0]["verdict"] == files[1]["verdict"]
    third = finetune(config_for(checkpoint, store, tmp_path / "c", "shots_seed=3"))
    assert json.loads((third / "finetune.json").read_text())["demonstrations"].keys() != chosen.keys()


def test_fewer_shots_are_a_subset_of_more(tmp_path, checkpoint, store) -> None:
    chosen = []
    for shots in (1, 2, 3):
        run = finetune(config_for(checkpoint, store, tmp_path / str(shots), f"shots={shots}", "method=head"))
        chosen.append(set(json.loads((run / "finetune.json").read_text())["demonstrations"]))
    assert [len(c) for c in chosen] == [1, 2, 3] and chosen[0] < chosen[1] < chosen[2]


def test_zero_shot_extends_the_contract_and_nothing_else(tmp_path, checkpoint, store) -> None:
    run = finetune(config_for(checkpoint, store, tmp_path / "run", "shots=0"))
    policy = load_policy(run)
    assert "new_arm" in policy.specs and not changed(run, checkpoint)
    finetune(config_for(checkpoint, store, run, "method=head"), "overwrite")
    assert changed(run, checkpoint)  # the zero-shot policy is not found in its place
    spec = new_arm(name="other", action=[*embodiment_dict()["action"], field("lift", "base_velocity", 1, 8)])
    more = write_store(tmp_path / "more.zarr", spec, [episode(0, spec)])
    with pytest.raises(ValueError, match=r"action/lift of .other. is new to the checkpoint, and without demonst"):
        finetune(config_for(checkpoint, more, tmp_path / "more", "shots=0"))


def test_co_training_keeps_the_checkpoints_own_robot(tmp_path, checkpoint, store) -> None:
    spec = new_arm("arm")
    old = write_store(tmp_path / "old.zarr", spec, [episode(i, spec) for i in range(2)])
    both = f"data.stores=[{{path:{store},weight:1,filter:null}},{{path:{old},weight:1,filter:null}}]"
    assert len(load_policy(finetune(config_for(checkpoint, store, tmp_path / "run", both))).specs) == 3
    stranger = write_store(tmp_path / "stranger.zarr", new_arm("stranger"), [episode(0, new_arm("stranger"))])
    with pytest.raises(ValueError, match="'stranger' is not in the checkpoint"):
        finetune(config_for(checkpoint, store, tmp_path / "no", both.replace(str(old), str(stranger))))


# ---- refusals


def test_refusals_are_one_line(tmp_path, checkpoint, store, capsys) -> None:
    cases = [
        (["shots=10"], "has 4 episodes, asked for 10 shots"),
        (["policy.dim=32"], "policy.dim cannot be set: policy, diffusion and preprocess are the checkpoint's"),
        (["method=prefix"], "method is full, lora or head, got 'prefix'"),
        (["shots=-1"], "shots must not be negative"),
        (["lora.rank=0"], "lora.rank must be at least 1"),
        (["data.shots=3"], "data.shots is for dita train"),
    ]
    for words, message in cases:
        assert main(["finetune", str(checkpoint), f"data={store}", f"run={tmp_path}/run", *words]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and message in error, error
    assert main(["finetune", str(checkpoint), f"run={tmp_path}/run"]) == 1
    assert "dita finetune CHECKPOINT data=STORE" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_continues_only_on_what_it_began_with(tmp_path, checkpoint, store) -> None:
    spec, run = new_arm(), tmp_path / "run"
    finetune(config_for(checkpoint, store, run))
    with pytest.raises(FileExistsError, match="--resume"):
        finetune(config_for(checkpoint, store, run))
    other = write_store(tmp_path / "new.zarr", spec, [episode(i, spec, seed=1) for i in range(4)])
    with pytest.raises(ValueError, match="statistics of other data: these demonstrations changed"):
        finetune(config_for(checkpoint, other, run), "resume")
    with pytest.raises(ValueError, match="method: was 'full', now 'head'"):
        finetune(config_for(checkpoint, store, run, "method=head"), "resume")
    save_policy(pretrained(("arm",)), tmp_path / "policy")
    with pytest.raises(ValueError, match="started from another checkpoint"):
        finetune(config_for(tmp_path / "policy", store, run), "resume")
    finetune(config_for(checkpoint, store, run), "resume")


# ---- before training


def test_the_verdict_says_what_to_record_more_of(tmp_path) -> None:
    spec = new_arm(control_hz=20.0, action_dt=0.05)
    t = np.linspace(0, 1, 60)[:, None]
    flat = np.full((60, 32, 32, 3), 90, np.uint8)

    def moving(i: int, **changes) -> Episode:
        state = np.concatenate([np.sin(t * (2 + i)) * 0.5, t * 0.1, t * 0.2, np.ones((60, 1))], 1)
        action = np.concatenate([np.gradient(state[:, 0])[:, None] * 0.1, t * 0.001, t * 0.001, np.ones((60, 1))], 1)
        picture = flat.copy()
        for k in range(60):
            picture[k, i : i + 8, k // 2] = 200  # something moves in it
        picture[0] = flat[0] + np.eye(32, dtype=np.uint8)[:, :, None]
        arrays = {"state": state.astype(np.float32), "action": action.astype(np.float32)}
        return episode(i, spec, 60, images={"cam0": picture}, **(arrays | changes))

    still = {"state": np.zeros((60, 4), np.float32), "action": np.zeros((60, 4), np.float32)}
    words = ["open the drawer", "open the drawer", "open the drawer", "press the button", "open the drawer"]
    episodes = [moving(i, instruction=w, success=i != 2) for i, w in enumerate(words)]
    episodes[4] = moving(4, instruction=words[4], **still)
    store = Store(write_store(tmp_path / "s.zarr", spec, episodes))
    lines = verdict(store, range(5))
    text = "\n".join(lines)
    assert "record more: 'press the button' has 1 of 5 demonstrations" in lines
    assert "record more: 1 of them are marked as failures (test/2)" in lines
    assert "none closes the gripper" in text
    assert "all begin with the same picture of cam0" in text
    assert "record again: nothing moves: test/4" in lines[0]
    clean = "\n".join(verdict(store, [0, 1]))
    assert "press the button" not in clean and "failures" not in clean and "record again" not in clean


def test_replay_tells_a_right_recording_from_a_wrong_one(tmp_path) -> None:
    from dita.embodiment import load_embodiment
    from dita.envs import make
    from dita.envs.collect import demonstrate

    config = EnvConfig("metaworld", "metaworld_sawyer", ("reach-v3",), 200, True)
    spec = load_embodiment("metaworld_sawyer")
    env = make(config, "reach-v3")
    episodes = []
    for seed in (0, 1):
        env.reset(seed=seed)
        episodes.append(demonstrate(env, seed, action_noise=0.0))
    env.close()
    assert all(episodes)
    right = Store(write_store(tmp_path / "right.zarr", spec, episodes))
    played = replay(right, (0, 1), config)
    assert (played.tried, played.successes) == (2, 2) and played.drift is not None and played.drift < 1e-3
    assert describe(played).startswith("open-loop replay: 2 of 2 solve the task, the tool ends 0.")
    # every step a fifth of what it was, as with another reference or unit
    small = [dataclasses.replace(e, action=e.action * np.float32([0.2, 0.2, 0.2, 1])) for e in episodes]
    wrong = replay(Store(write_store(tmp_path / "wrong.zarr", spec, small)), (0, 1), config)
    assert wrong.successes == 0 and wrong.drift is not None and wrong.drift > 0.02
    unnamed = [dataclasses.replace(e, source=f"arm/{i}") for i, e in enumerate(episodes)]
    silent = replay(Store(write_store(tmp_path / "silent.zarr", spec, unnamed)), (0, 1), config)
    assert silent.tried == 0 and "name no start" in describe(silent)
    other = replay(right, (0,), dataclasses.replace(config, embodiment="fetch_mocap"))
    assert other.tried == 0 and "env.embodiment is fetch_mocap" in other.note
