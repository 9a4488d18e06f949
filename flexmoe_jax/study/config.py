"""The size of a study, and the ablations it may include."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

from flexmoe_jax.errors import ConfigError
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

    model: ModelConfig
    """Shape of the public model; a model given as `public` must have it."""

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

    public: str | None = None
    """Directory of an existing public model; None trains one."""

    public_domains: str = ""
    """Domains whose text is public as a whole, comma-separated: public text of several sources, each scored apart."""

    public_share: Annotated[float, Range(float, 0, 0.5)] = 0.08
    """Fraction of each owner's domain that belongs to the public text instead, from 0 to 0.5."""

    router_scale: Positive = 0.1
    """L2 norm that router rows start with."""

    def __post_init__(self) -> None:
        check_numbers(self, "config")
        if self.systems not in ("all", "method"):
            raise ConfigError(f"config.systems is {self.systems!r}", "choose from: all, method")
        for owner in self.owners:
            if owner == PUBLIC or owner not in DOMAINS:
                raise ConfigError(f"config.domains names {owner!r}", f"choose from: {', '.join(DOMAINS[1:])}")
        if self.top_k > len(self.owners) + 1:
            raise ConfigError(
                f"config.top_k is {self.top_k}, the model has {len(self.owners) + 1} experts", "set config.top_k lower"
            )
        for name in self._ablation_names:
            if name not in ABLATIONS:
                raise ConfigError(f"config.ablations names {name!r}", f"choose from: {', '.join(ABLATIONS)}")

    @property
    def owners(self) -> tuple[str, ...]:
        """The owners' names in alphabetical order: the order of their experts."""
        return tuple(sorted(self.domains.split(",")))

    @property
    def public_sources(self) -> tuple[str, ...]:
        """The domains of the public text: the encyclopedia's, then `public_domains`."""
        return (PUBLIC, *filter(None, self.public_domains.split(",")))

    @property
    def chosen_ablations(self) -> dict[str, Experts]:
        """{name: how its experts are trained}."""
        return {name: ABLATIONS[name] for name in self._ablation_names}

    @property
    def _ablation_names(self) -> tuple[str, ...]:
        return tuple(ABLATIONS) if self.ablations == "all" else tuple(filter(None, self.ablations.split(",")))
