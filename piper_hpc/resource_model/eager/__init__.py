"""The step of this project's eager executor, operator by operator, priced by what was measured on the cluster."""

from piper_hpc.resource_model.eager.predict import predict, timeline

__all__ = ["predict", "timeline"]
