"""`python docs/plan_output.py [--check]`: run the README's plan and put ten lines of what it prints below its command.

With --check nothing is written, and the exit code is 1 where the README shows something else than the command prints.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"
REGION = re.compile(r"(?<=<!-- plan output -->\n).*?(?=<!-- end of plan output -->)", re.DOTALL)
FIRST = 7
"""Lines from the top: what is planned, and the best layouts."""
THEN = ("the best spends", "its fullest rank", "rests on:")
"""How the other lines that are shown begin."""


def main() -> int:
    """The command."""
    text = README.read_text(encoding="utf-8")
    command = next(line for line in text.splitlines() if line.startswith("python ") and "task=plan" in line)
    words = [sys.executable, *shlex.split(command)[1:]]
    environment = {**os.environ, "COLUMNS": "120"}
    printed = subprocess.run(
        words, capture_output=True, text=True, check=True, cwd=README.parent, env=environment
    ).stdout
    lines = [line.rstrip() for line in printed.splitlines()]
    shown = [*lines[:FIRST], "...", *(line for line in lines[FIRST:] if line.startswith(THEN))]
    wanted = REGION.sub(lambda _: "```text\n" + "\n".join(shown) + "\n```\n", text)
    if "--check" in sys.argv[1:]:
        print("the README's plan is what the command prints" if wanted == text else "stale: run docs/plan_output.py")
        return int(wanted != text)
    README.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
