"""Small tokenizers made on the spot: one id a word."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors

EOS = "<|endoftext|>"


def word_tokenizer(path: Path, *, extra: int = 0, cutting: bool = False) -> Path:
    """Knows `a` to `h` and w0, w1, ... up to `extra`; cutting: as made for sequences of a fixed length."""
    words = [*"abcdefgh", *(f"w{number}" for number in range(extra))]
    made = Tokenizer(models.WordLevel({"[UNK]": 0} | {word: id for id, word in enumerate(words, 1)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["[UNK]", EOS])
    if cutting:
        made.enable_truncation(2)
        made.enable_padding(length=9)
        made.post_processor = processors.TemplateProcessing(
            single=f"{EOS} $A", special_tokens=[(EOS, made.token_to_id(EOS))]
        )
    made.save(str(path))
    return path
