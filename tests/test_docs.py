"""The pages: their commands parse and compose, their Python runs, their links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from dita.cli import build_parser, compose
from dita.config import CollectConfig, DemoConfig, EvalConfig, FinetuneConfig, LiveConfig, TrainConfig

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
CONFIGS = {
    "collect": CollectConfig,
    "train": TrainConfig,
    "finetune": FinetuneConfig,
    "eval": EvalConfig,
    "robot": LiveConfig,
}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    lines = [line for b in blocks(page, "sh") for line in b.replace("\\\n", " ").splitlines()]
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


COMMANDS = [(page.name, words) for page in PAGES for words in commands(page)]


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[f"{p}: {' '.join(w)[:60]}" for p, w in COMMANDS])
def test_every_command_exists(page, words) -> None:
    program, *rest = words
    if program == "make":
        makefile = (ROOT / "Makefile").read_text()
        targets, variables = ([w for w in rest if ("=" in w) is given] for given in (False, True))
        assert set(targets) <= set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
        assert all(f"$({word.partition('=')[0]})" in makefile for word in variables)
    elif Path(program).name == "dita":
        args, overrides = build_parser().parse_known_args(rest)
        assert all("=" in word for word in overrides)
        if getattr(args, "multirun", False):  # the first of several values
            overrides = [re.sub(r"^([\w.]+=[^,\[{]+),.*", r"\1", word) for word in overrides]
        if args.verb == "demo":
            compose(args.recipe if "=" not in args.recipe else "demo", overrides, DemoConfig)
        elif args.hydra:
            keys = "eval" if args.verb == "compare" else args.verb
            compose(keys, overrides, CONFIGS[keys])
        else:
            assert overrides == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_local_link_leads_somewhere(page) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target
