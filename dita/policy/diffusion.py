"""The objective, apart from any network: schedules, noising, masked loss, the denoising loop.

Schedules come from diffusers once and live in the checkpoint, so that inference imports neither diffusers nor
transformers. t = 0 is (nearly) clean. Every objective mixes x_t = signal * x0 + spread * noise: DDPM (arXiv 2006.11239)
with signal^2 = abar_t; flow matching (arXiv 2210.02747) with signal = 1 - s, spread = s, t = s N.
Shape legend: b batch, k noise samples per context, n action slots, a padded action dims, S steps, N train timesteps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dita.config import DiffusionConfig

Predict = Callable[[Float[Tensor, "b k n a"], Float[Tensor, "b k"]], Float[Tensor, "b k n a"]]
PredictAt = Callable[[Float[Tensor, "b k n a"], int], Float[Tensor, "b k n a"]]


@dataclass(frozen=True, eq=False)
class Plan:
    """The steps of a sampler as tensors on the device: made once, so that the loop neither waits nor looks anything up.

    Step i reads x at (signal, spread) and leaves it at the next ones.
    """

    times: Float[Tensor, "S"]  # t, in 0..N
    signal: tuple[Float[Tensor, ""], ...]
    spread: tuple[Float[Tensor, ""], ...]
    next_signal: tuple[Float[Tensor, ""], ...]
    next_spread: tuple[Float[Tensor, ""], ...]
    # DPM-Solver++: x <- keep x + take (x0 + back (x0 - x0 of the step before)); empty for DDIM
    keep: tuple[Float[Tensor, ""], ...] = ()
    take: tuple[Float[Tensor, ""], ...] = ()
    back: tuple[Float[Tensor, ""], ...] = ()


@dataclass(frozen=True, eq=False)
class Known:
    """Slots whose value is decided, for a network that was not trained with a committed prefix.

    Before each step they are noised to its level with noise of their own (RePaint, arXiv 2201.09865): approximate, and
    one fixed noise instead of a fresh one would be worse.
    """

    values: Float[Tensor, "b n a"]
    mask: Bool[Tensor, "b n"]
    noise: Float[Tensor, "S b n a"]


class Diffusion(nn.Module):
    """DDPM training with DDIM or DPM-Solver++ sampling, flow matching with Euler steps, or plain regression."""

    alphas_cumprod: Tensor

    def __init__(self, config: DiffusionConfig, alphas_cumprod: Float[Tensor, "t"] | None = None) -> None:
        super().__init__()
        self.config = config
        table = train_schedule(config) if alphas_cumprod is None else alphas_cumprod
        self.register_buffer("alphas_cumprod", table)

    def errors(
        self,
        predict: Predict,
        actions: Float[Tensor, "b n a"],
        valid: Bool[Tensor, "b n a"],
        t: Float[Tensor, "b k"],
        noise: Float[Tensor, "b k n a"],
    ) -> Float[Tensor, "b"]:
        """Return each window's sum of squared errors over valid slots and dims and all k noise samples.

        predict gets actions that are zero wherever `valid` is False.
        """
        x0 = actions[:, None].expand(-1, t.shape[1], -1, -1)  # [b k n a]
        mask = valid[:, None].expand_as(x0)  # [b k n a]
        if self.config.objective == "behaviour_cloning":
            out, target = predict(torch.zeros_like(x0), t), x0
        else:
            out, target = predict(self.add_noise(x0, noise, t) * mask, t), self.target(x0, noise, t)
        return ((out.float() - target.float()) ** 2 * mask).flatten(1).sum(1)

    def draw_times(self, shape: tuple[int, int], generator: torch.Generator) -> Float[Tensor, "b k"]:
        """Draw training times: uniform, whole numbers for diffusion and real ones for flow matching."""
        count = self.config.num_train_timesteps
        if self.config.objective == "flow":
            return torch.rand(shape, generator=generator) * count
        return torch.randint(count, shape, generator=generator).float()

    def add_noise(self, x0: Tensor, noise: Tensor, t: Float[Tensor, "b k"]) -> Tensor:
        """Return x_t = signal x0 + spread noise."""
        signal, spread = self._mix(t)
        return signal * x0 + spread * noise

    def target(self, x0: Tensor, noise: Tensor, t: Float[Tensor, "b k"]) -> Tensor:
        """Return what the network predicts: the noise, x0, v = signal noise - spread x0, or velocity = noise - x0."""
        kind = self.config.prediction_type
        if kind == "epsilon":
            return noise
        if kind == "sample":
            return x0
        if kind == "velocity":
            return noise - x0
        signal, spread = self._mix(t)
        return signal * noise - spread * x0

    def plan(self, steps: int, device: torch.device | str = "cpu") -> Plan:
        """Make the steps of the config's solver, as tensors on `device`.

        Raises:
            ValueError: steps is not in 1..num_train_timesteps.
        """
        total = self.config.num_train_timesteps
        if not 1 <= steps <= total:
            raise ValueError(f"num_inference_steps must be in 1..{total}, got {steps}")
        if self.config.objective == "behaviour_cloning":
            times, here, there = np.zeros(1), np.ones(1), np.ones(1)
        elif self.config.objective == "flow":
            s = np.linspace(1, 0, steps + 1)
            times, here, there = s[:-1] * total, 1 - s[:-1], 1 - s[1:]
        else:
            times, here, there = self._diffusion_steps(steps)
        spread = _line if self.config.objective == "flow" else _circle
        rows = {"signal": here, "spread": spread(here), "next_signal": there, "next_spread": spread(there)}
        if self.config.solver == "dpm_solver++":
            rows |= _multistep(*rows.values())
        table = {name: torch.tensor(row, dtype=torch.float32, device=device).unbind() for name, row in rows.items()}
        return Plan(torch.tensor(times, dtype=torch.float32, device=device), **table)

    @torch.no_grad()
    def sample(
        self,
        predict: PredictAt,
        noise: Float[Tensor, "b k n a"],
        dim_valid: Bool[Tensor, "b a"],
        plan: Plan,
        known: Known | None = None,
        trace: list[Tensor] | None = None,
    ) -> Float[Tensor, "b k n a"]:
        """Denoise from `noise`; padded dims are held at zero at every step.

        predict: the network at x and step i of the plan. trace: gets the network's output of each step.
        """
        mask = dim_valid[:, None, None]  # [b 1 1 a]
        x, before = noise * mask, None
        for i in range(len(plan.times)):
            if known is not None:
                renoised = plan.signal[i] * known.values + plan.spread[i] * known.noise[i]  # [b n a]
                x = torch.where(known.mask[:, None, :, None], renoised[:, None], x) * mask
            if self.config.objective == "behaviour_cloning":
                x = torch.zeros_like(x)
            out = predict(x, i).float() * mask  # [b k n a]
            if trace is not None:
                trace.append(out)
            x, before = self.step(out, x, plan, i, before)
        return x

    def step(self, out: Tensor, x: Tensor, plan: Plan, i: int, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """Take step i from the network's output at x: (x at the next level, x0), deterministic (eta 0).

        diffusers' DDIMScheduler.step (arXiv 2010.02502; one Euler step for a flow), or DPMSolverMultistepScheduler's of
        order 2 (arXiv 2211.01095), given the x0 of the step before.
        """
        signal, spread, kind = plan.signal[i], plan.spread[i], self.config.prediction_type
        if self.config.objective == "behaviour_cloning":
            return out, out
        if kind == "epsilon":
            x0, noise = (x - spread * out) / signal, out
        elif kind == "sample":
            x0, noise = out, (x - signal * out) / spread
        elif kind == "velocity":
            x0, noise = x - spread * out, x + signal * out
        else:
            x0, noise = signal * x - spread * out, signal * out + spread * x
        if self.config.clip_sample is not None:
            x0 = x0.clamp(-self.config.clip_sample, self.config.clip_sample)
        if not plan.keep:
            return plan.next_signal[i] * x0 + plan.next_spread[i] * noise, x0
        towards = x0 if before is None else x0 + plan.back[i] * (x0 - before)
        return plan.keep[i] * x + plan.take[i] * towards, x0

    def _diffusion_steps(self, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the times of the steps and sqrt(abar) at each and after each; diffusers' spacings."""
        total, multistep = self.config.num_train_timesteps, self.config.solver == "dpm_solver++"
        stride = total // count
        if self.config.timestep_spacing == "trailing":
            times = np.round(np.arange(total, 0, -total / count)).astype(int) - 1
        elif multistep:  # diffusers divides by one more here, and leaves the clean end out
            times = np.arange(1, count + 1)[::-1] * (total // (count + 1))
        else:
            times = np.arange(count)[::-1] * stride
        signal = np.sqrt(np.append(self.alphas_cumprod.double().cpu().numpy(), 1.0))  # the last: clean
        after = np.append(times[1:], total) if multistep else np.where(times >= stride, times - stride, total)
        return times, signal[times], signal[after]

    def _mix(self, t: Float[Tensor, "b k"]) -> tuple[Tensor, Tensor]:
        if self.config.objective == "flow":
            s = (t / self.config.num_train_timesteps)[..., None, None]  # [b k 1 1]
            return 1 - s, s
        abar = self.alphas_cumprod[t.long()][..., None, None]  # [b k 1 1]
        return abar.sqrt(), (1 - abar).sqrt()


def _line(signal: np.ndarray) -> np.ndarray:
    return 1 - signal


def _circle(signal: np.ndarray) -> np.ndarray:
    return np.sqrt(1 - signal**2)


def _multistep(
    signal: np.ndarray, spread: np.ndarray, next_signal: np.ndarray, next_spread: np.ndarray
) -> dict[str, np.ndarray]:
    """Return the coefficients of DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2)."""
    with np.errstate(divide="ignore"):  # infinite at pure noise and at the clean end
        h = np.log(next_signal / signal) - np.log(next_spread / spread)
    back = np.zeros_like(h)
    back[1:-1] = (
        0.5 * h[1:-1] / h[:-2]
    )  # the first step has no x0 before it; the last one, to the clean end, needs none
    return {"keep": next_spread / spread, "take": next_signal * (1 - np.exp(-h)), "back": back}


def train_schedule(config: DiffusionConfig) -> Float[Tensor, "t"]:
    """Return abar_t of the training schedule, from diffusers; empty for objectives without one."""
    if config.objective == "flow":
        return torch.empty(0)
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    scheduler = DDIMScheduler(
        num_train_timesteps=config.num_train_timesteps,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule=config.beta_schedule,
        rescale_betas_zero_snr=config.zero_terminal_snr,
    )
    return scheduler.alphas_cumprod.clone()
