# mujoco ships no types for its compiled part
# pyright: reportAttributeAccessIssue=false
"""Our own suite in plain MuJoCo: three coloured cylinders, one start for every task, and the sentence decides.

Start and pictures depend on the seed alone, colours and places are independent of each other, and touching a wrong
cylinder fails the episode for good. So a policy that ignores the sentence wins a third of the `touch` tasks at most,
and the difference between the right, a blank and a swapped sentence is its use of language.

Frame: the table's middle at its top, x away from the hand's start, y to its left, z up.
"""

from __future__ import annotations

from typing import Any

import mujoco
import numpy as np
from jaxtyping import Float32, Float64

from dita.config import EnvConfig
from dita.embodiment import load_embodiment
from dita.envs import expect_known
from dita.envs.base import RobotEnv
from dita.envs.experts import choice_expert
from dita.types import EmbodimentSpec

COLOURS = {"red": "0.85 0.1 0.1 1", "green": "0.1 0.65 0.15 1", "blue": "0.1 0.2 0.9 1"}
VERBS = {"touch": "touch the {} cylinder", "push": "push the {} cylinder away"}
REWORDED = {
    "touch": ("reach for the {} cylinder", "put the tip onto the {} one", "go to the {} object"),
    "push": ("shove the {} cylinder forward", "move the {} one away from you", "slide the {} object away"),
}
INSTRUCTIONS = {f"{v}-{c}": text.format(c) for v, text in VERBS.items() for c in COLOURS}
PARAPHRASES = {f"{v}-{c}": tuple(t.format(c) for t in texts) for v, texts in REWORDED.items() for c in COLOURS}
TASKS = tuple(INSTRUCTIONS)

START = 1  # purpose of the random numbers that draw a start from its seed
SUBSTEP = 0.005  # [s]
RADIUS, HEIGHT = 0.022, 0.05  # [m] of a cylinder
TIP = 0.012  # [m] radius of the hand's tip
LOW, HIGH = np.array([-0.25, -0.25, TIP]), np.array([0.25, 0.25, 0.22])  # [m] where the tip can be sent
HOME = np.array([-0.17, 0.0, 0.12])  # [m]
ROWS = np.array([-0.11, 0.0, 0.11])  # [m] y of the three places; with the jitter no two are closer than 7 cm
PUSHED = 0.05  # [m] along x that count as pushed away
NUDGED = 0.005  # [m] that count as having moved a wrong one

CYLINDER = """
    <body name="{0}" pos="0 0 {2}">
      <joint name="{0}_x" type="slide" axis="1 0 0" damping="2" frictionloss="0.3"/>
      <joint name="{0}_y" type="slide" axis="0 1 0" damping="2" frictionloss="0.3"/>
      <geom name="{0}" type="cylinder" size="{3} {2}" rgba="{1}" mass="0.1" contype="2" conaffinity="3"/>
    </body>"""
SCENE = """
<mujoco model="choice">
  <option timestep="{substep}" integrator="implicitfast"/>
  <visual>
    <headlight ambient="0.45 0.45 0.45" diffuse="0.5 0.5 0.5" specular="0 0 0"/><global offwidth="640" offheight="640"/>
  </visual>
  <worldbody>
    <light pos="-0.3 0.3 1" dir="0.3 -0.3 -1" diffuse="0.3 0.3 0.3"/>
    <geom name="table" type="box" pos="0 0 -0.02" size="0.32 0.32 0.02" rgba="0.8 0.77 0.7 1" contype="0"
      conaffinity="0"/>
    <camera name="front" pos="-0.42 0 0.46" xyaxes="0 -1 0 0.73 0 0.68" fovy="36"/>
    <camera name="top" pos="0 0 0.75" xyaxes="0 -1 0 1 0 0" fovy="45"/>
    <body name="hand">
      <joint name="x" type="slide" axis="1 0 0" damping="20"/>
      <joint name="y" type="slide" axis="0 1 0" damping="20"/>
      <joint name="z" type="slide" axis="0 0 1" damping="20"/>
      <geom name="tip" type="sphere" size="{tip}" rgba="0.15 0.15 0.15 1" mass="0.3" contype="1" conaffinity="2"/>
      <geom name="rod" type="capsule" fromto="0 0 0 0 0 0.12" size="0.004" rgba="0.4 0.4 0.45 1" mass="0.1" contype="0"
        conaffinity="0"/>
    </body>{cylinders}
  </worldbody>
  <actuator>
    <position name="x" joint="x" kp="500"/>
    <position name="y" joint="y" kp="500"/>
    <position name="z" joint="z" kp="500"/>
  </actuator>
</mujoco>"""


def make(config: EnvConfig, task: str) -> ChoiceEnv:
    """Build the environment of one task."""
    return ChoiceEnv(load_embodiment(config.embodiment), task, config.max_steps, config.fast_render)


def swapped(task: str) -> str:
    """Return the sentence of the same verb and the next colour: in the same start, it asks for something else."""
    expect_known("task", task, TASKS)
    verb, colour = task.split("-")
    colours = list(COLOURS)
    return VERBS[verb].format(colours[(colours.index(colour) + 1) % len(colours)])


class ChoiceEnv(RobotEnv):
    """Touch or push away the cylinder that the sentence names; its start depends on the seed only.

    Success, at any step: `touch`, the tip touches the named cylinder; `push`, it lies 5 cm further away. Neither counts
    once the tip has touched another one or moved it by 5 mm. The state is the tip's position; cylinders are to be seen.
    """

    def __init__(self, embodiment: EmbodimentSpec, task: str, max_steps: int, fast_render: bool = True) -> None:
        super().__init__("choice", embodiment, TASKS, max_steps, fast_render)
        cylinders = "".join(CYLINDER.format(c, rgba, HEIGHT / 2, RADIUS) for c, rgba in COLOURS.items())
        self.model = mujoco.MjModel.from_xml_string(SCENE.format(substep=SUBSTEP, tip=TIP, cylinders=cylinders))
        self.data = mujoco.MjData(self.model)
        self._tip = self.model.geom("tip").id
        self._colour_of = {self.model.geom(colour).id: colour for colour in COLOURS}
        self._load(task)
        self._loaded()

    def _load(self, task: str) -> None:
        expect_known("task", task, TASKS)
        self.task, self.instruction = task, INSTRUCTIONS[task]
        self._verb, self._named = task.split("-")

    def _place(self) -> None:
        rng = np.random.default_rng([self.seed, START])
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:3] = HOME + rng.uniform(-0.02, 0.02, 3)
        x, y = rng.uniform(-0.06, 0.06, 3), rng.permutation(ROWS) + rng.uniform(-0.02, 0.02, 3)
        self.data.qpos[3:] = np.stack([x, y], 1).ravel()
        self.data.ctrl[:] = self.data.qpos[:3]
        mujoco.mj_step1(self.model, self.data)  # from here on positions and contacts are those of the current state
        self._begin = self.places
        self._wrong = False

    @property
    def _start_name(self) -> str:
        return "choice"  # the same start for every task

    def step(self, action: Float32[np.ndarray, "3"]) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Send the tip one SI step further, for 50 ms; the reward is 1 where the task is solved, else 0."""
        self.data.ctrl[:] = np.clip(self.data.ctrl + self.source_action(action), LOW, HIGH)
        for _ in range(round(1 / (self.embodiment.control_hz * SUBSTEP))):
            mujoco.mj_step2(self.model, self.data)
            mujoco.mj_step1(self.model, self.data)
            self.success |= self._judge()
        self.steps += 1
        return {"state": self.state}, float(self.success), self.success, self.steps >= self.max_steps, self._info()

    def _judge(self) -> bool:
        touched = self._touched()
        moved = {c: place - self._begin[c] for c, place in self.places.items()}
        others = moved.keys() - {self._named}
        self._wrong |= bool(touched & others) or any(np.linalg.norm(moved[c]) > NUDGED for c in others)
        if self._verb == "touch":
            return self._named in touched and not self._wrong
        return bool(moved[self._named][0] >= PUSHED) and not self._wrong

    def _touched(self) -> set[str]:
        pairs = (contact.geom for contact in self.data.contact) if self.data.ncon else ()
        return {self._colour_of[b if a == self._tip else a] for a, b in pairs if self._tip in (a, b)}

    @property
    def places(self) -> dict[str, Float64[np.ndarray, "2"]]:
        """Where the cylinders are [m], by colour: for the expert and the rule, never in the state."""
        return dict(zip(COLOURS, self.data.qpos[3:].reshape(3, 2).copy(), strict=True))

    @property
    def commanded_position(self) -> Float64[np.ndarray, "3"]:
        """Where the tip was sent [m]."""
        return self.data.ctrl.copy()

    @property
    def state(self) -> Float32[np.ndarray, "3"]:
        """The tip's position [m]."""
        return self.data.qpos[:3].astype(np.float32)

    def expert_action(self) -> Float32[np.ndarray, "3"]:
        """Return the scripted expert's action; it knows the task, not the sentence."""
        place, begin = self.places[self._named], self._begin[self._named]
        left = PUSHED + 0.01 - (place - begin)[0]  # [m] to push
        target = choice_expert(self.data.qpos[:3], place, self._verb, left, RADIUS + TIP, HEIGHT + TIP)
        low, high = self.action_space.low, self.action_space.high  # pyright: ignore
        return np.clip(target - self.data.ctrl, low, high).astype(np.float32)

    def _attributes(self) -> dict[str, Any]:
        return {"wrong": self._wrong}  # where the cylinders began follows from the seed

    def _restore(self, attributes: dict[str, Any]) -> None:
        self._wrong = attributes["wrong"]
