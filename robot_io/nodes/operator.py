"""The operator's console: arm, slow down, approve chunk by chunk, take over, and see why it does not move."""

import contextlib
import select
import sys
import time
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from robot_io import messages as m
from robot_io.bus import COMMAND, LATCHED, STATE, Bus, open_bus
from robot_io.core.limits import Robot, parse_robot
from robot_io.nodes.topics import (
    APPROVAL,
    APPROVE,
    ARM,
    CHUNK,
    CONTRACT,
    DIAGNOSTICS,
    EXECUTED,
    GUARD_STATE,
    RECORD,
    RECORD_STATE,
    SPEED,
    TAKEOVER,
)

SLOW = 0.25  # of the limits, in slow mode
ANSWER_S = 5.0  # for a one-shot command
RECORD_COMMANDS = ("start", "stop", "discard", "seal")

HELP = (
    "a arm   d disarm   t take over   h hand back   s slow mode   + - speed   p approval on/off   y n approve or not   "
    "q leave"
)


class Console:
    """What an operator may order and what the graph says about itself; used by the console, teleop and `record`."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.guard: Dict[str, Any] = {}  # /dita/state
        self.record: Dict[str, Any] = {}  # /dita/record_state
        self.diagnostics: Dict[str, Dict[str, Any]] = {}
        self.robot: Optional[Robot] = None
        self.speed, self.approval, self.takeover = 1.0, False, False
        self.chunk: Any = None  # the newest
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
        bus.subscribe(CONTRACT, m.STRING, LATCHED, self._json(self._on_contract))
        bus.subscribe(DIAGNOSTICS, m.DIAGNOSTICS, STATE, self._on_diagnostics)
        bus.subscribe(CHUNK, m.CARTESIAN_TRAJECTORY, COMMAND, self._on_chunk)
        bus.subscribe(EXECUTED, m.CARTESIAN_TRAJECTORY, STATE, self._on_executed)

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
        self.speed = scale
        self._speed.publish(self.bus.msg(m.FLOAT, data=float(scale)))

    def set_approval(self, on: bool) -> None:
        """Let chunks wait for approval, or not."""
        self.approval = on
        self._approval.publish(self.bus.msg(m.BOOL, data=on))

    def approve(self, chunk: int) -> None:
        """Let one chunk be executed."""
        self._approve.publish(m.json_to_ros(self.bus.msg, {"chunk": chunk}))

    def take_over(self, active: bool) -> None:
        """Give the arm to a human, or back to the policy."""
        self.takeover = active
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

    def _on_contract(self, values: Dict[str, Any]) -> None:
        self.robot = parse_robot(values["embodiment"])

    def _on_diagnostics(self, message: Any) -> None:
        self.diagnostics.update(m.diagnostics_from_ros(message))

    def _on_chunk(self, message: Any) -> None:
        self.chunk = message

    def _on_executed(self, message: Any) -> None:
        stamp = m.stamp_of(message)
        if stamp != self._executed:
            self._executed, self.latency = stamp, self.bus.now() - stamp

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
    """Give one order, wait for the answer and return it as a line.

    Args:
        command: arm, disarm, takeover, handback, slow, speed:0.3, approval:on, approval:off, approve:17, status,
            record:start, record:stop, record:fail, record:discard, record:seal.

    Raises:
        ValueError: no such command, or the guard refused.
        TimeoutError: nobody answered.
    """
    name, _, value = command.partition(":")
    wait = console.wait
    wait(lambda: bool(console.guard) or name == "record", ANSWER_S, f"{GUARD_STATE} of the guard")
    if name in ("arm", "disarm"):
        wanted = "ARMED" if name == "arm" else "IDLE"
        wait(lambda: console.guard.get("state") == wanted, ANSWER_S, name, lambda: console.arm(name == "arm"))
    elif name in ("takeover", "handback"):
        _repeat(console, lambda: console.take_over(name == "takeover"))
    elif name in ("slow", "speed"):
        scale = SLOW if name == "slow" else _number(command, value)
        _repeat(console, lambda: console.set_speed(scale))
    elif name == "approval" and value in ("on", "off"):
        _repeat(console, lambda: console.set_approval(value == "on"))
    elif name == "approve":
        console.approve(int(_number(command, value)))
        console.bus.spin(0.5)
    elif name == "record" and value in (*RECORD_COMMANDS, "fail"):
        before = dict(console.record)
        orders = {"fail": {"command": "stop", "success": False}, "stop": {"command": "stop", "success": True}}
        order = orders.get(value, {"command": value})
        wait(lambda: bool(console.record), ANSWER_S, f"{RECORD_STATE} of the recorder")
        before = dict(console.record)
        console.order_record(**order)
        wait(lambda: console.record != before, ANSWER_S, command)
        return record_line(console.record)
    elif name != "status":
        raise ValueError(
            f"no command {command!r}; there are arm, disarm, takeover, handback, slow, speed:S, approval:on|off, "
            f"approve:CHUNK, record:start|stop|fail|discard|seal, status"
        )
    return guard_line(console)


def _number(command: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"{command}: give a number after the colon, e.g. speed:0.3") from None


def _repeat(console: Console, order: Callable[[], None]) -> None:
    """Give an order that may be given twice, until the readers have had time to find this process."""
    for _ in range(3):
        order()
        console.bus.spin(0.3)


# ---- what is shown


def guard_line(console: Console) -> str:
    """Say in a line what the guard does and why."""
    guard = console.guard
    parts = [f"{guard.get('state', '-')}: {guard.get('reason', 'no guard heard')}"]
    if guard.get("refused"):
        parts.append(f"refused: {guard['refused']}")
    parts += [f"{name} {guard[name]}" for name in ("source", "speed", "approval", "waiting") if guard.get(name)]
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
        self.shown: Any = None  # the chunk that waits for y or n
        self.note = ""

    def press(self, key: str) -> bool:
        """Follow a key; return False to leave."""
        c = self.console
        if key == "q":
            return False
        if key in ("y", "n") and self.shown is not None:
            chunk = chunk_id(self.shown)
            if key == "y":
                c.approve(chunk)
            self.note, self.shown = f"chunk {chunk} {'approved' if key == 'y' else 'left out'}", None
        elif key in "+-":
            c.set_speed(float(np.clip(c.speed + (0.05 if key == "+" else -0.05), 0.05, 1.0)))
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

    def show(self) -> None:
        """Draw what is."""
        c = self.console
        if c.approval and self.shown is None and c.chunk is not None:
            self.shown, c.chunk = c.chunk, None  # it stays on the screen until it is answered
        if not c.approval:
            self.shown = None
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
            table.add_row(f"chunk {chunk_id(self.shown)}", "\n".join(self._chunk_lines()) + "\napprove? y / n")
        if self.note:
            table.add_row("", self.note)
        table.add_row("keys", HELP)
        return table

    def _chunk_lines(self) -> Sequence[str]:
        robot = self.console.robot
        if robot is None:
            return [f"no contract on {CONTRACT} yet, so its numbers mean nothing"]
        delta = robot.motion.mode == "delta"
        try:
            dt, values = m.cartesian_chunk_from_ros(self.shown, delta)
        except ValueError as e:
            return [f"not understood: {e}"]
        return describe(values, dt, delta)


def chunk_id(message: Any) -> int:
    """Return a chunk's running number."""
    return 0


def run(*, bus: Mapping[str, Any], command: Optional[str] = None) -> None:
    """Run the console until q, or give one order and leave.

    Args:
        bus: arguments of `open_bus`.
        command: as in `one_shot`; None: the console.
    """
    if command is not None:
        with contextlib.closing(open_bus(name="operator", **bus)) as opened:
            print(one_shot(Console(opened), command))
        return
    from rich.live import Live

    with terminal() as keys, contextlib.closing(open_bus(name="operator", **bus)) as opened, Live() as live:
        screen = Screen(Console(opened), live.update)
        leave = False
        while not leave:
            opened.spin(0.1)
            leave = not all([screen.press(key) for key in keys()])
            screen.show()
