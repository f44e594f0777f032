"""DitaPolicy: loss and sample on typed inputs, and `predict`, the one inference entry.

Shape legend: b batch, k noise samples or candidates, n action slots, m committed ones, a action dims, A padded ones,
S denoising steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dita.batch import Batch, Observation
from dita.config import DiffusionConfig, PolicyConfig
from dita.policy.diffusion import Diffusion, Known, Plan
from dita.policy.model import Context, DitaModel
from dita.preprocess import Contract, Preprocessor
from dita.types import ActionChunk, EmbodimentSpec, RawObservation, Window


@dataclass(frozen=True, eq=False)
class Committed:
    """Leading action slots whose value is decided, normalised."""

    values: Float[Tensor, "b n A"]  # zero behind the committed ones
    count: Int[Tensor, "b"]
    noise: Float[Tensor, "S b n A"]  # for policies that were not trained with a committed prefix

    def to(self, device: torch.device) -> Committed:
        """Move every tensor to `device`."""
        return Committed(self.values.to(device), self.count.to(device), self.noise.to(device))


@dataclass(frozen=True, eq=False)
class Draws:
    """The random part of a training loss, on the CPU, a row per window."""

    committed: Int[Tensor, "b"]  # leading action slots that are shown clean
    times: Float[Tensor, "b k"]
    noise: Float[Tensor, "b k n A"]
    unknown: Bool[Tensor, "b"]  # rows that are shown the unknown-embodiment token, which a new robot starts from

    def rows(self, part: slice) -> Draws:
        """Take some windows'."""
        return Draws(*(getattr(self, f.name)[part] for f in fields(Draws)))

    @staticmethod
    def join(parts: Sequence[Draws]) -> Draws:
        """Put windows together."""
        return Draws(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Draws)))


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
        dims = [self.preprocessor.action_mask[name] for name in contract.specs] or [np.ones(config.action_dim, bool)]
        self.register_buffer("dim_valid", torch.from_numpy(np.stack(dims)), persistent=False)  # [embodiments A]

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, device: str = "cpu", precision: Literal["fp32", "bf16"] = "fp32"
    ) -> DitaPolicy:
        """Load a policy from a policy folder, a checkpoint or a run folder (its last checkpoint).

        precision: of weights and hidden states in inference; sampling itself is always fp32.

        Raises:
            FileNotFoundError: there is no policy there.
            ValueError: manifest, sizes, contract or tensors do not fit, a weight is not finite, or the device does not
                exist.
        """
        from dita.checkpoint import load_policy

        return load_policy(folder, device, precision)

    @property
    def specs(self) -> Mapping[str, EmbodimentSpec]:
        """Embodiments this policy knows."""
        return self.contract.specs

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.dim_valid.device

    def loss(self, batch: Batch, samples: int, generator: torch.Generator) -> Float[Tensor, ""]:
        """Return the training loss with `samples` noise draws per observation; invalid entries have no influence.

        With max_committed_slots, half of the rows show a random number of their first actions clean; the loss is on the
        rest. Were every number as likely, the first actions would hardly be trained: they are free with few committed.
        """
        draws = self.draw(batch.actions.shape[0], samples, generator)
        counted = self.counted(batch, draws).sum() * draws.times.shape[1]
        return self(batch, draws).sum() / counted.clamp(min=1)

    def draw(self, rows: int, samples: int, generator: torch.Generator) -> Draws:
        """Draw what a loss needs for some windows: committed slots, times, noise."""
        if self.diffusion.config.objective == "behaviour_cloning":
            samples = 1  # there is no noise to draw
        most, slots = self.config.max_committed_slots, self.model.action_slots
        committed = torch.zeros(rows).long()
        if most:  # none in every second row
            committed = torch.randint(-most, most + 1, (rows,), generator=generator).clamp(min=0)
        times = self.diffusion.draw_times((rows, samples), generator)
        noise = torch.randn(rows, samples, slots, self.config.action_dim, generator=generator)
        dropout = self.config.embodiment_dropout if self.training else 0.0
        unknown = torch.rand(rows, generator=generator) < dropout if dropout else torch.zeros(rows).bool()
        return Draws(committed, times, noise, unknown)

    def counted(self, batch: Batch, draws: Draws) -> Int[Tensor, "b"]:
        """Return how many action elements of each window carry loss."""
        return self._carries_loss(batch, draws).flatten(1).sum(1)

    def forward(self, batch: Batch, draws: Draws) -> Float[Tensor, "b"]:
        """Return each window's squared errors, summed over what carries loss and all noise samples.

        The one entry of training: FSDP gathers and frees weights around it.
        """
        known = batch.observation.embodiment  # [b]
        shown = known.masked_fill(draws.unknown.to(known.device), len(self.specs))
        context = self.model.context(replace(batch.observation, embodiment=shown))
        slot_valid = batch.action_valid.any(-1)  # [b n]
        if most := self.config.max_committed_slots:
            clean = (batch.actions * batch.action_valid)[:, :most]  # [b m A]
            count = draws.committed.to(clean.device)
            context = self.model.commit(context, clean, slot_valid[:, :most], count)
        suffix = self.model.suffix(context, slot_valid, draws.times.shape[1])
        return self.diffusion.errors(
            lambda x, t: self.model.denoise(x, self.model.time_tokens(t), suffix),
            batch.actions,
            self._carries_loss(batch, draws),
            draws.times.to(batch.actions.device),
            draws.noise.to(batch.actions.device),
        )

    def _carries_loss(self, batch: Batch, draws: Draws) -> Bool[Tensor, "b n A"]:
        if not self.config.max_committed_slots:
            return batch.action_valid
        leading = _leading(draws.committed.to(batch.action_valid.device), batch.action_valid.shape[1])
        return batch.action_valid & ~leading[..., None]

    @torch.no_grad()
    def sample(
        self,
        observation: Observation,
        noise: Float[Tensor, "b k n A"],
        steps: int,
        committed: Committed | None = None,
    ) -> Float[Tensor, "b k n A"]:
        """Denoise k candidates per observation; the prefix is encoded once."""
        plan = self.diffusion.plan(steps, self.device)
        context, trim = self.model.context(observation), self.device.type == "cpu"
        return self.act(context, observation.embodiment, noise, plan, committed, trim=trim)

    @torch.no_grad()
    def act(
        self,
        context: Context,
        embodiment: Int[Tensor, "b"],
        noise: Float[Tensor, "b k n A"],
        plan: Plan,
        committed: Committed | None = None,
        trace: list[Tensor] | None = None,
        trim: bool = False,
    ) -> Float[Tensor, "b k n A"]:
        """Denoise k candidates per encoded observation: what eager, compiled and graphed inference all run.

        trace: gets the network's output of each step. trim: neither show rows of a clean prefix that nobody has nor
        denoise slots that all have decided: a shorter sequence per count, which compilers and graphs would redo.
        """
        b, k, n, _ = noise.shape
        known, skip = None, 0
        slots = torch.ones(b, n, dtype=torch.bool, device=noise.device)
        if committed is not None and self.config.max_committed_slots:
            most = self.config.max_committed_slots
            if trim:
                skip, most = int(committed.count.min()), int(committed.count.max())
            context = self.model.commit(context, committed.values[:, :most], slots[:, :most], committed.count)
        elif committed is not None:
            known = Known(committed.values, _leading(committed.count, n), committed.noise)
        suffix = self.model.suffix(context, slots[:, skip:], k, room=True, skip=skip)
        taus = self.model.time_tokens(plan.times).unbind()  # S times [d]
        x = self.diffusion.sample(
            lambda x, i: self.model.denoise(x, taus[i], suffix),
            noise[:, :, skip:],
            self.dim_valid[embodiment],
            plan,
            known,
            trace,
        )
        if committed is None:
            return x
        x = torch.cat([noise[:, :, :skip], x], dim=2)  # places of decided ones
        return torch.where(_leading(committed.count, n)[:, None, :, None], committed.values[:, None], x)

    def predict(
        self,
        history: Sequence[RawObservation],
        *,
        seed: int,
        embodiment: str | None = None,
        num_inference_steps: int | None = None,
        committed: Float[np.ndarray, "m a"] | None = None,
    ) -> ActionChunk:
        """Return the chunk for the last observation of a history (oldest first, spaced by obs_dt).

        Args:
            history: 1..n_obs_steps observations; a shorter history repeats its first frame, masked.
            seed: of the initial noise; the same seed gives the same chunk.
            embodiment: needed if the policy knows several.
            num_inference_steps: of the solver; None: the checkpoint's.
            committed: actions that are decided already, physical units, oldest first: the past_action_slots executed
                before now (if the policy has such slots), then the first ones of the chunk, which come back unchanged.
                A policy trained with max_committed_slots reads them as a clean prefix (arXiv 2512.05964), any other is
                held to them while it denoises, which is approximate.

        Raises:
            ValueError: the history or `committed` does not fit the contract, or the output is not finite.
        """
        return self.predict_batch(
            [history],
            [seed],
            embodiment=embodiment,
            num_inference_steps=num_inference_steps,
            committed=None if committed is None else [committed],
        )[0]

    def predict_batch(
        self,
        histories: Sequence[Sequence[RawObservation]],
        seeds: Sequence[int],
        *,
        embodiment: str | None = None,
        num_inference_steps: int | None = None,
        batch_size: int | None = None,
        committed: Sequence[Float[np.ndarray, "m a"]] | None = None,
    ) -> list[ActionChunk]:
        """Return one chunk per history, each with its own seed and, maybe, committed actions (rows may differ).

        batch_size pads the batch to one fixed size: kernels round differently at other sizes, and contacts amplify it.
        """
        name = self.embodiment_name(embodiment)
        rows = len(histories)
        assert rows == len(seeds) and rows > 0 and (committed is None or len(committed) == rows)
        size = batch_size or rows
        if rows > size:
            raise ValueError(f"{rows} histories do not fit into batch_size {size}")
        steps = num_inference_steps or self.diffusion.config.num_inference_steps
        windows = [self.preprocessor.window(history, name) for history in histories]
        padded = windows + [windows[0]] * (size - rows)
        observation = self.preprocessor.observe(padded).to(self.device)
        seeds = [*seeds] + [0] * (size - rows)
        noise = torch.stack([self.noise(seed) for seed in seeds]).to(self.device)
        decided = None
        if committed is not None:
            decided = self.commit([*committed] + [committed[0]] * (size - rows), seeds, steps, padded)
        with eval_mode(self):
            actions = self.sample(observation, noise[:, None], steps, decided)[:rows, 0]  # [b n A]
        chunks = [self.chunk(x, w) for x, w in zip(actions, windows, strict=True)]
        for chunk, values in zip(chunks, committed or (), strict=False):
            self.keep_committed(chunk, values)
        return chunks

    def commit(
        self,
        committed: Sequence[Float[np.ndarray, "m a"]],
        seeds: Sequence[int],
        steps: int,
        windows: Sequence[Window],
    ) -> Committed:
        """Normalise committed actions, one array per window, each with at least one action.

        Raises:
            ValueError: none or too many of them, or they do not fit the embodiment.
        """
        slots, trained = self.model.action_slots, self.config.max_committed_slots
        most = trained or slots - 1
        for values in committed:
            if values.ndim != 2 or not 1 <= len(values) <= most:
                why = "was trained with" if trained else f"leaves one of {slots} action slots free with"
                raise ValueError(
                    f"committed has shape {list(values.shape)}; the policy {why} 1..{most} rows of actions"
                )
        count = torch.tensor([len(values) for values in committed])
        padded = np.zeros((len(committed), slots, self.config.action_dim), np.float32)
        for row, values, window in zip(padded, committed, windows, strict=True):
            row[: len(values)] = self.preprocessor.encode_actions(values, window.embodiment, window.state[-1])
        noise = torch.stack([self.noise(seed, steps) for seed in seeds], dim=1)  # [S b n A]
        return Committed(torch.from_numpy(padded), count, noise).to(self.device)

    def chunk(self, actions: Float[Tensor, "n A"], window: Window) -> ActionChunk:
        """Turn the network's actions into a physical chunk, past slots left out; raises ValueError if not finite."""
        values = actions[self.config.past_action_slots :].float().cpu().numpy()
        return self.preprocessor.decode_actions(values, window.embodiment, window.stamp, window.state[-1])

    def keep_committed(self, chunk: ActionChunk, committed: Float[np.ndarray, "m a"]) -> None:
        """Put committed actions back into their chunk to the last bit: normalising and back rounds."""
        now = committed[self.config.past_action_slots :]
        chunk.values[: len(now)] = now

    def noise(self, seed: int, steps: int | None = None) -> Float[Tensor, "... n A"]:
        """Draw where denoising starts, [n A]; or the noise that committed actions get at each step, [S n A]."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.model.action_slots, self.config.action_dim)
        start = torch.randn(shape, generator=generator)
        return start if steps is None else torch.randn((steps, *shape), generator=generator)

    def embodiment_name(self, name: str | None) -> str:
        """Return the embodiment meant by `name`; None: the only one.

        Raises:
            ValueError: the policy knows none or several, or not this one.
        """
        if not self.specs:
            raise ValueError(
                "the checkpoint knows no embodiment, hence no units: import it again with --embodiment and --stats, or "
                "finetune it"
            )
        if name is None and len(self.specs) == 1:
            return next(iter(self.specs))
        if name is None:
            raise ValueError(f"the policy knows several embodiments, name one of {sorted(self.specs)}")
        if name not in self.specs:
            raise ValueError(f"embodiment {name!r} is not in the checkpoint; it knows {sorted(self.specs)}")
        return name


def _leading(count: Int[Tensor, "b"], n: int) -> Bool[Tensor, "b n"]:
    return torch.arange(n, device=count.device) < count[:, None]


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Switch a module to evaluation for a while."""
    before = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(before)


def _check_clip(diffusion: DiffusionConfig, contract: Contract) -> None:
    if contract.preprocess["normalization"] == "mean_std" and diffusion.clip_sample is not None:
        raise ValueError(
            f"diffusion.clip_sample={diffusion.clip_sample} cuts actions normalised by mean_std; set it to null, or "
            "use preprocess.normalization=min_max or q01_q99"
        )
