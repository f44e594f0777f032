"""What is compared: methods, budgets and the plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

ROBOMIMIC_EPOCHS, ROBOMIMIC_UPDATES = 2000, 100  # published: epochs, and gradient steps of each


@dataclass(frozen=True)
class Budget:
    """How much is trained and played; the same for every method that uses a number."""

    demonstrations: int  # of the task
    steps: int  # of ours: gradient steps of `batch_size` observations
    batch_size: int
    epochs: int  # of robomimic: 100 gradient steps of 100 windows
    updates: int
    episodes: int  # unseen starts
    overrides: tuple[str, ...] = ()  # of `dita train`


BUDGETS = {
    "full": Budget(60, 600, 64, ROBOMIMIC_EPOCHS, ROBOMIMIC_UPDATES, 50),
    "small": Budget(60, 300, 32, 20, ROBOMIMIC_UPDATES, 50),
    "tiny": Budget(
        6, 2, 4, 1, 2, 2,
        ("policy.dim=64", "policy.layers=2", "policy.heads=2", "policy.ffn_dim=96", "diffusion.num_inference_steps=2"),
    ),  # does the whole road work? It learns nothing
}  # fmt: skip


@dataclass(frozen=True)
class Method:
    """One column of the comparison."""

    label: str
    network: Literal["dita", "unet", "state", "robomimic"]
    against: str | None  # the method that it is compared with
    overrides: tuple[str, ...] = ()  # of `dita train`
    plays: str | None = None  # another method whose checkpoint it plays; None: its own
    n_action_steps: int | None = None  # executed per inference; None: the checkpoint's

    @property
    def low_dim(self) -> bool:
        """Whether it sees objects as numbers instead of pictures."""
        return self.network in ("state", "robomimic")


FLOW = ("objective=flow", "prediction_type=velocity", "solver=euler", "clip_sample=null")
CLONING = "diffusion.objective=behaviour_cloning"
METHODS = {
    "dita": Method("Dita: DDIM, 8 of 16 actions per inference", "dita", None),
    "flow": Method("flow matching, as many Euler steps", "dita", "dita", tuple(f"diffusion.{x}" for x in FLOW)),
    "behaviour_cloning": Method("behaviour cloning of the chunk (L2), same trunk", "dita", "dita", (CLONING,)),
    "unet": Method("U-Net diffusion policy, same encoder", "unet", "dita"),
    "one_action": Method("Dita, one action per inference (official style)", "dita", "dita", (), "dita", 1),
    "dita_state": Method("Dita without eyes, objects as numbers", "state", None, ("policy.cameras=0",)),
    "robomimic_bc": Method("robomimic BC", "robomimic", "dita_state"),
    "robomimic_bc_rnn_gmm": Method("robomimic BC-RNN-GMM", "robomimic", "dita_state"),
    "robomimic_bc_transformer": Method("robomimic BC-Transformer", "robomimic", "dita_state"),
}


@dataclass(frozen=True)
class Job:
    """One method on one task with one training seed."""

    budget: str
    task: str
    method: str
    seed: int

    @property
    def key(self) -> str:
        """Its name in peers.json."""
        return f"{self.budget}/{self.task}/{self.method}/{self.seed}"


def jobs(budget: str, tasks: Sequence[str], methods: Sequence[str], seeds: Sequence[int]) -> list[Job]:
    """Return the plan: seed by seed, so that whatever is interrupted is a whole comparison of fewer seeds."""
    return [Job(budget, task, method, seed) for seed in seeds for task in tasks for method in methods]
