"""Text into folders of token ids, by a tokenizer's file and without a network."""
