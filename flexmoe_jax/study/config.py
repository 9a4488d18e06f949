"""The size of a study, and the ablations it may hold."""

import dataclasses

from flexmoe_jax.config import ModelConfig
from flexmoe_jax.errors import ConfigError
from flexmoe_jax.flexmix.build import DOMAINS
from flexmoe_jax.tree import PUBLIC

PAPER = {"public_data": "", "public_fraction": 0.0, "router_contrast": 0.0}
# name: (changes to an owner's run, random router rows, norm of the rows or None for the release's own)
ABLATIONS: dict[str, tuple[dict, bool, float | None]] = {
    "the paper's training": (PAPER, False, 1.0),
    "no coordination": ({**PAPER, "coordinate": False, "router_z_loss": 0.0}, False, None),
    "random rows": ({}, True, None),
    "no bias": ({"freeze": "experts/.*/bias"}, False, None),
    "no bias, random rows": ({"freeze": "experts/.*/bias"}, True, None),
}


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """The size of a study. `domains` are the closed ones, comma-separated; steps are of one run of each kind.

    `ablations` are names of `ABLATIONS`, comma-separated, or "all". Held-out text is in bytes per domain; a document
    gives its first `document_chars` characters, since intervals want many documents. `systems` is "all", or "method"
    for the method and the dense experts it is held against. `public` is a public model to begin with (empty: one is
    trained); `public_share` the part of each closed domain's text that is public, not its owner's (flexmix/build.py);
    router rows begin at norm `router_scale`.
    """

    out: str
    domains: str
    model: ModelConfig
    seeds: int = 3
    public_steps: int = 300
    owner_steps: int = 100
    mix_steps: int = 100
    tune_steps: int = 50
    batch_size: int = 8
    seq_len: int = 256
    top_k: int = 2
    embed_count: int = 256
    classifier_documents: int = 256
    proxies: int = 200
    proxies_of: int = 2000
    heldout_bytes: int = 40_000
    document_chars: int = 2000
    choice_items: int = 24
    ablations: str = "all"
    systems: str = "all"
    public: str = ""
    public_share: float = 0.08
    router_scale: float = 0.1

    def __post_init__(self):
        positive = ("seeds", "public_steps", "owner_steps", "mix_steps", "tune_steps", "batch_size", "heldout_bytes",
                    "document_chars", "top_k", "proxies")  # fmt: skip
        for name in positive:
            if getattr(self, name) < 1:
                raise ConfigError(f"config.{name} is {getattr(self, name)}", "give a number of at least 1")
        if self.systems not in ("all", "method"):
            raise ConfigError(f"config.systems is {self.systems!r}", "choose from: all, method")
        if not 0 <= self.public_share <= 0.5:
            raise ConfigError(
                f"config.public_share is {self.public_share}", "give a part of each domain's text, from 0 to 0.5"
            )
        if self.router_scale <= 0:
            raise ConfigError(f"config.router_scale is {self.router_scale}", "give a norm above 0")
        for owner in self.owners:
            if owner == PUBLIC or owner not in DOMAINS:
                raise ConfigError(f"config.domains names {owner!r}", f"choose from: {', '.join(DOMAINS[1:])}")
        if self.top_k > len(self.owners) + 1:
            raise ConfigError(
                f"config.top_k is {self.top_k}, the model has {len(self.owners) + 1} experts", "set config.top_k lower"
            )

    @property
    def owners(self) -> tuple[str, ...]:
        return tuple(sorted(self.domains.split(",")))

    @property
    def chosen_ablations(self) -> dict[str, tuple[dict, bool, float | None]]:
        names = tuple(ABLATIONS) if self.ablations == "all" else tuple(filter(None, self.ablations.split(",")))
        for name in names:
            if name not in ABLATIONS:
                raise ConfigError(f"config.ablations names {name!r}", f"choose from: {', '.join(ABLATIONS)}")
        return {name: ABLATIONS[name] for name in names}
