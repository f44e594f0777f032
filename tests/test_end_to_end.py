"""The main job itself, at the smallest size: real simulator, real store, real training, real DDS, real report."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dita.checkpoint import load_policy
from dita.cli import main
from dita.datasets.store import Store

ROOT = Path(__file__).parent.parent
TASK = "button-press-topdown-v3"


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "out"
    size = [f"tasks=[{TASK}]", "demonstrations=2", "train_experiment=smoke", "eval_episodes=2", "live_episodes=1"]
    assert main(["demo", f"out={out}", *size]) == 0
    assert main(["demo", f"out={out}", *size]) == 0  # a second run reuses what is there
    return out


def test_every_step_left_its_result(demo) -> None:
    store = Store(demo / "demonstrations.zarr")
    assert len(store.episodes) == 2 and all(e.success for e in store.episodes)
    assert (demo / "demonstrations.png").stat().st_size > 10_000
    log = (demo / "train" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [1, 2, 3, 4]
    info = json.loads((demo / "eval" / "eval_info.json").read_text())
    assert info["tasks"][TASK]["episodes"] == 2 and info["distinct_starts"] == 2
    assert len(list((demo / "eval" / "videos" / TASK).glob("*.mp4"))) == 2
    times = json.loads((demo / "times.json").read_text())
    assert set(times) == {"collect", "inspect", "train", "eval", "live", "report"}


def test_the_report_stands_alone(demo) -> None:
    text = (demo / "report.html").read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", text) and "@import" not in text


def test_the_arm_was_driven_over_the_wire_inside_the_envelope(demo) -> None:
    live = json.loads((demo / "live" / "live.json").read_text())
    assert len(live["episodes"]) == 1 and live["episodes"][0]["steps"] > 0
    assert live["envelope"]["commands"] > 0
    assert live["envelope"]["non_finite"] == 0
    assert not any(live["envelope"]["violations"].values())


def test_the_store_and_the_checkpoint_agree(demo) -> None:
    policy = load_policy(demo / "train")
    policy.contract.check_embodiment(Store(demo / "demonstrations.zarr").spec)


def test_the_readme_python_works(demo, monkeypatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(blocks) == 1
    code = blocks[0].replace("outputs/demo", str(demo))
    scope: dict = {}
    exec(compile(code, "README.md", "exec"), scope)
    assert scope["chunk"].values.shape == (16, 4)


def test_a_busy_demo_folder_is_refused_with_what_differs(demo, capsys) -> None:
    assert main(["train", f"run={demo}/train", f"data.stores=[{{path:{demo}/demonstrations.zarr,weight:1}}]"]) == 1
    assert "--resume" in capsys.readouterr().err
    out = [f"out={demo}/eval", f"env.tasks=[{TASK}]", "seed=5", "--resume"]
    assert main(["eval", f"{demo}/train", *out]) == 1
    assert "seed" in capsys.readouterr().err
