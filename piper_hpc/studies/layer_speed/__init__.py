"""How fast one layer is, beside `transformers` and beside dense products of as many FLOPs."""
