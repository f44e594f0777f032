"""Batch -> loss -> optimizer, EMA -> checkpoint. The composition root of training.

Every random draw is a function of (seed, purpose, step), so a run resumed from step n is bit-equal to one that never
stopped: there is no generator state to save.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from dita.batch import Batch
from dita.checkpoint import (
    check_device,
    last_checkpoint,
    load_train_state,
    read_json,
    save_policy,
    save_train_state,
    write_json,
)
from dita.config import OptimConfig, TrainConfig, to_dict
from dita.datasets.augment import augment
from dita.datasets.dataset import WindowDataset, iter_low_dim, shots
from dita.datasets.filters import filter_hash, kept
from dita.datasets.mixture import MixtureSampler, check_rates, loader
from dita.datasets.store import Store
from dita.datasets.windows import strides
from dita.normalize import fit
from dita.policy.policy import DitaPolicy
from dita.preprocess import Contract, make_contract
from dita.relative import relative_chunks
from dita.types import EmbodimentSpec, NormStats

Exist = Literal["error", "resume", "overwrite"]
Build = Callable[[TrainConfig, Sequence[Store], Sequence[Sequence[int]]], DitaPolicy]
INIT, NOISE, AUGMENT, DATA = range(4)  # purposes of random numbers
MAY_CHANGE_ON_RESUME = ("run", "threads", "device", "log_every", "save_every", "keep_last")


def train(config: TrainConfig, exist: Exist = "error", build: Build | None = None) -> Path:
    """Train a policy and return its run folder.

    Args:
        config: everything; saved as RUN/config.json.
        exist: what to do if the run folder has checkpoints: refuse, continue bit-equal, or start over.
        build: makes the policy that training starts from; None: `build_policy`, from scratch.

    Raises:
        FileExistsError: the run folder is taken and `exist` is "error", or another process trains in it.
        ValueError: stores, config or checkpoint do not fit; the loss is not finite (the step is not applied).
    """
    check_device(config.device)
    torch.set_num_threads(config.threads or os.cpu_count() or 1)
    run = Path(config.run)
    if not config.data.stores:
        raise ValueError("nothing to train on: give 'data.stores=[{path:STORE,weight:1}]'")
    stores = [Store(s.path) for s in config.data.stores]  # refused before the run folder is claimed
    episodes = [_episodes(store, s.filter, config) for store, s in zip(stores, config.data.stores, strict=True)]
    with run_folder(run, config, exist):
        policy = (build or build_policy)(config, stores, episodes)
        trainer = Trainer(policy, config)
        start = trainer.load(last_checkpoint(run) / "train") if exist == "resume" and _has_checkpoint(run) else 0
        trainer.run(run, start, _batches(config, policy, stores, episodes, start))
    return run


def build_policy(config: TrainConfig, stores: Sequence[Store], episodes: Sequence[Sequence[int]]) -> DitaPolicy:
    """Fit statistics, make the contract and initialise a policy on the config's device."""
    torch.manual_seed(_seed(config.seed, INIT, 0))
    policy = DitaPolicy(config.policy, config.diffusion, build_contract(config, stores, episodes))
    if config.policy.vision.pretrained is not None:
        policy.model.vision.load_patches(config.policy.vision.pretrained)
    return policy.to(config.device)


def build_contract(config: TrainConfig, stores: Sequence[Store], episodes: Sequence[Sequence[int]]) -> Contract:
    """Pool the statistics of all stores of an embodiment; two stores must agree on what the embodiment is."""
    specs = {store.spec.name: store.spec for store in stores}
    for store in stores:
        if store.spec != specs[store.spec.name]:
            raise ValueError(
                f"{store.path}: embodiment {store.spec.name!r} differs from another store's; rename one of them"
            )
    check_rates(list(specs.values()), told=config.policy.embodiment_token)
    stats: list[NormStats] = []
    for spec in specs.values():
        parts = [(s, e) for s, e in zip(stores, episodes, strict=True) if s.spec.name == spec.name]
        pairs = (pair for store, chosen in parts for pair in iter_low_dim(store, chosen))
        if config.preprocess.actions == "relative":
            pairs = ((state, _relative(state, action, spec, config)) for state, action in pairs)
        stats.append(fit(spec, pairs))
    return make_contract(config.preprocess, config.policy, list(specs.values()), stats)


def _relative(state: np.ndarray, action: np.ndarray, spec: EmbodimentSpec, config: TrainConfig) -> np.ndarray:
    rows = range(-config.policy.past_action_slots, config.policy.chunk_size)
    return relative_chunks(state, action, spec, rows, strides(spec)[1])


class Trainer:
    """Policy, optimizer and EMA of one run."""

    def __init__(self, policy: DitaPolicy, config: TrainConfig) -> None:
        from diffusers.training_utils import EMAModel  # four seconds to import: only training pays

        self.policy, self.config = policy, config
        if config.activation_checkpointing:
            policy.model.checkpoint_activations()
        self.parameters = {n: p for n, p in policy.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer(self.parameters, config.optim)
        self.ema = EMAModel(self.parameters.values(), decay=config.optim.ema_decay)
        self.loss_hash = ""  # a chain over every step's loss: what "resumed bit-equal" is checked by

    def step(self, step: int, batch: Batch) -> dict[str, float]:
        """Take one optimizer step and return its metrics.

        Raises:
            ValueError: loss or gradient is not finite; nothing was applied.
        """
        config = self.config
        scale = lr_scale(step, config.steps, config.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * scale
        clip_rate = _clip_rate(batch)  # on the CPU still
        batch = augment(batch.to(config.device, non_blocking=True), config.augment, _seed(config.seed, AUGMENT, step))
        generator = torch.Generator().manual_seed(_seed(config.seed, NOISE, step))
        with torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=config.precision == "bf16"):
            loss = self.policy.loss(batch, config.noise_samples_per_context, generator)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), config.optim.clip_norm)
        value, norm_value = float(loss.detach()), float(norm)
        if not (math.isfinite(value) and math.isfinite(norm_value)):
            self.optimizer.zero_grad(set_to_none=True)
            raise ValueError(
                f"step {step}: loss {value}, gradient norm {norm_value}; the step was not applied. Check the data with "
                "`dita inspect`, or lower optim.lr; continue from the last checkpoint with --resume"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.step(self.parameters.values())
        self.loss_hash = hashlib.sha256(self.loss_hash.encode() + struct.pack("<d", value)).hexdigest()
        return {"loss": value, "grad_norm": norm_value, "lr": config.optim.lr * scale, "clip_rate": clip_rate}

    def run(self, run: Path, start: int, batches: Iterator[Batch]) -> None:
        """Run the loop from step `start` to the end, logging and saving; SIGTERM and Ctrl-C save first."""
        config = self.config
        stop = _StopFlag()
        log = _Log(run, start, config)
        with stop, log:
            for step in range(start, config.steps):
                waited = time.perf_counter()
                batch = next(batches)
                began = time.perf_counter()
                metrics = self.step(step, batch)
                ended = time.perf_counter()
                log.write(step + 1, metrics, data_s=began - waited, update_s=ended - began)
                if (step + 1) % config.save_every == 0 or step + 1 == config.steps or stop.asked:
                    self.save(run, step + 1)
                if stop.asked:
                    raise KeyboardInterrupt(f"stopped after step {step + 1}; checkpoint saved, continue with --resume")

    def save(self, run: Path, step: int) -> None:
        """Write checkpoints/<step>: the policy (EMA weights) and what exact resumption needs."""
        folder = run / "checkpoints" / f"{step:07d}"
        shadow = dict(zip(self.parameters, self.ema.shadow_params, strict=True))
        save_policy(self.policy, folder / "policy", self.policy.state_dict() | shadow)
        tensors = {f"model.{n}": t for n, t in self.policy.state_dict().items()}
        tensors |= {f"ema.{n}": t for n, t in shadow.items()}
        for name, p in self.parameters.items():
            tensors |= {f"optimizer.{name}.{k}": v for k, v in self.optimizer.state[p].items()}
        state = {"step": step, "ema_step": self.ema.optimization_step, "loss_hash": self.loss_hash}
        save_train_state(folder / "train", tensors, state)
        for old in sorted((run / "checkpoints").glob("[0-9]*"))[: -self.config.keep_last]:
            for path in sorted(old.rglob("*"), reverse=True):
                path.unlink() if path.is_file() else path.rmdir()
            old.rmdir()

    def load(self, folder: Path) -> int:
        """Restore weights, moments and EMA, and return the step to continue from."""
        tensors, state = load_train_state(folder)
        self.policy.load_state_dict({n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")})
        for i, (name, p) in enumerate(self.parameters.items()):
            self.ema.shadow_params[i] = tensors[f"ema.{name}"].to(p.device)
            prefix = f"optimizer.{name}."
            self.optimizer.state[p] = {
                n.removeprefix(prefix): t if n.endswith(".step") else t.to(p.device)
                for n, t in tensors.items()
                if n.startswith(prefix)
            }
        self.ema.optimization_step = state["ema_step"]
        self.loss_hash = state["loss_hash"]
        return state["step"]


def _clip_rate(batch: Batch) -> float:
    """Return the share of real targets outside [-1, 1], which sampling with clip_sample=1 cannot reach."""
    outside = (batch.actions.abs() > 1 + 1e-5) & batch.action_valid
    return float(outside.sum() / batch.action_valid.sum().clamp(min=1))


def make_optimizer(parameters: Mapping[str, nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """Build AdamW: no decay on vectors, a scaled rate for a pretrained vision backbone."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, p in parameters.items():
        groups.setdefault((".vision.patches." in name, p.ndim >= 2), []).append(p)
    return torch.optim.AdamW(
        [
            {
                "params": params,
                "base_lr": config.lr * (config.vision_lr_scale if backbone else 1.0),
                "weight_decay": config.weight_decay if matrix else 0.0,
            }
            for (backbone, matrix), params in groups.items()
        ],
        lr=config.lr,
        betas=config.betas,
        fused=False,
    )


def lr_scale(step: int, steps: int, config: OptimConfig) -> float:
    """Return the factor on the learning rate: linear warm-up, then constant or cosine to zero."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


@contextmanager
def run_folder(run: Path, config: TrainConfig, exist: Exist) -> Iterator[None]:
    """Claim a run folder for this process and write or compare its config.

    Raises:
        FileExistsError: it holds a run (use --resume or --overwrite), or a live process holds it.
        ValueError: resumed with another config; the differences are listed.
    """
    if exist == "error" and (run / "config.json").exists():
        raise FileExistsError(f"{run} holds a run already; continue it with --resume or start over with --overwrite")
    run.mkdir(parents=True, exist_ok=True)
    lock = run / "lock"
    _take_lock(lock)
    try:
        if exist == "resume" and (run / "config.json").exists():
            _refuse_drift(read_json(run / "config.json"), config, run)
        elif exist == "overwrite":
            for path in sorted((run / "checkpoints").rglob("*"), reverse=True):
                path.unlink() if path.is_file() else path.rmdir()
            (run / "log.jsonl").unlink(missing_ok=True)
        write_json(run / "config.json", _described(config))
        yield
    finally:
        lock.unlink(missing_ok=True)


def _take_lock(lock: Path) -> None:
    try:
        fd = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        pid = int(lock.read_text() or 0)
        if pid and Path(f"/proc/{pid}").exists():
            raise FileExistsError(f"process {pid} is training in {lock.parent}; stop it or use another run=") from None
        lock.unlink()  # its holder was killed
        return _take_lock(lock)
    with os.fdopen(fd, "w") as file:
        file.write(str(os.getpid()))


def _refuse_drift(saved: dict[str, Any], config: TrainConfig, run: Path) -> None:
    now = json.loads(json.dumps(_described(config)))
    changed = [f"{k}: was {a!r}, now {b!r}" for k, a, b in _flat_diff(saved, now) if k not in MAY_CHANGE_ON_RESUME]
    if changed:
        raise ValueError(f"{run} was started with another config: {'; '.join(changed[:8])}; use another run=")


def _described(config: TrainConfig) -> dict[str, Any]:
    """Return the config with the content of the filters it names: an edited one is another run."""
    hashes = {s.filter: filter_hash(s.filter) for s in config.data.stores if s.filter is not None}
    return to_dict(config) | ({"filters_sha256": hashes} if hashes else {})


def _flat_diff(a: Any, b: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted(a.keys() | b.keys())
        return [d for k in keys for d in _flat_diff(a.get(k), b.get(k), f"{path}.{k}" if path else k)]
    return [] if a == b else [(path, a, b)]


def _has_checkpoint(run: Path) -> bool:
    return any((run / "checkpoints").glob("[0-9]*/train/manifest.json"))


def _episodes(store: Store, filter: str | None, config: TrainConfig) -> list[int]:
    among = kept(store, filter)
    return list(among if config.data.shots is None else shots(store, config.data.shots, config.seed, among))


def _batches(
    config: TrainConfig,
    policy: DitaPolicy,
    stores: Sequence[Store],
    episodes: Sequence[Sequence[int]],
    start: int,
) -> Iterator[Batch]:
    datasets = [
        WindowDataset(
            store,
            n_obs_steps=config.policy.n_obs_steps,
            chunk_size=config.policy.chunk_size,
            past_action_slots=config.policy.past_action_slots,
            pad_end=config.data.pad_end,
            cache=config.data.cache,
            episodes=chosen,
        )
        for store, chosen in zip(stores, episodes, strict=True)
    ]
    weights = [s.weight for s in config.data.stores]
    sampler = MixtureSampler([len(d) for d in datasets], weights, _seed(config.seed, DATA, 0))
    return iter(
        loader(
            datasets,
            sampler,
            batch_size=config.batch_size,
            preprocess=policy.preprocessor.batch,
            start_step=start,
            steps=config.steps,
            workers=config.data.workers,
        )
    )


def _seed(seed: int, purpose: int, step: int) -> int:
    return int(np.random.SeedSequence([seed, purpose, step]).generate_state(1, np.uint64)[0] >> 1)


class _StopFlag:
    """Turns SIGTERM, SIGUSR1 and the first Ctrl-C into a checkpoint at the end of the running step."""

    asked = False

    def __enter__(self) -> None:
        self.before = {s: signal.signal(s, self._ask) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True


class _Log:
    """One line per log_every steps: progress bar, JSONL and TensorBoard."""

    def __init__(self, run: Path, start: int, config: TrainConfig) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.config = config
        _forget_after(run / "log.jsonl", start)
        self.file = (run / "log.jsonl").open("a")
        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=start)
        self.bar = Progress(
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[line]}"),
        )
        self.task = self.bar.add_task("train", total=config.steps, completed=start, line="")
        self.sums: dict[str, float] = {}
        self.count = 0

    def __enter__(self) -> None:
        self.bar.start()

    def __exit__(self, *error: object) -> None:
        self.bar.stop()
        self.board.close()
        self.file.close()

    def write(self, step: int, metrics: Mapping[str, float], data_s: float, update_s: float) -> None:
        for key, value in (dict(metrics) | {"data_s": data_s, "update_s": update_s}).items():
            self.sums[key] = self.sums.get(key, 0.0) + value
        self.count += 1
        self.bar.advance(self.task)
        if step % self.config.log_every and step != self.config.steps:
            return
        mean = {key: value / self.count for key, value in self.sums.items()}
        mean["lr"] = metrics["lr"]
        mean["samples_per_s"] = self.config.batch_size / (mean["data_s"] + mean["update_s"])
        self.file.write(json.dumps({"step": step, "loss_exact": metrics["loss"], **mean}) + "\n")
        self.file.flush()
        for key, value in mean.items():
            self.board.add_scalar(f"train/{key}", value, step)
        share = mean["data_s"] / (mean["data_s"] + mean["update_s"])
        speed = f"{mean['samples_per_s']:.0f} samples/s  data {share:.0%}"
        self.bar.update(self.task, line=f"loss {mean['loss']:.4f}  lr {mean['lr']:.1e}  {speed}")
        self.sums, self.count = {}, 0


def _forget_after(log: Path, step: int) -> None:
    """Drop the lines of steps that will be taken again."""
    if log.exists():
        lines = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
        log.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))


def parameter_count(policy: DitaPolicy) -> int:
    """Return the number of trainable parameters."""
    return sum(p.numel() for p in policy.parameters() if p.requires_grad)
