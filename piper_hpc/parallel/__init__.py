"""How one rank takes part: process groups, its pipeline stage, and the gradients it shares."""
