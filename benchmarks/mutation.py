"""Mutate the guard's core, one small change at a time, and count what tests/test_guard.py notices.

python benchmarks/mutation.py [--modules guard limits] [--limit 50] [--survivors] [--workers 2]; resumes from
docs/evidence/mutation.json, of which a module that has changed begins anew, and writes its page beside it.
Each mutant runs in a fork that imports the changed module in place of the real one and calls the tests that reach the
changed line, the quickest first, until one fails. Times are of the processor: a busy machine kills no mutant.
Docstrings, type hints and the texts of messages are not mutated; everything else that an operator below touches is.
"""

import argparse
import ast
import contextlib
import copy
import hashlib
import importlib
import importlib.abc
import importlib.util
import inspect
import itertools
import json
import logging
import os
import re
import resource
import sys
import time
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
CORE = ROOT / "robot_io" / "core"
MODULES = ("guard", "limits", "chunk_buffer", "space", "tracker")
RESULTS = ROOT / "docs" / "evidence" / "mutation.json"  # {"sources": {module: digest}, "mutants": {name: outcome}}
TRIED = ROOT / "build" / "mutation_tried.json"  # survivor -> the tests that it survived
REACHED = ROOT / "build" / "mutation_reached.json"
EQUIVALENT = ROOT / "benchmarks" / "mutation_equivalent.json"
PAGE = ROOT / "docs" / "evidence" / "mutation.md"
AGAIN = (*(f"robot_io.core.{m}" for m in MODULES), "guard_arm", "test_guard")  # imported anew for each mutant
PATIENCE, GRACE_S = 4.0, 5.0  # processor time of a mutant: times what its tests take, and on top of it [s]
PARTS = 8  # of the mutants, run one after the other
COMPARE = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
COMPARE.update({ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In})
ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult}
ARITHMETIC.update({ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr})
SIDE_EFFECTS = (ast.Expr, ast.AugAssign)
RANDOM: set[str] = set()  # names of tests with hypothesis
Test = tuple[str, Callable[[], None]]


# ---- mutants


def changes(node: Any) -> Iterator[tuple[str, ast.AST]]:
    """Yield (what, replacement) for every mutation of one node."""
    new: Any = copy.copy(node)
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            if type(op) in COMPARE:
                other = copy.copy(node)
                other.ops = [*node.ops[:i], COMPARE[type(op)](), *node.ops[i + 1 :]]
                yield f"{type(op).__name__} -> {type(other.ops[i]).__name__}", other
    elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        new.op = ARITHMETIC[type(node.op)]()
        yield f"{type(node.op).__name__} -> {type(new.op).__name__}", new
    elif isinstance(node, ast.BoolOp):
        new.op = ast.And() if isinstance(node.op, ast.Or) else ast.Or()
        yield f"{type(node.op).__name__} -> {type(new.op).__name__}", new
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub, ast.Invert)):
        yield f"{type(node.op).__name__} removed", node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield f"{node.value} -> {not node.value}", ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        yield f"{node.value} -> {node.value + 1}", ast.Constant(node.value + 1)
    elif isinstance(node, (ast.If, ast.IfExp, ast.While)):
        new.test = ast.copy_location(ast.UnaryOp(ast.Not(), node.test), node.test)
        yield "condition negated", new
    elif isinstance(node, SIDE_EFFECTS) and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
        yield "statement removed", ast.Pass()


def places(tree: Any, around: Any = None) -> Iterator[tuple[Any, str, int | None, Any, Any]]:
    """Yield (parent, field, index, node, statement around it) of all that may be mutated, in the file's order."""
    skipped = ("annotation", "returns", "decorator_list", "bases", "type_params")
    for field, value in list(ast.iter_fields(tree)):
        if field in skipped or isinstance(tree, (ast.JoinedStr, ast.Raise, ast.Assert)):
            continue
        for i, child in enumerate(list(value) if isinstance(value, list) else [value]):
            if isinstance(child, ast.AST):
                statement = child if isinstance(child, ast.stmt) else around
                yield tree, field, i if isinstance(value, list) else None, child, statement
                yield from places(child, statement)


def mutants(module: str) -> Iterator[tuple[str, ast.Module, Any]]:
    """Yield (name, tree, statement) of every mutant of a module; the tree is changed back for the next one."""
    text = (CORE / f"{module}.py").read_text(encoding="utf-8")
    tree, lines, seen = ast.parse(text), text.splitlines(), Counter()
    for parent, field, index, node, statement in list(places(tree)):
        for what, replacement in changes(node):
            name = f"{module}: `{lines[getattr(node, 'lineno', 1) - 1].strip()}`: {what}"
            seen[name] += 1
            put(parent, field, index, ast.fix_missing_locations(ast.copy_location(replacement, node)))
            yield f"{name} #{seen[name]}", tree, statement
            put(parent, field, index, node)


def put(parent: Any, field: str, index: int | None, node: ast.AST) -> None:
    """Put a node into its parent."""
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node


class Changed(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Import one module from a changed tree."""

    def __init__(self, name: str, tree: ast.Module) -> None:
        self.name, self.tree = name, tree

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Return a spec for the one module."""
        return importlib.util.spec_from_loader(name, self) if name == self.name else None

    def exec_module(self, module: types.ModuleType) -> None:
        """Run the changed code."""
        exec(compile(self.tree, str(CORE / f"{self.name.rpartition('.')[2]}.py"), "exec"), module.__dict__)


# ---- tests, without pytest: starting it would take longer than most mutants live


class Log(logging.Handler):
    """What pytest's caplog is to these tests."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line."""
        self.text += record.getMessage() + "\n"


def tests() -> list[Test]:
    """Import tests/test_guard.py and return its tests with every set of parameters."""
    module = importlib.import_module("test_guard")
    found: list[Test] = []
    for name, function in vars(module).items():
        if name.startswith("test_") and inspect.isfunction(function):
            digest = hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:6]
            for i, values in enumerate(parameters(function)):
                found.append((f"{name} {i} {digest}", lambda f=function, v=values: call(f, v)))
            if hasattr(function, "hypothesis"):
                RANDOM.add(name)
    return found


def parameters(function: Any) -> Iterator[dict[str, Any]]:
    """Yield the sets of parameters that the marks of a test make."""
    marks = [m for m in getattr(function, "pytestmark", []) if m.name == "parametrize"]
    choices = []
    for mark in marks:
        names, rows = mark.args
        names = [n.strip() for n in names.split(",")] if isinstance(names, str) else list(names)
        choices.append([dict(zip(names, row if len(names) > 1 else [row], strict=True)) for row in rows])
    for combination in itertools.product(*choices):
        yield {k: v for part in combination for k, v in part.items()}


def call(function: Any, values: dict[str, Any]) -> None:
    """Call a test with its parameters and fixtures; a warning is an error, as under pytest."""
    import pytest

    log, patch = Log(), pytest.MonkeyPatch()
    wanted = set(inspect.signature(function).parameters) if not hasattr(function, "hypothesis") else set()
    fixtures = {k: v for k, v in {"caplog": log, "monkeypatch": patch}.items() if k in wanted}
    logging.getLogger().addHandler(log)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            function(**values, **fixtures)
    finally:
        logging.getLogger().removeHandler(log)
        patch.undo()


def start(work: Callable[[], int], limit_s: float) -> int:
    """Begin work in a fork, which ends with what it returns, or another number if that broke; return its process."""
    pid = os.fork()
    if pid == 0:
        code = 99
        with contextlib.suppress(BaseException):
            resource.setrlimit(resource.RLIMIT_CPU, (int(limit_s) + 1, int(limit_s) + 2))
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            for name in AGAIN:
                del sys.modules[name]
            code = work()
        os._exit(code)
    return pid


def run(module: str, tree: ast.Module, chosen: list[str], limit_s: float) -> int:
    """Begin the tests of one mutant in a fork; return its process."""

    def work() -> int:
        sys.meta_path.insert(0, Changed(f"robot_io.core.{module}", tree))
        known = dict(tests())
        for i, test in enumerate([known[name] for name in chosen]):
            try:
                test()
            except BaseException:
                return 1 + min(i, 90)
        return 0

    return start(work, limit_s)


def outcome(status: int, chosen: list[str]) -> str:
    """Return "survived", "timeout" or "killed by" a test, of how a mutant's process ended."""
    code = os.waitstatus_to_exitcode(status)
    if code in (-9, -24):  # SIGKILL and SIGXCPU, which come of the limit
        return "timeout"
    if code == 0:
        return "survived"
    return f"killed by {chosen[code - 1]}" if 0 < code <= min(90, len(chosen)) else "killed"


# ---- which test reaches which line


def reached() -> dict[str, Any]:
    """Return {test: {"s": processor time, "lines": {module: [line]}}}, measured once for these sources and each test.

    A test of random values is followed by function, not by line: that would take longest.
    """
    files = [*(CORE / f"{m}.py" for m in MODULES), ROOT / "tests" / "guard_arm.py"]
    digest = hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()
    known = json.loads(REACHED.read_text()) if REACHED.exists() else {}
    if known.get("digest") != digest:
        known = {"digest": digest, "tests": {}}
    found = tests()
    known["tests"] = {name: known["tests"][name] for name, _ in found if name in known["tests"]}
    for name, test in found:
        if name in known["tests"]:
            continue
        lines: dict[str, set[int]] = {m: set() for m in MODULES}
        begin = time.process_time()
        watched = {str(CORE / f"{m}.py"): lines[m] for m in MODULES}
        sys.settrace(tracer(watched, by_line=name.split()[0] not in RANDOM))
        try:
            test()
        finally:
            sys.settrace(None)
        seconds = time.process_time() - begin
        known["tests"][name] = {"s": seconds, "lines": {m: sorted(v) for m, v in lines.items()}}
        REACHED.write_text(json.dumps(known))
    REACHED.write_text(json.dumps(known))
    return known["tests"]


def tracer(watched: dict[str, set[int]], by_line: bool) -> Callable[..., Any]:
    """Return a trace function that keeps the lines of the watched files that run, or those of the functions that do."""

    def enter(frame: types.FrameType, event: str, _: Any) -> Any:
        lines = watched.get(frame.f_code.co_filename)
        if lines is None:
            return None
        if not by_line:
            lines.update(line for _, _, line in frame.f_code.co_lines() if line)
            return None
        add = lines.add
        add(frame.f_lineno)

        def line(frame: types.FrameType, event: str, _: Any) -> Any:
            add(frame.f_lineno)
            return line

        return line

    return enter


def part_of(name: str) -> int:
    """Return which part of the mutants one belongs to, by chance: what has been run is a fair sample of all."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % PARTS


def choose(
    module: str, statement: Any, reached: dict[str, dict[str, set[int]]], texts: dict[str, list[str]]
) -> list[str]:
    """Return the tests that reach a statement; for a constant those that reach uses of its name."""
    body = getattr(statement, "body", None)
    last = body[0].lineno - 1 if isinstance(body, list) and body else statement.end_lineno
    wanted = {module: set(range(statement.lineno, max(last, statement.lineno) + 1))}
    if isinstance(statement, (ast.Assign, ast.AnnAssign)) and not any(
        wanted[module] & lines[module] for lines in reached.values()
    ):
        target = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target
        word = re.compile(rf"\b{re.escape(ast.unparse(target))}\b")
        wanted = {m: {i for i, line in enumerate(text, start=1) if word.search(line)} for m, text in texts.items()}
    return [n for n, lines in reached.items() if any(want & lines[m] for m, want in wanted.items())] or list(reached)


# ---- the run


def main() -> None:
    """Run what has not been run, then write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--modules", nargs="+", choices=MODULES, default=list(MODULES))
    parser.add_argument("--limit", type=int, default=10**9, help="mutants to run now")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="mutants at a time")
    parser.add_argument("--survivors", action="store_true", help="run again what survived, after better tests")
    options = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import hypothesis
    import hypothesis.core

    hypothesis.settings.register_profile(
        "mutation", deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    hypothesis.settings.load_profile("mutation")
    hypothesis.core.global_force_seed = 0
    TRIED.parent.mkdir(exist_ok=True)
    known = recorded()
    equivalent = json.loads(EQUIVALENT.read_text()) if EQUIVALENT.exists() else {}
    tried = json.loads(TRIED.read_text()) if TRIED.exists() else {}
    covered = reached()
    lines = {n: {m: set(v) for m, v in t["lines"].items()} for n, t in covered.items()}
    texts = {m: (CORE / f"{m}.py").read_text(encoding="utf-8").splitlines() for m in MODULES}
    running: dict[int, tuple[str, list[str], list[str]]] = {}

    def finish() -> None:
        pid, status = os.wait()
        name, chosen, reaching = running.pop(pid)
        known[name] = outcome(status, chosen)
        if known[name] == "survived":
            tried[name] = reaching
        print(f"{known[name]}: {name}", flush=True)
        save(known, tried)

    begun = 0
    for part, module in [(part, module) for part in range(PARTS) for module in options.modules]:
        for name, tree, statement in mutants(module):
            todo = known.get(name) == "survived" if options.survivors else name not in known
            if not todo or begun >= options.limit or part_of(name) != part or name in equivalent:
                continue
            while len(running) >= options.workers:
                finish()
            reaching = sorted(choose(module, statement, lines, texts), key=lambda n: covered[n]["s"])
            chosen = [n for n in reaching if n not in tried.get(name, ())]
            limit_s = GRACE_S + PATIENCE * sum(covered[n]["s"] for n in chosen)
            running[run(module, tree, chosen, limit_s)] = (name, chosen, reaching)
            begun += 1
    while running:
        finish()
    left = Counter(m for m in MODULES for n, _, _ in mutants(m) if n not in known and n not in equivalent)
    print(f"mutants left to run: {dict(left) or 0}")
    write(known)


def sources() -> dict[str, str]:
    """Return a digest of each module as it is."""
    return {m: hashlib.sha256((CORE / f"{m}.py").read_bytes()).hexdigest()[:12] for m in MODULES}


def recorded() -> dict[str, str]:
    """Return the outcomes of earlier runs, {mutant: outcome}, but for modules that have changed since."""
    if not RESULTS.exists():
        return {}
    values, now = json.loads(RESULTS.read_text()), sources()
    same = {m for m in MODULES if values["sources"].get(m) == now[m]}
    return {name: found for name, found in values["mutants"].items() if name.partition(":")[0] in same}


def save(known: dict[str, str], tried: dict[str, list[str]]) -> None:
    """Keep the results for the next run."""
    RESULTS.write_text(json.dumps({"sources": sources(), "mutants": known}, indent=0, sort_keys=True) + "\n")
    TRIED.write_text(json.dumps(tried))


def write(known: dict[str, str]) -> None:
    """Write the page from all results of mutants that still exist."""
    equivalent = json.loads(EQUIVALENT.read_text()) if EQUIVALENT.exists() else {}
    lines = [
        "| module | mutants | equivalent, listed | run | killed | of these by the time limit | survived | score |",
        "|---|---|---|---|---|---|---|---|",
    ]
    survivors, listed = [], []
    for module in MODULES:
        names = [n for n, _, _ in mutants(module)]
        same = [n for n in names if n in equivalent]
        found = {n: known[n] for n in names if n in known and n not in equivalent}
        killed = sum(r != "survived" for r in found.values())
        hung = sum(r == "timeout" for r in found.values())
        alive = [n for n, r in found.items() if r == "survived"]
        share = f"{100 * killed / (killed + len(alive)):.1f} %" if killed else "not run"
        row = (module, len(names), len(same), len(found), killed, hung, len(alive), share)
        lines.append(f"| {' | '.join(map(str, row))} |")
        survivors += alive
        listed += same
    digest = hashlib.sha256(b"".join((CORE / f"{m}.py").read_bytes() for m in MODULES)).hexdigest()[:12]
    text = [
        "# Mutation score of the guard's core",
        "",
        f"`make mutation`: tests/test_guard.py against one change at a time; sources {digest}. The score leaves out",
        "the mutants listed as equivalent. A mutant that takes several times the processor time of its tests hangs,",
        "and counts as killed.",
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
