"""The published checkpoint -> our network: names, shapes and sizes (RoboDita's state dict, timm's names for DINOv2).

`from_state_dict` gives an object that takes the official module's inputs and returns its outputs; a name that is
missing, extra or mis-shaped is listed and refused.
Shape legend: b batch, f 2 frames, p patches, q 32 visual tokens, l 77 language tokens, T action slots, d width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dita.batch import Observation
from dita.config import DiffusionConfig, LanguageConfig, PolicyConfig, VisionConfig
from dita.policy.diffusion import Diffusion
from dita.policy.model import DitaModel
from dita.policy.transformer import Prefix

Schedule = Literal["linear1000", "cosine100"]
PATCH = 14
LANGUAGE_TOKENS = 77
FRAMES = 2
COUNTER = "image_tokenizer.qformer.num_iter"  # a training counter, no weight
VIT, QFORMER = "vision.patches.vit", "vision.qformer"
# official name -> our names; several mean that the fused rows are split into equal parts
NAMES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"image_tokenizer\.tokenizer\.cls_token", (f"{VIT}.embeddings.cls_token",)),
    (r"image_tokenizer\.tokenizer\.reg_token", (f"{VIT}.embeddings.register_tokens",)),
    (r"image_tokenizer\.tokenizer\.pos_embed", (f"{VIT}.embeddings.position_embeddings",)),
    (r"image_tokenizer\.tokenizer\.patch_embed\.proj\.(\w+)", (rf"{VIT}.embeddings.patch_embeddings.projection.\1",)),
    (r"image_tokenizer\.tokenizer\.norm\.(\w+)", (rf"{VIT}.layernorm.\1",)),
    (r"image_tokenizer\.tokenizer\.blocks\.(\d+)\.ls(\d)\.gamma", (rf"{VIT}.encoder.layer.\1.layer_scale\2.lambda1",)),
    (
        r"image_tokenizer\.tokenizer\.blocks\.(\d+)\.attn\.qkv\.(\w+)",
        tuple(rf"{VIT}.encoder.layer.\1.attention.{part}_proj.\2" for part in "qkv"),
    ),
    (
        r"image_tokenizer\.tokenizer\.blocks\.(\d+)\.attn\.proj\.(\w+)",
        (rf"{VIT}.encoder.layer.\1.attention.o_proj.\2",),
    ),
    (
        r"image_tokenizer\.tokenizer\.blocks\.(\d+)\.(norm1|norm2|mlp\.fc1|mlp\.fc2)\.(\w+)",
        (rf"{VIT}.encoder.layer.\1.\2.\3",),
    ),
    (r"image_tokenizer\.qformer\.queries", (f"{QFORMER}.queries",)),
    (r"image_tokenizer\.qformer\.norm\.(\w+)", (rf"{QFORMER}.norm.\1",)),
    (r"image_tokenizer\.qformer\.blocks\.(\d+)\.norm1\.(\w+)", (rf"{QFORMER}.layers.\1.self_norm.\2",)),
    (r"image_tokenizer\.qformer\.blocks\.(\d+)\.norm1_1\.(\w+)", (rf"{QFORMER}.layers.\1.cross_norm.\2",)),
    (r"image_tokenizer\.qformer\.blocks\.(\d+)\.norm2\.(\w+)", (rf"{QFORMER}.layers.\1.mlp_norm.\2",)),
    (r"image_tokenizer\.qformer\.blocks\.(\d+)\.mlp\.fc1\.(\w+)", (rf"{QFORMER}.layers.\1.mlp.0.\2",)),
    (r"image_tokenizer\.qformer\.blocks\.(\d+)\.mlp\.fc2\.(\w+)", (rf"{QFORMER}.layers.\1.mlp.2.\2",)),
    (
        r"image_tokenizer\.qformer\.blocks\.(\d+)\.self_attn\.qkv\.weight",
        tuple(rf"{QFORMER}.layers.\1.self_attention.{part}.weight" for part in "qkv"),
    ),
    (
        r"image_tokenizer\.qformer\.blocks\.(\d+)\.cross_attn\.kv\.weight",
        tuple(rf"{QFORMER}.layers.\1.cross_attention.{part}.weight" for part in "kv"),
    ),
    (
        r"image_tokenizer\.qformer\.blocks\.(\d+)\.cross_attn\.q\.weight",
        (rf"{QFORMER}.layers.\1.cross_attention.q.weight",),
    ),
    (
        r"image_tokenizer\.qformer\.blocks\.(\d+)\.(self|cross)_attn\.proj\.(\w+)",
        (rf"{QFORMER}.layers.\1.\2_attention.o.\3",),
    ),
    (
        r"image_tokenizer\.qformer\.blocks\.(\d+)\.film_layer\._projection_mult\.(\w+)",
        (rf"{QFORMER}.layers.\1.film_scale.\2",),
    ),
    (
        r"image_tokenizer\.qformer\.blocks\.(\d+)\.film_layer\._projection_add\.(\w+)",
        (rf"{QFORMER}.layers.\1.film_shift.\2",),
    ),
    (r"transformer\.model\.layers\.(\d+)\.input_layernorm\.weight", (r"trunk.blocks.\1.attention_norm.weight",)),
    (r"transformer\.model\.layers\.(\d+)\.post_attention_layernorm\.weight", (r"trunk.blocks.\1.ffn_norm.weight",)),
    (r"transformer\.model\.layers\.(\d+)\.self_attn\.([qkvo])_proj\.weight", (r"trunk.blocks.\1.\2.weight",)),
    (r"transformer\.model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj\.weight", (r"trunk.blocks.\1.\2.weight",)),
    (r"transformer\.model\.norm\.weight", ("trunk.norm.weight",)),
    (r"transformer\.lm_head\.weight", ("head.weight",)),
)


@dataclass(frozen=True, eq=False)
class OfficialPolicy:
    """Our network with official weights, behind the official module's inputs and outputs."""

    model: DitaModel
    diffusion: Diffusion

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
        return self.model.vision.read(image.flatten(0, 1), c).unflatten(0, (b, frames))

    @torch.no_grad()
    def predict_noise(
        self,
        noisy_actions: Float[Tensor, "b T 7"],
        timesteps: Int[Tensor, "b"],
        image: Float[Tensor, "b f 3 h w"],
        language: Float[Tensor, "b l d"],
    ) -> Float[Tensor, "b T 7"]:
        """Return one forward pass."""
        return self._denoise(noisy_actions[:, None], timesteps[:, None], self._context(image, language))[:, 0]

    @torch.no_grad()
    def sample(
        self,
        initial_noise: Float[Tensor, "b T 7"],
        image: Float[Tensor, "b f 3 h w"],
        language: Float[Tensor, "b l d"],
        num_inference_steps: int,
    ) -> Float[Tensor, "b n 7"]:
        """Denoise and return the last T - 1 slots, normalised: slot 0 is the previous action."""
        context = self._context(image, language)
        dims = torch.ones(initial_noise.shape[0], initial_noise.shape[2], dtype=torch.bool, device=image.device)
        out = self.diffusion.sample(
            lambda x, t: self._denoise(x, t, context), initial_noise[:, None], dims, num_inference_steps
        )
        return out[:, 0, self.model.config.past_action_slots :]

    def _context(self, image: Tensor, language: Tensor) -> Prefix:
        b, frames, device = *image.shape[:2], image.device
        words = torch.ones(language.shape[:2], dtype=torch.bool, device=device)
        nothing = torch.zeros(b, frames, self.model.config.state_dim, device=device)
        observation = Observation(
            images=image[:, :, None],
            image_valid=torch.ones(b, frames, 1, dtype=torch.bool, device=device),
            state=nothing,
            state_valid=nothing[:, 0].bool(),
            language=words.long(),
            language_valid=words,
            embodiment=torch.zeros(b, dtype=torch.long, device=device),
        )
        return self.model.observe(observation, self.model.instruct_states(language, words))

    def _denoise(self, x: Tensor, t: Tensor, context: Prefix) -> Tensor:
        slots = torch.ones(x.shape[0], x.shape[2], dtype=torch.bool, device=x.device)
        return self.model.denoise(x, t, context, slots)


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
    diffusion = Diffusion(diffusion_config(schedule))
    meta = any(t.is_meta for t in state_dict.values())
    with torch.device("meta" if meta else "cpu"):
        model = DitaModel(config, embodiments=1)
    weights = rename(state_dict)
    _refuse_misfits(model, weights, state_dict)
    model.load_state_dict(weights, assign=True)
    return OfficialPolicy(model.eval().requires_grad_(False), diffusion)


def rename(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return our names and layouts.

    Raises:
        ValueError: names that the official module does not have.
    """
    ours: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in state_dict.items():
        if name == COUNTER:
            continue
        for pattern, targets in NAMES:
            if match := re.fullmatch(pattern, name):
                parts = tensor.float().chunk(len(targets))
                ours |= {match.expand(t): part.contiguous() for t, part in zip(targets, parts, strict=True)}
                break
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(
            f"not a Dita state dict: {len(unknown)} names the official module does not have: {unknown[:5]}"
        )
    if (queries := ours.get(f"{QFORMER}.queries")) is not None:
        ours[f"{QFORMER}.queries"] = queries[0]
    if (positions := ours.get(f"{VIT}.embeddings.position_embeddings")) is not None:
        # timm keeps no position for the class token (no_embed_class); transformers adds one to it
        none = torch.zeros_like(positions[:, :1])
        ours[f"{VIT}.embeddings.position_embeddings"] = torch.cat([none, positions], dim=1)
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
        action_dim=action_dim,
        state_dim=0,
        cameras=1,
        state_tokens=False,
        embodiment_token=False,
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
    return DiffusionConfig("diffusion", steps, betas, "epsilon", "leading", False, 1.0, 10)  # pyright: ignore


def _refuse_misfits(model: DitaModel, weights: Mapping[str, Tensor], official: Mapping[str, Tensor]) -> None:
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    given = {name: tuple(t.shape) for name, t in weights.items()}
    missing, extra = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    wrong = [f"{n} {given[n]}, expected {expected[n]}" for n in sorted(given.keys() & expected.keys())
             if given[n] != expected[n]]  # fmt: skip
    if missing or extra or wrong:
        raise ValueError(
            f"the state dict ({len(official)} names) does not fit: missing {missing[:5]}, extra {extra[:5]}, "
            f"mis-shaped {wrong[:5]}"
        )
