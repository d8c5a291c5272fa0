"""How a framework carries out a step: which kernels are fused, and which communication overlaps compute."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Execution:
    """How one framework carries out a step: what time and memory depend on beside the layout.

    name: `piper` is this project's eager executor; the others are modelled after published frameworks.
    flash: attention without stored scores. sequence_parallel: norms and residuals are split over tp as well.
    dropout: masks are drawn, kept and applied. fused_loss: one kernel over the logits instead of several in fp32.
    fused_optimizer: one kernel updates a parameter; else gradients are unscaled, checked, clipped and copied in passes.
    fused_accumulation: products of weight gradients add to the sum themselves (Apex, since the end of 2021).
    overlap_grads: gradients are reduced beside the last backward. overlap_shards: ZeRO 3 gathers weights and scatters
    gradients beside compute, as FSDP2 does; without, a plan gets no credit for what may not be hidden.
    overlap_p2p: stage messages beside compute. overlap_experts: dispatch and combine beside another micro-batch.
    transformer_engine: weight gradients go through buffers that stay allocated.
    """

    name: str
    flash: bool = True
    sequence_parallel: bool = True
    dropout: bool = False
    fused_loss: bool = True
    fused_optimizer: bool = True
    fused_accumulation: bool = True
    overlap_grads: bool = True
    overlap_shards: bool = False
    overlap_p2p: bool = True
    overlap_experts: bool = False
    transformer_engine: bool = True


_MEGATRON_2022 = Execution(
    "megatron_2022",
    flash=False,
    sequence_parallel=False,
    dropout=True,
    fused_loss=False,
    fused_optimizer=False,
    overlap_grads=False,
    overlap_p2p=False,
    transformer_engine=False,
)
"""Megatron-LM of arXiv 2205.05198: stored scores, dropout, own kernels."""

EXECUTIONS = {
    execution.name: execution
    for execution in (
        Execution("piper", sequence_parallel=False, fused_loss=False, overlap_grads=False, overlap_p2p=False),
        Execution("megatron"),
        _MEGATRON_2022,
        # Megatron-LM of arXiv 2104.04473.
        replace(_MEGATRON_2022, name="megatron_2021", fused_accumulation=False),
    )
}
