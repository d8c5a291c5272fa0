"""What a published metric means, and its value in SI units.

The unit gives the dimension, the name what is measured; a row is read only where the two agree.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

TIME, MEMORY, COMPONENT, STATUS, UNKNOWN = "time", "memory", "component", "status", "unknown"


@dataclass(frozen=True)
class Quantity:
    """What a metric measures.

    kind: `time` (a rate or duration of whole steps), `memory` (a peak of one device), `component` (part of a step or of
    the memory), `status` (ran or out of memory) or `unknown`. name: the canonical name; for a component the key of
    `Outcome.components`. convention: `causal`, `noncausal` or `hardware` where the metric's name decides how FLOPs are
    counted, else empty. problem: why an unknown metric is unknown. unit: the printed one, or the one that stands in the
    metric's name where none is printed.
    """

    kind: str
    name: str
    convention: str = ""
    problem: str = ""
    unit: str = ""


STEP_TIME, STEPS, TOKENS, TOKENS_GPU = "step_time_s", "steps_per_s", "tokens_per_s", "tokens_per_s_per_gpu"
SEQUENCES, SEQUENCES_GPU = "sequences_per_s", "sequences_per_s_per_gpu"
FLOPS_GPU, FLOPS_TOTAL, MFU = "flops_per_s_per_gpu", "flops_per_s", "mfu"
TIME_ORDER = (STEP_TIME, STEPS, TOKENS, TOKENS_GPU, SEQUENCES, SEQUENCES_GPU, FLOPS_GPU, FLOPS_TOTAL, MFU)
"""Which metric of a run gives its one time error: the first that it states."""

_S, _BYTE, _TOK, _SEQ, _FLOP, _STEP, _RATIO = "s", "byte", "token", "sequence", "flop", "step", "ratio"
_PER_GPU = {_TOK: TOKENS_GPU, _SEQ: SEQUENCES_GPU, _FLOP: FLOPS_GPU, _STEP: STEPS}
_IN_ALL = {_TOK: TOKENS, _SEQ: SEQUENCES, _FLOP: FLOPS_TOTAL, _STEP: STEPS}

_QUANTITIES: tuple[tuple[str, str, str, str], ...] = (
    # a pattern on the metric's name, kind, canonical name (empty: by the unit), dimensions that its unit may have
    (r"^status$|^oom$", STATUS, "status", _RATIO),
    (r"normali[sz]ed|speed_?up|relative|improvement", UNKNOWN, "relative", ""),
    (r"layer.*(fwd|forward)", COMPONENT, "layer_forward_s", _S),
    (r"layer.*(bwd|backward)", COMPONENT, "layer_backward_s", _S),
    (r"layer.*t?flop", COMPONENT, "layer_flops_per_s", _FLOP),
    (r"time_1f1b", COMPONENT, "overlapped_s", _S),
    (r"time_1f", COMPONENT, "forward_s", _S),
    (r"time_1b", COMPONENT, "backward_s", _S),
    (r"time_1w", COMPONENT, "weight_s", _S),
    (r"time_bubble|bubble_time", COMPONENT, "bubble_s", _S),
    (r"time_opt|optimi[sz]er.*(time|_m?s$)", COMPONENT, "optimizer_s", _S),
    (r"mem.*(moe_layer)", COMPONENT, "moe_layer_activation_bytes", _BYTE),
    (r"mem.*activation|activation.*mem", COMPONENT, "activations_bytes", _BYTE),
    (r"mem.*(states|params|optimizer)|(states|params|optimi[sz]er).*mem", COMPONENT, "states_bytes", _BYTE),
    (r"mem.*reserved|reserved.*mem", MEMORY, "peak_memory_reserved", _BYTE),
    (r"mem|(^|_)v?hbm|vram", MEMORY, "peak_memory_allocated", _BYTE),
    (r"(^|_)(mfu|hfu)|(pct|percent|fraction|%)_of_.*peak|model_flops?_util", TIME, MFU, _RATIO),
    (r"all_?to_?all|a2a|comm|dispatch|forward|fwd|backward|bwd|bubble|attention|layer", UNKNOWN, "part", ""),
    (r"micro_?batch", UNKNOWN, "part", ""),
    (r"flop", TIME, "", _FLOP),
    (r"tok|tgs|tps", TIME, "", _TOK),
    (r"sample|seq|example", TIME, "", _SEQ),
    (r"throughput|speed|^rate$|performance", TIME, "", f"{_TOK} {_SEQ} {_FLOP} {_STEP}"),
    (r"(steps?|iters?|iterations?|batches|batch)_?(per|/)_?s|^it_?/?_?s$", TIME, STEPS, _STEP),
    (r"step|iter|batch|elapsed|seconds_per|^time$|^latency$", TIME, STEP_TIME, _S),
)


def quantity(metric: str, unit: str) -> Quantity:
    """What `metric` measures. The unit tells its dimension, and per-GPU rates from totals.

    A name without a meaning, or one that its unit contradicts, is `unknown` with the reason as `problem`.
    """
    name = re.sub(r"[\s\-/()\[\]]+", "_", metric.strip().lower()).strip("_")
    found = next((entry for entry in _QUANTITIES if re.search(entry[0], name)), ("", UNKNOWN, "", ""))
    _, kind, key, dimensions = found
    if kind == STATUS:
        return Quantity(kind, key)
    if kind == UNKNOWN:
        problem = f"metric={metric}: is relative, a part or unknown; use a step time, a rate, a share or a size"
        return Quantity(kind, key, problem=problem)
    unit = unit.strip() or _implied(name)
    if unit and re.search(r"(^|_)(per|/)_s|throughput|tgs|tps|_sec(ond)?(_|$)", name):
        unit = re.sub(r"^((?:\w )?(?:k|m)?(?:tokens?|toks?|samples?|sequences?))$", r"\1/s", unit, flags=re.I)
    try:
        read = _read(unit)
    except UnknownUnit as error:
        return Quantity(UNKNOWN, key, problem=str(error), unit=unit)
    if read.dimension not in dimensions.split():
        problem = f"unit={unit or '(empty)'}: must be a {_EXPECTED_UNIT[dimensions.split()[0]]} for metric={metric}"
        return Quantity(UNKNOWN, key, problem=problem, unit=unit)
    return Quantity(kind, key or _rate(name, read), _convention(name), unit=unit)


def _rate(name: str, read: _Unit) -> str:
    """The canonical name of a rate: per GPU as unit or name say; PFLOP/s are too many for one."""
    per_gpu = read.per_gpu or bool(re.search(r"(^|_)(gpu|gcd|device|chip|rank|accelerator|card|tgs)(_|$)", name))
    if read.dimension == _FLOP and not per_gpu:
        per_gpu = read.factor < 1e15 and not re.search(r"aggregate|total|cluster|system", name)
    return (_PER_GPU if per_gpu else _IN_ALL)[read.dimension]


def _implied(name: str) -> str:
    """The unit that stands in a metric's name, `step_time_ms` or `tflops_per_gpu`, else an empty one."""
    for pattern, unit in (
        (r"([kmgtpe]flop)", r"\1/s"), (r"(^|_)(tgs|tok.*(gpu|device|chip))", "tok/s/gpu"), (r"tok.*_s|tps", "tok/s"),
        (r"(sample|seq).*_s(ec|$|_)", "samples/s"), (r"_(gib|gb|mib|mb)(_|$)", r"\1"), (r"_(ms|sec|seconds|s)$", r"\1"),
    ):  # fmt: skip
        if found := re.search(pattern, name):
            return found.expand(unit)
    return ""


def _convention(name: str) -> str:
    if re.search(r"hw_|hardware|hfu|pct_of_peak|percent_of_peak", name):
        return "hardware"
    if re.search(r"non_?causal", name):
        return "noncausal"
    return "causal" if "causal" in name else ""


_PREFIX = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12, "p": 1e15, "e": 1e18}
_PREFIX |= {"thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12, "giga": 1e9, "tera": 1e12, "peta": 1e15}
_BYTES = {"b": 1, "byte": 1, "bytes": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "gbytes": 1e9,
          "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}  # fmt: skip
_SECONDS = {"s": 1.0, "sec": 1.0, "secs": 1.0, "second": 1.0, "seconds": 1.0, "ms": 1e-3, "msec": 1e-3, "msecs": 1e-3,
            "millisecond": 1e-3, "milliseconds": 1e-3, "us": 1e-6, "µs": 1e-6, "min": 60.0, "mins": 60.0,
            "minute": 60.0, "minutes": 60.0}  # fmt: skip
_LONG = {"h": 3600.0, "hr": 3600.0, "hour": 3600.0, "hours": 3600.0, "day": 86_400.0, "days": 86_400.0, "d": 86_400.0}
"""Units of a whole training, never of a step: known below a rate only."""
_COUNTED: Mapping[str, str] = {
    _TOK: r"tok(en)?s?", _SEQ: r"seqs?|sequences?|samples?|examples?", _FLOP: r"flops?",
    _STEP: r"its?|iters?|iterations?|steps?|batch(es)?",
}  # fmt: skip
_DEVICE = r"gpus?|gcds?|devices?|chips?|ranks?|accelerators?|cards?"
_EXPECTED_UNIT = {
    _S: "time (s, ms)", _BYTE: "size (GiB, GB)", _TOK: "rate of tokens (tok/s)", _SEQ: "rate of sequences (seq/s)",
    _FLOP: "rate of FLOPs (TFLOP/s)", _STEP: "rate of steps (it/s)", _RATIO: "share (%)",
}  # fmt: skip


class UnknownUnit(ValueError):
    """A unit that this module does not know."""


@dataclass(frozen=True)
class _Unit:
    """dimension: of a rate, what is counted in a second. factor: in SI units."""

    dimension: str
    factor: float
    per_gpu: bool = False


def in_si(value: float, unit: str) -> float:
    """`value` in seconds, bytes, tokens (or sequences) per second, FLOP/s or a bare ratio. Raises UnknownUnit.

    `GiB (percent of 192)` is a percentage of 192 GiB; `GiB (printed GB)` is GiB.
    """
    return value * _read(unit).factor


def _read(unit: str) -> _Unit:
    text = unit.strip().lower()
    if share := re.search(r"(gib|gb)?.*(?:percent|%) of ([\d.]+)", text):
        return _Unit(_BYTE, float(share.group(2)) / 100 * _BYTES[share.group(1) or "gib"])
    text = re.sub(r"\(([a-z]+)[ *·.]?(gpu|device)\)", r"\1/\2", text)
    text = re.sub(r"\s*\(.*?\)", "", text).strip()
    if re.fullmatch(r"%|percent|pct|(%|percent|pct) (mfu|hfu|of peak)", text):
        return _Unit(_RATIO, 0.01)
    if text in ("x", "", "1", "ratio", "fraction"):
        return _Unit(_RATIO, 1.0)
    top, *below = re.split(r"\s*/\s*|\s+per\s+|(?<=gpu)[ -](?=s)|(?<=s)[ *·-](?=gpu)", text)
    top = re.sub(r"(flop)[s/]?$", r"\1", top)
    seconds = [scale for word in below if (scale := (_SECONDS | _LONG).get(word))]
    per_gpu = any(re.fullmatch(_DEVICE, word) for word in below)
    per_step = any(re.fullmatch(_COUNTED[_STEP], word) for word in below)
    known = len(seconds) + per_gpu + per_step == len(below)
    if known and not seconds and top in _SECONDS and not per_gpu:
        return _Unit(_S, _SECONDS[top])
    if known and not seconds and not per_step and top in _BYTES:
        return _Unit(_BYTE, _BYTES[top], per_gpu)
    for dimension, pattern in _COUNTED.items():
        counted = re.fullmatch(rf"({'|'.join(_PREFIX)})[ -]?({pattern})", top)
        if counted and known and not per_step and len(seconds) == 1 - (dimension == _FLOP and not seconds):
            return _Unit(dimension, _PREFIX[counted.group(1)] / (seconds[0] if seconds else 1.0), per_gpu)
    raise UnknownUnit(
        f"unit={unit}: must be a time of a step (s, ms), a size (GiB, GB), a rate (tok/s, TFLOP/s, B tokens/day) or %"
    )
