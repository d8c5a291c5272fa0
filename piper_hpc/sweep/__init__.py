"""Many points of one command: composed once and varied, checked and predicted, run in pools that drain a shared list.

compose.py is Hydra's side of `-m`, points.py what each point is and costs, shape.py which points share a job, submit.py
puts pools into the queue, pool.py is what a job of a pool does. What a sweep leaves is read in piper_hpc.runs.sweeps.
"""
