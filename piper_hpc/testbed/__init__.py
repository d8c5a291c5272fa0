"""A real multi-node Slurm on one machine: shaped links, ranks as independent devices."""
