"""What training says: progress bar, JSONL and TensorBoard always, wandb on request; a broken logger ends nothing."""

from __future__ import annotations

import json
import math
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dita.config import TrainConfig, to_dict

WINDOW = 200  # steps that a spike is compared with
SPIKE = 8.0  # robust standard deviations of the logarithm of the loss
LEAST = 20  # steps before anything is called a spike


class Log:
    """One line per log_every steps, written by rank 0."""

    def __init__(self, run: Path, start: int, config: TrainConfig, show: bool = True) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.config, self.run = config, run
        _forget_after(run / "log.jsonl", start)
        self.file = (run / "log.jsonl").open("a")
        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=start)
        self.wandb = self._try("wandb", lambda: _start_wandb(config)) if config.wandb else None
        self.bar = Progress(
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[line]}"),
            disable=not show,
        )
        self.task = self.bar.add_task("train", total=config.steps, completed=start, line="")
        self.sums: dict[str, float] = {}
        self.counts: dict[str, float] = {}

    def __enter__(self) -> Log:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()
        for close in (self.board.close, self.file.close, self.wandb.finish if self.wandb else None):
            if close is not None:
                self._try("closing a log", close)

    def write(self, step: int, metrics: Mapping[str, float], groups: Mapping[str, tuple[float, float]]) -> None:
        """Take in a step.

        metrics: averaged over the steps of a line. groups: (sum, weight) of what is a mean over samples, not steps.
        """
        for key, value in metrics.items():
            self._add(key, value, 1.0)
        for key, (value, weight) in groups.items():
            self._add(key, value, weight)
        self.bar.advance(self.task)
        if step % self.config.log_every and step != self.config.steps:
            return
        mean = {key: self.sums[key] / self.counts[key] for key in self.sums if self.counts[key]}
        mean["lr"] = metrics["lr"]
        spent = mean["data_s"] + mean["update_s"]
        mean |= {"samples_per_s": self.config.batch_size / spent, "data_share": mean["data_s"] / spent}
        self.sums, self.counts = {}, {}
        self._try("log.jsonl", lambda: self._line({"step": step, "loss_exact": metrics["loss"], **mean}))
        self._send("train", step, mean)
        speed = f"{mean['samples_per_s']:.0f} samples/s  data {mean['data_share']:.0%}"
        self.bar.update(self.task, line=f"loss {mean['loss']:.4f}  lr {mean['lr']:.1e}  {speed}")

    def note(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Send other numbers, as those of a validation, to TensorBoard and wandb."""
        self._send(kind, step, values)

    def _add(self, key: str, value: float, weight: float) -> None:
        self.sums[key] = self.sums.get(key, 0.0) + value
        self.counts[key] = self.counts.get(key, 0.0) + weight

    def _line(self, values: Mapping[str, Any]) -> None:
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()

    def _send(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        named = {f"{kind}/{key}": value for key, value in values.items()}
        self._try("TensorBoard", lambda: [self.board.add_scalar(k, v, step) for k, v in named.items()])
        if self.wandb is not None:
            client = self.wandb
            self._try("wandb", lambda: client.log(named, step=step))

    def _try(self, what: str, do: Callable[[], Any]) -> Any:
        """Do it or say why not: no number is worth a run."""
        try:
            return do()
        except Exception as e:
            warn(f"{what} does not work ({type(e).__name__}: {e}); training goes on without it")
            return None


def warn(text: str) -> None:
    """Say something loudly, without stopping."""
    print(f"dita train: WARNING: {text}", file=sys.stderr, flush=True)


class SpikeWatch:
    """Tells a loss far above the recent ones: a robust z-score, which spikes themselves do not move."""

    def __init__(self, recent: Iterable[Sequence[Any]] = ()) -> None:
        """Begin with the recent (step, loss) of a run that is continued."""
        self.recent: deque[tuple[int, float]] = deque(((step, loss) for step, loss in recent), WINDOW)

    def look(self, step: int, loss: float) -> float | None:
        """Return the z-score of log(loss) if it is a spike; else None."""
        values = [math.log(max(v, 1e-12)) for _, v in self.recent]
        self.recent.append((step, loss))
        if len(values) < LEAST:
            return None
        middle = median(values)
        spread = 1.4826 * median(abs(v - middle) for v in values)  # of a normal distribution: its standard deviation
        z = (math.log(max(loss, 1e-12)) - middle) / max(spread, 0.05)
        return z if z > SPIKE else None


def _start_wandb(config: TrainConfig) -> Any:
    import wandb  # pyright: ignore[reportMissingImports]

    return wandb.init(project=config.wandb, name=Path(config.run).name, config=to_dict(config), resume="allow")


def _forget_after(log: Path, step: int) -> None:
    """Drop the lines of steps that will be taken again."""
    if log.exists():
        lines = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
        log.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))
