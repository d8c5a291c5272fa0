"""Which accelerator, cluster, model family, framework and schedule the words of a row name."""

from __future__ import annotations

import re
from collections.abc import Sequence

from analysis.validation.published.request import Refused
from analysis.validation.published.rows import PublishedRun

DEVICES: tuple[tuple[str, str, str, str], ...] = (
    # a pattern on the GPU column, accelerator, cluster whose node and network it stands for, what is taken for granted
    (r"mi250x?.*lumi|lumi.*mi250", "mi250x_gcd", "lumi_g", ""),
    (r"mi250x?", "mi250x_gcd", "frontier", ""),
    (r"mi300x?(?![\da-z])", "mi300x", "mi325x", ""),
    (r"mi325x?", "mi325x", "mi325x", ""),
    (r"mi350x?", "mi355x", "mi355x", "MI350X is taken as MI355X, which clocks higher"),
    (r"mi355x?", "mi355x", "mi355x", ""),
    (r"gb300", "gb200", "gb200_nvl72", "GB300 is taken as GB200"),
    (r"gb200", "gb200", "gb200_nvl72", ""),
    (r"gh200.*delta", "gh200", "deltaai", ""),
    (r"gh200", "gh200", "alps", ""),
    (r"b300", "b200", "b200", "B300 is taken as B200"),
    (r"b200", "b200", "b200", ""),
    (r"h200", "h200", "dgx_h100", ""),
    (r"h100.*(pcie|nvl\b)", "h100", "dgx_h100", "H100 PCIe or NVL is taken as H100 SXM"),
    (r"h100", "h100", "dgx_h100", ""),
    (r"h800", "h800", "h800", ""),
    (r"a800", "a100_80gb", "dgx_a100", "A800 is taken as A100 80 GB; its NVLink, cut from 600 to 400 GB/s, is not"),
    (r"a100.*perlmutter.*80|a100.*80.*perlmutter", "a100_80gb", "perlmutter", ""),
    (r"a100.*perlmutter", "a100_40gb", "perlmutter", ""),
    (r"a100.*(juwels|jwb)", "a100_40gb", "juwels_booster", ""),
    (r"a100.*(leonardo|(?<!\d)64 ?-?gi?b)|leonardo.*a100", "a100_64gb_custom", "leonardo_booster", ""),
    (r"a100.*(?<!\d)80 ?-?gi?b", "a100_80gb", "dgx_a100", ""),
    (r"a100.*(?<!\d)40(?!\d)", "a100_40gb", "dgx_a100", ""),
    (r"a100", "a100_80gb", "dgx_a100", ""),
)
KNOWN = tuple(dict.fromkeys(accelerator for _, accelerator, _, _ in DEVICES))


def device(gpu: str) -> tuple[str, str, str]:
    """(accelerator, cluster, what is taken for granted) of a GPU column.

    Raises Refused for one that names no known accelerator: H20 and MI308X compute a fraction of H100 and MI300X.
    """
    text = re.sub(r"[_\s]+", " ", gpu.lower())
    text = re.sub(r"\b\d+ ?[x*\u00d7] ?(?=[a-z])|dgx|hgx", " ", text)
    text = re.sub(r"\b(mi|gb|gh|[abh])[ -](?=\d{3})", r"\1", text)
    for pattern, accelerator, cluster, taken in DEVICES:
        if re.search(rf"(?<![a-z\d])(?:{pattern})", text):
            return accelerator, cluster, taken
    raise Refused(f"gpu={gpu or '(empty)'}: must name one of {', '.join(KNOWN)}")


def names_no_device(gpu: str) -> bool:
    """Whether a GPU column is empty or says that the type is not stated; another device's name is neither."""
    return not gpu.strip() or re.search(r"not (stated|given|named)|unknown|unspecified", gpu, re.I) is not None


_SIZE = re.compile(
    r"a?\d+(\.\d+)?[bmt]|\d+x\d+(\.\d+)?b|e\d+|single|layer|small|medium|large|super|sr|lr|base|lite", re.I
)
_ALIASES = {
    "GPT-3": "GPT",
    "MT-NLG": "GPT",
    "GPT3": "GPT",
    "Megatron-GPT": "GPT",
    "Llama-3": "Llama3",
    "Llama-2": "Llama2",
}


def without_parentheses(model: str) -> str:
    """The model's name without what stands in parentheses: `Mixtral-8x22B (1 layer)` is `Mixtral-8x22B`."""
    return re.sub(r"\s*\(.*?\)", "", model).strip()


def family(model: str) -> str:
    """The name without sizes: `Qwen2-57B-A14B` is `Qwen2`, `GPT 22B single layer` and `MT-NLG 530B` are `GPT`."""
    words = [word for word in re.split(r"(?<=[^\s_-])(?=[\s_-])", without_parentheses(model)) if word]
    kept = "".join(word for word in words if not _SIZE.fullmatch(word.strip(" _-"))).strip(" _-")
    kept = re.sub(r"^(Llama-?[234])(\.\d)?", r"\1", kept, flags=re.I)
    return _ALIASES.get(kept, kept or without_parentheses(model))


def framework(run: PublishedRun) -> tuple[str, str]:
    """(framework, the method or system as printed), by the words of the row; Megatron where they name none."""
    method = run.note("method") or run.note("system")
    words = f"{method} {run.cells['notes']} {run.cells['source']}".lower() if not method else method.lower()
    if re.search(r"fsdp|torchtitan", words) or run.number("zero_stage") == 3:
        return "fsdp", method
    if re.search(r"deepspeed|tutel|x-moe", words):
        return "deepspeed", method
    if re.search(r"deepseek-v3|dualpipe", words) or "dualpipe" in run.cells["vpp"].lower():
        return "deepseek", method
    if re.search(r"\bpiper\b", words):
        return "piper", method
    return "megatron", method


def same_method(run: PublishedRun, other: PublishedRun) -> bool:
    """Whether two runs of a document are of one framework and one method or system: they share its frameworks."""
    return all(run.note(key) == other.note(key) for key in ("method", "system")) and framework(run) == framework(other)


_SCHEDULES: tuple[tuple[str, str, str], ...] = (
    (r"dualpipe-?v", "dualpipev", ""),
    (r"dualpipe", "dualpipev", "DualPipe is modelled as DualPipeV, its form without a second copy of the weights"),
    (r"zb-?v|zero.?bubble.?v", "zbv", ""),
    (r"zb-?b|zb-?h1|zero.?bubble", "zb_h1", "modelled as ZB-H1"),
    (r"interleav|\bvpp", "interleaved", ""),
    (r"g-?pipe", "gpipe", ""),
    (r"1f1b", "1f1b", ""),
)


def schedule(run: PublishedRun) -> tuple[str, str]:
    """(schedule, remark) that `vpp` or `schedule=` names, or ("", "") for none. Raises Refused for one not modelled."""
    text = f"{run.cells['vpp']} {run.note('schedule')}".lower()
    if found := re.search(r"v-?(half|min)|zb-?h2|seq1f1b|chimera|hanayo", text):
        raise Refused(f"schedule={found.group(0)}: must be one of gpipe, 1f1b, interleaved, zb_h1, zbv, dualpipev")
    for pattern, name, remark in _SCHEDULES:
        if re.search(pattern, text):
            return name, remark if pattern != r"zb-?b|zb-?h1|zero.?bubble" or "h1" not in text else ""
    return "", ""


def choices(text: str, degree: str) -> Sequence[int]:
    """The set that a note searched, `best EP in {32,64}` -> (32, 64); empty where it names none."""
    found = re.search(rf"\b{degree} in \{{([\d, ]+)\}}", text, re.I)
    return tuple(int(number) for number in found.group(1).split(",")) if found else ()
