"""Rows 6 and 10: memory and start-up, each side in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

from benchmarks.harness import OTHERS, ROOT, Case, Pairs, interleave
from benchmarks.policy_rows import base_config, make_policy
from dita.checkpoint import save_policy
from dita.config import LanguageConfig, PolicyConfig
from dita.policy.official import diffusion_config

# what both sides do: load, then one control tick from two frames, and say what the process needed at most
OURS = """
import numpy as np, torch
torch.set_num_threads(2)
from dita.policy.bench import make_observation
from dita.policy.fast import PolicySession
from dita.policy.policy import DitaPolicy
policy = DitaPolicy.from_pretrained({folder!r}, precision={precision!r})
session = PolicySession(policy, num_inference_steps={steps}, lean={lean})
del policy
spec = session.policy.specs[session.embodiment]
rng = np.random.default_rng(0)
chunk = session.predict([make_observation(spec, rng, i) for i in range(2)], seed=0)
assert np.isfinite(chunk.values).all()
"""
OFFICIAL = """
import torch
torch.set_num_threads(2)
from benchmarks.official_peer import OfficialStyle
from benchmarks.policy_rows import make_policy, base_config
from dita.policy.official import diffusion_config
import transformers, diffusers
from transformers import AutoTokenizer, CLIPTextModel, Dinov2WithRegistersModel, LlamaModel
tokenizer = AutoTokenizer.from_pretrained({clip!r})
tokens = tokenizer("pick up the cup", padding="max_length", max_length=77, return_tensors="pt")
with torch.no_grad():
    text = CLIPTextModel.from_pretrained({clip!r}).eval()
    states = text(tokens["input_ids"]).last_hidden_state
policy = make_policy(base_config({tier!r}), diffusion_config("cosine100"))  # the module, initialised, as theirs is
policy.load_state_dict(torch.load({weights!r}, weights_only=True)["parameter"], strict=False)
peer = OfficialStyle(policy.model, policy.diffusion.config, {steps})
del policy
images = torch.randint(0, 256, (2, 3, peer.config.vision.image_size, peer.config.vision.image_size), dtype=torch.uint8)
assert torch.isfinite(peer.tick(images, torch.randn(1, 16, 7), states)).all()
"""
# VmHWM belongs to the process's own memory map; getrusage's peak is inherited from the parent's
PEAK = """
from pathlib import Path
print(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))
"""


def run(code: str) -> float:
    """Run code in a fresh process and return its peak memory [bytes].

    Raises:
        RuntimeError: it failed.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code + PEAK], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return int(done.stdout.strip().splitlines()[-1]) * 1024


class Folders:
    """The same network as our folder, fp32 and bf16, and as a pickled state dict; and a text encoder for both sides."""

    def __init__(self, at: Path, tier: str) -> None:
        self.tier, self.steps, self.clip = tier, 10 if tier == "full" else 2, at / "clip"
        config = base_config(tier)
        write_clip(self.clip, config.dim, tier)
        language = replace(config.language, pretrained=str(self.clip))
        policy = make_policy(replace(config, language=language), diffusion_config("cosine100"))
        self.ours, self.half, self.weights = at / "ours", at / "half", at / "weights.pth"
        save_policy(policy, self.ours)
        save_policy(policy, self.half, precision="bf16")
        torch.save({"parameter": policy.state_dict()}, self.weights)
        self.conv = at / "conv"
        save_policy(make_policy(conv_config(config, tier), diffusion_config("cosine100")), self.conv)

    def our_code(self, folder: Path, precision: str = "fp32", lean: bool = False) -> str:
        """Return the program of our side."""
        return OURS.format(folder=str(folder), precision=precision, steps=self.steps, lean=lean)

    def official_code(self) -> str:
        """Return the program of the peer."""
        return OFFICIAL.format(weights=str(self.weights), steps=self.steps, tier=self.tier, clip=str(self.clip))


def write_clip(folder: Path, width: int, tier: str) -> None:
    """Write a CLIP text model with random weights, of ViT-L/14's size (quick: two thin layers), that reads letters."""
    from transformers import CLIPTextConfig, CLIPTextModel
    from transformers.models.clip import CLIPTokenizerFast  # pyright: ignore

    folder.mkdir(exist_ok=True)
    letters = [chr(c) for c in range(97, 123)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *[f"{c}</w>" for c in letters]]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    layers, vocabulary = (12, 49408) if tier == "full" else (2, len(words))
    config = CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64), max_position_embeddings=77, bos_token_id=0, eos_token_id=1,
        pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    CLIPTextModel(config).eval().save_pretrained(folder)


def conv_config(config: PolicyConfig, tier: str) -> PolicyConfig:
    """Return the same trunk behind the convolutional tokenizer and byte tokens: no transformers in the process."""
    size, patch_dim = (224, 192) if tier == "full" else (32, 16)
    vision = replace(
        config.vision, kind="conv_qformer", image_size=size, tokens=16, patch_dim=patch_dim, vit_layers=0, vit_heads=0
    )
    return replace(config, vision=vision, language=LanguageConfig("bytes", 16, 1, None))


def memory(tier: str) -> list[Case]:
    """Row 6: peak memory of a process that loads and runs one tick; and of training with K=8 against K=1."""
    with TemporaryDirectory() as at:
        folders = Folders(Path(at), tier)
        peer = median(run(folders.official_code()) for _ in range(3 if tier == "full" else 1))
        cases = []
        for name, folder, precision, lean in (
            ("bf16, lean", folders.half, "bf16", True),
            ("fp32, lean", folders.ours, "fp32", True),
            ("fp32", folders.ours, "fp32", False),
        ):
            ours = run(folders.our_code(folder, precision, lean))
            cases.append(_memory_case(f"load and one tick, {name}", ours, peer, 0.35))
    one, eight = (training_peak(k, tier) for k in (1, 8))
    cases.append(_memory_case("training step, K=8 against K=1", eight, one, 1.6))
    return cases


def training_peak(k: int, tier: str) -> float:
    """Return the peak memory of forward and backward with k noise samples [bytes]."""
    return run(f"""
import torch
torch.set_num_threads(2)
from benchmarks.policy_rows import made_up_batch, one_pass, training_policy
policy = training_policy({tier!r})
batch = made_up_batch(policy)
one_pass(policy, batch, {k}, 0)
""")


def startup(tier: str) -> list[Case]:
    """Row 10: from a cold process to the first action; and what importing dita adds to importing torch."""
    pairs, warm_up = (5, 1) if tier == "full" else (1, 0)
    with TemporaryDirectory() as at:
        folders = Folders(Path(at), tier)
        official = partial(run, folders.official_code())
        cases = []
        for name, code, goal in (
            ("DINOv2, fp32", folders.our_code(folders.ours), 1 / 0.9),
            ("conv tokenizer, fp32", folders.our_code(folders.conv), 1 / 0.5),
        ):
            found = interleave(partial(run, code), official, pairs, warm_up)
            cases.append(_process_case(found, f"first action, {name}", goal))
    ours, peer = (partial(run, code) for code in ("import dita\nfrom dita import DitaPolicy", "import torch"))
    both = interleave(ours, peer, pairs, warm_up)
    added = both.ours - both.peer
    quiet = both.others <= OTHERS
    cases.append(
        Case("import dita and its policy, against import torch", both.ours, both.peer, "s",
             both.ratio if quiet else None, "<= import torch + 0.2 s", added <= 0.2 if quiet else None,
             f"importing dita and DitaPolicy adds {added * 1e3:.0f} ms to importing torch", dict(both.detail))
    )  # fmt: skip
    return cases


def _process_case(found: Pairs, name: str, goal: float) -> Case:
    return found.case(name, round(goal, 2))


def _memory_case(name: str, ours: float, peer: float, most: float) -> Case:
    share = ours / peer
    return Case(
        name, ours / 2**20, peer / 2**20, "MiB", peer / ours, f"<= {most:g}x of the peer", share <= most,
        f"{name}: {share:.2f} of the peer",
    )  # fmt: skip
