"""The operator's console: arm, slow down, approve chunk by chunk, take over, and see why it does not move."""

import contextlib
import select
import sys
import time
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from robot_io import messages as m
from robot_io.bus import COMMAND, LATCHED, STATE, Bus, open_bus
from robot_io.core.limits import Robot
from robot_io.nodes.guard import load_robot
from robot_io.nodes.topics import (
    APPROVAL,
    APPROVE,
    ARM,
    CHUNK,
    DIAGNOSTICS,
    EXECUTED,
    GUARD_STATE,
    RECORD,
    RECORD_STATE,
    SPEED,
    TAKEOVER,
    chunk_type,
)

SLOW = 0.25  # of the limits, in slow mode
SETTLE_S = 0.5  # until endpoints have found each other
KEPT = 100  # chunks, of which one may wait for approval
ANSWER_S = 5.0  # for a one-shot command
RECORD_COMMANDS = ("start", "stop", "discard", "seal")

HELP = (
    "a arm   d disarm   t take over   h hand back   s slow mode   + - speed   p approval on/off   y n approve or not   "
    "q leave"
)


class Console:
    """What an operator may order and what the graph says about itself; used by the console, teleop and `record`."""

    def __init__(self, bus: Bus, robot: Robot) -> None:
        self.bus = bus
        self.guard: Dict[str, Any] = {}  # /dita/state
        self.record: Dict[str, Any] = {}  # /dita/record_state
        self.diagnostics: Dict[str, Dict[str, Any]] = {}
        self.robot = robot
        self.chunks: Dict[int, Any] = {}  # the newest ones of the policy, by id
        self.latency: Optional[float] = None  # [s], of the newest executed chunk
        self._executed: Optional[float] = None
        self._arm = bus.publisher(ARM, m.BOOL, STATE)
        self._speed = bus.publisher(SPEED, m.FLOAT, STATE)
        self._approval = bus.publisher(APPROVAL, m.BOOL, STATE)
        self._approve = bus.publisher(APPROVE, m.STRING, STATE)
        self._takeover = bus.publisher(TAKEOVER, m.STRING, STATE)
        self._record = bus.publisher(RECORD, m.STRING, STATE)
        bus.subscribe(GUARD_STATE, m.STRING, LATCHED, self._json(self._on_guard))
        bus.subscribe(RECORD_STATE, m.STRING, LATCHED, self._json(self._on_record))
        bus.subscribe(DIAGNOSTICS, m.DIAGNOSTICS, STATE, self._on_diagnostics)
        bus.subscribe(CHUNK, chunk_type(robot), COMMAND, self._on_chunk)
        bus.subscribe(EXECUTED, chunk_type(robot), STATE, self._on_executed)

    @property
    def speed(self) -> float:
        """Return the scale of the limits, as the guard says."""
        return float(self.guard.get("speed", 1.0))

    @property
    def approval(self) -> bool:
        """Return whether chunks wait for approval, as the guard says."""
        return bool(self.guard.get("approval"))

    @property
    def pending(self) -> Optional[int]:
        """Return the chunk that waits."""
        return self.guard.get("pending")

    # ---- orders

    def arm(self, yes: bool) -> None:
        """Arm or disarm."""
        self._arm.publish(self.bus.msg(m.BOOL, data=yes))

    def set_speed(self, scale: float) -> None:
        """Scale the limits by (0, 1].

        Raises:
            ValueError: outside.
        """
        if not 0 < scale <= 1:
            raise ValueError(f"speed: a scale in (0, 1], got {scale}")
        self._speed.publish(self.bus.msg(m.FLOAT, data=float(scale)))

    def set_approval(self, on: bool) -> None:
        """Let chunks wait for approval, or not."""
        self._approval.publish(self.bus.msg(m.BOOL, data=on))

    def approve(self, chunk: int, yes: bool = True) -> None:
        """Let one chunk be executed, or have the next one wait in its place."""
        self._approve.publish(m.json_to_ros(self.bus.msg, {"chunk": chunk, "approved": yes}))

    def take_over(self, active: bool) -> None:
        """Give the arm to a human, or back to the policy."""
        self._takeover.publish(m.json_to_ros(self.bus.msg, {"active": active}))

    def order_record(self, command: str, **values: Any) -> None:
        """Start, stop, discard or seal."""
        assert command in RECORD_COMMANDS
        self._record.publish(m.json_to_ros(self.bus.msg, {"command": command, **values}))

    # ---- what is heard

    def _json(self, take: Callable[[Dict[str, Any]], None]) -> Callable[[Any], None]:
        def on_message(message: Any) -> None:
            try:
                take(m.json_from_ros(message))
            except (ValueError, KeyError, TypeError, AttributeError) as e:  # whatever somebody sends
                self.bus.log("error", f"not understood: {e}")

        return on_message

    def _on_guard(self, values: Dict[str, Any]) -> None:
        self.guard = dict(values)

    def _on_record(self, values: Dict[str, Any]) -> None:
        self.record = dict(values)

    def _on_diagnostics(self, message: Any) -> None:
        self.diagnostics.update(m.diagnostics_from_ros(message))

    def _on_chunk(self, message: Any) -> None:
        try:
            self.chunks[m.chunk_id_of(message)] = message
        except ValueError as e:
            self.bus.log("error", f"{CHUNK}: {e}")
        while len(self.chunks) > KEPT:
            del self.chunks[next(iter(self.chunks))]

    def _on_executed(self, message: Any) -> None:
        try:
            step = m.executed_from_ros(message, self.robot.space.rotation)
        except (ValueError, IndexError) as e:
            self.bus.log("error", f"{EXECUTED}: {e}")
            return
        if step.chunk != self._executed:
            self._executed, self.latency = step.chunk, self.bus.now() - step.chunk

    def wait(
        self,
        condition: Callable[[], bool],
        timeout_s: float,
        what: str,
        again: Callable[[], None] = lambda: None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Spin until `condition`, calling `again` every half second and `check` always.

        Raises:
            TimeoutError: it did not come true; says what, and what the guard said.
        """
        end, repeat = time.monotonic() + timeout_s, time.monotonic()
        while not condition():
            check()
            if time.monotonic() > end:
                said = self.guard.get("refused") or self.guard.get("reason") or "the guard says nothing"
                raise TimeoutError(f"{what}: nothing within {timeout_s:g} s; {said}")
            if time.monotonic() >= repeat:
                again()
                repeat += 0.5
            self.bus.spin(0.02)


# ---- keys and terminals


@contextlib.contextmanager
def terminal() -> Iterator[Callable[[], List[str]]]:
    """Give a function that returns the keys pressed since its last call; the terminal is restored whatever happens.

    Raises:
        ValueError: there is no terminal.
    """
    import termios
    import tty

    if not sys.stdin.isatty():
        raise ValueError("this needs a terminal; for scripts: dita robot operator command=arm")
    file = sys.stdin.fileno()
    before = termios.tcgetattr(file)
    tty.setcbreak(file)
    try:
        yield lambda: read_keys(file)
    finally:
        termios.tcsetattr(file, termios.TCSADRAIN, before)


def read_keys(file: int) -> List[str]:
    """Return the keys that wait on a file descriptor, without blocking; escape sequences (arrows) are left out."""
    import os

    data = b""
    while select.select([file], [], [], 0)[0]:
        part = os.read(file, 1024)
        if not part:
            break
        data += part
    keys, text = [], data.decode("utf-8", "ignore")
    while text:
        if text[0] == "\x1b" and len(text) > 1:  # ESC [ A and its like
            end = next((i for i, c in enumerate(text[2:], 2) if c.isalpha() or c == "~"), len(text) - 1)
            text = text[end + 1 :]
            continue
        keys.append(text[0])
        text = text[1:]
    return keys


# ---- one-shot commands


def one_shot(console: Console, command: str) -> str:
    """Give one order, wait until it is followed and return what the guard or the recorder then says.

    Args:
        command: arm, disarm, takeover, handback, slow, speed:0.3, approval:on, approval:off, approve:17, reject:17,
            record:start, record:stop, record:fail, record:discard, record:seal, status.

    Raises:
        ValueError: no such command, or a number that is none.
        TimeoutError: it was not followed; with the reason that was given.
    """
    name, _, value = command.partition(":")
    if name == "record" and value in (*RECORD_COMMANDS, "fail"):
        return _record(console, value)
    order, done = _order(console, command, name, value)
    console.wait(lambda: bool(console.guard), ANSWER_S, f"{GUARD_STATE} of the guard")
    console.wait(done, ANSWER_S, command, order)
    return guard_line(console)


def _order(console: Console, command: str, name: str, value: str) -> Tuple[Callable[[], None], Callable[[], bool]]:
    """Return what to publish and what the guard then says."""
    c = console
    if name in ("slow", "speed"):
        scale = SLOW if name == "slow" else _number(command, value)
        if not 0 < scale <= 1:
            raise ValueError(f"{command}: a scale in (0, 1]")
        return lambda: c.set_speed(scale), lambda: c.speed == scale
    if name in ("approve", "reject"):
        chunk = int(_number(command, value))
        return lambda: c.approve(chunk, name == "approve"), lambda: c.pending != chunk
    orders: Dict[str, Tuple[Callable[[], None], Callable[[], bool]]] = {
        "arm": (lambda: c.arm(True), lambda: c.guard.get("state") == "ARMED"),
        "disarm": (lambda: c.arm(False), lambda: c.guard.get("state") == "IDLE"),
        "takeover": (lambda: c.take_over(True), lambda: c.guard.get("source") == "teleop"),
        "handback": (lambda: c.take_over(False), lambda: c.guard.get("source") == "policy"),
        "approval:on": (lambda: c.set_approval(True), lambda: c.approval),
        "approval:off": (lambda: c.set_approval(False), lambda: not c.approval),
        "status": (lambda: None, lambda: True),
    }
    if command not in orders:
        raise ValueError(
            f"no command {command!r}; there are {', '.join(orders)}, slow, speed:SCALE, approve:CHUNK, reject:CHUNK, "
            f"record:{'|'.join((*RECORD_COMMANDS, 'fail'))}"
        )
    return orders[command]


def _record(console: Console, value: str) -> str:
    order = {"fail": {"command": "stop", "success": False}, "stop": {"command": "stop", "success": True}}
    console.wait(lambda: bool(console.record), ANSWER_S, f"{RECORD_STATE} of the recorder")
    before = console.record
    console.bus.spin(SETTLE_S)  # the recorder must have found this process before it is told, once
    console.order_record(**order.get(value, {"command": value}))
    console.wait(lambda: console.record.get("said") != before.get("said"), ANSWER_S, f"record:{value}")
    return record_line(console.record)


def _number(command: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"{command}: give a number after the colon, e.g. speed:0.3") from None


# ---- what is shown


def guard_line(console: Console) -> str:
    """Say in a line what the guard does and why."""
    guard = console.guard
    parts = [f"{guard.get('state', '-')}: {guard.get('reason', 'no guard heard')}"]
    if guard.get("refused"):
        parts.append(f"refused: {guard['refused']}")
    if guard.get("source"):
        parts.append(f"{guard['source']} is in control at {console.speed:.0%} of the limits")
    if console.pending is not None:
        parts.append(f"chunk {console.pending} waits for approval")
    return "; ".join(parts)


def record_line(record: Mapping[str, Any]) -> str:
    """Say in a line what the recorder does."""
    if not record:
        return "no recorder heard"
    text = f"{record.get('state', '-')}: {record.get('episodes', 0)} episodes"
    if record.get("state") == "recording":
        text += f", frame {record.get('frames', 0)}"
    return text + (f"; {record['reason']}" if record.get("reason") else "")


def picture(path: np.ndarray, width: int = 41, height: int = 11) -> List[str]:
    """Draw a path [n d] as text, x over y of its two widest dimensions; `o` is its begin, `X` its end."""
    path = np.asarray(path, float)
    spread = np.ptp(path, axis=0)
    a, b = np.sort(np.argsort(spread)[-2:]) if path.shape[1] > 1 else (0, 0)
    points = path[:, [a, b]]
    size = max(float(np.max(np.ptp(points, axis=0))), 1e-9)
    middle = 0.5 * (points.max(0) + points.min(0))
    columns = np.round((points[:, 0] - middle[0]) / size * (width - 1) * 0.98 + (width - 1) / 2).astype(int)
    rows = np.round((height - 1) / 2 - (points[:, 1] - middle[1]) / size * (height - 1) * 0.98).astype(int)
    grid = [[" "] * width for _ in range(height)]
    for column, row in zip(columns, rows, strict=True):
        grid[row][column] = "."
    grid[rows[0]][columns[0]], grid[rows[-1]][columns[-1]] = "o", "X"
    names = "xyz" if path.shape[1] == 3 else [f"[{i}]" for i in range(path.shape[1])]
    return ["".join(row) for row in grid] + [f"across {names[a]}, up {names[b]}, {1e3 * size:.1f} mm or mrad wide"]


def describe(values: np.ndarray, dt: float, delta: bool) -> List[str]:
    """Say in lines what a chunk does: from, to, length, top speed, and a picture of its path."""
    path = np.cumsum(values, axis=0) if delta else values
    steps = values if delta else np.diff(values, axis=0)
    speed = np.linalg.norm(steps, axis=1) / dt if len(steps) else np.zeros(1)
    moved = path[-1] - (np.zeros(path.shape[1]) if delta else path[0])
    return [
        f"{len(values)} steps of {1e3 * dt:.1f} ms; moves {np.round(moved, 4).tolist()}; top speed {speed.max():.3f}",
        *picture(np.vstack([np.zeros(path.shape[1]), path]) if delta else path),
    ]


class Screen:
    """The console on a terminal: keys in, a table out."""

    def __init__(self, console: Console, refresh: Callable[[Any], None]) -> None:
        self.console, self._refresh = console, refresh
        self.shown: Optional[int] = None  # the chunk that waits for y or n
        self.answered: Optional[int] = None  # the last one; the guard may still name it for a moment
        self.note = ""

    def press(self, key: str) -> bool:
        """Follow a key; return False to leave."""
        c = self.console
        if key == "q":
            return False
        if key in ("y", "n"):
            self._answer(key == "y")
        elif key in ("+", "-"):
            c.set_speed(round(float(np.clip(c.speed + (0.05 if key == "+" else -0.05), 0.05, 1.0)), 2))
        else:
            orders: Dict[str, Callable[[], None]] = {
                "a": lambda: c.arm(True),
                "d": lambda: c.arm(False),
                "t": lambda: c.take_over(True),
                "h": lambda: c.take_over(False),
                "s": lambda: c.set_speed(1.0 if c.speed <= SLOW else SLOW),
                "p": lambda: c.set_approval(not c.approval),
            }
            orders.get(key, lambda: None)()
        return True

    def _answer(self, yes: bool) -> None:
        if self.shown is None:
            return
        self.console.approve(self.shown, yes)
        self.answered = self.shown
        self.note, self.shown = f"chunk {self.shown} {'approved' if yes else 'left out'}", None

    def show(self) -> None:
        """Draw what is."""
        pending = self.console.pending
        self.shown = pending if pending != self.answered else None
        self._refresh(self._table())

    def _table(self) -> Any:
        from rich.table import Table

        c = self.console
        table = Table(show_header=False, title="dita operator")
        guard = c.diagnostics.get("guard", {}).get("values", {})
        table.add_row("guard", guard_line(c))
        table.add_row("speed", f"{c.speed:.0%} of the limits" + ("  SLOW" if c.speed <= SLOW else ""))
        table.add_row("approval", "each chunk waits for y" if c.approval else "off")
        table.add_row("latency", "-" if c.latency is None else f"{1e3 * c.latency:.0f} ms, image to first command")
        counts = "  ".join(f"{name} {float(guard.get(name, 0)):.0f}" for name in ("R0", "R1", "R2", "R3"))
        table.add_row("counters", f"{counts}  (dropped, clamped, held, fault)")
        table.add_row("recorder", record_line(c.record))
        if self.shown is not None:
            table.add_row(f"chunk {self.shown}", "\n".join(self._chunk_lines(self.shown)) + "\napprove? y / n")
        if self.note:
            table.add_row("", self.note)
        table.add_row("keys", HELP)
        return table

    def _chunk_lines(self, chunk: int) -> Sequence[str]:
        robot, message = self.console.robot, self.console.chunks.get(chunk)
        if message is None:
            return ["not seen here: it was sent before this console was there"]
        delta = robot.motion.mode == "delta"
        try:
            if robot.space.name == "joint":
                dt, values = m.joint_chunk_from_ros(
                    message, "velocities" if delta else "positions", robot.driver.joints
                )
            else:
                dt, values = m.cartesian_chunk_from_ros(message, delta, robot.space.rotation)
        except ValueError as e:
            return [f"not understood: {e}"]
        return describe(values[:, : robot.space.linear], dt, delta)


def run(*, bus: Mapping[str, Any], embodiment: Any, command: Optional[str] = None) -> None:
    """Run the console until q, or give one order and leave.

    Args:
        bus: arguments of `open_bus`.
        embodiment: the robot's file or plain values.
        command: as in `one_shot`; None: the console.
    """
    robot = load_robot(embodiment)[0]
    if command is not None:
        with contextlib.closing(open_bus(name="operator", **bus)) as opened:
            print(one_shot(Console(opened, robot), command))
        return
    from rich.live import Live

    with terminal() as keys, contextlib.closing(open_bus(name="operator", **bus)) as opened, Live() as live:
        screen = Screen(Console(opened, robot), live.update)
        leave = False
        while not leave:
            opened.spin(0.1)
            leave = not all([screen.press(key) for key in keys()])
            screen.show()
