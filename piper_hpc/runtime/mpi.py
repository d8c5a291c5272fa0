"""MPI beside torch.distributed, for micro-benchmarks that take it as the vendor's reference. Imported on demand."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import import_module
from typing import Any


class MpiError(RuntimeError):
    """MPI is not there, or does not see the ranks of the job."""


@cache
def load() -> Any:
    """mpi4py's MPI; loading it starts MPI.

    Frontier wants it before torch: else MPICH may stop with "Unable to use a NIC_POLICY of 'NUMA'".

    MPI starts in a thread of its own, for the sake of that thread's fresh memory: MPICH over UCX (5.0.2) publishes 4 KB
    from the start of a rank's address, whatever lies behind it, in lines that Slurm's PMI cuts at 1,024 characters. In
    a process that has worked before, lines may be as long, and the job hangs. Raises MpiError where mpi4py or an MPI
    library is missing, and where the library may be used by the thread alone that started it.
    """
    try:
        with ThreadPoolExecutor(max_workers=1) as thread:
            MPI = thread.submit(import_module, "mpi4py.MPI").result()
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py is there, an MPI library is not
        raise MpiError(
            f"task.backend=mpi needs mpi4py and an MPI library ({error}): pip install 'piper-hpc[mpi]', or the site's "
            "own build of mpi4py; task.backend=torch needs neither"
        ) from error
    if MPI.Query_thread() < MPI.THREAD_SERIALIZED:
        raise MpiError(
            f"task.backend=mpi needs an MPI library that threads may use in turn (MPI_THREAD_SERIALIZED); this one "
            f"grants level {MPI.Query_thread()}: {MPI.Get_library_version().splitlines()[0]}"
        )
    return MPI


def world(ranks: int, rank: int) -> Any:
    """MPI's communicator of all ranks, in the job's order. Raises MpiError where MPI does not see the job's ranks."""
    MPI = load()
    found = MPI.COMM_WORLD.Get_size()
    if found != ranks:
        raise MpiError(
            f"MPI sees {found} ranks, the job has {ranks}: they must be started by a launcher that speaks to this MPI, "
            "for example +cluster.environment.SLURM_MPI_TYPE=pmi2 (what `srun --mpi=list` shows and the library has)"
        )
    return MPI.COMM_WORLD.Split(0, rank)


def library() -> str:
    """Name and version of the MPI library, one line."""
    return str(load().Get_library_version()).splitlines()[0].strip("\x00 ")
