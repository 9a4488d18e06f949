"""Held-out text that is scored while a run trains: the best step so far, and when to stop."""

import dataclasses
import functools
import hashlib
import json
import logging
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from flexmoe_jax.config import RunConfig
from flexmoe_jax.data.corpus import HELDOUT, TRAIN, survey
from flexmoe_jax.data.records import Fields
from flexmoe_jax.data.sources import Document, read_corpus, read_documents
from flexmoe_jax.data.store import kind_of
from flexmoe_jax.errors import ConfigError, DataError
from flexmoe_jax.evaluate.perplexity import first_texts, half_window, heldout_texts, score
from flexmoe_jax.model.precision import EXACT
from flexmoe_jax.model.products import as_weight
from flexmoe_jax.parallel.stacked import STACKED
from flexmoe_jax.params import FFN_WEIGHTS, factors
from flexmoe_jax.training.start import Start
from flexmoe_jax.training.step import decoder_of
from flexmoe_jax.tree import PUBLIC, Params, combine

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Progress:
    """What the validations of a run found: kept in its checkpoints.

    `step` is the number of steps after which the own text had its fewest `bits_per_byte`, None before the first
    validation; `waited` are the validations since. `texts` is the digest of the texts that these figures are of.
    """

    texts: str
    step: int | None = None
    bits_per_byte: float = 0.0
    waited: int = 0

    def add(self, step: int, bits_per_byte: float) -> bool:
        """Takes the validation after `step` steps; whether it is the best so far. One that is not finite never is."""
        best = math.isfinite(bits_per_byte) and (self.step is None or bits_per_byte < self.bits_per_byte)
        if best:
            self.step, self.bits_per_byte = step, bits_per_byte
        self.waited = 0 if best else self.waited + 1
        return best


class Validation:
    """The held-out texts of a run, `own` and `public`, and what their scores said so far.

    Own text is `config.validation`, or the share `config.holdout` of the run's own documents, or the files of
    `config.data` that are named for held-out text; public text likewise, without the share. Without own text nothing is
    scored, and the log says so. ConfigError if the run needs scores and has no such text, DataError for text that
    cannot be scored.
    """

    def __init__(self, run: RunConfig, initial: Start, mesh: Mesh):
        self._run, self._initial, self._mesh = run, initial, mesh
        self.texts = _texts(run)
        if not self.texts and (run.publish == "best" or run.patience is not None):
            key = "publish is 'best'" if run.publish == "best" else f"patience is {run.patience}"
            raise ConfigError(
                f"config.{key}, and no held-out text of the owner is scored (config.eval_every is {run.eval_every})",
                "give held-out text: config.validation, files named for it in config.data, or config.holdout",
            )
        digest = hashlib.sha256(json.dumps(self.texts, sort_keys=True).encode()).hexdigest()
        self.progress = Progress(digest)

    def resume(self, saved: dict[str, Any] | None) -> None:
        """Takes up the progress of a checkpoint; figures of other texts are left, and the log says so."""
        if saved is None or not self.texts:
            return
        if saved["texts"] == self.progress.texts:
            self.progress = Progress(**saved)
        else:
            log.info("the held-out text is not that of the steps before: the search for the best step starts again")

    def forget(self) -> None:
        """Starts the search for the best step again."""
        self.progress = Progress(self.progress.texts)

    @property
    def exhausted(self) -> bool:
        """Whether `config.patience` validations in a row found nothing better."""
        return self._run.patience is not None and self.progress.waited >= self._run.patience

    def due(self, steps: int) -> bool:
        """Whether there is a validation after `steps` steps: every `config.eval_every`, and after the last."""
        every = self._run.eval_every
        return every is not None and bool(self.texts) and (steps % every == 0 or steps == self._run.steps)

    def measure(self, params: Params) -> dict[str, float]:
        """{source: bits per byte} of the whole tree `params` on the mesh, as `flexmoe eval` scores them."""
        length, tokenizer = self._run.seq_len, self._initial.tokenizer
        decoder = decoder_of(self._initial.model, self._run, STACKED in params["experts"])
        how = {"seq_len": length, "stride": half_window(length)}
        return {
            name: score(decoder, params, texts, tokenizer, self._mesh, **how).bits_per_byte
            for name, texts in self.texts.items()
        }


@functools.partial(jax.jit, static_argnums=2)
def distance(trainable: Params, frozen: Params, owner: str) -> jax.Array:
    """|W - W_public| / |W_public| over the owner's feed-forward matrices together; float32."""
    experts = combine(trainable, frozen)["experts"]
    own, public = experts[owner], experts[PUBLIC]
    squares = lambda leaf: jnp.sum(jnp.square(as_weight(leaf, jnp.float32)))  # noqa: E731

    def apart(name: str) -> jax.Array:
        if name in own:
            return squares(as_weight(own[name], jnp.float32) - as_weight(public[name], jnp.float32))
        a_LIr, b_LrO = (own[leaf].astype(jnp.float32) for leaf in factors(name))
        ours_Lrr = jnp.einsum("lir,lis->lrs", a_LIr, a_LIr, precision=EXACT)
        return (ours_Lrr * jnp.einsum("lro,lso->lrs", b_LrO, b_LrO, precision=EXACT)).sum()  # |A B|^2, without A B

    return jnp.sqrt(sum(map(apart, FFN_WEIGHTS)) / sum(squares(public[name]) for name in FFN_WEIGHTS))


def held_out(document: Document, share: float) -> bool:
    """Whether `document` is in the share of groups that is never trained on; a hash of its group decides."""
    digest = hashlib.sha256(b"holdout\n" + document.group.encode()).digest()
    return int.from_bytes(digest[:8]) < share * 2**64


def _texts(run: RunConfig) -> dict[str, list[str]]:
    """{source: held-out texts}, own text first; {} without own text."""
    if run.eval_every is None:
        return {}
    fields = Fields(run.text_field, run.id_field)
    found: dict[str, list[str]] = {}
    if run.holdout:
        paths = _paths(run, "data")
        found["own"] = []
        for path in paths:
            kept = (d for d in read_documents(path, fields=fields) if held_out(d, run.holdout))
            found["own"] += first_texts(kept, run.eval_bytes // len(paths))
        if not found["own"]:
            what = f"config.holdout is {run.holdout}, and no document of {run.data} falls in that share"
            raise DataError(what, "raise it, or give config.validation")
    elif not (texts := _heldout(run.validation, _paths(run, "data"), fields, run.eval_bytes)):
        remedy = "set config.validation, or config.holdout to a share of the documents"
        log.info(f"nothing is validated: {run.data} has no files named for held-out text; {remedy}")
        return {}
    else:
        found["own"] = texts
    if texts := _heldout(run.public_validation, _paths(run, "public_data"), Fields(), run.eval_bytes):
        found["public"] = texts
    elif run.public_data:
        log.info(f"public text is not validated: {run.public_data} has no files named for held-out text")
    return found


def _paths(run: RunConfig, key: str) -> list[pathlib.Path]:
    """The sources of `config.key`."""
    return [pathlib.Path(source.path) for source in run.sources.values() if source.key == key]


def _heldout(given: str | pathlib.Path | None, sources: list[pathlib.Path], fields: Fields, size: int) -> list[str]:
    """Texts of `given`: those marked as held-out, or all where none is; without it, those of files of the `sources`
    that are named for held-out text, as many bytes of each source. No other file is read: it may be large."""
    if given is not None:
        marked = any(True for _, named in survey(given).files if named == HELDOUT)
        return heldout_texts(pathlib.Path(given), size, HELDOUT if marked else TRAIN, fields)
    texts: list[str] = []
    for path in sources:
        if kind_of(path) == "documents":
            corpus = survey(path)
            named = tuple((file, split) for file, split in corpus.files if split == HELDOUT)
            documents = read_corpus(dataclasses.replace(corpus, files=named), HELDOUT, fields)
            try:
                texts += first_texts(documents if named else (), size // len(sources))
            except DataError as error:
                log.info(f"held-out text of {path} is not validated: {error.what}")
    return texts
