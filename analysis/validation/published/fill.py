"""The one written rule that fills what a published run leaves unstated. It knows no measured value.

Its first form was committed before any error had been computed. It was amended since, after errors had been seen: which
runs lend one another what they state, and which names stand for which model and device.

A field takes the first of: what the row states (columns, then words of its notes); what similar runs agree on, those of
the same document with the same model, layers, tp, pp, framework and method or system (vpp, micro_batch, zero_stage);
arithmetic; and then:

    field               where nothing states it
    ------------------  ------------------------------------------------------------------------------------------
    model               facts.py: preset of the model or its family, overridden by the row's columns
    accelerator         names.py: by the words of the gpu column; an unknown device is refused. H100 where none is
                        named and the run prints memory alone
    num_gpus            tp pp cp dp; where those are not stated either, refused
    tp                  searched: 1, 2, 4, 8 (inside a node), dividing the heads; or the set that the notes name
    pp                  searched: 1, 2, 4, 8, 16, at most the layers
    cp                  1; with Ulysses sequence parallelism in the notes it is ep (the group of one node)
    ep                  1 for a dense model; searched: powers of two that divide the experts, or the notes' set
    etp                 tp where gpus divide by pp ep tp (Megatron and FSDP without folding), else 1; 1 elsewhere
    dp                  the column counts dense replicas: Layout.dp, replicas of an expert, is gpus / (pp ep etp)
    global_batch        4 pp micro-batches a replica (GPipe, arXiv 1811.06965, section 2.3: the bubble is then small);
                        a step time is not judged then, rates are
    seq                 4096
    micro_batch         searched: 1, 2, 4, 8, where the global batch divides by them
    schedule, vpp       1F1B with vpp 1, for frameworks other than Megatron, for pp = 1, and where the document states
                        vpp for other runs; else searched: 1 (1F1B) and every divisor of layers / pp (interleaved).
                        Interleaving needs micro-batches that divide by pp. A named schedule fixes both; DualPipe is
                        taken as DualPipeV, ZBB as ZB-H1; V-half and V-min are refused
    recompute           searched: none, selective, full
    zero_stage          0 up to 2022 (or dense on an A100 where the year is unknown), 1 since
    flash attention     as zero_stage: since 2023
    sequence parallel   Megatron and FSDP with tp > 1 since 2023; before only where stated
    precision           16-bit with 18 B of state for Megatron and DeepSeek, 16 B elsewhere
    routing             capacity factor named elsewhere in the document; else dropless, as X-MoE always
    all_to_all          DeepSeek, X-MoE and a DeepEP dispatcher deduplicated and hierarchical, Piper HALO, else flat

Published runs are the best that their authors found: of searched values, the run takes those with which the model
predicts the fastest step that fits the memory; where none fits, those with least memory, and it is predicted to be out
of memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

from analysis.validation.published import frameworks
from analysis.validation.published.facts import model_facts
from analysis.validation.published.names import choices, device, framework, names_no_device, same_method, schedule
from analysis.validation.published.request import Refused, Request
from analysis.validation.published.rows import PublishedRun
from piper_hpc.spec import Layout, ModelSpec, Routing

MICRO_BATCHES, TENSOR, STAGES, RECOMPUTE = (1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8, 16), ("none", "selective", "full")
SEQUENCE, MICRO_BATCHES_PER_STAGE = 4096, 4


def fill(run: PublishedRun, others: Sequence[PublishedRun] = ()) -> list[Request]:
    """Every complete Request that the rule allows for a run.

    others: the file's runs, among which those of its document and the similar ones are looked up.

    Raises Refused with the key, its value and the rule where something is not known and not to be assumed.
    """
    document = [other for other in others if other.document == run.document]
    same = ("model", "layers", "tp", "pp")
    alike = [other for other in document if all(other.cells[key] == run.cells[key] for key in same)]
    similar_runs = [other for other in alike if same_method(run, other)]
    name, method = framework(run)
    accelerator, cluster, taken = _device(run)
    model, assumed = model_facts(run, _vocab(run, document))
    if taken:
        assumed["accelerator"] = f"{accelerator}: {taken}"
    before_flash = frameworks.before_flash_attention(run, model, accelerator)
    routing = frameworks.routing(run, document, method, assumed) if model.experts else Routing("forced")
    recipe = frameworks.recipe(run, name, assumed)
    zero = frameworks.zero_stage(run, similar_runs, before_flash, assumed)
    algorithm = frameworks.all_to_all(run, name, method, assumed) if model.experts else "flat"
    recomputes = [frameworks.recompute(run)] if frameworks.recompute(run) else list(RECOMPUTE)
    sequence = run.degree("seq") or SEQUENCE
    if not run.degree("seq"):
        assumed["seq"] = f"{SEQUENCE}: not stated"

    found: list[Request] = []
    for degrees, recomputed in product(_degrees(run, alike, model, name, assumed), recomputes):
        tp, pp, ep, etp, cp = degrees
        gpus = _gpus(run, tp, pp, cp)
        dense_dp = gpus // (pp * tp * cp)
        for micro_batch in _micro_batches(run, similar_runs):
            batch = _global_batch(run, model, micro_batch, dense_dp, pp, assumed)
            if batch % (micro_batch * dense_dp):
                continue
            for kind, vpp in _schedules(
                run, similar_runs, document, model, name, pp, batch // (micro_batch * dense_dp)
            ):
                layout = Layout(
                    pp=pp, vpp=vpp, ep=ep, etp=etp, tp=tp, cp=cp, dp=gpus // (pp * ep * etp), zero=zero, schedule=kind,
                    micro_batch=micro_batch, recompute=recomputed, all_to_all=algorithm,
                )  # fmt: skip
                own = dict(assumed)
                execution = frameworks.execution(run, name, method, before_flash, tp, own)
                _explain(run, similar_runs, layout, own)
                request = Request(
                    model, layout, batch, sequence, gpus, accelerator, cluster, recipe, routing, execution
                )
                single = model.layers == 1
                found.append(
                    replace(request, framework=name, method=method, single_layer=single, assumed=tuple(own.items()))
                )
    if not found:
        raise Refused(
            f"global_batch={run.cells['global_batch']}: must be a multiple of micro_batch x dense replicas for some "
            f"micro_batch of {', '.join(map(str, _micro_batches(run, similar_runs)))} on "
            f"num_gpus={run.cells['num_gpus']}"
        )
    return found


def _device(run: PublishedRun) -> tuple[str, str, str]:
    """The device that the gpu column names; H100 for a run that prints memory alone and names none."""
    memory_alone = all(re.search(r"bytes$|memory", row.quantity.name) for row in run.rows)
    if memory_alone and names_no_device(run.cells["gpu"]):
        return "h100", "dgx_h100", "not stated, and memory does not depend on it"
    return device(run.cells["gpu"])


def _vocab(run: PublishedRun, document: Sequence[PublishedRun]) -> int | None:
    """`vocab N` of the notes, of the run or of another run of this model in the document."""
    for other in (run, *(each for each in document if each.cells["model"] == run.cells["model"])):
        if found := re.search(r"vocab(?:ulary)?[ =:]*(\d[\d,]*)", other.cells["notes"], re.I):
            return int(found.group(1).replace(",", ""))
    return None


def _gpus(run: PublishedRun, tp: int, pp: int, cp: int) -> int:
    dp = run.degree("dp")
    gpus = run.degree("num_gpus") or (tp * pp * cp * dp if dp else None)
    if gpus is None:
        raise Refused(f"num_gpus={run.cells['num_gpus'] or '(empty)'}: must be stated, or tp, pp, cp and dp must be")
    return gpus


def _degrees(
    run: PublishedRun, others: Sequence[PublishedRun], model: ModelSpec, name: str, assumed: dict[str, str]
) -> Iterator[tuple[int, int, int, int, int]]:
    """(tp, pp, ep, etp, cp) that are stated, or searched, and that the GPUs and the model allow.

    others: runs of the document with the same model and layout, of all its systems: one note names the set that all
    of them searched.
    """
    notes = " ".join(each.words for each in (run, *others) if each.note("system") == run.note("system"))
    searched = " ".join(each.words for each in (run, *others) if each.cells["num_gpus"] == run.cells["num_gpus"])
    ulysses = "ulysses" in notes.lower() and (run.degree("cp") or 1) == 1 and run.degree("ep")
    if ulysses:
        assumed["cp"] = f"{ulysses}: Ulysses sequence parallelism over the group of ep"
    cp = ulysses or run.degree("cp") or 1
    tps = [run.degree("tp")] if run.degree("tp") else choices(searched, "TP") or TENSOR
    pps = [run.degree("pp")] if run.degree("pp") else STAGES
    powers = [2**power for power in range(11)]
    eps: Sequence[int | None] = [run.degree("ep") or 1] if run.degree("ep") or not model.experts else (
        choices(searched, "EP") or [ep for ep in powers if model.experts % ep == 0]
    )  # fmt: skip
    some = False
    for tp, pp, ep in product(tps, pps, eps):
        assert tp and pp and ep
        gpus = _gpus(run, tp, pp, cp)
        if gpus % (pp * tp * cp) or gpus % (pp * ep) or pp > model.layers or model.heads % tp:
            continue
        if model.experts and model.experts % ep:
            continue
        whole = name in ("megatron", "fsdp") or "TED" in run.words
        etp = run.degree("etp") or (tp if whole and model.experts and gpus % (pp * ep * tp) == 0 else 1)
        if not model.experts:
            etp = 1
        if gpus % (pp * ep * etp) == 0:
            some = True
            yield tp, pp, ep, etp, cp
    if not some:
        stated = " ".join(f"{key}={run.cells[key] or '?'}" for key in ("num_gpus", "tp", "pp", "ep", "cp", "etp"))
        raise Refused(f"{stated}: GPUs must divide by pp tp cp and by pp ep etp, experts by ep, heads by tp")


def _micro_batches(run: PublishedRun, similar_runs: Sequence[PublishedRun]) -> Sequence[int]:
    stated = frameworks.stated(run, similar_runs, "micro_batch")
    return (stated,) if stated else MICRO_BATCHES


def _global_batch(
    run: PublishedRun, model: ModelSpec, micro_batch: int, dense_dp: int, pp: int, assumed: dict[str, str]
) -> int:
    if stated := run.degree("global_batch"):
        return stated
    count = 1 if model.layers == 1 else MICRO_BATCHES_PER_STAGE * pp
    assumed["global_batch"] = f"{count} micro-batches a replica: not stated"
    return count * micro_batch * dense_dp


def _schedules(
    run: PublishedRun, similar_runs: Sequence[PublishedRun], document: Sequence[PublishedRun], model: ModelSpec,
    name: str, pp: int, micro_batches: int,
) -> list[tuple[str, int]]:  # fmt: skip
    """(schedule, vpp) that are stated, or searched."""
    kind, _ = schedule(run)
    if kind in ("zbv", "dualpipev"):
        return [(kind, 2)]
    if kind in ("1f1b", "gpipe", "zb_h1") or pp == 1:
        return [(kind if kind and kind != "interleaved" else "1f1b", 1)]
    stated = frameworks.stated(run, similar_runs, "vpp")
    if stated:
        return [("interleaved", stated) if stated > 1 else ("1f1b", 1)]
    deeper = [
        ("interleaved", vpp)
        for vpp in range(2, model.layers // pp + 1)
        if model.layers % (pp * vpp) == 0 and micro_batches % pp == 0
    ]
    if kind == "interleaved" and model.layers % pp == 0 and model.layers > pp:
        return deeper
    if name != "megatron" or any(other.degree("vpp") for other in document):
        return [("1f1b", 1)]
    return [("1f1b", 1), *deeper]


def _explain(run: PublishedRun, similar_runs: Sequence[PublishedRun], layout: Layout, assumed: dict[str, str]) -> None:
    """Name the degrees and choices that this candidate did not take from the row itself."""
    _, remark = schedule(run)
    if remark:
        assumed["schedule"] = remark
    moe, staged = bool(run.number("experts")), layout.pp > 1
    for key, open_ in (("tp", True), ("pp", True), ("ep", moe), ("etp", moe), ("vpp", staged), ("micro_batch", True)):
        if open_ and run.degree(key) is None:
            agreed = frameworks.stated(run, similar_runs, key) if key in ("vpp", "micro_batch") else None
            assumed[key] = f"{getattr(layout, key)}: {'as its twins in the document' if agreed else 'not stated'}"
    if not frameworks.recompute(run):
        assumed["recompute"] = f"{layout.recompute}: not stated"
    printed = run.degree("dp")
    if printed and printed != layout.dense_dp:
        assumed["dp"] = f"{layout.dense_dp} dense replicas = gpus / (pp tp cp); printed {printed}"
