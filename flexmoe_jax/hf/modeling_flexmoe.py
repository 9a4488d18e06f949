"""FlexOlmo with a bias per expert: router logits are r_i . x + min(b_i, 0). Exports that need it ship this file."""

from typing import Any

import torch
from transformers import FlexOlmoConfig, FlexOlmoForCausalLM
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)


class FlexMoEConfig(FlexOlmoConfig):
    """FlexOlmoConfig under its own model type, so that no loader takes the weights without the bias."""

    model_type = "flexmoe"


class BiasedRouter(torch.nn.Module):
    """The FlexOlmo router `router` with one more parameter, `bias` float32 [experts]."""

    def __init__(self, router: Any) -> None:
        super().__init__()
        self.top_k, self.norm_topk_prob, self.weight = router.top_k, router.norm_topk_prob, router.weight
        self.bias = torch.nn.Parameter(torch.zeros(router.weight.shape[0], dtype=torch.float32))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(logits float32 [tokens, experts], weights and indices [tokens, top_k] of the chosen experts)."""
        x = hidden_states.reshape(-1, self.weight.shape[1])
        logits = torch.nn.functional.linear(x, self.weight).float() + self.bias.float().clamp(max=0)
        top, index = torch.topk(logits.softmax(-1), self.top_k, dim=-1)
        if self.norm_topk_prob:
            top = top / top.sum(dim=-1, keepdim=True)
        return logits, top.to(x.dtype), index


class FlexMoEForCausalLM(FlexOlmoForCausalLM):
    """FlexOlmoForCausalLM with routers that add the bias."""

    config_class = FlexMoEConfig

    def __init__(self, config: FlexMoEConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp.gate = BiasedRouter(layer.mlp.gate)


# As in FlexOlmo, experts are separate tensors on disk and fused in memory.
register_checkpoint_conversion_mapping(
    FlexMoEConfig.model_type, get_checkpoint_conversion_mapping("flex_olmo"), overwrite=True
)
