"""Run folder <-> policy and train state: safetensors and JSON, with a SHA-256 manifest written last.

    RUN/config.json                          resolved config of the run
    RUN/checkpoints/000500/policy/           model.safetensors (EMA), config.json, contract.json, manifest.json
    RUN/checkpoints/000500/train/            shard-*.safetensors (weights, moments, EMA), train.json, manifest.json

A folder without a manifest is not a checkpoint; a folder whose files do not fit its manifest is refused by file name.
The train state is written and read by torch.distributed.checkpoint, each rank its own shards, with its safetensors
storage: the other one keeps its index as a pickle, which reading would run. Any number of ranks reads what any other
number wrote.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dita.config import DiffusionConfig, PolicyConfig, from_dict, to_dict
from dita.distributed import ALONE, Ranks
from dita.policy.policy import DitaPolicy
from dita.preprocess import Contract

Precision = Literal["fp32", "bf16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FORMAT_VERSION = 2  # 2: q, k, v and gate, up are one tensor each
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class NoSpace(OSError):
    """The disk is full; older checkpoints are intact. The command may be given again once there is space."""

    exit_code = 75  # EX_TEMPFAIL


def save_policy(
    policy: DitaPolicy, folder: Path, weights: Mapping[str, Tensor] | None = None, precision: Precision = "fp32"
) -> None:
    """Write a policy folder, atomically; `weights` (e.g. the EMA's) replace the module's own.

    precision: bf16 halves the file, for deployment in that precision.

    Raises:
        ValueError: a weight is not finite.
    """
    from dita.lora import merged_weights  # which imports the policy too

    weights = merged_weights(policy, weights or policy.state_dict())
    tensors = {name: t.detach().cpu().contiguous() for name, t in weights.items()}
    if precision == "bf16":
        lower = {f"model.{name}" for name, _ in policy.model.named_parameters()}
        tensors = {name: t.to(torch.bfloat16) if name in lower else t for name, t in tensors.items()}
    _refuse_not_finite(tensors, "refusing to save weights that are not finite")
    config = {"policy": to_dict(policy.config), "diffusion": to_dict(policy.diffusion.config)}

    _require_space(folder, tensors.values())

    def fill(at: Path) -> None:
        save_file(tensors, at / "model.safetensors")
        write_json(at / "config.json", config)
        write_json(at / "contract.json", policy.contract.to_dict())

    write_folder(folder, fill)


def load_policy(folder: str | Path, device: str = "cpu", precision: Precision = "fp32") -> DitaPolicy:
    """Load a policy from a policy, checkpoint or run folder; see `DitaPolicy.from_pretrained`."""
    at = find_policy(Path(folder))
    check_device(device)
    verify_folder(at)
    config = read_json(at / "config.json")
    contract = Contract.from_dict(read_json(at / "contract.json"))
    path = at / "model.safetensors"
    # a mapping of its own, dropped again: pages that were looked at would stay in memory beside what is built from them
    _refuse_not_finite(load_tensors(path), f"{path} holds weights that are not finite")
    weights = load_tensors(path)
    config["policy"].setdefault("embodiment_dropout", 0.0)  # checkpoints before there was one
    sizes = from_dict(PolicyConfig, config["policy"], f"{at}/config.json: policy")
    objective = from_dict(DiffusionConfig, config["diffusion"], f"{at}/config.json: diffusion")
    with blank_weights(sizes):
        policy = DitaPolicy(sizes, objective, contract, weights["diffusion.alphas_cumprod"])
    _fit_names(policy, weights, path)
    policy.load_state_dict(weights, assign=True)
    weights.clear()
    for parameter in policy.model.parameters():  # schedules and pixel statistics are buffers and stay fp32
        parameter.data = parameter.data.to(DTYPES[precision])
    return policy.to(device).eval()


class _SkipInit(TorchFunctionMode):
    """Leave new weights as they are: what torch.nn.init would do to them is skipped."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init" or func in (Tensor.normal_, Tensor.uniform_):
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def blank_weights(config: PolicyConfig) -> AbstractContextManager[Any]:
    """Build a policy whose weights a file will replace: nothing is drawn, and no memory touched.

    The meta device would do for every policy, but using it costs a second of imports; transformers costs them anyway.
    """
    return _SkipInit() if config.vision.kind == "conv_qformer" else torch.device("meta")


def find_policy(folder: Path) -> Path:
    """Return the policy folder behind a policy, checkpoint or run folder.

    Raises:
        FileNotFoundError: there is none, with what was looked for.
    """
    if (folder / "contract.json").is_file():
        return folder
    if (folder / "policy" / "contract.json").is_file():
        return folder / "policy"
    if (folder / "checkpoints").is_dir():
        return last_checkpoint(folder) / "policy"
    what = "exists but holds no policy" if folder.is_dir() else "does not exist"
    raise FileNotFoundError(
        f"{folder} {what}: expected contract.json, policy/contract.json or checkpoints/ (a folder of `dita train`)"
    )


def last_checkpoint(run: Path) -> Path:
    """Return the newest whole checkpoint of a run.

    Raises:
        FileNotFoundError: the run has none yet.
    """
    whole = whole_checkpoints(run)
    if not whole:
        raise FileNotFoundError(f"{run} has no finished checkpoint yet; see {run}/log.jsonl for how far it came")
    return whole[-1]


def whole_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run that were written to the end, oldest first."""
    return [p for p in sorted((run / "checkpoints").glob("[0-9]*")) if (p / "train" / "manifest.json").is_file()]


class Saving:
    """A train state on its way to the disk: staged when this returns, written by a thread.

    Every rank makes one at the same step. Rank 0 writes what `also` writes, then the manifest, and renames.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        ranks: Ranks,
        also: Callable[[], None] = lambda: None,
    ) -> None:
        """Copy the tensors to memory and begin to write them; shards of a distributed tensor by their ranks.

        Raises:
            NoSpace: they may not fit.
        """
        dcp = _dcp()

        self.folder, self.began, self.error = folder, time.monotonic(), None
        self._partial, self._state, self._also, self._ranks = _partial_of(folder), dict(state), also, ranks
        ranks.on_first(self._prepare_for(tensors))
        writer = dcp.HuggingFaceStorageWriter(str(self._partial), save_distributed=True)
        _quiet_about_one_process()
        self._future = dcp.async_save(dict(tensors), storage_writer=writer, process_group=ranks.saving)
        self._thread = threading.Thread(target=self._finish, name=f"save {folder.parent.name}", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether it is still being written."""
        return self._thread.is_alive()

    def wait(self) -> None:
        """Wait for the end.

        Raises:
            NoSpace: the disk became full.
            OSError: the storage failed, on any rank.
        """
        self._thread.join()
        failed = self.error is not None
        if self._ranks.any(failed):
            raise self.error if self.error is not None else OSError(f"{self.folder} was not saved: rank 0 failed")

    def _prepare_for(self, tensors: Mapping[str, Tensor]) -> Callable[[], None]:
        def prepare() -> None:
            _require_space(self.folder, tensors.values())
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir(parents=True)

        return prepare

    def _finish(self) -> None:
        try:
            self._future.result()  # a rank's failure is raised on all of them
            if self._ranks.first:
                write_json(self._partial / "train.json", self._state)
                self._also()
                _seal(self._partial, self.folder)
        except BaseException as e:  # torch's CheckpointException is no Exception
            self.error = _storage_error(e, self.folder)
            if self._ranks.first:
                for partial in self._partial.parent.glob(".*.partial"):  # the policy's, too
                    shutil.rmtree(partial, ignore_errors=True)


def _dcp() -> Any:
    """Return torch's distributed checkpoints, which take a second to import and export few of their names."""
    import torch.distributed.checkpoint

    return torch.distributed.checkpoint


def restore(folder: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Any]:
    """Read a verified train state into tensors that are there, of any sharding, and return its plain values.

    Raises:
        ValueError: the tensors are others than the checkpoint's.
    """
    dcp = _dcp()

    reader = dcp.HuggingFaceStorageReader(str(folder))
    there = {n: tuple(m.size) for n, m in reader.read_metadata().state_dict_metadata.items()}  # pyright: ignore
    wrong = [n for n, t in tensors.items() if there.get(n) != tuple(t.shape)]
    if wrong:
        lines = [f"{n}: checkpoint {there.get(n)}, now {tuple(tensors[n].shape)}" for n in wrong[:5]]
        raise ValueError(f"{folder}: {len(wrong)} tensors do not fit the config: " + "; ".join(lines))
    _quiet_about_one_process()
    dcp.load(dict(tensors), storage_reader=reader, process_group=ranks.saving)
    return read_json(folder / "train.json")


def load_train_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a train state back into whole tensors.

    Raises:
        ValueError: damaged (the file is named).
    """
    dcp = _dcp()

    verify_train_state(folder)
    there = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    tensors = {n: torch.empty(m.size, dtype=m.properties.dtype) for n, m in there.items()}  # pyright: ignore
    return tensors, restore(folder, tensors, ALONE)


def verify_train_state(folder: Path) -> None:
    """Check every file of a train state, and that no other one would be read with it; raises ValueError."""
    verify_folder(folder)
    known = read_json(folder / "manifest.json")["files"]
    for path in folder.glob("*.safetensors"):  # all of them are read
        if path.name not in known:
            raise ValueError(f"{path} is not in the manifest beside it: move it away, or take another checkpoint")


def _quiet_about_one_process() -> None:
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    warnings.filterwarnings("ignore", message="TypedStorage is deprecated")


def _storage_error(error: BaseException, folder: Path) -> OSError:
    """Say in one line what stopped a save; failures of ranks come wrapped."""
    causes = [error, *(e for e, _ in getattr(error, "failures", {}).values())]
    text = "; ".join(dict.fromkeys(f"{type(e).__name__}: {e}" for e in causes[1:] or causes))
    what = f"{folder} was not saved ({text}); older checkpoints are intact"
    if any(isinstance(e, OSError) and e.errno in FULL for e in causes) or "No space left" in text:
        free = shutil.disk_usage(next(p for p in folder.absolute().parents if p.exists())).free
        return NoSpace(f"{what}; {free} bytes are free: make room and continue with --resume")
    return OSError(what)


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Fill a folder beside its final place, write its manifest last, and rename it in one step."""
    partial = _partial_of(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    fill(partial)
    _seal(partial, folder)


def _partial_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


def _seal(partial: Path, folder: Path) -> None:
    files = {p.name: {"size": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(partial.iterdir())}
    write_json(partial / "manifest.json", {"version": FORMAT_VERSION, "files": files})
    for path in partial.iterdir():
        _fsync(path)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
    _fsync(folder.parent)


def verify_folder(folder: Path) -> None:
    """Check every file against the manifest.

    Raises:
        ValueError: no manifest, another version, or a missing, resized or changed file, by name.
    """
    if not (folder / "manifest.json").is_file():
        raise ValueError(f"{folder} has no manifest.json: not a finished checkpoint; take an earlier one")
    manifest = read_json(folder / "manifest.json")
    if manifest.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"{folder} has format version {manifest.get('version')}, this Dita reads {FORMAT_VERSION}; load it with "
            "the Dita that wrote it, or train again"
        )
    try:
        files = {name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{folder}/manifest.json is damaged; take another checkpoint") from None
    for name, (size, digest) in files.items():
        path = folder / name
        if Path(name).name != name:
            raise ValueError(f"{folder}/manifest.json names {name!r}: outside the folder")
        if not path.is_file():
            raise ValueError(f"{path} is missing; take another checkpoint")
        if path.stat().st_size != size:
            raise ValueError(f"{path} has {path.stat().st_size} bytes, its manifest says {size}: truncated?")
        if _sha256(path) != digest:
            raise ValueError(f"{path} does not fit its SHA-256: damaged or edited; take another checkpoint")


def check_device(device: str) -> None:
    """Raise ValueError if a torch device is not there."""
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device {device!r} asked for; say cpu, cuda or cuda:0") from None
    there = {"cpu": 1, "cuda": torch.cuda.device_count()}.get(wanted.type, 0)
    if (wanted.index or 0) >= there:
        raise ValueError(
            f"device {device!r} asked for, but torch {torch.__version__} sees no such device; there "
            f"{'are' if torch.cuda.device_count() else 'is no CUDA device, only'} "
            f"{', '.join(['cpu', *(f'cuda:{i}' for i in range(torch.cuda.device_count()))])}"
        )


def write_json(path: Path, values: Any) -> None:
    """Write JSON for people and programs; NaN is refused."""
    path.write_text(json.dumps(values, indent=1, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises ValueError naming the file."""
    try:
        values = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{path} is not JSON: {e}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}, expected an object")
    return values


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Map a safetensors file: nothing is read before it is used; raises ValueError naming the file."""
    try:
        return load_file(path)
    except SafetensorError as e:
        raise ValueError(f"{path} is not a readable safetensors file: {e}") from None


def _refuse_not_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    bad = [name for name, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    if bad:
        raise ValueError(f"{what}: {bad[:5]}")


def _fit_names(policy: DitaPolicy, weights: Mapping[str, Tensor], path: Path) -> None:
    ours = {name: tuple(t.shape) for name, t in policy.state_dict().items()}
    theirs = {name: tuple(t.shape) for name, t in weights.items()}
    wrong = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if wrong:
        lines = [f"{name}: file {theirs.get(name)}, config {ours.get(name)}" for name in wrong[:5]]
        raise ValueError(f"{path}: {len(wrong)} tensors do not fit the config: " + "; ".join(lines))


def _require_space(folder: Path, tensors: Iterable[Tensor]) -> None:
    """Refuse to start a write that may not fit; the checkpoints before it stay as they are."""
    existing = next(p for p in folder.absolute().parents if p.exists())
    needed, free = 2 * sum(t.numel() * t.element_size() for t in tensors), shutil.disk_usage(existing).free
    if free < needed:
        raise NoSpace(
            f"no space for {folder}: {needed / 2**20:.0f} MiB wanted, {free / 2**20:.0f} MiB free; older checkpoints "
            "are intact: free some space (or lower keep_last) and continue with --resume"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
