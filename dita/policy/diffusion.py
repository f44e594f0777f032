"""The objective, apart from any network: schedules, noising, masked loss, the DDIM loop.

Schedules come from diffusers once and live in the checkpoint, so that inference imports neither diffusers nor
transformers. t = 0 is (nearly) clean.
Shape legend: b batch, k noise samples per context, n action slots, a padded action dims.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dita.config import DiffusionConfig

Predict = Callable[[Float[Tensor, "b k n a"], Int[Tensor, "b k"]], Float[Tensor, "b k n a"]]


class Diffusion(nn.Module):
    """DDPM training and DDIM sampling (arXiv 2006.11239, 2010.02502), eta 0; or plain regression as the baseline."""

    alphas_cumprod: Tensor

    def __init__(self, config: DiffusionConfig, alphas_cumprod: Float[Tensor, "t"] | None = None) -> None:
        super().__init__()
        self.config = config
        table = train_schedule(config) if alphas_cumprod is None else alphas_cumprod
        self.register_buffer("alphas_cumprod", table)

    def loss(
        self,
        predict: Predict,
        actions: Float[Tensor, "b n a"],
        valid: Bool[Tensor, "b n a"],
        samples: int,
        generator: torch.Generator,
    ) -> Float[Tensor, ""]:
        """Return the mean squared error over valid slots and dims, `samples` noise draws per context.

        predict gets actions that are zero wherever `valid` is False.
        """
        x0 = actions[:, None].expand(-1, samples, -1, -1)  # [b k n a]
        mask = valid[:, None].expand_as(x0)  # [b k n a]
        if self.config.objective == "behaviour_cloning":
            x0, mask = x0[:, :1], mask[:, :1]
            t = torch.zeros(x0.shape[:2], dtype=torch.long, device=x0.device)
            return masked_mse(predict(torch.zeros_like(x0), t), x0, mask)
        t = torch.randint(self.config.num_train_timesteps, x0.shape[:2], generator=generator).to(x0.device)  # [b k]
        noise = torch.randn(x0.shape, generator=generator).to(x0.device)  # [b k n a]
        noisy = self.add_noise(x0, noise, t) * mask
        return masked_mse(predict(noisy, t), self.target(x0, noise, t), mask)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Int[Tensor, "b k"]) -> Tensor:
        """Return x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise."""
        signal, spread = self._coefficients(t)
        return signal * x0 + spread * noise

    def target(self, x0: Tensor, noise: Tensor, t: Int[Tensor, "b k"]) -> Tensor:
        """Return what the network predicts: the noise, x0, or v = sqrt(abar) noise - sqrt(1 - abar) x0."""
        if self.config.prediction_type == "epsilon":
            return noise
        if self.config.prediction_type == "sample":
            return x0
        signal, spread = self._coefficients(t)
        return signal * noise - spread * x0

    @torch.no_grad()
    def sample(
        self, predict: Predict, noise: Float[Tensor, "b k n a"], dim_valid: Bool[Tensor, "b a"], steps: int
    ) -> Float[Tensor, "b k n a"]:
        """Denoise from `noise` in `steps` DDIM steps; padded dims are held at zero at every step.

        Raises:
            ValueError: steps is not in 1..num_train_timesteps.
        """
        mask = dim_valid[:, None, None]  # [b 1 1 a]
        if self.config.objective == "behaviour_cloning":
            return predict(torch.zeros_like(noise), torch.zeros_like(noise[..., 0, 0], dtype=torch.long)) * mask
        x = noise * mask
        for t, abar, abar_next in self.steps(steps):
            out = predict(x, torch.full(x.shape[:2], t, device=x.device)) * mask
            x = self.ddim_step(out, x, abar, abar_next)
        return x

    def steps(self, count: int) -> list[tuple[int, float, float]]:
        """Return (t, abar_t, abar of the next t) for each step; diffusers' leading or trailing spacing."""
        total = self.config.num_train_timesteps
        if not 1 <= count <= total:
            raise ValueError(f"num_inference_steps must be in 1..{total}, got {count}")
        ratio = total // count
        if self.config.timestep_spacing == "leading":
            times = np.arange(count)[::-1] * ratio
        else:
            times = np.round(np.arange(total, 0, -total / count)).astype(int) - 1
        table = self.alphas_cumprod.tolist()
        return [(int(t), table[t], table[t - ratio] if t >= ratio else 1.0) for t in times]

    def ddim_step(self, out: Tensor, x: Tensor, abar: float, abar_next: float) -> Tensor:
        """One deterministic DDIM step from the network's output at x (diffusers' DDIMScheduler.step, eta 0)."""
        signal, spread = abar**0.5, (1 - abar) ** 0.5
        if self.config.prediction_type == "epsilon":
            x0, noise = (x - spread * out) / signal, out
        elif self.config.prediction_type == "sample":
            x0, noise = out, (x - signal * out) / spread
        else:
            x0, noise = signal * x - spread * out, signal * out + spread * x
        if self.config.clip_sample is not None:
            x0 = x0.clamp(-self.config.clip_sample, self.config.clip_sample)
        return abar_next**0.5 * x0 + (1 - abar_next) ** 0.5 * noise

    def _coefficients(self, t: Int[Tensor, "b k"]) -> tuple[Tensor, Tensor]:
        abar = self.alphas_cumprod[t][..., None, None]  # [b k 1 1]
        return abar.sqrt(), (1 - abar).sqrt()


def train_schedule(config: DiffusionConfig) -> Float[Tensor, "t"]:
    """Return abar_t of the training schedule, from diffusers."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    scheduler = DDIMScheduler(
        num_train_timesteps=config.num_train_timesteps,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule=config.beta_schedule,
        rescale_betas_zero_snr=config.zero_terminal_snr,
    )
    return scheduler.alphas_cumprod.clone()


def masked_mse(prediction: Tensor, target: Tensor, mask: Bool[Tensor, "..."]) -> Float[Tensor, ""]:
    """Mean squared error over the True entries of a mask."""
    return ((prediction.float() - target.float()) ** 2 * mask).sum() / mask.sum().clamp(min=1)
