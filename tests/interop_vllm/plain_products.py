"""Replace vLLM's products of packed weights by plain torch, where its CPU build has none for this machine.

Reading files, rules for modules, fused layers, routing and all else stay vLLM's; only what multiplies is
replaced, by weights dequantised to float32 at load. The CPU build of vLLM 0.32 needs AVX-512 for Int4, AMX
for Int4 experts, and has no product of Int8.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

BIASED = ("uint4b8", "uint8b128")


def install() -> None:
    from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsInt4
    from vllm.model_executor.layers.fused_moe.oracle import int_wna16
    from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig
    from vllm.model_executor.layers.quantization.utils import marlin_utils
    from vllm.scalar_type import scalar_types

    types = [getattr(scalar_types, name) for name in BIASED]
    marlin_utils._query_cpu_marlin_supported_quant_types = lambda *_, **__: types
    AutoGPTQConfig.get_supported_act_dtypes = classmethod(
        lambda _: [torch.bfloat16, torch.float16, torch.float32]
    )
    CPUWNA16LinearKernel.can_implement = classmethod(lambda _, config: (config.weight_type in types, None))
    CPUWNA16LinearKernel.process_weights_after_loading = unpack_linear
    CPUWNA16LinearKernel.apply_weights = linear
    CPUExpertsInt4._supports_current_device = staticmethod(lambda: True)
    CPUExpertsInt4._supports_quant_scheme = staticmethod(lambda *_: True)
    CPUExpertsInt4.apply = experts
    int_wna16._process_weights_cpu = unpack_experts


def integers(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 ``[…, n]`` → signed ``[…, n · 32 / bits]``."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    values = (packed.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return (values - 2 ** (bits - 1)).flatten(-2)


def dequantised(packed: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """Packed ``[…, out, in · bits / 32]`` and scales ``[…, out, groups]`` → float32 ``[…, out, in]``."""
    values = integers(packed.contiguous(), bits).float()
    return values * scales.float().repeat_interleave(values.shape[-1] // scales.shape[-1], -1)


def unpack_linear(self: Any, layer: Any) -> None:
    packed, scales = getattr(layer, self.w_q_name), getattr(layer, self.w_s_name)
    words = packed.data if packed.input_dim == 1 else packed.data.t()
    scale = scales.data if scales.output_dim == 0 else scales.data.t()
    layer.plain_weight = dequantised(words, scale, self.config.weight_type.size_bits)


def linear(_: Any, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    wide = None if bias is None else bias.float()
    return functional.linear(x.float(), layer.plain_weight, wide).to(x.dtype)


def unpack_experts(
    config: Any, w13: Any, w2: Any, w13_scale: Any, w2_scale: Any, *_: Any
) -> tuple[torch.Tensor | None, ...]:
    """In the order in which vLLM keeps them: weights, scales, and six that are not needed."""
    bits = getattr(config, "weight_bits", None) or config.num_bits
    weights = dequantised(w13, w13_scale, bits), dequantised(w2, w2_scale, bits)
    return (*weights, w13_scale, w2_scale, *[None] * 6)


def experts(
    _: Any,
    output: Any,
    hidden_states: Any,
    w1: Any,
    w2: Any,
    topk_weights: Any,
    topk_ids: Any,
    *__: Any,
    **___: Any,
) -> None:
    """Each expert for the tokens that were routed to it, in float32."""
    x, found = hidden_states.float(), torch.zeros(hidden_states.shape)
    for expert in topk_ids.unique().tolist():
        tokens, place = (topk_ids == expert).nonzero(as_tuple=True)
        gate, up = functional.linear(x[tokens], w1[expert]).chunk(2, -1)
        out = functional.linear(functional.silu(gate) * up, w2[expert])
        found.index_add_(0, tokens, out * topk_weights[tokens, place].float().unsqueeze(-1))
    output.copy_(found)
