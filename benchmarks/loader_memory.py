"""Does a loader's memory grow? Read many windows and fit a line to the memory of the loading processes.

Counts the resident memory of this process and its workers, mapped files included. Prints JSON; exit code 1 if the
fitted line rises by more than 1 % of the mean over the counted windows.

python benchmarks/loader_memory.py --windows 50000
python benchmarks/loader_memory.py --store data/demo.zarr --cache ram --workers 2
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.progress import track

from dita.batch import Batch
from dita.config import LanguageConfig, PolicyConfig, PreprocessConfig, VisionConfig
from dita.datasets.dataset import WindowDataset, iter_low_dim
from dita.datasets.mixture import MixtureSampler, loader
from dita.datasets.store import Store
from dita.datasets.writer import StoreWriter
from dita.embodiment import load_embodiment
from dita.normalize import fit
from dita.preprocess import Preprocessor, make_contract
from dita.types import Episode

SAMPLES = 100  # of the memory, evenly over the run
WARM_UP = 0.2  # share of the samples left out: imports, allocator pools, and the first epoch, which maps the files


def synthetic_store(path: Path, codec: Literal["raw", "jpeg"], episodes: int = 40, length: int = 200) -> Store:
    """Write a store of noise for the demo's robot: 40 episodes are 220 MB of raw frames."""
    spec = load_embodiment("metaworld_sawyer")
    rng = np.random.default_rng(0)
    with StoreWriter.create(path, spec, source="noise", licence="CC0-1.0", codec=codec) as writer:
        for number in range(episodes):
            writer.add(
                Episode(
                    images={
                        c.name: rng.integers(0, 256, (length, c.height, c.width, 3), np.uint8) for c in spec.cameras
                    },
                    state=rng.uniform(-1, 1, (length, spec.state_dim)).astype(np.float32),
                    action=rng.uniform(-0.01, 0.01, (length, spec.action_dim)).astype(np.float32),
                    stamp=np.arange(length) / spec.control_hz,
                    instruction=f"instruction {number % 7}",
                    success=True,
                    source=str(number),
                )
            )
    return Store(path)


def batches_of(
    store: Store, *, windows: int, batch_size: int, workers: int, cache: Literal["mmap", "ram"], n_obs_steps: int = 2
) -> Iterable[Batch]:
    """Return a loader over one store, as training makes it."""
    size = max(c.height for c in store.spec.cameras)
    vision = VisionConfig("conv_qformer", size, 4, 1, None, True, 16, 0, 0, None, False)
    policy = PolicyConfig(
        name="none", dim=64, layers=1, heads=1, ffn_dim=64, n_obs_steps=n_obs_steps, chunk_size=8, n_action_steps=8,
        past_action_slots=0, max_committed_slots=0, action_dim=32, state_dim=64,
        cameras=1 + max(c.slot for c in store.spec.cameras),
        state_tokens=True, embodiment_token=False, embodiment_dropout=0.0, action_embedding="linear",
        action_attention="causal", vision=vision, language=LanguageConfig("bytes", 64, 1, None),
    )  # fmt: skip
    stats = fit(store.spec, iter_low_dim(store))
    contract = make_contract(PreprocessConfig("min_max", "squash", "stored"), policy, [store.spec], [stats])
    dataset = WindowDataset(store, n_obs_steps=n_obs_steps, chunk_size=8, pad_end="mask", cache=cache)
    return loader(
        [dataset], MixtureSampler([len(dataset)], [1.0], 0), batch_size=batch_size,
        preprocess=Preprocessor(contract).batch, start_step=0, steps=windows // batch_size, workers=workers,
    )  # fmt: skip


def resident() -> int:
    """Return the resident memory of this process and its children [bytes]."""
    children = Path("/proc/self/task").glob("*/children")
    pids = ["self", *(pid for file in children for pid in file.read_text().split())]
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
    return pages * 4096


def measure(batches: Iterable[Batch], steps: int, batch_size: int) -> dict[str, Any]:
    """Read all batches; return memory in MiB, and how far the line through it rises over what was counted."""
    every = max(1, steps // SAMPLES)
    seen, memory = [], []
    for step, _ in enumerate(track(batches, "windows", total=steps)):
        if step % every == 0:
            seen.append(step * batch_size)
            memory.append(resident() / 2**20)
    skip = int(len(seen) * WARM_UP)
    x, y = np.array(seen[skip:]), np.array(memory[skip:])
    slope = float(np.polyfit(x, y, 1)[0])
    return {
        "windows": steps * batch_size,
        "first_mib": float(y[0]),
        "last_mib": float(y[-1]),
        "mean_mib": float(y.mean()),
        "rise": slope * float(x[-1] - x[0]) / float(y.mean()),
    }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", help="folder or URL (default: a synthetic one)")
    parser.add_argument("--codec", choices=["raw", "jpeg"], default="raw", help="of the synthetic store")
    parser.add_argument("--windows", type=int, default=50_000)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--cache", choices=["mmap", "ram"], default="mmap")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="dita-memory-") as folder:
        store = Store(args.store) if args.store else synthetic_store(Path(folder) / "s.zarr", args.codec)
        batches = batches_of(
            store, windows=args.windows, batch_size=args.batch_size, workers=args.workers, cache=args.cache
        )
        found = measure(batches, args.windows // args.batch_size, args.batch_size)
    chosen = {"codecs": store.codecs, "workers": args.workers, "cache": args.cache}
    print(json.dumps(chosen | found))
    return int(found["rise"] > 0.01)


if __name__ == "__main__":
    sys.exit(main())
