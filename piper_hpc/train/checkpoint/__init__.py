"""Checkpoints under global logical names: any layout reads what another wrote, as safetensors, without unpickling."""

from piper_hpc.train.checkpoint.read import load
from piper_hpc.train.checkpoint.state import Progress
from piper_hpc.train.checkpoint.write import Saver

__all__ = ["Progress", "Saver", "load"]
