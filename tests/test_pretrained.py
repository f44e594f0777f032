"""Vision and text backbones through transformers, from local folders written here by transformers itself."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import contract_of, diffusion_config, make_history, make_window, policy_config

from dita.config import LanguageConfig, VisionConfig
from dita.policy.fast import PolicySession
from dita.policy.language import text_encoder, tokenizer
from dita.policy.policy import DitaPolicy
from dita.policy.vision import VisualTokenizer

VIT = VisionConfig("dinov2_qformer", 28, 4, 1, None, True, 64, 2, 2, None, False)


@pytest.fixture(scope="module")
def clip(clip_folder):
    return clip_folder(32)


def test_clip_states_are_those_of_transformers_and_frozen(clip) -> None:
    from transformers import AutoTokenizer, CLIPTextModel

    config = LanguageConfig("transformers", 77, 0, str(clip))
    ids, valid = tokenizer(config)("open the drawer")
    assert ids.shape == (77,) and valid.all()
    encoder = text_encoder(config, 32)
    states, _ = encoder(torch.from_numpy(ids)[None].repeat(3, 1), torch.from_numpy(valid)[None].repeat(3, 1))
    text = AutoTokenizer.from_pretrained(clip)(
        "open the drawer", padding="max_length", max_length=77, return_tensors="pt"
    )
    with torch.no_grad():
        expected = CLIPTextModel.from_pretrained(clip)(text["input_ids"]).last_hidden_state
    torch.testing.assert_close(states, expected.expand(3, -1, -1), atol=1e-6, rtol=0)
    assert not list(encoder.parameters()) and not encoder.state_dict()  # its weights stay in their own folder
    with pytest.raises(ValueError, match="the policy takes 77"):
        tokenizer(config)("open the drawer " * 30)


def test_missing_text_encoder_says_what_to_give() -> None:
    with pytest.raises(ValueError, match=r"policy\.language\.pretrained=FOLDER"):
        tokenizer(LanguageConfig("transformers", 77, 0, None))
    with pytest.raises(ValueError, match="no text encoder at '/nowhere'"):
        text_encoder(LanguageConfig("transformers", 77, 0, "/nowhere"), 32)


def test_a_policy_with_dino_and_clip_learns_saves_and_loads(spec, clip, tmp_path) -> None:
    from dita.checkpoint import load_policy, save_policy

    config = policy_config(language=LanguageConfig("transformers", 77, 0, str(clip)), vision=VIT)
    spec = dataclasses.replace(spec, cameras=(dataclasses.replace(spec.cameras[0], height=28, width=28),))
    policy = DitaPolicy(config, diffusion_config(), contract_of([spec], config))
    batch = policy.preprocessor.batch([make_window(spec, i) for i in range(2)])
    policy.loss(batch, 2, torch.Generator().manual_seed(0)).backward()
    assert policy.model.vision.patches.vit.embeddings.patch_embeddings.projection.weight.grad.abs().sum() > 0  # pyright: ignore
    save_policy(policy.eval(), tmp_path / "policy")
    history = make_history(spec, 0)
    a, b = (p.predict(history, seed=0).values for p in (policy, load_policy(tmp_path)))
    assert (a == b).all()


@pytest.mark.parametrize("lean", [False, True])
def test_a_session_loads_the_text_encoder_once_and_a_lean_one_lets_it_go(spec, clip, lean, monkeypatch) -> None:
    from transformers import CLIPTextModel

    config = policy_config(language=LanguageConfig("transformers", 77, 0, str(clip)))
    policy = DitaPolicy(config, diffusion_config(), contract_of([spec], config)).eval()
    expected = policy.predict(make_history(spec, 0), seed=0).values
    policy.model.language._cache.clear()  # pyright: ignore
    policy.model.language.unload()  # pyright: ignore
    loads, load = [], CLIPTextModel.from_pretrained
    monkeypatch.setattr(CLIPTextModel, "from_pretrained", lambda *a, **k: loads.append(1) or load(*a, **k))
    session = PolicySession(policy, lean=lean)
    assert len(loads) == (0 if lean else 1)  # not in the middle of the first tick
    for _ in range(2):
        got = session.predict(make_history(spec, 0), seed=0).values
        torch.testing.assert_close(torch.from_numpy(got), torch.from_numpy(expected), atol=2e-7, rtol=0)
    assert len(loads) == 1
    assert bool(session.policy.model.language._loaded) != lean  # pyright: ignore
    assert not policy.model.language._loaded  # pyright: ignore


def test_patches_alone_are_tokens_too(spec, tmp_path) -> None:
    """dinov2_patches: every patch is a token, its width projected; the ViT recomputes activations too."""
    vision = dataclasses.replace(VIT, kind="dinov2_patches", patch_dim=32)
    config = policy_config(vision=vision, cameras=2)
    spec = dataclasses.replace(spec, cameras=(dataclasses.replace(spec.cameras[0], height=28, width=28),))
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        policy = DitaPolicy(config, diffusion_config(), contract_of([spec], config))
        if checkpointing:
            policy.model.checkpoint_activations()
        batch = policy.preprocessor.batch([make_window(spec, 0)])
        assert policy.model.context(batch.observation).observed == 8 + 2 + 2 * 2 * 4  # words, states, t v q
        policy.loss(batch, 2, torch.Generator().manual_seed(0)).backward()
        weight = policy.model.vision.patches.vit.embeddings.patch_embeddings.projection.weight  # pyright: ignore
        gradients.append(weight.grad)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(*gradients, atol=1e-7, rtol=1e-4)
    for wrong in ({"tokens": 5}, {"image_size": 30}):
        with pytest.raises(ValueError, match=r"\(image_size / 14\)\^2 tokens"):
            VisualTokenizer(dataclasses.replace(vision, **wrong), 64)


def test_dino_loads_from_a_folder_and_refuses_another_model(tmp_path, clip) -> None:
    from transformers import Dinov2WithRegistersModel

    torch.manual_seed(1)
    source = VisualTokenizer(VIT, 64).patches.vit  # pyright: ignore
    assert isinstance(source, Dinov2WithRegistersModel)
    source.save_pretrained(tmp_path / "dino")
    tokens = VisualTokenizer(VIT, 64)
    tokens.load_patches(str(tmp_path / "dino"))
    x = torch.randn(2, 3, 28, 28)
    patches, _ = tokens.patches(x)
    with torch.no_grad():
        torch.testing.assert_close(patches, source.eval()(x).last_hidden_state[:, 5:])
    assert patches.shape == (2, 4, 64)
    with pytest.raises(ValueError, match="no DINOv2 weights"):
        tokens.load_patches(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"needs vision\.kind=dinov2_qformer"):
        VisualTokenizer(policy_config().vision, 64).load_patches("x")


def test_a_frozen_backbone_gets_no_gradient() -> None:
    tokens = VisualTokenizer(dataclasses.replace(VIT, frozen=True), 64)
    assert not any(p.requires_grad for p in tokens.patches.parameters())
    assert all(p.requires_grad for p in tokens.qformer.parameters())
