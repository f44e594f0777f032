"""The benchmarks run and are well-formed; what they measure is not a test's business."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import harness, stitching_rows
from benchmarks.rows import ROWS

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_every_row_runs_at_its_quick_size(tmp_path) -> None:
    command = [sys.executable, "-m", "benchmarks", "--tier", "quick", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {f"{row}.quick.json" for row in ROWS}
    for row in ROWS:
        values = json.loads((tmp_path / f"{row}.quick.json").read_text())
        assert values["tier"] == "quick" and values["machine"]["cpus"] >= 1 and values["machine"]["git"]
        assert values["cases"]
        for case in values["cases"]:
            assert case["name"] and case["goal"]
            assert (case["ratio"] is None) <= (case["met"] is None) or case["met"] is False
            assert case["ratio"] is not None or case["note"]  # what was not measured says why
    exact = json.loads((tmp_path / "denoise_exact.quick.json").read_text())["cases"][0]["detail"]
    assert 0 < exact["eps_difference"] <= 1e-5
    ticks = json.loads((tmp_path / "tick_stream.quick.json").read_text())["cases"]
    assert all(case["detail"]["frame_cache_bit_identical"] for case in ticks)
    train = json.loads((tmp_path / "train_multinoise.quick.json").read_text())["cases"]
    assert all(case["detail"]["gradient_error"] <= 1e-6 for case in train[:2])
    (run,) = json.loads((tmp_path / "eval_throughput.quick.json").read_text())["cases"][0]["detail"]["runs"]
    assert run["identical"] and run["wall_s"] > 0 and run["policy_s"] > 0 and run["simulation_core_s"] > 0
    scaling = json.loads((tmp_path / "ddp_scaling.quick.json").read_text())["cases"][0]["detail"]
    assert scaling["two_hash"] == scaling["one_hash"] and len(scaling["one_hash"]) == 64


def test_no_wall_time_ratio_while_others_use_the_machine(monkeypatch) -> None:
    for others, ratio in ((0.0, True), (1.3, False)):
        monkeypatch.setattr(harness, "busy_cores", lambda others=others: others)
        case = harness.interleave(lambda: None, lambda: sum(range(2000)), pairs=3).case("x", 1.0)
        assert (case.ratio is not None) == ratio == (case.met is not None)
        assert ("others used 1.3 cores" in case.note) == (not ratio)
        assert len(case.detail["wall_s"]) == 3 and case.detail["cpu_ratio"] > 0


def test_the_table_says_met_missed_and_not_measured(tmp_path) -> None:
    cases = [
        harness.Case("a", 0.1, 0.5, "s", 5.0, ">= 3x", True),
        harness.Case("b", 2.0, 2.0, "s", 1.0, ">= 3x", False, "b: where the time goes"),
        harness.Case("c", None, None, "s", None, ">= 10x", None, "no CUDA device"),
        harness.Case("d", 12345.6, 999.0, "windows/s", 12.4, "reported", None, "d and e: no goal"),
        harness.Case("e", 2000.0, 999.0, "windows/s", 2.0, "reported", None, "d and e: no goal"),
    ]
    harness.save("denoise_exact", "full", cases, 1.0, tmp_path)
    harness.save("memory", "quick", cases, 1.0, tmp_path)
    table = harness.readme_table(tmp_path)
    assert "| denoise_exact | a | 100 ms | 500 ms | 5.00x | >= 3x | yes |" in table
    assert "| b | 2 s | 2 s | 1.00x | >= 3x | **missed** |" in table and "no CUDA device" in table
    assert "| c | - | - | - | >= 10x | not measured |" in table
    assert "| d | 12,346 windows/s | 999 windows/s | 12.40x | reported | - |" in table
    assert table.count("- denoise_exact, d and e: no goal") == 1 and "- **denoise_exact**, b: where" in table
    # a quick run never counts
    assert (
        "Not yet measured: tick_stream, tick_gpu, train_multinoise, loader, memory, eval_throughput, startup, "
        "node_latency, stitching, ddp_scaling." in table
    )


def test_unknown_rows_are_refused(capsys) -> None:
    from benchmarks.__main__ import main

    with pytest.raises(SystemExit):
        main(["nothing"])
    assert "there are denoise_exact" in capsys.readouterr().err


def test_seams_are_where_a_chunk_takes_over_or_ends() -> None:
    steps = np.array([0, 1, 1, 1, 3, 3, 0, 0, 0, 2, 2], float) * 1e-3  # [m]
    began = [0, 5, 5, 5, 9, 9, 0, 0, 0, 12, 12]  # nothing, a chunk, another, a pause, a third
    path = np.concatenate([[0.0], np.cumsum(steps)])[:, None] * np.array([[1.0, 0.0, 0.0]])
    jumps, inside, jerks, jerks_inside = stitching_rows.seams_of(path, began, dt=0.1)
    assert jumps == pytest.approx([0.002, 0.003, 0.002])  # 1 -> 3, 3 -> 0, 0 -> 2; none in the pause
    assert inside == pytest.approx([0, 0, 0], abs=1e-12)  # from the third step of the first chunk on
    assert jerks == pytest.approx([2, 3, 2])  # |second difference of the steps| / dt^3
    assert jerks_inside == pytest.approx([0, 2, 2], abs=1e-9)


def made_up_episode(name: str, delay: int, seed: int, jump: float = 0.003) -> stitching_rows.Episode:
    rows = [0.001, 0.002, 0.003]
    return stitching_rows.Episode(
        name, delay, stitching_rows.TASKS[0], seed, seed > 0, 90, 1, [jump], rows, [50.0], rows
    )


def test_a_page_of_some_cells_says_how_many_starts_and_how_sure(tmp_path) -> None:
    episodes = [made_up_episode("rtc, trained", 6, seed) for seed in range(4)]
    seams = stitching_rows.seams_by_cell([*episodes, made_up_episode("naive switch", 6, 0, 0.02)])
    assert seams["rtc, trained", 6].jump == (1.5, 1.5, 1.5) and seams["naive switch", 6].jump[0] == 10.0
    values = seams["rtc, trained", 6].to_dict()
    assert (values["episodes"], values["successes"], values["seams"], values["underruns"]) == (4, 3, 4, 4)
    stitching_rows.write_page(seams, 0.0125, tmp_path)
    page = (tmp_path / "stitching.md").read_text()
    assert "| rtc, trained | 75 | 3/4 | 0.30 .. 0.95 | 1.50 | 1.50 .. 1.50 |" in page and "ensembling |" not in page
    assert (tmp_path / "stitching.png").read_bytes()[:4] == b"\x89PNG"
    nowhere = stitching_rows.Seam([replace(episodes[0], jumps=[], inside=[], jerks=[], jerks_inside=[])])
    assert nowhere.to_dict()["jump_ratio_and_interval"] is None  # no two chunks met: no number


def test_groups_that_were_played_are_not_played_again(tmp_path, monkeypatch) -> None:
    played: list[tuple] = []

    class Here:
        """A pool that plays in this process."""

        def __init__(self, *args: object) -> None: ...
        def __enter__(self) -> Here:
            return self

        def __exit__(self, *error: object) -> None: ...
        def map(self, function, cells):
            for cell in cells:
                played.append(cell)
                yield [made_up_episode(cell[0], cell[1], cell[3] + i) for i in range(2)]

    values = {"BUILD": tmp_path, "STARTS": 4, "GROUP": 2, "DELAYS": (0, 6), "TASKS": stitching_rows.TASKS[:1]}
    for name, value in values.items():
        monkeypatch.setattr(stitching_rows, name, value)
    monkeypatch.setattr(stitching_rows, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(stitching_rows.DitaPolicy, "from_pretrained", lambda run: run)
    monkeypatch.setattr(stitching_rows, "identity", lambda run: {"weights": str(run)})
    runs = {True: Path("a"), False: Path("b")}
    every = stitching_rows.play_all(runs)
    assert len(every) == 2 * 2 * len(stitching_rows.MODES) * 2 and len(played) == 24
    (path,) = tmp_path.glob("episodes.*.jsonl")
    text = path.read_text()
    path.write_text(text[: len(text) - 30])  # killed while it wrote: the last group is not whole
    played.clear()
    assert stitching_rows.play_all(runs) == every and len(played) == 1
    assert stitching_rows.play_all(runs) == every and len(played) == 1
    stitching_rows.play_all({True: Path("c"), False: Path("b")})  # other weights are another experiment
    assert len(played) == 25 and len(list(tmp_path.glob("episodes.*.jsonl"))) == 2
