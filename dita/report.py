"""A demo folder, or evaluations -> one HTML page that stands alone: no script, no request; light, dark, paper."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import av
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.image import imread

from dita.checkpoint import read_json
from dita.page import BLUE, GREEN, ORANGE, RC, Draw, Html, escape, grid, plot, section, strip, table, uri, write_page
from dita.statistics import wilson

PARTS = ("times.json", "train/config.json", "eval/eval_info.json", "live/live.json")
INFO = "eval_info.json"
STRIP_FRAMES = 6
MAX_ROLLOUTS = 12  # shown with pictures; failures come first
MAX_FAILURES = 20  # listed
MAX_GALLERY = 24  # last pictures of failures
STYLES = tuple((colour, line) for line in ("-", "--", ":") for colour in (BLUE, ORANGE, GREEN))  # of several curves
VIDEO_BYTES = 16 * 2**20  # embedded in all; a video beyond that is named only


@dataclass(frozen=True)
class Demo:
    """What a demo folder holds; a part that was not run is None or empty."""

    folder: Path
    played: Path  # the evaluation's folder
    times: Mapping[str, Any]  # step -> command, seconds
    train: Mapping[str, Any] | None
    log: Sequence[Mapping[str, float]]
    evaluation: Mapping[str, Any] | None
    episodes: Sequence[Mapping[str, Any]]
    live: Mapping[str, Any] | None
    videos: Sequence[Path]  # failures first; a trace of the same name lies beside each
    pictures: Sequence[Path]  # last ones of failures without a video


def report(folder: Path, *more: Path) -> Path:
    """Write `folder/report.html` about what `dita demo`, or `dita eval`, left in `folder`.

    With more folders, evaluations of other checkpoints, it shows all of them side by side, and their success over
    training steps. A part of a demo that was not run is named as such.

    Raises:
        FileNotFoundError: no part of a demo is there, or no evaluation in `more`, with what was looked for.
        ValueError: a part is damaged or of another version, by name.
    """
    demo = read_demo(folder)
    parts = (_headline, _evaluation, _live, _rollouts, _actions, _training, _data, _provenance)
    if demo.played == folder:  # an evaluation by itself
        parts = (_headline, _evaluation, _rollouts, _actions, _provenance)
    try:
        with matplotlib.rc_context(RC):
            sections = [part(demo) for part in parts]
            if more:
                sections.insert(1, _several([demo, *(read_evaluation(other) for other in more)]))
            body = "\n".join(sections)
    except KeyError as e:
        raise ValueError(f"{folder}: a result has no {e}; written by another version? run its step again") from None
    target = folder / "report.html"
    write_page(target, f"Dita: {folder.name}", body)
    return target


def read_demo(folder: Path) -> Demo:
    """Read the results below `folder`; raises as `report`."""
    if (folder / INFO).is_file():
        return _read(folder, folder)
    if not any((folder / part).is_file() for part in PARTS):
        what = "holds no result of a demo" if folder.is_dir() else "does not exist"
        raise FileNotFoundError(f"{folder} {what}: looked for {', '.join(PARTS)}; give the out= folder of `dita demo`")
    return _read(folder, folder / "eval")


def read_evaluation(folder: Path) -> Demo:
    """Read a finished evaluation, by itself or in a demo's folder; raises as `report`."""
    for played in (folder, folder / "eval"):
        if (played / INFO).is_file():
            return _read(folder, played)
    raise FileNotFoundError(f"{folder} holds no finished evaluation: looked for {INFO} and eval/{INFO}")


def _read(folder: Path, played: Path) -> Demo:
    paths = (folder / PARTS[0], folder / PARTS[1], played / INFO, folder / PARTS[3])
    times, train, evaluation, live = (read_json(p) if p.is_file() else None for p in paths)
    log, episodes = _read_lines(folder / "train" / "log.jsonl"), _read_lines(played / "episodes.jsonl")
    videos = sorted((played / "videos").glob("*/episode_*.mp4"), key=lambda p: (not _failed(p), p))
    pictures = sorted((played / "videos").glob("*/episode_*.jpg"), key=lambda p: (p.parent, _index(p)))
    return Demo(folder, played, times or {}, train, log, evaluation, episodes, live, videos, pictures)


# ---- sections


def _headline(demo: Demo) -> str:
    e, live, train = demo.evaluation, demo.live, demo.train
    name = e["policy"]["name"] if e else train["policy"]["name"] if train else "unknown"
    tasks = ", ".join(e["tasks"] if e else sorted({r["task"] for r in live["episodes"]}) if live else ())
    steps = ", ".join(f"{step} {_duration(t['seconds'])}" for step, t in demo.times.items())
    tiles = [("policy", name, f"{train['diffusion']['objective']}, {train['steps']} steps" if train else "not trained")]
    tiles.append(("simulation", "-", "not run"))
    if e:
        note = f"of unseen starts; 95 % interval {_range(e['pooled']['interval'])}"
        tiles[-1] = ("simulation", f"{e['pooled']['successes']} / {e['pooled']['episodes']}", note)
    if e and demo.played == demo.folder:
        mark = e["fingerprint"].get("perturb", "nothing")
        tiles[0] = ("policy", name, e["policy"].get("sampler", "not learned"))
        tiles.append(("changed", "nothing" if mark == "nothing" else "perturbed", mark))
        tiles.append(
            ("policy call", _ms(1e3 * e["latency_s"]["p50"]), f"median; p99 {_ms(1e3 * e['latency_s']['p99'])}")
        )
        return _tiles(tasks, tiles)
    tiles.append(("live, over DDS", "-", "not run"))
    if live:
        note = f"image to command p50 {_ms(live['latency_ms']['p50'])}, p99 {_ms(live['latency_ms']['p99'])}"
        tiles[-1] = ("live, over DDS", f"{live['successes']} / {len(live['episodes'])}", note)
    seconds = sum(step["seconds"] for step in demo.times.values())
    tiles.append(("time", _duration(seconds) if demo.times else "-", steps or "not recorded"))
    return _tiles(tasks, tiles)


def _tiles(tasks: str, tiles: Sequence[tuple[str, str, str]]) -> str:
    cells = "".join(
        f"<div><small>{escape(what)}</small><strong>{escape(value)}</strong><span>{escape(note)}</span></div>"
        for what, value, note in tiles
    )
    return f'<header><h1>Dita</h1><p>{escape(tasks)}</p></header><div class="tiles">{cells}</div>'


def _evaluation(demo: Demo) -> str:
    e, title = demo.evaluation, "Simulation"
    if e is None:
        so_far = f" to the end ({len(demo.episodes)} episodes so far; --resume continues)" if demo.episodes else ""
        missing = _missing(f"evaluation{so_far}", "eval", f"{demo.folder}/train", f"out={demo.folder}/eval")
        return section(title, missing)
    rows = [[task, *_rate(rate), f"{rate['mean_steps']:.0f}"] for task, rate in e["tasks"].items()]
    if len(rows) > 1:
        rows.append(["mean over tasks", *_rate(e["macro"]), ""])
    rates = table(("task", "solved", "rate", "95 % interval", "", "mean length [steps]"), rows)
    calls = [1e3 * s for episode in demo.episodes for s in episode["latency"]]

    def draw_lengths(ax: Axes) -> None:
        kinds = ((True, "solved", GREEN), (False, "failed", ORANGE))
        steps = [[ep["steps"] for ep in demo.episodes if ep["success"] is won] for won, _, _ in kinds]
        ax.hist(steps, bins=24, stacked=True, color=[k[2] for k in kinds], label=[k[1] for k in kinds])
        ax.legend()

    def draw_solved(ax: Axes) -> None:
        groups = {task: [ep for ep in demo.episodes if ep["task"] == task] for task in e["tasks"]}
        if len(groups) > len(STYLES):
            groups = {f"all {len(groups)} tasks": demo.episodes}
        for (name, episodes), (colour, line) in zip(groups.items(), STYLES, strict=False):
            _solved_by_step(ax, episodes, name, colour, line)
        ax.set(ylim=(0, 1.02))
        ax.legend(loc="lower right")

    batch = f"policy call for up to {e['config']['batch_size']} environments [ms]"
    draw_calls = _histogram(calls, 1e3 * e["latency_s"]["p50"], 1e3 * e["latency_s"]["p99"])
    plots = [
        plot("control step", "share of episodes solved by then", draw_solved),
        plot("episode length [control steps]", "episodes", draw_lengths),
        plot(batch, "calls", draw_calls),
    ]
    reasons = ", ".join(f"{reason}: {n}" for reason, n in e["reasons"].items())
    rule = f"Rule: {e['rule']}. {e['distinct_starts']} distinct starts. Ends: {reasons}."
    return section(title, rates, f"<p>{escape(rule)}</p>", grid(plots))


def _live(demo: Demo) -> str:
    live, title = demo.live, "Live: twin, policy and guard as three processes over DDS"
    if live is None:
        command = ("robot", "live", f"checkpoint={demo.folder}/train", f"out={demo.folder}/live")
        return section(title, _missing("live run", *command))
    columns = {
        "task": "task", "seed": "seed", "end": "end", "reason": "fault", "steps": "steps", "seconds": "time [s]",
        "chunks": "chunks", "p50_ms": "p50 [ms]", "real_time_factor": "real time", "slipped_s": "slipped [s]",
    }  # fmt: skip
    runs, latency, publish = live["episodes"], live["latency_ms"], live["publish"]
    facts = [
        ["solved", f"{live['successes']} of {len(runs)}, 95 % interval {_range(wilson(live['successes'], len(runs)))}"],
        ["camera stamp to the first command of its chunk", _percentiles(latency)],
        ["camera stamp to chunk", _percentiles(live["chunk_age_ms"])],
        ["command period", f"mean {publish['period_mean_ms']:.2f} ms, max {publish['period_max_ms']:.1f} ms"],
        ["publish jitter", f"{publish['jitter_std_ms']:.2f} ms standard deviation at {live['tick_hz']:g} Hz"],
        ["late ticks (over two periods)", str(publish["late_ticks"])],
        ["commands that the driver missed", str(live["deadline_misses"])],
        ["steps that the driver clipped", str(sum(run["clipped"] for run in runs))],
        ["commands that the driver refused", str(sum(run["refused"] for run in runs))],
        ["real-time factor, worst episode", f"{live['real_time_factor']:.3f}"],
        ["simulator warnings", str(live["simulator_warnings"])],
    ]
    draw = _histogram(latency["values"], latency["p50"], latency["p99"])
    plots = [plot("camera stamp to command [ms]", "chunks", draw)] if latency["values"] else []
    return section(
        title,
        table(tuple(columns.values()), [[_number(run[key]) for key in columns] for run in runs]),
        grid([table(("measure", "value"), facts), *plots]),
        grid([_envelope(live["envelope"]), _guard(live["guard"])]),
    )


def _envelope(envelope: Mapping[str, Any] | None) -> str:
    title = "<h3>Judged on the wire, by a reader of its own</h3>"
    if envelope is None:
        return f"<div>{title}<p>No command was seen.</p></div>"
    units = {"speed": "m/s", "acceleration": "m/s²", "jerk": "m/s³"}
    peaks = {name: f"{value:,.2f} {units[name]}" for name, value in envelope["peaks"].items()}
    rows = [[name, str(n), peaks.get(name, "")] for name, n in envelope["violations"].items()]
    about = f"<p>{envelope['commands']} commands, {envelope['non_finite']} not finite.</p>"
    return f"<div>{title}{about}{table(('limit', 'violations', 'highest seen'), rows)}</div>"


def _guard(values: Mapping[str, float]) -> str:
    kinds = ("average", "standard_deviation", "max")
    names = [k.removesuffix(".average") for k in values if k.endswith(".average")]
    statistics = {f"{name}.{kind}" for name in names for kind in kinds}
    counts = [[k, f"{v:g}"] for k, v in sorted(values.items()) if k not in statistics]
    rows = [[name, *(f"{1e3 * values[f'{name}.{kind}']:.3g}" for kind in kinds)] for name in names]
    about = "<p>R0 dropped, R1 clamped, R2 decelerated and held, R3 fault until armed again.</p>"
    tables = table(("counter", "count"), counts) + table(("[ms], or [mm] for _m", "mean", "std", "max"), rows)
    return f"<div><h3>What the guard counted</h3>{about}{tables}</div>"


def _rollouts(demo: Demo) -> str:
    failures = [e for e in demo.episodes if not e["success"]]
    parts = [_failures(demo, failures), _gallery(demo, failures)] if failures else []
    budget = VIDEO_BYTES
    for path in demo.videos[:MAX_ROLLOUTS]:
        budget -= path.stat().st_size
        parts.append(_rollout(path, embed=budget >= 0))
    if len(demo.videos) > MAX_ROLLOUTS:
        parts.append(f"<p>{len(demo.videos) - MAX_ROLLOUTS} more: {escape(demo.played)}/videos</p>")
    if not demo.videos:
        parts.append(_missing("videos", *_again(demo)))
    return section("Rollouts, failures first", *parts)


def _failures(demo: Demo, failures: Sequence[Mapping[str, Any]]) -> str:
    rows = [[f["task"], str(f["seed"]), f["reason"], str(f["steps"])] for f in failures[:MAX_FAILURES]]
    more = f", the first {MAX_FAILURES} of {len(failures)}" if len(failures) > MAX_FAILURES else ""
    where = (f"env.tasks=[{failures[0]['task']}]", f"seed={failures[0]['seed']}", "episodes=1")
    command = _command(("eval", _checkpoint(demo), f"out={demo.folder}/replay", *where))
    text = f"<p>Failed episodes{more}. To film one: {command}</p>"
    return text + table(("task", "seed", "end", "steps"), rows)


def _gallery(demo: Demo, failures: Sequence[Mapping[str, Any]]) -> str:
    """Show how failures ended: the last picture of each."""
    reasons = {(f["task"], f["index"]): f"seed {f['seed']}, step {f['steps']}: {f['reason']}" for f in failures}
    last = [(path.parent.name, _index(path), path) for path in (*demo.pictures, *demo.videos) if _failed(path)]
    shown = sorted(entry for entry in last if entry[:2] in reasons)[:MAX_GALLERY]
    if not shown:
        return ""
    figures = [_last_picture(path) for _, _, path in shown]
    captions = [f"{task}, {reasons[task, index]}" for task, index, _ in shown]
    more = f", the first {len(shown)} of {len(failures)}" if len(failures) > len(shown) else ""
    return f"<h3>How they ended{more}</h3>{strip(figures, captions)}"


def _last_picture(path: Path) -> np.ndarray:
    if path.suffix == ".jpg":
        return imread(path)
    with av.open(str(path)) as container:
        *_, last = container.decode(video=0)
        return last.to_ndarray(format="rgb24")


def _rollout(path: Path, embed: bool) -> str:
    trace = read_json(path.with_suffix(".json"))
    outcome, seconds = "failure" if _failed(path) else "success", len(trace["executed"]) * trace["dt"]
    with av.open(str(path)) as container:
        rate = float(container.streams.video[0].average_rate or 1)
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    shown = np.linspace(0, len(frames) - 1, min(STRIP_FRAMES, len(frames))).round().astype(int).tolist()
    pictures = strip([frames[i] for i in shown], [f"{min(i / rate, seconds):.2f} s" for i in shown])
    source = uri("video/mp4", path.read_bytes()) if embed else ""
    video = f'<video controls loop muted playsinline src="{source}"></video>' if embed else ""
    text = f"{outcome}: {trace['task']}, seed {trace['seed']}, {seconds:.2f} s{'' if embed else f'; video: {path}'}"
    film = f'<div class="film">{video}{pictures}</div>'
    return f'<article class="{outcome}"><h3>{escape(text)}</h3>{film}</article>'


def _actions(demo: Demo) -> str:
    one_per_task = {path.parent.name: path for path in demo.videos}  # the last one: a success, where there is one
    parts = []
    for path in one_per_task.values():
        trace = read_json(path.with_suffix(".json"))
        names = [
            f"{f['name']}{f'[{i}]' if f['size'] > 1 else ''} [{f['unit']}]"
            for f in trace["action_fields"]
            for i in range(f["size"])
        ]
        plots = [plot("time [s]", name, _chunks(trace, dim), height=1.7) for dim, name in enumerate(names)]
        if trace["chunks"]:  # a scripted expert predicts none
            parts += [f"<h3>{escape(trace['task'])}, seed {trace['seed']}</h3>", grid(plots)]
    about = "<p>Each thin line is a whole predicted chunk from its own step on; the thick one was sent.</p>"
    missing = _missing("recorded chunks", *_again(demo))
    return section("Predicted against executed actions", *([about, *parts] if parts else [missing]))


def _again(demo: Demo) -> tuple[str, ...]:
    return "eval", _checkpoint(demo), f"out={demo.played}", "videos=3", "--overwrite"


def _checkpoint(demo: Demo) -> str:
    known = (demo.evaluation or {}).get("checkpoint")
    return known["folder"] if known else f"{demo.folder}/train"


def _chunks(trace: Mapping[str, Any], dim: int) -> Draw:
    def draw(ax: Axes) -> None:
        dt, executed = trace["dt"], np.array(trace["executed"])[:, dim]
        for number, chunk in enumerate(trace["chunks"]):
            values = np.array(chunk["values"])[:, dim]
            times = dt * (chunk["step"] + np.arange(len(values)))
            ax.plot(times, values, color=ORANGE, linewidth=0.9, label="_" if number else "predicted")
        ax.plot(dt * np.arange(len(executed)), executed, color=BLUE, linewidth=1.8, alpha=0.75, label="executed")
        ax.margins(y=0.25)  # room for the legend
        ax.legend(loc="upper right", ncols=2)

    return draw


def _training(demo: Demo) -> str:
    config, log = demo.train, demo.log
    if config is None or not log:
        stores = f"data.stores=[{{path:{demo.folder}/demonstrations.zarr,weight:1}}]"
        return section("Training", _missing("training", "train", "experiment=demo", stores, f"run={demo.folder}/train"))
    curves = {
        "training loss": [row["loss"] for row in log],
        "learning rate": [row["lr"] for row in log],
        "samples per second": [row["samples_per_s"] for row in log],
        "time spent waiting for data [%]": [100 * r["data_s"] / (r["data_s"] + r["update_s"]) for r in log],
    }

    def curve(values: Sequence[float], scale: str) -> Draw:
        def draw(ax: Axes) -> None:
            ax.plot([row["step"] for row in log], values, color=BLUE, linewidth=1.2)
            ax.set(yscale=scale, ylim=(None if scale == "log" else 0, None))

        return draw

    plots = [plot("step", k, curve(values, "log" if "loss" in k else "linear")) for k, values in curves.items()]
    facts = (
        f"{log[-1]['step']} of {config['steps']} steps of {config['batch_size']} windows, "
        f"{config['noise_samples_per_context']} noise samples each, seed {config['seed']}, {config['device']}, "
        f"{config['precision']}; last loss {log[-1]['loss']:.4f}"
    )
    return section("Training", f"<p>{escape(facts)}</p>", grid(plots))


def _data(demo: Demo) -> str:
    sheet = demo.folder / "demonstrations.png"
    if not sheet.is_file():
        missing = _missing("contact sheet", "inspect", f"{demo.folder}/demonstrations.zarr", "--sheet", str(sheet))
        return section("Demonstrations", missing)
    image = f'<img class="wide" alt="frames of sampled episodes" src="{uri("image/png", sheet.read_bytes())}">'
    return section("Demonstrations", image)


def _provenance(demo: Demo) -> str:
    steps = [
        f"<p>{escape(step)}, {_duration(t['seconds'])}: {_command(t['command'])}</p>" for step, t in demo.times.items()
    ]
    facts: list[list[str]] = []
    if demo.evaluation:
        mark = dict(demo.evaluation["fingerprint"])
        facts = [[k, str(v)] for k, v in (mark.pop("versions") | mark).items()]
        facts += [[f"policy {k}", v] for k, v in demo.evaluation["policy"].items()]
    return section("How this was made", *steps, table(("what", "value"), facts) if facts else "")


def _several(demos: Sequence[Demo]) -> str:
    """Compare evaluations: rates with intervals, success over training and over control steps."""
    infos = [(demo, demo.evaluation) for demo in demos if demo.evaluation is not None]
    names = _short_names([demo.played for demo, _ in infos])
    rows: list[list[str]] = []
    steps: list[Any] = [(e.get("checkpoint") or {}).get("step") for _, e in infos]
    for name, (_, e), step in zip(names, infos, steps, strict=True):
        rates = [*e["tasks"].items(), *([("mean over tasks", e["macro"])] if len(e["tasks"]) > 1 else [])]
        rows += [[name, "" if step is None else str(step), task, *_rate(rate)] for task, rate in rates]
    known = all(step is not None for step in steps) and len(set(steps)) == len(steps)
    order = np.argsort([int(step) for step in steps]) if known else np.arange(len(steps))
    at = [int(steps[i]) for i in order] if known else list(range(1, len(order) + 1))

    def draw_learning(ax: Axes) -> None:
        curves: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
        for x, i in zip(at, order, strict=True):
            e = infos[i][1]
            rates = e["tasks"] if len(e["tasks"]) <= len(STYLES) else {"mean over tasks": e["macro"]}
            for name, r in rates.items():
                curves.setdefault(name, []).append((x, r))
        for (name, points), (colour, line) in zip(curves.items(), cycle(STYLES), strict=False):
            x, rates = zip(*points, strict=True)
            ax.plot(x, [r["success_rate"] for r in rates], color=colour, linestyle=line, marker="o", label=name)
            low, high = zip(*(r["interval"] for r in rates), strict=True)
            ax.fill_between(x, low, high, color=colour, alpha=0.15)
        ax.set(ylim=(-0.02, 1.02), **({} if known else {"xticks": at}))
        ax.legend(loc="lower right")

    def draw_solved(ax: Axes) -> None:
        for name, (demo, _), (colour, line) in zip(names, infos, cycle(STYLES), strict=False):
            _solved_by_step(ax, demo.episodes, name, colour, line)
        ax.set(ylim=(0, 1.02))
        ax.legend(loc="lower right")

    label = "training step" if known else "evaluation, in the order given"
    plots = [
        plot(label, "success, 95 % interval", draw_learning),
        plot("control step", "share of all episodes solved by then", draw_solved),
    ]
    head = ("evaluation", "training step", "task", "solved", "rate", "95 % interval", "")
    about = "<p>Whether two of them differ is another question: dita compare pairs them by start.</p>"
    return section("Several evaluations", table(head, rows), about, grid(plots))


def _short_names(folders: Sequence[Path]) -> list[str]:
    """Return the folders without what they have in common."""
    parts = [folder.resolve().parts for folder in folders]
    head = 0
    while all(len(p) > head + 1 for p in parts) and len({p[head] for p in parts}) == 1:
        head += 1
    return ["/".join(p[head:]) for p in parts]


def _solved_by_step(ax: Axes, episodes: Sequence[Mapping[str, Any]], label: str, colour: str, line: str) -> None:
    """Draw the share of episodes that a success had ended by each control step, with Wilson's band."""
    ends = np.sort([e["steps"] for e in episodes if e["success"]])
    last = max((e["steps"] for e in episodes), default=0)
    steps = np.unique([0, *ends, last])
    won = np.searchsorted(ends, steps, side="right")
    band = np.array([wilson(int(k), len(episodes)) for k in won])
    ax.plot(steps, won / len(episodes), color=colour, linestyle=line, drawstyle="steps-post", label=label)
    ax.fill_between(steps, band[:, 0], band[:, 1], step="post", color=colour, alpha=0.15)


# ---- pieces


def _missing(what: str, *command: str) -> str:
    return f'<p class="missing">not run: {escape(what)}; command: {_command(command)}</p>'


def _command(words: Sequence[str]) -> str:
    return f"<code>{escape(shlex.join(('dita', *words)))}</code>"


def _rate(rate: Mapping[str, Any]) -> list[str]:
    (low, high), mean = rate["interval"], rate["success_rate"]
    band = f'<i style="left:{100 * low:.1f}%;width:{100 * (high - low):.1f}%"></i>'
    bar = Html(f'<span class="interval">{band}<b style="left:{100 * mean:.1f}%"></b></span>')
    return [f"{rate['successes']} / {rate['episodes']}", f"{mean:.0%}", _range((low, high)), bar]


def _histogram(values: Sequence[float], p50: float, p99: float) -> Draw:
    def draw(ax: Axes) -> None:
        ax.hist(values, bins=40, color=BLUE)
        ax.axvline(p50, color=GREEN, label=f"p50 {p50:.1f}")
        ax.axvline(p99, color=ORANGE, linestyle="--", label=f"p99 {p99:.1f}")
        ax.legend()

    return draw


def _range(interval: Sequence[float]) -> str:
    return f"{interval[0]:.0%} .. {interval[1]:.0%}"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f} ms"


def _percentiles(latency: Mapping[str, Any]) -> str:
    return f"p50 {_ms(latency['p50'])}, p99 {_ms(latency['p99'])}, {latency['n']} chunks"


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def _failed(film: Path) -> bool:
    return film.stem.endswith("_failure")


def _index(film: Path) -> int:
    return int(film.stem.split("_")[1])


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Read JSONL; a last line that a kill cut short is left out."""
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    try:
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except json.JSONDecodeError as e:
        raise ValueError(f"{path} is not JSON lines: {e}") from None
