"""DitaPolicy: loss and sample on typed inputs, and `predict`, the one inference entry.

Shape legend: b batch, k noise samples or candidates, n action slots, A padded action dims.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from dita.batch import Batch, Observation
from dita.config import DiffusionConfig, PolicyConfig
from dita.policy.diffusion import Diffusion
from dita.policy.model import DitaModel
from dita.preprocess import Contract, Preprocessor
from dita.types import ActionChunk, EmbodimentSpec, RawObservation


class DitaPolicy(nn.Module):
    """A generalist diffusion policy over the embodiments of its contract; stateless between calls."""

    dim_valid: Tensor

    def __init__(
        self,
        config: PolicyConfig,
        diffusion: DiffusionConfig,
        contract: Contract,
        alphas_cumprod: Tensor | None = None,
    ) -> None:
        super().__init__()
        _check_clip(diffusion, contract)
        self.config = config
        self.contract = contract
        self.preprocessor = Preprocessor(contract)
        self.diffusion = Diffusion(diffusion, alphas_cumprod)
        self.model = DitaModel(config, embodiments=len(contract.specs))
        dims = np.stack([self.preprocessor.action_mask[name] for name in contract.specs])
        self.register_buffer("dim_valid", torch.from_numpy(dims), persistent=False)  # [embodiments A]

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str = "cpu") -> DitaPolicy:
        """Load a policy from a policy folder, a checkpoint or a run folder (its last checkpoint).

        Raises:
            FileNotFoundError: there is no policy there.
            ValueError: manifest, sizes, contract or tensors do not fit, or the device does not exist.
        """
        from dita.checkpoint import load_policy

        return load_policy(folder, device)

    @property
    def specs(self) -> Mapping[str, EmbodimentSpec]:
        """Embodiments this policy knows."""
        return self.contract.specs

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.head.weight.device

    def loss(self, batch: Batch, samples: int, generator: torch.Generator) -> Float[Tensor, ""]:
        """Return the training loss with `samples` noise draws per observation; invalid entries have no influence."""
        context = self.model.context(batch.observation)
        slot_valid = batch.action_valid.any(-1)  # [b n]
        return self.diffusion.loss(
            lambda x, t: self.model.denoise(x, t, context, slot_valid),
            batch.actions,
            batch.action_valid,
            samples,
            generator,
        )

    @torch.no_grad()
    def sample(self, observation: Observation, noise: Float[Tensor, "b k n A"], steps: int) -> Float[Tensor, "b k n A"]:
        """Denoise k candidates per observation; the prefix is encoded once."""
        context = self.model.context(observation)
        slot_valid = torch.ones(noise.shape[0], noise.shape[2], dtype=torch.bool, device=noise.device)
        return self.diffusion.sample(
            lambda x, t: self.model.denoise(x, t, context, slot_valid),
            noise,
            self.dim_valid[observation.embodiment],
            steps,
        )

    def predict(
        self,
        history: Sequence[RawObservation],
        *,
        seed: int,
        embodiment: str | None = None,
        num_inference_steps: int | None = None,
    ) -> ActionChunk:
        """Return the chunk for the last observation of a history (oldest first, spaced by obs_dt).

        Args:
            history: 1..n_obs_steps observations; a shorter history repeats its first frame, masked.
            seed: of the initial noise; the same seed gives the same chunk.
            embodiment: needed if the policy knows several.
            num_inference_steps: DDIM steps; None: the checkpoint's.

        Raises:
            ValueError: the history does not fit the contract, or the output is not finite.
        """
        return self.predict_batch([history], [seed], embodiment=embodiment, num_inference_steps=num_inference_steps)[0]

    def predict_batch(
        self,
        histories: Sequence[Sequence[RawObservation]],
        seeds: Sequence[int],
        *,
        embodiment: str | None = None,
        num_inference_steps: int | None = None,
        batch_size: int | None = None,
    ) -> list[ActionChunk]:
        """Return one chunk per history, each with its own seed.

        batch_size pads the batch to one fixed size: kernels round differently at other sizes, and contacts amplify it.
        """
        name = self._embodiment(embodiment)
        rows = len(histories)
        assert rows == len(seeds) and rows > 0
        size = batch_size or rows
        if rows > size:
            raise ValueError(f"{rows} histories do not fit into batch_size {size}")
        windows = [self.preprocessor.window(history, name) for history in histories]
        windows += [windows[0]] * (size - rows)
        observation = self.preprocessor.observe(windows).to(self.device)
        noise = torch.stack([self._noise(seed) for seed in [*seeds] + [0] * (size - rows)]).to(self.device)
        steps = num_inference_steps or self.diffusion.config.num_inference_steps
        was_training = self.training
        self.eval()
        actions = self.sample(observation, noise[:, None], steps)[:rows, 0].float().cpu().numpy()  # [b n A]
        self.train(was_training)
        chunks = actions[:, self.config.past_action_slots :]
        return [
            self.preprocessor.decode_actions(chunk, name, window.stamp)
            for chunk, window in zip(chunks, windows, strict=False)
        ]

    def _noise(self, seed: int) -> Float[Tensor, "n A"]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.model.action_slots, self.config.action_dim, generator=generator)

    def _embodiment(self, name: str | None) -> str:
        if name is None and len(self.specs) == 1:
            return next(iter(self.specs))
        if name is None:
            raise ValueError(f"the policy knows several embodiments, name one of {sorted(self.specs)}")
        if name not in self.specs:
            raise ValueError(f"embodiment {name!r} is not in the checkpoint; it knows {sorted(self.specs)}")
        return name


def _check_clip(diffusion: DiffusionConfig, contract: Contract) -> None:
    if contract.preprocess["normalization"] == "mean_std" and diffusion.clip_sample is not None:
        raise ValueError(
            f"diffusion.clip_sample={diffusion.clip_sample} cuts actions normalised by mean_std; set it to null, or "
            "use preprocess.normalization=min_max or q01_q99"
        )
