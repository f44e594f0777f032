"""What a run trains on: stores opened, their episodes chosen and split, windows mixed, the contract fitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dita.config import TrainConfig
from dita.datasets.dataset import WindowDataset, iter_low_dim, shots
from dita.datasets.filters import kept
from dita.datasets.mixture import MixtureSampler, check_rates
from dita.datasets.store import Store, StoreError
from dita.datasets.windows import strides
from dita.distributed import Ranks
from dita.normalize import fit
from dita.preprocess import Contract, make_contract
from dita.relative import relative_chunks
from dita.types import EmbodimentSpec, NormStats
from dita.validate import held_out

INIT, NOISE, AUGMENT, DATA, SPLIT = range(5)  # purposes of random numbers


@dataclass(frozen=True)
class Data:
    """What a run trains on, and what it is kept away from."""

    stores: Sequence[Store]
    episodes: Sequence[Sequence[int]]  # trained on, per store
    held_out: Sequence[Sequence[int]]  # validated on
    datasets: Sequence[WindowDataset]
    sampler: MixtureSampler

    def sources(self, batch: int, batch_size: int) -> np.ndarray:
        """Return which store each sample of a global batch comes from."""
        return np.array([d for d, _ in self.sampler.sample(batch, batch_size)])

    def name(self, batch: int, batch_size: int, row: int) -> dict[str, Any]:
        """Name a sample of a global batch for people."""
        dataset, window = self.sampler.sample(batch, batch_size)[row]
        episode, frame = self.datasets[dataset].locate(window)
        store = self.stores[dataset]
        return {"row": row, "store": str(store.path), "episode": episode, "frame": frame,
                "source": store.episodes[episode].source}  # fmt: skip

    def why(self, batch: int, batch_size: int, row: int) -> str:
        """Read a sample again and return what is wrong with it."""
        dataset, window = self.sampler.sample(batch, batch_size)[row]
        try:
            self.datasets[dataset][window]
        except StoreError as e:
            return str(e)
        place = ", ".join(f"{key} {value}" for key, value in self.name(batch, batch_size, row).items())
        return f"{place}: could not be read, and then it could: look at the storage of the nodes"


def open_data(config: TrainConfig) -> Data:
    """Open the stores of a config, choose and split their episodes, and mix them."""
    stores = [Store(s.path) for s in config.data.stores]
    chosen = [chosen_episodes(store, s.filter, config) for store, s in zip(stores, config.data.stores, strict=True)]
    seed = seed_of(config.seed, SPLIT)
    split = [held_out(episodes, config.validation.episodes, seed) for episodes in chosen]
    episodes = [[e for e in every if e not in away] for every, away in zip(chosen, split, strict=True)]
    datasets = [windows(store, config, e) for store, e in zip(stores, episodes, strict=True)]
    weights = [s.weight for s in config.data.stores]
    sampler = MixtureSampler([len(d) for d in datasets], weights, seed_of(config.seed, DATA, 0))
    return Data(stores, episodes, split, datasets, sampler)


def windows(store: Store, config: TrainConfig, episodes: Sequence[int]) -> WindowDataset:
    """Cut the windows of some episodes as the policy takes them."""
    return WindowDataset(
        store,
        n_obs_steps=config.policy.n_obs_steps,
        chunk_size=config.policy.chunk_size,
        past_action_slots=config.policy.past_action_slots,
        pad_end=config.data.pad_end,
        cache=config.data.cache,
        episodes=episodes,
        keep_damaged=config.data.quarantine > 0,
    )


def chosen_episodes(store: Store, filter: str | None, config: TrainConfig) -> list[int]:
    """Return the episodes of a store that a filter keeps, of those the shots."""
    among = kept(store, filter)
    return list(among if config.data.shots is None else shots(store, config.data.shots, config.seed, among))


def rows_of(config: TrainConfig, ranks: Ranks) -> tuple[int, int]:
    """Return how many windows of a global batch are a rank's, and how many go through the network at once.

    Raises:
        ValueError: the batch does not divide.
    """
    if config.batch_size % ranks.world:
        raise ValueError(f"batch_size {config.batch_size} is global and must divide by {ranks.world} processes")
    share = config.batch_size // ranks.world
    micro = config.microbatch_size or share
    if share % micro:
        raise ValueError(
            f"batch_size {config.batch_size} over {ranks.world} processes is {share} windows each, which do not divide "
            f"by microbatch_size {micro}"
        )
    return share, micro


def build_contract(config: TrainConfig, stores: Sequence[Store], episodes: Sequence[Sequence[int]]) -> Contract:
    """Pool the statistics of all stores of an embodiment; two stores must agree on what the embodiment is."""
    specs = {store.spec.name: store.spec for store in stores}
    for store in stores:
        if store.spec != specs[store.spec.name]:
            raise ValueError(
                f"{store.path}: embodiment {store.spec.name!r} differs from another store's; rename one of them"
            )
    check_rates(list(specs.values()), told=config.policy.embodiment_token)
    stats: list[NormStats] = []
    for spec in specs.values():
        parts = [(s, e) for s, e in zip(stores, episodes, strict=True) if s.spec.name == spec.name]
        pairs = (pair for store, chosen in parts for pair in iter_low_dim(store, chosen))
        if config.preprocess.actions == "relative":
            pairs = ((state, _relative(state, action, spec, config)) for state, action in pairs)
        stats.append(fit(spec, pairs))
    return make_contract(config.preprocess, config.policy, list(specs.values()), stats)


def _relative(state: np.ndarray, action: np.ndarray, spec: EmbodimentSpec, config: TrainConfig) -> np.ndarray:
    rows = range(-config.policy.past_action_slots, config.policy.chunk_size)
    return relative_chunks(state, action, spec, rows, strides(spec)[1])


def seed_of(*numbers: int) -> int:
    """Mix whole numbers (a seed, a purpose, a place) into one seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
