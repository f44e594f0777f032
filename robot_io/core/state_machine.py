"""IDLE -> ARMED -> HOLDING -> FAULT: who may move the arm, and what it takes to get there."""

from enum import Enum


class State(str, Enum):
    """What the guard does with actions."""

    IDLE = "IDLE"  # sends nothing
    ARMED = "ARMED"  # executes chunks; without one it holds
    HOLDING = "HOLDING"  # decelerates and holds; the next good chunk goes on
    FAULT = "FAULT"  # decelerates and holds until somebody arms again


TRANSITIONS = {
    (State.IDLE, "arm"): State.ARMED,
    (State.FAULT, "arm"): State.ARMED,
    (State.ARMED, "hold"): State.HOLDING,
    (State.HOLDING, "resume"): State.ARMED,
    (State.ARMED, "fault"): State.FAULT,
    (State.HOLDING, "fault"): State.FAULT,
    (State.ARMED, "disarm"): State.IDLE,
    (State.HOLDING, "disarm"): State.IDLE,
    (State.FAULT, "disarm"): State.IDLE,
}


class StateMachine:
    """The current state and why it was entered."""

    def __init__(self) -> None:
        self.state = State.IDLE
        self.reason = "started"

    def apply(self, event: str, reason: str) -> bool:
        """Follow an event and return whether the state changed; an event that the state does not know is ignored."""
        following = TRANSITIONS.get((self.state, event))
        if following is None:
            return False
        self.state, self.reason = following, reason
        return True
