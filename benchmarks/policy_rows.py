"""Rows 1 to 4: the denoising loop, the control tick on CPU and GPU, training with several noise samples."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Case, interleave, profile
from benchmarks.official_peer import OfficialStyle
from dita.batch import Batch
from dita.cli import compose
from dita.config import DiffusionConfig, LanguageConfig, PolicyConfig, PreprocessConfig, TrainConfig
from dita.policy.bench import INSTRUCTION, make_observation, with_stand_in
from dita.policy.fast import CudaGraphs, PolicySession, inference_twin, record
from dita.policy.official import diffusion_config, reference_observation
from dita.policy.policy import DitaPolicy
from dita.preprocess import make_contract

THREADS = 2
EXACT = 1e-5


def base_config(tier: str, slots: int = 16, **changes: Any) -> PolicyConfig:
    """Return dita_base with T action slots; quick: the same parts, tiny."""
    config = compose("train", ["policy=dita_base"], TrainConfig).policy
    config = replace(config, chunk_size=slots - 1, **changes)
    if tier == "full":
        return config
    vision = replace(config.vision, image_size=28, tokens=4, qformer_layers=1, patch_dim=128, vit_layers=1, vit_heads=2)
    return replace(config, dim=128, layers=2, heads=2, ffn_dim=256, vision=vision)


def make_policy(config: PolicyConfig, diffusion: DiffusionConfig, seed: int = 0) -> DitaPolicy:
    """Return random weights with a made-up embodiment, not a checkpoint: speed does not depend on what was learned."""
    torch.manual_seed(seed)
    contract = make_contract(PreprocessConfig("q01_q99", "squash", "stored"), config, [], [])
    policy = DitaPolicy(config, diffusion, contract).eval().requires_grad_(False)
    return with_stand_in(policy)


def to_bf16(policy: DitaPolicy) -> DitaPolicy:
    """Return a twin with bf16 weights."""
    twin = make_policy(policy.config, policy.diffusion.config)
    for p, q in zip(twin.model.parameters(), policy.model.parameters(), strict=True):
        p.data = q.data.to(torch.bfloat16)
    return twin


def language_of(config: PolicyConfig) -> Tensor:
    """Make up an instruction's token states [1 77 d], as a text encoder's final LayerNorm leaves them."""
    states = torch.randn(1, config.language.max_tokens, config.dim, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.layer_norm(states, states.shape[-1:])


def denoise_exact(tier: str) -> list[Case]:
    """Row 1: DDIM at batch 1, prefix included, against whole-sequence recompute with transformers' Llama."""
    torch.set_num_threads(THREADS)
    sizes = [(16, 10, 3.0), (16, 20, 3.0), (32, 10, 2.5), (32, 20, 2.5)] if tier == "full" else [(16, 3, 3.0)]
    return [case for size in sizes for case in _denoise_cases(tier, *size)]


def _denoise_cases(tier: str, slots: int, steps: int, goal: float) -> list[Case]:
    config = base_config(tier, slots)
    # the visual tokens are given: one ViT layer instead of twelve saves building time, nothing else
    config = replace(config, vision=replace(config.vision, vit_layers=1))
    policy = make_policy(config, diffusion_config("cosine100"))
    language, noise = language_of(config), policy.noise(0)[None]  # [1 T 7]
    visual = torch.randn(1, 2 * config.vision.tokens, config.dim, generator=torch.Generator().manual_seed(2))
    context = torch.cat([language, visual], dim=1)
    peer = OfficialStyle(policy.model, policy.diffusion.config, steps)
    trace: list[tuple[Tensor, Tensor, Tensor]] = []
    peer.sample(noise, context, trace)
    scale = max(float(out.abs().max()) for _, _, out in trace)
    cases = []
    for precision, at_least in (("fp32", goal), ("bf16", 5.0)):
        twin = inference_twin(policy if precision == "fp32" else to_bf16(policy), pack=True)
        error = max(float((step_output(twin, language, visual, x, t) - out).abs().max()) for x, t, out in trace)
        ours = partial(chunk, twin, language, visual, noise, steps)
        pairs = interleave(ours, partial(peer.sample, noise, context), 5 if tier == "full" else 2)
        case = pairs.case(f"T={slots}, {steps} steps, {precision}", at_least, eps_difference=error, eps_scale=scale)
        exact = precision == "bf16" or error <= EXACT
        cases.append(finish(case, exact, f"eps differs by {error:.1e} (of {scale:.1f})", ours))
    return cases


def finish(case: Case, also: bool, remark: str, ours: Callable[[], Any]) -> Case:
    """Add what else has to hold, a remark, and, for a missed goal, where the time goes."""
    met = None if case.met is None and also else bool(case.met and also)
    detail = {**case.detail, "where_the_time_goes": profile(ours)} if met is False else case.detail
    note = f"{case.name}: {remark}" + (f"; {case.note}" if case.note else "")
    return replace(case, met=met, note=note, detail=detail)


@torch.no_grad()
def _context(policy: DitaPolicy, language: Tensor, visual: Tensor):
    words = torch.ones(language.shape[:2], dtype=torch.bool)
    instruction = policy.model.instruct_states(language, words)
    observation = reference_observation(torch.zeros(1, 2, 3, 1, 1), policy.config.state_dim)
    return policy.model.observe(observation, instruction, visual.to(policy.model.dtype))


@torch.no_grad()
def chunk(policy: DitaPolicy, language: Tensor, visual: Tensor, noise: Tensor, steps: int) -> Tensor:
    """Make a chunk from tokens: prefix once, then the loop."""
    embodiment = torch.zeros(1, dtype=torch.long)
    context = _context(policy, language, visual)
    return policy.act(context, embodiment, noise[:, None], policy.diffusion.plan(steps))


@torch.no_grad()
def step_output(policy: DitaPolicy, language: Tensor, visual: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """Return the network's output at the peer's own x and t."""
    suffix = policy.model.suffix(_context(policy, language, visual), torch.ones(x.shape[:2], dtype=torch.bool), 1)
    return policy.model.denoise(x[:, None], policy.model.time_tokens(t.float()), suffix)[:, 0].float()


def tick_stream(tier: str) -> list[Case]:
    """Row 2: a whole control tick in a steady state, one new frame, against both frames and whole recompute."""
    torch.set_num_threads(THREADS)
    steps = 10 if tier == "full" else 2
    policy = make_policy(base_config(tier), diffusion_config("cosine100"))
    language, noise = language_of(policy.config), policy.noise(0)[None]
    peer = OfficialStyle(policy.model, policy.diffusion.config, steps)
    return [
        _tick_case(policy if precision == "fp32" else to_bf16(policy), peer, language, noise, precision, goal, tier)
        for precision, goal in (("fp32", 2.8), ("bf16", 5.0))
    ]


def _tick_case(
    policy: DitaPolicy, peer: OfficialStyle, language: Tensor, noise: Tensor, precision: str, goal: float, tier: str
) -> Case:
    steps, count = len(peer.scheduler.timesteps), 5 if tier == "full" else 2
    session, fresh = (PolicySession(policy, num_inference_steps=steps) for _ in range(2))
    spec, rng = policy.specs[session.embodiment], np.random.default_rng(0)
    frames = [make_observation(spec, rng, i) for i in range(count + 8)]  # made before, not timed
    histories = [frames[i : i + 2] for i in range(len(frames) - 1)]
    session.instruct(INSTRUCTION, language)
    same = []
    for i in range(3):
        fresh.instruct(INSTRUCTION, language)  # nothing kept
        a, b = (s.predict(histories[i], seed=i).values for s in (session, fresh))
        same.append(np.array_equal(a, b))
    coming = iter(histories[3:])

    def ours() -> None:
        session.predict(next(coming), seed=0)

    def official() -> None:
        window = policy.preprocessor.window(histories[0], spec.name)
        peer.tick(policy.preprocessor.images([window])[0, :, 0], noise, language)

    case = interleave(ours, official, count).case(
        f"{steps} steps, {precision}", goal, frame_cache_bit_identical=all(same), path=session.path
    )
    remark = f"frame cache bit-identical over {len(same)} ticks: {all(same)}; the text's states are given to both"
    return finish(case, all(same), remark, ours)


def tick_gpu(tier: str) -> list[Case]:
    """Row 3: graph replay with the image copy, against an eager fp16-autocast tick and a floor measured in this run."""
    steps = 10
    names = [f"batch {b}, {steps} steps, bf16" for b in (1, 16)]
    if not torch.cuda.is_available():
        goal, why = ">= 10x eager, <= 8x floor, p99/p50 <= 1.1", "not measured: no CUDA device here"
        return [Case(name, None, None, "s", None, goal, None, f"{name}: {why}") for name in names]
    policy = make_policy(base_config(tier), diffusion_config("cosine100")).to("cuda")
    half = to_bf16(policy).to("cuda")
    peer = OfficialStyle(policy.model, policy.diffusion.config, steps)
    language, floor = language_of(policy.config).to("cuda"), gpu_floor(half, steps)
    cases = []
    for name, batch in zip(names, (1, 16), strict=True):
        ours, path = (
            _gpu_tick(half, language, steps) if batch == 1 else (_gpu_batch(half, language, steps, batch), "graph")
        )
        seconds = [_seconds(ours) for _ in range(230)][30:]
        p50, p99 = (float(p) for p in np.percentile(seconds, (50, 99)))
        official = median(_seconds(_gpu_official(policy, peer, language)) for _ in range(20)) * batch
        detail = {"path": path, "p99": p99, "device": torch.cuda.get_device_name()}
        cases += [
            Case(f"{name}, p50", p50, official, "s", official / p50, ">= 10x eager", official / p50 >= 10, "", detail),
            Case(f"{name}, p99 and p50", p99, p50, "s", p50 / p99, "p99/p50 <= 1.1", p99 <= 1.1 * p50, "", detail),
        ]
        if batch == 1:
            cases.append(
                Case(f"{name}, floor", p50, floor, "s", floor / p50, "<= 8x floor", p50 <= 8 * floor, "", detail)
            )
    return cases


def _gpu_tick(policy: DitaPolicy, language: Tensor, steps: int) -> tuple[Callable[[], None], str]:
    session = PolicySession(policy, num_inference_steps=steps)
    session.instruct(INSTRUCTION, language)
    spec, rng = policy.specs[session.embodiment], np.random.default_rng(0)
    frames = [make_observation(spec, rng, i) for i in range(260)]
    coming = pairwise(frames)

    def tick() -> None:
        session.predict(next(coming), seed=0)  # ends with the chunk's copy to the host

    tick()
    return tick, session.path


def _gpu_batch(policy: DitaPolicy, language: Tensor, steps: int, batch: int) -> Callable[[], None]:
    """Return one graph of everything, for many robots at once: both frames are encoded anew."""
    c, plan = policy.config, policy.diffusion.plan(steps, "cuda")
    words = torch.ones(batch, c.language.max_tokens, dtype=torch.bool, device="cuda")
    rows = torch.zeros(batch, dtype=torch.long, device="cuda")
    with torch.no_grad():
        instruction = policy.model.instruct_states(language.expand(batch, -1, -1), words)
    size = c.vision.image_size

    def everything(images: Tensor, noise: Tensor) -> tuple[Tensor]:
        pixels = (images.float() / 255 - policy.model.vision.mean) / policy.model.vision.std
        observation = reference_observation(pixels.unflatten(0, (batch, c.n_obs_steps)), c.state_dim)
        return (policy.act(policy.model.observe(observation, instruction), rows, noise, plan),)

    pictures = torch.randint(0, 256, (batch * c.n_obs_steps, 3, size, size), dtype=torch.uint8).pin_memory()
    noise = torch.randn(batch, 1, policy.model.action_slots, c.action_dim, device="cuda")
    with torch.no_grad():
        replay = record(everything, [pictures.cuda(), noise], CudaGraphs())

    def tick() -> None:
        replay(pictures.cuda(non_blocking=True), noise)[0].cpu()

    return tick


def _gpu_official(policy: DitaPolicy, peer: OfficialStyle, language: Tensor) -> Callable[[], None]:
    size = policy.config.vision.image_size
    pictures = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    noise = policy.noise(0)[None].cuda()

    def tick() -> None:
        with torch.autocast("cuda", torch.float16):
            peer.tick(pictures.cuda(), noise, language).cpu()

    return tick


def gpu_floor(policy: DitaPolicy, steps: int) -> float:
    """Return the least seconds of a tick: the weights streamed once per pass, at the bandwidth measured here."""
    buffer = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(buffer)

    def copy() -> None:
        target.copy_(buffer)
        torch.cuda.synchronize()

    copy()
    bandwidth = 2 * buffer.numel() / min(_seconds(copy) for _ in range(10))  # read and written [B/s]
    size = {name: sum(p.numel() * p.element_size() for p in part.parameters())
            for name, part in (("vision", policy.model.vision), ("trunk", policy.model.trunk))}  # fmt: skip
    return (size["vision"] + size["trunk"] * (1 + steps)) / bandwidth  # one new frame, one prefix, the steps


def train_multinoise(tier: str) -> list[Case]:
    """Row 4: K noise samples per context in one packed pass against K passes; validation loss at equal wall time."""
    torch.set_num_threads(THREADS)
    policy, checkpointed = training_policy(tier), training_policy(tier)
    checkpointed.model.checkpoint_activations()
    batch, cases = made_up_batch(policy), []

    def passes(given: DitaPolicy, k: int) -> None:
        for _ in range(k):
            one_pass(given, batch, 1, 1)

    for k, goal, pairs in ((4, 3.3, 5), (8, 6.0, 3)):
        packed = partial(one_pass, policy, batch, k, 1)
        error = _gradient_error(policy, batch, k)
        found = interleave(packed, partial(passes, policy, k), pairs if tier == "full" else 1)
        remark = f"gradients differ by {error:.1e} of the largest (allowed 1e-06)"
        cases.append(
            finish(found.case(f"K={k} against {k} passes", goal, gradient_error=error), error <= 1e-6, remark, packed)
        )
    found = interleave(packed, partial(passes, checkpointed, 8), 2 if tier == "full" else 1)
    cases.append(found.case("K=8 against 8 passes with always-on checkpointing", 6.0))
    from benchmarks.train_rows import trainer_multinoise  # which takes its policies from here

    return cases + trainer_multinoise(tier) + equal_wall_time(tier)


def training_policy(tier: str) -> DitaPolicy:
    """Return dita_base to train, with as many words as CLIP's but without needing its weights."""
    config = base_config(tier, language=LanguageConfig("bytes", 77, 1, None))
    return make_policy(config, diffusion_config("linear1000")).train().requires_grad_(True)


def equal_wall_time(tier: str, seconds: float = 60.0) -> list[Case]:
    """Train dita_tiny with K = 1, 4, 8 for the same seconds on scripted demonstrations; compare validation losses."""
    from dita.config import CollectConfig
    from dita.datasets.dataset import WindowDataset
    from dita.datasets.store import Store
    from dita.envs.collect import collect
    from dita.envs.gl import ensure_backend
    from dita.train import Trainer, build_policy

    ensure_backend()
    seconds = seconds if tier == "full" else 1.0
    with TemporaryDirectory() as folder:
        path = Path(folder) / "demonstrations.zarr"
        episodes = 24 if tier == "full" else 3
        collect(compose("collect", [f"out={path}", f"episodes={episodes}"], CollectConfig), exist="error")
        store = Store(path)
        held_out = range(episodes - episodes // 6 - (tier != "full"), episodes)
        train_on = [e for e in range(episodes) if e not in held_out]
        losses: dict[int, tuple[float, int]] = {}
        for k in (1, 4, 8):
            overrides = ["diffusion.prediction_type=sample", "batch_size=32", "optim.schedule=constant"]
            overrides += [
                f"data.stores=[{{path:{path},weight:1}}]",
                f"run={folder}/x",
                f"noise_samples_per_context={k}",
            ]
            config = compose("train", overrides, TrainConfig)
            policy = build_policy(config, [store], [train_on])
            trainer = Trainer(policy, config)
            windows = {
                name: WindowDataset(store, n_obs_steps=2, chunk_size=policy.config.chunk_size, pad_end="mask",
                                    cache="ram", episodes=list(chosen))
                for name, chosen in (("train", train_on), ("validate", held_out))
            }  # fmt: skip
            rng, step, spent = np.random.default_rng(0), 0, 0.0
            while spent < seconds:
                began = time.perf_counter()
                rows = rng.integers(0, len(windows["train"]), config.batch_size)
                trainer.step(step, policy.preprocessor.batch([windows["train"][int(i)] for i in rows]))
                step, spent = step + 1, spent + time.perf_counter() - began
            losses[k] = (_validation_loss(policy, windows["validate"]), step)
    detail = {str(k): {"validation_loss": loss, "steps": steps} for k, (loss, steps) in losses.items()}
    return [
        Case(
            f"validation loss after {seconds:.0f} s, K={k} against K=1", losses[k][0], losses[1][0], "", losses[1][0] /
            losses[k][0], "lower than K=1", losses[k][0] < losses[1][0], "", detail,
        )
        for k in (4, 8)
    ]  # fmt: skip


@torch.no_grad()
def _validation_loss(policy: DitaPolicy, windows: Any) -> float:
    chosen = np.linspace(0, len(windows) - 1, min(96, len(windows))).astype(int)
    batch = policy.preprocessor.batch([windows[int(i)] for i in chosen])
    return float(policy.eval().loss(batch, 16, torch.Generator().manual_seed(0)))


def made_up_batch(policy: DitaPolicy) -> Batch:
    """Make up a training batch of one window."""
    spec = next(iter(policy.specs.values()))
    rng = np.random.default_rng(0)
    history = [make_observation(spec, rng, i) for i in range(policy.config.n_obs_steps)]
    window = policy.preprocessor.window(history, spec.name)
    slots = policy.model.action_slots
    actions = rng.uniform(-1, 1, (slots, spec.action_dim)).astype(np.float32)
    window = replace(window, actions=actions, step_valid=np.ones(slots, bool))
    return policy.preprocessor.batch([window])


def one_pass(policy: DitaPolicy, batch: Batch, samples: int, seed: int) -> None:
    """Run forward and backward."""
    policy.zero_grad(set_to_none=True)
    policy.loss(batch, samples, torch.Generator().manual_seed(seed)).backward()


def _gradient_error(policy: DitaPolicy, batch: Batch, k: int) -> float:
    """Return the largest difference of the packed gradient from the mean of k single ones, in units of the largest."""
    torch.manual_seed(0)
    x = torch.randn(1, k, policy.model.action_slots, policy.config.action_dim)
    t = torch.randint(100, (1, k))
    slots = torch.ones(x.shape[0], x.shape[2], dtype=torch.bool)

    def gradient(packed: bool) -> list[Tensor]:
        policy.zero_grad(set_to_none=True)
        for part in [slice(0, k)] if packed else [slice(i, i + 1) for i in range(k)]:
            suffix = policy.model.suffix(policy.model.context(batch.observation), slots, x[:, part].shape[1])
            out = policy.model.denoise(x[:, part], policy.model.time_tokens(t[:, part]), suffix)
            (out.square().sum() / x.numel()).backward()
        return [p.grad.clone() for p in policy.parameters() if p.grad is not None]

    one, many = gradient(True), gradient(False)
    scale = max(float(g.abs().max()) for g in many)
    return max(float((a - b).abs().max()) for a, b in zip(one, many, strict=True)) / scale


def _seconds(function: Any) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began
