"""`dita train --dry-run`: what a run would cost and see, before a cluster is asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from dita.batch import Batch
from dita.config import TrainConfig
from dita.cost import device_peak, training_cost
from dita.distributed import Ranks
from dita.preprocess import Preprocessor, make_contract
from dita.train_data import Data, build_contract, open_data, rows_of

GUESSED_MFU = 0.4  # of a GPU that computes all the time; measure with a short run
SHOWN = 6  # windows of the picture


def dry_run(config: TrainConfig, world: int) -> dict[str, float]:
    """Print parameters, memory per rank, speed, steps per epoch, and draw the first batch; return the numbers.

    Args:
        config: as for `train`; without stores what depends on them is left out.
        world: processes of the job.

    Raises:
        ValueError: no processes, the batch does not divide, or a store does not fit.
    """
    if world < 1:
        raise ValueError(f"--ranks {world}: a job has one process or more")
    share, micro = rows_of(config, Ranks(0, world))
    data = open_data(replace(config, data=replace(config.data, cache="mmap"))) if config.data.stores else None
    contract = (
        build_contract(config, data.stores, data.episodes)
        if data is not None
        else make_contract(config.preprocess, config.policy, [], [])
    )
    cost = training_cost(config, contract, micro)
    memory = cost.memory(world if config.parallel == "fsdp" else 1, share // micro)
    here = config.device if config.device == "cpu" or torch.cuda.is_available() else "cpu"
    peak = device_peak(torch.device(here), config)
    flops = cost.flops_per_window * config.batch_size
    found = {
        "parameters": cost.parameters,
        "trainable": cost.trainable,
        "gib_per_rank": sum(memory.values()) / 2**30,
        "tflops_per_step": flops / 1e12,
        "samples_per_s": GUESSED_MFU * peak * world / cost.flops_per_window,
    }
    lines = {
        "processes": f"{world}, {config.parallel}",
        "batch": f"{config.batch_size} = {world} x {share // micro} x {micro} windows, "
                 f"{config.noise_samples_per_context} noise samples each",
        "parameters": f"{cost.parameters:,}, {cost.trainable:,} of them trained",
        **{f"memory: {name}": f"{size / 2**30:.2f} GiB" for name, size in memory.items()},
        "memory per process": f"{found['gib_per_rank']:.1f} GiB, from above: fused attention keeps less",
        "operations": f"{found['tflops_per_step']:.3g} TFLOP a step",
        "speed, a guess": f"{found['samples_per_s']:.3g} samples/s at {GUESSED_MFU:.0%} of {peak / 1e12:.3g} TFLOP/s "
                          f"{'given' if config.peak_tflops else f'measured on this {here}'}",
    }  # fmt: skip
    if data is not None:
        count = sum(len(d) for d in data.datasets)
        found |= {"windows": count, "steps_per_epoch": count / config.batch_size}
        lines["data"] = f"{count:,} windows of {len(data.stores)} stores, without what is held out"
        lines["steps per epoch"] = f"{found['steps_per_epoch']:.1f}; {config.steps} steps are " \
            f"{config.steps / found['steps_per_epoch']:.1f} epochs"  # fmt: skip
        out = Path(config.run) / "first_batch.png"
        draw_batch(_first_windows(config, data, Preprocessor(contract)), out)
        lines["first batch"] = str(out)
    table = Table(title=f"dry run: {config.policy.name}", show_header=False)
    for name, text in lines.items():
        table.add_row(name, text)
    Console().print(table)
    return found


def _first_windows(config: TrainConfig, data: Data, preprocessor: Preprocessor) -> Batch:
    chosen = data.sampler.sample(0, config.batch_size)[:SHOWN]
    return preprocessor.batch([data.datasets[d][w] for d, w in chosen])


def draw_batch(batch: Batch, out: Path) -> None:
    """Draw windows as the network sees them: a row each, its frames by camera, and its normalised actions."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    images = batch.observation.images.flatten(1, 2)  # [b tv 3 h w]
    valid = batch.observation.image_valid.flatten(1)  # [b tv]
    rows, columns = images.shape[:2]
    figure, axes = pyplot.subplots(rows, columns + 1, figsize=(2 * columns + 4, 2 * rows), squeeze=False,
                                   width_ratios=[1] * columns + [2])  # fmt: skip
    for i in range(rows):
        for j in range(columns):
            axes[i, j].imshow(images[i, j].permute(1, 2, 0).numpy())
            axes[i, j].set_axis_off()
            if not valid[i, j]:
                axes[i, j].set_title("masked", fontsize=8)
        dims = batch.action_valid[i].any(0)
        shown = torch.where(batch.action_valid[i], batch.actions[i], torch.nan)[:, dims]
        axes[i, columns].plot(shown.numpy(), linewidth=1)
        axes[i, columns].set_ylim(-1.2, 1.2)
    axes[0, columns].set_title("actions, normalised, by step", fontsize=8)
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=80)
    pyplot.close(figure)
