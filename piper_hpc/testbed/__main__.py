"""`python -m piper_hpc.testbed {up,status,down}`: a real multi-node Slurm on this machine.

Exit codes: 0 done (status: up and healthy), 1 failed (status: not up, or broken), 2 bad input or a machine that cannot.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

from piper_hpc.testbed import lifecycle, options, profile, state
from piper_hpc.testbed.faults import FAILED, Fault
from piper_hpc.testbed.state import Testbed


class Parser(argparse.ArgumentParser):
    """Complains as the rest of the room does."""

    def error(self, message: str) -> NoReturn:
        raise Fault("arguments", " ".join(sys.argv[1:]) or "none", message, "python -m piper_hpc.testbed up --nodes 4")


def parser() -> Parser:
    """The command line: every option of `up` is a flag, checked in one place (options.parse)."""
    top = Parser(prog="python -m piper_hpc.testbed", description=__doc__, allow_abbrev=False)
    commands = top.add_subparsers(dest="command", required=True, metavar="{up,status,down}")
    for name, text in (
        ("up", "start it, measure its links, and record it for cluster=testbed"),
        ("status", "show it"),
        ("down", "remove every trace of it"),
    ):
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.add_argument("--json", action="store_true", help="one JSON document on stdout")
        if name == "up":
            for key, default in options.Options().document().items():
                command.add_argument(options.flag(key), help=f"{options.HELP[key]} (default {default})")
    return top


def describe(testbed: Testbed) -> dict[str, object]:
    """The record with how it is now, for `status`."""
    health = lifecycle.health(testbed)
    return {
        **testbed.document(),
        "up": not health.problems,
        "problems": health.problems,
        "daemons": health.daemons,
        "node_states": health.node_states,
    }


def show(testbed: Testbed) -> str:
    """The same for people."""
    health = lifecycle.health(testbed)
    lines = [
        f"testbed   {'up' if not health.problems else 'BROKEN: ' + '; '.join(health.problems)}, since {testbed.created}"
    ]
    for node in testbed.nodes:
        slurm_state = health.node_states.get(node.name, "unknown")
        lines.append(f"node      {node.name:<6}{node.address:<16}{node.rack:<8}{slurm_state}")
    limits = f"{testbed.cpu_share:g} of a core ({testbed.period_us / 1000:g} ms period)"
    lines.append(f"devices   {testbed.ranks_per_node} a node, each {limits}, {testbed.memory_bytes / 2**30:.2f} GiB")
    for kind in state.LINK_KINDS:
        if kind in testbed.links:
            link = testbed.links[kind]
            rates = (link.configured_bytes_per_s * 8e-6, link.measured_bytes_per_s * 8e-6)
            lines.append(f"link      {kind:<6}{rates[0]:8.1f} Mbit/s configured, {rates[1]:8.1f} measured")
    if testbed.scaling:
        lines.append(profile.show(testbed))
    lines.append("use       export " + " ".join(f"{key}={value}" for key, value in testbed.environment.items()))
    return "\n".join(lines)


def run(command: str, arguments: dict[str, str | None]) -> tuple[int, dict[str, object], str]:
    """One command: exit code, document, and text for people."""
    if command == "up":
        testbed, was_up = lifecycle.up(options.parse(arguments))
        if was_up:
            print("already up with these options", file=sys.stderr)
        return 0, {**describe(testbed), "was_up": was_up}, show(testbed)
    if command == "down":
        removed = lifecycle.down()
        text = "removed" if removed else "nothing to remove"
        return 0, {"schema_version": state.SCHEMA_VERSION, "up": False, "removed": removed}, f"testbed   {text}"
    found = state.read()
    if found is None:
        return FAILED, {"schema_version": state.SCHEMA_VERSION, "up": False}, "testbed   not up"
    document = describe(found)
    return (0 if document["up"] else FAILED), document, show(found)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    """Entry of the command: messages go to stderr, the answer alone to stdout."""
    as_json = "--json" in sys.argv[1:]
    os.umask(0o022)  # others may read the record, whatever the caller's shell says
    os.environ["PATH"] = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        arguments = vars(parser().parse_args())
        code, document, text = run(arguments.pop("command"), arguments)
    except Fault as fault:
        print(f"testbed: {fault}", file=sys.stderr)
        code = fault.exit_code
        document = {"schema_version": state.SCHEMA_VERSION, "up": False, "error": fault.document()}
        text = ""
    except KeyboardInterrupt:
        print("testbed: interrupted; what `up` had started was removed", file=sys.stderr)
        return 130
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader may stop after the first line
    if as_json:
        print(json.dumps(document))
    elif text:
        print(text)
    return code


if __name__ == "__main__":
    sys.exit(main())
