"""Row 8: a live node against bare inference and an HTTP server."""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.harness import OTHERS, Case, busy_cores
from benchmarks.stitching_rows import made_up
from dita.checkpoint import save_policy
from dita.cli import compose
from dita.config import TrainConfig
from dita.embodiment import canonical_json, embodiment_to_dict, load_embodiment
from dita.types import EmbodimentSpec

IMAGE_HZ, STATE_HZ, TICK_HZ = 10.0, 100.0, 100.0
WARM_UP = 8  # images of a round until the server joins; as many again until it counts
INFERENCE_STEPS = 5  # a tick well below the camera's period: else each waits for the last one, and that is measured
SIZE = (480, 640)
INSTRUCTION_TEXT = "press the button"


def bench_arm() -> EmbodimentSpec:
    """Return a Sawyer that is commanded at 50 Hz and seen at 10 Hz by a VGA camera."""
    spec = load_embodiment("metaworld_sawyer")
    camera = replace(spec.cameras[0], height=SIZE[0], width=SIZE[1])
    return replace(spec, name="bench_arm", cameras=(camera,), obs_dt=0.1, action_dt=0.02, control_hz=50.0)


class Arm:
    """The benchmark's own side of the graph: an arm that follows at once, a camera, an operator and a reader."""

    def __init__(self, bus: Any, spec: EmbodimentSpec) -> None:
        from robot_io import messages as m
        from robot_io.bus import COMMAND, LATCHED, SENSOR, STATE
        from robot_io.nodes import topics as t

        self.m, self.bus, self.camera = m, bus, spec.cameras[0].name
        self.hand, self.guard, self.policy, self.diagnostics = np.array([0.0, 0.6, 0.2]), {}, {}, {}
        self.chunks: list[tuple[float, float]] = []  # (image stamp, latency [s]) as chunks arrive here
        self.holds = 0  # times that the guard stopped for want of an action, or worse
        self.commands: list[float] = []  # when commands arrive here [s]
        self.begin, self.sent = 0.0, []  # of `run`: steady time, and the images' stamps [s]
        self._pose, self._joints = (
            bus.publisher(t.TOOL_POSE, m.POSE, STATE),
            bus.publisher(t.JOINTS, m.JOINT_STATE, STATE),
        )
        self._image = bus.publisher(t.image_topic(self.camera), m.IMAGE, SENSOR)
        self._words, self._arm = bus.publisher(t.INSTRUCTION, m.STRING, LATCHED), bus.publisher(t.ARM, m.BOOL, STATE)
        bus.subscribe(t.TARGET_POSE, m.POSE, COMMAND, self._on_command)
        bus.subscribe(t.CHUNK, m.CARTESIAN_TRAJECTORY, COMMAND, self._on_chunk)
        bus.subscribe(t.GUARD_STATE, m.STRING, LATCHED, self._on_guard)
        bus.subscribe(t.POLICY_STATE, m.STRING, LATCHED, lambda x: self.policy.update(m.json_from_ros(x)))
        bus.subscribe(t.DIAGNOSTICS, m.DIAGNOSTICS, STATE, lambda x: self.diagnostics.update(m.diagnostics_from_ros(x)))
        self._words.publish(bus.msg(m.STRING, data=INSTRUCTION_TEXT))

    def _on_guard(self, message: Any) -> None:
        self.guard.update(self.m.json_from_ros(message))
        self.holds += self.guard["state"] in ("HOLDING", "FAULT")

    def _on_command(self, message: Any) -> None:
        self.hand = self.m.pose_from_ros(message)[0]
        self.commands.append(time.monotonic())

    def _on_chunk(self, message: Any) -> None:
        stamp = self.m.stamp_of(message)
        self.chunks.append((stamp, self.bus.now() - stamp))

    def order(self, armed: bool) -> None:
        """Arm or disarm."""
        self._arm.publish(self.bus.msg(self.m.BOOL, data=armed))

    def run(self, images: Sequence[np.ndarray] | None, until: Any, timeout_s: float = 60.0) -> None:
        """Publish state at 100 Hz, and images at 10 Hz, until `until(images sent)`."""
        begin, states, sent = time.monotonic(), 0, 0
        self.begin, self.sent = begin, []
        while not until(sent):
            passed = time.monotonic() - begin
            if passed > timeout_s:
                raise TimeoutError(f"node_latency: nothing within {timeout_s:g} s; guard {self.guard}")
            if passed * STATE_HZ >= states:
                states = int(passed * STATE_HZ) + 1
                stamp = self.bus.now()
                self._pose.publish(self.m.pose_to_ros(self.bus.msg, stamp, self.hand, "base_link"))
                self._joints.publish(self.m.joints_to_ros(self.bus.msg, stamp, {"gripper": 0.5}))
            if images is not None and passed * IMAGE_HZ >= sent:
                stamp = self.bus.now()
                self.sent.append(stamp)
                image = images[sent % len(images)]
                self._image.publish(self.m.image_to_ros(self.bus.msg, stamp, image, self.camera))
                sent += 1
            self.bus.spin(max(0.0, begin + states / STATE_HZ - time.monotonic()))

    def acted(self) -> list[tuple[int, float]]:
        """Return (index of the image, latency [s]) of every chunk of this `run`."""
        first, sent = self.sent[0] - 1e-3, np.array(self.sent)
        return [(int(np.argmin(np.abs(sent - stamp))), late) for stamp, late in self.chunks if stamp >= first]


def _pictures() -> list[np.ndarray]:
    return list(np.random.default_rng([0, 8]).integers(0, 256, (8, *SIZE, 3), np.uint8))


def _over_http(port: int, begin: float, indices: Sequence[int], acts: int) -> Iterator[tuple[float, float]]:
    """Yield (image -> actions, inference alone) [s] of the images that are acted on, every second one from `acts` on.

    Image i is due at `begin` + i camera periods of the machine's monotonic clock.
    """
    link, pictures = http.client.HTTPConnection("127.0.0.1", port, timeout=30), _pictures()
    for i in indices:
        time.sleep(max(0.0, begin + i / IMAGE_HZ - time.monotonic()))
        stamp, act = time.time(), i % 2 == acts
        values = {"state": [0.0, 0.6, 0.2, 0.5], "instruction": INSTRUCTION_TEXT, "stamp": stamp}
        link.request(
            "POST", "/act" if act else "/see", pictures[i % 8].tobytes(), {"X-Observation": json.dumps(values)}
        )
        answer = json.loads(link.getresponse().read())
        if act:
            yield time.time() - stamp, answer["seconds"]


def _http_rows(*arguments: Any) -> list[tuple[float, float]]:
    from robot_io.nodes.serve import keep_memory

    keep_memory()
    return list(_over_http(*arguments))


def node_latency(tier: str) -> list[Case]:
    """Row 8: image stamp -> chunk through real processes over DDS, against the bare tick and an HTTP server.

    Both see every image and act on every second one, by turns, while the guard is armed: the node on one, the server on
    the next. So both have the same load around them, in the same seconds. The bare tick is what the server's process
    spends in `predict`. The processes are started several times, and the median start counts: where they come to lie
    makes a difference.
    """
    starts, rounds, images = (5, 2, 80) if tier == "full" else (1, 1, 2 * WARM_UP + 4)
    others = busy_cores()
    return _latency_cases([_start(rounds, images) for _ in range(starts)], others)


def _start(rounds: int, images: int) -> dict[str, Any]:
    """Start policy, guard and server, and measure some rounds."""
    from robot_io.bus import open_bus
    from robot_io.live import Children
    from robot_io.nodes.serve import be_nice, keep_memory

    config = compose("train", ["policy=dita_tiny"], TrainConfig).policy
    spec, domain = bench_arm(), 87
    with TemporaryDirectory() as folder, ExitStack() as stack:
        at, robot = f"{folder}/policy", Path(folder) / "bench_arm.json"
        save_policy(made_up(spec, config), Path(at))
        robot.write_text(canonical_json(embodiment_to_dict(spec)), encoding="utf-8")
        children = stack.enter_context(Children())
        port = _free_port()
        children.start("http", [sys.executable, "-m", "benchmarks.act_server", at, str(port), str(INFERENCE_STEPS)])
        bus_arguments = {"kind": "dds", "domain_id": domain}
        policy = {
            "bus": bus_arguments, "checkpoint": at, "embodiment": str(robot), "seed": 0,
            "num_inference_steps": INFERENCE_STEPS,
            "device": "cpu", "precision": "fp32", "path": "auto", "slop": 0.033, "max_age": 0.15, "interval": 0.0,
        }  # fmt: skip
        guard = {
            "bus": bus_arguments, "embodiment": embodiment_to_dict(spec), "require_preflight": False,
            "tick_hz": TICK_HZ, "state_timeout": 0.1, "stream_timeout": 0.1, "hold_timeout": 1.0, "max_skew": 0.05,
            "clamp_margin": 0.25,
        }  # fmt: skip
        for name, arguments in (("policy", policy), ("guard", guard)):
            children.start(name, [sys.executable, "-m", "robot_io.nodes", name, json.dumps(arguments), "--with-parent"])
        bus = open_bus(name="bench", **bus_arguments)
        stack.callback(bus.close)
        stack.callback(be_nice, os.nice(0))
        keep_memory()  # as every node
        be_nice(-10)  # camera, arm and readers are other machines: they do not wait for those that compute
        arm = Arm(bus, spec)
        # of a process of its own: in a thread it would wait for the interpreter that publishes the arm
        client = stack.enter_context(ProcessPoolExecutor(1, multiprocessing.get_context("spawn")))
        return _measure_rounds(arm, children, client, port, rounds, images)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _measure_rounds(
    arm: Arm, children: Any, client: ProcessPoolExecutor, port: int, rounds: int, images: int
) -> dict[str, Any]:
    node, http_, bare, gaps, holds, together, acts = [], [], [], [], 0, 0, [0]
    pictures, served = _pictures(), []
    _wait_http(port, children)
    client.submit(_http_rows, port, 0.0, [0, 1], 0).result()  # its imports are done before anything is timed

    def acting(_: int) -> bool:
        children.check()
        if arm.policy.get("ok") and arm.guard.get("state") != "ARMED":
            arm.order(True)
        return arm.guard.get("state") == "ARMED" and len(arm.chunks) > 0

    def over(sent: int) -> bool:
        if sent == WARM_UP and not served:
            acts[0] = (arm.acted()[-1][0] + 1) % 2  # the images that the node leaves out
            served.append(client.submit(_http_rows, port, arm.begin, range(sent, images), acts[0]))
        return sent >= images

    for _ in range(rounds):
        arm.chunks.clear()
        arm.run(pictures, acting)
        commands, held = len(arm.commands), arm.holds
        arm.run(pictures, over)
        measured = [(i, seconds) for i, seconds in arm.acted() if i >= 2 * WARM_UP]
        node += [seconds for _, seconds in measured]
        together += sum(i % 2 == acts[0] for i, _ in measured)
        rows = served.pop().result()[WARM_UP // 2 :]
        http_ += [total for total, _ in rows]
        bare += [alone for _, alone in rows]
        holds += arm.holds - held
        gaps += [b - a for a, b in pairwise(arm.commands[commands:])]
        arm.order(False)
        arm.run(None, lambda _: arm.guard.get("state") == "IDLE")
    stages = {name: {k: float(v) for k, v in arm.diagnostics.get(name, {}).get("values", {}).items() if _is_number(v)}
              for name in ("guard", "policy")}  # fmt: skip
    asked = rounds * (images - 2 * WARM_UP) // 2
    return {"node": node, "http": http_, "bare": bare, "gaps": gaps, "holds": holds, "together": together,
            "asked": asked, **stages}  # fmt: skip


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _wait_http(port: int, children: Any) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        children.check()
        with contextlib.suppress(OSError):
            list(_over_http(port, 0.0, [0], 0))
            return
        time.sleep(0.2)
    raise TimeoutError("node_latency: the HTTP server did not start")


def _stages(policy: Mapping[str, float]) -> str:
    """Say where the time of the node goes, by its own diagnostics."""
    age, predict, sent = (
        1e3 * policy.get(f"{name}.average", math.nan) for name in ("observation_age", "execution_time", "latency")
    )
    return (
        f"on average {age:.1f} ms from the image's stamp until inference begins (transport, pairing, threads), "
        f"{predict:.1f} ms of inference, {sent - age - predict:.1f} ms to check, build and send the chunk"
    )


def _latency_cases(starts: Sequence[dict[str, Any]], others: float) -> list[Case]:
    if not all(start["node"] for start in starts):
        raise TimeoutError("node_latency: no chunk came over the wire")
    found: dict[str, Any] = {key: [x for s in starts for x in s[key]] for key in ("node", "http", "bare", "gaps")}
    found |= {key: sum(s[key] for s in starts) for key in ("holds", "together", "asked")}
    for name in ("guard", "policy"):
        found[name] = {key: median(s[name].get(key, math.nan) for s in starts) for key in starts[0][name]}
    # [s], of each start
    times = {(side, q): [float(np.percentile(s[side], q)) for s in starts]
             for side in ("node", "http", "bare") for q in (50, 99)}  # fmt: skip
    detail = {
        "of_starts": {
            **{f"{side} p{q}": values for (side, q), values in times.items()},
            "guard": [s["guard"] for s in starts],
        },
        "seconds": {k: found[k] for k in ("node", "http", "bare")},
        "guard": found["guard"],
        "policy": found["policy"],
        "together": found["together"],
        "others_cores": others,
    }
    quiet = others <= OTHERS
    noise = "" if quiet else f"no wall-time ratio: others used {others:.1f} cores"
    cases, where = [], noise or f"node_latency: {_stages(found['policy'])}"
    for peer in ("bare", "http"):
        for q in (50, 99):
            pairs = list(zip(times["node", q], times[peer, q], strict=True))
            ratio = median(theirs / ours for ours, theirs in pairs)
            over = median(ours - (1.05 * theirs + 2e-3 if q == 50 else 1.2 * theirs) for ours, theirs in pairs)
            goal = ("<= 1.05x + 2 ms" if q == 50 else "<= 1.2x") if peer == "bare" else "reported"
            name = f"image to chunk over DDS, p{q}, against {'the bare tick' if peer == 'bare' else 'an HTTP server'}"
            met = over <= 0 if quiet and peer == "bare" else None
            ours, theirs = median(times["node", q]), median(times[peer, q])
            cases.append(Case(name, ours, theirs, "s", ratio if quiet else None, goal, met, where, detail))
    period, std = 1 / TICK_HZ, found["guard"].get("periodicity.standard_deviation", math.nan)
    bad = not quiet or math.isnan(std)
    cases.append(Case("jitter of the guard's period", std if not math.isnan(std) else None, period, "s",
                      None if bad else period / std, "<= 5 % of the period", None if bad else std <= 0.05 * period,
                      noise or "node_latency: periods as the guard measured them, periods as the peer",
                      {"arrival_std_s": float(np.std(found["gaps"])) if found["gaps"] else None}))  # fmt: skip
    late = sum(s > 1 / IMAGE_HZ for s in found["node"]) + max(0, found["asked"] - len(found["node"]))
    under = found["holds"]
    cases.append(Case("underruns of the command stream", float(under), None, "",
                      float(under == 0) if quiet else None, "0", under == 0 if quiet else None,
                      noise or f"node_latency: {late} of {found['asked']} chunks later than a camera period",
                      {"deadline_misses": late, "overruns": found["guard"].get("overruns")}))  # fmt: skip
    return cases
