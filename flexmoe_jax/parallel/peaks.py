"""What devices can do at most, by `jax.Device.device_kind`: dense bfloat16 products, without sparsity, in FLOP/s."""

import jax

PEAK_FLOPS = {
    "TPU v4": 275e12,  # cloud.google.com/tpu/docs/v4
    "TPU v5 lite": 197e12,  # v5e; cloud.google.com/tpu/docs/v5e
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p; cloud.google.com/tpu/docs/v5p
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,  # v6e; cloud.google.com/tpu/docs/v6e
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,  # NVIDIA A100 datasheet
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,  # SXM; NVIDIA H100 datasheet, half of what it says with sparsity
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,  # NVIDIA H200 datasheet, as above
}


def peak_flops(devices: int) -> float | None:
    """Of the first `devices` devices together, which are of one kind; None where it is not known."""
    peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
    return None if peak is None else peak * devices
