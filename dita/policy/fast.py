"""The fast path of one live episode: caches, weights packed for the CPU, CUDA graphs; the same functions as eager.

What holds is kept: keys and values of an instruction until it changes, visual tokens of a frame while it is in the
window. What is left of a tick are two functions of tensors, `see` (one new frame) and `act` (the rest of the prefix and
the whole denoising loop). `Runner` runs them by the fastest path that gave the eager outputs on this machine.
Shape legend: t frames, v views, q visual tokens, d width, n action slots, A padded action dims, S denoising steps.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dita.batch import Observation
from dita.policy.language import PretrainedEncoder
from dita.policy.model import Instruction
from dita.policy.policy import Committed, DitaPolicy
from dita.policy.transformer import Prefix
from dita.types import ActionChunk, RawObservation, Window

log = logging.getLogger(__name__)

Path = Literal["graph", "compiled", "eager"]
Function = Callable[..., tuple[Tensor, ...]]
Builder = Callable[[Sequence[Tensor]], Function]
PACK_FROM = 2**16  # weights; smaller products gain nothing
ROWS = 17  # of a denoising step, published sequence: what packing is laid out for
PROOF_CALLS = 3
# largest difference from eager: a graph replays the same kernels, a compiler fuses them
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}


class GraphDevice(Protocol):
    """What captures kernels: CUDA, or a stand-in that lets the logic be tested without a GPU."""

    def warm_up(self, run: Callable[[], Any]) -> None:
        """Run a few times on a stream of its own, so that lazy initialisation is not captured."""
        ...

    def capture(self, run: Callable[[], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
        """Record one run; return its outputs and what repeats it into them."""
        ...


class CudaGraphs:
    """torch.cuda.CUDAGraph."""

    def warm_up(self, run: Callable[[], Any]) -> None:
        """Run three times on a side stream."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)

    def capture(self, run: Callable[[], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
        """Record one run."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = run()
        return outputs, graph.replay


def record(function: Function, inputs: Sequence[Tensor], device: GraphDevice) -> Function:
    """Capture `function` on static copies of its inputs; the result copies what changed into them and replays.

    Its outputs are buffers that the next call overwrites.
    """
    static = [x.clone() for x in inputs]
    device.warm_up(lambda: function(*static))
    outputs, replay = device.capture(lambda: function(*static))
    last: list[tuple[Tensor, int] | None] = [None] * len(static)  # kept alive: its identity means unchanged content

    def run(*new: Tensor) -> tuple[Tensor, ...]:
        for i, (buffer, value) in enumerate(zip(static, new, strict=True)):
            before = last[i]
            if before is None or before[0] is not value or before[1] != value._version:
                buffer.copy_(value, non_blocking=True)
                last[i] = (value, value._version)
        replay()
        return outputs

    return run


class Runner:
    """Runs one function of tensors by the first path that proves equal to eager, per shape of its inputs.

    A path that fails to build or to run, or whose outputs differ from eager's in one of three calls on two different
    inputs, is left for the next one, and the log says why, once.
    """

    def __init__(
        self, name: str, eager: Function, paths: Sequence[tuple[Path, Builder]], judge: Callable[..., str | None]
    ) -> None:
        """Try `paths` in order.

        Args:
            name: of the function, for the log.
            eager: the reference, and the last resort.
            paths: a builder takes the inputs and returns a function like `eager`.
            judge: takes eager's outputs and the path's, and says how they differ, or None.
        """
        self._name, self._eager, self._judge = name, eager, judge
        self._paths: list[tuple[Path, Builder]] = list(paths)
        self._chosen: dict[tuple, tuple[Path, Function]] = {}
        self.path: Path | None = None  # of the last call
        self.refused: dict[Path, str] = {}  # why

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        key = tuple((x.shape, x.dtype) for x in inputs)
        if key not in self._chosen:
            self._chosen[key] = self._choose(inputs)
        used, function = self._chosen[key]
        self.path = used
        if used == "eager":
            return function(*inputs)
        try:
            return function(*inputs)
        except Exception as e:  # a replay that fails once will again
            self._refuse(used, e)
            self._paths = [(path, build) for path, build in self._paths if path != used]
            self._chosen.clear()
            return self(*inputs)

    def _choose(self, inputs: Sequence[Tensor]) -> tuple[Path, Function]:
        for path, build in self._paths:
            try:
                function = build(inputs)
                self._prove(function, inputs)
                return path, function
            except Exception as e:  # whatever a compiler or a driver raises, the arm goes on with eager
                self._refuse(path, e)
        return "eager", self._eager

    def _prove(self, function: Function, inputs: Sequence[Tensor]) -> None:
        others = [x * 0.5 if x.is_floating_point() else x.clone() for x in inputs]  # a path may ignore its inputs
        for call in range(PROOF_CALLS):
            given = others if call == 1 else inputs
            if problem := self._judge(self._eager(*given), function(*given)):
                raise ValueError(f"{problem} in call {call + 1}")

    def _refuse(self, path: Path, error: Exception) -> None:
        if path not in self.refused:
            self.refused[path] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            log.warning("%s does not run as %s: %s", self._name, path, self.refused[path])


def judge(expected: Sequence[Tensor], found: Sequence[Tensor], tolerance: float) -> str | None:
    """Say how two lists of tensors differ by more than `tolerance`, in units of the largest value (at least 1)."""
    for i, (a, b) in enumerate(zip(expected, found, strict=True)):
        difference = float((a.float() - b.float()).abs().max()) / max(1.0, float(a.float().abs().max()))
        if not difference <= tolerance:  # NaN is a difference too
            return f"output {i} differs from eager by {difference:.1e} (allowed {tolerance:.0e})"
    return None


class PackedLinear(nn.Module):
    """A linear layer whose weight lies as oneDNN's kernels read it: half the time for the few rows of a denoising step.

    The operators are those that torch's own compiler emits for frozen CPU models.
    """

    def __init__(self, linear: nn.Linear) -> None:
        """Raises RuntimeError or AttributeError where this torch has no such kernel."""
        super().__init__()
        weight = linear.weight.detach()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
        self.bias = linear.bias
        x = torch.linspace(-1, 1, weight.shape[1], dtype=weight.dtype).expand(2, -1).contiguous()
        with torch.no_grad():
            problem = judge([F.linear(x, weight, self.bias)], [self(x)], TOLERANCE[weight.dtype])
        if problem:
            raise RuntimeError(f"packed weights give other products: {problem}")

    def forward(self, x: Float[Tensor, "... i"]) -> Float[Tensor, "... o"]:
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), self.packed, self.bias, "none", [], "")


def inference_twin(policy: DitaPolicy, pack: bool) -> DitaPolicy:
    """Return a twin in evaluation mode that shares the tensors; pack: its large CPU weights are packed once more."""
    pack = pack and policy.device.type == "cpu" and torch.backends.mkldnn.is_available()
    return _twin(policy, pack).eval()


def _twin(module: nn.Module, pack: bool) -> Any:
    if pack and isinstance(module, nn.Linear) and module.weight.numel() >= PACK_FROM:
        try:
            return PackedLinear(module)
        except (RuntimeError, AttributeError) as e:
            log.warning("weights stay as they are: %s", " ".join(str(e).split())[:200])
    twin = copy.copy(module)
    twin._modules = {n: None if child is None else _twin(child, pack) for n, child in module._modules.items()}
    return twin


@dataclass(frozen=True, eq=False)
class _Frame:
    """Tokens of a frame, and its pixels: a stamp alone would trust a clock that went back."""

    pixels: np.ndarray
    tokens: Float[Tensor, "1 q d"]


class PolicySession:
    """One live episode: `predict` as the policy's, with everything kept that holds from tick to tick.

    Its outputs are the same to the last bit whether a frame comes from the cache or not, and those of
    `DitaPolicy.predict` up to rounding. Not for several threads at once.
    """

    def __init__(
        self,
        policy: DitaPolicy,
        *,
        embodiment: str | None = None,
        num_inference_steps: int | None = None,
        path: Literal["auto", "graph", "compiled", "eager"] = "auto",
        lean: bool = False,
        graphs: GraphDevice | None = None,
    ) -> None:
        """Prepare a policy for one embodiment.

        Args:
            policy: unchanged.
            embodiment: needed if the policy knows several.
            num_inference_steps: of the solver; None: the checkpoint's.
            path: auto: CUDA graphs on a GPU, eager on a CPU; each falls back to the next slower one.
            lean: a third of the memory: the weights are not kept once more as the CPU's kernels like them best, and the
                text encoder leaves memory after each new instruction, which then takes seconds.
            graphs: what captures; None: CUDA.

        Raises:
            ValueError: unknown embodiment, or a number of steps that the schedule does not have.
        """
        self.embodiment = policy.embodiment_name(embodiment)
        self.policy = inference_twin(policy, pack=not lean)
        language = self.policy.model.language  # the twin's: what it loads, the given policy does not hold
        self._encoder = language if isinstance(language, PretrainedEncoder) else None
        self._lean = lean
        if self._encoder is not None and self._encoder.config.pretrained is not None and not lean:
            self._encoder.load()
        self._plain = policy if path == "compiled" or policy.device.type != "cpu" else self.policy  # for a compiler
        self._cameras = policy.specs[self.embodiment].cameras
        self._trim = policy.device.type == "cpu" and path in ("auto", "eager")
        self.steps = num_inference_steps or policy.diffusion.config.num_inference_steps
        self._plan = self.policy.diffusion.plan(self.steps, policy.device)
        exact = policy.model.dtype == torch.float32
        tolerance = TOLERANCE[policy.model.dtype]
        self._see = Runner(
            "see", self._see_eager, self._paths(path, graphs, "_see_eager"), lambda a, b: judge(a, b, tolerance)
        )
        # of bf16 only the network's outputs are compared: sampling divides their rounding by almost nothing
        self._act = Runner(
            "act",
            self._act_eager,
            self._paths(path, graphs, "_act_eager"),
            lambda a, b: judge(a if exact else a[1:], b if exact else b[1:], tolerance),
        )
        self.reset()

    def reset(self) -> None:
        """Forget the episode."""
        self._words: str | None = None
        self._instruction: Instruction | None = None
        self._frames: dict[tuple[str, float], _Frame] = {}

    @torch.no_grad()
    def instruct(self, instruction: str, states: Float[Tensor, "1 l d"] | None = None) -> None:
        """Take up an instruction and forget frames seen under another one; `predict` does so by itself.

        states: its token states, where a text encoder elsewhere made them.
        """
        self.reset()
        policy, model = self.policy, self.policy.model
        if states is None:
            ids, valid = (torch.from_numpy(x)[None].to(policy.device) for x in policy.preprocessor.tokens(instruction))
            self._instruction = model.instruct(ids, valid)
            if self._encoder is not None and self._lean:
                self._encoder.unload()
        else:
            valid = torch.ones(states.shape[:2], dtype=torch.bool, device=policy.device)
            self._instruction = model.instruct_states(states.to(policy.device), valid)
        self._words = instruction

    @property
    def path(self) -> str:
        """How the last tick ran: graph, compiled or eager."""
        return self._act.path or "not yet"

    @property
    def refused(self) -> dict[str, str]:
        """Faster paths that were not taken, and why."""
        return {**self._see.refused, **self._act.refused}

    @torch.no_grad()
    def predict(
        self,
        history: Sequence[RawObservation],
        *,
        seed: int,
        committed: Float[np.ndarray, "m a"] | None = None,
    ) -> ActionChunk:
        """Return the chunk for the last observation of a history; as `DitaPolicy.predict`, with its errors."""
        policy = self.policy
        window = policy.preprocessor.window(history, self.embodiment)
        observation = policy.preprocessor.low_dim([window]).to(policy.device)
        if self._words != window.instruction:
            self.instruct(window.instruction)
        noise = policy.noise(seed)[None, None].to(policy.device)  # [1 1 n A]
        decided = None if committed is None else policy.commit([committed], [seed], self.steps, [window])
        inputs = [
            self._visual(window, [o.stamp for o in history]),
            observation.image_valid,
            observation.state,
            observation.state_valid,
            observation.embodiment,
            noise,
            *_flat(self._instruction),
            *(() if decided is None else (decided.values, decided.count, decided.noise)),
        ]
        actions = self._act(*inputs)[0][0, 0]  # [n A]
        chunk = policy.chunk(actions, window)
        if committed is not None:
            policy.keep_committed(chunk, committed)
        return chunk

    @torch.no_grad()
    def look(self, observation: RawObservation) -> None:
        """Encode an observation's frames now, for a later history that holds them; changes no output.

        Raises:
            ValueError: as `DitaPolicy.predict`.
        """
        window = self.policy.preprocessor.window([observation], self.embodiment)
        if self._words != window.instruction:
            self.instruct(window.instruction)
        for camera in self._cameras:
            self._frames[camera.name, observation.stamp] = self._frame(window, camera, 0, observation.stamp)
        for key in list(self._frames)[: -2 * self.policy.config.n_obs_steps * len(self._cameras)]:
            del self._frames[key]  # nobody predicted: the oldest will not be asked for

    def _visual(self, window: Window, stamps: Sequence[float]) -> Float[Tensor, "1 tvq d"]:
        """Return the tokens of all frames and views, only the new ones encoded; a view without camera is zeros."""
        policy, frames = self.policy, self.policy.config.n_obs_steps
        stamps = [stamps[0]] * (frames - len(stamps)) + list(stamps)
        kept: dict[tuple[str, float], _Frame] = {}
        shape = (frames, policy.config.cameras, policy.model.vision.tokens, policy.config.dim)
        visual = torch.zeros(shape, dtype=policy.model.dtype, device=policy.device)  # [t v q d]
        for camera in self._cameras:
            for t, stamp in enumerate(stamps):
                kept[camera.name, stamp] = frame = self._frame(window, camera, t, stamp)
                visual[t, camera.slot] = frame.tokens[0]
        self._frames = kept
        return visual.flatten(0, 2)[None]

    def _frame(self, window: Window, camera: Any, t: int, stamp: float) -> _Frame:
        assert self._instruction is not None
        pixels, known = window.images[camera.name][t], self._frames.get((camera.name, stamp))
        if known is not None and np.array_equal(known.pixels, pixels):
            return known
        image = self.policy.preprocessor.frame(window, camera, t).to(self.policy.device, non_blocking=True)
        tokens = self._see(image, self._instruction.mean)[0].clone()  # a graph's output is overwritten
        return _Frame(pixels.copy(), tokens)

    def _see_eager(self, image: Tensor, mean: Tensor) -> tuple[Tensor]:
        return (self.policy.model.see(image, mean),)

    def _act_eager(self, visual: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        """Return (actions [1 1 n A], the network's output at each step [S 1 1 n A], trimmed ones left out)."""
        image_valid, state, state_valid, embodiment, noise, *kept = rest
        layers = self.policy.config.layers
        instruction, decided = _unflat(kept[: 2 * layers + 2], layers), kept[2 * layers + 2 :]
        none = torch.empty(0, device=visual.device)  # pictures and words are in `visual` and `instruction`
        observation = Observation(none, image_valid, state, state_valid, none, none, embodiment)
        context = self.policy.model.observe(observation, instruction, visual)
        trace: list[Tensor] = []
        committed = Committed(*decided) if decided else None
        actions = self.policy.act(context, embodiment, noise, self._plan, committed, trace, self._trim)
        return actions, torch.stack(trace)

    def _paths(self, wanted: str, graphs: GraphDevice | None, name: str) -> list[tuple[Path, Builder]]:
        """Return the builders to try, fastest first."""
        eager = getattr(self, name)
        if wanted == "auto":
            wanted = "graph" if self.policy.device.type == "cuda" else "eager"

        def graph(inputs: Sequence[Tensor]) -> Function:
            if graphs is None and self.policy.device.type != "cuda":
                raise ValueError(f"CUDA graphs need a CUDA device, the policy is on {self.policy.device}")
            return record(eager, inputs, graphs or CudaGraphs())

        def compiled(inputs: Sequence[Tensor]) -> Function:
            other = copy.copy(self)
            other.policy = inference_twin(self._plain, pack=False)
            other.policy.model.trunk.compile(dynamic=False)
            return getattr(other, name)

        every: list[tuple[Path, Builder]] = [("graph", graph), ("compiled", compiled)]
        return {"graph": every, "compiled": every[1:], "eager": []}[wanted]


def _flat(instruction: Instruction | None) -> list[Tensor]:
    assert instruction is not None
    prefix = instruction.prefix
    return [*prefix.keys, *prefix.values, prefix.valid, instruction.mean]


def _unflat(tensors: Sequence[Tensor], layers: int) -> Instruction:
    *parts, valid, mean = tensors
    return Instruction(Prefix(tuple(parts[:layers]), tuple(parts[layers:]), valid), mean)
