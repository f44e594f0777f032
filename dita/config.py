"""Every knob, as frozen dataclasses without defaults: the defaults live in `configs/*.yaml` only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin

import dacite

T = TypeVar("T")


def from_dict(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Build a config from plain values, strictly.

    Raises:
        ValueError: an unknown, missing or mistyped key, or a value its dataclass refuses, in one line.
    """
    try:
        return dacite.from_dict(cls, dict(values), dacite.Config(strict=True, cast=[tuple, float]))
    except dacite.UnexpectedDataError as e:
        raise ValueError(f"{where}: unknown key {', '.join(sorted(e.keys))}; see `configs/` for what exists") from None
    except (dacite.DaciteError, TypeError, ValueError) as e:
        kind = getattr(e, "field_type", None)
        words = [o for t in (kind, *get_args(kind)) if get_origin(t) is Literal for o in get_args(t)]
        if not isinstance(e, dacite.WrongTypeError) or not words:
            raise ValueError(f"{where}: {e}") from None
        raise ValueError(f"{where}: {e.field_path} is one of {', '.join(map(str, words))}; got {e.value!r}") from None


def to_dict(config: Any) -> dict[str, Any]:
    """Return plain values; `from_dict` inverts it (tuples come back as tuples)."""
    return asdict(config)


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def _require_positive(config: Any, where: str, *keys: str) -> None:
    for key in keys:
        _require(getattr(config, key) >= 1, f"{where}: {key} must be at least 1, got {getattr(config, key)}")


@dataclass(frozen=True)
class VisionConfig:
    """Images -> tokens."""

    kind: Literal["conv_qformer", "dinov2_qformer", "dinov2_patches"]
    image_size: int  # [px], square; the preprocessor resizes to it
    tokens: int  # per frame and view: Q-Former queries, or patches
    qformer_layers: int
    qformer_heads: int | None  # None: policy.dim / 64
    qformer_film: bool  # the instruction modulates the queries
    patch_dim: int  # width of patch tokens (conv) or of the ViT
    vit_layers: int
    vit_heads: int
    pretrained: str | None  # local folder or hub id for DINOv2; None: from scratch
    frozen: bool


@dataclass(frozen=True)
class LanguageConfig:
    """Instruction -> tokens."""

    kind: Literal["bytes", "transformers"]
    max_tokens: int
    layers: int  # of the byte encoder
    pretrained: str | None  # local folder or hub id of a transformers text encoder, frozen


@dataclass(frozen=True)
class PolicyConfig:
    """The network: sizes and options; `dita_base` is the paper's."""

    name: str
    dim: int
    layers: int
    heads: int
    ffn_dim: int
    n_obs_steps: int  # frames per observation
    chunk_size: int  # predicted actions, from now
    n_action_steps: int  # executed before replanning
    past_action_slots: int  # 1 in the published recipe, 0 otherwise
    max_committed_slots: int  # leading slots that training may show clean (real-time chunking); 0: never, as published
    action_dim: int  # padded
    state_dim: int  # padded
    cameras: int  # camera slots
    state_tokens: bool
    embodiment_token: bool
    embodiment_dropout: float  # share of training rows that are not told the embodiment; 0: no such token
    action_embedding: Literal["zero_pad", "linear"]
    action_attention: Literal["causal", "bidirectional"]
    vision: VisionConfig
    language: LanguageConfig

    def __post_init__(self) -> None:
        _require(self.dim % self.heads == 0, f"policy.dim {self.dim} must divide by policy.heads {self.heads}")
        _require(self.dim // self.heads % 2 == 0, "policy.dim / policy.heads must be even (rotary positions)")
        _require(self.action_dim <= self.dim, "policy.action_dim must not exceed policy.dim")
        _require(
            1 <= self.n_action_steps <= self.chunk_size,
            f"policy.n_action_steps {self.n_action_steps} must be in 1..chunk_size ({self.chunk_size})",
        )
        _require(
            0 <= self.embodiment_dropout < 1 and (self.embodiment_token or not self.embodiment_dropout),
            f"policy.embodiment_dropout {self.embodiment_dropout} must be in 0..1, and 0 without embodiment_token",
        )
        slots = self.past_action_slots + self.chunk_size
        _require(
            0 <= self.max_committed_slots < slots,
            f"policy.max_committed_slots {self.max_committed_slots} must leave one of {slots} action slots free",
        )


@dataclass(frozen=True)
class DiffusionConfig:
    """The objective; t = 0 is clean."""

    objective: Literal["diffusion", "flow", "behaviour_cloning"]
    num_train_timesteps: int  # times given to the network run over 0..this, for a flow too
    beta_schedule: Literal["linear", "squaredcos_cap_v2"]  # of diffusion
    prediction_type: Literal["epsilon", "sample", "v_prediction", "velocity"]  # velocity: of a flow, noise - x0
    timestep_spacing: Literal["leading", "trailing"]  # of diffusion
    zero_terminal_snr: bool
    clip_sample: float | None
    solver: Literal["ddim", "dpm_solver++", "euler"]  # euler: of a flow
    num_inference_steps: int

    def __post_init__(self) -> None:
        flow = self.objective == "flow"
        _require(
            flow == (self.prediction_type == "velocity") == (self.solver == "euler"),
            "diffusion.objective=flow goes with prediction_type=velocity and solver=euler, and they only with it; got "
            f"objective={self.objective}, prediction_type={self.prediction_type}, solver={self.solver}",
        )
        _require(
            not (self.zero_terminal_snr and self.prediction_type == "epsilon"),
            "diffusion.zero_terminal_snr needs prediction_type sample or v_prediction (epsilon divides by zero)",
        )
        _require(
            1 <= self.num_inference_steps <= self.num_train_timesteps,
            "diffusion.num_inference_steps must be in 1..num_train_timesteps",
        )


@dataclass(frozen=True)
class PreprocessConfig:
    """The one invertible preprocessor, saved in the checkpoint."""

    normalization: Literal["q01_q99", "min_max", "mean_std"]
    resize: Literal["squash", "letterbox"]
    actions: Literal[
        "stored", "relative"
    ]  # relative: absolute positions and rotations, to the state at the chunk's start


@dataclass(frozen=True)
class StoreConfig:
    """One store of a mixture."""

    path: str
    weight: float  # share of the samples, relative to the other stores
    filter: str | None  # a filter.json of `dita inspect --doctor`; null, or no such key: every episode


@dataclass(frozen=True)
class DataConfig:
    """What is trained on and how windows are cut."""

    stores: tuple[StoreConfig, ...]
    pad_end: Literal["mask", "hold"]
    cache: Literal["mmap", "ram"]
    workers: int
    shots: int | None  # first k episodes of a seeded permutation; None: all
    quarantine: float  # largest share of the windows that training may leave out as damaged; 0: it stops at the first

    def __post_init__(self) -> None:
        _require(
            0 <= self.quarantine <= 0.001,
            f"data.quarantine must be in 0 .. 0.001, got {self.quarantine:g}: of a store with more damage leave the "
            "episodes out with a filter",
        )


@dataclass(frozen=True)
class AugmentConfig:
    """Image augmentation on the device; 0 turns a part off."""

    shift: int  # [px], random shift with edge repeat
    crop: float  # largest share of the area cut away by a random resized crop
    brightness: float  # largest change, as a share of the full range
    contrast: float  # factors 1 - contrast .. 1 + contrast
    saturation: float  # likewise
    hue: float  # largest turn, as a share of the colour circle

    def __post_init__(self) -> None:
        _require(self.shift >= 0, f"augment.shift must not be negative, got {self.shift}")
        for key in ("crop", "brightness", "contrast", "saturation"):
            _require(0 <= getattr(self, key) < 1, f"augment.{key} must be in 0 .. 1, got {getattr(self, key)}")
        _require(0 <= self.hue <= 0.5, f"augment.hue must be in 0 .. 0.5, got {self.hue}")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, warm-up, decay, EMA."""

    lr: float
    vision_lr_scale: float  # 0.1 for a pretrained backbone
    weight_decay: float
    betas: tuple[float, float]
    warmup_steps: int
    schedule: Literal["constant", "cosine"]
    clip_norm: float
    ema_decay: float


@dataclass(frozen=True)
class TrainConfig:
    """`dita train`."""

    run: str  # run folder
    seed: int
    steps: int
    batch_size: int  # over all ranks and microbatches
    microbatch_size: int | None  # windows that go through the network at once; None: a rank's whole share
    noise_samples_per_context: int
    loss_reduction: Literal["token", "square", "sample"]  # what weighs alike: action elements, samples, or between
    device: str  # cpu, cuda
    parallel: Literal["none", "ddp", "fsdp"]  # over the processes of torchrun or srun
    precision: Literal["fp32", "bf16"]
    activation_checkpointing: bool  # less memory, a third more time
    compile: bool  # the trunk's blocks
    on_spike: Literal["warn", "rollback"]  # of a loss far above the recent ones: go back, and past its batches
    threads: int  # 0: all cores
    log_every: int
    save_every: int
    async_save: bool  # a thread writes, training goes on
    keep_last: int
    keep_best: int  # beside the last ones, by validation
    collective_timeout: float  # [s] until a rank that hangs is an error
    save_timeout: float  # [s] until a checkpoint that is being written is worth a warning
    worker_timeout: float  # [s] until a batch that does not come is an error
    peak_tflops: float | None  # of one device, for the MFU; None: a matrix product is measured
    wandb: str | None  # project; None: TensorBoard and JSONL only
    policy: PolicyConfig
    diffusion: DiffusionConfig
    preprocess: PreprocessConfig
    data: DataConfig
    augment: AugmentConfig
    optim: OptimConfig
    validation: ValidationConfig

    def __post_init__(self) -> None:
        _require_positive(self, "train", "steps", "batch_size", "noise_samples_per_context", "log_every", "save_every")
        _require_positive(self, "train", "keep_last")
        _require(self.keep_best >= 0, f"train: keep_best must not be negative, got {self.keep_best}")
        _require((self.microbatch_size or 1) >= 1, f"train: microbatch_size {self.microbatch_size} is below 1")
        for key in ("collective_timeout", "save_timeout", "worker_timeout"):
            _require(getattr(self, key) > 0, f"train: {key} must be positive, got {getattr(self, key)}")


@dataclass(frozen=True)
class ValidationConfig:
    """Checks of a checkpoint while its run goes on; each forces one to be saved."""

    every: int  # steps; 0: never
    episodes: float  # share of each store's episodes that training does not see
    windows: int  # of each store's, spread evenly, whose actions are sampled
    rollouts: EvalConfig | None  # in simulation; `out` is replaced

    def __post_init__(self) -> None:
        _require(self.every >= 0, f"validation.every must not be negative, got {self.every}")
        _require(0 <= self.episodes < 1, f"validation.episodes must be in 0 .. 1, got {self.episodes}")
        _require_positive(self, "validation", "windows")
        _require(
            not self.every or self.episodes > 0 or self.rollouts is not None,
            "validation.every needs something to check: validation.episodes above 0 or validation.rollouts",
        )


@dataclass(frozen=True)
class EnvConfig:
    """A simulated suite and how it is rendered."""

    suite: str  # key of dita.envs.SUITES
    embodiment: str
    tasks: tuple[str, ...]
    max_steps: int
    fast_render: bool  # no shadows, multisampling or reflections: 4-9 times faster on a CPU


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685): W + alpha / rank * B A."""

    rank: int
    alpha: float

    def __post_init__(self) -> None:
        _require(self.rank >= 1, f"lora.rank must be at least 1, got {self.rank}")
        _require(self.alpha > 0, f"lora.alpha must be positive, got {self.alpha}")


@dataclass(frozen=True)
class LearningRates:
    """One per method, fixed beforehand."""

    full: float
    lora: float
    head: float


@dataclass(frozen=True)
class FinetuneConfig(TrainConfig):
    """`dita finetune`: a config of the same loop; policy, diffusion and preprocess are replaced by the checkpoint's."""

    checkpoint: str | None  # run, checkpoint or policy folder
    shots: int  # demonstrations of the first store; 0: none, extend the contract only (zero-shot)
    shots_seed: int  # which ones: fewer are a subset of more
    method: Literal["full", "lora", "head"]
    statistics: Literal["pretrained", "new", "pooled"]  # of the fields that the checkpoint's robots have too
    lora: LoraConfig
    learning_rates: LearningRates
    replay: bool  # play the demonstrations' actions open loop in `env` before training
    env: EnvConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.shots >= 0, f"shots must not be negative, got {self.shots}")
        _require(self.data.shots is None, "data.shots is for dita train; say shots=")


@dataclass(frozen=True)
class CollectConfig:
    """`dita collect`."""

    out: str
    env: EnvConfig
    episodes: int  # successful demonstrations per task
    seed: int  # of the first start; evaluation starts come from another range
    action_noise: float  # std of the noise on the executed action, in units of the action's half range
    workers: int
    codec: Literal["raw", "jpeg"]

    def __post_init__(self) -> None:
        _require_positive(self, "collect", "episodes", "workers")
        _require(self.seed >= 0, f"collect: seed must not be negative, got {self.seed}")
        _require(self.action_noise >= 0, f"collect: action_noise must not be negative, got {self.action_noise}")


@dataclass(frozen=True)
class PerturbConfig:
    """What an evaluation changes about its episodes, one flag each; 0 and "given" change nothing."""

    seed: int  # of all draws; those of a flag depend on no other flag
    instruction: Literal["given", "blank", "swapped", "paraphrased"]
    camera_shift: float  # [m], largest along each axis of each camera
    camera_turn: float  # [rad], largest about each axis of each camera
    light: float  # lamps times 1 - light .. 1 + light, by lamp and colour
    texture: float  # 0..1, share of a random colour in every surface that cannot move
    start: float  # largest way of the robot before the episode: of its tool along each axis [m], of each joint [rad]

    def __post_init__(self) -> None:
        _require(self.seed >= 0, f"perturb.seed must not be negative, got {self.seed}")
        for key in ("camera_shift", "camera_turn", "start"):
            _require(getattr(self, key) >= 0, f"perturb.{key} must not be negative, got {getattr(self, key)}")
        for key in ("light", "texture"):
            _require(0 <= getattr(self, key) <= 1, f"perturb.{key} must be in 0 .. 1, got {getattr(self, key)}")

    @property
    def changes(self) -> dict[str, str | float]:
        """Return the flags that are set."""
        flags = {key: value for key, value in asdict(self).items() if key != "seed"}
        return {key: value for key, value in flags.items() if value not in (0, "given")}


@dataclass(frozen=True)
class EvalConfig:
    """`dita eval`."""

    out: str
    env: EnvConfig
    episodes: int  # unseen starts per task
    seed: int  # of the first start
    n_envs: int  # processes; results do not depend on it
    batch_size: int  # the policy's fixed padded batch
    n_action_steps: int | None  # None: the checkpoint's
    num_inference_steps: int | None  # None: the checkpoint's
    temporal_ensembling: float | None  # m of the weights exp(-m i) of overlapping chunks, oldest first; None: off
    videos: int  # episodes per task written as mp4
    device: str
    threads: int
    guard: bool  # the robot's guard between policy and simulator, without latency
    perturb: PerturbConfig
    ray: str | None  # fan out over a cluster: "local", "auto", host:port; None: this process
    ray_workers: int  # of the cluster, each with a policy and n_envs of its own; results do not depend on it

    def __post_init__(self) -> None:
        _require_positive(self, "eval", "episodes", "n_envs", "batch_size", "ray_workers")
        m = self.temporal_ensembling
        _require(m is None or m >= 0, f"eval: temporal_ensembling must not be negative, or null for off; got {m}")
        _require(self.seed >= 0, f"eval: seed must not be negative, got {self.seed}")
        for key in ("n_action_steps", "num_inference_steps"):
            value = getattr(self, key)
            _require(value is None or value >= 1, f"eval: {key} must be at least 1, or null for the checkpoint's")


@dataclass(frozen=True)
class DemoConfig:
    """`dita demo`: the main job as a row of commands."""

    out: str
    seed: int  # of training; demonstrations and evaluation starts are the same for every seed
    tasks: tuple[str, ...]
    demonstrations: int  # per task
    train_experiment: str  # training recipe in configs/experiment
    eval_episodes: int  # unseen starts per task
    live_episodes: int  # in total; the tasks take turns
    live_real_time_factor: float  # of every process's clock


@dataclass(frozen=True)
class PreflightConfig:
    """`dita robot preflight`: the checklist before the first motion."""

    data: tuple[str, ...]  # training stores to compare with; empty: the sample in the policy folder
    save: bool  # write that sample, from `data`
    windows: int  # training windows to compare with and to replay
    listen: float  # [s]
    replay: bool  # send training windows through topics, policy and guard
    replay_domain: int  # where nobody else is
    move: bool  # close and open the gripper
    stay: bool  # until Ctrl-C, for a guard that starts later
    out: str  # folder; gets preflight.json

    def __post_init__(self) -> None:
        _require(self.windows > 0, f"robot.preflight.windows must be positive, got {self.windows}")
        _require(self.listen > 0, f"robot.preflight.listen must be positive, got {self.listen}")
        _require(not self.save or bool(self.data), "robot.preflight.save samples preflight.data: name its stores")


@dataclass(frozen=True)
class LiveConfig:
    """`dita robot live`: twin, policy and guard as three processes over DDS; times in seconds."""

    checkpoint: str
    out: str  # folder; gets live.json
    env: EnvConfig
    episodes: int  # in total; the env's tasks take turns
    seed: int  # of the first start
    bus: Literal["dds", "rclpy"]
    domain_id: int  # as ROS_DOMAIN_ID
    real_time_factor: float  # below 1: slow motion for every process alike
    discovery: Literal["LOCALHOST", "SUBNET"] | None  # None: as ROS_AUTOMATIC_DISCOVERY_RANGE, or LOCALHOST
    peers: tuple[str, ...] | None  # other machines' addresses, with LOCALHOST; None: as ROS_STATIC_PEERS
    interface: str  # network interface for several machines; empty: the one that is found
    remap: tuple[str, ...]  # topics under other names, "/FROM:=/TO"
    tick_hz: float  # guard
    state_timeout: float  # guard: older measured state is a fault
    stream_timeout: float  # guard: no action for this long, hold
    hold_timeout: float  # guard: held for this long, fault
    max_skew: float  # guard: clocks may differ by this much
    clamp_margin: float  # guard: excess of an action that is clamped, as a share of its half range
    guard_embodiment: str | None  # guard: its own file or a shipped name; None: that of env
    require_preflight: bool  # guard: refuse to arm until the preflight passed; `live`, in simulation, does not ask
    command_timeout: float  # twin: the driver's
    driver_hz: float  # twin: of arm and states, where the environment can follow commands between control steps
    inject: bool  # twin: have faults on request
    expert: bool  # twin: publish the environment's expert as a teleoperator
    slop: float  # policy: spread of the stamps in one observation
    max_age: float  # policy: oldest observation to act on
    replan_interval: float  # policy: least time between two observations to plan from; 0: as fast as it can
    mode: Literal["auto", "synchronous", "latency_compensated", "ensembling", "rtc"]  # how chunks follow each other
    n_action_steps: int | None  # of a chunk before the next one; None: `replan_interval`, or the checkpoint's
    compressed: bool  # images come as CompressedImage
    num_inference_steps: int | None  # None: the checkpoint's
    device: str  # of the policy
    precision: Literal["fp32", "bf16"]
    path: Literal["auto", "graph", "compiled", "eager"]  # auto: CUDA graphs on a GPU; falls back, and says why
    start_timeout: float  # until every process has joined
    episode_timeout: float  # until an episode is over
    command: str | None  # operator: one order; None: the console
    store: str  # recorder: folder
    instruction: str | None  # recorder: of episodes; None: what is on the topic
    codec: Literal["raw", "jpeg"]  # recorder
    record_gap: float  # recorder: longest time without an executed step
    record_seconds: float  # recorder: longest episode
    record_mb: float  # recorder: pictures of one episode in memory
    show: str | None  # black box: print this record
    black_box_seconds: float  # kept
    black_box_mb: float  # in memory
    black_box_hz: float  # pictures per camera
    black_box_after: float  # of a reaction, until it is written
    black_box_interval: float  # between two records
    black_box_records: int  # on disk
    black_box_disk_mb: float
    preflight: PreflightConfig

    def __post_init__(self) -> None:
        _require(self.episodes > 0, f"robot.episodes must be positive, got {self.episodes}")
        _require(0 < self.real_time_factor <= 1, f"robot.real_time_factor is in (0, 1], got {self.real_time_factor}")
