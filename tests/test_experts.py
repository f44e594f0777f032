"""The page of scripted experts: what it lists, and that a failed start is no success."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest

from benchmarks import experts
from benchmarks.experts import Job, Outcome, page, play


def test_every_suite_with_an_expert_is_asked() -> None:
    if importlib.util.find_spec("gymnasium_robotics") is None:  # importing it here would bind an OpenGL backend
        pytest.skip("needs dita[sim]")
    found = experts.experts(["metaworld", "robosuite", "fetch", "aloha", "choice"])
    counts = {
        suite: sum(s == suite for s, *_ in found) for suite in ("metaworld", "robosuite", "fetch", "aloha", "choice")
    }
    assert counts == {"metaworld": 50, "robosuite": 10, "fetch": 3, "aloha": 1, "choice": 6}
    assert experts.experts(["aloha"]) == [("aloha", None, "AlohaTransferCube")]


def test_a_suite_that_is_not_installed_is_one_line(monkeypatch, capsys) -> None:
    def missing(suites):
        raise ValueError("suite fetch needs the package gymnasium_robotics: pip install 'dita[sim]'")

    monkeypatch.setattr(experts, "experts", missing)
    with pytest.raises(SystemExit):
        experts.main(["--suites", "fetch"])
    assert "pip install 'dita[sim]'" in capsys.readouterr().err


def test_starts_are_counted_and_noise_makes_a_difference() -> None:
    job = Job("choice", None, "touch-red", 0.0)
    clean = play(job, 4)
    assert (clean.solved, clean.starts) == (4, 4) and 10 < clean.steps < 40
    assert play(replace(job, noise=5.0), 4).solved < 4  # so much that it cannot aim
    assert play(job, 4) == clean


def test_the_page_shows_what_fails() -> None:
    good, bad = Job("metaworld", None, "reach-v3", 0.15), Job("metaworld", None, "assembly-v3", 0.15)
    arm = Job("robosuite", "robosuite_iiwa_osc", "Lift", 0.15)
    text = page([(good, Outcome(20, 20, 30.0)), (bad, Outcome(3, 20, 99.0)), (arm, Outcome(20, 20, 50.0))])
    assert (
        "| metaworld | - | assembly-v3 | 3/20 | 99 |" in text
        and "| robosuite | robosuite_iiwa_osc | Lift | 20/20 | 50 |" in text
    )
    assert "1 more tasks of Meta-World, all starts with each noise: reach-v3." in text and "84% .. 100%" in text
