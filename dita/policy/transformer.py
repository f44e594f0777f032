"""Pre-norm causal blocks with float positions and a key/value prefix (LLaMA style; Dita, arXiv 2503.19757, sec. 3).

Shape legend: b batch, l new tokens, p tokens already in the prefix, h heads, e head dim, d width.
Every stage of the policy (instruction, observation, denoising) is one call of `Trunk` on top of the previous stage's
keys and values: training, eager inference and the cached fast path are the same functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Prefix:
    """Keys and values of tokens already seen, one pair per layer, and which of them may be attended to."""

    keys: tuple[Float[Tensor, "b h p e"], ...]
    values: tuple[Float[Tensor, "b h p e"], ...]
    valid: Bool[Tensor, "b p"]

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


class RMSNorm(nn.Module):
    """Root-mean-square norm with a gain, computed in fp32 (eps 1e-6)."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), self.eps).to(x.dtype)


def rope_tables(
    positions: Float[Tensor, "l"], head_dim: int, base: float = 10000.0
) -> tuple[Float[Tensor, "l e"], Float[Tensor, "l e"]]:
    """Return cos and sin of rotary angles for float positions, in fp32 (arXiv 2104.09864, half-split layout)."""
    frequencies = base ** -(torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angles = positions.float()[..., None] * frequencies  # [l e/2]
    angles = torch.cat([angles, angles], dim=-1)  # [l e]
    return angles.cos(), angles.sin()


def rotate(x: Float[Tensor, "b h l e"], cos: Float[Tensor, "l e"], sin: Float[Tensor, "l e"]) -> Tensor:
    """Apply rotary positions."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return x * cos.to(x.dtype) + turned * sin.to(x.dtype)


class Block(nn.Module):
    """Attention and SwiGLU, pre-norm, no biases."""

    def __init__(self, dim: int, heads: int, ffn_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = RMSNorm(dim)
        self.q = nn.Linear(dim, dim, bias=False)
        self.k = nn.Linear(dim, dim, bias=False)
        self.v = nn.Linear(dim, dim, bias=False)
        self.o = nn.Linear(dim, dim, bias=False)
        self.ffn_norm = RMSNorm(dim)
        self.gate = nn.Linear(dim, ffn_dim, bias=False)
        self.up = nn.Linear(dim, ffn_dim, bias=False)
        self.down = nn.Linear(ffn_dim, dim, bias=False)

    def keys_values(self, y: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Project normed tokens y [b l d] to rotated keys and values [b h l e]."""
        return rotate(self._split(self.k(y)), cos, sin), self._split(self.v(y))

    def attend(self, x: Tensor, y: Tensor, cos: Tensor, sin: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Attend from l new tokens to p + l keys, then apply the feed-forward part: [b l d] -> [b l d]."""
        q = rotate(self._split(self.q(y)), cos, sin)  # [b h l e]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # [b h l e]
        x = x + self.o(out.transpose(1, 2).flatten(2))  # [b l d]
        y = self.ffn_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))  # [b l d]

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [b l d] -> [b h l e]


class Trunk(nn.Module):
    """A stack of blocks over [prefix; new tokens]; masks say True = may attend."""

    blocks: Sequence[Block]

    def __init__(self, dim: int, layers: int, heads: int, ffn_dim: int) -> None:
        super().__init__()
        self.head_dim = dim // heads
        self.blocks = nn.ModuleList(Block(dim, heads, ffn_dim) for _ in range(layers))  # pyright: ignore
        self.norm = RMSNorm(dim)

    def extend(
        self, x: Float[Tensor, "b l d"], valid: Bool[Tensor, "b l"], mask: Bool[Tensor, "l l"], prefix: Prefix | None
    ) -> Prefix:
        """Append new tokens to a prefix; only their keys and values are kept, so the last block stops there.

        mask: attention among the new tokens; the valid part of the prefix is visible to all of them.
        """
        positions = torch.arange(x.shape[1], device=x.device) + (prefix.length if prefix else 0)
        cos, sin = rope_tables(positions, self.head_dim)
        full = _full_mask(mask, valid, prefix)  # [b 1 l p+l]
        keys, values = [], []
        for i, block in enumerate(self.blocks):
            y = block.attention_norm(x)
            k, v = _join(prefix, i, *block.keys_values(y, cos, sin))
            keys.append(k)
            values.append(v)
            if i + 1 < len(self.blocks):
                x = block.attend(x, y, cos, sin, k, v, full)
        seen = valid if prefix is None else torch.cat([prefix.valid, valid], dim=1)
        return Prefix(tuple(keys), tuple(values), seen)

    def forward(
        self,
        x: Float[Tensor, "b l d"],
        positions: Float[Tensor, "l"],
        valid: Bool[Tensor, "b l"],
        mask: Bool[Tensor, "l l"],
        prefix: Prefix,
    ) -> Float[Tensor, "b l d"]:
        """Run new tokens on top of a prefix and return their final hidden states."""
        cos, sin = rope_tables(positions, self.head_dim)
        full = _full_mask(mask, valid, prefix)  # [b 1 l p+l]
        for i, block in enumerate(self.blocks):
            y = block.attention_norm(x)
            k, v = _join(prefix, i, *block.keys_values(y, cos, sin))
            x = block.attend(x, y, cos, sin, k, v, full)
        return self.norm(x)


def _join(prefix: Prefix | None, i: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    if prefix is None:
        return k, v
    return torch.cat([prefix.keys[i], k], dim=2), torch.cat([prefix.values[i], v], dim=2)


def _full_mask(mask: Tensor, valid: Tensor, prefix: Prefix | None) -> Bool[Tensor, "b 1 l m"]:
    new = mask[None] & valid[:, None, :]  # [b l l]
    # a padded query still attends to itself: a row with no key at all would be NaN and poison gradients
    new = new | torch.eye(mask.shape[0], dtype=torch.bool, device=mask.device)
    if prefix is None:
        return new[:, None]
    old = prefix.valid[:, None, :].expand(-1, mask.shape[0], -1)  # [b l p]
    return torch.cat([old, new], dim=2)[:, None]


def causal_mask(length: int, device: torch.device) -> Bool[Tensor, "l l"]:
    """Each token sees itself and the ones before it."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def block_mask(block: Bool[Tensor, "s s"], copies: int) -> Bool[Tensor, "ks ks"]:
    """Repeat one suffix's mask along the diagonal: packed suffixes do not see each other."""
    return torch.block_diag(*[block.float()] * copies).bool() if copies > 1 else block
