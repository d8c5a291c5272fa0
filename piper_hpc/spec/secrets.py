"""What looks like a secret in a text that a script, a configuration or a record would keep."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSPHRASE|PASSWD|CREDENTIAL)S?$", re.IGNORECASE)
"""Names of variables that hold one, such as WANDB_API_KEY."""
NOT_SHOWN = "(not shown)"
SHORTEST = 16
"""Characters from which on a variable's value is searched for: shorter ones are in any text by chance."""

_ASSIGNED = re.compile(
    r"(?<!\w)([A-Za-z_][\w.]*?(?:KEY|TOKEN|SECRET|PASSWORD|PASSPHRASE|PASSWD|CREDENTIAL)S?)="
    r"(?!(?:null|true|false|[\d.]+)(?!\w))[^\s,]+",
    re.IGNORECASE,
)
# https://user:password@host, and https://token@host; of ssh a bare user is no secret.
_USER_OF_URL = re.compile(r"(\w+://)[^\s/@:]*:[^\s/@]+(?=@)|(https?://)[^\s/@]+(?=@)", re.IGNORECASE)
_TOKEN = re.compile(
    r"\b(?:gh[oprsu]_\w{30,}|github_pat_\w{30,}|glpat-[\w-]{20,}|hf_[A-Za-z0-9]{30,}|xox[abp]-[\w-]{20,}"
    r"|sk-[\w-]{30,}|(?:AKIA|ASIA)[0-9A-Z]{16}|local-[0-9a-f]{40})\b"
)
"""The forms of GitHub, GitLab, Hugging Face, Slack, OpenAI, AWS and of a wandb server of one's own."""


def hidden(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """The text with NOT_SHOWN for every secret: assigned to a secret's name, before the host of a URL, of the form of a
    known token, or the value of a secret variable of `environ`."""
    text = _ASSIGNED.sub(rf"\1={NOT_SHOWN}", text)
    text = _USER_OF_URL.sub(lambda found: f"{found[1] or found[2]}{NOT_SHOWN}", text)
    text = _TOKEN.sub(NOT_SHOWN, text)
    for name, value in environ.items():
        # A path to a file with the secret is none.
        if SECRET_NAME.search(name) and len(value) >= SHORTEST and not value.startswith("/"):
            text = text.replace(value, NOT_SHOWN)
    return text


def has_secret(text: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether `hidden` would hide something."""
    return hidden(text, environ) != text
