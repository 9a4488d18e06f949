"""The model classes that fit our tree: what each computes, and how its checkpoints name keys and tensors."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

from flexmoe_jax.artifacts.model_dir import ModelDir
from flexmoe_jax.config import ModelConfig
from flexmoe_jax.errors import ArtifactError
from flexmoe_jax.params import HEAD, all_ranks

_POST_NORM = {"post_attention_layernorm": "blocks/attn_norm", "post_feedforward_layernorm": "blocks/ffn_norm"}
_PRE_NORM = {"input_layernorm": "blocks/attn_norm", "post_attention_layernorm": "blocks/ffn_norm"}
_PARTS = ("pre_norm", "qk_norm", "qk_norm_per_head", "qkv_bias")  # fields of ModelConfig that a class determines


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A model class of `transformers`, or of the model file that exports ship, and the decoder that it implements."""

    name: str
    model_type: str

    theta: float
    """Rotary base where config.json has none, as `transformers` has it; so are the next two."""

    eps: float = 1e-6
    positions: int = 2048

    pre_norm: bool = True
    qk_norm: bool = False
    qk_norm_per_head: bool = False
    qkv_bias: bool = False

    slides: bool = False
    """Its attention may have a sliding window; `window` is its length where config.json has no such key."""

    window: int | None = None

    tied: bool = False
    """Whether the head is the transposed embedding where config.json does not say so."""

    mixture: bool = False
    """It has a router over experts."""

    bias: bool = False
    """Its router adds the experts' bias."""

    norm_topk: bool | None = None
    """Whether the weights of a token's active experts add up to 1; None: config.json says so as `norm_topk_prob`."""

    experts_key: str = "num_experts"
    width_key: str = "intermediate_size"
    moe: str = "mlp"
    ffn: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")

    required: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    """Options of the class that our decoder lacks: {key: the values it accepts}. A missing key counts as the first."""

    @property
    def decoder(self) -> dict[str, bool]:
        """The fields of ModelConfig that the class determines."""
        return {name: getattr(self, name) for name in _PARTS}

    @property
    def layer_names(self) -> dict[str, str]:
        """{name of a layer's trunk tensor: path of the leaf}."""
        names = {f"self_attn.{n}_proj.weight": f"blocks/w_{n}" for n in "qkvo"}
        norms = _PRE_NORM if self.pre_norm else _POST_NORM
        names |= {f"{name}.weight": path for name, path in norms.items()}
        if self.qk_norm:
            names |= {f"self_attn.{n}_norm.weight": f"blocks/{n}_norm" for n in "qk"}
        if self.qkv_bias:
            names |= {f"self_attn.{n}_proj.bias": f"blocks/b_{n}" for n in "qkv"}
        return names

    def expert_names(self, expert: int) -> dict[str, str]:
        """{name of a layer's tensor of one expert, or of the dense feed-forward network: path of the leaf}."""
        where = f"{self.moe}.experts.{expert}" if self.mixture else self.moe
        return {
            f"{where}.{name}.weight": path for name, path in zip(self.ffn, ("w_gate", "w_up", "w_down"), strict=True)
        }


_NO_BIAS = {"attention_bias": (False,)}
_SPARSE = {"decoder_sparse_step": (1,), "mlp_only_layers": ([],)}

OLMO2 = Architecture("Olmo2ForCausalLM", "olmo2", 1e4, 1e-5, pre_norm=False, qk_norm=True, required=_NO_BIAS)
_flex = functools.partial(
    Architecture, theta=5e5, positions=4096, pre_norm=False, qk_norm=True, mixture=True, required=_NO_BIAS
)
FLEX_OLMO = _flex("FlexOlmoForCausalLM", "flex_olmo")
BIASED = _flex("FlexMoEForCausalLM", "flexmoe", bias=True)  # modeling_flexmoe.py
LLAMA = Architecture("LlamaForCausalLM", "llama", 1e4, required=_NO_BIAS | {"mlp_bias": (False,)})
MISTRAL = Architecture("MistralForCausalLM", "mistral", 1e4, positions=131072, slides=True, window=4096)
MIXTRAL = Architecture(
    "MixtralForCausalLM",
    "mixtral",
    1e6,
    1e-5,
    131072,
    slides=True,
    mixture=True,
    norm_topk=True,
    experts_key="num_local_experts",
    moe="block_sparse_moe",
    ffn=("w1", "w3", "w2"),
)
QWEN2 = Architecture("Qwen2ForCausalLM", "qwen2", 1e4, positions=32768, qkv_bias=True)
_qwen3 = functools.partial(
    Architecture, theta=1e4, positions=32768, qk_norm=True, qk_norm_per_head=True, required=_NO_BIAS
)
QWEN3 = _qwen3("Qwen3ForCausalLM", "qwen3")
QWEN3_MOE = _qwen3(
    "Qwen3MoeForCausalLM",
    "qwen3_moe",
    mixture=True,
    width_key="moe_intermediate_size",
    required=_NO_BIAS | _SPARSE,
)
SMOLLM3 = Architecture(
    "SmolLM3ForCausalLM", "smollm3", 2e6, positions=32768, tied=True, required=_NO_BIAS | {"mlp_bias": (False,)}
)
ARCHITECTURES = {
    a.model_type: a for a in (FLEX_OLMO, BIASED, OLMO2, LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3, QWEN3_MOE, SMOLLM3)
}
_BY_DEFAULT = (OLMO2, LLAMA, QWEN2, QWEN3, FLEX_OLMO, MIXTRAL, QWEN3_MOE)  # of classes that compute the same, the first


def architecture_of(model: ModelConfig, mixture: bool, biased: bool, origin: str | None = None) -> Architecture:
    """The class of a model of this shape: a router over experts if `mixture`, which adds their bias if `biased`.

    `origin` is the `model_type` it was imported from, which a dense export keeps. Raises ArtifactError where no class
    computes it.
    """
    decoder = {name: getattr(model, name) for name in _PARTS}
    if biased and mixture:
        if has_bias(model):
            return BIASED
        what = f"the model file that adds the experts' bias is of {FLEX_OLMO.name}, and this model has another decoder"
        raise ArtifactError(what, "--zero-bias with --data leaves the bias out and prints what that costs")
    options: tuple[Architecture, ...] = _BY_DEFAULT
    if model.rope_skip is not None:
        options = (SMOLLM3,)
    elif origin in ARCHITECTURES and ARCHITECTURES[origin] is not SMOLLM3:  # it would leave rope out of some layers
        options = (ARCHITECTURES[origin], *options)
    for option in options:
        if option.mixture == mixture and option.decoder == decoder and option.norm_topk in (None, model.norm_topk):
            return option
    kind = "mixture" if mixture else "dense model"
    parts = ", ".join(f"{name} {value}" for name, value in decoder.items())
    remedy = "export a single expert as a dense model: --experts public --dense" if mixture else "see docs: huggingface"
    raise ArtifactError(f"transformers has no class of a {kind} with {parts}, rope_skip {model.rope_skip}", remedy)


def has_bias(model: ModelConfig) -> bool:
    """Whether the model file that exports ship, whose router adds the experts' bias, computes this decoder."""
    return BIASED.decoder == {name: getattr(model, name) for name in _PARTS} and model.rope_skip is None


def check_no_head_changes(model: ModelDir, names: Iterable[str]) -> None:
    """ArtifactError if one of the experts `names` changes the output head: no other format has a place for that."""
    if changing := [name for name in names if HEAD in all_ranks(model.manifests[name].tensors)]:
        what = f"the output head is changed by {', '.join(changing)}, and no other format has a place for that"
        raise ArtifactError(
            what, "choose other experts with --experts; or their owners train without `head=` in the rank"
        )
