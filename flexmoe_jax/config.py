"""The configuration of a training run.

This module does not import JAX, so that the command line can check a configuration before it starts anything.
"""

import dataclasses
import enum
import os
import pathlib
import re
from typing import Annotated, ClassVar

from flexmoe_jax.errors import ConfigError
from flexmoe_jax.model_config import ModelConfig
from flexmoe_jax.optimizer_config import OptimizerConfig
from flexmoe_jax.ranges import (
    COUNT,
    NOT_POSITIVE,
    Count,
    NotNegative,
    Positive,
    Seed,
    ShareBelowOne,
    check_numbers,
)
from flexmoe_jax.source_config import Source, read_mixture
from flexmoe_jax.tree import PUBLIC, check_owner_name


class Kind(enum.Enum):
    """What a run trains; the values complete "this run trains ..."."""

    PUBLIC = "a new public model"
    JOINT = "all experts of an existing model together"
    EXPERT = "a new expert beside the public one"
    CONTINUED = "an owner's existing expert further"


# The keys that each kind of run needs, and those that it must not have.
_NEEDS = {
    Kind.PUBLIC: ("model", "domain_vector"),
    Kind.JOINT: ("public",),
    Kind.EXPERT: ("public", "domain_vector"),
    Kind.CONTINUED: ("public", "expert"),
}
_FORBIDS = {
    Kind.PUBLIC: ("expert", "router_contrast", "bias_init", "rank", "frozen_dtype"),
    Kind.JOINT: ("model", "domain_vector", "expert", "router_contrast", "bias_init", "rank", "frozen_dtype"),
    Kind.EXPERT: (),
    Kind.CONTINUED: ("domain_vector", "bias_init", "rank"),
}
_REMEDIES = {
    "model": "a public run defines a model's shape, or trains the model in config.public further: set one of them",
    "public": "an expert is trained beside a public model: set config.public to its directory",
    "domain_vector": "a new router row starts from a domain vector: make one with `flexmoe embed DATA --out FILE`; "
    "a run that trains an existing model or package further keeps the rows it has",
    "expert": "set config.expert to the owner's package; a public run has none",
    "router_contrast": "only an owner's expert trained beside the public one has odds to train: set it to 0",
    "router": "its rows tell a new expert's text from public text: leave out config.expert and config.coordinate, and "
    "give config.public_data with config.public_fraction",
    "rank": "only a new expert beside the public one has low-rank changes of its matrices: set it to none",
    "frozen_dtype": "only an owner's run has frozen matrices, those of the public model: set it to none",
    "bias_init": "only a new expert beside the public one has an initial bias to choose: set it to 0",
}
_CHOICES = {
    "compute_dtype": ("float32", "bfloat16"),
    "frozen_dtype": (None, "int8", "nf4"),
    "token_dtype": (None, "uint16", "uint32"),
    "publish": ("last", "best"),
    "router": ("trained", "generative"),
}
SIDES = {"own": "data", "public": "public_data"}  # {name in run.json: key of the configuration}
_PATHS = (
    *("data", "out", "public", "public_data", "domain_vector", "expert", "tokenizer"),
    *("validation", "public_validation"),
)
TRACKERS = ("tensorboard", "wandb")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One training run: a public model (`owner="public"`) or one owner's expert (any other name).

    What it trains (`kind`) follows from `owner`, `public` and `expert`. A key that is off is None; a path becomes str.
    ConfigError for values that are impossible or do not belong together.
    """

    LATER: ClassVar = ("text_field", "id_field", "token_dtype", "bias_init", "holdout", "router", "frozen_dtype")

    owner: str
    """Whose parameters are trained: `public`, or a data owner's name (the expert's name in every merged model)."""

    data: str | pathlib.Path
    """The owner's training data: a folder of documents, a token store, or OLMo token files. Or several, each with its
    weight: `3 letters; 1 minutes` takes three rows of `letters` for each row of `minutes`."""

    out: str | pathlib.Path
    """The run directory: checkpoints, metrics, and at the end `model/` (public runs) or `package/` (owners' runs)."""

    steps: Count
    """Optimizer steps."""

    batch_size: Count
    """Sequences per optimizer step."""

    seq_len: Count
    """Tokens per sequence; at most `model.max_seq_len`."""

    model: ModelConfig | None = None
    """Shape of a new public model. An owner's run may state the shape that its public model must have."""

    public: str | pathlib.Path | None = None
    """Directory of the public model that an expert is trained beside, or of the model whose experts are all trained
    together."""

    public_data: str | pathlib.Path | None = None
    """Public documents to mix into an owner's batches, or several sources as in `data`; needs `public_fraction`."""

    public_fraction: ShareBelowOne = 0.0
    """Share of each batch's sequences that come from `public_data`. Public text teaches an expert to do no harm outside
    its domain; the quickstart uses a quarter."""

    domain_vector: str | pathlib.Path | None = None
    """File of the domain embedding that a new router row starts from (`flexmoe embed`; paper section 3.3)."""

    expert: str | pathlib.Path | None = None
    """An owner's package to train further, in the place of a new expert."""

    text_field: str = "text"
    """Field, or Parquet column, of the documents in `data` that holds the text."""

    id_field: str = "id"
    """Field, or Parquet column, of the documents in `data` that holds an identifier."""

    token_dtype: str | None = None
    """Dtype of OLMo token files, which do not record it: uint16 or uint32. None: uint16 where every id of the tokenizer
    fits, else uint32."""

    tokenizer: str | pathlib.Path = "cl100k:8192"
    """Tokenizer of a new public model: `cl100k:N` (the first N ranks of cl100k), `dolma2`, or a tokenizer.json.
    All other runs use the public model's."""

    optimizer: OptimizerConfig = OptimizerConfig()
    """See the keys of `optimizer`."""

    accumulation: Annotated[int | None, COUNT] = None
    """Equal microbatches that a step's batch is split into, to save memory. They change only rounding, and the
    load-balance loss, which is taken over a microbatch. None: on a CPU, where it is also faster, as many as make
    microbatches of about 1,024 tokens, else 1; 1 with `load_balance`. The run prints what it chose."""

    z_loss: NotNegative = 1e-5
    """Weight of the squared log-partition of the vocabulary logits, which keeps them small. The paper's."""

    router_z_loss: NotNegative = 1e-3
    """Weight of the squared log-partition of the router logits, mean over layers. The paper's."""

    router_contrast: NotNegative = 0.0
    """Weight of a loss that trains every layer's router to tell the owner's text from `public_data` (cross-entropy of
    its odds, which merging keeps). The quickstart uses 0.1; the paper has no such loss."""

    load_balance: NotNegative = 0.0
    """Weight of the loss that spreads tokens evenly over experts (Switch Transformers, arXiv 2101.03961), for models
    whose experts are trained together. The paper's owners use 0."""

    top_k: Annotated[int | None, COUNT] = None
    """Experts active per token in training; None: all."""

    router: str = "trained"
    """How a new expert's router rows and biases begin: `trained`, with the row of `domain_vector` and `bias_init`; or
    `generative`, with a linear discriminant between the owner's text and `public_data` in every layer, which tells them
    apart before the first step. Training goes on from there; a group of `optimizer.groups` can hold them."""

    rank: str | None = None
    """Rank of the expert's change of the public expert's matrices W: W + A B, of which A and B are trained and packed;
    `16`, or one for each matrix, as `w_gate=8,w_up=8,w_down=32` (one left out is whole). With `head=32` the expert also
    holds such a change of the output head and a bias for every token, which act by how much of a token the expert
    takes. None: whole matrices, and no change of the head."""

    bias_init: Annotated[float, NOT_POSITIVE] = 0.0
    """Initial router bias of a new expert in every layer, at most 0. Below 0 the expert starts with a smaller weight
    than the public one where their rows agree."""

    freeze: str | None = None
    """Regular expression of parameter paths (`trunk/.*`) to freeze in addition to those that the run always freezes."""

    coordinate: bool = True
    """Train an owner's expert beside the frozen public one. False trains it without the public one: the control that
    shows what coordination is worth, an ablation of the paper."""

    router_scale: Positive = 0.1
    """Initial L2 norm of the router rows of a new public model and of every expert beside it. At norm 1 (the paper's)
    the initial values drown what a short training learns; 0.1 is chosen by measurement."""

    mesh: str | None = None
    """How devices share the work, as `data=2,fsdp=4`; axes: data, fsdp, expert, tensor. None: all devices by fsdp."""

    compute_dtype: str = "float32"
    """Dtype of activations and of frozen matrices: float32, or bfloat16 on accelerators. Trained weights and moments
    are float32 in any case, and so is the arithmetic of norms, router and loss (see the guide, scaling)."""

    frozen_dtype: str | None = None
    """Dtype of the public model's matrices while an expert trains beside them: int8 or nf4, in blocks of 64 weights
    with a scale, at 1.06 or 0.56 bytes a weight. None: `compute_dtype`. What is trained and packed is not quantized."""

    remat: bool = False
    """Recompute each layer in the backward pass: activations take the memory of a layer's inputs, for a third more
    computation."""

    seed: Seed = 0
    """Seed of initial weights and of the order of data."""

    log_every: Count = 10
    """Steps between lines of `metrics.jsonl`; a line has the means of the steps since the line before."""

    validation: str | pathlib.Path | None = None
    """Held-out text of the owner, scored while the run trains. None: files of `data` that are named for held-out text
    (`heldout.jsonl`, `validation/`), or the share `holdout`."""

    holdout: ShareBelowOne = 0.0
    """Share of the documents in `data` that is not trained on, for validation; a hash of a document's group decides. 0:
    none is held out."""

    public_validation: str | pathlib.Path | None = None
    """Held-out public text, scored beside the owner's. None: files of `public_data` that are named for it."""

    eval_every: Annotated[int | None, COUNT] = 100
    """Steps between validations; there is one after the last step, too. None: no validation."""

    eval_bytes: Count = 50_000
    """UTF-8 bytes of each held-out text that a validation scores: the first documents."""

    patience: Annotated[int | None, COUNT] = None
    """Validations in a row without a better score of the own text after which the run ends. None: it does not end
    early."""

    publish: str = "last"
    """Weights of the product: those of the `last` step, or those that scored `best` on the own held-out text, which are
    saved when they are found and kept."""

    track: str | None = "tensorboard"
    """Where metrics go beside `metrics.jsonl`: `tensorboard` (files in the run directory), `wandb` (Weights & Biases,
    offline unless WANDB_MODE says otherwise; the extra `track`), or both, with a comma."""

    save_every: Annotated[int | None, COUNT] = 500
    """Steps between checkpoints: what a crash can cost at most. None, for short runs: only minutes and signals save."""

    save_minutes: NotNegative = 10.0
    """Minutes after which a checkpoint is saved even before `save_every` steps."""

    keep_checkpoints: Count = 2
    """Newest checkpoints kept; with fewer than 2 there is nothing to fall back to when one is damaged."""

    max_bad_steps: Count = 10
    """Steps in a row with a loss or gradient that is not finite (each is skipped) after which the run stops."""

    licence: str | None = None
    """License of the trained parameters, recorded in the package."""

    contact: str | None = None
    """Contact for questions about the trained parameters, recorded in the package."""

    @property
    def kind(self) -> Kind:
        """What this run trains."""
        if self.is_public:
            return Kind.PUBLIC if self.public is None else Kind.JOINT
        return Kind.EXPERT if self.expert is None else Kind.CONTINUED

    @property
    def is_public(self) -> bool:
        """Whether the whole model is trained, not one owner's expert."""
        return self.owner == PUBLIC

    @property
    def trackers(self) -> tuple[str, ...]:
        """The names in `track`."""
        return tuple(name.strip() for name in self.track.split(",")) if self.track else ()

    @property
    def public_sequences(self) -> int:
        """Sequences of each batch that come from `public_data`."""
        return round(self.public_fraction * self.batch_size)

    @property
    def sources(self) -> dict[str, Source]:
        """The sources of text: `own` and `public`; of a mixture, every folder by its name, as `own.letters`."""
        found: dict[str, Source] = {}
        for side, key in SIDES.items():
            if (value := getattr(self, key)) is not None:
                mixed = read_mixture(f"config.{key}", str(value))
                names = {f"{side}.{name}": Source(key, *part) for name, part in mixed.items()}
                found |= names if len(mixed) > 1 else {side: Source(key, str(value))}
        return found

    def __post_init__(self):
        if not self.owner:
            raise ConfigError("config.owner is empty", "add :OWNER to the experiment file, as in expert.py:news")
        for name in (name for name in _PATHS if getattr(self, name) is not None):
            object.__setattr__(self, name, os.fspath(getattr(self, name)))
        if not self.is_public:
            check_owner_name(self.owner)
        self._check_numbers()
        for name in _NEEDS[self.kind]:
            if getattr(self, name) is None:
                raise ConfigError(f"config.{name} is missing: this run trains {self.kind.value}", _REMEDIES[name])
        for name in _FORBIDS[self.kind]:
            if getattr(self, name):
                what = f"config.{name} is {getattr(self, name)!r}: this run trains {self.kind.value}"
                raise ConfigError(what, _REMEDIES[name])
        self._check_public_text()
        _ = self.sources  # refuses a mixture that cannot be read

    def _check_numbers(self) -> None:
        check_numbers(self, "config")
        if self.batch_size % (self.accumulation or 1):
            raise ConfigError(
                f"config.batch_size {self.batch_size} is not a multiple of config.accumulation {self.accumulation}",
                "microbatches are equal: change one of the two",
            )
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                words = " or ".join(repr(choice) for choice in known if choice)
                raise ConfigError(f"config.{name} is {getattr(self, name)!r}", f"use {words}")
        if unknown := [name for name in self.trackers if name not in TRACKERS]:
            raise ConfigError(f"config.track names {unknown[0]!r}", f"use one of: {', '.join(TRACKERS)}, or none")
        if self.holdout and self.validation is not None:
            what = f"config.holdout is {self.holdout} and config.validation {self.validation!r}"
            raise ConfigError(what, "set one of them: both say which text is held out")
        try:
            re.compile(self.freeze or "")
        except re.error as error:
            raise ConfigError(f"config.freeze {self.freeze!r} is not a pattern: {error}", "correct it") from error

    def _check_public_text(self) -> None:
        if (self.public_sequences > 0) != bool(self.public_data):
            raise ConfigError(
                f"config.public_fraction is {self.public_fraction} of {self.batch_size} sequences, public_data is "
                f"{self.public_data!r}",
                "give both, a fraction below 1 that makes at least one sequence, or neither",
            )
        if self.router_contrast and not self.public_sequences:
            raise ConfigError(
                f"config.router_contrast is {self.router_contrast} and config.public_fraction {self.public_fraction}",
                "set both or neither: the router learns to tell the owner's text from public text, and needs both",
            )
        for name in ("router_contrast", "rank"):
            if getattr(self, name) and not self.coordinate:
                what = f"config.{name} is {getattr(self, name)} and config.coordinate is False"
                raise ConfigError(what, _REMEDIES[name])
        if self.router == "generative" and not (self.kind is Kind.EXPERT and self.coordinate and self.public_sequences):
            what = f"config.router is 'generative', and the run trains {self.kind.value}"
            raise ConfigError(what, _REMEDIES["router"])
