"""Folders of token ids: their format, and the order in which training reads samples from them. Torch-free."""
