"""robomimic 0.3.0's BC, BC-RNN-GMM and BC-Transformer, on low-dimensional demonstrations: its own code trains and acts.

    .venv/bin/pip install --no-deps --target build/peers robomimic==0.3.0 termcolor==3.3.0
    PYTHONPATH=build/peers make peers

It asks for torchvision, which does not load beside this torch and which only its image encoders use, so empty modules
stand in its place while robomimic is imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from safetensors.torch import load_model, save_model

from benchmarks.peers_low_dim import action_limits, state_fields
from dita.checkpoint import read_json, write_json
from dita.types import ActionChunk, EmbodimentSpec, RawObservation

INSTALL = ".venv/bin/pip install --no-deps --target build/peers robomimic==0.3.0 termcolor==3.3.0"
EPOCHS, UPDATES = 2000, 100  # published: epochs, and gradient steps of each; batches of 100
CONTEXT = 10  # frames that RNN and Transformer see
# what differs from robomimic's default BC config, as published: for low-dimensional, machine-generated data
# (scripts/generate_paper_configs.py) BC has lr 1e-3 and no GMM; RNN and GMM as for demonstrations of people;
# the Transformer from the template bc_transformer.json
PUBLISHED: dict[str, dict[str, Any]] = {
    "robomimic_bc": {"algo": {"optim_params": {"policy": {"learning_rate": {"initial": 1e-3}}}}},
    "robomimic_bc_rnn_gmm": {
        "train": {"seq_length": CONTEXT},
        "algo": {
            "actor_layer_dims": [],
            "gmm": {"enabled": True},
            "rnn": {"enabled": True, "horizon": CONTEXT, "hidden_dim": 400},
        },
    },
    "robomimic_bc_transformer": {
        "train": {"frame_stack": CONTEXT},
        "algo": {
            "actor_layer_dims": [],
            "optim_params": {
                "policy": {
                    "optimizer_type": "adamw",
                    "learning_rate": {"decay_factor": 0.1, "epoch_schedule": [100], "scheduler_type": "linear"},
                    "regularization": {"L2": 0.01},
                }
            },
            "gmm": {"enabled": True, "num_modes": 5, "min_std": 1e-4},
            "transformer": {"enabled": True, "context_length": CONTEXT, "embed_dim": 512, "num_layers": 6,
                            "num_heads": 8},
        },
    },
}  # fmt: skip


def missing() -> str | None:
    """Say why robomimic does not run here; None: it does."""
    try:
        _robomimic()
    except ImportError as e:
        return f"robomimic does not run here ({e}); {INSTALL}, then PYTHONPATH=build/peers"
    return None


def train_robomimic(
    method: str, hdf5: Path, spec: EmbodimentSpec, run: Path, seed: int, epochs: int, updates: int = UPDATES
) -> None:
    """Train with robomimic's own dataset, networks, losses and epoch loop, and keep the last weights.

    Files: RUN/weights.safetensors, RUN/robomimic.json (written last: a folder without it is unfinished).
    """
    rm = _robomimic()
    config = _config(rm, method, spec)
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002  robomimic draws from it
    algo = _algo(rm, config, spec)
    with _quiet():
        dataset = rm["dataset"].SequenceDataset(
            str(hdf5), sorted(state_fields(spec, np.zeros(spec.state_dim))), tuple(config.train.dataset_keys),
            frame_stack=config.train.frame_stack, seq_length=config.train.seq_length, hdf5_cache_mode="low_dim",
            hdf5_use_swmr=False, load_next_obs=False,
        )  # fmt: skip
    loader = torch.utils.data.DataLoader(dataset, batch_size=config.train.batch_size, shuffle=True, drop_last=True)
    if not len(loader):
        raise ValueError(f"{hdf5} has {len(dataset)} windows, fewer than a batch of {config.train.batch_size}")
    began, loss = time.monotonic(), float("nan")
    for epoch in track(range(1, epochs + 1), f"train {method}"):
        with _quiet():
            loss = rm["train_utils"].run_epoch(algo, loader, epoch, num_steps=updates)["Loss"]
        algo.on_epoch_end(epoch)
    run.mkdir(parents=True, exist_ok=True)
    save_model(algo.nets, str(run / "weights.safetensors"))  # its RNN shares tensors
    done = {"method": method, "seed": seed, "epochs": epochs, "updates": updates, "loss": loss,
            "seconds": time.monotonic() - began}  # fmt: skip
    write_json(run / "robomimic.json", done)


class RobomimicPolicy:
    """A trained robomimic algorithm behind the interface of rollouts; one action per call, as it is published.

    Stateless, where robomimic's own policies carry a hidden state and a stack of frames: its LSTM starts anew at every
    tenth step, so the frames since then say it all, and the Transformer's stack repeats the first frame.
    """

    n_action_steps = 1
    n_obs_steps = CONTEXT

    def __init__(self, run: Path, spec: EmbodimentSpec) -> None:
        """Load RUN.

        Raises:
            FileNotFoundError: training did not finish there.
        """
        rm, self.spec = _robomimic(), spec
        self.trained = read_json(run / "robomimic.json")
        self.name: str = self.trained["method"]
        self.low, self.high = action_limits(spec)
        self._algo = _algo(rm, _config(rm, self.name, spec), spec)
        load_model(self._algo.nets, run / "weights.safetensors")
        self._algo.set_eval()

    @property
    def parameters(self) -> int:
        """Number of trained parameters."""
        return sum(p.numel() for p in self._algo.nets.parameters())

    @torch.no_grad()
    def predict_batch(
        self, histories: Sequence[Sequence[RawObservation]], seeds: Sequence[int], **options: Any
    ) -> list[ActionChunk]:
        """Return a chunk of one action per history (frames of consecutive control steps, oldest first)."""
        return [self._predict(h, seed) for h, seed in zip(histories, seeds, strict=True)]

    def _predict(self, history: Sequence[RawObservation], seed: int) -> ActionChunk:
        states = np.stack([o.state for o in history])
        self._algo.reset()
        if self.name == "robomimic_bc_transformer":
            first = np.repeat(states[:1], CONTEXT - len(states), axis=0)
            action = self._act(np.concatenate([first, states])[None], seed)  # [1 a]
        elif self.name == "robomimic_bc_rnn_gmm":
            step = round(history[-1].stamp * self.spec.control_hz)
            for state in states[-1 - step % CONTEXT :]:
                action = self._act(state[None], seed)  # [1 a]
        else:
            action = self._act(states[-1:], seed)  # [1 a]
        values = self.low + (np.clip(action, -1, 1) + 1) / 2 * (self.high - self.low)  # pyright: ignore
        return ActionChunk(values.astype(np.float32), history[-1].stamp, self.spec.action_dt, self.spec.name)

    def _act(self, state: np.ndarray, seed: int) -> np.ndarray:
        torch.manual_seed(seed)  # a mixture draws its component
        observation = {name: torch.from_numpy(x) for name, x in state_fields(self.spec, state).items()}
        return self._algo.get_action(observation).numpy()  # [1 a]


def _config(rm: Mapping[str, Any], method: str, spec: EmbodimentSpec) -> Any:
    with _quiet():
        config = rm["config"].config_factory("bc")
    with config.unlocked():
        config.update(json.loads(json.dumps(PUBLISHED[method])))
        config.observation.modalities.obs.low_dim = [f.name for f in spec.state]
    config.lock()
    return config


def _algo(rm: Mapping[str, Any], config: Any, spec: EmbodimentSpec) -> Any:
    with _quiet():
        rm["obs_utils"].initialize_obs_utils_with_config(config)
        return rm["algo"].algo_factory(
            "bc", config, {f.name: [f.size] for f in spec.state}, spec.action_dim, torch.device("cpu")
        )


def _robomimic() -> dict[str, Any]:
    """Import what is used of robomimic, with empty modules for torchvision where it is not installed."""
    with _quiet(), _without_torchvision():
        names = ("algo", "config", "utils.dataset", "utils.obs_utils", "utils.train_utils")
        return {name.rpartition(".")[2]: importlib.import_module(f"robomimic.{name}") for name in names}


@contextmanager
def _without_torchvision() -> Iterator[None]:
    if "torchvision" in sys.modules or "robomimic.algo" in sys.modules or importlib.util.find_spec("torchvision"):
        yield
        return
    names = ("torchvision", "torchvision.models", "torchvision.transforms", "torchvision.transforms.functional")
    stubs = {name: types.ModuleType(name) for name in names}
    stubs["torchvision"].models = stubs["torchvision.models"]  # pyright: ignore[reportAttributeAccessIssue]
    stubs["torchvision"].transforms = stubs["torchvision.transforms"]  # pyright: ignore[reportAttributeAccessIssue]
    stubs["torchvision.transforms"].functional = stubs["torchvision.transforms.functional"]  # pyright: ignore
    stubs["torchvision.transforms"].Lambda = stubs["torchvision.transforms"].Compose = None  # pyright: ignore
    sys.modules.update(stubs)
    try:
        yield
    finally:  # what asks for torchvision later must not find these
        for name in names:
            del sys.modules[name]


@contextmanager
def _quiet() -> Iterator[None]:
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):  # it prints what it was told, and bars of its own
        yield
