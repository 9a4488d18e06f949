"""The size of a study, and the ablations it may include."""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Annotated, Any

from flexmoe_jax.artifacts.model_dir import open_model
from flexmoe_jax.errors import ConfigError
from flexmoe_jax.evaluate.suites import find_tasks
from flexmoe_jax.flexmix.build import DOMAINS
from flexmoe_jax.model_config import ModelConfig
from flexmoe_jax.ranges import Count, Positive, Range, check_numbers
from flexmoe_jax.tree import PUBLIC


@dataclasses.dataclass(frozen=True)
class Experts:
    """How the owners' experts of a merged model are trained. The defaults are the method."""

    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Keys of an owner's `RunConfig` that differ from the method's."""

    random_rows: bool = False
    """Whether router rows start in random directions instead of those of the domain embeddings."""

    router_scale: float | None = None
    """L2 norm that router rows start with; None: the study's."""


_PAPER = {"public_data": None, "public_fraction": 0.0, "router_contrast": 0.0}
ABLATIONS = {
    "the paper's training": Experts(_PAPER, router_scale=1.0),
    "no coordination": Experts({**_PAPER, "coordinate": False, "router_z_loss": 0.0}),
    "random rows": Experts(random_rows=True),
    "no bias": Experts({"freeze": "experts/.*/bias"}),
    "no bias, random rows": Experts({"freeze": "experts/.*/bias"}, random_rows=True),
}


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """The size of a study (paper section 4): its owners, the steps of each kind of run, and the held-out text."""

    out: str
    """Folder of the study: the mix, runs, models and scores, and at the end `results.jsonl`."""

    domains: str
    """The owners' domains, comma-separated; each owner trains on one domain of the mini-FlexMix."""

    model: ModelConfig | None = None
    """Shape of the public model; None: that of the model given as `public`."""

    seeds: Count = 3
    """Repetitions with other seeds. All start from the same public model, as in the paper."""

    public_steps: Count = 300
    """Optimizer steps of the public model."""

    owner_steps: Count = 100
    """Optimizer steps of each owner's expert and of each dense expert."""

    mix_steps: Count = 100
    """Optimizer steps of the joint training of BTX on public text."""

    tune_steps: Count = 50
    """Optimizer steps of router tuning (paper section 3.3) and of the biases fitted on public text."""

    batch_size: Count = 8
    """Sequences per optimizer step, in every run."""

    seq_len: Count = 256
    """Tokens per sequence; at most `model.max_seq_len`."""

    compute_dtype: str = "float32"
    """Dtype of activations and of frozen matrices in every run: float32 or bfloat16."""

    top_k: Count = 2
    """Experts active per token in merged models; at most the number of owners and one."""

    embed_count: Count = 256
    """Documents that a domain embedding is the mean of."""

    classifier_documents: Count = 256
    """Documents per domain that the owners' classifiers and the classifier of prompt routing are trained on."""

    proxies: Count = 200
    """Public documents chosen as proxies of each owner's text."""

    proxies_of: Count = 2000
    """Public documents that the proxies are chosen from."""

    heldout_bytes: Count = 40_000
    """Held-out text per domain, in bytes."""

    document_chars: Count = 2000
    """Characters taken from the start of each held-out document: intervals need many documents, not long ones."""

    ablations: str = "all"
    """Names of ablations, comma-separated, or "all"."""

    systems: str = "all"
    """Which systems are trained: "all", or "method" for the method and the dense experts it is compared with."""

    leave_out: str | None = None
    """Regular expression of the whole names of systems that are left out; none that others are made from."""

    public: str | None = None
    """Directory of an existing public model, or `smollm2`: SmolLM2-135M out of its wheel. None trains one."""

    public_domains: str = ""
    """Further domains of the mini-FlexMix, comma-separated, whose text is public as a whole: no owner has it. Public
    text is then equal amounts of these and of `public`."""

    public_share: Annotated[float, Range(float, 0, 0.5)] = 0.08
    """Fraction of each owner's domain that belongs to the public text instead, from 0 to 0.5."""

    suites: str = ""
    """Groups or tasks of the paper (as of `flexmoe eval-suite`), comma-separated, that the public model, the method,
    the soup and the dense experts are scored on: accuracy, and bits per byte of the gold answers."""

    suite_items: Count = 25
    """Questions per task of the `suites`, at most."""

    router_scale: Positive = 0.1
    """L2 norm that router rows start with."""

    def __post_init__(self) -> None:
        check_numbers(self, "config")
        if self.systems not in ("all", "method"):
            raise ConfigError(f"config.systems is {self.systems!r}", "choose from: all, method")
        try:
            re.compile(self.leave_out or "")
        except re.error as error:
            raise ConfigError(f"config.leave_out {self.leave_out!r} is not a pattern: {error}", "correct it") from error
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"config.compute_dtype is {self.compute_dtype!r}", "use 'float32' or 'bfloat16'")
        if self.model is None and self.public is None:
            remedy = "a study trains a public model of the shape config.model, or starts from config.public: set one"
            raise ConfigError("config.model is not set, and config.public neither", remedy)
        for key, names in (("domains", self.owners), ("public_domains", self.public_names[1:])):
            for name in names:
                if name == PUBLIC or name not in DOMAINS:
                    raise ConfigError(f"config.{key} names {name!r}", f"choose from: {', '.join(DOMAINS[1:])}")
        for name in {*self.owners} & {*self.public_names}:
            what = f"config.public_domains names {name!r}, which config.domains gives to an owner"
            raise ConfigError(what, "leave it out of one of the two")
        if self.top_k > len(self.owners) + 1:
            raise ConfigError(
                f"config.top_k is {self.top_k}, the model has {len(self.owners) + 1} experts", "set config.top_k lower"
            )
        for suite in filter(None, self.suites.split(",")):
            find_tasks(suite)
        for name in self._ablation_names:
            if name not in ABLATIONS:
                raise ConfigError(f"config.ablations names {name!r}", f"choose from: {', '.join(ABLATIONS)}")

    @property
    def owners(self) -> tuple[str, ...]:
        """The owners' names in alphabetical order: the order of their experts."""
        return tuple(sorted(self.domains.split(",")))

    @functools.cached_property
    def shape(self) -> ModelConfig:
        """The public model's: `model`, or that of the model given as `public`."""
        return self.model or open_model(str(self.public)).config

    @property
    def public_names(self) -> tuple[str, ...]:
        """The domains that public text consists of: `public`, then the `public_domains`."""
        return (PUBLIC, *filter(None, self.public_domains.split(",")))

    @property
    def chosen_ablations(self) -> dict[str, Experts]:
        """{name: how its experts are trained}."""
        return {name: ABLATIONS[name] for name in self._ablation_names}

    @property
    def _ablation_names(self) -> tuple[str, ...]:
        return tuple(ABLATIONS) if self.ablations == "all" else tuple(filter(None, self.ablations.split(",")))
