"""The network: (noisy actions, t, Observation) -> prediction, in three stages of one causal sequence (Dita, sec. 3).

    [C: instruction] [state, embodiment] [V: visual tokens of each frame and view] | [tau: t] [u: noisy actions]
     once a sentence  ------------- once an observation --------------              every denoising step

Shape legend: b batch, i distinct instructions, l language tokens, t frames, v views, q visual tokens, k noise samples
(or candidates) of one observation, n action slots, a padded action dims, s padded state dims, d width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dita.batch import Observation
from dita.config import PolicyConfig
from dita.policy.language import text_encoder
from dita.policy.transformer import Prefix, Trunk, block_mask, causal_mask
from dita.policy.vision import VisualTokenizer


@dataclass(frozen=True, eq=False)
class Instruction:
    """What the policy keeps of an instruction: its keys and values in the trunk, and its mean for FiLM."""

    prefix: Prefix
    mean: Float[Tensor, "i d"]

    def take(self, rows: Int[Tensor, "b"]) -> Instruction:
        """Repeat along the batch."""
        return Instruction(self.prefix.take(rows), self.mean.index_select(0, rows))


class DitaModel(nn.Module):
    """One causal Transformer over instruction, observation, timestep and noisy actions."""

    def __init__(self, config: PolicyConfig, embodiments: int) -> None:
        super().__init__()
        self.config = config
        d = config.dim
        self.language = text_encoder(config.language, d)
        self.vision = VisualTokenizer(config.vision, d)
        self.state = nn.Linear(config.state_dim, d) if config.state_tokens else None
        self.embodiment = nn.Embedding(embodiments, d) if config.embodiment_token else None
        self.action = nn.Linear(config.action_dim, d) if config.action_embedding == "linear" else None
        self.trunk = Trunk(d, config.layers, config.heads, config.ffn_dim)
        self.head = nn.Linear(d, config.action_dim, bias=False)
        self.vision.qformer.start_film_as_identity()

    @property
    def action_slots(self) -> int:
        """Denoised slots n: past ones (published recipe: 1) and the chunk."""
        return self.config.past_action_slots + self.config.chunk_size

    def instruct(self, ids: Int[Tensor, "i l"], valid: Bool[Tensor, "i l"]) -> Instruction:
        """Encode distinct instructions; holds until the instruction changes."""
        return self.instruct_states(*self.language(ids, valid))

    def instruct_states(self, states: Float[Tensor, "i l d"], valid: Bool[Tensor, "i l"]) -> Instruction:
        """Do the same from token states that are there already."""
        mean = (states * valid[..., None]).sum(1) / valid.sum(1, keepdim=True)  # [i d]
        mask = causal_mask(states.shape[1], states.device)
        return Instruction(self.trunk.extend(states, valid, mask, None), mean)

    def observe(self, observation: Observation, instruction: Instruction) -> Prefix:
        """Append an observation's tokens to its instruction's (both of batch b)."""
        b, frames, views = observation.image_valid.shape
        tokens, valid = [], []
        if self.state is not None:
            tokens.append(self.state(observation.state))  # [b t d]
            # a repeated first frame repeats its state: it is real, the robot was there
            valid.append(observation.state_valid.any(1, keepdim=True).expand(-1, frames))
        if self.embodiment is not None:
            tokens.append(self.embodiment(observation.embodiment)[:, None])  # [b 1 d]
            valid.append(torch.ones_like(observation.image_valid[:, 0, :1]))
        c = instruction.mean.repeat_interleave(frames * views, dim=0)  # [btv d]
        # float frames are normalised already: how reference inputs come
        read = self.vision.read if observation.images.is_floating_point() else self.vision
        visual = read(observation.images.flatten(0, 2), c)  # [btv q d]
        tokens.append(visual.reshape(b, -1, visual.shape[-1]))  # [b tvq d]
        valid.append(observation.image_valid.flatten(1).repeat_interleave(self.vision.tokens, dim=1))
        x, seen = torch.cat(tokens, dim=1), torch.cat(valid, dim=1)
        return self.trunk.extend(x, seen, causal_mask(x.shape[1], x.device), instruction.prefix)

    def context(self, observation: Observation) -> Prefix:
        """Encode everything that depends on neither t nor the noise; equal instructions are encoded once."""
        ids, rows = torch.unique(observation.language, dim=0, return_inverse=True)  # [i l], [b]
        first = torch.stack([(rows == i).nonzero()[0, 0] for i in range(len(ids))])
        instruction = self.instruct(ids, observation.language_valid[first])
        return self.observe(observation, instruction.take(rows))

    def denoise(
        self, x: Float[Tensor, "b k n a"], t: Int[Tensor, "b k"], context: Prefix, slot_valid: Bool[Tensor, "b n"]
    ) -> Float[Tensor, "b k n a"]:
        """Predict the target of k noise samples per context, packed: positions restart, samples do not see each other.

        slot_valid: False for slots past an episode's end; they are never attended to.
        """
        _, k, n, _ = x.shape
        u = self.action(x) if self.action else nn.functional.pad(x, (0, self.config.dim - x.shape[-1]))  # [b k n d]
        tau = timestep_embedding(t, self.config.dim).to(u.dtype)  # [b k d]
        tokens = torch.cat([tau[:, :, None], u], dim=2).flatten(1, 2)  # [b k(1+n) d]
        positions = (context.length + torch.arange(1 + n, device=x.device)).repeat(k)
        valid = torch.cat([torch.ones_like(slot_valid[:, :1]), slot_valid], dim=1).repeat(1, k)  # [b k(1+n)]
        mask = block_mask(self._suffix_mask(n, x.device), k)
        hidden = self.trunk(tokens, positions, valid, mask, context)  # [b k(1+n) d]
        return self.head(hidden.unflatten(1, (k, 1 + n))[:, :, 1:])  # [b k n a]

    def _suffix_mask(self, n: int, device: torch.device) -> Bool[Tensor, "1+n 1+n"]:
        mask = causal_mask(1 + n, device)
        if self.config.action_attention == "bidirectional":
            mask[1:, 1:] = True
        return mask


def timestep_embedding(t: Int[Tensor, "..."], dim: int) -> Float[Tensor, "... d"]:
    """Return [sin(t w), cos(t w)] with w_j = 10000^(-j / (dim/2 - 1)): one token, no MLP."""
    half = dim // 2
    w = 10000.0 ** (-torch.arange(half, device=t.device, dtype=torch.float32) / (half - 1))
    angles = t.float()[..., None] * w
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
