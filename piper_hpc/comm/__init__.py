"""All-to-all of tokens between the ranks of an expert group: plans, and the dispatchers that carry them out."""

from piper_hpc.comm.flat import FlatDispatcher
from piper_hpc.comm.halo import HaloDispatcher

__all__ = ["FlatDispatcher", "HaloDispatcher"]
