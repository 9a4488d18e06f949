"""FlexOlmo with the experts' bias: router logits are r_i . x + min(b_i, 0). Shipped inside exports that need it."""

import torch
from transformers import FlexOlmoConfig, FlexOlmoForCausalLM
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)


class FlexMoEConfig(FlexOlmoConfig):
    """As FlexOlmoConfig; a type of its own, so that no loader takes the weights and leaves the bias."""

    model_type = "flexmoe"


class BiasedRouter(torch.nn.Module):
    """A FlexOlmo router with one more parameter, `bias` float32 [experts]."""

    def __init__(self, router):
        super().__init__()
        self.top_k, self.norm_topk_prob, self.weight = router.top_k, router.norm_topk_prob, router.weight
        self.bias = torch.nn.Parameter(torch.zeros(router.weight.shape[0], dtype=torch.float32))

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, self.weight.shape[1])
        logits = torch.nn.functional.linear(x, self.weight).float() + self.bias.float().clamp(max=0)
        top, index = torch.topk(logits.softmax(-1), self.top_k, dim=-1)
        if self.norm_topk_prob:
            top = top / top.sum(dim=-1, keepdim=True)
        return logits, top.to(x.dtype), index


class FlexMoEForCausalLM(FlexOlmoForCausalLM):
    """FlexOlmoForCausalLM whose routers add the bias."""

    config_class = FlexMoEConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp.gate = BiasedRouter(layer.mlp.gate)


# On disk the experts lie one by one, in memory fused: as in FlexOlmo.
register_checkpoint_conversion_mapping(
    FlexMoEConfig.model_type, get_checkpoint_conversion_mapping("flex_olmo"), overwrite=True
)
