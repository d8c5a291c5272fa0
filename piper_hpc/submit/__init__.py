"""From a prepared run to a job, and from a job's end to the run's status."""
