"""Equality with what the official implementation returned, and the names of the published checkpoint."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import embodiment_dict, field, make_history, make_stats
from safetensors import safe_open
from safetensors.torch import load_file

from dita.cli import compose, main
from dita.config import TrainConfig
from dita.embodiment import load_embodiment
from dita.normalize import stats_to_dict
from dita.policy.official import (
    COUNTER,
    OfficialPolicy,
    diffusion_config,
    from_state_dict,
    infer_config,
    official_names,
    published_parameters,
)
from dita.policy.policy import DitaPolicy

REFERENCE = Path(__file__).parent.parent.parent / "shared" / "reference" / "official_dita"
SCHEDULES = {"0": "cosine100", "1": "linear1000"}
pytestmark = pytest.mark.skipif(not REFERENCE.is_dir(), reason="no reference outputs beside this checkout")


def load(name: str) -> tuple[OfficialPolicy, dict[str, torch.Tensor], dict[str, str]]:
    folder = REFERENCE / name
    with safe_open(folder / "io.safetensors", "pt") as file:
        sizes = file.metadata()
    policy = from_state_dict(
        load_file(folder / "state_dict.safetensors"), int(sizes["T"]), SCHEDULES[sizes["sched"]], vision_heads=2
    )  # pyright: ignore
    return policy, load_file(folder / "io.safetensors"), sizes


@pytest.mark.parametrize("name", ["t11_cosine100", "t16_linear1000"])
def test_outputs_equal_the_official_ones(name) -> None:
    policy, io, sizes = load(name)
    image, language = io["input.image"], io["input.language"]
    got = {
        "patch_tokens": policy.patch_tokens(image),
        "image_tokens": policy.image_tokens(image, language),
        "predicted_noise": policy.predict_noise(io["input.noisy_actions"], io["input.timesteps"], image, language),
    }
    for key, value in got.items():
        torch.testing.assert_close(value, io[f"output.{key}"], atol=1e-5, rtol=0)
    actions = policy.sample(io["input.initial_noise"], image, language, int(sizes["steps"]))
    # linear-1000 amplifies rounding where sqrt(abar) is about 0.01
    tolerance = 5e-5 if sizes["sched"] == "1" else 1e-5
    torch.testing.assert_close(actions, io["output.sampled_actions"], atol=tolerance, rtol=0)


def test_every_published_name_and_shape_is_consumed() -> None:
    shapes = json.loads((REFERENCE / "full_size_parameter_shapes.json").read_text())
    assert len(shapes) == 373
    state_dict = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    policy = from_state_dict(state_dict, 16, "linear1000")
    assert published_parameters(policy.model) == 213_225_984
    assert sum(t.numel() for t in state_dict.values()) == 213_225_984 + 1  # and the counter
    assert set(official_names(policy.policy.config)) == state_dict.keys() - {COUNTER}


def test_dita_base_is_the_published_network() -> None:
    """No departure from the paper is on: its config is the one read off the published shapes, apart from two names."""
    shapes = json.loads((REFERENCE / "full_size_parameter_shapes.json").read_text())
    read_off = infer_config({name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, 16)
    config = compose("train", ["policy=dita_base"], TrainConfig)
    assert dataclasses.replace(read_off, name="dita_base") == config.policy
    assert config.diffusion == dataclasses.replace(
        diffusion_config("cosine100"), num_inference_steps=config.diffusion.num_inference_steps
    )


@pytest.mark.parametrize(("suffix", "zipped"), [(".pth", True), (".pth", False), (".safetensors", None)])
def test_import_writes_a_folder_that_samples_the_official_actions(suffix, zipped, tmp_path, capsys) -> None:
    _, io, sizes = load("t11_cosine100")
    source = REFERENCE / "t11_cosine100" / "state_dict.safetensors"
    if suffix == ".pth":
        source = tmp_path / "published.pth"
        state = load_file(REFERENCE / "t11_cosine100" / "state_dict.safetensors")
        adam = {"state": {0: {"exp_avg": torch.zeros(3), "step": 5}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
        content = {"parameter": state, "optimizer": adam, "epoch": 3}
        torch.save(content, source, _use_new_zipfile_serialization=zipped)
    argv = ["import-official", str(source), str(tmp_path / "out"), "--action-slots", "11"]
    argv += ["--schedule", "cosine100", "--vision-heads", "2"]
    assert main(argv) == 0
    assert "11 action slots, cosine100" in capsys.readouterr().out
    loaded = OfficialPolicy(DitaPolicy.from_pretrained(tmp_path / "out"))
    image, language = io["input.image"], io["input.language"]
    actions = loaded.sample(io["input.initial_noise"], image, language, int(sizes["steps"]))
    torch.testing.assert_close(actions, io["output.sampled_actions"], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="knows no embodiment, hence no units"):
        loaded.policy.predict([], seed=0)
    assert main(argv) == 1 and "exists" in capsys.readouterr().err
    assert main(["bench-policy", str(tmp_path / "out"), "--ticks", "2", "--threads", "1", "--json"]) == 0
    timing = json.loads(capsys.readouterr().out)
    assert timing["ticks"] == 2 and timing["path"] == "eager" and 0 < timing["p50"] <= timing["p99"]


def test_import_with_an_embodiment_predicts_in_its_units(tmp_path, clip_folder, capsys) -> None:
    values = embodiment_dict(size=28) | {"state": []}
    values["action"] = [
        field("position", "ee_position", 3, 0, "delta", 0.05),
        field("rotation", "ee_rotation_axis_angle", 3, 3, "delta", 0.2),
        field("grip", "gripper_binary", 1, 6),
    ]
    (tmp_path / "robot.yaml").write_text(yaml.safe_dump(values))
    spec = load_embodiment(tmp_path / "robot.yaml")
    (tmp_path / "stats.json").write_text(json.dumps(stats_to_dict(make_stats(spec))))
    # a text encoder of the reference's width
    _, _, sizes = load("t11_cosine100")
    folder = clip_folder(int(sizes["dim"]))
    source = REFERENCE / "t11_cosine100" / "state_dict.safetensors"
    base = ["import-official", str(source), str(tmp_path / "out"), "--action-slots", "11", "--schedule", "cosine100"]
    base += ["--vision-heads", "2", "--text-encoder", str(folder)]
    assert main([*base, "--embodiment", str(tmp_path / "robot.yaml")]) == 1
    assert "--embodiment and --stats together" in capsys.readouterr().err
    assert main([*base, "--embodiment", str(tmp_path / "robot.yaml"), "--stats", str(tmp_path / "stats.json")]) == 0
    policy = DitaPolicy.from_pretrained(tmp_path / "out")
    chunk = policy.predict(make_history(spec, 0), seed=0)
    assert chunk.values.shape == (10, 7)
    assert np.abs(chunk.values).max() <= 0.011  # q01..q99 of the statistics, and not the network's own range


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"parameter": {"x": 3}}, "expected weights by name under the key 'parameter'"),
        ({"model": {}, "epoch": 1}, "holds keys ['epoch', 'model']"),
        ([1, 2], "holds list"),
        ({"parameter": {"a.b": torch.zeros(2)}}, "transformer.lm_head.weight is missing"),
        (object(), "refused"),
        (b"no checkpoint at all", "refused"),
    ],
)
def test_other_files_are_refused_in_one_line(content, message, tmp_path, capsys) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    assert main(["import-official", str(path), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert (
        message in error and "weights_only" not in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
    )
    assert main(["import-official", str(tmp_path / "none.pth"), str(tmp_path / "out")]) == 1
    assert "does not exist" in capsys.readouterr().err


def test_misfits_are_listed_and_refused() -> None:
    state_dict = load_file(REFERENCE / "t11_cosine100" / "state_dict.safetensors")

    def refused(change: dict, drop: tuple[str, ...] = ()) -> str:
        values = {n: t for n, t in (state_dict | change).items() if n not in drop}
        with pytest.raises(ValueError) as error:
            from_state_dict(values, 11, "cosine100", vision_heads=2)
        return str(error.value)

    assert "transformer.extra" in refused({"transformer.extra": torch.zeros(1)})
    query = "transformer.model.layers.1.self_attn.q_proj.weight"
    assert f"1 missing ['{query}']" in refused({}, (query,))
    wrong = {"transformer.model.layers.1.self_attn.o_proj.weight": torch.zeros(3, 3)}
    assert f"{next(iter(wrong))} (3, 3), expected (128, 128)" in refused(wrong)
    assert "lm_head" in refused({}, ("transformer.lm_head.weight",))
    with pytest.raises(ValueError, match="there are linear1000, cosine100"):
        from_state_dict(state_dict, 11, "cosine", vision_heads=2)  # pyright: ignore
    assert COUNTER in state_dict


def test_without_a_text_encoder_the_message_says_which_folder() -> None:
    policy, _, _ = load("t11_cosine100")
    ids = torch.zeros(1, 77, dtype=torch.long)
    with pytest.raises(ValueError, match=r"policy\.language\.pretrained=FOLDER"):
        policy.model.instruct(ids, ids.bool())
