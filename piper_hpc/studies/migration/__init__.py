"""What expert migration brings: planners on recorded and made loads, and training with and without it, step by step."""
