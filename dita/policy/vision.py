"""Images -> visual tokens. A tokenizer maps frames and the instruction's mean to a fixed number of tokens.

Shape legend: n frames, p patches, q visual tokens, d width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from dita.config import VisionConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PATCH = 14  # [px], of DINOv2


class CrossAttention(nn.Module):
    """Multi-head attention, no bias on q, k, v; bias on the output (the Q-Former's)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim, bias=False)
        self.k = nn.Linear(dim, dim, bias=False)
        self.v = nn.Linear(dim, dim, bias=False)
        self.o = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "n q d"], context: Float[Tensor, "n p d"]) -> Float[Tensor, "n q d"]:
        q, k, v = (
            project(t).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [n h . e]
            for project, t in ((self.q, x), (self.k, context), (self.v, context))
        )
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class QFormerLayer(nn.Module):
    """Self-attention, cross-attention to patches, MLP, then FiLM by the instruction (Dita, sec. 3.1)."""

    def __init__(self, dim: int, heads: int, film: bool) -> None:
        super().__init__()
        self.self_norm = nn.LayerNorm(dim)
        self.self_attention = CrossAttention(dim, heads)
        self.cross_norm = nn.LayerNorm(dim)
        self.cross_attention = CrossAttention(dim, heads)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.film_scale = nn.Linear(dim, dim) if film else None
        self.film_shift = nn.Linear(dim, dim) if film else None

    def forward(self, q: Tensor, patches: Tensor, c: Float[Tensor, "n d"]) -> Tensor:
        y = self.self_norm(q)
        q = q + self.self_attention(y, y)  # [n q d]
        q = q + self.cross_attention(self.cross_norm(q), patches)
        q = q + self.mlp(self.mlp_norm(q))
        if self.film_scale is None or self.film_shift is None:
            return q
        return (1 + self.film_scale(c)[:, None]) * q + self.film_shift(c)[:, None]


class QFormer(nn.Module):
    """Learned queries read a frame's patches: [n p d] -> [n q d]."""

    layers: Sequence[QFormerLayer]

    def __init__(self, dim: int, tokens: int, layers: int, heads: int, film: bool) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(tokens, dim) * 0.02)
        self.layers = nn.ModuleList(QFormerLayer(dim, heads, film) for _ in range(layers))  # pyright: ignore
        self.norm = nn.LayerNorm(dim)

    def forward(
        self, patches: Float[Tensor, "n p d"], c: Float[Tensor, "n d"], anchors: Float[Tensor, "n q d"] | None
    ) -> Float[Tensor, "n q d"]:
        q = self.queries.expand(patches.shape[0], -1, -1)
        if anchors is not None:
            q = q + anchors
        for layer in self.layers:
            q = layer(q, patches, c)
        return self.norm(q)

    def start_film_as_identity(self) -> None:
        """Zero the FiLM layers, so that training starts from an unmodulated Q-Former."""
        for layer in self.layers:
            for film in (layer.film_scale, layer.film_shift):
                if film is not None:
                    nn.init.zeros_(film.weight)
                    nn.init.zeros_(film.bias)


class ConvPatches(nn.Module):
    """A small convolutional stem, stride 8: what learns from a hundred episodes.

    Queries that start from nothing attend evenly to all patches, and find no object within the first hundreds of steps.
    So each query starts from its own cell of the picture (an anchor), and positions start at full strength.
    """

    def __init__(self, dim: int, channels: int, image_size: int, tokens: int) -> None:
        super().__init__()
        c, grid, side = channels, image_size // 8, math.isqrt(tokens)
        if side**2 != tokens or grid % side:
            raise ValueError(f"conv_qformer: vision.tokens {tokens} must be a square whose side divides {grid} patches")
        self.stem = nn.Conv2d(3, c // 2, 8, stride=4, padding=2)
        self.down = nn.Conv2d(c // 2, c, 3, stride=2, padding=1)
        self.mix = nn.Conv2d(c, c, 3, padding=1)
        self.norm = nn.GroupNorm(8, c)
        self.project = nn.Linear(c, dim)
        self.anchor = nn.Conv2d(c, dim, grid // side, stride=grid // side)
        self.positions = nn.Parameter(sincos_2d(grid, dim))

    def forward(self, x: Float[Tensor, "n 3 h w"]) -> tuple[Float[Tensor, "n p d"], Float[Tensor, "n q d"]]:
        x = F.gelu(self.stem(x.contiguous(memory_format=torch.channels_last)))  # [n c/2 h/4 w/4]
        x = F.gelu(self.down(x))  # [n c h/8 w/8]
        x = self.norm(x + F.gelu(self.mix(x)))  # [n c h/8 w/8]
        anchors = self.anchor(x).flatten(2).transpose(1, 2)  # [n q d]
        return self.project(x.flatten(2).transpose(1, 2)) + self.positions, anchors  # [n p d]


def sincos_2d(grid: int, dim: int) -> Float[Tensor, "p d"]:
    """Return sines and cosines of x and y over four turns and finer, one row per cell of a square grid."""
    w = 100.0 ** -(torch.arange(dim // 4) / (dim // 4))  # [d/4]
    turns = torch.linspace(0, 8 * math.pi, grid)
    y, x = (c.flatten()[:, None] * w for c in torch.meshgrid(turns, turns, indexing="ij"))  # [p d/4]
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)


class DinoPatches(nn.Module):
    """DINOv2 with registers through transformers; patch tokens after the final norm, CLS and registers dropped."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

        vit = Dinov2WithRegistersConfig(
            hidden_size=config.patch_dim,
            num_hidden_layers=config.vit_layers,
            num_attention_heads=config.vit_heads,
            mlp_ratio=4,
            patch_size=PATCH,
            image_size=config.image_size,
            num_register_tokens=4,
            qkv_bias=True,
            hidden_act="gelu",
            use_swiglu_ffn=False,
            layer_norm_eps=1e-6,
        )
        self.vit = Dinov2WithRegistersModel(vit)

    def load_pretrained(self, source: str) -> None:
        """Load DINOv2 weights from a local folder or hub id.

        Raises:
            ValueError: the folder does not hold them, or its names do not fit (missing ones are listed).
        """
        from transformers import Dinov2WithRegistersModel

        try:
            loaded, info = Dinov2WithRegistersModel.from_pretrained(source, output_loading_info=True)  # pyright: ignore
        except OSError as e:
            raise ValueError(
                f"no DINOv2 weights at {source!r} ({str(e).splitlines()[0]}); give policy.vision.pretrained the folder "
                "of a downloaded facebook/dinov2-with-registers-base"
            ) from None
        if info["missing_keys"]:
            raise ValueError(f"{source!r} lacks {sorted(info['missing_keys'])[:5]}: not a DINOv2 with registers")
        self.vit.load_state_dict(loaded.state_dict())

    def forward(self, x: Float[Tensor, "n 3 h w"]) -> tuple[Float[Tensor, "n p d"], None]:
        return self.vit(x).last_hidden_state[:, 5:], None


class VisualTokenizer(nn.Module):
    """uint8 frames and the instruction's mean -> visual tokens; the normalisation of pixels is its first op.

    `conv_qformer`: a small stem trained from scratch; `dinov2_qformer`: the paper's; `dinov2_patches`: every patch is a
    token, and the instruction meets the picture in the trunk only.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: VisionConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.patches: ConvPatches | DinoPatches = (
            ConvPatches(dim, config.patch_dim, config.image_size, config.tokens)
            if config.kind == "conv_qformer"
            else DinoPatches(config)
        )
        self.qformer, self.project = None, None
        if config.kind == "dinov2_patches":
            _check_patches(config)
            self.project = nn.Linear(config.patch_dim, dim)
        else:
            heads = config.qformer_heads or max(1, dim // 64)
            self.qformer = QFormer(dim, config.tokens, config.qformer_layers, heads, config.qformer_film)
        if config.kind == "dinov2_qformer" and config.patch_dim != dim:
            raise ValueError(f"vision.patch_dim {config.patch_dim} must equal policy.dim {dim} for {config.kind}")
        self.patches.requires_grad_(not config.frozen)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN, device="cpu")[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD, device="cpu")[:, None, None], persistent=False)

    @property
    def tokens(self) -> int:
        """Visual tokens q per frame."""
        return self.config.tokens

    def load_patches(self, source: str) -> None:
        """Load pretrained patch features; see `DinoPatches.load_pretrained`.

        Raises:
            ValueError: this tokenizer trains its own patches.
        """
        if not isinstance(self.patches, DinoPatches):
            raise ValueError(
                f"policy.vision.pretrained={source!r} needs vision.kind=dinov2_qformer or dinov2_patches, "
                f"got {self.config.kind}"
            )
        self.patches.load_pretrained(source)

    def start_as_identity(self) -> None:
        """Zero the FiLM layers, so that training starts from an unmodulated Q-Former."""
        if self.qformer is not None:
            self.qformer.start_film_as_identity()

    def forward(self, images: UInt8[Tensor, "n 3 h w"], c: Float[Tensor, "n d"]) -> Float[Tensor, "n q d"]:
        return self.read(((images.float() / 255 - self.mean) / self.std).to(c.dtype), c)

    def read(self, x: Float[Tensor, "n 3 h w"], c: Float[Tensor, "n d"]) -> Float[Tensor, "n q d"]:
        """Turn frames that are normalised already into tokens."""
        patches, anchors = self.patches(x)  # [n p d], [n q d]
        if self.qformer is not None:
            return self.qformer(patches, c, anchors)  # [n q d]
        assert self.project is not None
        return self.project(patches)  # [n q d]


def _check_patches(config: VisionConfig) -> None:
    patches = (config.image_size // PATCH) ** 2
    if config.image_size % PATCH or config.tokens != patches:
        raise ValueError(
            f"vision.kind=dinov2_patches makes (image_size / {PATCH})^2 tokens, {patches} for image_size "
            f"{config.image_size}; got tokens={config.tokens}"
        )
