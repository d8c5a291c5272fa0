"""The torch modules of a Mixture-of-Experts transformer, cut into pipeline stages."""

from piper_hpc.model.transformer import Stage

__all__ = ["Stage"]
