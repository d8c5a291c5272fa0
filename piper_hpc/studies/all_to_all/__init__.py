"""What `make bench-a2a` measured, judged: every algorithm against flat and MPI, `auto`, and the cost model."""
