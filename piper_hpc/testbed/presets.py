"""Machines of conf/cluster and models of conf/model as scaling needs them, read as plain YAML."""

from __future__ import annotations

from typing import Any

import yaml

from piper_hpc.paths import data_folder
from piper_hpc.spec import TIERS
from piper_hpc.testbed.faults import Fault
from piper_hpc.testbed.scaling import FULL_BYTES, FullMachine, Layer

LAYER_FLOPS = {
    "mi250x_gcd": (1.0e14, "arXiv 2605.05049, Fig 11: 78 to 129, on average 102 TFLOP/s a GCD over one MoE layer")
}
"""What a device achieves over a whole MoE layer, where that was published; others: what grouped products reach."""
LACKING = {
    "attention": ("gqa", "MLA attention"),
    "shared_experts": (0, "shared experts: {} beside {} routed ones a token"),
    "dense_first": (0, "leading dense layers"),
    "dense_residual_ffn": (0, "a dense residual beside the experts"),
    "expert_groups": (0, "group-limited routing"),
    "mtp_layers": (0, "multi-token prediction"),
}


def names(group: str) -> list[str]:
    """Files of a group of conf/."""
    return sorted(path.stem for path in (data_folder("conf") / group).glob("*.yaml"))


def _read(group: str, name: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((data_folder("conf") / group / f"{name}.yaml").read_text())
    return document


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def machine(name: str, achieved_tflop_per_s: float | None = None) -> FullMachine:
    """Machine `name` with the rates of its data sheet. Raises Fault where there is none, or too little is public."""
    usable = [other for other in names("cluster") if "data_sheet" in _read("cluster", other)]
    if name not in usable:
        raise Fault(
            "--profile", name, f"must be a machine with a data sheet: {', '.join(usable)}", "--profile frontier"
        )
    document = _read("cluster", name)
    device = _read("accelerator", document["accelerator"])
    links = {
        tier: link
        for tier, link in document["data_sheet"]["links"].items()
        if link.get("bytes_per_s") is not None and link.get("latency_s") is not None
    }
    far = [tier for tier in TIERS[TIERS.index("node") + 1 :] if tier in links]
    if "node" not in links or not far:
        rule = "needs links inside and between nodes, and its file does not know both"
        raise Fault("--profile", name, rule, "--profile frontier")
    flops, source = _achieved(document, device, achieved_tflop_per_s)
    tiers = {"node": "node", "nic": far[0], "system": far[-1]}
    memory = document.get("memory_gib_per_rank")
    return FullMachine(
        name=name,
        ranks_per_node=document["ranks_per_node"] * (document.get("topology") or {}).get("hosts_per_node", 1),
        memory_bytes=memory * 2**30 if memory else float(device["memory_bytes"]),
        flops_per_s=flops,
        bytes_per_s={kind: float(links[tier]["bytes_per_s"]) for kind, tier in tiers.items()},
        latency_s={kind: float(links[tier]["latency_s"]) for kind, tier in tiers.items()},
        sources={"flops_per_s": source}
        | {kind: str(document["sources"].get(f"links.{tier}.bytes_per_s", "")) for kind, tier in tiers.items()},
    )


def _achieved(document: dict[str, Any], device: dict[str, Any], given_tflop_per_s: float | None) -> tuple[float, str]:
    if given_tflop_per_s is not None:
        return given_tflop_per_s * 1e12, "--achieved-tflop-per-s"
    if device["name"] in LAYER_FLOPS:
        return LAYER_FLOPS[device["name"]]
    peak = _number((device.get("peak_flops") or {}).get("bfloat16"))
    share, source = _number(document["data_sheet"].get("gemm_efficiency")), "data_sheet.gemm_efficiency of the peak"
    if share is None and device.get("efficiency"):
        share = _number(_read("efficiency", device["efficiency"])["constants"].get("grouped_gemm"))
        source = f"conf/efficiency/{device['efficiency']}.yaml: grouped_gemm of the peak"
    if peak is None or share is None:
        rule = f"what {device['name']} achieves is not public"
        raise Fault("--profile", document["name"], rule, f"--profile {document['name']} --achieved-tflop-per-s 100")
    return peak * share, source


def layer(name: str) -> Layer:
    """The MoE layer of model `name`. Raises Fault where there is no such file, or it has no experts."""
    usable = [other for other in names("model") if _read("model", other).get("experts")]
    if name not in usable:
        rule = f"must be a model of conf/model with experts: {', '.join(usable)}"
        raise Fault("--model", name, rule, "--model deepseek_v2")
    document = _read("model", name)
    lacking = [
        text.format(document[fact], document["top_k"])
        for fact, (none, text) in LACKING.items()
        if document.get(fact, none) not in (None, none)
    ]
    return Layer(
        name=name,
        layers=document["layers"],
        hidden=document["hidden"],
        experts=document["experts"],
        top_k=document["top_k"],
        expert_ffn=document["expert_ffn"],
        matrices=document.get("matrices_per_expert") or 3,
        bytes_per_value=FULL_BYTES,
        lacking=tuple(lacking),
    )
