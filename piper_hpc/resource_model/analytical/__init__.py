"""Steps under fused kernels and every axis of parallelism, in closed form, for one layout or a grid of them."""

from piper_hpc.resource_model.analytical.device import Times
from piper_hpc.resource_model.analytical.interval import half_widths
from piper_hpc.resource_model.analytical.predict import predict, simulate, timeline
from piper_hpc.resource_model.analytical.step import Step, Stepper, stepper

__all__ = ["Step", "Stepper", "Times", "half_widths", "predict", "simulate", "stepper", "timeline"]
