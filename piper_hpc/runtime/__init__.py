"""One rank and the machine below it: rank environment, device, process groups, MPI, CPU quota, failure classes."""
