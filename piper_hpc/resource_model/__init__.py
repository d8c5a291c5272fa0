"""From a model, a layout and a measured cluster to time by term and memory by stage. No torch, no processes."""

from piper_hpc.resource_model.errors import ResourceModelError
from piper_hpc.resource_model.flops import FLOP_CONVENTION, flops_per_token
from piper_hpc.resource_model.predict import predict

__all__ = ["FLOP_CONVENTION", "ResourceModelError", "flops_per_token", "predict"]
