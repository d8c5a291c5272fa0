"""The exchange of tokens between the ranks of an expert group: plans, and the algorithms that carry them out."""

from piper_hpc.comm.dispatcher import Dispatcher, Handle
from piper_hpc.comm.flat import FlatDispatcher

__all__ = ["Dispatcher", "FlatDispatcher", "Handle"]
