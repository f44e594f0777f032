"""Mutate the guard's core, one small change at a time, and count what tests/test_guard.py notices.

python benchmarks/mutation.py [--modules guard limits] [--limit 50]; resumes; writes docs/evidence/mutation.md
Each mutant runs in a fork that imports the changed module in place of the real one. Docstrings, type
hints and the texts of messages are not mutated; everything else that an operator below touches is.
"""

import argparse
import ast
import copy
import hashlib
import importlib.abc
import importlib.util
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
MODULES = ("guard", "limits", "chunk_buffer", "space", "tracker")
RESULTS = ROOT / "build" / "mutation.json"
EQUIVALENT = ROOT / "benchmarks" / "mutation_equivalent.json"
PAGE = ROOT / "docs" / "evidence" / "mutation.md"
TIMEOUT_S = 90.0
COMPARE = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
COMPARE.update({ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In})
ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult}
ARITHMETIC.update({ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr})
SIDE_EFFECTS = (ast.Expr, ast.AugAssign)


def source_of(module: str) -> Path:
    """Return a module's file."""
    return ROOT / "robot_io" / "core" / f"{module}.py"


def changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Yield (what, replacement) for every mutation of one node."""
    new = copy.deepcopy(node)
    if isinstance(node, ast.Compare) and isinstance(new, ast.Compare):
        for i, op in enumerate(node.ops):
            if type(op) in COMPARE:
                other = copy.deepcopy(new)
                other.ops[i] = COMPARE[type(op)]()
                yield f"{type(op).__name__} -> {type(other.ops[i]).__name__}", other
    elif isinstance(node, ast.BinOp) and isinstance(new, ast.BinOp) and type(node.op) in ARITHMETIC:
        new.op = ARITHMETIC[type(node.op)]()
        yield f"{type(node.op).__name__} -> {type(new.op).__name__}", new
    elif isinstance(node, ast.BoolOp) and isinstance(new, ast.BoolOp):
        new.op = ast.And() if isinstance(node.op, ast.Or) else ast.Or()
        yield f"{type(node.op).__name__} -> {type(new.op).__name__}", new
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub, ast.Invert)):
        yield f"{type(node.op).__name__} removed", node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield f"{node.value} -> {not node.value}", ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        yield f"{node.value} -> {node.value + 1}", ast.Constant(node.value + 1)
    elif isinstance(node, (ast.If, ast.IfExp, ast.While)) and isinstance(new, (ast.If, ast.IfExp, ast.While)):
        new.test = ast.UnaryOp(ast.Not(), new.test)
        yield "condition negated", new
    elif isinstance(node, SIDE_EFFECTS) and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
        yield "statement removed", ast.Pass()


def places(tree: ast.AST) -> Iterator[tuple[ast.AST, str, int | None, ast.AST]]:
    """Yield (parent, field, index, node) of everything that may be mutated, in the file's order."""
    skipped = ("annotation", "returns", "decorator_list", "bases", "type_params")
    for field, value in ast.iter_fields(tree):
        if field in skipped or isinstance(tree, (ast.JoinedStr, ast.Raise, ast.Assert)):
            continue
        for i, child in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(child, ast.AST):
                yield tree, field, i if isinstance(value, list) else None, child
                yield from places(child)


def mutants(module: str) -> Iterator[tuple[str, str]]:
    """Yield (name, source) of every mutant of a module."""
    text = source_of(module).read_text(encoding="utf-8")
    tree, seen = ast.parse(text), Counter()
    for parent, field, index, node in list(places(tree)):
        for what, replacement in changes(node):
            line = text.splitlines()[getattr(node, "lineno", 1) - 1].strip()
            name = f"{module}: `{line}`: {what}"
            seen[name] += 1
            value = getattr(parent, field)
            set_child(parent, field, index, ast.copy_location(replacement, node))
            yield f"{name} #{seen[name]}", ast.unparse(ast.fix_missing_locations(tree))
            set_child(parent, field, index, node if index is not None else value)


def set_child(parent: ast.AST, field: str, index: int | None, node: ast.AST) -> None:
    """Put a node into its parent."""
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node


class Changed(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Import one module from a changed source."""

    def __init__(self, name: str, source: str) -> None:
        self.name, self.source = name, source

    def find_spec(self, name, path=None, target=None):
        """Return a spec for the one module."""
        return importlib.util.spec_from_loader(name, self) if name == self.name else None

    def exec_module(self, module) -> None:
        """Run the changed source."""
        exec(compile(self.source, self.name, "exec"), module.__dict__)


def run(module: str, source: str) -> str:
    """Return "killed", "survived" or "timeout" for one mutant."""
    child = os.fork()
    if child == 0:
        os.setsid()
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 1)
            os.dup2(null.fileno(), 2)
        sys.meta_path.insert(0, Changed(f"robot_io.core.{module}", source))
        import pytest

        code = 1
        try:
            options = ["-x", "-q", "--noconftest", "-p", "no:cacheprovider"]
            options += ["--hypothesis-seed=0", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
            code = int(pytest.main([*options, str(ROOT / "tests" / "test_guard.py")]))
        finally:
            os._exit(code)
    end = time.monotonic() + TIMEOUT_S
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return "survived" if os.waitstatus_to_exitcode(status) == 0 else "killed"
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout"


def main() -> None:
    """Run what has not been run, then write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--modules", nargs="+", choices=MODULES, default=list(MODULES))
    parser.add_argument("--limit", type=int, default=10**9, help="mutants to run now")
    parser.add_argument("--survivors", action="store_true", help="run again what survived, after better tests")
    options = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import hypothesis.strategies  # noqa: F401  what every mutant would import again
    import numpy  # noqa: F401
    import pytest  # noqa: F401
    import ruckig  # noqa: F401

    import dita.embodiment  # noqa: F401
    import robot_io.bus
    import robot_io.messages  # noqa: F401

    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.parent.mkdir(exist_ok=True)
    todo = [(m, n, s) for m in options.modules for n, s in mutants(m) if wanted(known, n, options.survivors)]
    assert run("guard", source_of("guard").read_text()) == "survived", "tests/test_guard.py fails without a mutation"
    for module, name, source in todo[: options.limit]:
        known[name] = run(module, source)
        RESULTS.write_text(json.dumps(known, indent=0, sort_keys=True))
        print(f"{known[name]:9}{name}", flush=True)
    left = sum(1 for m in MODULES for n, _ in mutants(m) if n not in known)
    print(f"{left} mutants left to run")
    write(known)


def wanted(known: dict[str, str], name: str, survivors: bool) -> bool:
    """Say whether to run a mutant."""
    return known.get(name) == "survived" if survivors else name not in known


def write(known: dict[str, str]) -> None:
    """Write the page from all results of mutants that still exist."""
    equivalent = json.loads(EQUIVALENT.read_text()) if EQUIVALENT.exists() else {}
    lines = [
        "| module | mutants | run | killed | equivalent, listed | survived | score |",
        "|---|---|---|---|---|---|---|",
    ]
    survivors, listed = [], []
    for module in MODULES:
        names = [n for n, _ in mutants(module)]
        found = {n: known[n] for n in names if n in known}
        killed = sum(r != "survived" for r in found.values())
        same = [n for n, r in found.items() if r == "survived" and n in equivalent]
        alive = [n for n, r in found.items() if r == "survived" and n not in equivalent]
        share = f"{100 * killed / (killed + len(alive)):.1f} %" if killed else "not run"
        lines.append(f"| {module} | {len(names)} | {len(found)} | {killed} | {len(same)} | {len(alive)} | {share} |")
        survivors += alive
        listed += same
    digest = hashlib.sha256(b"".join(source_of(m).read_bytes() for m in MODULES)).hexdigest()[:12]
    text = [
        "# Mutation score of the guard's core",
        "",
        f"`make mutation`: tests/test_guard.py against one change at a time; sources {digest}. The score leaves",
        "out the mutants listed as equivalent. A mutant that hangs counts as killed.",
        "",
        *lines,
        "",
        "## Equivalent mutants",
        "",
        *[f"- {n}: {equivalent[n]}" for n in listed],
        "",
        "## Survivors",
        "",
        *[f"- {n}" for n in survivors],
    ]
    PAGE.write_text("\n".join(text).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
