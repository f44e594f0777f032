"""The faults: how each is injected, what must come of it, and where that differs from table A of the design."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.chaos_nodes import ROBOTS
from benchmarks.chaos_rig import CHUNKS, CLAMPED, IMAGES, JOINTS, POSE, ROOT, STATES, Rig, Void, matches
from robot_io.core.guard import SELF_CHECK_S
from robot_io.live import CHILD_ENV
from robot_io.nodes import topics as t

GOAL = (0.03, 0.15)  # fault -> deceleration, p50 and max [s]
STAND = 0.5  # deceleration -> standstill [s]
NAMED = 1.0  # until a text names the fault [s]
TICK_BOUND = (
    0.03  # a fault in the message itself: one tick at the guard, plus the wire both ways and a command's period
)
IN_FLIGHT = 0.2  # [s]: as GOAL, but the prediction that runs is still sent, and is a sign of life
GONE = "policy is gone|no action|no sign of life"
SECOND_S = 0.2  # that a second commander may be one
HOLD_S = 1.0  # that the shipped guard holds before it faults
CHUNK_S = 0.3  # of the rule's chunks
MARGIN = 0.01  # [m] that stays free between the arm and what it must keep out of
NEAR = 0.05  # [m]: nearer than the Panda is to itself at its start, so that the guard had to stop it
GRIPPER_WAIT = 5.0  # the rule opens and closes in turn, every pi seconds
DOMAINS = 8  # of ROS, used in turn


@dataclass(frozen=True)
class Expect:
    """What a repetition promised, and when its fault began."""

    t0: float
    names: str = ""  # regular expression; "": nothing needs to be said
    named_in: float = NAMED  # [s] from t0; more where the condition comes later than the injection
    stop: bool | None = True  # None: either
    bound: float = GOAL[1]  # condition -> deceleration [s]
    state: Sequence[str] = ("HOLDING", "FAULT")  # one of which was entered, for a stop
    after_queue: bool = False  # the condition is true when the last valid action is over, not at the injection
    problems: Sequence[str] = ()  # that the row itself found
    silent: bool = False  # the guard must not brake but say no more: the arm stops by itself
    frozen: float | None = None  # bound of the measured standstill, where nobody commands any more [s]
    near: bool = False  # the arm was driven at something: without a stop it would have come nearer than NEAR
    note: str = ""  # counted on the page
    wall: bool = (
        False  # the arm was driven at a limit of its position: it must come there, and names count from then on
    )
    held: bool = False  # one of `state` must be entered although nothing is said of a deceleration
    latest: float | None = None  # injection -> deceleration [s], where the condition comes later by itself
    honest: bool = True  # the state on the wire is the arm's, so that it must stay inside the workspace
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One fault of the table."""

    id: str
    fault: str
    reaction: str
    run: Callable[[Trial], Expect]
    variants: Sequence[Any] = (None,)
    robots: Sequence[str] = ("point",)  # in turn, after every round of the variants
    loss: Sequence[int] = (0,)  # per mille, per variant in turn
    control: bool = False  # the control run must be caught doing it
    phase: tuple[float, float] = (0.45, 0.9)  # [s] of steady motion before the fault, at random


@dataclass
class Trial:
    """A repetition: a rig in motion, a variant and random numbers."""

    rig: Rig
    variant: Any
    rng: np.random.Generator
    since: float

    def stopped(self, timeout_s: float = 2.0, more: float = 0.35) -> None:
        """Wait until the guard holds or faults, and a little longer; the verdict says if it did not."""
        with contextlib.suppress(TimeoutError):
            self.rig.until(lambda: self.rig.state in ("HOLDING", "FAULT", "IDLE"), timeout_s, "a stop")
        self.rig.spin(more)

    def faulted(self, timeout_s: float = 2.5, more: float = 0.35) -> None:
        """Wait until the guard faults, and a little longer."""
        with contextlib.suppress(TimeoutError):
            self.rig.until(lambda: self.rig.state == "FAULT", timeout_s, "FAULT")
        self.rig.spin(more)

    def refused(self, names: str, timeout_s: float = 2.0) -> list[str]:
        """Try to arm; return what is wrong if the guard arms or does not say why not."""
        rig = self.rig
        end = time.monotonic() + timeout_s
        rig.guard["refused"] = ""
        while time.monotonic() < end:
            rig.arm()
            rig.spin(0.15)
            if rig.state == "ARMED":
                return ["it armed"]
            if matches(names, rig.guard["refused"]):
                return []
        return [f"arming was refused with: {rig.guard['refused'] or 'nothing'}"]


def outgoing(topics: Sequence[str], **change: Any) -> dict[str, Any]:
    """Return an order that changes what is sent on some topics."""
    return {"out": {topic: change for topic in topics}}


def a1(trial: Trial) -> Expect:
    """NaN and Inf in an action: from the policy, and on the wire behind its own check."""
    how, value = trial.variant
    at = float(trial.rng.random())
    if how == "policy":
        fault = {"bad": value, "step": int(trial.rng.integers(24)), "dim": int(trial.rng.integers(7))}
        t0 = trial.rig.inject("policy", when="predicted", predict=fault)
    else:
        topic = t.CHUNK if how == "wire" else t.CHUNK_GRIPPER
        t0 = trial.rig.inject("policy", when="out", **outgoing([topic], bad=value, at=at))
    trial.faulted()
    return Expect(t0, "not finite|non-finite", bound=TICK_BOUND, state=("FAULT",))


def a2(trial: Trial) -> Expect:
    """The driver stops to send its state."""
    seconds = float(trial.rng.uniform(0.2, 1.0))
    if trial.variant == "short":
        t0 = trial.rig.inject("twin", when="out", **outgoing(STATES, drop=True, count=2))
        trial.rig.inject("twin", when=None)
        trial.rig.spin(0.6)
        return Expect(t0, stop=False)
    if trial.variant == "stopped":
        t0 = trial.rig.kill("twin", signal.SIGSTOP)
        trial.rig.spin(seconds)
        trial.rig.kill("twin", signal.SIGCONT)
    else:
        t0 = trial.rig.inject("twin", when="out", **outgoing(STATES, drop=True))
        trial.rig.spin(seconds)
        trial.rig.inject("twin", when=None)
    trial.faulted(1.0)
    trial.rig.spin(0.2)
    return Expect(t0, "state.*old|stale|no.* state", state=("FAULT",))


def a3(trial: Trial) -> Expect:
    """Cameras fall silent."""
    topics = IMAGES if trial.variant == "all" else [IMAGES[int(trial.rng.integers(2))]]
    t0 = trial.rig.inject("twin", when="out", **outgoing(topics, drop=True))
    trial.faulted(2.5)
    return Expect(t0, "image|camera|no action|observation", bound=0.28, state=("FAULT",))


def a4(trial: Trial) -> Expect:
    """Cameras repeat a picture, with its old stamp or with new ones."""
    t0 = trial.rig.inject("twin", when="out", **outgoing(IMAGES, freeze=trial.variant))
    trial.faulted(2.5)
    return Expect(t0, "image|camera|frozen|same picture|no action", bound=0.45, state=("FAULT",))


def a5(trial: Trial) -> Expect:
    """Stamps of the state are off, at the start and while running."""
    when, offset = trial.variant
    if when == "arming":
        trial.rig.idle()
        t0 = trial.rig.inject("twin", when="out", **outgoing(STATES, stamp=offset))
        trial.rig.spin(0.2)
        problems = trial.refused("old|future|clock|stamp|skew")
        return Expect(t0, "old|future|clock|stamp|skew", stop=None, problems=problems)
    t0 = trial.rig.inject("twin", when="out", **outgoing(STATES, stamp=offset))
    if abs(offset) < 0.05:
        trial.rig.spin(0.8)
        return Expect(t0, stop=False)
    trial.faulted(1.5)
    if -0.1 < offset < 0:  # as old as a state may be that was long on its way: no clock tells the two apart
        caught = trial.rig.state in ("HOLDING", "FAULT")
        return Expect(t0, stop=None, note=f"{-1e3 * offset:.0f} ms behind {'stopped' if caught else 'tolerated'}")
    return Expect(t0, "old|future|clock|stamp|skew|back|out of order", state=("FAULT",))


def a6(trial: Trial) -> Expect:
    """A clock jumps by ten seconds, in the driver or in the guard."""
    node, jump = trial.variant
    if node == "twin":
        t0 = trial.rig.inject(node, when="out", **outgoing([*STATES, *IMAGES], stamp=jump))
    else:
        t0 = trial.rig.inject(node, clock=jump)
    trial.stopped(1.5, 0.4)
    return Expect(t0, "clock|old|future|back|out of order|stamp")


def a7(trial: Trial) -> Expect:
    """One camera is late, ever more, or rare."""
    change = {"delay": 0.4, "over": 0.8} if trial.variant == "ramp" else {"keep": 12}
    t0 = trial.rig.inject("twin", when="out", **outgoing([IMAGES[1]], **change))
    trial.stopped(3.0)
    latest = 1.0 if trial.variant == "ramp" else 0.45  # until it is late enough, or rare enough, to be out of step
    return Expect(t0, "image|camera|not within|slop|no action|observation", after_queue=True, latest=latest)


def a8(trial: Trial) -> Expect:
    """Inference takes longer than the chunk lasts."""
    seconds = float(trial.variant)
    t0 = trial.rig.inject("policy", when="predict", predict={"sleep": seconds})
    trial.rig.inject("policy", when=None)
    if seconds < 0.15:
        trial.rig.spin(0.8)
        return Expect(t0, stop=False)
    trial.stopped(1.5)
    trial.rig.spin(max(0.0, t0 + seconds + 0.1 - time.monotonic()))
    return Expect(t0, "no action|late|queue", after_queue=True)


def a9(trial: Trial) -> Expect:
    """Chunks that do not fit onto each other: two policies in turn, or a wrong idea of the delay."""
    what, size = trial.variant
    size *= (0.5 if trial.rig.robot in ("joints", "panda") else 0.05) if what == "jump" else 1
    change = {"plus": size, "every": 2} if what == "jump" else {"stamp": -size, "every": 2}
    t0 = trial.rig.inject("policy", when="out", **outgoing([t.CHUNK] if what == "jump" else CHUNKS, **change))
    trial.rig.spin(1.2)
    return Expect(t0, stop=None)


def a10(trial: Trial) -> Expect:
    """Actions far out of range, or at the edges of it in turn."""
    if isinstance(trial.variant, str):
        return refused_checkpoint(trial)
    name, size = trial.variant
    t0 = trial.rig.inject("policy", when="predicted", predict={name: size})
    if abs(size) < 1:
        trial.rig.spin(1.0)
        return Expect(t0, stop=None)
    trial.stopped()
    return Expect(t0, "range|limit", bound=GOAL[1])


def refused_checkpoint(trial: Trial) -> Expect:
    """Give `dita robot policy` a checkpoint that is not what it says, or another arm's: it must not start."""
    t0, problems = time.monotonic(), []
    with tempfile.TemporaryDirectory() as at:
        broken_checkpoint(Path(at) / "policy", trial.variant)
        robot = robot_file(Path(at), trial.variant)
        domain = trial.rig.domain_id + DOMAINS  # not where the rig is
        arguments = [f"checkpoint={at}/policy", f"env.embodiment={robot}", f"domain_id={domain}", "bus=dds"]
        command = [sys.executable, "-m", "dita.cli", "robot", "policy", *arguments]
        environment = {**os.environ, **CHILD_ENV, "PYTHONPATH": str(ROOT)}
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, env=environment)
        except subprocess.TimeoutExpired:
            return Expect(t0, stop=None, problems=["dita robot policy has started"])
    said = (done.stdout + done.stderr).strip()
    if done.returncode == 0:
        problems.append("dita robot policy ended with code 0")
    if not matches(CHECKPOINTS[trial.variant], said):
        problems.append(f"dita robot policy did not name it: {said[-200:]}")
    return Expect(t0, stop=None, problems=problems, note="refused by dita robot policy" if not problems else "")


def broken_checkpoint(folder: Path, how: str) -> None:
    """Write a tiny policy for a simulated Sawyer, then damage it."""
    from benchmarks.stitching_rows import made_up
    from dita.checkpoint import save_policy
    from dita.cli import compose
    from dita.config import TrainConfig
    from dita.embodiment import load_embodiment

    config = compose("train", ["policy=dita_tiny"], TrainConfig).policy
    save_policy(made_up(load_embodiment("metaworld_sawyer"), config), folder)
    if how not in DAMAGE:
        return
    path, listed = folder / "contract.json", folder / "manifest.json"
    contract = json.loads(path.read_text())
    DAMAGE[how](contract["embodiments"]["metaworld_sawyer"]["stats"])
    path.write_text(json.dumps(contract))
    if how != "statistics":  # somebody who also edits the list of files
        files = json.loads(listed.read_text())
        data = path.read_bytes()
        files["files"]["contract.json"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        listed.write_text(json.dumps(files))


def robot_file(folder: Path, how: str) -> str:
    """Return the robot that the checkpoint is tried on: a name, or a file of the same name with other values."""
    if how not in OTHERS:
        return "metaworld_sawyer" if how in DAMAGE else "pusht"
    from dita.embodiment import embodiment_file

    values = yaml.safe_load(embodiment_file("metaworld_sawyer").read_text())
    OTHERS[how](values)
    path = folder / "robot.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def other_dims(robot: dict[str, Any]) -> None:
    """Give the first action one value more."""
    first = robot["action"][0]
    first |= {"size": first["size"] + 1, "low": [*first["low"], -1.0], "high": [*first["high"], 1.0]}


def other_camera(robot: dict[str, Any]) -> None:
    """Call the first camera something else."""
    robot["cameras"][0]["name"] = "elsewhere"


def scale_std(stats: dict[str, Any]) -> None:
    """Make every standard deviation ten times as large."""
    for values in stats["fields"].values():
        values["std"] = [10.0 * x for x in values["std"]]


def delete_key(stats: dict[str, Any]) -> None:
    """Forget one field."""
    del stats["fields"][sorted(stats["fields"])[0]]


def a11(trial: Trial) -> Expect:
    """Joints in another order, missing, unknown or twice, while running; mislabelled ones are the preflight's."""
    known = trial.rig.robot == "joints"  # the guard needs every joint's name; a point's gripper is the policy's alone
    how = trial.variant if known or trial.variant != "swap" else "drop"  # a point has one joint
    t0 = trial.rig.inject("twin", when="out", **outgoing([JOINTS], names=how))
    if how == "permute":  # names and values alike: another order means nothing
        trial.rig.spin(0.8)
        return Expect(t0, stop=False)
    if how == "add" and not known:
        trial.rig.spin(0.8)
        return Expect(t0, stop=None, note="added to a point's gripper: nobody's")
    if how == "swap":  # the values are plausible: only what does not follow its commands can show it
        trial.stopped(2.0)
        caught = trial.rig.state in ("HOLDING", "FAULT", "IDLE")
        return Expect(
            t0, stop=None, honest=False, note=f"swapped names {'stopped' if caught else 'NOT noticed'} by the guard"
        )
    trial.faulted(2.5)
    if known:
        return Expect(t0, "joint|name", bound=TICK_BOUND, state=("FAULT",))
    return Expect(t0, "joint|name|grip|observation", after_queue=True, latest=GOAL[1] + CHUNK_S)


def a12(trial: Trial) -> Expect:
    """Degrees for radians, millimetres for metres: in the state and in the action."""
    where, factor = trial.variant
    if where == "state":
        t0 = trial.rig.inject("twin", when="out", **outgoing(STATES, times=factor))
        trial.faulted(1.0)
        if factor < 1:  # zero, or nearly: plausible as long as the arm is within the leash of it
            caught = trial.rig.state == "FAULT"
            note = f"a state of {factor:g} times itself {'stopped' if caught else 'NOT noticed'}"
            return Expect(t0, stop=None, honest=False, note=note)
        return Expect(t0, "state|measured|workspace|unit|jump", bound=TICK_BOUND, state=("FAULT",), honest=False)
    t0 = trial.rig.inject("policy", when="out", **outgoing([t.CHUNK], times=factor))
    trial.stopped()
    gross = "another unit" in trial.rig.guard.get("reason", "")
    return Expect(t0, "range|limit|unit", bound=TICK_BOUND if gross else GOAL[1])


def a13(trial: Trial) -> Expect:
    """The gripper goes the other way, from the start or suddenly; then it must not arm, either."""
    rig = trial.rig
    if trial.variant == "start":
        rig.idle()
    begin = rig.driver(fault="gripper_inverted")
    if trial.variant == "start":
        rig.armed()
    with contextlib.suppress(TimeoutError):
        rig.until(lambda: rig.state == "FAULT", 2 * GRIPPER_WAIT + SELF_CHECK_S, "FAULT")
    rig.spin(0.3)
    # the first command that can show it is the second one after arming: from where to the first one is not known
    orders = [at for at in rig.gripper_at if begin < at < rig.guard_at - SELF_CHECK_S]
    t0 = orders[-1] + SELF_CHECK_S if orders else begin
    why = rig.guard.get("reason", "")
    right = rig.state == "FAULT" and "against its command" in why
    problems = [] if right else [f"with an inverted gripper: {rig.state}, {why}"]
    problems += trial.refused("against its command")
    rig.driver(off=True)
    rig.end("guard")  # it wants to be started anew
    rig.start("guard")
    rig.spin(1.0)
    return Expect(t0, "against its command", stop=None, problems=problems, extra={"seen_s": rig.guard_at - begin})


def a14(trial: Trial) -> Expect:
    """A policy for another robot, or with its cameras swapped."""
    rig = trial.rig
    if isinstance(trial.variant, str):
        return refused_checkpoint(trial)
    rig.idle()
    rig.end("policy")
    rig.end("guard")
    t0 = time.monotonic()
    rig.start("guard")
    rig.start("policy", hash="e" * 64, changes=trial.variant)
    rig.spin(3.0)
    problems = trial.refused("another robot than point: (name|action_dt|cameras)", 3.0)
    rig.end("policy")
    rig.end("guard")
    rig.start("guard")
    rig.start("policy")
    return Expect(t0, "", stop=None, problems=problems)


def a15(trial: Trial) -> Expect:
    """The policy is killed."""
    t0 = trial.rig.kill("policy", signal.SIGKILL)
    trial.faulted(2.5)
    trial.rig.start("policy")
    return Expect(t0, GONE, state=("FAULT",))


def a16(trial: Trial) -> Expect:
    """The policy hangs while its DDS threads live: stopped as a whole, or in an endless loop in a callback."""
    if trial.variant == "stopped":
        t0 = trial.rig.kill("policy", signal.SIGSTOP)
        trial.faulted(2.5)
        trial.rig.kill("policy", signal.SIGCONT)
        return Expect(t0, GONE, state=("FAULT",))
    t0 = trial.rig.inject("policy", when="hang", hang=2.2)
    trial.faulted(2.5)
    return Expect(t0, GONE, bound=IN_FLIGHT, state=("FAULT",))


def a17(trial: Trial) -> Expect:
    """The guard is killed; it comes back idle."""
    rig = trial.rig
    t0 = rig.kill("guard", signal.SIGKILL)
    rig.spin(0.6)
    rig.guard = {}
    rig.start("guard")
    begin = time.monotonic()
    rig.until(lambda: rig.state != "", 15.0, "the new guard's state")
    rig.spin(0.3)
    problems = [] if rig.state == "IDLE" else [f"the new guard is {rig.state}"]
    return Expect(t0, stop=None, frozen=0.2, problems=problems, extra={"restarted_s": time.monotonic() - begin})


def a18(trial: Trial) -> Expect:
    """The way from policy to guard is cut: nothing passes, only half of a chunk, or one chunk of many."""
    change = {"blackhole": {"drop": True}, "half": {"drop": True}, "slow": {"keep": 20}}[trial.variant]
    topics = [t.CHUNK_GRIPPER] if trial.variant == "half" else CHUNKS
    t0 = trial.rig.inject("policy", when="out", **outgoing(topics, **change))
    trial.stopped(2.0)
    return Expect(t0, "no action|policy", after_queue=True)


def a19(trial: Trial) -> Expect:
    """The policy is started anew, with the same or with another checkpoint.

    The same one may go on if the guard has held for no longer than its hold_timeout; in every other case nothing may
    move, with the new policy there and its chunks coming, until somebody arms.
    """
    rig, same = trial.rig, trial.variant == "same"
    contracts = len(rig.contracts)
    t0 = rig.kill("policy", signal.SIGTERM)
    rig.end("policy")
    rig.start("policy", hash="0" * 64 if same else "f" * 64)
    begin = time.monotonic()
    rig.until(lambda: len(rig.contracts) > contracts, 20.0, "the new policy's contract")
    back = time.monotonic() - begin
    with contextlib.suppress(TimeoutError):
        rig.until(lambda: rig.state in ("FAULT", "ARMED"), 2.0, "FAULT, or on in time")
    rig.spin(1.5)  # its chunks come
    problems, note = resumed([(at, s) for at, s in rig.history if at >= t0], same)
    steps = rig.steps
    rig.spin(0.3)
    if rig.state != "ARMED" and rig.steps != steps:
        problems.append(f"{rig.steps - steps} steps executed in {rig.state}")
    if same:
        rig.armed()
        rig.until(lambda: rig.steps > steps + 8, 10.0, "steps after arming")
    else:
        problems += trial.refused("contract", 4.0)
        rig.end("guard")
        rig.end("policy")
        rig.start("guard")
        rig.start("policy")
    return Expect(t0, GONE if same else f"{GONE}|contract", problems=problems, note=note, extra={"restarted_s": back})


def resumed(states: Sequence[tuple[float, str]], same: bool) -> tuple[list[str], str]:
    """Judge what a guard did, without being armed, while its policy was started anew.

    Args:
        states: (time [s], state) since the policy was killed.
        same: whether the new one has the same checkpoint.

    Returns:
        What is wrong, and what happened.
    """
    begin = next((at for at, s in states if s in ("HOLDING", "FAULT")), None)
    if begin is None:
        return ["it did not stop"], ""
    again = next((at for at, s in states if at > begin and s == "ARMED"), None)
    if again is None:
        last = states[-1][1]
        return ([] if last == "FAULT" else [f"{last} for more than {HOLD_S:g} s"]), "stayed in FAULT until armed"
    held, faulted = again - begin, any(s == "FAULT" for at, s in states if begin <= at < again)
    problems = []
    if not same:
        problems.append("it moves again with another checkpoint")
    if faulted or held > HOLD_S + 0.05:  # a tick and the wire
        problems.append(f"it moves again without being armed, {held:.2f} s later{', after FAULT' * faulted}")
    return problems, f"went on within the hold of {HOLD_S:g} s"


def a20(trial: Trial) -> Expect:
    """Chunks come again, late, or in the wrong order."""
    t0 = trial.rig.inject("replayer", how=trial.variant)
    trial.rig.spin(1.3)
    return Expect(t0, "duplicate|out-of-order|late chunk|R0 [1-9]", stop=False)


def a21(trial: Trial) -> Expect:
    """DDS packets get lost."""
    t0 = time.monotonic()
    while time.monotonic() < t0 + 3.0:
        trial.rig.arm()  # 20 % and more: it may stop, and must never leave the envelope
        trial.rig.spin(0.3)
    return Expect(t0, stop=False if trial.rig.loss <= 50 else None)


def a22(trial: Trial) -> Expect:
    """Somebody else offers the command topic."""
    t0 = trial.rig.inject("rogue", on=True, send=trial.variant)
    trial.faulted(1.5)
    problems = trial.refused("intruder", 1.0)
    trial.rig.inject("rogue")
    trial.rig.spin(0.3)
    return Expect(t0, "intruder", bound=0.2, state=("FAULT",), problems=problems)


def a23(trial: Trial) -> Expect:
    """The policy drives into a wall of the workspace."""
    rig = trial.rig
    t0 = rig.inject("policy", when="predict", predict={"toward": trial.variant})
    before = rig.clamped
    with contextlib.suppress(TimeoutError):  # seconds away, and diagnostics come once a second
        rig.until(lambda: rig.clamped > before or rig.state != "ARMED", 9.0, "the wall")
    rig.spin(0.5)
    return Expect(t0, f"{CLAMPED}|outside", stop=None, wall=True)


def a23_obstacle(trial: Trial) -> Expect:
    """The policy drives into a box, the table, the arm itself or a joint's limit."""
    way = TOWARD[trial.rig.robot][trial.variant]
    t0 = trial.rig.inject("policy", when="predict", predict={"toward": way})
    rig, limit = trial.rig, trial.variant == "limit"
    with contextlib.suppress(TimeoutError):  # when it is too near is for the guard to say
        rig.until(lambda: rig.state != "ARMED", 3.4, "a stop")
        t0 = rig.guard_at - 0.1
    rig.spin(max(0.6, t0 + 3.4 - time.monotonic() if limit else 0.0))
    named_in = NAMED + 2.0 * limit  # at 0.4 rad/s it is 2 s away
    return Expect(t0, CLAMPED if limit else "too near", stop=None, near=not limit, named_in=named_in)


def a25(trial: Trial) -> Expect:
    """The operator ends a process, or a callback raises."""
    what, node, value = trial.variant
    rig = trial.rig
    if what == "signal":
        t0 = rig.kill(node, value)
    elif what == "predict":
        t0 = rig.inject(node, when="predict raise", predict={"raise": True})
    else:
        t0 = rig.inject(node, when="raise", **{"raise": value})
    begin = time.monotonic()
    trial.stopped(2.0, 0.6)
    gone = what == "signal" or not rig.alive(node)
    problems = []
    if gone:
        with contextlib.suppress(TimeoutError):
            rig.until(lambda: not rig.alive(node), 5.0, f"{node} to end")
        if rig.alive(node):
            problems.append(f"{node} is still there after 5 s")
        elif what == "signal" and rig.processes[node].returncode != 0:
            problems.append(f"{node} ended with code {rig.processes[node].returncode}")
        if what != "signal" and not any("injected" in line for line in rig.lines[node]):
            problems.append(f"{node} does not say why it ended")
        rig.end(node)
        rig.start(node)
        rig.spin(1.0)
    names = {"guard": "stopped|disarmed|IDLE|injected|raised", "policy": f"{GONE}|injected"}[node]
    states = ("IDLE", "HOLDING", "FAULT")
    return Expect(
        t0,
        names,
        state=states,
        bound=GOAL[1] if node == "guard" or what == "predict" else IN_FLIGHT,
        problems=problems,
        extra={"gone_s": time.monotonic() - begin},
    )


def a26(trial: Trial) -> Expect:
    """The guard gets no processor."""
    rig = trial.rig
    t0 = time.monotonic()
    if trial.variant == "hogs":
        code = "import time\nend = time.monotonic() + 1.2\nwhile time.monotonic() < end: pass"
        hogs = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2 * (os.cpu_count() or 1))]
        rig.spin(1.4)
        for hog in hogs:
            hog.wait()
        return Expect(t0, stop=None)
    t0 = rig.kill("guard", signal.SIGSTOP)
    rig.spin(float(trial.rng.uniform(0.05, 0.3)))
    back = rig.kill("guard", signal.SIGCONT)
    trial.stopped(1.0, 0.4)
    names = "overrun|old|no action|clock|policy is gone|no sign of life"
    return Expect(back, names, stop=None, held=True)  # the reader cannot tell a pause from a deceleration


def restart(trial: Trial) -> Expect:
    """A process is killed, started again, and the arm moves on after arming."""
    rig, name = trial.rig, trial.variant
    t0 = rig.kill(name, signal.SIGKILL)
    rig.spin(float(trial.rng.uniform(0.1, 1.5)))
    rig.end(name)
    begin = time.monotonic()
    rig.start(name)
    rig.spin(1.0)
    return back_in_motion(trial, t0, begin)


def back_in_motion(trial: Trial, t0: float, begin: float) -> Expect:
    """Arm and require motion again."""
    problems = []
    try:
        trial.rig.idle()
        trial.rig.reset()  # a new twin waits for it
        trial.rig.move(0.5)
    except (TimeoutError, Void) as e:
        problems.append(str(e))
    return Expect(t0, stop=None, problems=problems, extra={"moving_again_s": time.monotonic() - begin})


def partition(trial: Trial) -> Expect:
    """The policy is cut off for some time and comes back."""
    t0 = trial.rig.kill("policy", signal.SIGSTOP)
    trial.faulted(2.5)
    trial.rig.spin(float(trial.rng.uniform(0.0, 2.0)))
    begin = trial.rig.kill("policy", signal.SIGCONT)
    trial.rig.spin(0.5)
    problems = [] if trial.rig.state == "FAULT" else [f"{trial.rig.state} without being armed"]
    after = back_in_motion(trial, t0, begin)
    return Expect(t0, GONE, state=("FAULT",), problems=[*problems, *after.problems], extra=after.extra)


def late_joiner(trial: Trial) -> Expect:
    """Every process starts anew, in a random order and seconds apart."""
    rig = trial.rig
    names = ["twin", "policy", "guard"]
    t0 = time.monotonic()
    rig.idle()
    for name in names:
        rig.end(name)
    rig.guard = {}
    begin = time.monotonic()
    for i in trial.rng.permutation(len(names)):
        rig.start(names[i])
        rig.spin(float(trial.rng.uniform(0.0, 1.5)))
    rig.until(lambda: rig.state != "", 15.0, "the guard's state")
    return back_in_motion(trial, t0, begin)


def second_guard(trial: Trial) -> Expect:
    """A second guard is started by mistake, and leaves again; neither may move the arm while both are there."""
    rig = trial.rig
    before = time.monotonic()
    rig.second, rig.second_history = {}, []
    rig.start("guard_2")
    try:
        rig.until(lambda: rig.state == "FAULT" and bool(rig.second), 15.0, "FAULT, and the second guard's state")
    except TimeoutError as e:
        rig.end("guard_2")
        return Expect(before, "second writer", stop=None, problems=[str(e)])
    t0 = next(at for at, s in rig.history if at > before and s == "FAULT")  # when it joined only the guard knows
    problems = trial.refused("second writer")
    with contextlib.suppress(TimeoutError):
        rig.until(lambda: matches("second writer", rig.second["refused"]), 2.0, "the second guard's no", rig.arm)
    armed, note = armed_for(rig.second_history), ""
    if armed > 0.0:  # asked before it had discovered the first one: a second commander, of whom A22 says how long
        note = "the second guard armed for a moment"
    if armed > SECOND_S:
        problems.append(f"the second guard was armed for {1e3 * armed:.0f} ms")
    if rig.second["state"] == "ARMED" or not matches("second writer", rig.second["refused"]):
        problems.append(f"the second guard: {rig.second['state']}, {rig.second['refused'] or 'nothing'}")
    rig.end("guard_2")
    begin = time.monotonic()
    rig.spin(3.5)  # a killed node is forgotten after its lease
    after = back_in_motion(trial, t0, begin)
    problems += after.problems
    return Expect(
        t0 - 0.3,
        "second writer",
        stop=None,
        held=True,
        state=("FAULT",),
        problems=problems,
        note=note,
        extra={**after.extra, "second_armed_ms": 1e3 * armed},
    )


def armed_for(states: Sequence[tuple[float, str]]) -> float:
    """Return the longest time that a guard was armed [s], from (time [s], state); until now if it still is."""
    ends = [at for at, _ in states[1:]] + [time.monotonic()]
    return max((end - at for (at, s), end in zip(states, ends, strict=False) if s == "ARMED"), default=0.0)


def a24(trial: Trial) -> Expect:
    """The arm's own stop is hit, and released."""
    rig = trial.rig
    t0 = rig.driver(fault="driver_mode", mode=trial.variant)
    trial.faulted(1.0, 0.3)
    rig.driver(off=True)
    rig.spin(0.5)
    problems = [] if rig.state == "FAULT" else [f"{rig.state} after the release"]
    return Expect(t0, trial.variant, bound=TICK_BOUND + 0.0125, state=("FAULT",), silent=True, problems=problems)


WALLS = ((1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1), (0.6, 0.6, -0.5))
GUARD_RAISES = tuple(("raise", "guard", where) for where in (POSE, t.CHUNK, "timer"))
SIGNALS = tuple(("signal", node, n) for n in (signal.SIGINT, signal.SIGTERM) for node in ("guard", "policy"))
PANDA_WAYS = {
    "box": (1, 0, 0, 0, 0, 0, 0), "table": (0, 1, 0, 0, 0, 0, 0), "itself": (0, 0, 0, -0.3, 0, -1, 0),
    "limit": (0, 0, 0, 0, 0, 1, 0),
}  # fmt: skip
TOWARD = {
    "arm": PANDA_WAYS, "panda": PANDA_WAYS,
    "boxed": {"box": (1, 0, 0), "table": (1, 0.2, 0), "itself": (1, 0, 0.2), "limit": (0, 0, 1)},
}  # fmt: skip
DAMAGE = {"statistics": scale_std, "statistics and manifest": scale_std, "key and manifest": delete_key}
OTHERS = {"same name, other dims": other_dims, "same name, other camera": other_camera}
CHECKPOINTS = {  # variant -> what must be named
    "same name, other dims": r"action\.\w+\.size is 3 for the policy and 4 here",
    "same name, other camera": r"cameras\.\w+\.name is '\w+' for the policy and 'elsewhere' here",
    "statistics": r"contract\.json", "statistics and manifest": "contract hash", "key and manifest": "contract hash",
    "another arm": "pusht",
}  # fmt: skip
BOTH = ("point", "joints")
ABSOLUTE = ("point_absolute", "joints")  # their circle is one in time: at first they catch up with it
ROWS = {row.id: row for row in (
    Row("A1", "NaN or Inf in an action", "R2 within a tick; R3 after 3 in 1 s", a1, control=True,
        robots=(*BOTH, "twist"),
        variants=[(how, value) for how in ("policy", "wire", "wire_gripper") for value in ("nan", "inf")]),
    Row("A2", "stale state: the driver stops", "R3", a2, robots=BOTH,
        variants=("stopped", "silent", "stopped", "short")),
    Row("A3", "a camera falls silent", "finish at most 100 ms, R2; R3 after 1 s", a3, variants=("all", "one")),
    Row("A4", "a camera repeats itself", "as A3", a4, variants=("old", "new")),
    Row("A5", "clock skew", "refuse to arm; running: R3", a5, variants=[
        *(("running", s * x) for x in (0.02, 0.06, 0.5, 3600.0) for s in (1, -1)),
        *(("arming", s * x) for x in (0.5, 3600.0) for s in (1, -1)),
    ]),
    Row("A6", "clock jumps", "R2; fresh data only", a6,
        variants=(("twin", -10.0), ("guard", -10.0), ("guard", 10.0), ("twin", 10.0))),
    Row("A7", "topics out of step", "R0; as A3 when none is valid", a7, variants=("ramp", "rare")),
    Row("A8", "inference late", "expired actions dropped, R2 when none is left", a8, variants=(0.5, 1.0, 2.0, 0.1)),
    Row("A9", "chunks do not join", "blend or R2, inside the envelope", a9, control=True,
        robots=("joints", "point_absolute"), variants=(("jump", 1), ("delay", 0.375), ("jump", -1), ("delay", -0.03))),
    Row("A10", "action out of range", "R1, then R2", a10, control=True,
        variants=(("times", 10.0), ("bang", 1.0), ("times", -10.0), ("bang", 0.25), ("times", 0.1), *DAMAGE)),
    Row("A11", "joint names", "by name only; R3", a11, robots=BOTH[::-1],
        variants=("permute", "swap", "drop", "duplicate", "add")),
    Row("A12", "units", "R3 in one tick", a12, robots=BOTH, variants=[
        (where, x) for x in (57.3, 1000.0, 0.001) for where in ("state", "action") if (where, x) != ("action", 0.001)
    ]),
    Row("A13", "gripper the other way round", "FAULT; refuse to arm", a13, variants=("start", "sudden")),
    Row("A14", "another robot's policy", "refuse to arm, name the field", a14, variants=(
        {"name": "other_arm"}, {"action_dt": 0.02}, {"cameras": ROBOTS["point"]["cameras"][::-1]},
        "another arm", *OTHERS,
    )),
    Row("A15", "policy killed", "R2, R3", a15, robots=(*BOTH, "twist")),
    Row("A16", "policy hangs", "R2, R3", a16, variants=("stopped", "loop")),
    Row("A17", "guard killed", "the driver holds within 100 ms; restart is IDLE", a17),
    Row("A18", "partition", "run out the chunk, end at rest", a18, variants=("blackhole", "half", "slow")),
    Row("A19", "policy restarted", "on within the hold of 1 s, else not until armed; another checkpoint: refused", a19,
        variants=("same", "other")),
    Row("A20", "late, duplicate, reordered chunks", "R0", a20, variants=("duplicate", "late", "reorder")),
    Row("A21", "packet loss 5, 20, 50 %", "5 %: no stop; never a violation", a21, loss=(50, 200, 500)),
    Row("A22", "second commander", "R3, by name", a22, robots=BOTH, variants=("nothing", "poses", "nan")),
    Row("A24", "protective stop, emergency stop", "FAULT within a tick; no motion on release", a24, robots=BOTH,
        variants=("protective_stop", "emergency_stop")),
    Row("A23", "collision, workspace", "stops inside", a23, robots=BOTH, variants=WALLS),
    Row("A23b", "boxes, the arm itself, joint limits", "stops 1 cm before", a23_obstacle, robots=("arm", "boxed"),
        variants=tuple(PANDA_WAYS)),
    Row("A25", "signals, exceptions", "R2, then exit", a25,
        variants=(*SIGNALS, *GUARD_RAISES, ("predict", "policy", None), ("raise", "policy", POSE))),
    Row("A26", "no processor for the guard", "R2, counted", a26, variants=("hogs", "stopped")),
    Row("R1", "kill and restart each process", "moves again after arming", restart,
        variants=("policy", "guard", "twin")),
    Row("R2", "partition and reconnect", "FAULT; moves again after arming", partition),
    Row("R3", "late joiners, any order", "moves after arming", late_joiner),
    Row("R4", "a second guard", "FAULT; moves again when it has left", second_guard),
)}  # fmt: skip
PHYSICAL = ("A1", "A2", "A8", "A9", "A13", "A15", "A16", "A23b", "A24")  # also with the Panda in MuJoCo
PANDA_ROWS = {f"{name}p": replace(ROWS[name], id=f"{name}p", robots=("panda",), control=False) for name in PHYSICAL}
NOT_PHYSICAL = {  # of the light rows, why MuJoCo would add nothing
    **dict.fromkeys(("A3", "A4", "A7"), "pictures, which are made up with either twin"),
    **dict.fromkeys(("A5", "A6", "A11", "A12"), "states are changed on the wire, behind either twin"),
    **dict.fromkeys(("A10", "A14"), "a chunk or a checkpoint is refused before anything moves otherwise than in A1"),
    **dict.fromkeys(("A18", "A19", "A20", "A21", "A22"), "between policy and guard; the arm only brakes, as in A15"),
    "A17": "the driver's timeout is the same code; it is measured where the lag is known",
    "A23": "the workspace is the tool's, for Cartesian commands; joints, boxes and the arm itself are A23bp",
    **dict.fromkeys(("A25", "A26", "R1", "R2", "R3", "R4"), "processes; the arm only brakes, as in A15"),
}  # fmt: skip
SEEN = "the judge sees it in the differences of a jerk-limited path: a tick, a command's period and the wire both ways"
PROMISES: dict[str, tuple[float | None, str, str]] = {  # row -> table A's bound [s], its words, what is tested here
    "A1": (0.01, "R2 in the same tick; R3 after 3 in 1 s",
        f"30 ms: {SEEN}; what the policy refuses itself is told at its next check, 20 ms; FAULT is required"),
    "A2": (0.1, "older than 50 ms: R3, decelerates within 100 ms",
        "150 ms from the first state that is missing: the shipped state_timeout is 100 ms, not 50; two missing states "
        "must not stop it"),
    "A3": (0.2, "image older than 150 ms: at most 100 ms of the chunk, then R2; R3 after 1 s",
        "280 ms from the first picture that is missing (the table's would be 200): with one silent camera the last "
        "valid instant counts until it is 150 ms old, so that the chunk of 300 ms is run out"),
    "A4": (0.35, "5 identical pictures + 100 ms, then as A3",
        "450 ms: pictures count as frozen once the arm has moved by 10 mm, and the first repetition is a period late"),
    "A5": (0.1, "running: R3 within 100 ms; refuse to arm, naming both hosts",
        f"150 ms to the deceleration: {SEEN}. FAULT is required, but not within a time: stamps that jump back are held "
        "first (A6) and fault after 1 s. 20 ms are tolerated (max_skew 50 ms) and must not stop it; a clock that is "
        "60 ms behind looks like a state that took 60 ms, which state_timeout (100 ms) allows"),
    "A6": (0.1, "R2; only fresh data, within 1 s", f"150 ms: {SEEN}; that it goes on is not judged"),
    "A7": (0.1, "drop; none valid for 150 ms: as A3",
        "150 ms from the end of the last valid action; from the injection 1 s (ramp), 450 ms (rare), as the condition "
        "comes with the delay"),
    "A8": (0.1, "R2 when the queue is empty, within 100 ms", f"150 ms from the end of the last valid action: {SEEN}"),
    "A9": (None, "inside the envelope, 0 violations", "the same; late by 30 steps and early by 30 ms, 2 policies"),
    "A10": (0.1, "R1, then R2 within 100 ms; other statistics: refuse to start",
        f"150 ms from the prediction: six of its steps (75 ms) are clamped first, and {SEEN}. By the action's limits; "
        "percentiles of the training data are the policy node's unit tests'"),
    "A11": (0.01, "by name only; missing, extra, twice: refuse to arm, show both lists",
        "while running: R3 within 30 ms for the guard's own joints; a gripper that only the policy reads: 150 ms from "
        "the end of the last valid action. Another order of names and values means nothing. Detected: missing, extra, "
        "twice, and two exchanged names if the measured values jump (more than the leash + twice the speed limit) or "
        "then do not follow their commands (twice the leash). NOT detected: two exchanged names while both joints read "
        "nearly the same; that is for the preflight, whose replay finds the joint order"),
    "A12": (0.01, "R3 in one tick; 0 commands outside",
        f"30 ms: {SEEN}; an action that is not beyond its limits by half their range (a delta: by ten ranges) is "
        "A10's: HOLDING within 150 ms. A state of 0.001 times itself is noticed where it jumps by more than the leash"),
    "A13": (None, "refuse to arm on disagreement", "FAULT 1 s after the first gripper command that can show it"),
    "A14": (None, "refuse to load, name the field", "the guard refuses to arm, dita robot policy to start, by field"),
    "A15": (0.15, "R2: decelerates within 150 ms; R3", "the same"),
    "A16": (0.15, "as A15",
        "the same; in a loop 200 ms, as the prediction that runs (30 ms, and its wait for the interpreter) is still "
        "sent and is a sign of life: the stream ends with it"),
    "A17": (0.1, "the driver holds within 100 ms; restart is IDLE",
        "the measured position stands within 200 ms: the timeout, a control step and the simulated arm's lag"),
    "A18": (0.1, "run out the chunk, end at rest, 0 jumps", f"150 ms from the end of the last valid action: {SEEN}"),
    "A19": (0.15, "no motion until the hash is equal, observations are fresh and, if held for > 1 s, it is re-armed",
        "the same, by the held time that was measured: the same checkpoint may go on within 1 s"),
    "A20": (None, "0 executed", "the same, and no stop"),
    "A21": (None, "5 %: no stop; 20 %: no violation; 50 %: R2",
        "50 %: R2 is not required, as chunks are repeated until they arrive: only no violation"),
    "A22": (0.2, "R3 within 200 ms, by name", "the same"),
    "A23": (None, "stops 1 cm before; 0 contacts",
        "the workspace's own walls: no command and no measured position beyond them; the 1 cm are A23b's. Named within "
        "1 s of the command that comes to the wall"),
    "A23b": (None, "stops 1 cm before; 0 contacts", "the same; a joint's own limit: no command beyond it"),
    "A24": (1 / 160, "nothing is sent after a tick; no motion on release",
        "42 ms from the order to the last command: the twin tells its mode at its next step (12.5 ms), and the wire "
        "three times"),
    "A25": (0.1, "R2 within 100 ms, gone within 5 s",
        f"the guard, and a prediction that raises: 150 ms: {SEEN}. The policy's process: 200 ms: its sign of life is "
        "missed after 100 ms, and the prediction that runs is one"),
    "A26": (None, "R2, counted, 0 violations",
        "no time: after a pause HOLDING or FAULT is required; beside hogs only no violation"),
    **dict.fromkeys(("R1", "R2", "R3"), (None, "recovery (issue)", "moves again once armed, not before")),
    "R4": (None, "recovery (issue)",
        "the first guard is in FAULT and neither arms while both are there; a second one that is asked before it has "
        "discovered the first is in FAULT within 200 ms, as A22 has it; then the first moves again"),
}  # fmt: skip
HELPERS = {"A20": "replayer", "A22": "rogue"}  # processes that a row needs besides
