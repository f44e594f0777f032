"""Equality with what the official implementation returned, and the names of the published checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dita.policy.official import COUNTER, OfficialPolicy, from_state_dict

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
    made_up = {"vision.patches.vit.embeddings.mask_token"}  # transformers' own
    positions = policy.model.state_dict()["vision.patches.vit.embeddings.position_embeddings"]
    total = sum(t.numel() for n, t in policy.model.state_dict().items() if n not in made_up) - positions[:, :1].numel()
    assert total == 213_225_984
    assert sum(t.numel() for n, t in state_dict.items() if n != COUNTER) == total


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
