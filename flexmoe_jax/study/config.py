"""The size of a study, and the ablations it may include."""

import dataclasses
import functools
import itertools
import re
from collections.abc import Mapping
from typing import Annotated, Any

from flexmoe_jax.artifacts.model_dir import open_model
from flexmoe_jax.errors import ConfigError
from flexmoe_jax.evaluate.suites import find_tasks
from flexmoe_jax.flexmix.build import DOMAINS
from flexmoe_jax.model_config import ModelConfig
from flexmoe_jax.ranges import POSITIVE, Count, Positive, Range, check_numbers
from flexmoe_jax.tree import PUBLIC

PUBLIC_FRACTION = 0.25  # of the batches of an expert, as in the quickstart


@dataclasses.dataclass(frozen=True)
class Experts:
    """How the owners' experts of a merged model are trained. The defaults are the method."""

    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Keys of an owner's `RunConfig` that differ from the method's, and `groups`, that of its optimizer."""

    coordinate: bool = True
    """Whether an expert is trained beside the public one (paper section 3.2)."""

    public_text: bool = True
    """Whether public text is mixed into its batches, beside as much own text as without."""

    contrast: bool = True
    """Whether its router is trained to tell own text from public; needs both of the above."""

    generative: bool = True
    """Whether rows and biases start as discriminants of own and public text; False: with the domain embeddings."""

    random_rows: bool = False
    """Whether router rows start in random directions instead of those of the domain embeddings."""

    router_scale: float | None = None
    """L2 norm that router rows start with; None: the study's."""


def _factorial() -> dict[str, Experts]:
    """{name: training} of every combination of what the method adds to rows that start with the domain embeddings.

    The paper's training is coordination alone, with rows of norm 1.
    """
    found = {}
    for coordinate, public_text, contrast, small in itertools.product((False, True), repeat=4):
        if contrast and not (coordinate and public_text):
            continue
        added = {"public text": public_text, "contrast": contrast, "small rows": small}
        parts = ["paper" if coordinate else "paper without coordination", *(what for what in added if added[what])]
        name = "the paper's training" if parts == ["paper"] else " + ".join(parts)
        how = Experts(generative=False, router_scale=None if small else 1.0)
        found[name] = dataclasses.replace(how, coordinate=coordinate, public_text=public_text, contrast=contrast)
    return found


# Adam moves a scalar by at most about the sum of the rates of all steps, 0.08 in 100 steps of 1.5e-3: what a bias is
# worth shows between "no bias" and biases that are ten times as fast. Rows are not faster in any ablation: in as many
# steps they turn by more than 45 degrees already, and a start that is forgotten tells nothing. Where random rows can
# tell is at norm 1, beside "paper + public text + contrast".
ABLATIONS = _factorial() | {
    "fast biases": Experts({"groups": "experts/.*/bias lr=10"}, generative=False),
    "no bias": Experts({"freeze": "experts/.*/bias"}, generative=False),
    "random rows": Experts(generative=False, random_rows=True),
    "random rows of norm 1": Experts(generative=False, random_rows=True, router_scale=1.0),
    "discriminants not trained": Experts({"groups": "experts/.*/(router|bias) lr=0"}),
    **{f"rank {rank}": Experts({"rank": str(rank)}) for rank in (4, 16, 64)},
    "head 32": Experts({"rank": "head=32", "groups": "experts/.*/head_.* lr=3"}),
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
    """Sequences per optimizer step. A quarter of an expert's are public text; runs on own text alone leave those out,
    so that all systems see equal numbers of an owner's tokens."""

    seq_len: Count = 256
    """Tokens per sequence; at most `model.max_seq_len`."""

    rates: str = "5e-4,1.5e-3,3e-3"
    """Peak learning rates, comma-separated. Each kind of training is tried at each of them with the first seed for a
    third of its steps, and all seeds train at the one that is best on validation text. A single rate is not tried."""

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
    text is then equal amounts of these and of `public`, each scored apart."""

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
        self._check_rates()
        for key, names in (("domains", self.owners), ("public_domains", self.public_sources[1:])):
            for name in names:
                if name == PUBLIC or name not in DOMAINS:
                    raise ConfigError(f"config.{key} names {name!r}", f"choose from: {', '.join(DOMAINS[1:])}")
        for name in {*self.owners} & {*self.public_sources}:
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

    def _check_rates(self) -> None:
        try:
            good = all(rate in POSITIVE for rate in self.grid) and len(set(self.grid)) == len(self.grid)
        except ValueError:
            good = False
        if not good:
            raise ConfigError(f"config.rates is {self.rates!r}", "give different numbers above 0, as 5e-4,1.5e-3,3e-3")

    @property
    def grid(self) -> tuple[float, ...]:
        """The rates, ascending."""
        return tuple(sorted(map(float, self.rates.split(","))))

    @property
    def own_sequences(self) -> int:
        """Sequences of own text in every batch of an owner."""
        return self.batch_size - round(PUBLIC_FRACTION * self.batch_size)

    @property
    def owners(self) -> tuple[str, ...]:
        """The owners' names in alphabetical order: the order of their experts."""
        return tuple(sorted(self.domains.split(",")))

    @functools.cached_property
    def shape(self) -> ModelConfig:
        """The public model's: `model`, or that of the model given as `public`."""
        return self.model or open_model(str(self.public)).config

    @property
    def public_sources(self) -> tuple[str, ...]:
        """The domains of the public text: the encyclopedia's, then `public_domains`."""
        return (PUBLIC, *filter(None, self.public_domains.split(",")))

    @property
    def chosen_ablations(self) -> dict[str, Experts]:
        """{name: how its experts are trained}. Of all, those whose rank is higher than the model's matrices are left
        out."""
        chosen = {name: ABLATIONS[name] for name in self._ablation_names}
        if self.ablations != "all":
            return chosen
        most = min(self.shape.d_model, self.shape.d_ff)
        return {name: how for name, how in chosen.items() if "rank" not in how.changes or int(name.split()[-1]) <= most}

    @property
    def _ablation_names(self) -> tuple[str, ...]:
        return tuple(ABLATIONS) if self.ablations == "all" else tuple(filter(None, self.ablations.split(",")))
