"""Jerk-limited online tracking of a moving goal (Ruckig: Berscheid and Kroeger, RSS 2021), on any space."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from ruckig import ControlInterface, InputParameter, OutputParameter, Result, Ruckig, Synchronization, Trajectory

from robot_io.core.limits import Bounds
from robot_io.core.space import Space

CATCH_UP_TICKS = 4  # an error of position is worked off in about so many ticks


@dataclass(frozen=True, eq=False)
class Motion:
    """A state of the path: where, and velocity and acceleration as tangents."""

    configuration: np.ndarray
    velocity: np.ndarray
    acceleration: np.ndarray

    @cached_property
    def moving(self) -> bool:
        """Whether speed or acceleration are not yet zero."""
        return bool(np.any(np.abs(self.velocity) > 1e-9)) or bool(np.any(np.abs(self.acceleration) > 1e-6))


class Tracker:
    """Follow a goal, each axis by itself, so that braking from anywhere on the path ends inside the position limits.

    While the goal moves, its velocity is followed, corrected by the error of position: following positions alone, each
    reached in least time, would accelerate and brake at every tick. When it rests, the path ends at rest on it.
    Each axis of a group gets its part of the group's limits, so that their norm keeps them in every direction. Every
    tick's step is a tangent from the last configuration: a rotation is integrated on its group, and its increments are
    those of a path in a plain vector space with the same limits.
    """

    def __init__(self, space: Space, bounds: Bounds, period: float) -> None:
        self.space, self.bounds, self.period = space, bounds, period
        self.scale = 1.0  # of the speed; braking keeps its limits
        n = space.tangent
        self._ruckig, self._input, self._output = Ruckig(n, period), InputParameter(n), OutputParameter(n)
        self._path = Trajectory(n)
        self._speed = bounds.per_axis(bounds.speed)
        self._input.max_acceleration = bounds.per_axis(bounds.acceleration).tolist()
        self._input.max_jerk = bounds.per_axis(bounds.jerk).tolist()
        self._input.synchronization = Synchronization.No  # no axis waits for another: less lag
        self._zeros = [0.0] * n
        self._input.target_acceleration = self._zeros
        self.restart(space.origin)

    @property
    def configuration(self) -> np.ndarray:
        """Where the path is now."""
        return self.motion.configuration

    @property
    def moving(self) -> bool:
        """Whether speed or acceleration are not yet zero."""
        return self.motion.moving

    def restart(self, x: np.ndarray) -> None:
        """Begin at rest at a configuration."""
        self.motion = Motion(x, np.zeros(self.space.tangent), np.zeros(self.space.tangent))

    def take(self, motion: Motion) -> None:
        """Go on from a motion that one of the following returned."""
        self.motion = motion

    def toward(self, goal: np.ndarray, velocity: np.ndarray) -> Motion:
        """Return the motion after one period toward a goal that moves at `velocity` [tangent/s]."""
        error = self.space.difference(goal, self.motion.configuration)
        if np.any(velocity):
            ahead = error - self.period * self.motion.velocity
            wanted = self._at_velocity(velocity + ahead / (CATCH_UP_TICKS * self.period))
        else:
            wanted = self._at_position(error)
        return self._inside(wanted)

    def brake(self) -> Motion:
        """Return the motion after one period on the fastest path to rest."""
        return self._at_velocity(np.zeros(self.space.tangent)) if self.moving else self.motion

    def stop(self, motion: Motion) -> np.ndarray:
        """Return where braking from a motion ends."""
        return self.way(motion, 2)[1]

    def way(self, motion: Motion, count: int) -> np.ndarray:
        """Return configurations [count n], about evenly along the way of braking from a motion, ends included."""
        self._plan_stop(motion)
        shares = 1 - np.sqrt(1 - np.linspace(0, 1, count))  # of the time: it slows down
        positions = [self._path.at_time(share * self._path.duration)[0] for share in shares.tolist()]
        return np.array([self.space.retract(motion.configuration, np.array(position)) for position in positions])

    def _inside(self, wanted: Motion) -> Motion:
        """Let each axis brake that could not stop inside its limits after the wanted step."""
        n = self.space.linear
        self._plan_stop(wanted)
        reach = self._path.position_extrema
        x = wanted.configuration
        over = [
            i for i in range(n) if x[i] + reach[i].min < self.bounds.low[i] or x[i] + reach[i].max > self.bounds.high[i]
        ]
        if not over:
            return wanted
        braked = self.brake()
        new = Motion(x.copy(), wanted.velocity.copy(), wanted.acceleration.copy())
        for i in over:
            new.configuration[i] = braked.configuration[i]
            new.velocity[i], new.acceleration[i] = braked.velocity[i], braked.acceleration[i]
        return new

    def _plan_stop(self, motion: Motion) -> None:
        self._from(motion)
        self._input.control_interface = ControlInterface.Velocity
        self._input.target_velocity = self._zeros
        self._ruckig.calculate(self._input, self._path)

    def _at_position(self, target: np.ndarray) -> Motion:
        self._from(self.motion)
        self._input.control_interface = ControlInterface.Position
        self._input.max_velocity = (self.scale * self._speed).tolist()
        self._input.target_position = target.tolist()
        self._input.target_velocity = self._zeros
        return self._advance()

    def _at_velocity(self, velocity: np.ndarray) -> Motion:
        self._from(self.motion)
        self._input.control_interface = ControlInterface.Velocity
        limit = self.scale * self._speed
        self._input.target_velocity = np.clip(velocity, -limit, limit).tolist()
        return self._advance()

    def _from(self, motion: Motion) -> None:
        """Plan from a motion, in tangents of its own configuration."""
        self._input.current_position = self._zeros
        self._input.current_velocity = motion.velocity.tolist()
        self._input.current_acceleration = motion.acceleration.tolist()

    def _advance(self) -> Motion:
        self._ruckig.reset()
        if self._ruckig.update(self._input, self._output) not in (Result.Working, Result.Finished):
            nan = np.full(self.space.tangent, np.nan)
            return Motion(np.full(self.space.size, np.nan), nan, nan)  # the envelope check refuses it
        step = np.array(self._output.new_position)
        x = self.space.retract(self.motion.configuration, step)
        return Motion(x, np.array(self._output.new_velocity), np.array(self._output.new_acceleration))
