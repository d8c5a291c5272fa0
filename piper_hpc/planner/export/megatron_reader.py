"""What a file of Megatron-LM's arguments says: read by documented name, as Megatron-LM derives degrees from them."""

from __future__ import annotations

import re
import shlex
from typing import Any

from piper_hpc.planner.export.choice import Reading, recompute_text
from piper_hpc.planner.export.megatron import ARRAY, MODULES, RECIPES, SHARDED
from piper_hpc.planner.export.megatron_model import Arguments
from piper_hpc.planner.export.vocabulary import FLAG, MEGATRON, REAL, WHOLE
from piper_hpc.spec import RECIPES as BYTES
from piper_hpc.spec import Layout, ModelSpec, Recompute, Routing, Workload
from piper_hpc.spec.layout import split_layers


def arguments(text: str) -> Arguments:
    """The array's arguments by name. ValueError for text that is none, and for what Megatron-LM does not document."""
    found = re.search(rf"^{ARRAY}=\(\n(.*?)^\)$", text, flags=re.DOTALL | re.MULTILINE)
    if found is None:
        raise ValueError(f"there is no array {ARRAY}=( ... ) in the text")
    read: Arguments = {}
    for line in found[1].splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        name, values = words[0].removeprefix("--"), words[1:]
        if not words[0].startswith("--") or name in read:
            raise ValueError(f"{line.strip()!r}: must be an argument, --name and its values, each of them once")
        value = _value(name, values)
        MEGATRON.check(name, value)
        read[name] = value
    return read


def _value(name: str, words: list[str]) -> Any:
    kind = MEGATRON.names.get(name)
    if kind == FLAG:
        return words or True
    if name == "recompute-modules":
        return words
    if len(words) != 1:
        raise ValueError(f"--{name} takes one value, not {words}")
    return int(words[0]) if kind == WHOLE else float(words[0]) if kind == REAL else words[0]


def read(text: str, model: ModelSpec, ranks: int) -> Reading:
    """Layout and workload that the arguments mean for `ranks` processes, which the launcher gives Megatron-LM.

    ValueError for names or values that are not documented, or that do not fit each other or the model.
    """
    given = arguments(text)
    if given["num-layers"] != model.layers:
        raise ValueError(f"--num-layers {given['num-layers']}: model {model.name} has {model.layers}")
    tp, pp = given["tensor-model-parallel-size"], given["pipeline-model-parallel-size"]
    ep = given.get("expert-model-parallel-size", 1)
    etp = ({"expert-tensor-parallel-size": tp} | given)["expert-tensor-parallel-size"] if model.experts else 1
    if ranks % (tp * given["context-parallel-size"] * pp) or ranks % (etp * ep * pp):
        raise ValueError(f"{ranks} ranks are no multiple of tp cp pp, or of etp ep pp")
    vpp, stage_layers = _split(given, pp, model)
    layout = Layout(
        pp=pp,
        vpp=vpp,
        ep=ep,
        etp=etp,
        tp=tp,
        cp=given["context-parallel-size"],
        dp=ranks // (etp * ep * pp),
        zero=_zero(given),
        schedule="interleaved" if vpp > 1 else "1f1b",
        micro_batch=given["micro-batch-size"],
        recompute=recompute_text(_recompute(given)),
        stage_layers=stage_layers,
    )
    return Reading(layout, _workload(given))


def _split(given: Arguments, pp: int, model: ModelSpec) -> tuple[int, tuple[int, ...]]:
    """Chunks a rank, and the layers of each stage where they are not as even as it goes."""
    stages = given.get("pipeline-model-parallel-layout")
    if stages is None:
        return given.get("num-virtual-stages-per-pipeline-rank", 1), ()
    counts = []
    for stage in re.sub(r"(.)\*(\d+)", lambda run: run[1] * int(run[2]), stages).split("|"):
        if not re.fullmatch(r"E?t+m*L?", stage):
            raise ValueError(f"--pipeline-model-parallel-layout {stages}: {stage!r} is no stage")
        counts.append(stage.count("t"))
    if sum(counts) != model.layers or len(counts) % pp:
        raise ValueError(f"--pipeline-model-parallel-layout {stages}: must place {model.layers} layers on {pp} ranks")
    even = [len(layers) for layers in split_layers(model.layers, len(counts))]
    return len(counts) // pp, () if counts == even else tuple(counts)


def _zero(given: Arguments) -> int:
    if "use-megatron-fsdp" in given:
        return {strategy: stage for stage, strategy in SHARDED.items()}[given["data-parallel-sharding-strategy"]]
    return int("use-distributed-optimizer" in given)


def _recompute(given: Arguments) -> Recompute:
    granularity = given.get("recompute-granularity")
    if granularity != "selective":
        return Recompute(full=int(granularity == "full"))
    modules = given["recompute-modules"]
    parts = {part: int(module in modules) for part, module in MODULES.items()}
    return Recompute(**parts | {"activation": int(bool({"moe_act", "mlp"} & set(modules)))})


def _workload(given: Arguments) -> Workload:
    names = {name for arguments_of in RECIPES.values() for name in arguments_of}
    precision = {name: value for name, value in given.items() if name in names}
    recipe = next((name for name, arguments_of in RECIPES.items() if arguments_of == precision), None)
    if recipe is None:
        raise ValueError(f"{precision}: keeps bytes of a parameter that no recipe has")
    routing = Routing()
    if "moe-router-force-load-balancing" in given:
        routing = Routing("forced")
    elif "moe-expert-capacity-factor" in given:
        routing = Routing("drop", given["moe-expert-capacity-factor"])
    return Workload(given["global-batch-size"], given["seq-length"], BYTES[recipe], routing)
