"""The questions, their variants and the budget of an answer; imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Variant:
    """One line of a card."""

    name: str
    sampler: Mapping[str, Any] = field(default_factory=dict)  # changes of the checkpoint's DiffusionConfig
    eval: tuple[str, ...] = ()  # overrides of dita eval
    train: tuple[str, ...] = ()  # overrides of dita train


@dataclass(frozen=True)
class Question:
    """A card: the first variant is the baseline, and what we ship."""

    text: str
    variants: tuple[Variant, ...]
    equal_time: bool = False  # trained as long as the baseline, in wall time, instead of as many steps
    language: bool = False  # asked where only the sentence says what to do

    @property
    def trained(self) -> bool:
        """Whether variants differ in their training."""
        return any(v.train for v in self.variants)


SHIPPED = Variant("as shipped")
QUESTIONS: dict[str, Question] = {
    "spacing": Question(
        "Does trailing spacing of the denoising steps do better than leading, whose first step is not pure noise?",
        (Variant("leading"), Variant("trailing", {"timestep_spacing": "trailing"})),
    ),
    "denoising_steps": Question(
        "How many denoising steps does it take?",
        (Variant("10 steps"), *(Variant(f"{n} steps", eval=(f"num_inference_steps={n}",)) for n in (5, 20))),
    ),
    "n_action_steps": Question(
        "How many actions of a chunk should be executed before the next one? 1 is the official decoding.",
        (Variant("8 of 16"), *(Variant(f"{n} of 16", eval=(f"n_action_steps={n}",)) for n in (1, 4, 16))),
    ),
    "ensembling": Question(
        "Does averaging overlapping chunks, as ACT does, help where every step is planned anew?",
        (
            Variant("one action per inference", eval=("n_action_steps=1",)),
            Variant("the same, ensembled", eval=("n_action_steps=1", "temporal_ensembling=0.01")),
            Variant("four actions, ensembled", eval=("n_action_steps=4", "temporal_ensembling=0.01")),
        ),
    ),
    "robustness": Question(
        "What does a policy bear that was trained without any augmentation?",
        (
            SHIPPED,
            Variant("camera shifted by up to 1 cm", eval=("perturb.camera_shift=0.01",)),
            Variant("camera turned by up to 1 degree", eval=("perturb.camera_turn=0.0175",)),
            Variant("lamps 30 % up or down, by colour", eval=("perturb.light=0.3",)),
            Variant("30 % of another colour in every surface", eval=("perturb.texture=0.3",)),
            Variant("hand starts up to 3 cm away", eval=("perturb.start=0.03",)),
            Variant("paraphrased instruction", eval=("perturb.instruction=paraphrased",)),
            Variant("blank instruction", eval=("perturb.instruction=blank",)),
            Variant("instruction of the other task", eval=("perturb.instruction=swapped",)),
        ),
    ),
    "language": Question(
        "Does the sentence decide, where nothing else says which of three cylinders to touch?",
        (SHIPPED, *(Variant(f"{kind} instruction", eval=(f"perturb.instruction={kind}",))
                    for kind in ("paraphrased", "blank", "swapped"))),
        language=True,
    ),
    "frames": Question(
        "How many frames should the policy see?",
        (Variant("2 frames"), Variant("1 frame", train=("policy.n_obs_steps=1",)),
         Variant("4 frames", train=("policy.n_obs_steps=4",))),
    ),
    "noise_samples": Question(
        "How many noise samples per encoded context are best for the same wall time of training?",
        (Variant("K = 4"), *(Variant(f"K = {k}", train=(f"noise_samples_per_context={k}",)) for k in (1, 8))),
        equal_time=True,
    ),
    "state_tokens": Question(
        "Does the policy need to be told the robot's state?",
        (SHIPPED, Variant("pictures and words only", train=("policy.state_tokens=false",))),
    ),
    "action_attention": Question(
        "Should later actions inform earlier ones?",
        (Variant("causal"), Variant("bidirectional", train=("policy.action_attention=bidirectional",))),
    ),
    "objective": Question(
        "Flow matching with 5 Euler steps against diffusion with DDIM, on the same network?",
        (
            Variant("diffusion, DDIM"),
            Variant(
                "flow, 5 Euler steps",
                train=(
                    "diffusion.objective=flow", "diffusion.prediction_type=velocity", "diffusion.solver=euler",
                    "diffusion.clip_sample=null", "diffusion.num_inference_steps=5",
                ),
            ),
        ),
    ),
}  # fmt: skip
LANGUAGE_TASKS = ("touch-red", "touch-green", "touch-blue")
LANGUAGE_LONGER = 5  # times the steps: after 300 it touches the right one less often than by chance


@dataclass(frozen=True)
class Budget:
    """How much is spent on an answer."""

    tasks: tuple[str, ...]
    episodes: int  # unseen starts per task
    seeds: tuple[int, ...]  # of training
    steps: int  # of training
    batch_size: int
    demonstrations: int  # per task
    experiment: str
    checkpoints: tuple[str, ...]  # that are asked what needs no training; none: the baseline of each seed
    out: Path
    page: Path
    n_envs: int
