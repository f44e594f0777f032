"""The peer: what the official code does, written from its description (docs: Dita, arXiv 2503.19757), on our weights.

Every denoising step runs the whole sequence [C; V; V; tau; u] through transformers' Llama again; every control tick
encodes both frames again; the scheduler is diffusers'. Same weights, same outputs, other work.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from dita.config import DiffusionConfig
from dita.policy.model import DitaModel, timestep_embedding


class OfficialStyle(nn.Module):
    """Whole-sequence recompute per step; T action slots, one camera, two frames."""

    def __init__(self, model: DitaModel, diffusion: DiffusionConfig, steps: int) -> None:
        super().__init__()
        from diffusers.schedulers.scheduling_ddim import DDIMScheduler
        from transformers import LlamaConfig, LlamaModel

        c = model.config
        self.config, self.vision, self.head = c, model.vision, model.head
        self.trunk: Any = LlamaModel(
            LlamaConfig(
                vocab_size=8, hidden_size=c.dim, intermediate_size=c.ffn_dim, num_hidden_layers=c.layers,
                num_attention_heads=c.heads, num_key_value_heads=c.heads, rms_norm_eps=1e-6, hidden_act="silu",
                max_position_embeddings=2048, attn_implementation="sdpa",  # pyright: ignore
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            )
        )  # fmt: skip
        self.trunk.load_state_dict(llama_weights(model, self.trunk.embed_tokens.weight))
        self.trunk.to(device=model.head.weight.device)
        self.eval().requires_grad_(False)
        self.scheduler = DDIMScheduler(
            num_train_timesteps=diffusion.num_train_timesteps, beta_start=1e-4, beta_end=0.02,
            beta_schedule=diffusion.beta_schedule, clip_sample=True,
            prediction_type=diffusion.prediction_type,  # pyright: ignore
        )  # fmt: skip
        self.scheduler.set_timesteps(steps)

    def predict(self, x: Float[Tensor, "b T a"], t: Tensor, context: Float[Tensor, "b l d"]) -> Float[Tensor, "b T a"]:
        """Run one step: the whole sequence, causally."""
        tau = timestep_embedding(t.expand(len(x)), self.config.dim)[:, None]  # [b 1 d]
        u = nn.functional.pad(x, (0, self.config.dim - x.shape[-1]))  # [b T d]
        sequence = torch.cat([context, tau.to(context), u.to(context)], dim=1)
        hidden = self.trunk(inputs_embeds=sequence, use_cache=False).last_hidden_state
        return self.head(hidden[:, -x.shape[1] :])

    @torch.no_grad()
    def sample(
        self, noise: Float[Tensor, "b T a"], context: Float[Tensor, "b l d"], trace: list | None = None
    ) -> Float[Tensor, "b T a"]:
        """Denoise; trace gets (x, t, output) of each step."""
        x = noise
        for t in self.scheduler.timesteps:
            out = self.predict(x, t.to(x.device), context).float()
            if trace is not None:
                trace.append((x, t, out))
            x = self.scheduler.step(out, t, x).prev_sample  # pyright: ignore
        return x

    @torch.no_grad()
    def tick(
        self, images: UInt8[Tensor, "2 3 h w"], noise: Float[Tensor, "1 T a"], language: Float[Tensor, "1 l d"]
    ) -> Float[Tensor, "1 T a"]:
        """Run one control tick from two frames and the instruction's token states."""
        c = language.mean(1).expand(len(images), -1)
        tokens = self.vision(images, c)  # [2 q d]
        return self.sample(noise, torch.cat([language, tokens.flatten(0, 1)[None]], dim=1))


def llama_weights(model: DitaModel, embedding: Tensor) -> dict[str, Tensor]:
    """Return the trunk's weights under transformers' names."""
    weights = {"embed_tokens.weight": embedding, "norm.weight": model.trunk.norm.weight}
    for i, block in enumerate(model.trunk.blocks):
        q, k, v = block.qkv.weight.chunk(3)
        gate, up = block.gate_up.weight.chunk(2)
        parts = {
            "self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v, "self_attn.o_proj": block.o.weight,
            "mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": block.down.weight,
            "input_layernorm": block.attention_norm.weight, "post_attention_layernorm": block.ffn_norm.weight,
        }  # fmt: skip
        weights |= {f"layers.{i}.{name}.weight": w.clone() for name, w in parts.items()}
    return weights
