"""The shape of a decoder: sizes, and the parts in which public models of different families differ."""

import dataclasses
from typing import Annotated, ClassVar

from flexmoe_jax.errors import ConfigError
from flexmoe_jax.ranges import COUNT, MAX_FLOAT32, POSITIVE, Count, Positive, Range, check_numbers

MAX_SEQ_LEN = 1 << 24  # the one size that no tensor has: a file may state any
_ROPE_KINDS = ("linear", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are changed for sequences longer than those of the first training (model/rope.py).

    ConfigError for an unknown kind and for impossible numbers.
    """

    kind: str
    """`linear` (arXiv 2306.15595), `llama3` (arXiv 2407.21783, section 3.4.2) or `yarn` (arXiv 2309.00071)."""

    factor: Annotated[float, Range(float, 1, MAX_FLOAT32)]
    """How much longer sequences become; at least 1."""

    original_max_seq_len: Annotated[int | None, COUNT] = None
    """Sequence length of the first training, in tokens; needed by `llama3` and `yarn`."""

    low_freq_factor: Positive = 1.0
    """`llama3`: wavelengths above original_max_seq_len / low_freq_factor are multiplied by `factor`. Llama 3.1's."""

    high_freq_factor: Positive = 4.0
    """`llama3`: wavelengths below original_max_seq_len / high_freq_factor do not change. Llama 3.1's."""

    beta_fast: Positive = 32.0
    """`yarn`: dimensions that turn at least so often in original_max_seq_len do not change. The paper's."""

    beta_slow: Positive = 1.0
    """`yarn`: dimensions that turn at most so often are slowed down by `factor`. The paper's."""

    attention_factor: Annotated[float | None, POSITIVE] = None
    """`yarn`: factor of queries and of keys; None: 0.1 ln(factor) + 1, the paper's."""

    truncate: bool = True
    """`yarn`: round the limits of the dimensions that change outwards to whole numbers, as most models do."""

    def __post_init__(self):
        if self.kind not in _ROPE_KINDS:
            raise ConfigError(f"rope_scaling.kind is {self.kind!r}", f"use one of: {', '.join(_ROPE_KINDS)}")
        check_numbers(self, "rope_scaling")
        if self.kind != "linear" and not (self.original_max_seq_len or 0) >= 1:
            what = f"rope_scaling.original_max_seq_len is {self.original_max_seq_len} and kind {self.kind!r}"
            raise ConfigError(what, "give the sequence length of the first training")
        if self.kind == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            what = f"rope_scaling.low_freq_factor is {self.low_freq_factor}, high_freq_factor {self.high_freq_factor}"
            raise ConfigError(what, "give two positive numbers, the lower one first")
        if self.kind == "yarn" and not self.beta_slow < self.beta_fast:
            what = f"rope_scaling.beta_slow is {self.beta_slow}, beta_fast {self.beta_fast}"
            raise ConfigError(what, "give two positive numbers, the slower one lower")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a FlexMoE decoder (FlexOlmo, arXiv 2507.07024, section 3; OLMo-2 blocks).

    The defaults are the OLMo-2/FlexOlmo block. Llama: `pre_norm=True, norm_topk=True, qk_norm=False`.
    ConfigError for impossible sizes.
    """

    LATER: ClassVar = ("rope_scaling", "rope_skip", "qk_norm_per_head", "qkv_bias", "norm_topk")  # see `to_mapping`

    vocab_size: Count
    """Rows of the embedding; at least the tokenizer's number of ids."""

    num_layers: Count
    """Transformer blocks."""

    d_model: Count
    """Width of the residual stream."""

    num_heads: Count
    """Query heads of attention."""

    num_kv_heads: Count
    """Key and value heads; divides `num_heads`, equal to it without grouped-query attention."""

    head_dim: Count
    """Width of one head; even, since rotary embeddings rotate pairs."""

    d_ff: Count
    """Hidden width of every expert's feed-forward network."""

    max_seq_len: Annotated[int, Range(int, 1, MAX_SEQ_LEN)]
    """Longest sequence in tokens that the model is trained for and run with."""

    rope_theta: Positive = 5e5
    """Base of the rotary embedding's wavelengths. OLMo-2's; Llama 2 has 1e4."""

    rope_scaling: RopeScaling | None = None
    """See the keys of `rope_scaling`. None: the frequencies follow from `rope_theta` (OLMo-2, Llama 2)."""

    rope_skip: Annotated[int | None, COUNT] = None
    """Every so many layers, one has no rotary embedding: 4 leaves it out of layers 4, 8, ... (SmolLM3). None: none."""

    norm_eps: Positive = 1e-6
    """Added to the mean square in RMSNorm. OLMo-2's."""

    pre_norm: bool = False
    """Normalize the inputs of attention and experts (Llama) instead of their outputs (OLMo-2)."""

    qk_norm: bool = True
    """RMSNorm of queries and keys before the rotary embedding (OLMo-2, Qwen3)."""

    qk_norm_per_head: bool = False
    """That norm is of each head, with one weight for all heads (Qwen3), not of the whole projection (OLMo-2)."""

    qkv_bias: bool = False
    """Queries, keys and values have a bias (Qwen2.5)."""

    tie_embeddings: bool = False
    """The head is the transposed embedding (small Llama-style models)."""

    norm_topk: bool = False
    """Divide the weights of a token's active experts by their sum (`norm_topk_prob` of transformers). OLMo-2 needs no
    such division, since the norm on the experts' output undoes any factor; with `pre_norm` nothing else does."""

    def __post_init__(self):
        check_numbers(self, "model")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model.num_heads {self.num_heads} is not a multiple of model.num_kv_heads {self.num_kv_heads}",
                "every key/value head serves the same number of query heads: change one of the two",
            )
        if self.qk_norm_per_head and not self.qk_norm:
            raise ConfigError("model.qk_norm_per_head is True and model.qk_norm False", "set model.qk_norm to True")
        if self.head_dim % 2:
            raise ConfigError(f"model.head_dim is {self.head_dim}", "rotary embeddings need an even head size")
        if self.pre_norm and not self.norm_topk:
            raise ConfigError(
                "model.norm_topk is False and model.pre_norm is True: with fewer experts active than the model has, "
                "their weights add up to less than 1 and the mixture is not the model that it was made from",
                "set model.norm_topk to True; a model or package on disk that lacks it has to be imported or trained "
                "again",
            )
