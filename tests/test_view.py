"""`dita inspect --view`: what an .rrd file holds, and what is said without rerun-sdk."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from test_store import make_store, small_spec

from dita.cli import main


def test_without_rerun_one_line_says_what_to_install(tmp_path, monkeypatch, capsys) -> None:
    make_store(tmp_path / "s.zarr", small_spec(), (5,))
    monkeypatch.setitem(sys.modules, "rerun", None)
    assert main(["inspect", str(tmp_path / "s.zarr"), "--view"]) == 1
    assert capsys.readouterr().err == "dita inspect: ImportError: --view needs rerun-sdk: pip install 'dita[view]'\n"


def test_an_rrd_file_holds_the_episodes(tmp_path, capsys) -> None:
    pytest.importorskip("rerun")
    from rerun.chunk import RrdReader

    episodes = make_store(tmp_path / "s.zarr", small_spec(), (5, 40, 3))
    out = tmp_path / "s.rrd"
    assert main(["inspect", str(tmp_path / "s.zarr"), "--view-out", str(out), "--episodes", "1", "2"]) == 0
    assert f"2 episodes of 3; choose with --episodes: {out}" in capsys.readouterr().out
    rows: dict[str, list] = {}
    for chunk in RrdReader(out).stream().to_chunks():
        if not chunk.is_static:
            batch = chunk.to_record_batch()
            values = next(batch.column(n) for n in batch.schema.names if ":" in n)
            columns = (batch.column("frame"), batch.column("stamp"), values)
            rows.setdefault(chunk.entity_path, []).extend(zip(*(c.to_pylist() for c in columns), strict=True))
    leaves = ("state/hand", "state/gripper", "action/delta", "action/grip", "images/cam0", "images/cam1")
    assert rows.keys() == {f"/episode_{i:05d}/{leaf}" for i in (1, 2) for leaf in leaves}
    for number in (1, 2):
        episode = episodes[number]
        for leaf, values in (("state/hand", episode.state[:, :3]), ("action/grip", episode.action[:, 3:])):
            found = sorted(rows[f"/episode_{number:05d}/{leaf}"], key=lambda row: row[0])
            assert [row[0] for row in found] == list(range(len(episode.stamp)))
            seconds = [row[1].total_seconds() for row in found]
            np.testing.assert_allclose(seconds, episode.stamp, atol=1e-6)
            np.testing.assert_array_equal(np.array([row[2] for row in found]), values.astype(float))
        assert len(rows[f"/episode_{number:05d}/images/cam1"]) == len(episode.stamp)


def test_unknown_episodes_are_refused(tmp_path, capsys) -> None:
    pytest.importorskip("rerun")
    make_store(tmp_path / "s.zarr", small_spec(), (5,))
    assert (
        main(["inspect", str(tmp_path / "s.zarr"), "--view-out", str(tmp_path / "x.rrd"), "--episodes", "0", "3"]) == 1
    )
    assert "has episodes 0..0, asked for 3" in capsys.readouterr().err
    assert not (tmp_path / "x.rrd").exists()
