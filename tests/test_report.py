"""The report: it says the numbers, stands alone, names what is missing; made from files of the real writers."""

from __future__ import annotations

import base64
import html
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from fake_robot import EMBODIMENT
from matplotlib.image import imsave

import dita.evaluate
import dita.page
from dita.checkpoint import write_json
from dita.cli import build_parser, compose
from dita.config import EnvConfig, EvalConfig, LiveConfig, PerturbConfig, TrainConfig, from_dict, to_dict
from dita.embodiment import config_folder, load_embodiment
from dita.envs.rollout import EpisodeResult, Recorder, Start
from dita.evaluate import Zero, evaluate
from dita.report import _solved_by_step, report
from dita.statistics import wilson
from robot_io.core.guard import Guard, GuardConfig
from robot_io.core.limits import parse_robot
from robot_io.live import EnvelopeReader, Judge, summary

SPEC = load_embodiment("metaworld_sawyer")
UNCHANGED = PerturbConfig(0, "given", 0.0, 0.0, 0.0, 0.0, 0.0)
TASKS = ("button-press-topdown-v3", "drawer-open-v3")
ODD = "state <older> & 'late' 0.1 s"  # dots, quotes and markup in a reason


class FakeEnv:
    """As much of a RobotEnv as the recorder looks at."""

    embodiment = SPEC
    action_space = SimpleNamespace(
        low=np.array([-0.01] * 3 + [-1], np.float32), high=np.array([0.01] * 3 + [1], np.float32)
    )
    steps, success = 0, False
    instruction = "press the button"

    @property
    def state(self) -> np.ndarray:
        return np.zeros(4, np.float32)

    def render(self) -> np.ndarray:
        return np.full((64, 64, 3), 2 * self.steps, np.uint8)


def play(start: Start, success: bool) -> EpisodeResult:
    if start.record is not None:
        env = FakeEnv()
        recorder = Recorder(start, env)  # pyright: ignore[reportArgumentType]
        for step in range(24):
            if step % 8 == 0:
                recorder.chunk(np.full((16, 4), 0.005 * np.sin(step), np.float32))
            env.steps += 1
            recorder.step(np.zeros(4, np.float32))
        recorder.write(success)
    reason = "success" if success else ODD
    return EpisodeResult(start.task, start.index, start.seed, f"{start.name}", success, reason, 24, 3, (0.05, 0.07), {})


def fake_rollout(policy, env, embodiment, starts, timing, **options) -> Iterator[EpisodeResult]:
    return (play(start, success=start.index != 1) for start in starts)


def write_train(run: Path) -> None:
    run.mkdir()
    write_json(
        run / "config.json",
        to_dict(compose("train", ["steps=1000", "batch_size=64", "noise_samples_per_context=4"], TrainConfig)),
    )
    rows = [
        {"step": s, "loss_exact": 1 / s, "loss": 1 / s, "grad_norm": 1.0, "lr": 1e-3, "data_s": 0.01, "update_s": 0.09,
         "samples_per_s": 640.0} for s in (10, 20, 30)
    ]  # fmt: skip
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_eval(out: Path) -> None:
    env = EnvConfig("metaworld", "metaworld_sawyer", TASKS, max_steps=24, fast_render=True)
    config = EvalConfig(
        str(out), env, episodes=4, seed=1_000_000, n_envs=1, batch_size=8, n_action_steps=None,
        num_inference_steps=None, temporal_ensembling=None, videos=2, device="cpu", threads=1, guard=False,
        perturb=UNCHANGED, ray=None, ray_workers=2,
    )  # fmt: skip
    evaluate(Zero(SPEC), config, exist="error")


def write_live(out: Path, latencies: list[float]) -> None:
    judge = Judge(SimpleNamespace(msg=None, subscribe=lambda *a: None))  # pyright: ignore[reportArgumentType]
    robot = parse_robot(EMBODIMENT)
    judge.robot, judge.envelope, judge.contract = robot, EnvelopeReader(robot.space, robot.bounds), {"hash": "c0ffee"}
    judge.envelope.take(0.0, np.array([0.0, 0.6, 0.2]))
    guard = Guard(robot, GuardConfig(1 / 160, 0.1, 0.1, 1.0, 0.05, 0.25))
    guard._count("R2", ODD)
    judge.diagnostics = {"guard": {k: str(v) for k, v in guard.to_dict().items()} | {"overruns": "3"}}
    judge.latencies, judge.ages = latencies, latencies
    episode = {
        "task": "button-press-topdown-v3", "seed": 900_000, "steps": 80, "clipped": 2, "timeouts": 1, "refused": 0,
        "slipped_s": 0.0, "real_time_factor": 1.0, "warnings": {}, "seconds": 1.5, "chunks": len(latencies),
    }  # fmt: skip
    won = episode | {"success": True, "end": "success", "reason": "", "p50_ms": 50.0}
    lost = episode | {"success": False, "end": "fault", "reason": ODD, "p50_ms": None}
    values = yaml.safe_load((config_folder() / "robot.yaml").read_text())
    values.pop("defaults", None)
    env = {"suite": "fake", "embodiment": "point", "tasks": ["go"], "max_steps": 400, "fast_render": True}
    config = from_dict(LiveConfig, values | {"checkpoint": "none", "out": str(out), "env": env}, "robot")
    out.mkdir(exist_ok=True)
    write_json(out / "live.json", summary(config, judge, [won, won, lost]))


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "demo <1>"
    folder.mkdir()
    (folder / "demonstrations.png").write_bytes(b"\x89PNG a picture")
    write_json(folder / "times.json", {
        "train": {"command": ["train", "experiment=demo"], "seconds": 540.0},
        "eval": {"command": ["eval", "x"], "seconds": 60.0},
    })  # fmt: skip
    write_train(folder / "train")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dita.evaluate, "rollout", fake_rollout)
        patch.setattr(dita.evaluate, "check_tasks", lambda env: None)
        write_eval(folder / "eval")
    write_live(folder / "live", [0.040, 0.050, 0.120])
    return folder


@pytest.fixture
def demo(original, tmp_path) -> Path:
    return shutil.copytree(original, tmp_path / original.name)


class Page(HTMLParser):
    """Tags that do not nest, every address and every text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.addresses, self.tags, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href", "poster", "action", "data")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in ("meta", "img"):
            self.open.pop()

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def read(folder: Path) -> tuple[str, Page]:
    source = report(folder).read_text()
    return source, Page(source)


@pytest.fixture(scope="module")
def whole(original) -> tuple[str, Page]:
    return read(original)


def test_the_first_screen_says_policy_tasks_success_live_and_time(whole) -> None:
    _, page = whole
    head = page.text[page.text.index(f"Dita {TASKS[0]}") :].split("Simulation")[0]
    assert ", ".join(TASKS) in head
    assert "policy zero" in head
    assert "simulation 6 / 8 of unseen starts; 95 % interval 41% .. 93%" in head
    assert "live, over DDS 2 / 3 image to command p50 50 ms, p99 119 ms" in head
    assert "time 10.0 min eval 60 s, train 9.0 min" in head


def test_numbers_of_every_part_are_there(whole) -> None:
    _, page = whole
    assert f"{TASKS[1]} 3 / 4 75% 30% .. 95% 24" in page.text
    assert "mean over tasks 6 / 8 75%" in page.text
    assert "30 of 1000 steps of 64 windows, 4 noise samples each" in page.text
    assert "2 of 3, 95 % interval 21% .. 94%" in page.text
    assert "late ticks (over two periods) 3" in page.text
    assert "commands that the driver missed 3 steps that the driver clipped 6" in page.text
    assert (
        f"R2 1 R2 {ODD.replace('0.1', '#')} 1" in page.text
    )  # a dot in a reason is no statistic; counters leave out numbers
    assert "lag_m 0 0 0" in page.text
    assert "1 commands, 0 not finite." in page.text
    assert "train, 9.0 min: dita train experiment=demo" in page.text


def test_it_stands_alone(whole) -> None:
    source, page = whole
    assert page.addresses and all(a.startswith(("data:", "#")) for a in page.addresses)
    assert not {"script", "link", "iframe", "object", "embed", "form"} & set(page.tags)
    assert "@import" not in source
    links = re.findall(r'url\(([^)]*)\)|(?:xlink:)?href="(#[^"]*)"', source)
    ids = set(re.findall(r' id="([^"]*)"', source))
    assert links and all((a or b).lstrip("#") in ids for a, b in links), "clip paths and markers point into the page"


def test_pictures_and_videos_are_the_files(original, whole) -> None:
    _, page = whole
    inside = [(a[5 : a.index(";")], base64.b64decode(a[a.index(",") :])) for a in page.addresses if a[0] == "d"]
    videos = sorted(data for kind, data in inside if kind == "video/mp4")
    assert videos == sorted(p.read_bytes() for p in original.glob("eval/videos/*/*.mp4")) and len(videos) == 4
    assert ("image/png", b"\x89PNG a picture") in inside
    frames = [data for kind, data in inside if kind == "image/jpeg"]
    assert len(frames) == 4 * 6 + 2 and all(data[:2] == b"\xff\xd8" for data in frames)  # 2: how failures ended


def test_failures_come_first_with_a_command_that_films_them(whole) -> None:
    _, page = whole
    outcomes = re.findall(r"(failure|success): (\S+), seed (\d+), 0.30 s", page.text)
    assert outcomes == [
        ("failure", TASKS[0], "1000001"), ("failure", TASKS[1], "1000001"),
        ("success", TASKS[0], "1000000"), ("success", TASKS[1], "1000000"),
    ]  # fmt: skip
    assert f"{TASKS[1]} 1000001 {ODD} 24" in page.text
    assert f"'env.tasks=[{TASKS[0]}]' seed=1000001 episodes=1" in page.text


def test_a_gallery_shows_how_every_failure_ended(demo) -> None:
    lines = (demo / "eval" / "episodes.jsonl").read_text().splitlines()
    late = json.loads(lines[2]) | {"success": False, "reason": "max_steps"}
    (demo / "eval" / "episodes.jsonl").write_text("\n".join([*lines[:2], json.dumps(late), *lines[3:]]) + "\n")
    imsave(demo / "eval" / "videos" / TASKS[0] / "episode_2_failure.jpg", np.zeros((8, 8, 3), np.uint8))
    _, page = read(demo)
    ends = page.text[page.text.index("How they ended") :]
    captions = re.findall(rf"({'|'.join(TASKS)}), seed (\d+), step 24: (\S+)", ends)
    first = ODD.split()[0]
    assert captions[:3] == [
        (TASKS[0], "1000001", first), (TASKS[0], "1000002", "max_steps"), (TASKS[1], "1000001", first),
    ]  # fmt: skip


def test_success_over_steps_is_what_the_episodes_say() -> None:
    drawn = {}
    axes = SimpleNamespace(
        plot=lambda x, y, **style: drawn.update(x=x, y=y),
        fill_between=lambda x, low, high, **style: drawn.update(low=low),
    )
    ends = [(30, True), (10, True), (30, False), (40, False)]
    _solved_by_step(axes, [{"steps": s, "success": w} for s, w in ends], "a", "b", "-")  # pyright: ignore
    assert drawn["x"].tolist() == [0, 10, 30, 40] and drawn["y"].tolist() == [0, 0.25, 0.5, 0.5]
    assert drawn["low"].tolist() == [wilson(k, 4)[0] for k in (0, 1, 2, 2)]


def test_an_evaluation_has_a_page_of_its_own(original, tmp_path) -> None:
    folder = shutil.copytree(original / "eval", tmp_path / "alone")
    source, page = read(folder)
    assert "simulation 6 / 8" in page.text and "changed nothing nothing policy call" in page.text
    assert "not run" not in page.text and page.tags.count("video") == 4
    assert 'aria-label="share of episodes solved by then over control step"' in source


@pytest.mark.parametrize("steps", [(600, 200, 400), (600, None, 400)])
def test_several_evaluations_are_shown_beside_each_other(original, tmp_path, steps) -> None:
    folders = []
    for name, step in zip(("last", "first", "middle"), steps, strict=True):
        folders.append(shutil.copytree(original / "eval", tmp_path / name))
        info = json.loads((folders[-1] / "eval_info.json").read_text())
        write_json(folders[-1] / "eval_info.json", info | {"checkpoint": {"folder": "run", "step": step}})
    source, page = Path(report(*folders)).read_text(), Page(report(*folders).read_text())
    assert f"last 600 {TASKS[0]} 3 / 4 75% 30% .. 95%" in page.text and "middle 400 mean over tasks" in page.text
    known = None not in steps
    over = "training step" if known else "evaluation, in the order given"
    assert f'aria-label="success, 95 % interval over {over}"' in source
    assert page.text.index("Several evaluations") < page.text.index("Simulation")
    with pytest.raises(FileNotFoundError, match=r"holds no finished evaluation: looked for eval_info.json and eval/"):
        report(folders[0], tmp_path)


def test_one_plot_per_action_dim_from_the_recorded_chunks(whole) -> None:
    source, page = whole
    labels = re.findall(r'aria-label="(\S+ \[\S+\]) over time \[s\]"', source)
    assert labels == ["hand_delta[0] [m]", "hand_delta[1] [m]", "hand_delta[2] [m]", "gripper_effort [1]"] * 2
    assert page.text.count("predicted executed") == 8


def test_colours_follow_the_theme(whole) -> None:
    source, _ = whole
    body = source[source.index("<body>") :]
    assert not [c for c in dita.page.CSS_COLOURS if c in body]
    assert "prefers-color-scheme: dark" in source and "var(--ink)" in body


def test_equal_input_gives_equal_bytes(original, whole) -> None:
    assert report(original).read_text() == whole[0]
    assert not list(original.glob(".*")), "nothing half-written is left"


@pytest.mark.parametrize(
    ("gone", "what"),
    [
        ("live/live.json", "live run"),
        ("train/config.json", "training"),
        ("eval", "evaluation"),
        ("eval/eval_info.json", "evaluation to the end (8 episodes so far; --resume continues)"),
        ("eval/videos", "recorded chunks"),
        ("demonstrations.png", "contact sheet"),
    ],
)
def test_a_missing_part_is_said_with_a_command_that_exists(demo, gone, what) -> None:
    shutil.rmtree(demo / gone) if (demo / gone).is_dir() else (demo / gone).unlink()
    source, page = read(demo)
    assert f"not run: {what}; command: dita " in page.text
    for command in re.findall(r"not run: [^<]*<code>([^<]*)</code>", source):
        program, *words = shlex.split(html.unescape(command))  # the folder's name needs quotes in a shell
        args, rest = build_parser().parse_known_args(words)
        assert program == "dita" and args.run and all("=" in word for word in rest)


def test_one_part_is_enough(demo) -> None:
    for name in ("times.json", "train", "eval", "demonstrations.png"):
        shutil.rmtree(demo / name) if (demo / name).is_dir() else (demo / name).unlink()
    _, page = read(demo)
    assert "policy unknown not trained simulation - not run live, over DDS 2 / 3" in page.text
    assert page.text.count("not run: ") == 5


def test_a_live_run_without_a_chunk_has_no_latency(demo) -> None:
    write_live(demo / "live", [])
    _, page = read(demo)
    assert "image to command p50 -, p99 -" in page.text
    assert "camera stamp to command [ms]" not in page.text


def test_no_demo_folder_is_refused_and_stays_as_it_was(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"does not exist: looked for times\.json, train"):
        report(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no result of a demo"):
        report(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["times.json", "train/config.json", "eval/eval_info.json", "live/live.json"])
def test_a_damaged_part_is_named_and_the_old_report_stays(demo, name) -> None:
    (demo / "report.html").write_text("old")
    (demo / name).write_text('{"tasks": {')
    with pytest.raises(ValueError, match=f"{name} is not JSON"):
        report(demo)
    assert (demo / "report.html").read_text() == "old"


def test_a_part_of_another_version_is_refused_by_key(demo) -> None:
    info = json.loads((demo / "eval" / "eval_info.json").read_text())
    del info["latency_s"]
    write_json(demo / "eval" / "eval_info.json", info)
    with pytest.raises(ValueError, match="no 'latency_s'; written by another version"):
        report(demo)


def test_a_line_cut_short_is_left_out_and_a_broken_one_named(demo) -> None:
    log = demo / "train" / "log.jsonl"
    whole = log.read_text()
    log.write_text(whole + '{"step": 40, "lo')
    assert "30 of 1000 steps" in read(demo)[1].text
    log.write_text('{"step"\n' + whole)
    with pytest.raises(ValueError, match=r"log\.jsonl is not JSON lines"):
        report(demo)


def test_videos_beyond_the_budget_are_named_not_embedded(demo, monkeypatch) -> None:
    sizes = sorted(p.stat().st_size for p in demo.glob("eval/videos/*/*.mp4"))
    monkeypatch.setattr(dita.report, "VIDEO_BYTES", sum(sizes) - 1)
    _, page = read(demo)
    assert page.tags.count("video") == 3
    assert page.tags.count("article") == 4 and page.text.count("; video: ") == 1


def test_rollouts_beyond_the_limit_are_counted(demo, monkeypatch) -> None:
    monkeypatch.setattr(dita.report, "MAX_ROLLOUTS", 3)
    _, page = read(demo)
    assert page.tags.count("article") == 3
    assert f"1 more: {demo}/eval/videos" in page.text
