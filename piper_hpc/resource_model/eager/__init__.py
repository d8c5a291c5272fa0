"""The step of this project's eager executor, operator by operator, priced by what was measured on the cluster."""
