"""Frozen configurations, and the one way from a plain mapping to them.

Plain Python: nothing here imports JAX, so that the command line can check a configuration before it starts anything.
"""

import dataclasses
import re
import types
import typing
from collections.abc import Mapping

from flexmoe_jax.errors import ConfigError, did_you_mean


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a FlexMoE decoder (method: FlexOlmo, arXiv 2507.07024, section 3; OLMo-2 blocks).

    The defaults are the OLMo-2/FlexOlmo block. Llama-style anchors set `pre_norm=True, qk_norm=False`.
    """

    vocab_size: int
    num_layers: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    max_seq_len: int
    rope_theta: float = 5e5
    norm_eps: float = 1e-6
    pre_norm: bool = False
    qk_norm: bool = True
    tie_embeddings: bool = False

    def __post_init__(self):
        sizes = ("vocab_size", "num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim", "d_ff", "max_seq_len")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name} is {getattr(self, name)}", "give a size of at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model.num_heads {self.num_heads} is not a multiple of model.num_kv_heads {self.num_kv_heads}",
                "every key/value head serves the same number of query heads: change one of the two",
            )
        if self.head_dim % 2:
            raise ConfigError(f"model.head_dim is {self.head_dim}", "rotary embeddings need an even head size")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay (paper section 4; reference training scripts).

    Of a trained parameter AdamW keeps 8 bytes. `first_moment="bfloat16"` makes that 6. `second_moment="factored"` keeps
    of a matrix the means of its rows and of its columns alone, as Adafactor does (arXiv 1804.04235), whose decay and
    bound on an update it takes over (`b2` and `eps` have no part): 4 bytes, or 2; and next to nothing with `b1=0`.
    """

    lr: float = 9e-4
    warmup_steps: int = 2000
    end_lr_fraction: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    first_moment: str = "float32"
    second_moment: str = "full"

    def __post_init__(self):
        for name, known in (("first_moment", ("float32", "bfloat16")), ("second_moment", ("full", "factored"))):
            if getattr(self, name) not in known:
                raise ConfigError(f"optimizer.{name} is {getattr(self, name)!r}", f"use one of: {', '.join(known)}")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One training run: the public model (`owner="public"`) or one owner's expert (any other name).

    Paths are strings. `batch_size` is sequences per optimizer step, split into `accumulation` equal microbatches. An
    owner may mix in public documents: `public_fraction` of each batch's sequences come from `public_data`, and
    `router_contrast` weighs a loss by which the router tells the two apart.

    An owner's run begins with the public feed-forward network and a `domain_vector`, or goes on from its package
    `expert`. A public run defines `model`, or goes on from the model directory `public` and trains all its experts
    together; an owner's run may say in `model` what shape its public model must have. `freeze` is a pattern of
    parameter paths that stay as they began, besides those that the stage freezes; `top_k` the experts active per
    token (0: all); `load_balance` weighs the loss that spreads tokens over experts. The control `coordinate=False`
    trains an owner's feed-forward network without the public expert beside it. `mesh` deals the work out over devices
    ("data=2,fsdp=4"; parallel/mesh.py); all devices there are, by `fsdp`, when it is empty.
    """

    owner: str
    data: str
    out: str
    steps: int
    batch_size: int
    seq_len: int
    model: ModelConfig | None = None
    public: str = ""
    public_data: str = ""
    public_fraction: float = 0.0
    domain_vector: str = ""
    expert: str = ""
    tokenizer: str = "cl100k:8192"
    optimizer: OptimizerConfig = OptimizerConfig()
    accumulation: int = 1
    z_loss: float = 1e-5
    router_z_loss: float = 1e-3
    router_contrast: float = 0.0
    load_balance: float = 0.0
    top_k: int = 0
    freeze: str = ""
    coordinate: bool = True
    router_scale: float = 0.1
    mesh: str = ""
    compute_dtype: str = "float32"
    remat: bool = False
    seed: int = 0
    log_every: int = 10
    save_every: int = 500
    save_minutes: float = 10.0
    keep_checkpoints: int = 2
    max_bad_steps: int = 10
    licence: str = ""
    contact: str = ""

    @property
    def is_public(self) -> bool:
        return self.owner == "public"

    @property
    def public_sequences(self) -> int:
        """Sequences of each batch that come from `public_data`."""
        return round(self.public_fraction * self.batch_size)

    def __post_init__(self):
        for name in ("steps", "batch_size", "seq_len", "accumulation", "log_every", "save_every", "max_bad_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"config.{name} is {getattr(self, name)}", "give a number of at least 1")
        if self.batch_size % self.accumulation:
            raise ConfigError(
                f"config.batch_size {self.batch_size} is not a multiple of config.accumulation {self.accumulation}",
                "microbatches are equal: change one of the two",
            )
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"config.compute_dtype is {self.compute_dtype!r}", "use 'float32' or 'bfloat16'")
        if self.top_k < 0 or self.load_balance < 0:
            raise ConfigError(
                f"config.top_k is {self.top_k}, config.load_balance {self.load_balance}", "give 0 or more"
            )
        try:
            re.compile(self.freeze)
        except re.error as error:
            raise ConfigError(f"config.freeze {self.freeze!r} is no pattern: {error}", "correct it") from error
        if self.is_public and (self.model is None) == (not self.public):
            raise ConfigError(
                f"config.model is {'missing' if self.model is None else 'set'} and config.public {self.public!r}",
                "a public run defines a model's shape, or goes on from the model in config.public: set one of them",
            )
        if not 0 <= self.public_fraction < 1 or (self.public_sequences > 0) != bool(self.public_data):
            raise ConfigError(
                f"config.public_fraction is {self.public_fraction} of {self.batch_size} sequences, public_data is "
                f"{self.public_data!r}",
                "give both, a fraction below 1 that makes at least one sequence, or neither",
            )
        if self.router_contrast and not self.public_sequences:
            raise ConfigError(
                f"config.router_contrast is {self.router_contrast} and config.public_fraction {self.public_fraction}",
                "the router can be told apart from public text only where there is some: set both, or neither",
            )
        if self.router_contrast and (self.is_public or not self.coordinate):
            raise ConfigError(
                f"config.router_contrast is {self.router_contrast} in a run without a pair {{public, owner}}",
                "only an owner's expert beside the public one has odds to train: set it to 0",
            )
        if not self.is_public and not self.public:
            raise ConfigError(
                f"config.public is empty in the run of owner {self.owner!r}",
                "an expert is trained beside a public model: set config.public to its directory",
            )
        if self.expert and (self.is_public or self.domain_vector):
            raise ConfigError(
                f"config.expert is {self.expert!r} in the run of {self.owner!r}, config.domain_vector is "
                f"{self.domain_vector!r}",
                "an owner's package goes on with the router row it has, a new expert begins with a domain vector: "
                "set one of them",
            )


def from_mapping(cls, values: Mapping, where: str = "config"):
    """Builds the frozen dataclass `cls` from a nested mapping; unknown, missing and mistyped keys are ConfigErrors."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            raise ConfigError(f"unknown key {where}.{key}", did_you_mean(key, fields))
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING:
            raise ConfigError(f"{where}.{name} is not set", f"add {where}.{name} ({_type_name(hints[name])})")
    return cls(**{key: _convert(hints[key], value, f"{where}.{key}") for key, value in values.items()})


def to_mapping(config) -> dict:
    """The inverse of `from_mapping`: plain nested dictionaries of JSON values."""
    return dataclasses.asdict(config)


def _convert(hint, value, where: str):
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    kind = next(o for o in options if o is not type(None))
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} is {value!r}", "give a nested section of keys")
        return from_mapping(kind, value, where)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"{where} is {value!r} ({type(value).__name__})", f"give a value of type {kind.__name__}")
    return value


def _type_name(hint) -> str:
    return getattr(hint, "__name__", str(hint))
