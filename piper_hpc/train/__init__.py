"""The training loop: data, optimizer, checkpoints and the record of every step."""
