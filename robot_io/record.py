"""Demonstrations over topics with one command: twin with its expert, guard and recorder, and an operator that plays.

The expert's chunks go the way a human's do: over /dita/teleop and through the guard. What the store gets is what the
guard sent.
"""

import contextlib
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterator, Mapping, Optional, Sequence

from robot_io import messages as m
from robot_io.bus import STATE, Bus, open_bus
from robot_io.live import READY_S, Children, arguments_of, commands_of, guards_file, terminate_as_interrupt
from robot_io.nodes.guard import load_robot
from robot_io.nodes.operator import Console
from robot_io.nodes.topics import EPISODE, EPISODE_STATE

if TYPE_CHECKING:
    from dita.config import LiveConfig

NODES = ("twin", "guard", "recorder")
MAX_ATTEMPTS = 10  # per wanted episode
SILENT_S = 0.15  # before a reset, so that nobody takes the new start for a jump
HOLD_S = 0.2  # recorded after a success, so that a policy learns to stay
SEED = re.compile(r"/seed=(\d+)/")


class Desk:
    """The operator's part of a recording: reset, arm, take over, start, stop."""

    def __init__(self, bus: Bus, console: Console, check: Callable[[], None]) -> None:
        self.bus, self.console, self._check = bus, console, check
        self.episode: Dict[str, Any] = {}  # /dita/episode_state
        self._orders = bus.publisher(EPISODE, m.STRING, STATE)
        bus.subscribe(EPISODE_STATE, m.STRING, STATE, self._on_episode)

    def _on_episode(self, message: Any) -> None:
        self.episode = m.json_from_ros(message)

    def until(
        self,
        condition: Callable[[], bool],
        what: str,
        again: Callable[[], None] = lambda: None,
        timeout: float = READY_S,
    ) -> None:
        """Wait for `condition`; raises as `Console.wait`, and ChildProcessError when a process ended."""
        self.console.wait(condition, timeout, what, again, self._check)

    def join(self, timeout: float) -> None:
        """Wait for every process."""
        heard = (("twin", self, "episode"), ("guard", self.console, "guard"), ("recorder", self.console, "record"))
        for name, where, what in heard:
            self.until(lambda: bool(getattr(where, what)), f"{name}: first word", timeout=timeout)  # noqa: B023

    def reset(self, episode: int, task: str, seed: int) -> None:
        """Begin an episode in the twin and wait until it answers."""
        self.bus.spin(SILENT_S)
        order = m.json_to_ros(self.bus.msg, {"episode": episode, "task": task, "seed": seed})
        what = f"twin: reset to {task}, seed {seed}"
        self.until(lambda: self.episode.get("episode") == episode, what, lambda: self._orders.publish(order))

    def order_record(self, command: str, **values: Any) -> Mapping[str, Any]:
        """Tell the recorder something once and return what it then says."""
        said = self.console.record.get("said")
        self.console.order_record(command, **values)
        self.until(lambda: self.console.record.get("said") != said, f"recorder: {command}")
        return self.console.record

    def control(self, active: bool) -> None:
        """Arm and give the arm to the expert, or take both back."""
        c = self.console
        source, state = ("teleop", "ARMED") if active else ("policy", "IDLE")
        steps = [
            (lambda: c.guard.get("source") == source, f"guard: control to {source}", lambda: c.take_over(active)),
            (lambda: c.guard.get("state") == state, f"guard: {state}", lambda: c.arm(active)),
        ]
        for done, what, order in steps if active else reversed(steps):
            self.until(done, what, order)

    def play(self, tag: str, max_steps: int, timeout: float) -> str:
        """Record one episode; return "" if it was a success and is stored, else why not."""
        c = self.console
        state = self.order_record("start", tag=tag)
        if state["state"] != "recording":
            raise ValueError(f"recorder: {state['reason']}")
        self.control(True)

        def over() -> bool:
            broken = c.guard.get("state") == "FAULT" or c.record.get("state") != "recording"
            return broken or self.episode["success"] or self.episode["steps"] >= max_steps

        with contextlib.suppress(TimeoutError):
            self.until(over, "twin: the end of an episode", timeout=timeout)
        self.bus.spin(HOLD_S if self.episode["success"] else 0.0)
        reason = c.record.get("ended") or ("" if self.episode["success"] else "no success")
        if c.guard.get("state") in ("HOLDING", "FAULT"):
            reason = f"guard {c.guard['state']}: {c.guard.get('reason')}"
        state = self.order_record("discard") if reason else self.order_record("stop", success=True)
        self.control(False)
        if not reason and "stored" not in state["reason"].partition(":")[0].split():
            raise ValueError(f"recorder: {state['reason']}")
        return reason


def record(
    config: "LiveConfig", exist: str = "error", commands: Optional[Mapping[str, Sequence[str]]] = None
) -> Dict[str, Any]:
    """Record `config.episodes` successful demonstrations of the twin's expert into a sealed store.

    Start i has seed config.seed + i and the tasks take turns; what fails is discarded and the next start is tried.

    Args:
        config: every knob.
        exist: what to do with a store that is there: "error", "resume" (record what is missing) or "overwrite".
        commands: other command lines for some of the processes, for tests.

    Returns:
        The recorder's last word.

    Raises:
        FileExistsError: the store is there, and `exist` is "error".
        ValueError: the expert fails too often, or the recorder refuses.
        TimeoutError: a process did not answer; says which.
        ChildProcessError: a process ended by itself; with its name and last lines.
    """
    config = replace(config, expert=True)
    lines = commands_of(config, NODES, exist)
    seed = config.seed + _next_seed(config, exist)
    with contextlib.ExitStack() as stack:
        stack.enter_context(terminate_as_interrupt())
        children = stack.enter_context(Children())
        for name, command in {**lines, **(commands or {})}.items():
            children.start(name, command)
        bus = open_bus(name="record", **arguments_of(config)["twin"]["bus"])
        stack.callback(bus.close)
        desk = Desk(bus, Console(bus, load_robot(guards_file(config))[0]), children.check)
        desk.join(config.start_timeout)
        for text in _play_all(desk, config, seed):
            print(text)
        word = dict(desk.order_record("seal"))
    print(f"{config.store}: {word['episodes']} episodes; {word['reason']}")
    return word


def _play_all(desk: Desk, config: "LiveConfig", seed: int) -> Iterator[str]:
    attempts, failures = 0, 0
    while desk.console.record["episodes"] < config.episodes:
        done = desk.console.record["episodes"]
        task = config.env.tasks[done % len(config.env.tasks)]
        desk.reset(attempts, task, seed)
        reason = desk.play(f"{task}/seed={seed}", config.env.max_steps, config.episode_timeout)
        yield f"{done + (not reason)}/{config.episodes}  {task} seed {seed}: {reason or desk.console.record['reason']}"
        attempts, seed, failures = attempts + 1, seed + 1, failures + bool(reason)
        if failures >= MAX_ATTEMPTS * config.episodes:
            raise ValueError(f"only {done} of {config.episodes} demonstrations in {attempts} starts; last: {reason}")


def _next_seed(config: "LiveConfig", exist: str) -> int:
    """Return how many starts a store has used already, so that resuming repeats none."""
    if exist != "resume":
        return 0
    from dita.datasets.store import Store, StoreError

    try:
        sources = [episode.source for episode in Store(config.store).episodes]
    except (FileNotFoundError, StoreError):  # nothing sealed yet; the recorder says what is wrong with it
        return 0
    seeds = [int(found.group(1)) for found in map(SEED.search, sources) if found]
    return max((s + 1 - config.seed for s in seeds), default=0)
