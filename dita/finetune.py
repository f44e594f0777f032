"""A checkpoint and k demonstrations -> a policy for a new robot; the training loop is that of `dita.train`.

Nothing of the new robot is used but the k demonstrations: not for statistics, not for the verdict on them, not to stop
early. Steps and learning rate are in the config before training begins.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dita.checkpoint import blank_weights, find_policy, read_json, save_policy, write_json
from dita.config import EnvConfig, FinetuneConfig, PolicyConfig, PreprocessConfig
from dita.datasets.dataset import shots
from dita.datasets.doctor import FAULTS, Recording, examine, examine_store, learn_usual, scan_frames
from dita.datasets.filters import kept, write_filter
from dita.datasets.store import Store
from dita.embodiment import load_embodiment, slices
from dita.lora import add_adapters, train_projections
from dita.policy.policy import DitaPolicy
from dita.preprocess import Contract, Origin, extend_contract
from dita.train import Exist, train
from dita.train_data import build_contract
from dita.types import EmbodimentSpec

START = re.compile(r"(?:^|/)([^/]+)/seed=(\d+)(?:/|$)")  # in the source of a simulated demonstration
SAME_START = 12  # of 255: what differs less between the first pictures of two demonstrations is light, not an object


@dataclass(frozen=True)
class Replay:
    """What happened when recorded actions were played open loop."""

    tried: int
    successes: int
    drift: float | None  # median over demonstrations, at their ends, of |tool position - recorded one| [m]
    note: str  # why some or all were not played


def finetune(config: FinetuneConfig, exist: Exist = "error", allow_drift: Sequence[str] = ()) -> Path:
    """Finetune a checkpoint on k demonstrations and return the run folder.

    Prints what of the checkpoint is reused, what the doctor says of the demonstrations and whether their actions,
    played open loop, solve the task; RUN/finetune.json keeps all of it. With shots=0 there is no training: the policy
    with the extended contract is written to RUN/policy.

    Args:
        config: `data.stores[0]` is the new robot's, others are trained on beside it; policy, diffusion and preprocess
            are replaced by the checkpoint's.
        exist, allow_drift: as of `dita.train.train`.

    Raises:
        FileNotFoundError: there is no checkpoint or no store.
        FileExistsError: the run folder is taken and `exist` is "error".
        ValueError: fewer demonstrations than shots; fields that contradict the checkpoint's, or statistics of other
            data; a continuation with another checkpoint or other demonstrations.
    """
    if config.checkpoint is None or not config.data.stores:
        raise ValueError("say what is finetuned on what: dita finetune CHECKPOINT data=STORE")
    run, console, checkpoint = Path(config.run), Console(), Path(config.checkpoint)
    if exist == "error" and ((run / "config.json").exists() or (run / "policy").exists()):
        raise FileExistsError(f"{run} holds a run already; continue it with --resume or start over with --overwrite")
    base = DitaPolicy.from_pretrained(checkpoint)
    target = config.data.stores[0]
    store = Store(target.path)
    chosen = shots(store, config.shots, config.shots_seed, kept(store, target.filter)) if config.shots else ()
    config = _with_checkpoints_parts(config, base)
    # its sizes are the checkpoint's and may be too small for this robot, but statistics are not padded
    seen = build_contract(config, [store], [chosen]).stats[store.spec.name] if chosen else None
    contract, origins = extend_contract(base.contract, store.spec, seen, config.statistics)
    for other in config.data.stores[1:]:
        contract.check_embodiment(Store(other.path).spec)
    config = replace(config, policy=_fit(config.policy, contract))
    print_origins(console, origins, config.shots)
    about: dict[str, Any] = {
        "checkpoint_sha256": read_json(find_policy(checkpoint) / "manifest.json")["files"],
        "demonstrations": {store.episodes[e].source: store.episodes[e].content_hash for e in chosen},
        "origins": [asdict(o) for o in origins],
    }
    if exist == "resume" and (run / "finetune.json").exists():
        _refuse_other_inputs(run, about)
    policy = grow(base, config.policy, contract, origins, store.spec.name)
    shutil.rmtree(run / "policy", ignore_errors=True)  # of a zero-shot run: it would be found before a checkpoint
    if not chosen:
        run.mkdir(parents=True, exist_ok=True)
        write_json(run / "finetune.json", about)
        save_policy(policy, run / "policy")
        return run
    advice = verdict(store, chosen)
    for line in [f"{len(chosen)} demonstrations: {'; '.join(store.episodes[e].source for e in chosen)}", *advice]:
        console.print(line, highlight=False, markup=False)
    played = replay(store, chosen, config.env) if config.replay else Replay(0, 0, None, "replay=false")
    console.print(describe(played), highlight=False, markup=False)
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / "finetune.json", about | {"verdict": advice, "replay": asdict(played)})
    left_out = {e.source: ["NOT_CHOSEN"] for i, e in enumerate(store.episodes) if i not in chosen}
    write_filter(run / "shots.json", {str(store.path): left_out})
    stores = (replace(target, filter=str(run / "shots.json")), *config.data.stores[1:])
    config = replace(config, data=replace(config.data, stores=stores))

    def build(*_: object) -> DitaPolicy:
        if config.method == "head":
            train_projections(policy)
        elif config.method == "lora":
            add_adapters(policy, config.lora, config.seed)
        trained, all_ = (sum(p.numel() for p in policy.parameters() if p.requires_grad or every) for every in (0, 1))
        console.print(
            f"{config.method}: {trained:,} of {all_:,} parameters are trained, {config.steps} steps", highlight=False
        )
        return policy.train().to(config.device)

    return train(config, exist, build, allow_drift)


def grow(
    base: DitaPolicy, config: PolicyConfig, contract: Contract, origins: Sequence[Origin], name: str
) -> DitaPolicy:
    """Copy a policy into one with an extended contract.

    Slots that the checkpoint did not have begin at zero, so that what it computes for its own robots stays the same.
    The new robot's token begins as the unknown-embodiment token, or, where the checkpoint was trained without one, as
    the mean of the robots whose fields it shares (of all, if of none).
    """
    with blank_weights(config):
        policy = DitaPolicy(config, base.diffusion.config, contract, base.diffusion.alphas_cumprod)
    old, weights = base.state_dict(), {}
    for key, tensor in policy.state_dict().items():
        if key == "model.embodiment.weight":
            weights[key] = _tokens(base, contract, origins, name)
        elif old[key].shape == tensor.shape:
            weights[key] = old[key].clone()
        else:  # a projection of the padded vectors
            weights[key] = torch.zeros(tensor.shape, dtype=old[key].dtype)
            weights[key][tuple(slice(n) for n in old[key].shape)] = old[key]
    policy.load_state_dict(weights, assign=True)
    return policy


def _tokens(base: DitaPolicy, contract: Contract, origins: Sequence[Origin], name: str) -> Float[Tensor, "e d"]:
    assert base.model.embodiment is not None
    table = base.model.embodiment.weight.detach()
    rows = dict(zip(base.specs, table, strict=False))  # by robot; behind them, maybe, the unknown one
    unknown = [table[-1]] if base.config.embodiment_dropout else []
    like = sorted({robot for o in origins if o.statistics for robot in o.like}) or list(rows)
    first = unknown[0] if unknown else torch.stack([rows[r] for r in like]).mean(0)
    rows.setdefault(name, first)
    return torch.stack([*(rows[robot] for robot in contract.specs), *unknown])


# ---- before training


def verdict(store: Store, chosen: Sequence[int]) -> list[str]:
    """Say what to record more of, and what the doctor finds in the chosen episodes, one line each; worst first."""
    spec = store.spec
    episodes = {e: Recording(store.state(e), store.action(e), store.stamp(e)) for e in chosen}
    usual = learn_usual(spec, episodes.values())
    errors, warnings = [], []
    for number, e in episodes.items():
        pictures = {c.name: store.read_frames(number, c.name, range(len(e.stamp))) for c in spec.cameras}
        for s in examine(spec, e, usual, {name: scan_frames([p]) for name, p in pictures.items()}):
            severe = s.bad.mean() >= FAULTS[s.fault].error_share and not s.never_severe
            where = f"{store.episodes[number].source}, {s.where}"
            line = f"{FAULTS[s.fault].title}: {where}: {s.what}; {FAULTS[s.fault].advice}"
            (errors if severe else warnings).append(line)
    lines = [f"record again: {line}" for line in errors]
    lines += [f"record more: {line}" for line in _thin(store, episodes)]
    lines += [f"look at: {line}" for line in warnings]
    lines += [f"look at: {FAULTS[f].title}: {where}: {what}" for f, where, _, what in examine_store(spec, usual)]
    return lines or ["the doctor finds nothing wrong with them"]


def _thin(store: Store, episodes: Mapping[int, Recording]) -> list[str]:
    """Say what few or none of the demonstrations show."""
    spec, lines = store.spec, []
    words = Counter(store.episodes[e].instruction for e in episodes)
    lines += [
        f"{w!r} has {n} of {len(episodes)} demonstrations" for w, n in words.items() if 2 * n < max(words.values())
    ]
    failed = [store.episodes[e].source for e in episodes if store.episodes[e].success is False]
    lines += [f"{len(failed)} of them are marked as failures ({', '.join(failed[:3])})"] if failed else []
    commands = np.concatenate([e.action for e in episodes.values()])
    for field, here, _ in slices(spec.action):
        middle, share = (field.high[0] + field.low[0]) / 2, (field.high[0] - field.low[0]) / 20
        value = commands[:, here]
        if field.kind.startswith("gripper") and value.max() < middle + share:
            lines.append(f"none opens the gripper ({field.name} is never above {float(value.max()):.2g})")
        elif field.kind.startswith("gripper") and value.min() > middle - share:
            lines.append(f"none closes the gripper ({field.name} is never below {float(value.min()):.2g})")
    if len(episodes) > 1 and spec.cameras:
        camera = spec.cameras[0].name
        first = np.stack([store.read_frames(e, camera, [0])[0] for e in episodes]).astype(np.int16)  # [k h w 3]
        if int(np.ptp(first, axis=0).max()) <= SAME_START:
            lines.append(f"all begin with the same picture of {camera}: move the objects between demonstrations")
    return lines


def replay(store: Store, chosen: Sequence[int], config: EnvConfig) -> Replay:
    """Play the recorded actions open loop from the starts that the episodes' sources name, `.../TASK/seed=N`.

    What does not solve the task here was recorded with other units, another reference of its deltas, shifted in time,
    or with noise on the executed action that the store does not hold (action_noise of `dita collect`).

    Raises:
        ValueError: the environment's package is not installed.
    """
    from dita import envs

    if (name := load_embodiment(config.embodiment).name) != store.spec.name:
        note = f"env.embodiment is {name}, the demonstrations are {store.spec.name}'s"
        return Replay(0, 0, None, f"{note}; give env=SUITE env.embodiment=NAME|FILE to play them")
    found = {e: START.search(store.episodes[e].source) for e in chosen}
    starts = {e: (m[1], int(m[2])) for e, m in found.items() if m is not None}
    if not starts:
        return Replay(0, 0, None, "their sources name no start (TASK/seed=N)")
    task = next(iter(starts.values()))[0]
    envs.check_tasks(replace(config, tasks=tuple(sorted({t for t, _ in starts.values()}))))
    env = envs.make(config, task)
    wins, drift = 0, []
    try:
        for episode, (task, seed) in starts.items():
            env.reset(seed=seed, options={"task": task})
            actions, recorded = store.action(episode), store.state(episode)
            for action in actions[:-1]:
                env.step(action)
            drift += [_tool_distance(store.spec, env.state, recorded[-1])]
            env.step(actions[-1])
            wins += env.success
    finally:
        env.close()
    silent = len(chosen) - len(starts)
    note = f"{silent} not played: their sources name no start" if silent else ""
    distances = [d for d in drift if d is not None]
    return Replay(len(starts), wins, float(np.median(distances)) if distances else None, note)


def _tool_distance(spec: EmbodimentSpec, a: np.ndarray, b: np.ndarray) -> float | None:
    for field, here, _ in slices(spec.state):
        if field.kind == "ee_position":
            return float(np.linalg.norm(a[here] - b[here]))
    return None


def describe(played: Replay) -> str:
    """Say in one line how the replay went."""
    if not played.tried:
        return f"open-loop replay: not played: {played.note}"
    drift = "" if played.drift is None else f", the tool ends {played.drift * 1000:.1f} mm from where it was (median)"
    rest = f"; {played.note}" if played.note else ""
    return f"open-loop replay: {played.successes} of {played.tried} solve the task{drift}{rest}"


def print_origins(console: Console, origins: Sequence[Origin], count: int) -> None:
    """Print what of the checkpoint is reused and what is new."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold underline")
    for column in ("part", "weights", "statistics", "as on", "note"):
        table.add_column(column)
    told = {"pretrained": "the checkpoint's", "new": f"{count} demonstrations", "pooled": "both", "": ""}
    for o in origins:
        table.add_row(o.part, o.weights, told[o.statistics], ", ".join(o.like), o.note)
    console.print(table)


# ---- small pieces


def _with_checkpoints_parts(config: FinetuneConfig, base: DitaPolicy) -> FinetuneConfig:
    p = base.contract.preprocess
    preprocess = PreprocessConfig(p["normalization"], p["resize"], p["actions"])
    return replace(config, policy=base.config, diffusion=base.diffusion.config, preprocess=preprocess)


def _fit(config: PolicyConfig, contract: Contract) -> PolicyConfig:
    p = contract.preprocess
    return replace(config, state_dim=p["state_dim"], action_dim=p["action_dim"], cameras=p["cameras"])


def _refuse_other_inputs(run: Path, about: Mapping[str, Any]) -> None:
    before = read_json(run / "finetune.json")
    if before["checkpoint_sha256"] != about["checkpoint_sha256"]:
        raise ValueError(f"{run} was started from another checkpoint: its files have other hashes; use another run=")
    was, now = before["demonstrations"], about["demonstrations"]
    changed = sorted(k for k in was.keys() | now.keys() if was.get(k) != now.get(k))
    if changed:
        raise ValueError(
            f"{run} has statistics of other data: these demonstrations changed since it began: "
            f"{', '.join(changed[:3])}; use another run="
        )
