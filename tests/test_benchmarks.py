"""The benchmarks run and are well-formed; what they measure is not a test's business."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import harness
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
        "Not yet measured: tick_stream, tick_gpu, train_multinoise, loader, memory, startup, node_latency, stitching."
        in table
    )


def test_unknown_rows_are_refused(capsys) -> None:
    from benchmarks.__main__ import main

    with pytest.raises(SystemExit):
        main(["nothing"])
    assert "there are denoise_exact" in capsys.readouterr().err
