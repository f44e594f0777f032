"""Jerk-limited online tracking of a moving goal (Ruckig: Berscheid and Kroeger, RSS 2021)."""

import math

import numpy as np
from ruckig import ControlInterface, InputParameter, OutputParameter, Result, Ruckig, Synchronization

from robot_io.core.limits import Limits

CATCH_UP_TICKS = 4  # an error of position is worked off in about so many ticks


def stop_distance(limits: Limits) -> float:
    """Return how far one axis travels from full speed to rest [m]: at full braking, plus half of what it is ramped."""
    v, a, j = (x / math.sqrt(3) for x in (limits.max_speed, limits.max_acceleration, limits.max_jerk))
    return v * v / (2 * a) + v * a / (2 * j)


class Tracker:
    """Follow a goal in 3 axes.

    While the goal moves, its velocity is followed, corrected by the error of position: following positions alone, each
    reached in least time, would accelerate and brake at every tick. When it rests, the path ends at rest on it.
    Each axis gets 1/sqrt(3) of the limits, so that their norm keeps them in every direction.
    """

    def __init__(self, limits: Limits, period: float) -> None:
        self._ruckig = Ruckig(3, period)
        self._input, self._output = InputParameter(3), OutputParameter(3)
        share = 1 / math.sqrt(3)
        self._period, self._max_velocity = period, share * limits.max_speed
        self._input.max_velocity = [self._max_velocity] * 3
        self._input.max_acceleration = [share * limits.max_acceleration] * 3
        self._input.max_jerk = [share * limits.max_jerk] * 3
        self._input.synchronization = Synchronization.No  # no axis waits for another: less lag
        self.restart(np.zeros(3))

    @property
    def position(self) -> np.ndarray:
        """Where the path is now [m]."""
        return np.array(self._input.current_position)

    @property
    def moving(self) -> bool:
        """Whether speed or acceleration are not yet zero."""
        return bool(np.any(np.abs(self._input.current_velocity) > 1e-9)) or bool(
            np.any(np.abs(self._input.current_acceleration) > 1e-6)
        )

    def restart(self, position: np.ndarray) -> None:
        """Begin at rest at `position` [m]."""
        self._input.current_position = list(position)
        self._input.current_velocity = self._input.current_acceleration = [0.0] * 3
        self._input.target_velocity = self._input.target_acceleration = [0.0] * 3
        self._ruckig.reset()

    def toward(self, goal: np.ndarray, velocity: np.ndarray) -> np.ndarray:
        """Advance one period toward a goal [m] that moves at `velocity` [m/s]; return the position [m]."""
        if not np.any(velocity):
            self._input.control_interface = ControlInterface.Position
            self._input.target_position = list(goal)
            self._input.target_velocity = [0.0] * 3
            return self._advance()
        error = goal - (self.position + self._period * np.array(self._input.current_velocity))
        return self._at_velocity(velocity + error / (CATCH_UP_TICKS * self._period))

    def brake(self) -> np.ndarray:
        """Advance one period on the fastest path to rest; return the position [m]."""
        return self._at_velocity(np.zeros(3)) if self.moving else self.position

    def _at_velocity(self, velocity: np.ndarray) -> np.ndarray:
        self._input.control_interface = ControlInterface.Velocity
        self._input.target_velocity = list(np.clip(velocity, -self._max_velocity, self._max_velocity))
        return self._advance()

    def _advance(self) -> np.ndarray:
        result = self._ruckig.update(self._input, self._output)
        if result not in (Result.Working, Result.Finished):
            return np.full(3, np.nan)  # the envelope check refuses it
        self._output.pass_to_input(self._input)
        return np.array(self._output.new_position)
