"""The network: (noisy actions, t, Observation) -> prediction, in stages of one causal sequence (Dita, sec. 3).

    [C: instruction] [state, embodiment] [V: visual tokens] ([tau(0)] [u: committed actions])   [tau(t)] [u: noisy]
     once a sentence  ---------- once an observation ---------------------------------------     every step

The part in round brackets is there only where the first actions of a chunk are decided already (real-time chunking,
arXiv 2512.05964); without it the sequence is the published one.
Shape legend: b batch, i distinct instructions, l language tokens, t frames, v views, q visual tokens, k noise samples
(or candidates) of one observation, n action slots, m committed slots at most, a padded action dims, s padded state
dims, d width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dita.batch import Observation
from dita.config import PolicyConfig
from dita.policy.language import text_encoder
from dita.policy.transformer import Layout, Prefix, Trunk, block_mask, causal_mask
from dita.policy.vision import DinoPatches, VisualTokenizer


@dataclass(frozen=True, eq=False)
class Instruction:
    """What the policy keeps of an instruction: its keys and values in the trunk, and its mean for FiLM."""

    prefix: Prefix
    mean: Float[Tensor, "i d"]

    def take(self, rows: Int[Tensor, "b"]) -> Instruction:
        """Repeat along the batch."""
        return Instruction(self.prefix.take(rows), self.mean.index_select(0, rows))


@dataclass(frozen=True, eq=False)
class Context:
    """All that is decided before denoising: an encoded observation and, maybe, the first actions of the chunk."""

    prefix: Prefix
    observed: int  # tokens of instruction and observation: where the rest begins
    committed: Int[Tensor, "b"] | None  # leading action slots that are in the prefix; None: the published sequence


@dataclass(frozen=True, eq=False)
class Suffix:
    """The noisy part of the sequence on top of a context: laid out once, run at every denoising step."""

    prefix: Prefix
    layout: Layout


class DitaModel(nn.Module):
    """One causal Transformer over instruction, observation, timestep and noisy actions."""

    def __init__(self, config: PolicyConfig, embodiments: int) -> None:
        super().__init__()
        self.config = config
        d = config.dim
        self.language = text_encoder(config.language, d)
        self.vision = VisualTokenizer(config.vision, d)
        self.state = nn.Linear(config.state_dim, d) if config.state_tokens else None
        rows = embodiments + (config.embodiment_dropout > 0)  # the last one: an embodiment that is not told
        self.embodiment = nn.Embedding(rows, d) if config.embodiment_token else None
        self.action = nn.Linear(config.action_dim, d) if config.action_embedding == "linear" else None
        self.trunk = Trunk(d, config.layers, config.heads, config.ffn_dim)
        self.head = nn.Linear(d, config.action_dim, bias=False)
        self.vision.start_as_identity()

    @property
    def action_slots(self) -> int:
        """Denoised slots n: past ones (published recipe: 1) and the chunk."""
        return self.config.past_action_slots + self.config.chunk_size

    @property
    def dtype(self) -> torch.dtype:
        """Precision of weights and hidden states."""
        return self.trunk.norm.weight.dtype

    def checkpoint_activations(self) -> None:
        """Recompute activations in the backward pass instead of keeping them: less memory, a third more time."""
        for block in self.trunk.blocks:
            block.checkpointing = True
        if isinstance(self.vision.patches, DinoPatches):
            self.vision.patches.vit.activation_checkpointing_enable({"use_reentrant": False})

    def instruct(self, ids: Int[Tensor, "i l"], valid: Bool[Tensor, "i l"]) -> Instruction:
        """Encode distinct instructions; holds until the instruction changes."""
        return self.instruct_states(*self.language(ids, valid))

    def instruct_states(self, states: Float[Tensor, "i l d"], valid: Bool[Tensor, "i l"]) -> Instruction:
        """Do the same from token states that are there already."""
        states = states.to(self.dtype)
        mean = (states * valid[..., None]).sum(1) / valid.sum(1, keepdim=True)  # [i d]
        return Instruction(self._extend(states, valid, None), mean)

    def see(self, images: Tensor, c: Float[Tensor, "n d"]) -> Float[Tensor, "n q d"]:
        """Turn frames [n 3 h w] into tokens, given their instruction's mean; holds while a frame is in the window."""
        # float frames are normalised already: how reference inputs come
        read = self.vision.read if images.is_floating_point() else self.vision
        return read(images.to(c.dtype) if images.is_floating_point() else images, c)

    def observe(
        self, observation: Observation, instruction: Instruction, visual: Float[Tensor, "b tvq d"] | None = None
    ) -> Context:
        """Append an observation's tokens to its instruction's (both of batch b); visual: tokens seen already."""
        _, frames, views = observation.image_valid.shape
        tokens, valid = [], []
        if self.state is not None:
            state = observation.state * observation.state_valid[:, None]  # [b t s]
            tokens.append(self.state(state.to(self.dtype)))  # [b t d]
            # a repeated first frame repeats its state: it is real, the robot was there
            valid.append(observation.state_valid.any(1, keepdim=True).expand(-1, frames))
        if self.embodiment is not None:
            tokens.append(self.embodiment(observation.embodiment)[:, None])  # [b 1 d]
            valid.append(torch.ones_like(observation.image_valid[:, 0, :1]))
        if visual is None:
            c = instruction.mean.repeat_interleave(frames * views, dim=0)  # [btv d]
            b = len(observation.images)
            visual = self.see(observation.images.flatten(0, 2), c).unflatten(0, (b, frames * views)).flatten(1, 2)
        tokens.append(visual)  # [b tvq d]
        valid.append(observation.image_valid.flatten(1).repeat_interleave(self.vision.tokens, dim=1))
        prefix = self._extend(torch.cat(tokens, dim=1), torch.cat(valid, dim=1), instruction.prefix)
        return Context(prefix, prefix.length, None)

    def context(self, observation: Observation) -> Context:
        """Encode everything that depends on neither t nor the noise; equal instructions are encoded once."""
        ids, rows = torch.unique(observation.language, dim=0, return_inverse=True)  # [i l], [b]
        first = torch.stack([(rows == i).nonzero()[0, 0] for i in range(len(ids))])
        instruction = self.instruct(ids, observation.language_valid[first])
        return self.observe(observation, instruction.take(rows))

    def commit(
        self, context: Context, actions: Float[Tensor, "b m a"], valid: Bool[Tensor, "b m"], count: Int[Tensor, "b"]
    ) -> Context:
        """Append clean actions that are decided already, behind a timestep token of their own at t = 0.

        Only the first `count` of the m rows are there, and of them those that are valid (real steps); where count is 0
        the sequence stays the published one.
        """
        tau = self.time_tokens(torch.zeros_like(actions[:, :1, 0]))  # [b 1 d]
        tokens = torch.cat([tau.to(self.dtype), self._embed(actions)], dim=1)  # [b 1+m d]
        here = torch.arange(actions.shape[1], device=count.device) < count[:, None]  # [b m]
        seen = torch.cat([(count > 0)[:, None], here & valid], dim=1)  # [b 1+m]
        return Context(self._extend(tokens, seen, context.prefix), context.observed, count)

    def suffix(
        self, context: Context, slot_valid: Bool[Tensor, "b n"], k: int, room: bool = False, skip: int = 0
    ) -> Suffix:
        """Lay out k noise samples per context, packed: positions restart, samples do not see each other.

        slot_valid: False for slots past an episode's end; they are never attended to. room: reserve place for the
        suffix's keys and values, for a denoising loop without gradients. skip: leading slots that are committed in
        every row and left out; the n are those behind them.
        """
        n, device = slot_valid.shape[1], slot_valid.device
        slots = torch.arange(skip, skip + n, device=device)  # [n]
        positions = context.observed + torch.cat([slots.new_zeros(1), 1 + slots])  # [1+n]
        if context.committed is not None:
            # padding of the committed part has no position: tau(0) takes one, tau(t) comes behind its d actions
            d = context.committed[:, None]  # [b 1]
            slot_valid = slot_valid & (slots >= d)
            positions = positions + (d > 0).long()  # [b 1+n]
            positions = torch.cat([positions[:, :1] + d, positions[:, 1:]], dim=1)
        valid = torch.cat([torch.ones_like(slot_valid[:, :1]), slot_valid], dim=1).tile(k)  # [b k(1+n)]
        mask = block_mask(self._suffix_mask(n, device), k)
        layout = self.trunk.layout(positions.tile(k), valid, mask, context.prefix)
        return Suffix(context.prefix.with_room(k * (1 + n)) if room else context.prefix, layout)

    def time_tokens(self, t: Float[Tensor, "..."]) -> Float[Tensor, "... d"]:
        """Return the timestep tokens of times t in 0 .. num_train_timesteps; t = 0 is clean."""
        return timestep_embedding(t, self.config.dim)

    def denoise(
        self, x: Float[Tensor, "b k n a"], tau: Float[Tensor, "... d"], suffix: Suffix
    ) -> Float[Tensor, "b k n a"]:
        """Predict the target of k noise samples per context; tau: their timestep tokens, [b k d] or one for all."""
        b, k, n, _ = x.shape
        u = self._embed(x)  # [b k n d]
        tokens = torch.cat([tau.to(u.dtype).expand(b, k, -1)[:, :, None], u], dim=2).flatten(1, 2)  # [b k(1+n) d]
        hidden = self.trunk(tokens, suffix.layout, suffix.prefix)  # [b k(1+n) d]
        return self.head(hidden.unflatten(1, (k, 1 + n))[:, :, 1:])  # [b k n a]

    def _embed(self, x: Float[Tensor, "... a"]) -> Float[Tensor, "... d"]:
        x = x.to(self.dtype)
        return self.action(x) if self.action else nn.functional.pad(x, (0, self.config.dim - x.shape[-1]))

    def _extend(self, x: Float[Tensor, "b l d"], valid: Bool[Tensor, "b l"], prefix: Prefix | None) -> Prefix:
        """Append tokens causally, at the next positions."""
        positions = torch.arange(x.shape[1], device=x.device) + (prefix.length if prefix else 0)
        layout = self.trunk.layout(positions, valid, causal_mask(x.shape[1], x.device), prefix)
        return self.trunk.extend(x, layout, prefix)

    def _suffix_mask(self, n: int, device: torch.device) -> Bool[Tensor, "1+n 1+n"]:
        mask = causal_mask(1 + n, device)
        if self.config.action_attention == "bidirectional":
            mask[1:, 1:] = True
        return mask


def timestep_embedding(t: Float[Tensor, "..."], dim: int) -> Float[Tensor, "... d"]:
    """Return [sin(t w), cos(t w)] with w_j = 10000^(-j / (dim/2 - 1)): one token, no MLP."""
    half = dim // 2
    w = 10000.0 ** (-torch.arange(half, device=t.device, dtype=torch.float32) / (half - 1))
    angles = t.float()[..., None] * w
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
