"""Batch -> loss -> optimizer, EMA -> checkpoint -> evaluation: one loop for one process and for many.

Every random draw is a function of (seed, purpose, step, place in the global batch), and every sum that ranks share is
taken in the order of the samples, so a run resumed from step n is bit-equal to one that never stopped, and two
processes to one (with the same microbatch_size): there is no generator state to save.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import signal
import struct
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor, nn

from dita.batch import Batch
from dita.checkpoint import (
    NoSpace,
    Saving,
    check_device,
    load_policy,
    read_json,
    restore,
    save_policy,
    whole_checkpoints,
    write_json,
)
from dita.config import TrainConfig
from dita.cost import device_peak, flops_per_window
from dita.datasets.augment import augment
from dita.datasets.mixture import loader
from dita.datasets.store import Store
from dita.distributed import ALONE, Ranks, processes, shard, whole
from dita.optimize import PairwiseSum, flat_gradient, lr_scale, make_optimizer, sample_weights
from dita.policy.policy import DitaPolicy, Draws
from dita.preprocess import differences
from dita.quarantine import Quarantine, read_quarantine
from dita.run_folder import Exist, Preempted, StopFlag, describe, newest_good, run_folder, write_description
from dita.train_data import AUGMENT, INIT, NOISE, Data, build_contract, open_data, rows_of, seed_of, windows
from dita.train_log import Log, SpikeWatch, warn
from dita.validate import best_steps, validate

MOST_FAILED_SAVES = 3
MOST_ROLLBACKS = 3  # to one checkpoint
Build = Callable[[TrainConfig, Sequence[Store], Sequence[Sequence[int]]], DitaPolicy]


def train(
    config: TrainConfig, exist: Exist = "error", build: Build | None = None, allow_drift: Sequence[str] = ()
) -> Path:
    """Train a policy and return its run folder; under torchrun or srun, as one rank of the job.

    Args:
        config: everything; saved as RUN/config.json.
        exist: what to do if the run folder has checkpoints: refuse, continue bit-equal, or start over.
        build: makes the policy that training starts from; None: `build_policy`, from scratch.
        allow_drift: fields that may differ from the run that is continued, e.g. "optim.lr".

    Raises:
        FileExistsError: the run folder is taken and `exist` is "error", or another process trains in it.
        ValueError: stores, config or checkpoint do not fit; the loss is not finite (the step is not applied).
        NoSpace: the disk is full; older checkpoints are intact.
        Preempted: SIGTERM, SIGUSR1 or SIGUSR2; a checkpoint was saved.
    """
    check_device(config.device)
    torch.set_num_threads(config.threads or os.cpu_count() or 1)
    run = Path(config.run)
    if not config.data.stores:
        raise ValueError("nothing to train on: give 'data.stores=[{path:STORE,weight:1}]'")
    with processes(config.device, config.parallel, config.collective_timeout) as ranks:
        data = open_data(config)  # refused before the run folder is claimed
        rows_of(config, ranks)
        now = describe(config, data.stores)
        with ranks.holding(lambda: run_folder(run, now, exist, allow_drift)):
            policy = (build or build_policy)(config, data.stores, data.episodes)
            trainer = Trainer(policy, config, ranks)
            start = trainer.resume(run) if exist == "resume" else 0
            ranks.on_first(lambda: write_description(run, now, start))  # not before the checkpoint was found to fit
            trainer.run(run, start, data)
    return run


def build_policy(config: TrainConfig, stores: Sequence[Store], episodes: Sequence[Sequence[int]]) -> DitaPolicy:
    """Fit statistics, make the contract and initialise a policy on the config's device."""
    torch.manual_seed(seed_of(config.seed, INIT, 0))
    policy = DitaPolicy(config.policy, config.diffusion, build_contract(config, stores, episodes))
    if config.policy.vision.pretrained is not None:
        policy.model.vision.load_patches(config.policy.vision.pretrained)
    return policy.to(config.device)


class Trainer:
    """Policy, optimizer and EMA of one run, or one rank's part of them."""

    def __init__(self, policy: DitaPolicy, config: TrainConfig, ranks: Ranks = ALONE) -> None:
        self.policy, self.config, self.ranks = policy, config, ranks
        self.device = policy.device
        if config.activation_checkpointing:
            policy.model.checkpoint_activations()
        if config.compile:
            for block in policy.model.trunk.blocks:
                block.compile()
        if config.parallel == "fsdp":
            shard(policy, layers_of(policy), config.device)
        self.parameters = {n: p for n, p in policy.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer(self.parameters, config.optim)
        for p in self.parameters.values():  # now, so that a checkpoint finds its places
            moments = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[p] = {"step": torch.tensor(0.0), **moments}
        self.shadow = {n: p.detach().clone() for n, p in self.parameters.items()}  # the EMA
        self.gradient = None if config.parallel == "fsdp" else flat_gradient(list(self.parameters.values()))
        self.step_done = 0
        self.ahead = 0  # batches that were passed over: step s is taken with batch s + ahead
        self.spikes, self.rollbacks = SpikeWatch(), 0
        self.loss_hash = ""  # a chain over every step's loss: what "resumed bit-equal" is checked by
        self.samples: Float64[np.ndarray, "g c"] = np.empty((0, 2))  # of the last step: mean squared error, elements
        self.saving: Saving | None = None
        self.failed_saves = 0

    def step(self, step: int, batch: Batch) -> dict[str, float]:
        """Take one optimizer step with this rank's part of the global batch and return the step's metrics.

        Raises:
            NotFinite: loss or gradient is not finite on any rank; nothing was applied on any.
        """
        config, ranks = self.config, self.ranks
        first = ranks.rank * batch.actions.shape[0]
        draws = self._draw(step, first, batch.actions.shape[0])
        counted = ranks.gather(self.policy.counted(batch, draws)[:, None].double().cpu().numpy())[:, 0]  # [g]
        weights = sample_weights(counted, config.loss_reduction) / draws.times.shape[1]  # [g], of squared errors
        errors = self._backward(step, batch, draws, weights[first : first + batch.actions.shape[0]], first)
        local = np.column_stack([errors, *_clipped(batch), np.full(len(errors), self._finite())])
        every = ranks.gather(local)
        value = math.fsum(weights * every[:, 0])  # exact: it cannot depend on who added what
        if not (math.isfinite(value) and every[:, 3].all()):
            raise self._not_finite(step, value, every)
        norm = self._reduce_and_clip()
        if not math.isfinite(norm):
            raise self._not_finite(step, value, every, norm)
        scale = lr_scale(step, config.steps, config.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * scale
        self.optimizer.step()
        self._follow(step)
        self.step_done = step + 1
        self.loss_hash = hashlib.sha256(self.loss_hash.encode() + struct.pack("<d", value)).hexdigest()
        with np.errstate(invalid="ignore", divide="ignore"):
            self.samples = np.column_stack([every[:, 0] / (counted * draws.times.shape[1]), counted])
        clip_rate = float(every[:, 1].sum() / max(1.0, every[:, 2].sum()))
        return {"loss": value, "grad_norm": norm, "lr": config.optim.lr * scale, "clip_rate": clip_rate}

    def _draw(self, step: int, first: int, rows: int) -> Draws:
        """Draw each window's noise, times and committed slots by its own place in the global batch."""
        generator, samples = torch.Generator(), self.config.noise_samples_per_context
        seeds = (seed_of(self.config.seed, NOISE, step, first + i) for i in range(rows))
        return Draws.join([self.policy.draw(1, samples, generator.manual_seed(seed)) for seed in seeds])

    def _backward(
        self, step: int, batch: Batch, draws: Draws, weights: Float64[np.ndarray, "b"], first: int
    ) -> Float64[np.ndarray, "b"]:
        """Leave this rank's part of the gradient where `_reduce_and_clip` finds it; return squared errors."""
        config, errors = self.config, []
        micro = config.microbatch_size or len(weights)
        add = PairwiseSum(self.gradient)
        seed = seed_of(config.seed, AUGMENT, step)
        scale = torch.from_numpy(weights).float()
        for begin in range(0, len(weights), micro):
            part = slice(begin, begin + micro)
            add.begin()
            rows = augment(batch.rows(part).to(self.device, non_blocking=True), config.augment, seed, first + begin)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                error = self.policy(rows, draws.rows(part))  # [micro]
            (error * scale[part].to(self.device)).sum().backward()
            errors.append(error.detach())
        add.finish()
        return torch.cat(errors).double().cpu().numpy()

    def _finite(self) -> bool:
        if self.gradient is not None:
            return bool(torch.isfinite(self.gradient).all())
        return all(bool(torch.isfinite(_local(p.grad)).all()) for p in self.parameters.values() if p.grad is not None)

    def _reduce_and_clip(self) -> float:
        """Add the gradient over the ranks (FSDP has done so), clip it by its global norm and return that."""
        if self.gradient is not None:
            self.ranks.add(self.gradient)
            norm = torch.linalg.vector_norm(self.gradient)
            self.gradient.mul_((self.config.optim.clip_norm / (norm + 1e-6)).clamp(max=1.0))
            return float(norm)
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.config.optim.clip_norm)
        return float(whole(norm))

    def _follow(self, step: int) -> None:
        """Let the EMA follow: its memory grows to ema_decay over the first steps, as diffusers' EMAModel has it."""
        decay = min(self.config.optim.ema_decay, (1 + step) / (10 + step)) if step else 0.0
        with torch.no_grad():
            shadow, now = ([_local(t) for t in d.values()] for d in (self.shadow, self.parameters))
            torch._foreach_lerp_(shadow, now, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
        if self.gradient is not None:
            self.gradient.zero_()
        else:
            self.optimizer.zero_grad(set_to_none=True)

    def _not_finite(self, step: int, loss: float, every: np.ndarray, norm: float | None = None) -> NotFinite:
        share = len(every) // self.ranks.world
        rows = np.flatnonzero(~np.isfinite(every[:, 0])).tolist()
        ranks = [r for r in range(self.ranks.world) if not every[r * share, 3]]
        where = f"samples {rows[:8]} of the global batch" if rows else f"the gradient of rank {ranks}"
        gradient = "" if norm is None else f", gradient norm {norm}"
        return NotFinite(
            f"step {step}: loss {loss}{gradient}, not finite in {where if rows or ranks else 'the sum'}; the step was "
            "not applied. Check the data with `dita inspect`, or lower optim.lr; continue from the last checkpoint "
            "with --resume",
            rows,
        )

    def run(self, run: Path, start: int, data: Data) -> None:
        """Run the loop from step `start` to the end, logging, saving and validating; signals save first."""
        path, share = run / "quarantine.jsonl", self.config.data.quarantine
        known = self.ranks.on_first(lambda: read_quarantine(path, start))
        left_out = Quarantine(path, sum(map(len, data.datasets)), share, known, self.ranks.first)
        begin: int | None = start
        with StopFlag() as stop:
            try:
                while begin is not None:
                    begin = self._run_from(run, begin, data, left_out, stop)
            finally:
                left_out.report()

    def _run_from(self, run: Path, start: int, data: Data, left_out: Quarantine, stop: StopFlag) -> int | None:
        """Run the loop; return the step to go on from after a rollback, None at the end."""
        config, ranks = self.config, self.ranks
        batches = loader(
            data.datasets, data.sampler, batch_size=config.batch_size, preprocess=self.policy.preprocessor.batch,
            start_step=start + self.ahead, steps=config.steps + self.ahead, workers=config.data.workers,
            rank=ranks.rank, world_size=ranks.world, timeout=config.worker_timeout,
            leave_out=config.data.quarantine > 0,
        )  # fmt: skip
        stream = iter(batches)
        flops = flops_per_window(config, self.policy.contract) * config.batch_size if ranks.first else 0.0
        peak = device_peak(self.device, config) * ranks.world if ranks.first else 1.0
        with Log(run, start, config) if ranks.first else _Silent() as log:
            for step in range(start, config.steps):
                waited = time.perf_counter()
                batch = next(stream)
                began = time.perf_counter()
                self._leave_out(step, batches.left_out, data, left_out)
                try:
                    metrics = self.step(step, batch)
                except NotFinite as e:
                    raise self._name_not_finite(run, step, e, data) from None
                ended = time.perf_counter()
                if ranks.first:
                    metrics |= {"data_s": began - waited, "update_s": ended - began}
                    metrics["mfu"] = flops / (ended - waited) / peak
                    log.write(step + 1, metrics, self._by_source(step, data))
                if (z := self.spikes.look(step, metrics["loss"])) is not None:
                    if ranks.first:
                        self._report_spike(run, step, z, data)
                    if config.on_spike == "rollback" and (back := self._roll_back(run, step)) is not None:
                        return back
                asked = int(ranks.gather(np.array([[float(stop.asked or 0)]])).max())  # of any rank
                last = step + 1 == config.steps or asked
                checks = config.validation.every and (step + 1) % config.validation.every == 0
                if (step + 1) % config.save_every == 0 or last or checks:
                    self.save(run, step + 1, wait=bool(last or checks or not config.async_save), last=bool(last))
                if checks and not asked:
                    self._validate(run, step + 1, data, log)
                if asked:
                    text = f"stopped after step {step + 1}; checkpoint saved, continue with --resume"
                    raise KeyboardInterrupt(text) if asked == signal.SIGINT else Preempted(text, asked)
        return None

    def _leave_out(self, step: int, rows: Sequence[int], data: Data, left_out: Quarantine) -> None:
        """Take in which samples of a step could not be read on any rank."""
        if not self.config.data.quarantine:
            return
        size, batch = self.config.batch_size, step + self.ahead
        flags = np.zeros((size // self.ranks.world, 1))
        flags[list(rows)] = 1
        for row in np.flatnonzero(self.ranks.gather(flags)).tolist():
            named = data.name(batch, size, row)
            left_out.leave_out(step, named, lambda row=row: data.why(batch, size, row))

    def _name_not_finite(self, run: Path, step: int, error: NotFinite, data: Data) -> NotFinite:
        path, size = run / f"not_finite_{step:07d}.json", self.config.batch_size
        if self.ranks.first:
            named = [data.name(step + self.ahead, size, row) for row in error.rows or range(size)]
            write_json(path, {"step": step, "why": str(error), "samples": named})
        return NotFinite(f"{error}; the samples are named in {path}", error.rows)

    def _by_source(self, step: int, data: Data) -> dict[str, tuple[float, float]]:
        """Return (sum, weight) of what is logged per store and embodiment: loss per element, share of samples."""
        sources = data.sources(step + self.ahead, self.config.batch_size)
        errors, counted = self.samples.T
        groups: dict[str, tuple[float, float]] = {}
        for i, store in enumerate(data.stores):
            mine = (sources == i) & (counted > 0)
            groups[f"mixture/{store.name}"] = (float((sources == i).sum()), float(len(sources)))
            loss = (float((errors * counted)[mine].sum()), float(counted[mine].sum()))
            groups[f"loss/{store.name}"] = loss
            before = groups.get(f"loss/{store.spec.name}", (0.0, 0.0))
            groups[f"loss/{store.spec.name}"] = (before[0] + loss[0], before[1] + loss[1])
        return groups

    def _report_spike(self, run: Path, step: int, z: float, data: Data) -> None:
        batch, size, recent = step + self.ahead, self.config.batch_size, list(self.spikes.recent)
        worst = np.argsort(-np.nan_to_num(self.samples[:, 0]))[:8].tolist()
        named = [data.name(batch, size, row) | {"loss": float(self.samples[row, 0])} for row in worst]
        path = run / f"spike_{batch:07d}.json"
        write_json(path, {"step": step, "batch": batch, "z": z, "recent": recent, "largest": named})
        warn(f"step {step}: loss {recent[-1][1]:.4g} is a spike (robust z {z:.1f}); see {path}")

    def _roll_back(self, run: Path, step: int) -> int | None:
        """Go back to the newest checkpoint, and past the batches since: what follows has not seen the spike's.

        Return the step to go on from; None if there is no checkpoint yet.

        Raises:
            ValueError: that did not help, three times from one checkpoint.
        """
        if self.saving is not None:
            self._settle(run, last=False)
        name, following = self.ranks.on_first(lambda: newest_good(run)), step + self.ahead + 1
        if name is None:
            if self.ranks.first:
                warn("there is no checkpoint to go back to yet; training goes on")
            return None
        if self.rollbacks == MOST_ROLLBACKS:
            raise ValueError(
                f"step {step}: the loss still spikes after going back to checkpoint {name} {MOST_ROLLBACKS} times, "
                "each time with other batches: it is not the data; lower optim.lr, or resume with --allow-drift "
                "on_spike on_spike=warn"
            )
        back = self.load(run / "checkpoints" / name / "train")
        self.rollbacks, self.ahead = self.rollbacks + 1, following - back
        if self.ranks.first:
            warn(f"back to checkpoint {name}, on with batch {following}; {self.ahead} batches were passed over so far")
        return back

    def _validate(self, run: Path, step: int, data: Data, log: Any) -> None:
        """Validate the checkpoint just written, on rank 0 while the others wait."""
        threads = torch.get_num_threads()

        def check() -> None:
            folder = run / "checkpoints" / f"{step:07d}"
            kept_away = [
                windows(store, self.config, episodes) if episodes else None
                for store, episodes in zip(data.stores, data.held_out, strict=True)
            ]
            values = validate(load_policy(folder, str(self.device)), self.config, run, step, kept_away)
            log.note("validation", step, values)

        self.ranks.on_first(check)
        torch.set_num_threads(threads)
        self._prune(run)

    def save(self, run: Path, step: int, wait: bool = True, last: bool = False) -> None:
        """Write checkpoints/<step>: the policy (EMA weights) and what exact resumption needs.

        wait: come back when it is there; else a thread writes, and the next save asks how that went. A storage that
        fails or is too slow costs this checkpoint and a warning, three times in a row the run. last: none follows, so
        one failure is enough.

        Raises:
            NoSpace: the disk is full.
            OSError: three saves failed, or the last one.
            ValueError: a weight is not finite.
        """
        if self.saving is not None:
            if not wait and self.ranks.any(self.saving.busy):
                late = time.monotonic() - self.saving.began
                return self._failed(OSError(f"{self.saving.folder} is being written for {late:.0f} s; step {step} is "
                                            "not saved"))  # fmt: skip
            self._settle(run, last=False)
        finite = all(bool(torch.isfinite(_local(p)).all()) for p in (*self.parameters.values(), *self.shadow.values()))
        if self.ranks.any(not finite):
            raise ValueError(f"step {step}: weights are not finite; no checkpoint is written, older ones are good")
        folder = run / "checkpoints" / f"{step:07d}"
        exported = {n: whole(t) for n, t in (self.policy.state_dict() | self.shadow).items()}
        if not self.ranks.first:
            exported.clear()
        elif not wait:
            exported = {n: t.clone() for n, t in exported.items()}  # training goes on while they are written
        state = {
            "step": step, "loss_hash": self.loss_hash, "contract": self.policy.contract.root_hash,
            "world_size": self.ranks.world, "microbatch_size": self.config.microbatch_size,
            "ahead": self.ahead, "recent": list(self.spikes.recent),
        }  # fmt: skip
        self.rollbacks = 0
        self.saving = Saving(
            folder / "train", self._tensors(), state, self.ranks,
            lambda: save_policy(self.policy, folder / "policy", exported),
        )  # fmt: skip
        if wait:
            self._settle(run, last)

    def _settle(self, run: Path, last: bool) -> None:
        """Wait for the checkpoint that is being written; count it as failed if it is not there."""
        saving, self.saving = self.saving, None
        assert saving is not None
        try:
            saving.wait()
        except NoSpace:
            raise
        except OSError as e:
            if last:
                raise
            return self._failed(e)
        spent = time.monotonic() - saving.began
        if spent > self.config.save_timeout and self.ranks.first:
            allowed = self.config.save_timeout
            warn(f"{saving.folder} took {spent:.0f} s to write: the storage is slow (save_timeout {allowed:g} s)")
        self.failed_saves = 0
        self._prune(run)

    def _prune(self, run: Path) -> None:
        """Delete the checkpoints that are neither among the last nor, by validation so far, among the best."""
        if self.ranks.first:
            best = best_steps(run, self.config.keep_best)
            for old in whole_checkpoints(run)[: -self.config.keep_last]:
                if int(old.name) not in best:
                    remove_checkpoint(old)

    def _failed(self, error: OSError) -> None:
        self.failed_saves += 1
        if self.failed_saves >= MOST_FAILED_SAVES:
            raise OSError(f"{error}; the third checkpoint in a row that was not saved: stopping") from None
        if self.ranks.first:
            warn(f"{error}; training goes on to the next checkpoint ({self.failed_saves} of {MOST_FAILED_SAVES})")

    def resume(self, run: Path) -> int:
        """Load the newest good checkpoint of a run, if there is one, and return the step to continue from."""
        name = self.ranks.on_first(lambda: newest_good(run))
        return 0 if name is None else self.load(run / "checkpoints" / name / "train")

    def load(self, folder: Path) -> int:
        """Restore weights, moments and EMA, and return the step to continue from.

        Raises:
            ValueError: the checkpoint is of another policy or of other statistics.
        """
        state = restore(folder, self._tensors(), self.ranks)
        contract = self.policy.contract.root_hash
        if state.get("contract", contract) != contract:
            saved = read_json(folder.parent / "policy" / "contract.json")
            changed = [d for d in differences(saved, self.policy.contract.to_dict()) if d[0] != "hash"]
            listed = "; ".join(f"{path}: was {was!r}, now {now!r}" for path, was, now in changed[:4])
            raise ValueError(
                f"{folder}: the embodiments or statistics differ from those of the data now ({len(changed)} values: "
                f"{listed}): the weights know others; use another run="
            )
        self.step_done = state["step"]
        for p in self.parameters.values():
            self.optimizer.state[p]["step"] = torch.tensor(float(self.step_done))
        self.loss_hash, self.ahead = state["loss_hash"], state.get("ahead", 0)
        self.spikes = SpikeWatch(state.get("recent", ()))
        return self.step_done

    def _tensors(self) -> dict[str, Tensor]:
        """Return everything that a step changes, by name; a rank's shards where there are shards."""
        tensors = {f"model.{n}": t.detach() for n, t in self.policy.state_dict().items()}
        tensors |= {f"ema.{n}": t for n, t in self.shadow.items()}
        for name, p in self.parameters.items():
            state = self.optimizer.state[p]
            tensors |= {f"optimizer.{name}.{k}": state[k] for k in ("exp_avg", "exp_avg_sq")}
        return tensors


class NotFinite(ValueError):
    """A loss or gradient is not finite; `rows` are the samples of the global batch whose loss is not."""

    def __init__(self, text: str, rows: Sequence[int]) -> None:
        super().__init__(text)
        self.rows = list(rows)


class _Silent:
    """The log of ranks that have none."""

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None: ...


def layers_of(policy: DitaPolicy) -> list[nn.Module]:
    """Return the layers that FSDP shards one by one: those that are called as a whole."""
    lists = [m for m in policy.modules() if isinstance(m, nn.ModuleList)]
    apart = getattr(policy.model.language, "blocks", None)  # the byte encoder calls parts of its blocks
    return [layer for layers in lists if layers is not apart for layer in layers]


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint so that a kill half-way leaves no checkpoint rather than half of one."""
    (folder / "train" / "manifest.json").unlink()
    shutil.rmtree(folder)


def _local(tensor: Any) -> Tensor:
    """Return this rank's part of a sharded tensor; an unsharded one itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _clipped(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Count targets outside [-1, 1], which sampling with clip_sample=1 cannot reach, and all real ones, per window."""
    outside = (batch.actions.abs() > 1 + 1e-5) & batch.action_valid
    return outside.flatten(1).sum(1).cpu().numpy(), batch.action_valid.flatten(1).sum(1).cpu().numpy()
