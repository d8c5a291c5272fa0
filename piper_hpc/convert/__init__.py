"""Weights between this project's checkpoints and the safetensors of a Hugging Face model, both ways."""
