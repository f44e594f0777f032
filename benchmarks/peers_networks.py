"""Networks that stand in for `DitaModel` inside a `DitaPolicy`: the same encoder below, another head above.

They have its stages (context, suffix, denoise), so that loss, sampling, training loop, checkpoints and rollouts are the
same functions. Shape legend: b batch, k noise samples of one observation, t frames, v views, q visual tokens, n action
slots, a padded action dims, s padded state dims, d width, c channels, g conditioning width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dita.batch import Observation
from dita.checkpoint import find_policy, load_tensors, read_json, verify_folder
from dita.config import DiffusionConfig, PolicyConfig, from_dict
from dita.policy.model import Context, DitaModel, Instruction, timestep_embedding
from dita.policy.policy import DitaPolicy
from dita.preprocess import Contract

TOKEN_FEATURES = 16  # of each visual token, kept for the U-Net
CHANNELS = (64, 128, 256)  # a quarter of the published (256, 512, 1024): see UNet
KERNEL, GROUPS = 5, 8  # as published
STEP_DIM = 128  # of the timestep's embedding


class ConvBlock(nn.Sequential):
    """Convolution over the chunk, group norm, Mish: [b c n] -> [b c' n]."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__(nn.Conv1d(inner, outer, KERNEL, padding=KERNEL // 2), nn.GroupNorm(GROUPS, outer), nn.Mish())


class FilmBlock(nn.Module):
    """Two convolutions with a residual; the condition scales and shifts every channel between them (FiLM)."""

    def __init__(self, inner: int, outer: int, condition: int) -> None:
        super().__init__()
        self.first, self.second = ConvBlock(inner, outer), ConvBlock(outer, outer)
        self.film = nn.Sequential(nn.Mish(), nn.Linear(condition, 2 * outer))
        self.skip = nn.Conv1d(inner, outer, 1) if inner != outer else nn.Identity()

    def forward(self, x: Float[Tensor, "b c n"], g: Float[Tensor, "b g"]) -> Float[Tensor, "b c2 n"]:
        scale, shift = self.film(g)[..., None].chunk(2, dim=1)  # [b c2 1]
        return self.second(scale * self.first(x) + shift) + self.skip(x)


class UNet(nn.Module):
    """The conditional 1-D U-Net of Diffusion Policy (Chi et al. 2023, arXiv 2303.04137, sec. 3.1), written anew.

    Two FiLM blocks per level, halving the chunk between levels, two in the middle, and the way back up with skips. Its
    channels are a quarter of the published ones: 5.3 instead of 66.7 million parameters at 7 actions and width 128, and
    still more than the 1.9 million of the smallest Dita.
    """

    def __init__(self, actions: int, condition: int, channels: Sequence[int]) -> None:
        super().__init__()
        widths = [actions, *channels]
        g = condition + STEP_DIM
        self.step = nn.Sequential(nn.Linear(STEP_DIM, 4 * STEP_DIM), nn.Mish(), nn.Linear(4 * STEP_DIM, STEP_DIM))
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for i, (inner, outer) in enumerate(pairwise(widths)):
            last = i == len(channels) - 1
            half = nn.Identity() if last else nn.Conv1d(outer, outer, 3, stride=2, padding=1)
            self.down.append(nn.ModuleList([FilmBlock(inner, outer, g), FilmBlock(outer, outer, g), half]))
        deep = channels[-1]
        self.middle = nn.ModuleList([FilmBlock(deep, deep, g), FilmBlock(deep, deep, g)])
        for inner, outer in zip(reversed(channels[1:]), reversed(channels[:-1]), strict=True):
            double = nn.ConvTranspose1d(outer, outer, 4, stride=2, padding=1)
            self.up.append(nn.ModuleList([FilmBlock(2 * inner, outer, g), FilmBlock(outer, outer, g), double]))
        self.out = nn.Sequential(ConvBlock(channels[0], channels[0]), nn.Conv1d(channels[0], actions, 1))

    def forward(
        self, x: Float[Tensor, "b n a"], tau: Float[Tensor, "b e"], condition: Float[Tensor, "b f"]
    ) -> Float[Tensor, "b n a"]:
        """Predict the target for noisy chunks; tau: sines and cosines of their times."""
        g, x = torch.cat([condition, self.step(tau)], dim=-1), x.transpose(1, 2)  # [b g], [b a n]
        skips = []
        for first, second, half in self.down:  # pyright: ignore[reportGeneralTypeIssues]
            x = second(first(x, g), g)  # [b c n/2^i]
            skips.append(x)
            x = half(x)
        for block in self.middle:
            x = block(x, g)
        for first, second, double in self.up:  # pyright: ignore[reportGeneralTypeIssues]
            x = torch.cat([x, skips.pop()], dim=1)  # [b 2c n/2^i]
            x = double(second(first(x, g), g))
        return self.out(x).transpose(1, 2)


class UNetModel(nn.Module):
    """The encoder of `DitaModel` (instruction, state, visual tokens), and a U-Net instead of the trunk.

    Where the published policy gives the U-Net the spatial-softmax features of each frame, this one gives it a few
    features of each visual token; language enters through the tokens' FiLM and as its mean.
    """

    def __init__(self, config: PolicyConfig, embodiments: int) -> None:
        super().__init__()
        encoder = DitaModel(config, embodiments)
        self.config = config
        self.language, self.vision, self.state = encoder.language, encoder.vision, encoder.state
        tokens = config.n_obs_steps * config.cameras * config.vision.tokens
        halvings = 2 ** (len(CHANNELS) - 1)
        if self.action_slots % halvings or config.embodiment_token or config.max_committed_slots:
            raise ValueError(
                f"the U-Net peer needs action slots that divide by {halvings}, embodiment_token=false and "
                f"max_committed_slots=0; got {self.action_slots}, {config.embodiment_token} and "
                f"{config.max_committed_slots}"
            )
        states = config.n_obs_steps * config.dim if config.state_tokens else 0
        self.reduce = nn.Linear(config.dim, TOKEN_FEATURES)
        self.condition = nn.Linear(config.dim + states + tokens * TOKEN_FEATURES, 2 * config.dim)
        self.unet = UNet(config.action_dim, 2 * config.dim, CHANNELS)

    @property
    def action_slots(self) -> int:
        """Denoised slots n."""
        return self.config.past_action_slots + self.config.chunk_size

    def time_tokens(self, t: Float[Tensor, "..."]) -> Float[Tensor, "... e"]:
        """Return sines and cosines of times t."""
        return timestep_embedding(t, STEP_DIM)

    def context(self, observation: Observation) -> Float[Tensor, "b f"]:
        """Encode all that is decided before denoising."""
        words, valid = self.language(observation.language, observation.language_valid)  # [b l d], [b l]
        mean = (words * valid[..., None]).sum(1) / valid.sum(1, keepdim=True)  # [b d]
        features = [mean]
        if self.state is not None:
            features.append(self.state(observation.state * observation.state_valid[:, None]).flatten(1))  # [b td]
        b, t, v = observation.image_valid.shape
        tokens = self.vision(observation.images.flatten(0, 2), mean.repeat_interleave(t * v, dim=0))  # [btv q d]
        tokens = self.reduce(tokens).unflatten(0, (b, t * v))  # [b tv q 16]
        tokens = tokens * observation.image_valid.flatten(1)[..., None, None]
        return self.condition(torch.cat([*features, tokens.flatten(1)], dim=-1))

    def suffix(
        self, context: Tensor, slot_valid: Bool[Tensor, "b n"], k: int, room: bool = False, skip: int = 0
    ) -> Float[Tensor, "b f"]:
        """Return the condition: there is no sequence to lay out."""
        assert skip == 0
        return context

    def denoise(
        self, x: Float[Tensor, "b k n a"], tau: Float[Tensor, "... e"], suffix: Float[Tensor, "b f"]
    ) -> Float[Tensor, "b k n a"]:
        """Predict the target of k noise samples per context."""
        b, k, _, _ = x.shape
        condition = suffix[:, None].expand(b, k, -1).flatten(0, 1)  # [bk f]
        out = self.unet(x.flatten(0, 1), tau.expand(b, k, -1).flatten(0, 1), condition)  # [bk n a]
        return out.unflatten(0, (b, k))


class StateModel(DitaModel):
    """`DitaModel` without eyes: the sequence is instruction, states, timestep and actions."""

    def __init__(self, config: PolicyConfig, embodiments: int) -> None:
        super().__init__(config, embodiments)
        self.vision = _Blind()  # pyright: ignore[reportAttributeAccessIssue]

    def observe(
        self, observation: Observation, instruction: Instruction, visual: Float[Tensor, "b 0 d"] | None = None
    ) -> Context:
        """Append an observation's states to its instruction."""
        none = torch.zeros(
            observation.batch_size, 0, self.config.dim, dtype=self.dtype, device=observation.state.device
        )
        return super().observe(observation, instruction, none)


class _Blind(nn.Module):
    tokens = 0
    patches = None


Network = Callable[[PolicyConfig, int], nn.Module]
# what replaces the network of a policy; "dita" is its own
NETWORKS: dict[str, Network] = {"dita": DitaModel, "unet": UNetModel, "state": StateModel}


def replace_network(policy: DitaPolicy, network: str) -> DitaPolicy:
    """Give a policy another network, freshly initialised; everything else stays as it is."""
    if network != "dita":
        model = NETWORKS[network](policy.config, len(policy.contract.specs))
        policy.model = model.to(policy.device)  # pyright: ignore[reportAttributeAccessIssue]
    return policy


def load_peer(folder: Path, network: str) -> DitaPolicy:
    """Load a policy whose network is one of NETWORKS, as `DitaPolicy.from_pretrained` loads Dita.

    Raises:
        FileNotFoundError: there is no policy there.
        ValueError: a file does not fit its manifest.
    """
    at = find_policy(folder)
    verify_folder(at)
    config = read_json(at / "config.json")
    sizes = from_dict(PolicyConfig, config["policy"], f"{at}/config.json: policy")
    objective = from_dict(DiffusionConfig, config["diffusion"], f"{at}/config.json: diffusion")
    contract = Contract.from_dict(read_json(at / "contract.json"))
    policy = replace_network(DitaPolicy(sizes, objective, contract), network)
    policy.load_state_dict(load_tensors(at / "model.safetensors"))
    return policy.eval()
