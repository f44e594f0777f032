"""Row 5: windows per second and core: our loader, others' on the same content, and the bare minimum of the work.

A window is 2 or 16 frames of 224x224 and 16x7 actions. Every side reads the same windows in the same seeded random
order, in one process with one thread, from the page cache, in turn: A B C ... A B C ... Some peers are optional, and a
line without its peer says so. They go into a folder of their own, since neither declares what this project has:

.venv/bin/pip install --no-deps --target build/peers robomimic==0.3.0 termcolor==3.3.0 torchcodec==0.13.0
apt-get install ffmpeg  # the libraries that torchcodec loads
PYTHONPATH=build/peers make bench ROWS=loader
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from functools import cache
from io import StringIO
from itertools import cycle, islice
from operator import itemgetter
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Literal, cast

import google_crc32c
import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import OTHERS, Case, busy_cores
from benchmarks.policy_rows import base_config
from dita.config import LanguageConfig, PreprocessConfig
from dita.datasets.dataset import WindowDataset, iter_low_dim
from dita.datasets.mixture import MixtureSampler, Watched
from dita.datasets.mixture import loader as data_loader
from dita.datasets.shards import IMAGE_CODECS
from dita.datasets.store import Store, StoreWriter
from dita.datasets.windows import action_rows, compose_actions, observation_frames
from dita.embodiment import embodiment_from_dict
from dita.normalize import fit
from dita.preprocess import Preprocessor, make_contract
from dita.types import EmbodimentSpec, Episode, Window

Windows = Sequence[Sequence[int]]  # (episode, step of the last frame)

CHUNK = 16  # actions of a window
DIM = 7  # of the state and of an action
CAMERA, INSTRUCTION = "front", "push the disc"
HZ = 20.0
UNIT = "windows/s"
FRAMES_PER_BATCH = 64
VIDEO_CODECS = {"AV1": "libsvtav1", "h264": "libx264"}  # LeRobot's default, and its other one
VIDEO_OPTIONS = {"AV1": {"g": "2", "crf": "30", "preset": "12"}, "h264": {"g": "2", "crf": "30"}}  # LeRobot's
TOLERANCE_S = 1e-3  # between the stamp asked for and the frame's own
JPEG_ERROR, VIDEO_ERROR = 4.0, 12.0  # of 255, mean over an image
INSTALL = {
    "robomimic": ".venv/bin/pip install --no-deps --target build/peers robomimic==0.3.0 termcolor==3.3.0",
    "torchcodec": ".venv/bin/pip install --no-deps --target build/peers torchcodec==0.13.0, apt-get install ffmpeg",
}
ZARR_NOTE = "zarr-python on our own files, one call per window; state and actions in memory, in its favour"
ROBOMIMIC_NOTE = (
    "robomimic 0.3.0's SequenceDataset, uncompressed HDF5, as many actions as frames, the faster of hdf5_cache_mode "
    "None and low_dim. Mode all is no reading, it keeps every window ready in memory: {ready:.0f} MB for "
    "{plain:.0f} MB of images"
)
LEROBOT_NOTE = (
    "LeRobot's package does not install beside this torch: its decoding by time stamp to float32, written from its "
    "public behaviour, of mp4 as it encodes (g=2, crf 30, yuv420p; the faster of AV1 and h264), one thread; the other "
    "columns are in memory, in its favour"
)
BARE_VIDEO_NOTE = "torchcodec with every decoder open, frames by number, left as uint8"
MEMMAP_NOTE = (
    "the same windows cut from a mapped array; ours also checks the crc32c of each frame at every read, which alone "
    "runs at {crc:,.0f} windows/s"
)
RAM_NOTE = "data.cache=ram: JPEGs decoded and checked once, then read from shared memory"
CRC = "crc32c alone"
COPY_NOTE = "image rows of a mapped array and the low-dimensional rows: no masks, no crc32c"
WORKERS_NOTE = "DataLoader: windows/s of all workers, sampler to preprocessed batch of uint8"


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    pixels: int
    episodes: int
    length: int
    rounds: int
    turn_s: float  # a side reads about this long per round
    batches: int  # through the DataLoader per round
    frames: tuple[int, ...]  # of a window


SIZES = {"full": Size(224, 30, 60, 7, 0.5, 48, (2, 16)), "quick": Size(64, 3, 24, 1, 0.02, 4, (2,))}


@dataclass(frozen=True, eq=False)
class Content:
    """The same episodes for every side; no file, just arrays."""

    images: np.ndarray  # [n, p, p, 3] uint8, episode after episode
    state: np.ndarray  # [n, 7] float32
    action: np.ndarray
    length: int  # of every episode

    @classmethod
    def make(cls, size: Size) -> Content:
        """Film moving discs over smooth gradients through a slightly noisy camera, so that codecs have their work."""
        rng = np.random.default_rng(0)
        n = size.episodes * size.length
        images = np.concatenate([film(rng, size) for _ in range(size.episodes)])
        low_dim = rng.uniform(-1, 1, (2, n, DIM)).astype(np.float32)
        return cls(images, low_dim[0], low_dim[1], size.length)

    @property
    def episodes(self) -> range:
        """Numbers of the episodes."""
        return range(len(self.images) // self.length)

    def part(self, episode: int) -> slice:
        """Return where an episode lies."""
        return slice(episode * self.length, (episode + 1) * self.length)

    def rows(self, episode: int, step: int, t: int) -> np.ndarray:
        """Return which images are the frames of a window."""
        last = episode * self.length + step
        return np.arange(last - t + 1, last + 1)

    def low_dim(self, episode: int, step: int, t: int) -> tuple[np.ndarray, np.ndarray]:
        """Copy state [t, 7] and actions [16, 7] of a window out of memory; the last action is repeated past the end."""
        first = episode * self.length
        chunk = np.minimum(np.arange(step, step + CHUNK), self.length - 1)
        return self.state[first + step - t + 1 : first + step + 1].copy(), self.action[first + chunk]

    def windows(self, t: int, seed: Sequence[int]) -> np.ndarray:
        """Return (episode, step of the last frame) of every window with t frames, in a seeded order."""
        steps = np.arange(t - 1, self.length)
        all_of_them = np.stack(np.meshgrid(self.episodes, steps, indexing="ij"), -1).reshape(-1, 2)
        return np.random.default_rng(seed).permutation(all_of_them)


def film(rng: np.random.Generator, size: Size) -> np.ndarray:
    """Return one episode's images [length, p, p, 3]."""
    p, discs = size.pixels, 5
    y, x = np.mgrid[0:p, 0:p].astype(np.float32) / p
    waves, phase = rng.uniform(0.3, 2.0, (3, 2)), rng.uniform(0, 6.3, 3)
    back = np.stack([128 + 90 * np.sin(6.3 * (a * x + b * y) + c) for (a, b), c in zip(waves, phase, strict=True)], -1)
    radius, colour = rng.uniform(0.03, 0.15, discs), rng.uniform(0, 255, (discs, 3))
    place, speed = rng.uniform(0, 1, (discs, 2)), rng.uniform(-0.02, 0.02, (discs, 2))
    frames = np.empty((size.length, p, p, 3), np.uint8)
    for i in range(size.length):
        frame = back + 2 * rng.standard_normal((p, p, 3), np.float32)
        for r, c, (u, v) in zip(radius, colour, (place + i * speed) % 1, strict=True):
            frame[(x - u) ** 2 + (y - v) ** 2 < r**2] = c
        frames[i] = frame.clip(0, 255)
    return frames


@dataclass(frozen=True, eq=False)
class Side:
    """One way to read a window, by its episode and the step of its last frame."""

    read: Callable[[int, int], Any]
    images: Callable[[Any], Any]  # of what `read` returns, [t, p, p, 3]
    error: float = 0.0  # mean absolute difference from the content that its codec may make

    def __call__(self, order: Windows) -> int:
        """Read these windows; return how many."""
        for episode, step in order:
            self.read(episode, step)
        return len(order)


@dataclass
class Rates:
    """Windows per second, one value per round: of wall time, and of this process's CPU time."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def loader(tier: str) -> list[Case]:
    """Row 5: random access to windows, ours against others and against ceilings; and one and two loader workers."""
    size, threads = SIZES[tier], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with TemporaryDirectory(prefix="dita-loader-") as folder:
            files = Files(Path(folder), Content.make(size))
            return [case for t in size.frames for case in Table(files, t, size).cases()]
    finally:
        torch.set_num_threads(threads)


class Files:
    """The content in every format, in one folder."""

    def __init__(self, folder: Path, content: Content) -> None:
        self.folder, self.content = folder, content
        self.stores = {codec: write_store(folder / f"{codec}.zarr", content, codec) for codec in ("raw", "jpeg")}
        self.missing = missing_peers()
        np.save(folder / "images.npy", content.images)
        self.hdf5 = folder / "robomimic.hdf5"
        if "robomimic" not in self.missing:
            write_hdf5(self.hdf5, content)
        self.videos = {name: folder / name for name in VIDEO_CODECS}
        for name, path in self.videos.items():
            path.mkdir()
            for episode in content.episodes:
                write_video(path / f"{episode}.mp4", content.images[content.part(episode)], name)

    def megabytes(self) -> dict[str, float]:
        """Return the size of each format on disk."""
        return {
            p.name: sum(f.stat().st_size for f in [p, *p.rglob("*")] if f.is_file()) / 1e6
            for p in sorted(self.folder.iterdir())
        }


def embodiment(pixels: int) -> EmbodimentSpec:
    """Make up an arm with 7 state dims, 7 action dims and one camera."""

    def one_field(name: str, slot: int) -> dict[str, Any]:
        return {
            "name": name, "kind": "joint_position", "size": DIM, "unit": "rad", "frame": "joint", "mode": "absolute",
            "reference": None, "scale": 1.0, "slot": slot, "low": [-1.0] * DIM, "high": [1.0] * DIM,
        }  # fmt: skip

    return embodiment_from_dict({
        "name": "arm", "robot": "made up", "state": [one_field("joints", 0)], "action": [one_field("joints", 0)],
        "cameras": [{"name": CAMERA, "height": pixels, "width": pixels, "slot": 0}],
        "obs_dt": 1 / HZ, "action_dt": 1 / HZ, "control_hz": HZ, "limits": None,
    })  # fmt: skip


def write_store(path: Path, content: Content, codec: Literal["raw", "jpeg"]) -> Store:
    """Write our own format."""
    spec = embodiment(content.images.shape[1])
    with StoreWriter.create(path, spec, source="synthetic", licence="CC0-1.0", codec=codec) as writer:
        for episode in content.episodes:
            part = content.part(episode)
            writer.add(
                Episode(
                    images={CAMERA: content.images[part]},
                    state=content.state[part],
                    action=content.action[part],
                    stamp=np.arange(content.length) / HZ,
                    instruction=INSTRUCTION,
                    success=True,
                    source=f"{episode}",
                )
            )
    return Store(path)


def write_hdf5(path: Path, content: Content) -> None:
    """Write what robomimic reads: uncompressed, as its own tools do by default."""
    import h5py

    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["total"] = len(content.images)
        for episode in content.episodes:
            demo, part = data.create_group(f"demo_{episode}"), content.part(episode)
            demo.attrs["num_samples"] = content.length
            demo["actions"] = content.action[part]
            demo[f"obs/{CAMERA}"] = content.images[part]
            demo["obs/state"] = content.state[part]


def write_video(path: Path, frames: np.ndarray, codec: str) -> None:
    """Encode an episode as LeRobot does."""
    import av

    os.environ.setdefault("SVT_LOG", "1")  # errors only
    with av.open(str(path), "w") as file:
        stream = file.add_stream(VIDEO_CODECS[codec], rate=Fraction(HZ), options=VIDEO_OPTIONS[codec])
        stream = cast(av.VideoStream, stream)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())


def missing_peers() -> dict[str, str]:
    """Say which optional peers cannot run here, and why."""
    missing = {}
    for name, module in (("robomimic", "robomimic.utils.dataset"), ("torchcodec", "torchcodec.decoders")):
        try:
            importlib.import_module(module)
        except (ImportError, OSError, RuntimeError) as e:  # torchcodec raises what its libraries make of it
            reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
            missing[name] = f"does not run here ({reason}); {INSTALL[name]}"
    return missing


class Table:
    """All sides with windows of t frames, measured in turn, as lines of the row."""

    def __init__(self, files: Files, t: int, size: Size) -> None:
        self.files, self.t = files, t
        content = files.content
        sides = {
            **our_sides(files, t),
            **zarr_sides(files, t),
            **robomimic_sides(files, t),
            **lerobot_sides(files, t),
            **ceilings(files, t),
        }
        check(sides, content, t)
        turns = {**sides, **worker_turns(files, t, size)}
        counts = {name: warm_up(turn, content.windows(t, [1, t]).tolist(), size.turn_s) for name, turn in turns.items()}
        self.others = busy_cores()
        self.rates = {name: Rates() for name in turns}
        for number in range(size.rounds):
            order = content.windows(t, [2, t, number]).tolist()
            for name, turn in turns.items():
                windows = list(islice(cycle(order), counts[name]))
                wall, cpu = time.perf_counter(), time.process_time()
                read = turn(windows)
                self.rates[name].wall.append(read / (time.perf_counter() - wall))
                self.rates[name].cpu.append(read / max(time.process_time() - cpu, 1e-9))
        self.detail = {"windows": counts, "others_cores": self.others, "megabytes": files.megabytes()}

    def cases(self) -> list[Case]:
        """Compare."""
        copy, decode = "bare memmap copy", "bare JPEG decode"
        memmap = MEMMAP_NOTE.format(crc=median(self.rates[CRC].wall))
        robomimic = ROBOMIMIC_NOTE.format(plain=self.files.content.images.nbytes / 1e6, ready=self._ready_megabytes())
        return [
            self.line("raw", "zarr-python", ["zarr-python raw"], 20, ZARR_NOTE, copy),
            self.line("raw", "robomimic", ["robomimic None", "robomimic low_dim"], 5, robomimic, copy),
            *(
                self.line("jpeg", name, [f"{name} {v}" for v in VIDEO_CODECS], 3, LEROBOT_NOTE, decode)
                for name in ("PyAV", "torchcodec")
            ),
            self.line("raw", "memmap windows", ["memmap windows"], 0.6, memmap),
            self.line("jpeg", decode, [decode], 0.8),
            self.line("raw", copy, [copy], None, COPY_NOTE),
            self.line("jpeg", "bare torchcodec", [f"bare torchcodec {codec}" for codec in VIDEO_CODECS], None,
                      BARE_VIDEO_NOTE),
            self.line("jpeg", "zarr-python", ["zarr-python jpeg"], None, ZARR_NOTE),
            self.line("ram", "robomimic", ["robomimic None", "robomimic low_dim"], None, RAM_NOTE),
            self.line("ram", "torchcodec", [f"torchcodec {codec}" for codec in VIDEO_CODECS], None, RAM_NOTE),
            *(
                self.line(f"{codec}, 2 workers", "1 worker", [f"{codec}, 1 worker"], None, WORKERS_NOTE)
                for codec in self.files.stores
            ),
        ]  # fmt: skip

    def line(
        self, ours: str, peer: str, peers: list[str], goal: float | None, note: str = "", ceiling: str | None = None
    ) -> Case:
        """Compare one of our sides with the fastest of a peer's; say where a goal lies above what can be had."""
        name, text = f"{self.t} frames: {ours} / {peer}", "reported" if goal is None else f">= {goal:g}x"
        mine = self.rates[ours]
        if why := self.files.missing.get(peer.removeprefix("bare ")):
            return Case(name, median(mine.wall), None, UNIT, None, text, None, f"{peer} {why}", self.detail)
        best = max(peers, key=lambda p: median(self.rates[p].wall))
        wall, cpu = self._ratios(ours, best)
        if goal is not None and ceiling is not None and (most := self._ratios(ceiling, best)[0]) < goal:
            note = f"{name}: out of reach, a {ceiling} itself reaches {most:.2f}x"
        rates = {k: asdict(self.rates[k]) for k in (ours, *peers)}
        detail = {"fastest": best, "cpu_ratio": cpu, "rates": rates, **self.detail}
        values = (name, median(mine.wall), median(self.rates[best].wall), UNIT)
        if self.others > OTHERS:
            busy = f"no wall-time ratio: others used {self.others:.1f} cores"
            busy += "" if note == WORKERS_NOTE else f"; CPU-time ratio {cpu:.2f}x"  # of this process only
            return Case(*values, None, text, None, "; ".join(filter(None, [busy, note])), detail)
        return Case(*values, wall, text, None if goal is None else wall >= goal, note, detail)

    def _ratios(self, ours: str, peer: str) -> tuple[float, float]:
        """Return the medians over rounds of the ratios of wall-time and CPU-time rates."""
        a, b = self.rates[ours], self.rates[peer]
        wall, cpu = (median(x / y for x, y in zip(*pair, strict=True)) for pair in ((a.wall, b.wall), (a.cpu, b.cpu)))
        return wall, cpu

    def _ready_megabytes(self) -> float:
        content = self.files.content
        return len(content.windows(1, [0])) * self.t * content.images[0].nbytes / 1e6


def warm_up(turn: Callable[[Windows], int], order: Windows, seconds: float) -> int:
    """Read for some time, so that everything is open and in the page cache; return how many windows that were."""
    read, end = 0, time.perf_counter() + seconds
    windows = cycle(order)
    while read == 0 or time.perf_counter() < end:
        read += turn([next(windows)])
    return read


def check(sides: Mapping[str, Side], content: Content, t: int) -> None:
    """Refuse to time sides that do not read the same."""
    for episode, step in content.windows(t, [0, t])[:3].tolist():
        expected = content.images[content.rows(episode, step, t)].astype(np.float32)
        seen = {}
        for name, side in sides.items():
            found = np.asarray(side.images(side.read(episode, step)))
            assert found.shape == expected.shape and found.dtype == np.uint8, f"{name}: {found.shape} {found.dtype}"
            difference = float(np.abs(found - expected).mean())
            assert difference <= side.error, f"{name} differs by {difference} from what was written"
            seen[name] = found
        for name in ("ram", "zarr-python jpeg", "bare JPEG decode"):
            assert np.array_equal(seen["jpeg"], seen[name]), f"{name} does not decode the same bytes"


def our_sides(files: Files, t: int) -> dict[str, Side]:
    """Ours: the store through WindowDataset, each frame read and checked every time; and a cache of decoded frames."""
    sides = {}
    for name, store in (*files.stores.items(), ("ram", files.stores["jpeg"])):
        dataset = windows_of(store, t, "ram" if name == "ram" else "mmap")
        first = {int(e.source): i * files.content.length for i, e in enumerate(store.episodes)}

        def read(episode: int, step: int, dataset: WindowDataset = dataset, first: dict[int, int] = first) -> Window:
            return dataset[first[episode] + step]

        sides[name] = Side(read, lambda window: window.images[CAMERA], 0 if name == "raw" else JPEG_ERROR)
    return sides


def windows_of(store: Store, t: int, cached: Literal["mmap", "ram"] = "mmap") -> WindowDataset:
    """Return the windows of a store."""
    return WindowDataset(store, n_obs_steps=t, chunk_size=CHUNK, pad_end="mask", cache=cached)


def worker_turns(files: Files, t: int, size: Size) -> dict[str, Callable[[Windows], int]]:
    """Ours as the trainer loads: sampler, windows, preprocessing and batches of uint8, in 1 or 2 worker processes."""
    turns = {}
    for codec, store in files.stores.items():
        dataset, batch_size = windows_of(store, t), FRAMES_PER_BATCH // t
        config = base_config("full", CHUNK + 1, n_obs_steps=t, past_action_slots=0,
                             language=LanguageConfig("bytes", 32, 1, None))  # fmt: skip
        config = replace(config, chunk_size=CHUNK, vision=replace(config.vision, image_size=size.pixels))
        stats = fit(store.spec, iter_low_dim(store))
        contract = make_contract(PreprocessConfig("q01_q99", "squash", "stored"), config, [store.spec], [stats])
        for workers in (1, 2):
            batches = data_loader(
                [dataset], MixtureSampler([len(dataset)], [1.0], 0), batch_size=batch_size,
                preprocess=Preprocessor(contract).batch, start_step=0, steps=size.batches, workers=workers,
            )  # fmt: skip

            def turn(_: Windows, batches: Watched = batches) -> int:
                return sum(len(batch.actions) for batch in batches)

            turns[f"{codec}, {workers} worker{'s' * (workers > 1)}"] = turn
    return turns


def zarr_sides(files: Files, t: int) -> dict[str, Side]:
    """zarr-python on our own files, one call per window; state and actions from memory, in its favour."""
    import zarr

    import dita.datasets.jpeg  # noqa: F401  registers the codec

    content, sides = files.content, {}
    for codec, store in files.stores.items():
        group = zarr.open_group(str(store.path), mode="r")
        images = group[f"segments/{store.segments[0]}/images/{CAMERA}"]
        first = {int(e.source): e.start for e in store.episodes}

        def read(episode: int, step: int, images: Any = images, first: dict[int, int] = first) -> tuple:
            last = first[episode] + step + 1
            return images[last - t : last], *content.low_dim(episode, step, t)

        sides[f"zarr-python {codec}"] = Side(read, itemgetter(0), JPEG_ERROR if codec == "jpeg" else 0)
    return sides


def robomimic_sides(files: Files, t: int) -> dict[str, Side]:
    """robomimic's own dataset; its window i begins at frame i of a demo."""
    if "robomimic" in files.missing:
        return {}
    with redirect_stdout(StringIO()):  # it prints what it was told
        from robomimic.utils.dataset import SequenceDataset  # pyright: ignore
        from robomimic.utils.obs_utils import initialize_obs_utils_with_obs_specs  # pyright: ignore

        initialize_obs_utils_with_obs_specs({"obs": {"rgb": [CAMERA], "low_dim": ["state"]}})
        sides = {}
        for mode in (None, "low_dim"):
            dataset = SequenceDataset(
                str(files.hdf5), [CAMERA, "state"], ["actions"], seq_length=t, hdf5_cache_mode=mode, load_next_obs=False
            )
            first = {int(name.split("_")[1]): start for name, start in dataset._demo_id_to_start_indices.items()}

            def read(episode: int, step: int, dataset: Any = dataset, first: dict[int, int] = first) -> dict[str, Any]:
                return dataset[first[episode] + step - t + 1]

            sides[f"robomimic {mode}"] = Side(read, lambda found: found["obs"][CAMERA])
    return sides


def lerobot_sides(files: Files, t: int) -> dict[str, Side]:
    """mp4 by time stamp, as LeRobot reads it (see LEROBOT_NOTE), and the fastest that torchcodec can do."""
    content, sides = files.content, {}
    readers = {"PyAV": decode_pyav, "torchcodec": decode_torchcodec, "bare torchcodec": decode_bare}
    for name, decode in readers.items():
        if name.removeprefix("bare ") in files.missing:
            continue
        for codec, folder in files.videos.items():

            def read(episode: int, step: int, decode: Any = decode, folder: Path = folder) -> tuple:
                stamps = [i / HZ for i in range(step - t + 1, step + 1)]
                return decode(str(folder / f"{episode}.mp4"), stamps), *content.low_dim(episode, step, t)

            sides[f"{name} {codec}"] = Side(read, lambda found: as_images(found[0]), VIDEO_ERROR)
    return sides


def as_images(frames: Tensor) -> Tensor:
    """Return [t 3 p p], float32 in 0..1 or uint8, as [t p p 3] uint8."""
    whole = frames if frames.dtype == torch.uint8 else (frames * 255).round().byte()
    return whole.permute(0, 2, 3, 1)


def decode_pyav(path: str, stamps: list[float]) -> Tensor:
    """Open, seek to the key frame before, decode up to the last stamp, take the nearest frames [t 3 p p]."""
    import av

    frames, found = [], []
    with av.open(path) as file:
        stream = file.streams.video[0]
        stream.codec_context.thread_count = 1
        assert stream.time_base is not None
        file.seek(int(stamps[0] / stream.time_base), stream=stream)
        for frame in file.decode(stream):
            found.append(cast(float, frame.time))
            frames.append(torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1))
            if found[-1] > stamps[-1] - TOLERANCE_S:
                break
    return nearest(frames, torch.tensor(found), stamps)


def decode_torchcodec(path: str, stamps: list[float]) -> Tensor:
    """Ask a decoder that stays open, over fsspec, for frames by number, and compare their stamps; [t 3 p p]."""
    decoder = open_torchcodec(path, remote=True)
    fps = decoder.metadata.average_fps
    found = decoder.get_frames_at(indices=[round(s * fps) for s in stamps])
    return nearest(list(found.data), found.pts_seconds.float(), stamps)


def decode_bare(path: str, stamps: list[float]) -> Tensor:
    """Ask a decoder that stays open, over the file itself, for frames by number; [t 3 p p] uint8."""
    return open_torchcodec(path, remote=False).get_frames_at(indices=[round(s * HZ) for s in stamps]).data


@cache
def open_torchcodec(path: str, remote: bool) -> Any:
    """Open a file once, as one that may be remote or as a local one."""
    import fsspec
    from torchcodec.decoders import VideoDecoder  # pyright: ignore

    source: Any = fsspec.open(path).__enter__() if remote else path
    return VideoDecoder(source, seek_mode="approximate", num_ffmpeg_threads=1)


def nearest(frames: Sequence[Tensor], found: Tensor, stamps: list[float]) -> Tensor:
    """Return the frames nearest to each stamp as float32 in 0..1; outside the tolerance it is an error."""
    distance, place = torch.cdist(torch.tensor(stamps)[:, None], found[:, None], p=1).min(1)
    assert bool((distance < TOLERANCE_S).all()), f"no frames at {stamps}, found {found.tolist()}"
    return (torch.stack([frames[i] for i in place.tolist()]) / 255.0).type(torch.float32)


def ceilings(files: Files, t: int) -> dict[str, Side]:
    """The least that can be done: a mapped array, as windows and as a copy; the same JPEG bytes, held in memory."""
    import simplejpeg

    content, spec = files.content, files.stores["raw"].spec
    mapped = np.load(files.folder / "images.npy", mmap_mode="r")
    actions = [compose_actions(content.action[content.part(e)], 1, spec.action) for e in content.episodes]
    level = IMAGE_CODECS["jpeg"]["configuration"]
    jpegs = [simplejpeg.encode_jpeg(f, level["level"], "RGB", level["subsampling"]) for f in content.images]
    room = np.empty((t, *content.images.shape[1:]), np.uint8)  # used again and again: no window is made

    def window(episode: int, step: int) -> Window:
        frames, frame_valid = observation_frames(step, t, 1)
        rows, step_valid = action_rows(content.length, step, CHUNK, 1, "mask")
        frames += episode * content.length
        return Window(
            {CAMERA: mapped[frames]}, frame_valid, content.state[frames], INSTRUCTION, spec.name, step / HZ,
            actions[episode][rows], step_valid,
        )  # fmt: skip

    def copy(episode: int, step: int) -> tuple:
        return mapped[content.rows(episode, step, t)], *content.low_dim(episode, step, t)

    def decode(episode: int, step: int) -> list[np.ndarray]:
        rows = content.rows(episode, step, t)
        return [simplejpeg.decode_jpeg(jpegs[i], "RGB", buffer=to) for i, to in zip(rows, room, strict=True)]

    def checked(episode: int, step: int) -> np.ndarray:
        frames = mapped[content.rows(episode, step, t)[0] :][:t]  # not copied
        for frame in frames:
            google_crc32c.value(frame)
        return frames

    return {
        CRC: Side(checked, lambda found: found),
        "memmap windows": Side(window, lambda found: found.images[CAMERA]),
        "bare memmap copy": Side(copy, itemgetter(0)),
        "bare JPEG decode": Side(decode, np.stack, JPEG_ERROR),
    }
