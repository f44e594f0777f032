"""Row 7: how near `dita eval` comes to what its parts cost, and how far it leaves behind one environment at a time.

The parts are measured apart: the policy's seconds in the very calls of the run, and the core-seconds of physics and
rendering by playing the same episodes again in this process, which must also come out the same. The wall time counts
from the first policy call on: that simulators take seconds to start is said beside it. The network is the demo's with
random weights, for speed does not depend on what was learned.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.harness import OTHERS, Case, busy_cores
from dita.cli import compose
from dita.config import EvalConfig, TrainConfig
from dita.embodiment import load_embodiment
from dita.envs.rollout import PLAIN, EpisodeResult, Player, Start, Timing, noise_seed, rollout
from dita.normalize import fit
from dita.policy.policy import DitaPolicy
from dita.preprocess import make_contract
from dita.types import ActionChunk

WORST = 1.3  # times the bound
RUNS = 3  # of everything, in turn
# tier -> (episodes, steps of each, episodes of the peer)
SIZES = {"full": (24, 300, 1), "quick": (3, 16, 1)}


class Timed:
    """A policy that notes what its calls cost."""

    def __init__(self, policy: DitaPolicy) -> None:
        self.policy, self.began, self.ended, self.seconds = policy, 0.0, 0.0, 0.0

    def predict_batch(self, *args: Any, **options: Any) -> Sequence[ActionChunk]:
        """Predict; the time of the first call begins the clock."""
        wall, cpu = time.perf_counter(), time.process_time()
        self.began = self.began or wall
        chunks = self.policy.predict_batch(*args, **options)
        on_gpu = self.policy.device.type == "cuda"
        self.seconds += time.perf_counter() - wall if on_gpu else time.process_time() - cpu
        self.ended = time.perf_counter()
        return chunks


def eval_throughput(tier: str) -> list[Case]:
    """Row 7: wall time against max(physics + render core-seconds / cores, policy seconds); and against one by one."""
    episodes, max_steps, peer_episodes = SIZES[tier]
    torch.set_num_threads(1)
    config = compose("eval", [f"env.max_steps={max_steps}"], EvalConfig)
    if tier == "quick":
        config = replace(config, n_envs=2, batch_size=2)
    policy = _policy(tier)
    starts = [Start(config.env.tasks[0], i, config.seed + i, None) for i in range(episodes)]
    others, cores = busy_cores(), os.cpu_count() or 1
    runs = []
    for _ in range(RUNS if tier == "full" else 1):
        wall, seconds, start_up, played = _together(policy, config, starts)
        simulation, alone = _simulation(policy, config, starts)
        one = _one_by_one(policy, config, starts[:peer_episodes])
        identical, steps = _outcomes(played) == _outcomes(alone), sum(e.steps for e in played)
        runs.append({
            "wall_s": wall, "policy_s": seconds, "simulation_core_s": simulation, "start_up_s": start_up,
            "bound_s": max(simulation / cores, seconds), "work_s": (simulation + seconds) / cores,
            "step_s": wall / steps, "one_step_s": one, "identical": identical,
        })  # fmt: skip
    middle = {key: median(run[key] for run in runs) for key in runs[0]}
    ratio = median(run["bound_s"] / run["wall_s"] for run in runs)
    faster = median(run["one_step_s"] / run["step_s"] for run in runs)
    about = (
        f"{config.n_envs} environments, batch {config.batch_size}, {policy.config.n_action_steps} of "
        f"{policy.config.chunk_size} actions, {cores} cores, {policy.device.type}"
    )
    shared = f" on the same cores, busy {middle['work_s'] / middle['wall_s']:.0%} of the time with the two"
    where = (
        f"physics and rendering {middle['simulation_core_s']:.1f} core-seconds, policy {middle['policy_s']:.1f} s"
        f"{shared if policy.device.type == 'cpu' else ''}; simulators started in {middle['start_up_s']:.1f} s; results "
        f"as those of one environment: {all(run['identical'] for run in runs)}"
    )
    busy = others > OTHERS
    note = f"no wall-time ratio: others used {others:.1f} cores; {where}" if busy else where
    detail = {"runs": runs, "others_cores": others, "about": about}
    goal = f"<= {WORST}x the bound"
    return [
        Case(
            f"wall time against max(simulation / cores, policy): {about}", middle["wall_s"], middle["bound_s"], "s",
            None if busy else ratio, goal, None if busy else 1 / ratio <= WORST, note, detail,
        ),
        Case(
            "per control step, against one environment, batch 1, one action per inference", middle["step_s"],
            middle["one_step_s"], "s", None if busy else faster, "reported; >= 8x with 16 environments on a GPU", None,
            note, detail,
        ),
    ]  # fmt: skip


def _policy(tier: str) -> DitaPolicy:
    recipe = ["experiment=smoke" if tier == "quick" else "experiment=demo"]
    config = compose("train", recipe, TrainConfig)
    spec = load_embodiment("metaworld_sawyer")
    rng = np.random.default_rng(0)
    state, action = (rng.uniform(-1, 1, (100, dim)).astype(np.float32) for dim in (spec.state_dim, spec.action_dim))
    torch.manual_seed(0)
    contract = make_contract(config.preprocess, config.policy, [spec], [fit(spec, [(state, 0.001 * action)])])
    return DitaPolicy(config.policy, config.diffusion, contract).eval().requires_grad_(False)


def _timing(policy: DitaPolicy, n_action_steps: int | None = None) -> Timing:
    spec = load_embodiment("metaworld_sawyer")
    return Timing.of(spec, policy.config.n_obs_steps, n_action_steps or policy.config.n_action_steps)


def _together(
    policy: DitaPolicy, config: EvalConfig, starts: Sequence[Start]
) -> tuple[float, float, float, list[EpisodeResult]]:
    """Return wall seconds, the policy's, those before its first call, and the episodes, as `dita eval` plays them."""
    timed, began = Timed(policy), time.perf_counter()
    played, last = [], began
    for episode in rollout(
        timed, config.env, config.env.embodiment, starts, _timing(policy),
        n_envs=config.n_envs, batch_size=config.batch_size,
    ):  # fmt: skip
        played.append(episode)
        last = time.perf_counter()
    return last - timed.began, timed.seconds, timed.began - began, played


def _simulation(policy: DitaPolicy, config: EvalConfig, starts: Sequence[Start]) -> tuple[float, list[EpisodeResult]]:
    """Return the core-seconds of physics and rendering after the first policy call, and the episodes."""
    player, seconds, played = Player(config.env, _timing(policy), PLAIN), 0.0, []
    for i, start in enumerate(starts):
        cpu = time.process_time()
        turn, calls = player.start(start), 0
        seconds += (time.process_time() - cpu) * (i >= config.n_envs)  # the first ones start before that call
        while turn.ended is None:
            chunk = _predict(policy, turn.history, start, calls, config.batch_size)
            cpu = time.process_time()
            turn = player.run(chunk.values)
            seconds += time.process_time() - cpu
            calls += 1
        played.append(EpisodeResult(start.task, start.index, start.seed, replans=calls, latency=(), **turn.ended))
    player.close()
    return seconds, played


def _one_by_one(policy: DitaPolicy, config: EvalConfig, starts: Sequence[Start]) -> float:
    """Return wall seconds per control step of one environment, batch 1, one action per inference, starts left out."""
    player, seconds, steps = Player(config.env, _timing(policy, 1), PLAIN), 0.0, 0
    for start in starts:
        turn, calls = player.start(start), 0
        wall = time.perf_counter()
        while turn.ended is None:
            turn = player.run(_predict(policy, turn.history, start, calls, 1).values)
            calls += 1
        seconds += time.perf_counter() - wall
        steps += turn.ended["steps"]
    player.close()
    return seconds / steps


def _predict(policy: DitaPolicy, history: Any, start: Start, calls: int, batch_size: int) -> ActionChunk:
    return policy.predict_batch([history], [noise_seed(start, calls)], batch_size=batch_size)[0]


def _outcomes(episodes: Sequence[EpisodeResult]) -> list[EpisodeResult]:
    return sorted((replace(e, latency=()) for e in episodes), key=lambda e: e.index)
