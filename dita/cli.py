"""The command line, and the only import of Hydra: argparse owns verb, positionals and flags, compose the rest."""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from dita.config import CollectConfig, DemoConfig, EvalConfig, FinetuneConfig, LiveConfig, TrainConfig, from_dict
from dita.embodiment import config_folder

T = TypeVar("T")
Exist = Literal["error", "resume", "overwrite"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code.

    0; 1 for a refused input; 130 for an interrupt; 75 for a full disk; 85 for a job that was told to make room and has
    saved: give the same command again.
    """
    # OpenMP's default is to spin for milliseconds: next to any other process a step then takes six times as long
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    unknown = [a for a in rest if a.startswith("-")]
    if unknown or (rest and not args.hydra):
        parser.error(f"unknown argument {' '.join(unknown or rest)}; see dita {args.verb} --help")
    try:
        args.run(args, rest)
    except KeyboardInterrupt as e:
        print(f"dita {args.verb}: interrupted{f': {e}' if str(e) else ''}", file=sys.stderr)
        return 130
    except Exception as e:
        if args.debug:
            raise
        text = str(e.args[0]) if isinstance(e, KeyError) and e.args else str(e)
        kind = "" if isinstance(e, (ValueError, KeyError, OSError)) else f"{type(e).__name__}: "
        print(f"dita {args.verb}: {kind}{' '.join(text.split())}", file=sys.stderr)
        return getattr(e, "exit_code", 1)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all verbs."""
    parser = argparse.ArgumentParser(prog="dita", description="A generalist Transformer diffusion policy for robots.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, run: Callable[..., None], about: str, examples: str, hydra: bool) -> argparse.ArgumentParser:
        epilog = "examples:\n" + "\n".join(f"  {line.strip()}" for line in examples.strip().splitlines())
        if hydra:
            keys = "eval" if name == "compare" else name
            epilog += f"\n\nkey=value overrides: every key stands in {config_folder()}/{keys}.yaml"
        sub = verbs.add_parser(
            name, help=about, description=about, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.set_defaults(run=run, hydra=hydra)
        return sub

    demo = verb("demo", _demo, "The main job, end to end: collect, inspect, train, eval, live, report.", """
        dita demo
        dita demo out=outputs/demo_seed1 seed=1
        dita demo demo_multitask out=outputs/multitask""", True)  # fmt: skip
    demo.add_argument("recipe", nargs="?", default="demo", help="name of a demo recipe in configs/ (default: demo)")
    collect = verb("collect", _collect, "Collect scripted demonstrations in MuJoCo into a Zarr store.", """
        dita collect out=data/button.zarr env.tasks=[button-press-topdown-v3] episodes=60
        dita collect out=data/demo.zarr env.tasks=[button-press-topdown-v3,reach-v3] --resume""", True)  # fmt: skip
    _add_exist(collect)
    inspect = verb("inspect", _inspect, "Show what a store holds; check every byte; find faults; open it in Rerun.", """
        dita inspect data/demo.zarr
        dita inspect data/demo.zarr --verify --sheet frames.png
        dita inspect data/demo.zarr --json
        dita inspect data/test.zarr data/train.zarr --doctor --out outputs/doctor
        dita inspect data/demo.zarr --view --episodes 0 7
        dita inspect data/demo.zarr --view --view-out demo.rrd""", False)  # fmt: skip
    inspect.add_argument("store", nargs="+", help="several only with --doctor; of a duplicate the first one is kept")
    inspect.add_argument("--verify", action="store_true", help="read and check every byte")
    inspect.add_argument("--json", action="store_true", help="print JSON instead of a table")
    inspect.add_argument("--sheet", metavar="PNG", help="write a contact sheet of sampled frames")
    inspect.add_argument(
        "--doctor", action="store_true", help="find faults: writes doctor.json, doctor.html, filter.json"
    )
    inspect.add_argument("--out", metavar="FOLDER", help="of --doctor (default: outputs/doctor)")
    inspect.add_argument("--view", action="store_true", help="open episodes in Rerun: pip install 'dita[view]'")
    inspect.add_argument("--view-out", metavar="RRD", help="with --view: write a file instead of opening the viewer")
    inspect.add_argument("--episodes", type=int, nargs="+", metavar="N", help="of --view (default: the first 10)")
    convert = verb("convert", _convert, "Convert a dataset of another format into a Zarr store.", """
        dita convert robomimic lift/ph/image.hdf5 data/lift.zarr --instruction "lift the cube" --workers 4
        dita convert lerobot path/to/dataset data/so100.zarr --embodiment my_arm.yaml --codec jpeg
        dita convert rlds bridge/1.0.0 data/bridge.zarr --quarantine --resume
        dita convert aloha sim_transfer_cube/ data/cube.zarr --instruction "pass the cube to the other hand"
        dita convert diffusion_policy pusht.zarr out.zarr --embodiment pusht --instruction "push" -o 'state=state[0:2]'
        dita convert mcap bags/ data/bags.zarr --embodiment ur5e --ray auto""", False)  # fmt: skip
    _add_convert(convert)
    train = verb("train", _train, "Train a policy on one or more stores.", """
        dita train experiment=demo 'data.stores=[{path:data/demo.zarr,weight:1}]' run=outputs/train/demo
        dita train experiment=demo 'data.stores=[{path:data/demo.zarr,weight:1}]' run=outputs/train/demo --resume
        dita train diffusion.objective=behaviour_cloning data.stores=...
        dita train experiment=dita_base_4x8 --dry-run --ranks 32
        dita train --multirun hydra/launcher=submitit_slurm optim.lr=3e-4,1e-3 seed=0,1 data.stores=...
        torchrun --nproc-per-node 8 -m dita.cli train device=cuda parallel=fsdp data.stores=...""", True)  # fmt: skip
    _add_exist(train)
    _add_allow_drift(train)
    train.add_argument("--dry-run", action="store_true", help="print parameters, memory, speed; draw the first batch")
    train.add_argument("--ranks", type=int, metavar="N", help="of --dry-run: processes of the job (this one's)")
    about = "once for every combination of comma-separated values, through Hydra's launchers; continues what is there"
    train.add_argument("-m", "--multirun", action="store_true", help=about)
    finetune = verb("finetune", _finetune, "Finetune a checkpoint on ten demonstrations of a new robot.", """
        dita finetune outputs/train/demo data=data/my_arm.zarr shots=10 method=full
        dita finetune outputs/train/demo data=data/my_arm.zarr method=lora run=outputs/finetune/my_arm
        dita finetune outputs/train/demo data=data/my_arm.zarr shots=0 run=outputs/finetune/zero_shot
        dita finetune outputs/train/arms data=data/iiwa.zarr env=robosuite replay=false""", True)  # fmt: skip
    finetune.add_argument("checkpoint", help="run, checkpoint or policy folder")
    _add_exist(finetune)
    _add_allow_drift(finetune)
    evaluate = verb("eval", _eval, "Evaluate a checkpoint in simulation, with intervals and videos.", """
        dita eval outputs/train/demo out=outputs/eval/demo
        dita eval outputs/train/demo episodes=100 env.tasks=[drawer-open-v3] n_action_steps=4
        dita eval outputs/train/demo n_action_steps=1 temporal_ensembling=0.01 out=outputs/eval/ensembled
        dita eval outputs/train/demo perturb.camera_shift=0.03 perturb.light=0.5 out=outputs/eval/shifted
        dita eval outputs/train/demo perturb.instruction=paraphrased out=outputs/eval/paraphrased
        dita eval outputs/train/demo ray=auto ray_workers=8 episodes=500""", True)  # fmt: skip
    evaluate.add_argument("checkpoint", help="run, checkpoint or policy folder")
    _add_exist(evaluate)
    compare = verb("compare", _compare, "Compare two checkpoints, or two methods, on the same starts.", """
        dita compare outputs/eval/a outputs/eval/b
        dita compare outputs/train/a outputs/train/b out=outputs/compare episodes=150
        dita compare outputs/train/a outputs/train/b out=outputs/compare --maximum 200
        dita compare --methods eval/a0,eval/a1,eval/a2 eval/b0,eval/b1,eval/b2""", True)  # fmt: skip
    compare.add_argument("a", help="evaluation (the out= of dita eval) or checkpoint; with --methods, several by comma")
    compare.add_argument("b", help="likewise")
    compare.add_argument("--maximum", type=int, metavar="N", help="stop when decided, after N starts per task at most")
    compare.add_argument("--methods", action="store_true", help="two methods: evaluations of 3 or more training seeds")
    compare.add_argument("--smallest-effect", type=float, default=0.1, metavar="D",
                         help="below it methods are equivalent; declare it beforehand (0.1)")  # fmt: skip
    compare.add_argument("--json", metavar="FILE", help="write the result there")
    robot = verb("robot", _robot, "Run the live stack: twin, policy and guard over DDS.", """
        dita robot live checkpoint=outputs/train/demo out=outputs/live
        dita robot twin
        dita robot policy checkpoint=outputs/train/demo
        dita robot guard
        dita robot preflight checkpoint=outputs/train/demo preflight.data=[data/demo.zarr]
        dita robot record episodes=10 store=data/live.zarr
        dita robot teleop instruction='press the button'
        dita robot operator command=arm
        dita robot blackbox show=outputs/live/black_box/20261126T201500.250_R3-state-older""", True)  # fmt: skip
    roles = ["live", "record", "twin", "policy", "guard", "preflight", "recorder", "teleop", "operator", "blackbox"]
    robot.add_argument("role", choices=roles, help=" | ".join(roles), metavar="ROLE")
    robot.add_argument("--i-know", action="store_true", help="guard: may be armed though no preflight passed")
    _add_exist(robot)
    bench = verb("bench-policy", _bench_policy, "Time one control tick of a checkpoint: image in, chunk out.", """
        dita bench-policy outputs/train/demo
        dita bench-policy outputs/train/demo --rate 20 --ticks 200 --threads 2
        dita bench-policy outputs/official --device cuda --precision bf16 --json""", False)  # fmt: skip
    bench.add_argument("checkpoint", help="run, checkpoint or policy folder")
    bench.add_argument("--rate", type=float, default=10.0, metavar="HZ", help="count ticks longer than a period (10)")
    bench.add_argument("--ticks", type=int, default=50, help="measured ticks (50)")
    bench.add_argument("--steps", type=int, help="denoising steps (the checkpoint's)")
    bench.add_argument("--embodiment", help="which of the checkpoint's, if it knows several")
    bench.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (cpu)")
    bench.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    bench.add_argument("--path", choices=["auto", "graph", "compiled", "eager"], default="auto", help="(auto)")
    bench.add_argument("--threads", type=int, default=0, help="of torch (0: all cores)")
    bench.add_argument("--json", action="store_true", help="print JSON instead of a table")
    official = verb("import-official", _import_official, "Read the published Dita checkpoint into a policy folder.", """
        dita import-official dita.pth outputs/official
        dita import-official libero.pth outputs/libero --action-slots 11 --schedule cosine100
        dita import-official dita.pth outputs/official --text-encoder clip-vit-large-patch14 \\
            --embodiment my_robot.yaml --stats my_statistics.json""", False)  # fmt: skip
    official.add_argument("file", help=".pth (weights under the key 'parameter') or .safetensors")
    official.add_argument("out", help="policy folder to write")
    official.add_argument("--action-slots", type=int, default=16, help="16 in pretraining, 11 for LIBERO, CALVIN (16)")
    official.add_argument("--schedule", choices=["linear1000", "cosine100"], default="linear1000",
                          help="linear1000 in pretraining, cosine100 in finetuning (linear1000)")  # fmt: skip
    official.add_argument("--vision-heads", type=int, default=12, help="of the ViT, which no shape tells (12)")
    official.add_argument("--qformer-heads", type=int, help="(width / 64)")
    official.add_argument("--trunk-heads", type=int, help="(width / 64)")
    official.add_argument("--text-encoder", metavar="FOLDER", help="folder or hub id of CLIP ViT-L/14")
    official.add_argument("--embodiment", metavar="NAME|YAML", help="the robot it drives; needs --stats")
    official.add_argument("--stats", metavar="JSON", help="that robot's statistics")
    report = verb("report", _report, "Write one self-contained HTML page about a demo, or about evaluations.", """
        dita report outputs/demo
        dita report outputs/eval/drawer
        dita report outputs/eval/step600 outputs/eval/step200 outputs/eval/step400""", False)  # fmt: skip
    report.add_argument("folder", nargs="+", help="of a demo or of an evaluation, which gets the page; then others")
    env = verb("env", _env, "Say what this machine can do, and what to install for the rest.", """
        dita env
        dita env --setup""", False)  # fmt: skip
    env.add_argument("--setup", action="store_true", help="only make sure that OpenGL works, installing it when root")
    return parser


def compose(name: str, overrides: Sequence[str], cls: type[T]) -> T:
    """Compose configs/<name>.yaml with overrides into a frozen dataclass.

    Raises:
        ValueError: Hydra or the dataclass refuses a key or a value, in one line.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    if name == "finetune":
        overrides = [_finetune_override(word) for word in overrides]
    with _in_one_line(name), initialize_config_dir(str(config_folder().resolve()), version_base="1.3"):
        return _from_hydra(hydra_compose(name, overrides=list(overrides)), name, cls)


def _from_hydra(config: Any, name: str, cls: type[T]) -> T:
    from omegaconf import OmegaConf

    values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(values, dict)
    return from_dict(cls, {str(k): v for k, v in values.items()}, name)


@contextmanager
def _in_one_line(name: str) -> Iterator[None]:
    """Turn what Hydra says of a config into a ValueError of one line."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except (HydraException, OmegaConfBaseException) as e:
        if match := re.match(r"Could not override '([\w.]+)'", str(e)):
            raise ValueError(_unknown_key(name, match[1])) from None
        raise ValueError(f"{' '.join(str(e).split())} (keys: {config_folder()}/{name}.yaml)") from None


def _finetune_override(word: str) -> str:
    """Read data=STORE, which Hydra would take for a file of configs/data; refuse what comes from the checkpoint."""
    key, _, value = word.partition("=")
    if key.lstrip("+~").split(".")[0] in ("policy", "diffusion", "preprocess", "experiment"):
        raise ValueError(f"finetune: {key} cannot be set: policy, diffusion and preprocess are the checkpoint's")
    if key == "method" and value not in ("full", "lora", "head"):  # before it is looked up in learning_rates
        raise ValueError(f"finetune: method is full, lora or head, got {value!r}")
    return f"data.stores=[{{path:{json.dumps(value)},weight:1,filter:null}}]" if key == "data" else word


def _unknown_key(name: str, key: str) -> str:
    """Say which keys there are beside an unknown one."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from omegaconf import DictConfig, OmegaConf

    parent = key.rpartition(".")[0]
    with initialize_config_dir(str(config_folder().resolve()), version_base="1.3"):
        config = hydra_compose(name)
        while parent and not isinstance(OmegaConf.select(config, parent), DictConfig):
            parent = parent.rpartition(".")[0]
        known = [str(k) for k in (OmegaConf.select(config, parent) if parent else config)]
    close = difflib.get_close_matches(key.rpartition(".")[2], known, 1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"{name}: unknown key {key!r}{hint or ';'} there are{f' in {parent}' if parent else ''}: {', '.join(known)}"


def _add_exist(parser: argparse.ArgumentParser) -> None:
    group = parser.add_mutually_exclusive_group()
    for name, about in (("resume", "continue what is there"), ("overwrite", "delete what is there first")):
        group.add_argument(f"--{name}", dest="exist", action="store_const", const=name, default="error", help=about)


def _add_allow_drift(parser: argparse.ArgumentParser) -> None:
    about = "of --resume: this field may differ from the run that is continued; say it again for others"
    parser.add_argument("--allow-drift", metavar="FIELD", action="append", default=[], help=about)


def _add_convert(parser: argparse.ArgumentParser) -> None:
    from dita.datasets.convert import SOURCES

    parser.add_argument("source", choices=list(SOURCES), help=" | ".join(SOURCES), metavar="SOURCE")
    parser.add_argument("path", metavar="IN", type=Path, help="the data set's file or folder")
    parser.add_argument("out", metavar="OUT", type=Path, help="the store, by habit NAME.zarr")
    _add_exist(parser)
    about = "go on after a rejection: write a store of what is good, list the rest in OUT.rejected.jsonl"
    parser.add_argument("--quarantine", "--repair", action="store_true", help=about)
    parser.add_argument("--embodiment", metavar="NAME|FILE", help="what the robot is, where the format does not tell")
    parser.add_argument("--instruction", metavar="TEXT", help="what is done, where the format does not tell")
    parser.add_argument("--control-hz", metavar="HZ", type=float, help="the rate, where the format does not tell")
    parser.add_argument(
        "--workers", metavar="N", type=int, default=min(4, os.cpu_count() or 1), help="processes, or tasks"
    )
    parser.add_argument("--ray", metavar="ADDRESS", help="fan out over a Ray cluster: auto, local, host:port")
    parser.add_argument("--codec", choices=["raw", "jpeg"], default="raw", help="of the images; jpeg is lossy")
    parser.add_argument("--licence", metavar="SPDX", default="unknown", help="of the data, kept in the store")
    parser.add_argument(
        "-o",
        dest="extra",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="an option of the source; -o help= lists them",
    )


def _convert(args: argparse.Namespace, overrides: list[str]) -> None:
    from dita.datasets.convert.run import ConvertConfig, convert

    extra = {}
    for text in args.extra:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"-o takes KEY=VALUE, got {text!r}")
        extra[key] = value
    if args.workers < 0 or (args.control_hz is not None and not args.control_hz > 0):
        raise ValueError(f"--workers must be >= 0 and --control-hz > 0, got {args.workers} and {args.control_hz}")
    names = ("source", "path", "out", "embodiment", "instruction", "control_hz", "codec", "licence", "workers", "exist")
    convert(
        ConvertConfig(**{n: getattr(args, n) for n in names}, extra=extra, quarantine=args.quarantine, ray=args.ray)
    )


def _demo(args: argparse.Namespace, overrides: list[str]) -> None:
    recipe = args.recipe
    if "=" in recipe:  # an override took the place of the optional name
        recipe, overrides = "demo", [args.recipe, *overrides]
    config = compose(recipe, overrides, DemoConfig)
    from dita.demo import demo

    demo(config)


def _collect(args: argparse.Namespace, overrides: list[str]) -> None:
    config = compose("collect", overrides, CollectConfig)
    from dita.envs.collect import collect

    collect(config, exist=args.exist)


def _inspect(args: argparse.Namespace, overrides: list[str]) -> None:
    view = args.view or args.view_out is not None
    given = [f"--{name}" for name in ("verify", "sheet", "out", "episodes", "json") if getattr(args, name)]
    allowed = {"--out", "--json"} if args.doctor else {"--episodes"} if view else {"--verify", "--sheet", "--json"}
    if (args.doctor and view) or not allowed.issuperset(given):
        raise ValueError("--doctor takes --out and --json, --view takes --view-out and --episodes; run each by itself")
    if args.doctor:
        from dita.datasets.doctor import doctor_command

        return doctor_command(args.store, args.out or "outputs/doctor", args.json)
    if len(args.store) > 1:
        raise ValueError(f"got {len(args.store)} stores; --doctor takes several, everything else one at a time")
    if view:
        from dita.datasets.view import view_command

        return view_command(args.store[0], args.view_out, args.episodes)
    from dita.datasets.inspect import inspect_command

    inspect_command(args.store[0], args.verify, args.json, args.sheet)


def _train(args: argparse.Namespace, overrides: list[str]) -> None:
    if args.multirun:
        if args.dry_run or args.exist == "overwrite":
            raise ValueError("--multirun continues what is there; it takes neither --dry-run nor --overwrite")
        return _train_many(overrides, tuple(args.allow_drift) if args.exist == "resume" else ())
    if own := [word for word in overrides if word.startswith(("hydra/", "hydra."))]:
        raise ValueError(f"{own[0]} is a setting of Hydra's launchers: it goes with --multirun")
    config = compose("train", overrides, TrainConfig)
    if args.dry_run:
        from dita.distributed import ranks_of_environment
        from dita.dry_run import dry_run

        dry_run(config, ranks_of_environment()[1] if args.ranks is None else args.ranks)
        return
    from dita.train import train

    run = train(config, args.exist, allow_drift=args.allow_drift)
    print(f"trained: {run}")


def _train_many(overrides: list[str], allow_drift: tuple[str, ...]) -> None:
    """Train once for every combination of values, wherever Hydra's launcher has the jobs run; each in its own folder.

    Raises:
        ValueError: a config is refused, before anything is started; or one of the jobs failed in this process.
    """
    import hydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    with _in_one_line("train"):
        parsed = OverridesParser.create().parse_overrides(overrides)
    swept = {str(o.key_or_group): o for o in parsed if o.is_sweep_override()}
    fixed = [o.input_line or "" for o in parsed if not o.is_sweep_override() and not _of_hydra(o)]
    for word in [w for key, o in swept.items() for w in (f"{key}={v}" for v in o.sweep_string_iterator())] or fixed[:1]:
        compose("train", [*fixed, word], TrainConfig)  # what cannot be trained does not wait in a queue first

    def job(config: Any) -> None:
        _train_one(config, tuple(swept), allow_drift)

    here = Path.cwd()
    for setting, default in {"hydra.sweep.dir": "'${run}/hydra'", "hydra.launcher.max_num_timeout": "1000"}.items():
        wanted = "hydra.sweep" in setting or "hydra/launcher=submitit_slurm" in overrides
        if wanted and not any(word.lstrip("+").startswith(f"{setting}=") for word in overrides):
            overrides = [*overrides, f"{setting}={default}"]
    argv, sys.argv = sys.argv, ["dita train", "--multirun", *overrides]  # hydra.main takes them from nowhere else
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else it prints a job's error itself, and exits
    try:
        with _in_one_line("train"):
            hydra.main(str(config_folder().resolve()), "train", version_base="1.3")(job)()
    except SystemExit as e:
        raise e.__cause__ if isinstance(e.__cause__, Exception) else e from None
    finally:
        sys.argv = argv
        os.chdir(here)


def _train_one(config: Any, swept: tuple[str, ...], allow_drift: tuple[str, ...]) -> None:
    """Train as one job of several, continuing what is there: a job that is requeued is given the same command."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from dita.run_folder import Preempted
    from dita.train import train

    mine = OverridesParser.create().parse_overrides(list(HydraConfig.get().overrides.task))
    name = ",".join(o.input_line or "" for o in mine if str(o.key_or_group) in swept)
    values = _from_hydra(config, "train", TrainConfig)
    values = replace(values, run=str(Path(values.run, re.sub(r"[^\w.,=+-]", "_", name))))
    try:
        print(f"trained: {train(values, 'resume', allow_drift=allow_drift)}")
    except Exception as e:
        print(f"dita train: {values.run}: {' '.join(str(e).split())}", file=sys.stderr, flush=True)
        if not hasattr(e, "exit_code"):
            raise
        code = e.exit_code  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(e, Preempted) and e.signal == signal.SIGUSR2 and "SUBMITIT_EXECUTOR" in os.environ:
            signal.raise_signal(e.signal)  # submitit's handler is in its place again: rank 0 requeues the job and exits
            code = 0  # of the other ranks: an error would end rank 0 before it has
        raise SystemExit(code) from e  # the other jobs would end alike: they do not begin


def _of_hydra(override: Any) -> bool:
    return str(override.key_or_group).startswith(("hydra.", "hydra/"))


def _finetune(args: argparse.Namespace, overrides: list[str]) -> None:
    config = replace(compose("finetune", overrides, FinetuneConfig), checkpoint=args.checkpoint)
    from dita.finetune import finetune

    print(f"finetuned: {finetune(config, args.exist, args.allow_drift)}")


def _eval(args: argparse.Namespace, overrides: list[str]) -> None:
    config = compose("eval", overrides, EvalConfig)
    from dita.evaluate import evaluate
    from dita.policy.policy import DitaPolicy

    policy = DitaPolicy.from_pretrained(args.checkpoint, config.device)
    evaluate(policy, config, exist=args.exist, checkpoint=Path(args.checkpoint))


def _compare(args: argparse.Namespace, overrides: list[str]) -> None:
    config = compose("eval", overrides, EvalConfig)
    from dita.compare import compare, compare_groups

    if args.methods:
        methods = compare_groups(args.a.split(","), args.b.split(","), args.smallest_effect)
        if args.json:
            Path(args.json).write_text(json.dumps({**asdict(methods), "verdict": methods.verdict}, indent=1))
        return
    compare(args.a, args.b, config, maximum=args.maximum, out=args.json)


def _robot(args: argparse.Namespace, overrides: list[str]) -> None:
    config = compose("robot", overrides, LiveConfig)
    if args.i_know:
        config = replace(config, require_preflight=False)
    from robot_io.live import run_role

    run_role(args.role, config, args.exist)


def _bench_policy(args: argparse.Namespace, overrides: list[str]) -> None:
    import torch

    from dita.policy.bench import bench_policy, print_timing
    from dita.policy.policy import DitaPolicy

    torch.set_num_threads(args.threads or os.cpu_count() or 1)
    timing = bench_policy(
        DitaPolicy.from_pretrained(args.checkpoint, args.device, args.precision),
        embodiment=args.embodiment, num_inference_steps=args.steps, path=args.path, rate=args.rate, ticks=args.ticks,
    )  # fmt: skip
    print(json.dumps(asdict(timing))) if args.json else print_timing(timing)


def _import_official(args: argparse.Namespace, overrides: list[str]) -> None:
    from dita.policy.official import import_official, published_parameters

    policy = import_official(
        Path(args.file), Path(args.out), action_slots=args.action_slots, schedule=args.schedule,
        vision_heads=args.vision_heads, qformer_heads=args.qformer_heads, trunk_heads=args.trunk_heads,
        embodiment=args.embodiment, stats=Path(args.stats) if args.stats else None, text_encoder=args.text_encoder,
    )  # fmt: skip
    count = published_parameters(policy.model)
    print(f"imported: {args.out}, {count:,} parameters, {policy.model.action_slots} action slots, {args.schedule}")
    if not policy.specs:
        print("it knows no embodiment: finetune it, or import it with --embodiment and --stats to predict")


def _report(args: argparse.Namespace, overrides: list[str]) -> None:
    from dita.report import report

    print(json.dumps({"report": str(report(*(Path(folder) for folder in args.folder)))}))


def _env(args: argparse.Namespace, overrides: list[str]) -> None:
    if args.setup:
        from dita.envs.gl import ensure_backend

        print(f"OpenGL: {ensure_backend()}")
        return
    from dita.machine import print_machine

    print_machine()


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    sys.exit(main())
