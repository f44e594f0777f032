"""A checkpoint on held-out demonstrations and in simulation, while its run goes on; regressions are flagged."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64

from dita.config import TrainConfig
from dita.datasets.dataset import WindowDataset
from dita.datasets.store import StoreError
from dita.policy.policy import DitaPolicy
from dita.statistics import compare_pairs
from dita.train_log import warn
from dita.types import Window


def held_out(episodes: Sequence[int], share: float, seed: int) -> list[int]:
    """Choose the episodes that training does not see: a share of them, rounded up, the same ones for a seed.

    Raises:
        ValueError: none would be left to train on.
    """
    count = int(np.ceil(share * len(episodes)))
    if count >= len(episodes):
        raise ValueError(f"validation.episodes={share:g} holds out all {len(episodes)} episodes of a store; lower it")
    return sorted(np.random.default_rng(seed).permutation(np.asarray(episodes))[:count].tolist())


def validate(
    policy: DitaPolicy, config: TrainConfig, run: Path, step: int, datasets: Sequence[WindowDataset | None]
) -> dict[str, float]:
    """Measure a checkpoint, write a line to RUN/validation.jsonl and return its numbers.

    A checkpoint has regressed where it is worse than the best one before it beyond chance: on the same starts by
    McNemar's test (two-sided, 5 %), or without rollouts on the same windows by the 95 % interval of the difference.
    """
    before = [line for line in read_validation(run) if line["step"] < step]
    values: dict[str, Any] = {"step": step}
    if any(d is not None for d in datasets):
        errors = {d.store.name: action_errors(policy, d, config) for d in datasets if d is not None}
        values["action_errors"] = [e for row in errors.values() for e in row]
        values |= {f"action_error/{name}": float(row.mean()) for name, row in errors.items()}
        values["action_error"] = float(np.mean(values["action_errors"]))
    if config.validation.rollouts is not None:
        from dita.evaluate import evaluate

        out = run / "rollouts" / f"{step:07d}"
        result = evaluate(policy, replace(config.validation.rollouts, out=str(out)), exist="overwrite")
        low, high = result.macro.interval
        values |= {"success_rate": result.macro.success_rate, "success_low": low, "success_high": high}
        values["wins"] = [e.success for e in result.episodes]
    values["regressed"] = _regressed(values, before)
    if values["regressed"]:
        warn(f"step {step} is worse than step {_best(before)['step']} beyond chance: {_said(values)}, was "
             f"{_said(_best(before))}; see {run}/validation.jsonl")  # fmt: skip
    with (run / "validation.jsonl").open("a") as file:
        file.write(json.dumps(values) + "\n")
    return {k: float(v) for k, v in values.items() if isinstance(v, (float, bool)) and k != "step"}


@torch.no_grad()
def action_errors(policy: DitaPolicy, dataset: WindowDataset, config: TrainConfig) -> Float64[np.ndarray, "w"]:
    """Return the mean absolute error of sampled actions, in units of the normalised range, of windows spread evenly.

    With data.quarantine, damaged ones are left out; else they are a StoreError.
    """
    count = min(config.validation.windows, len(dataset))
    places = np.unique(np.linspace(0, len(dataset) - 1, count).astype(int))
    errors: list[float] = []
    for part in np.array_split(places, -(-len(places) // 32)):
        batch = policy.preprocessor.batch([_window(dataset, int(i), config.data.quarantine > 0) for i in part])
        noise = torch.stack([policy.noise(int(i)) for i in part])[:, None].to(policy.device)
        actions = policy.sample(batch.observation.to(policy.device), noise, config.diffusion.num_inference_steps)
        off = ((actions[:, 0].float().cpu() - batch.actions).abs() * batch.action_valid).flatten(1).sum(1)
        counted = batch.action_valid.flatten(1).sum(1)
        errors += (off / counted)[counted > 0].tolist()
    return np.asarray(errors, np.float64)


def _window(dataset: WindowDataset, index: int, leave_out: bool) -> Window:
    try:
        return dataset[index]
    except StoreError as e:
        if not (leave_out and e.is_damage):
            raise
        warn(f"validation: left out as damaged: {e}")
        return dataset.unread(index)


def read_validation(run: Path) -> list[dict[str, Any]]:
    """Return the validations of a run by step; of a step that was taken twice the last one."""
    path = run / "validation.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    by_step = {values["step"]: values for values in (json.loads(line) for line in lines if line.endswith("\n"))}
    return [by_step[step] for step in sorted(by_step)]


def best_steps(run: Path, count: int) -> set[int]:
    """Return the steps of the best checkpoints so far: by success rate, or by action error without rollouts."""
    ranked = sorted(read_validation(run), key=_score, reverse=True)
    return {values["step"] for values in ranked[:count]}


def _score(values: Mapping[str, Any]) -> float:
    return values["success_rate"] if "success_rate" in values else -values.get("action_error", np.inf)


def _best(before: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return max(before, key=_score)


def _regressed(values: Mapping[str, Any], before: Sequence[Mapping[str, Any]]) -> bool:
    if not before:
        return False
    best = _best(before)
    if "wins" in values and len(values["wins"]) == len(best.get("wins", ())):
        pair = compare_pairs(best["wins"], values["wins"])
        return bool(pair.p < 0.05 and pair.difference < 0)
    if "action_errors" in values and len(values["action_errors"]) == len(best.get("action_errors", ())) > 1:
        worse = np.asarray(values["action_errors"]) - np.asarray(best["action_errors"])
        return bool(worse.mean() - 1.96 * worse.std(ddof=1) / np.sqrt(len(worse)) > 0)
    return False


def _said(values: Mapping[str, Any]) -> str:
    if "success_rate" in values:
        return f"success {values['success_rate']:.0%} ({values['success_low']:.0%} .. {values['success_high']:.0%})"
    return f"action error {values['action_error']:.4f}"
