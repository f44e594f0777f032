"""Pre-norm blocks with float positions and a key/value prefix (LLaMA style; Dita, arXiv 2503.19757, sec. 3).

Shape legend: b batch, l new tokens, p tokens already in the prefix, m = p + l, h heads, e head dim, d width, f hidden.
Every stage of the policy (instruction, observation, denoising) is one call of `Trunk` on top of the previous stage's
keys and values: training, eager inference and the cached fast path are the same functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True, eq=False)
class Prefix:
    """Keys and values of tokens already seen, one pair per layer, and which of them may be attended to."""

    keys: tuple[Float[Tensor, "b h p e"], ...]
    values: tuple[Float[Tensor, "b h p e"], ...]
    valid: Bool[Tensor, "b p"]
    room: int = 0  # free places behind the p tokens, which each pass of that many new tokens overwrites

    @property
    def length(self) -> int:
        """Number of tokens p, padding included: the next position."""
        return self.valid.shape[1]

    def take(self, rows: Int[Tensor, "n"]) -> Prefix:
        """Repeat or reorder along the batch: one instruction's prefix for every window that uses it."""
        return Prefix(
            tuple(k.index_select(0, rows) for k in self.keys),
            tuple(v.index_select(0, rows) for v in self.values),
            self.valid.index_select(0, rows),
        )

    def with_room(self, tokens: int) -> Prefix:
        """Copy to buffers with room for `tokens` new ones, so that a loop over them allocates no keys and values."""
        pad = [0, 0, 0, tokens]
        keys, values = (tuple(F.pad(x, pad) for x in part) for part in (self.keys, self.values))
        return replace(self, keys=keys, values=values, room=tokens)


@dataclass(frozen=True, eq=False)
class Layout:
    """Where new tokens stand and what they see: made once, used by every pass over tokens of the same layout."""

    cos: Float[Tensor, "#b 1 l e"]
    sin: Float[Tensor, "#b 1 l e"]
    mask: Bool[Tensor, "b 1 l m"]  # True: may attend
    seen: Bool[Tensor, "b m"]  # what a later token may attend to


class RMSNorm(nn.Module):
    """Root-mean-square norm with a gain, computed in fp32 (eps 1e-6)."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), self.eps).to(x.dtype)


def rope_tables(
    positions: Float[Tensor, "... l"], head_dim: int, base: float = 10000.0
) -> tuple[Float[Tensor, "... l e"], Float[Tensor, "... l e"]]:
    """Return cos and sin of rotary angles for float positions, in fp32 (arXiv 2104.09864, half-split layout)."""
    frequencies = base ** -(torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angles = positions.float()[..., None] * frequencies  # [... l e/2]
    angles = torch.cat([angles, angles], dim=-1)  # [... l e]
    return angles.cos(), angles.sin()


def rotate(x: Float[Tensor, "b h l e"], layout: Layout) -> Float[Tensor, "b h l e"]:
    """Apply rotary positions."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return x * layout.cos.to(x.dtype) + turned * layout.sin.to(x.dtype)


class Block(nn.Module):
    """Attention and SwiGLU, pre-norm, no biases; q, k, v and gate, up are one product each."""

    def __init__(self, dim: int, heads: int, ffn_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = RMSNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.o = nn.Linear(dim, dim, bias=False)
        self.ffn_norm = RMSNorm(dim)
        self.gate_up = nn.Linear(dim, 2 * ffn_dim, bias=False)
        self.down = nn.Linear(ffn_dim, dim, bias=False)
        self.checkpointing = False  # recompute activations in the backward pass

    def forward(
        self, x: Float[Tensor, "b l d"], layout: Layout, prefix: Prefix | None, i: int, last: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run as block i; return its new hidden states [b l d] and all its keys and values [b h m e]."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self._run, x, layout, prefix, i, last, use_reentrant=False)  # pyright: ignore
        return self._run(x, layout, prefix, i, last)

    def _run(
        self, x: Tensor, layout: Layout, prefix: Prefix | None, i: int, last: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.project(x, layout)
        k, v = _join(prefix, i, k, v)
        return (x if last else self.attend(x, q, k, v, layout.mask)), k, v

    def project(self, x: Float[Tensor, "b l d"], layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        """Return rotated queries and keys, and values, each [b h l e]."""
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return rotate(q, layout), rotate(k, layout), v

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Float[Tensor, "b l d"]:
        """Attend from l new tokens to m keys, then apply the feed-forward part."""
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # [b h l e]
        x = x + self.o(out.transpose(1, 2).flatten(2))  # [b l d]
        gate, up = self.gate_up(self.ffn_norm(x)).chunk(2, dim=-1)  # [b l f]
        return x + self.down(F.silu(gate) * up)  # [b l d]


class Trunk(nn.Module):
    """A stack of blocks over [prefix; new tokens]; masks say True = may attend."""

    blocks: Sequence[Block]

    def __init__(self, dim: int, layers: int, heads: int, ffn_dim: int) -> None:
        super().__init__()
        self.head_dim = dim // heads
        self.blocks = nn.ModuleList(Block(dim, heads, ffn_dim) for _ in range(layers))  # pyright: ignore
        self.norm = RMSNorm(dim)

    def layout(
        self,
        positions: Float[Tensor, "*b l"],
        valid: Bool[Tensor, "b l"],
        mask: Bool[Tensor, "l l"],
        prefix: Prefix | None,
    ) -> Layout:
        """Lay out new tokens at float positions; mask: among themselves; the prefix's valid part is visible to all."""
        cos, sin = rope_tables(positions.reshape(-1, positions.shape[-1]), self.head_dim)  # [#b l e]
        # a padded query still attends to itself: a row with no key at all would be NaN and poison gradients
        new = (mask[None] & valid[:, None, :]) | torch.eye(mask.shape[0], dtype=torch.bool, device=mask.device)
        if prefix is None:
            return Layout(cos[:, None], sin[:, None], new[:, None], valid)
        old = prefix.valid[:, None, :].expand(-1, mask.shape[0], -1)  # [b l p]
        seen = torch.cat([prefix.valid, valid], dim=1)  # [b m]
        return Layout(cos[:, None], sin[:, None], torch.cat([old, new], dim=2)[:, None], seen)

    def extend(self, x: Float[Tensor, "b l d"], layout: Layout, prefix: Prefix | None) -> Prefix:
        """Append new tokens to a prefix; only their keys and values are kept, so the last block stops there."""
        keys, values = [], []
        for i, block in enumerate(self.blocks):
            x, k, v = block(x, layout, prefix, i, i + 1 == len(self.blocks))
            keys.append(k)
            values.append(v)
        return Prefix(tuple(keys), tuple(values), layout.seen)

    def forward(self, x: Float[Tensor, "b l d"], layout: Layout, prefix: Prefix | None) -> Float[Tensor, "b l d"]:
        """Run new tokens on top of a prefix and return their final hidden states."""
        for i, block in enumerate(self.blocks):
            x, _, _ = block(x, layout, prefix, i, False)
        return self.norm(x)


def _join(prefix: Prefix | None, i: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    if prefix is None:
        return k, v
    if not prefix.room:
        return torch.cat([prefix.keys[i], k], dim=2), torch.cat([prefix.values[i], v], dim=2)
    assert prefix.room == k.shape[2] and not torch.is_grad_enabled()
    prefix.keys[i][:, :, -prefix.room :] = k
    prefix.values[i][:, :, -prefix.room :] = v
    return prefix.keys[i], prefix.values[i]


def causal_mask(length: int, device: torch.device) -> Bool[Tensor, "l l"]:
    """Each token sees itself and the ones before it."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def block_mask(block: Bool[Tensor, "s s"], copies: int) -> Bool[Tensor, "ks ks"]:
    """Repeat one suffix's mask along the diagonal: packed suffixes do not see each other."""
    return torch.block_diag(*[block.float()] * copies).bool() if copies > 1 else block
