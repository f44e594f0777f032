"""`dita convert`: every input episode ends as written or as rejected with a code, and the numbers must add up.

Worker processes read, convert and check episodes; this process alone writes, in the order of the input, so that the
store does not depend on the number of workers. On Ray each task stages its share under a writer of its own (one
segment each), this process drops what two tasks wrote twice, and the tasks seal.
"""

from __future__ import annotations

import logging
import shutil
from collections import Counter, deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dita.datasets.convert import load_source
from dita.datasets.convert.base import (
    Item,
    Note,
    Options,
    Refused,
    Rejected,
    Source,
    check,
    check_name,
    json_lines,
    printable,
    reject,
)
from dita.datasets.files import LocalFiles
from dita.datasets.segments import read_json, sealed_segments, staged_episodes
from dita.datasets.store import Store, StoreError, StoreWriter
from dita.datasets.writer import content_hash
from dita.embodiment import load_embodiment
from dita.envs.workers import Worker, answered
from dita.types import EmbodimentSpec, Episode

SEAL_BYTES = 4 * 2**30  # staged episodes are sealed whenever they reach this much
SHOWN = 20  # warnings and rejections on the terminal; the file has all rejections

log = logging.getLogger(__name__)
Outcomes = Generator[tuple[Item, "Outcome"], None, None]


@dataclass(frozen=True)
class ConvertConfig:
    """What to convert, and how."""

    source: str  # key of SOURCES
    path: Path
    out: Path
    embodiment: str | None  # shipped name or file; None: inferred, where the format tells enough
    instruction: str | None  # where the format has none
    control_hz: float | None  # [Hz] where the format has none
    extra: Mapping[str, str]  # the source's own OPTIONS
    codec: Literal["raw", "jpeg"]
    licence: str
    workers: int  # processes, or Ray tasks; 0: in this process
    exist: Literal["error", "resume", "overwrite"]
    quarantine: bool  # go on after a rejection
    ray: str | None  # address of a cluster


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of reading one item: an episode, or a rejection."""

    episode: Episode | None
    rejected: Rejected | None
    content: str = ""  # the episode's content hash
    warnings: tuple[str, ...] = ()


@dataclass
class Tally:
    """The account of one run; `total` = written + rejected + already there + not read."""

    total: int
    written: int = 0
    there: int = 0
    rejected: list[Rejected] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    failed: Rejected | None = None  # the rejection that ended the run
    created: bool = False  # the store is this run's own

    @property
    def unread(self) -> int:
        """Episodes that the run did not come to."""
        return self.total - self.written - self.there - len(self.rejected)

    def line(self) -> str:
        """Return the account in one line."""
        text = f"in {self.total} = written {self.written} + rejected {len(self.rejected)} + already there {self.there}"
        return text + (f" + not read {self.unread}" if self.unread else "")


def convert(config: ConvertConfig) -> Tally:
    """Convert an input into a store; print the account and list what was rejected.

    Raises:
        FileExistsError: `config.out` exists and `config.exist` is "error".
        Rejected: the first rejection, unless `config.quarantine`; what was read before it is sealed.
        ValueError: an unknown source or option, no embodiment, or nothing was written.
        StoreError: E_LOCKED, E_NOSPACE: finished episodes are kept, `--resume` goes on.
    """
    if config.ray is not None:  # tasks work in other folders
        given = config.embodiment
        file = given if given is None or not Path(given).is_file() else str(Path(given).absolute())
        config = replace(config, path=config.path.absolute(), out=config.out.absolute(), embodiment=file)
    if config.exist == "error" and config.out.exists():
        raise FileExistsError(f"{config.out} exists; --resume continues it, --overwrite deletes it first")
    try:
        with closing(open_input(config)) as source:
            items, spec, warnings = source.items(), source.spec, list(source.warnings)
        _check_items(items, config.path)
    except Refused:
        raise
    except Rejected as e:  # the input as a whole
        _finish(config, Tally(1, rejected=[e], failed=e))
        raise
    tally = Tally(len(items), warnings=warnings)
    try:
        if config.ray is None:
            _convert_here(config, spec, items, tally)
        else:
            _convert_on(ray_cluster(config.ray), config, spec, items, tally)
    finally:
        files = LocalFiles(config.out)
        if tally.created and not (sealed_segments(files) or staged_episodes(files)):
            shutil.rmtree(config.out)  # an empty store is no store
        _finish(config, tally)
    if tally.failed is not None:
        raise tally.failed
    assert tally.unread == 0, tally.line()
    if not (tally.written or tally.there):
        raise ValueError(
            f"nothing was written: all {tally.total} episodes are rejected; see {rejected_file(config.out)}"
        )
    return tally


def open_input(config: ConvertConfig) -> Source:
    """Open the input of a conversion; every worker does it for itself.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: unknown source, option or embodiment, or no embodiment where it cannot be inferred (Rejected).
    """
    module = load_source(config.source)
    if unknown := sorted(config.extra.keys() - module.OPTIONS.keys()):
        known = "; ".join(f"{k}: {about}" for k, about in module.OPTIONS.items()) or "none"
        raise ValueError(f"source {config.source} has no option {', '.join(unknown)}; it has {known}")
    if not config.path.exists():
        raise FileNotFoundError(f"{config.path} does not exist")
    embodiment = None if config.embodiment is None else load_embodiment(config.embodiment)
    return module.open_source(
        config.path, embodiment, Options(config.instruction, config.control_hz, dict(config.extra))
    )


def rejected_file(out: Path) -> Path:
    """Return the file beside a store that lists what was rejected, one JSON object per line."""
    return out.with_name(f"{out.name}.rejected.jsonl")


class Reader:
    """Lives in a worker process: opens the input once and reads one episode after the other."""

    def __init__(self, config: ConvertConfig) -> None:
        self._source, self._path = open_input(config), config.path
        self._source.warnings.clear()  # the driver has them already

    def read(self, item: Item) -> Outcome:
        """Read, convert and check one episode; never raise."""
        try:
            check_name(item.id, item.file, "episode name")
            episode = self._source.read(item)
            warnings = check(episode, self._source.spec, item)
        except Rejected as e:
            return Outcome(None, self._complete(e, item))
        except Exception as e:  # whatever a format's library says about a damaged file
            log.debug("%s", item.id, exc_info=True)
            todo = "restore the file from a copy, or remove it"
            rejected = reject("E_READ", item, "", "a readable episode", f"{type(e).__name__}: {e}", todo)
            return Outcome(None, self._complete(rejected, item))
        warnings += self._source.warnings
        self._source.warnings.clear()
        return Outcome(episode, None, content_hash(episode), tuple(warnings))

    def _complete(self, rejected: Rejected, item: Item) -> Rejected:
        """Name the episode and the whole path of its file."""
        fields = rejected.fields() | {"episode": rejected.episode or item.id}
        if rejected.file == item.file:
            fields["file"] = str(self._path if self._path.is_file() else self._path / item.file)
        return Rejected(**fields)

    def close(self) -> None:
        """Close the input."""
        self._source.close()


# --- on this machine


def _convert_here(config: ConvertConfig, spec: EmbodimentSpec, items: Sequence[Item], tally: Tally) -> None:
    with _create(config, spec, tally) as writer, _bar() as progress:
        new = _skip_stored(items, writer, tally)
        bar = progress.add_task("convert", total=tally.total, completed=tally.there, rejected=0)
        book, staged = Book(config.out, items), 0
        outcomes = _in_this_process(config, new) if config.workers == 0 else _in_processes(config, new)
        with closing(outcomes):
            for item, outcome in outcomes:
                _store(item, outcome, writer, book, tally)
                progress.update(bar, completed=tally.total - tally.unread, rejected=len(tally.rejected))
                if _ends(config, tally):
                    break
                if outcome.episode is not None and (staged := staged + _nbytes(outcome.episode)) >= SEAL_BYTES:
                    writer.seal()
                    staged = 0
        writer.seal(_seal_bar(progress))
        _seal_left_over(config, spec)


def _in_this_process(config: ConvertConfig, items: Sequence[Item]) -> Outcomes:
    if not items:
        return
    with closing(Reader(config)) as reader:
        for item in items:
            yield item, reader.read(item)


def _in_processes(config: ConvertConfig, items: Sequence[Item]) -> Outcomes:
    """Yield the outcomes in the order of the items, from spawned processes; a process that dies rejects its item."""
    workers = [Worker(Reader, config) for _ in range(min(config.workers, len(items)))]
    idle, busy = deque(workers), {}
    done: dict[int, Outcome] = {}
    started = yielded = 0
    try:
        while yielded < len(items):
            # a slow episode must not let the others pile up in memory
            while idle and started < min(len(items), yielded + 2 * len(workers)):
                worker = idle.popleft()
                busy[worker] = started
                worker.call(items[started].id, "read", items[started])
                started += 1
            for worker in answered(busy.keys()):
                number = busy.pop(worker)
                try:
                    done[number] = worker.result()
                    idle.append(worker)
                except RuntimeError as e:
                    worker.close()
                    workers.remove(worker)
                    workers.append(Worker(Reader, config))
                    idle.append(workers[-1])
                    todo = "remove the episode if it happens again; the kernel kills for memory: fewer --workers"
                    done[number] = Outcome(
                        None, reject("E_CRASH", items[number], "", "a readable episode", str(e), todo)
                    )
            while yielded in done:
                yield items[yielded], done.pop(yielded)
                yielded += 1
    finally:
        for worker in workers:
            worker.close()


def _skip_stored(items: Sequence[Item], writer: StoreWriter, tally: Tally) -> list[Item]:
    stored = writer.sources()
    new = [item for item in items if item.id not in stored]
    tally.there += len(items) - len(new)
    return new


class Book:
    """What is in a store by content, and which split each item belongs to."""

    def __init__(self, out: Path, items: Sequence[Item]) -> None:
        self.splits = {item.id: item.split for item in items}
        self.sources: dict[str, list[str]] = {}  # content hash -> sources, sealed or staged
        episodes = Store(out).episodes if sealed_segments(LocalFiles(out)) else ()
        stored = [(e.content_hash, e.source) for e in episodes]
        staged = [read_json(out / name / "episode.json") for name in staged_episodes(LocalFiles(out))]
        for digest, source in sorted({*stored, *((e["content_hash"], e["source"]) for e in staged)}):
            self.sources.setdefault(digest, []).append(source)

    def duplicate(self, item: Item, twin: str) -> Rejected:
        """Return why an item whose content is there is not written."""
        there = self.splits.get(twin, item.split)
        if there != item.split:
            found = f"the content of {twin} of split {there}"
            todo = "a test episode in the training set: remove one of the two"
            return reject("E_DUP", item, "", f"an episode of split {item.split} only", found, todo)
        return reject("W_DUP", item, "", "new content", f"the content of {twin}", "it is written once; nothing to do")


def _store(item: Item, outcome: Outcome, writer: StoreWriter, book: Book, tally: Tally) -> None:
    """Add one outcome to the store and to the account."""
    tally.warnings += outcome.warnings
    if outcome.episode is None:
        assert outcome.rejected is not None
        tally.rejected.append(outcome.rejected)
    elif twins := book.sources.get(outcome.content):
        tally.rejected.append(book.duplicate(item, twins[0]))
    else:
        writer.add(outcome.episode)
        book.sources[outcome.content] = [item.id]
        tally.written += 1


def _ends(config: ConvertConfig, tally: Tally) -> bool:
    """Tell whether a rejection ends the run, and note it."""
    if not config.quarantine and tally.rejected and tally.rejected[-1].code != "W_DUP":
        tally.failed = tally.failed or tally.rejected[-1]
    return tally.failed is not None


def _create(config: ConvertConfig, spec: EmbodimentSpec, tally: Tally) -> StoreWriter:
    new = not config.out.exists() or config.exist == "overwrite"
    writer = _writer(config, spec, "main", config.exist)
    tally.created = new
    return writer


def _writer(config: ConvertConfig, spec: EmbodimentSpec, name: str, exist: Any) -> StoreWriter:
    return StoreWriter.create(
        config.out,
        spec,
        source=f"{config.source} {config.path.resolve().name}",
        licence=config.licence,
        codec=config.codec,
        exist=exist,
        writer=name,
    )


def _seal_left_over(config: ConvertConfig, spec: EmbodimentSpec) -> None:
    """Seal what writers of an earlier, interrupted run staged; those that are still at work do it themselves."""
    for name in _staged_writers(config.out):
        try:
            with _writer(config, spec, name, "resume"):
                pass
        except StoreError as e:
            if e.code != "E_LOCKED":
                raise


def _staged_writers(out: Path) -> list[str]:
    return sorted({Path(name).parent.name for name in staged_episodes(LocalFiles(out))})


# --- on a cluster


class Cluster(Protocol):
    """Machines that see the same files."""

    def size(self) -> int:
        """Return how many tasks may run at once."""
        ...

    def map(self, function: Callable[..., Any], jobs: Sequence[tuple]) -> list[Any]:
        """Call the function with each tuple of arguments, somewhere; return the results in order."""
        ...


def ray_cluster(address: str) -> Cluster:
    """Connect to a Ray cluster: "auto", "local", "host:port" or "ray://host:port".

    Raises:
        ValueError: Ray is not installed, or nothing answers.
    """
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError("--ray needs the package ray: pip install 'dita[cluster]'; or use --workers N") from None
    try:
        ray.init(address=address, log_to_driver=False)
    except (ConnectionError, ValueError) as e:
        raise ValueError(f"no Ray cluster at {address!r}: {e}; start one with `ray start --head`") from None

    class Ray:
        def size(self) -> int:
            return int(ray.cluster_resources().get("CPU", 1))

        def map(self, function: Callable[..., Any], jobs: Sequence[tuple]) -> list[Any]:
            task = ray.remote(function)
            try:
                return ray.get([task.remote(*job) for job in jobs])
            except ray.exceptions.RayError as e:  # pyright: ignore[reportAttributeAccessIssue]
                text = str(e).strip().splitlines()[-1]
                raise ValueError(
                    f"a Ray task failed: {text}; finished episodes are kept, rerun with --resume"
                ) from None

    return Ray()


def stage_share(config: ConvertConfig, spec: EmbodimentSpec, items: Sequence[Item], name: str) -> Tally:
    """Read one task's items and stage them under the writer `name`, unsealed."""
    writer = _writer(config, spec, name, "resume")
    tally = Tally(len(items))
    with closing(writer), closing(Reader(config)) as reader:
        book = Book(config.out, items)
        for item in _skip_stored(items, writer, tally):
            _store(item, reader.read(item), writer, book, tally)
            if _ends(config, tally):
                break
    return tally


def seal_share(config: ConvertConfig, spec: EmbodimentSpec, name: str) -> None:
    """Seal what the writer `name` staged."""
    with _writer(config, spec, name, "resume"):
        pass


def _convert_on(
    cluster: Cluster, config: ConvertConfig, spec: EmbodimentSpec, items: Sequence[Item], tally: Tally
) -> None:
    _create(config, spec, tally).close()
    count = max(1, min(config.workers or cluster.size(), len(items)))
    size = -(-len(items) // count)
    shares = [items[i : i + size] for i in range(0, len(items), size)]
    jobs = [(config, spec, share, f"ray{i:04d}") for i, share in enumerate(shares)]
    for share in cluster.map(stage_share, jobs):
        tally.written += share.written
        tally.there += share.there
        tally.rejected += share.rejected
        tally.warnings += share.warnings
        tally.failed = tally.failed or share.failed
    _drop_twins(config, items, tally)
    cluster.map(seal_share, [(config, spec, name) for name in _staged_writers(config.out)])


def _drop_twins(config: ConvertConfig, items: Sequence[Item], tally: Tally) -> None:
    """Remove staged episodes whose content another task staged too: the first of the input stays."""
    by_id = {item.id: item for item in items}
    order = {source: i for i, source in enumerate(by_id)}
    book = Book(config.out, items)
    staged = {
        read_json(config.out / name / "episode.json")["source"]: config.out / name
        for name in staged_episodes(LocalFiles(config.out))
    }
    for sources in book.sources.values():
        first, *others = sorted(sources, key=lambda s: (s in staged, order.get(s, -1)))
        for source in others:
            doomed = staged[source].with_suffix(".removed")  # a kill on the way leaves no half of an episode
            staged[source].rename(doomed)
            shutil.rmtree(doomed)
            tally.written -= 1
            tally.rejected.append(book.duplicate(by_id[source], first))
            _ends(config, tally)


# --- what people see


def _check_items(items: Sequence[Item], path: Path) -> None:
    if not items:
        raise Rejected(
            "E_EMPTY", path, "", "", "at least one episode", "none", "give the folder or file that holds them"
        )
    twice = [i for i, n in Counter(item.id for item in items).items() if n > 1]
    if twice:
        found = f"{', '.join(twice[:3])} more than once"
        raise Rejected(
            "E_PATH", path, "", "episodes", "names that differ in more than leading zeros", found, "rename one"
        )


def _finish(config: ConvertConfig, tally: Tally) -> None:
    """Print the account and write the list of rejections."""
    path = rejected_file(config.out)
    path.unlink(missing_ok=True)
    errors = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    groups: dict[str, list[str]] = {}
    for text in tally.warnings:
        groups.setdefault(text.group if isinstance(text, Note) else text, []).append(text)
    for texts in list(groups.values())[:SHOWN]:
        errors.print(f"warning: {printable(texts[0])}" + (f" ({len(texts)} such)" if len(texts) > 1 else ""))
    if len(groups) > SHOWN:
        errors.print(f"warning: and {len(groups) - SHOWN} more")
    if tally.rejected:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json_lines(tally.rejected)))
        for rejected in tally.rejected[:SHOWN]:
            if rejected is not tally.failed:  # that one is the command's last line
                errors.print(f"rejected: {rejected}")
        codes = ", ".join(f"{code} {n}" for code, n in sorted(Counter(r.code for r in tally.rejected).items()))
        errors.print(f"rejected: {len(tally.rejected)} ({codes}), listed in {path}")
    assert tally.total == tally.written + len(tally.rejected) + tally.there + tally.unread and tally.unread >= 0
    Console(highlight=False, soft_wrap=True).print(f"{config.out}: {tally.line()}")


def _bar() -> Progress:
    rejected = TextColumn("{task.fields[rejected]} rejected")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rejected)
    console = Console(stderr=True)
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, *times, console=console, transient=True, disable=not console.is_terminal)


def _seal_bar(progress: Progress) -> Callable[[int, int], None]:
    bar = progress.add_task("seal", total=None, rejected=0)
    return lambda done, total: progress.update(bar, completed=done, total=total)


def _nbytes(episode: Episode) -> int:
    return sum(a.nbytes for a in (*episode.images.values(), episode.state, episode.action, episode.stamp))
