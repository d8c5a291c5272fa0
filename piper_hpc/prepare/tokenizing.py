"""A Hugging Face tokenizer's file, as `tokenizers` runs it: text to ids, without a network."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from piper_hpc.config import ConfigError, Problem


class Tokenizer:
    """Ids of texts, and of what stands behind each document.

    No special tokens are added, nothing is cut off or filled up, whatever the file says of that: it is for sequences,
    and these are documents.
    """

    def __init__(self, path: Path, eos: str | None) -> None:
        """Raises ConfigError where the package or the file is missing, is none, or does not know `eos`."""
        if find_spec("tokenizers") is None:
            rule = "needs the tokenizers package: pip install 'piper-hpc[data]'"
            raise ConfigError(Problem("--tokenizer", str(path), rule, "pip install tokenizers"))
        import tokenizers

        if not path.is_file():
            rule = "must be a tokenizer.json of Hugging Face tokenizers, a file on this machine: nothing is downloaded"
            raise ConfigError(Problem("--tokenizer", str(path), rule, "--tokenizer MODEL/tokenizer.json"))
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises bare Exception
            rule = f"is no tokenizer.json of Hugging Face tokenizers: {error}"
            raise ConfigError(Problem("--tokenizer", str(path), rule, "--tokenizer MODEL/tokenizer.json")) from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.library = f"tokenizers {tokenizers.__version__}"
        known = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab = max(known.values()) + 1
        if eos is not None and eos not in known:
            added = [token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special]
            rule = f"is no token of {path}; its special tokens are {', '.join(added) or 'none'}"
            raise ConfigError(Problem("--eos", eos, rule, f"--eos '{added[-1]}'" if added else "no --eos"))
        self.eos: int | None = None if eos is None else known[eos]

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Of each text, on all cores; with eos behind each that has any."""
        end = [] if self.eos is None else [self.eos]
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [found.ids + end if found.ids else [] for found in encoded]
