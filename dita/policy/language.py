"""Instruction -> token states.

`bytes` is a small encoder trained with the policy and needs no download; `transformers` is any text encoder, frozen
(CLIP ViT-L/14 in the paper), from a local folder or hub id.
Shape legend: b instructions, l tokens, d width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dita.config import LanguageConfig
from dita.policy.transformer import Block, Layout, rope_tables

BYTES_PER_TOKEN = 4
Tokenize = Callable[[str], tuple[Int[np.ndarray, "l"], Bool[np.ndarray, "l"]]]


def tokenizer(config: LanguageConfig) -> Tokenize:
    """Return the function instruction -> (ids, valid), both of the config's fixed length.

    Raises:
        ValueError: from the function, if the instruction does not fit: it is never cut silently.
    """
    return _tokenize_bytes(config) if config.kind == "bytes" else _tokenize_pretrained(config)


def _tokenize_bytes(config: LanguageConfig) -> Tokenize:
    length = config.max_tokens * BYTES_PER_TOKEN

    def tokenize(instruction: str) -> tuple[np.ndarray, np.ndarray]:
        data = np.frombuffer(instruction.encode(), np.uint8)
        if not 0 < len(data) <= length:
            raise ValueError(f"instruction has {len(data)} bytes, the policy takes 1..{length}: {instruction[:60]!r}")
        ids = np.zeros(length, np.int64)
        ids[: len(data)] = data.astype(np.int64) + 1  # 0 is padding
        return ids, ids > 0

    return tokenize


def _tokenize_pretrained(config: LanguageConfig) -> Tokenize:
    from transformers import AutoTokenizer

    try:
        encode = AutoTokenizer.from_pretrained(_source(config))
    except (OSError, ValueError) as e:
        raise _no_text_encoder(config, e) from None

    def tokenize(instruction: str) -> tuple[np.ndarray, np.ndarray]:
        ids = encode(instruction, padding="max_length", max_length=config.max_tokens)["input_ids"]
        if len(ids) > config.max_tokens:
            raise ValueError(
                f"instruction has {len(ids)} tokens, the policy takes {config.max_tokens}: {instruction!r}"
            )
        # all positions are used, padding included: what the published model was trained with
        return np.asarray(ids, np.int64), np.ones(config.max_tokens, bool)

    return tokenize


class ByteEncoder(nn.Module):
    """Bytes, four to a token, one or more bidirectional blocks: [b 4l] -> [b l d]."""

    blocks: Sequence[Block]

    def __init__(self, config: LanguageConfig, dim: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(257, dim // BYTES_PER_TOKEN)
        self.blocks = nn.ModuleList(  # pyright: ignore
            Block(dim, max(1, dim // 64), 2 * dim) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(
        self, ids: Int[Tensor, "b bytes"], valid: Bool[Tensor, "b bytes"]
    ) -> tuple[Float[Tensor, "b l d"], Bool[Tensor, "b l"]]:
        x = self.embed(ids.where(valid, 0)).unflatten(1, (-1, BYTES_PER_TOKEN)).flatten(2)  # [b l d]
        valid = valid.unflatten(1, (-1, BYTES_PER_TOKEN)).any(-1)  # [b l]
        cos, sin = rope_tables(torch.arange(x.shape[1], device=x.device), x.shape[2] // self.blocks[0].heads)
        mask = valid[:, None, None, :] | torch.eye(x.shape[1], dtype=torch.bool, device=x.device)  # [b 1 l l]
        layout = Layout(cos, sin, mask, valid)
        for block in self.blocks:
            x = block.attend(x, *block.project(x, layout), mask)
        return self.norm(x), valid


class PretrainedEncoder(nn.Module):
    """A frozen transformers text encoder; token states of each distinct instruction are computed once.

    Its weights stay in their own folder, not in our checkpoint, and are loaded for the first instruction.
    """

    def __init__(self, config: LanguageConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self._cache: dict[bytes, Tensor] = {}
        self._loaded: tuple[nn.Module, ...] = ()  # a tuple hides the module from state_dict
        self.project = nn.Identity()
        if config.pretrained is None:  # an imported policy: the folder is asked for when an instruction comes
            return
        from transformers import AutoConfig

        try:
            found = AutoConfig.from_pretrained(_source(config))
        except (OSError, ValueError) as e:
            raise _no_text_encoder(config, e) from None
        width: int = getattr(found, "text_config", found).hidden_size
        if width != dim:
            self.project = nn.Linear(width, dim)

    def load(self) -> None:
        """Load the weights now, rather than with the first instruction.

        Raises:
            ValueError: there are none.
        """
        if self._loaded:
            return
        from transformers import AutoConfig, AutoModel, CLIPTextModel

        try:
            kind = AutoConfig.from_pretrained(_source(self.config)).model_type
            cls = CLIPTextModel if kind in ("clip", "clip_text_model") else AutoModel
            self._loaded = (cls.from_pretrained(_source(self.config)).eval().requires_grad_(False),)
        except (OSError, ValueError) as e:
            raise e if self.config.pretrained is None else _no_text_encoder(self.config, e) from None

    def unload(self) -> None:
        """Free the weights; the states of instructions seen so far stay."""
        self._loaded = ()

    def forward(self, ids: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        states = torch.stack([self._states(row) for row in ids])  # [b l w]
        dtype = next((p.dtype for p in self.project.parameters()), states.dtype)
        return self.project(states.to(ids.device, dtype)), valid

    @torch.no_grad()
    def _states(self, row: Int[Tensor, "l"]) -> Float[Tensor, "l w"]:
        key = row.cpu().numpy().tobytes()
        if key not in self._cache:
            self.load()
            self._cache[key] = self._loaded[0](row[None].cpu()).last_hidden_state[0]
        return self._cache[key]


def text_encoder(config: LanguageConfig, dim: int) -> nn.Module:
    """Build the encoder: (ids, valid) -> (token states [b l d], token valid [b l])."""
    return ByteEncoder(config, dim) if config.kind == "bytes" else PretrainedEncoder(config, dim)


def _source(config: LanguageConfig) -> str:
    if config.pretrained is None:
        raise ValueError("policy.language.kind=transformers needs policy.language.pretrained=FOLDER or a hub id")
    return config.pretrained


def _no_text_encoder(config: LanguageConfig, error: Exception) -> ValueError:
    reason = str(error).splitlines()[0]
    return ValueError(
        f"no text encoder at {config.pretrained!r} ({reason}); give policy.language.pretrained a folder that holds "
        "config.json, the tokenizer and model.safetensors, e.g. a downloaded openai/clip-vit-large-patch14"
    )
