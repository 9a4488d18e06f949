"""The sources of a run as mixtures: the owner's text, and public text beside it."""

import logging
from collections.abc import Mapping

import grain

from flexmoe_jax.config import SIDES, RunConfig
from flexmoe_jax.data.pipeline import Mixture, mix_batches
from flexmoe_jax.data.store import TokenStore

log = logging.getLogger(__name__)
# Up to four epochs, repeated text is worth about as much as new text (Muennighoff et al., arXiv 2305.16264).
MANY_EPOCHS = 4


def mixtures_of(run: RunConfig, stores: Mapping[str, TokenStore]) -> list[Mixture]:
    """The mixture of the run's own sources, then that of its public ones if it has any; `stores` are theirs by name.

    DataError for a source that does not fill a window.
    """
    rows = {"data": run.batch_size - run.public_sequences, "public_data": run.public_sequences}
    found = []
    for key in SIDES.values():
        sources = {name: source for name, source in run.sources.items() if source.key == key}
        if sources:
            weights = [source.weight for source in sources.values()]
            found.append(Mixture({name: stores[name] for name in sources}, weights, rows[key], run.seq_len))
    return found


def batches_of(run: RunConfig, mixtures: list[Mixture]) -> grain.MapDataset:
    """The run's batches: rows of its own sources, then `public_sequences` rows of public ones if it has any."""
    parts = [mixture.batches(run.seed) for mixture in mixtures]
    return mix_batches(*parts) if len(parts) == 2 else parts[0]


def log_sources(run: RunConfig, mixtures: list[Mixture]) -> None:
    """Logs the windows of every source, its share, and how many times the whole run reads it."""
    for mixture in mixtures:
        for (name, seen), weight in zip(mixture.seen(run.steps).items(), mixture.weights, strict=True):
            share = mixture.rows / run.batch_size * weight / sum(mixture.weights)
            windows = f"{mixture.windows[name]:,} windows of {run.seq_len} tokens"
            log.info(f"source {name}: {windows}, {share:.1%} of the rows, {seen.epochs:.2f} epochs in the run")
            if seen.epochs > MANY_EPOCHS:
                log.info(
                    f"source {name} is read {seen.epochs:.1f} times: over {MANY_EPOCHS} times, repeated text teaches "
                    f"little, and the model may learn it by heart; give more text, a smaller weight or fewer steps"
                )
