"""The published checkpoint -> our network: names, shapes and sizes (RoboDita's state dict, timm's names for DINOv2).

`from_state_dict` gives an object that takes the official module's inputs and returns its outputs; a name that is
missing, extra or mis-shaped is listed and refused.
Shape legend: b batch, f 2 frames, p patches, q 32 visual tokens, l 77 language tokens, T action slots, d width.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dita.batch import Observation
from dita.checkpoint import load_tensors, read_json, save_policy
from dita.config import DiffusionConfig, LanguageConfig, PolicyConfig, PreprocessConfig, VisionConfig
from dita.embodiment import load_embodiment
from dita.normalize import stats_from_dict
from dita.policy.diffusion import train_schedule
from dita.policy.model import Context, DitaModel
from dita.policy.policy import DitaPolicy
from dita.policy.vision import PATCH
from dita.preprocess import Contract, make_contract

Schedule = Literal["linear1000", "cosine100"]
LANGUAGE_TOKENS = 77
FRAMES = 2
STATE_DIM = 16  # the network reads no state; the contract has room for a robot's
COUNTER = "image_tokenizer.qformer.num_iter"  # a training counter, no weight
VIT, QFORMER = "vision.patches.vit", "vision.qformer"
# official name -> our names; several mean that the fused rows are split, `#i/n` that ours are part i of n fused ones
BOTH = ("weight", "bias")
TOP: dict[str, tuple[str, ...]] = {
    "image_tokenizer.tokenizer.cls_token": (f"{VIT}.embeddings.cls_token",),
    "image_tokenizer.tokenizer.reg_token": (f"{VIT}.embeddings.register_tokens",),
    "image_tokenizer.tokenizer.pos_embed": (f"{VIT}.embeddings.position_embeddings",),
    **{
        f"image_tokenizer.tokenizer.patch_embed.proj.{p}": (f"{VIT}.embeddings.patch_embeddings.projection.{p}",)
        for p in BOTH
    },
    **{f"image_tokenizer.tokenizer.norm.{p}": (f"{VIT}.layernorm.{p}",) for p in BOTH},
    "image_tokenizer.qformer.queries": (f"{QFORMER}.queries",),
    **{f"image_tokenizer.qformer.norm.{p}": (f"{QFORMER}.norm.{p}",) for p in BOTH},
    "transformer.model.norm.weight": ("trunk.norm.weight",),
    "transformer.lm_head.weight": ("head.weight",),
}
VIT_BLOCK: dict[str, tuple[str, ...]] = {
    "ls1.gamma": ("layer_scale1.lambda1",),
    "ls2.gamma": ("layer_scale2.lambda1",),
    **{f"attn.qkv.{p}": tuple(f"attention.{part}_proj.{p}" for part in "qkv") for p in BOTH},
    **{f"attn.proj.{p}": (f"attention.o_proj.{p}",) for p in BOTH},
    **{f"{part}.{p}": (f"{part}.{p}",) for part in ("norm1", "norm2", "mlp.fc1", "mlp.fc2") for p in BOTH},
}
QFORMER_BLOCK: dict[str, tuple[str, ...]] = {
    **{f"norm1.{p}": (f"self_norm.{p}",) for p in BOTH},
    **{f"norm1_1.{p}": (f"cross_norm.{p}",) for p in BOTH},
    **{f"norm2.{p}": (f"mlp_norm.{p}",) for p in BOTH},
    **{f"mlp.fc1.{p}": (f"mlp.0.{p}",) for p in BOTH},
    **{f"mlp.fc2.{p}": (f"mlp.2.{p}",) for p in BOTH},
    "self_attn.qkv.weight": tuple(f"self_attention.{part}.weight" for part in "qkv"),
    "cross_attn.kv.weight": tuple(f"cross_attention.{part}.weight" for part in "kv"),
    "cross_attn.q.weight": ("cross_attention.q.weight",),
    **{f"{kind}_attn.proj.{p}": (f"{kind}_attention.o.{p}",) for kind in ("self", "cross") for p in BOTH},
    **{f"film_layer._projection_mult.{p}": (f"film_scale.{p}",) for p in BOTH},
    **{f"film_layer._projection_add.{p}": (f"film_shift.{p}",) for p in BOTH},
}
TRUNK_BLOCK: dict[str, tuple[str, ...]] = {
    "input_layernorm.weight": ("attention_norm.weight",),
    "post_attention_layernorm.weight": ("ffn_norm.weight",),
    **{f"self_attn.{part}_proj.weight": (f"qkv.weight#{i}/3",) for i, part in enumerate("qkv")},
    "self_attn.o_proj.weight": ("o.weight",),
    "mlp.gate_proj.weight": ("gate_up.weight#0/2",),
    "mlp.up_proj.weight": ("gate_up.weight#1/2",),
    "mlp.down_proj.weight": ("down.weight",),
}


def official_names(config: PolicyConfig) -> dict[str, tuple[str, ...]]:
    """Return every name of the official state dict of this size, and where it goes in ours."""
    stacks = (
        ("image_tokenizer.tokenizer.blocks", f"{VIT}.encoder.layer", config.vision.vit_layers, VIT_BLOCK),
        ("image_tokenizer.qformer.blocks", f"{QFORMER}.layers", config.vision.qformer_layers, QFORMER_BLOCK),
        ("transformer.model.layers", "trunk.blocks", config.layers, TRUNK_BLOCK),
    )
    return TOP | {
        f"{theirs}.{i}.{name}": tuple(f"{ours}.{i}.{target}" for target in targets)
        for theirs, ours, depth, block in stacks
        for i in range(depth)
        for name, targets in block.items()
    }


@dataclass(frozen=True, eq=False)
class OfficialPolicy:
    """Our policy with official weights, behind the official module's inputs and outputs."""

    policy: DitaPolicy

    @property
    def model(self) -> DitaModel:
        """The network."""
        return self.policy.model

    @torch.no_grad()
    def patch_tokens(self, image: Float[Tensor, "b f 3 h w"]) -> Float[Tensor, "bf p d"]:
        """Return the ViT's patch tokens of ImageNet-normalised frames."""
        return self.model.vision.patches(image.flatten(0, 1))[0]

    @torch.no_grad()
    def image_tokens(
        self, image: Float[Tensor, "b f 3 h w"], language: Float[Tensor, "b l d"]
    ) -> Float[Tensor, "b f q d"]:
        """Return the Q-Former's tokens; language: CLIP's hidden states."""
        b, frames = image.shape[:2]
        c = language.mean(1).repeat_interleave(frames, dim=0)  # [bf d]
        return self.model.see(image.flatten(0, 1), c).unflatten(0, (b, frames))

    @torch.no_grad()
    def predict_noise(
        self,
        noisy_actions: Float[Tensor, "b T 7"],
        timesteps: Int[Tensor, "b"],
        image: Float[Tensor, "b f 3 h w"],
        language: Float[Tensor, "b l d"],
    ) -> Float[Tensor, "b T 7"]:
        """Return one forward pass."""
        slots = torch.ones(noisy_actions.shape[:2], dtype=torch.bool, device=image.device)
        suffix = self.model.suffix(self._context(image, language), slots, 1)
        return self.model.denoise(noisy_actions[:, None], self.model.time_tokens(timesteps[:, None]), suffix)[:, 0]

    @torch.no_grad()
    def sample(
        self,
        initial_noise: Float[Tensor, "b T 7"],
        image: Float[Tensor, "b f 3 h w"],
        language: Float[Tensor, "b l d"],
        num_inference_steps: int,
    ) -> Float[Tensor, "b n 7"]:
        """Denoise and return the last T - 1 slots, normalised: slot 0 is the previous action."""
        plan = self.policy.diffusion.plan(num_inference_steps, image.device)
        embodiment = torch.zeros(len(image), dtype=torch.long, device=image.device)
        out = self.policy.act(self._context(image, language), embodiment, initial_noise[:, None], plan)
        return out[:, 0, self.policy.config.past_action_slots :]

    def _context(self, image: Tensor, language: Tensor) -> Context:
        words = torch.ones(language.shape[:2], dtype=torch.bool, device=image.device)
        observation = reference_observation(image, self.policy.config.state_dim)
        return self.model.observe(observation, self.model.instruct_states(language, words))


def reference_observation(image: Float[Tensor, "b f 3 h w"], state_dim: int) -> Observation:
    """Wrap normalised frames of one camera; the official network reads no state."""
    b, frames, device = *image.shape[:2], image.device
    nothing = torch.zeros(b, frames, state_dim, device=device)
    words = torch.ones(b, 1, dtype=torch.bool, device=device)
    return Observation(
        images=image[:, :, None],
        image_valid=torch.ones(b, frames, 1, dtype=torch.bool, device=device),
        state=nothing,
        state_valid=nothing[:, 0].bool(),
        language=words.long(),
        language_valid=words,
        embodiment=torch.zeros(b, dtype=torch.long, device=device),
    )


def from_state_dict(
    state_dict: Mapping[str, Tensor],
    action_slots: int,
    schedule: Schedule,
    vision_heads: int = 12,
    qformer_heads: int | None = None,
    trunk_heads: int | None = None,
) -> OfficialPolicy:
    """Build the network an official state dict belongs to; every size is read from the shapes.

    Args:
        state_dict: names and tensors of the official module (meta tensors will do to check names and shapes).
        action_slots: T, the previous action included: 16 in pretraining, 11 for LIBERO and CALVIN.
        schedule: of the diffusion, which no tensor tells.
        vision_heads: of the ViT, which no shape tells; 12 at the published size.
        qformer_heads: None: width / 64.
        trunk_heads: None: width / 64.

    Raises:
        ValueError: a name is missing, extra or mis-shaped (listed), or the schedule is unknown.
    """
    config = infer_config(state_dict, action_slots, vision_heads, qformer_heads, trunk_heads)
    contract = make_contract(PreprocessConfig("q01_q99", "squash", "stored"), config, [], [])
    return OfficialPolicy(_build(state_dict, config, schedule, contract))


def import_official(
    file: Path,
    out: Path,
    *,
    action_slots: int,
    schedule: Schedule,
    vision_heads: int = 12,
    qformer_heads: int | None = None,
    trunk_heads: int | None = None,
    embodiment: str | None = None,
    stats: Path | None = None,
    text_encoder: str | None = None,
) -> DitaPolicy:
    """Read a published checkpoint and write our policy folder; return the policy.

    Args:
        file: `.pth` (weights under the key `parameter`; everything else, the optimizer too, is ignored) or
            `.safetensors`.
        out: the folder to write; must not exist.
        action_slots: as for `from_state_dict`, as are schedule and heads.
        embodiment: name or YAML file of the robot that the checkpoint drives; its statistics come in `stats`. The
            published file holds neither: without them the folder can be finetuned, and refuses to predict.
        stats: JSON of `dita.normalize.stats_to_dict`.
        text_encoder: folder or hub id of CLIP ViT-L/14.

    Raises:
        FileExistsError: `out` exists.
        ValueError: the file holds anything else than tensors and plain values, or names or shapes do not fit (listed).
    """
    if out.exists():
        raise FileExistsError(f"{out} exists; choose another folder")
    if (embodiment is None) != (stats is None):
        raise ValueError("give --embodiment and --stats together: fields without statistics have no units")
    state_dict = read_state_dict(file)
    config = infer_config(state_dict, action_slots, vision_heads, qformer_heads, trunk_heads)
    config = replace(config, language=replace(config.language, pretrained=text_encoder))
    specs = [] if embodiment is None else [load_embodiment(embodiment)]
    norms = [] if stats is None else [stats_from_dict(read_json(stats))]
    contract = make_contract(PreprocessConfig("q01_q99", "squash", "stored"), config, specs, norms)
    policy = _build(state_dict, config, schedule, contract)
    save_policy(policy, out)
    return policy


def published_parameters(model: DitaModel) -> int:
    """Count the parameters that come from the published file: without transformers' mask token and class position."""
    return sum(p.numel() for p in model.parameters()) - 2 * model.config.dim


def read_state_dict(file: Path) -> dict[str, Tensor]:
    """Read the weights of a `.pth` or `.safetensors` file; nothing in it is executed.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is not readable, or holds something else (what it holds is said).
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist")
    if file.suffix == ".safetensors":
        return load_tensors(file)
    try:
        # files from before torch 1.6 are no zip archives and cannot be mapped
        values = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError:  # torch's own text recommends to load it by running it
        raise ValueError(f"{file} holds more than tensors and plain values, or is damaged; refused") from None
    except (RuntimeError, EOFError, KeyError, ValueError) as e:
        raise ValueError(f"{file} is not a checkpoint; refused: {str(e).splitlines()[0]}") from None
    found = values.get("parameter", values) if isinstance(values, dict) else values
    if not isinstance(found, dict) or not found or not all(isinstance(t, Tensor) for t in found.values()):
        what = f"keys {sorted(map(str, values))[:8]}" if isinstance(values, dict) else type(values).__name__
        raise ValueError(f"{file} holds {what}; expected weights by name under the key 'parameter'")
    return found


def _build(
    state_dict: Mapping[str, Tensor], config: PolicyConfig, schedule: Schedule, contract: Contract
) -> DitaPolicy:
    diffusion = diffusion_config(schedule)
    table = train_schedule(diffusion)
    with torch.device("meta"):
        policy = DitaPolicy(config, diffusion, contract, table)
    names = official_names(config)
    _refuse_misfits(names, policy.model, state_dict)
    weights = rename(state_dict, names)
    policy.model.load_state_dict(weights, assign=True)
    return policy.eval().requires_grad_(False)


def rename(state_dict: Mapping[str, Tensor], names: Mapping[str, tuple[str, ...]]) -> dict[str, Tensor]:
    """Return our names and layouts."""
    ours: dict[str, Tensor] = {}
    parts: dict[str, list[Tensor]] = {}
    for name, targets in names.items():
        tensor = state_dict[name].float()
        if "#" in targets[0]:
            parts.setdefault(targets[0].split("#")[0], []).append(tensor)  # in the table's order
        else:
            ours |= {t: x.contiguous() for t, x in zip(targets, tensor.chunk(len(targets)), strict=True)}
    ours |= {name: torch.cat(tensors) for name, tensors in parts.items()}
    ours[f"{QFORMER}.queries"] = ours[f"{QFORMER}.queries"][0]
    positions = ours[f"{VIT}.embeddings.position_embeddings"]
    # timm keeps no position for the class token (no_embed_class); transformers adds one to it
    ours[f"{VIT}.embeddings.position_embeddings"] = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
    ours[f"{VIT}.embeddings.mask_token"] = torch.zeros_like(positions[:, 0])
    return ours


def infer_config(
    state_dict: Mapping[str, Tensor],
    action_slots: int,
    vision_heads: int = 12,
    qformer_heads: int | None = None,
    trunk_heads: int | None = None,
) -> PolicyConfig:
    """Read every size from the shapes.

    Raises:
        ValueError: a tensor that tells a size is missing, or the positions are no square grid.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in state_dict:
            raise ValueError(f"not a Dita state dict: {name} is missing; it has {sorted(state_dict)[:3]} ...")
        return tuple(state_dict[name].shape)

    def depth(prefix: str) -> int:
        found = {int(m[1]) for name in state_dict if (m := re.match(rf"{re.escape(prefix)}\.(\d+)\.", name))}
        return len(found)

    action_dim, dim = shape("transformer.lm_head.weight")
    patches = shape("image_tokenizer.tokenizer.pos_embed")[1]
    side = round(patches**0.5)
    if side**2 != patches:
        raise ValueError(f"pos_embed has {patches} positions: not a square grid of patches")
    vision = VisionConfig(
        kind="dinov2_qformer",
        image_size=side * PATCH,
        tokens=shape("image_tokenizer.qformer.queries")[1],
        qformer_layers=depth("image_tokenizer.qformer.blocks"),
        qformer_heads=qformer_heads,
        qformer_film=True,
        patch_dim=dim,
        vit_layers=depth("image_tokenizer.tokenizer.blocks"),
        vit_heads=vision_heads,
        pretrained=None,
        frozen=False,
    )
    return PolicyConfig(
        name="dita_official",
        dim=dim,
        layers=depth("transformer.model.layers"),
        heads=trunk_heads or dim // 64,
        ffn_dim=shape("transformer.model.layers.0.mlp.up_proj.weight")[0],
        n_obs_steps=FRAMES,
        chunk_size=action_slots - 1,
        n_action_steps=min(8, action_slots - 1),
        past_action_slots=1,
        max_committed_slots=0,
        action_dim=action_dim,
        state_dim=STATE_DIM,
        cameras=1,
        state_tokens=False,
        embodiment_token=False,
        embodiment_dropout=0.0,
        action_embedding="zero_pad",
        action_attention="causal",
        vision=vision,
        language=LanguageConfig("transformers", LANGUAGE_TOKENS, 0, None),
    )


def diffusion_config(schedule: Schedule) -> DiffusionConfig:
    """Return the published diffusion of pretraining (linear1000) or finetuning (cosine100).

    Raises:
        ValueError: another name.
    """
    known = {"linear1000": (1000, "linear"), "cosine100": (100, "squaredcos_cap_v2")}
    if schedule not in known:
        raise ValueError(f"schedule {schedule!r}; there are {', '.join(known)}")
    steps, betas = known[schedule]
    return DiffusionConfig("diffusion", steps, betas, "epsilon", "leading", False, 1.0, "ddim", 10)  # pyright: ignore


def _refuse_misfits(names: Mapping[str, tuple[str, ...]], model: DitaModel, state_dict: Mapping[str, Tensor]) -> None:
    given = {name: tuple(t.shape) for name, t in state_dict.items() if name != COUNTER}
    missing, extra = sorted(names.keys() - given.keys()), sorted(given.keys() - names.keys())
    ours = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    expected = {name: _official_shape(targets, ours) for name, targets in names.items()}
    wrong = [f"{n} {given[n]}, expected {expected[n]}" for n in sorted(given) if given[n] != expected.get(n, given[n])]
    if missing or extra or wrong:
        raise ValueError(
            f"not the official names and shapes of this size ({len(given)} given): "
            f"{len(missing)} missing {missing[:5]}, {len(extra)} extra {extra[:5]}, {len(wrong)} mis-shaped {wrong[:5]}"
        )


def _official_shape(targets: tuple[str, ...], ours: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    name, _, part = targets[0].partition("#")
    first, *rest = ours[name]
    if name == f"{QFORMER}.queries":
        return (1, first, *rest)
    if name == f"{VIT}.embeddings.position_embeddings":
        return (first, rest[0] - 1, rest[1])
    return (first * len(targets) // (int(part.split("/")[1]) if part else 1), *rest)
