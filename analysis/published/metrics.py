"""What a published metric means, and its value in SI units."""

from __future__ import annotations

import re
from dataclasses import dataclass

TIME, MEMORY, COMPONENT, STATUS, UNKNOWN = "time", "memory", "component", "status", "unknown"


@dataclass(frozen=True)
class Quantity:
    """What a metric measures.

    kind: `time` (a rate or duration of whole steps), `memory` (a peak of one device), `component` (part of a step or of
    the memory), `status` (ran or out of memory) or `unknown`. name: the canonical name; for a component the key of
    `Outcome.components`. convention: `causal`, `noncausal` or `hardware` where the metric's name decides how FLOPs are
    counted, else empty.
    """

    kind: str
    name: str
    convention: str = ""


STEP_TIME, TOKENS, TOKENS_GPU = "step_time_s", "tokens_per_s", "tokens_per_s_per_gpu"
SEQUENCES = "sequences_per_s"
FLOPS_GPU, FLOPS_TOTAL, MFU = "flops_per_s_per_gpu", "flops_per_s", "mfu"
TIME_ORDER = (STEP_TIME, TOKENS, TOKENS_GPU, SEQUENCES, FLOPS_GPU, FLOPS_TOTAL, MFU)
"""Which metric of a run gives its one time error: the first that it states."""

_QUANTITIES: tuple[tuple[str, str, str], ...] = (
    # a pattern on the metric's name, kind, canonical name
    (r"^status$|^oom$", STATUS, "status"),
    (r"layer.*(fwd|forward).*time", COMPONENT, "layer_forward_s"),
    (r"layer.*(bwd|backward).*time", COMPONENT, "layer_backward_s"),
    (r"layer.*t?flop", COMPONENT, "layer_flops_per_s"),
    (r"time_1f1b", COMPONENT, "overlapped_s"),
    (r"time_1f", COMPONENT, "forward_s"),
    (r"time_1b", COMPONENT, "backward_s"),
    (r"time_1w", COMPONENT, "weight_s"),
    (r"time_bubble", COMPONENT, "bubble_s"),
    (r"time_opt", COMPONENT, "optimizer_s"),
    (r"mem.*(moe_layer)", COMPONENT, "moe_layer_activation_bytes"),
    (r"mem.*activation", COMPONENT, "activations_bytes"),
    (r"mem.*(states|params|optimizer)", COMPONENT, "states_bytes"),
    (r"mem.*reserved", MEMORY, "peak_memory_reserved"),
    (r"mem", MEMORY, "peak_memory_allocated"),
    (r"normali[sz]ed|speedup|relative", UNKNOWN, "relative"),
    (r"^mfu|^hfu|pct_of_peak|percent_of_peak|model_flops_util", TIME, MFU),
    (r"aggregate.*flops|total.*flops", TIME, FLOPS_TOTAL),
    (r"flop", TIME, FLOPS_GPU),
    (r"(tok|throughput|tgs|tps).*gpu|^tgs$", TIME, TOKENS_GPU),
    (r"tok|throughput|samples_per|sequences_per|tps", TIME, TOKENS),
    (r"(step|iter|batch).*(time|_ms|_s$)|time_per_(step|iter)|seconds_per|elapsed", TIME, STEP_TIME),
)


def quantity(metric: str, unit: str) -> Quantity:
    """What `metric` measures. The unit tells per-GPU rates from totals, and names an unknown metric's kind."""
    name = metric.strip().lower().replace(" ", "_").replace("-", "_")
    found = next(((kind, key) for pattern, kind, key in _QUANTITIES if re.search(pattern, name)), (UNKNOWN, ""))
    kind, key = found
    per_gpu = re.search(r"/ ?(gpu|gcd|device|chip|rank)", unit.lower()) is not None
    if re.search(r"seq|sample", unit.lower()):
        key = SEQUENCES
    if key == TOKENS and per_gpu:
        key = TOKENS_GPU
    if key == FLOPS_TOTAL and per_gpu:
        key = FLOPS_GPU
    return Quantity(kind, key, _convention(name))


def _convention(name: str) -> str:
    if re.search(r"hw_|hardware|hfu|pct_of_peak|percent_of_peak", name):
        return "hardware"
    if re.search(r"non_?causal", name):
        return "noncausal"
    return "causal" if "causal" in name else ""


DAY_S = 86_400.0
_PREFIX = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12, "p": 1e15, "e": 1e18}
_BYTES = {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_SECONDS = {
    "s": 1.0, "sec": 1.0, "secs": 1.0, "second": 1.0, "seconds": 1.0, "s/iter": 1.0, "s/it": 1.0, "s/step": 1.0,
    "ms": 1e-3, "msec": 1e-3, "ms/iter": 1e-3, "ms/step": 1e-3, "us": 1e-6, "µs": 1e-6, "min": 60.0, "h": 3600.0,
}  # fmt: skip


class UnknownUnit(ValueError):
    """A unit that this module does not know."""


def in_si(value: float, unit: str) -> float:
    """`value` in seconds, bytes, tokens (or sequences) per second, FLOP/s or a bare ratio. Raises UnknownUnit.

    `GiB (percent of 192)` is a percentage of 192 GiB; `GiB (printed GB)` is GiB.
    """
    text = unit.strip().lower()
    if share := re.search(r"(gib|gb)?.*percent of ([\d.]+)", text):
        return value / 100 * float(share.group(2)) * _BYTES[share.group(1) or "gib"]
    text = re.sub(r"\s*\(.*?\)", "", text)
    if text in ("%", "percent", "pct"):
        return value / 100
    if text in ("x", "", "1", "ratio", "fraction"):
        return value
    if text in _SECONDS:
        return value * _SECONDS[text]
    if text in _BYTES:
        return value * _BYTES[text]
    if rate := re.fullmatch(
        r"([kmbgtpe]?) ?(tokens?|toks?|seqs?|sequences?|samples?|flops?)( ?/ ?| per )?(s|sec|second|day)?"
        r"( ?/ ?(gpu|gcd|device|chip|rank)s?)?",
        text.replace("tflops", "tflop").replace("pflops", "pflop").replace("/gpu/s", "/s/gpu"),
    ):
        return value * _PREFIX[rate.group(1)] / (DAY_S if rate.group(4) == "day" else 1)
    raise UnknownUnit(
        f"unit={unit}: must be a time (s, ms), a size (GiB, GB), a rate (tok/s, TFLOP/s, B tokens/day) or %"
    )
