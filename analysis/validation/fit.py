"""`python -m analysis.validation.fit [NAME...]`: what kernels reach of a device, fitted to published rows.

Each fit names the rows it may see and the constants it may move; everything else is carried over, has a public source,
or is assumed and says why. No other row is looked at. The rows' layouts are stated, or searched by the rule of
published/fill.py. Devices that no row is of are derived from the fitted ones and their own data sheets.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import yaml
from scipy.optimize import least_squares
from scipy.stats import t as student

from analysis.validation.published import judge, predict
from analysis.validation.published.request import Outcome, Request
from analysis.validation.published.rows import load, runs
from piper_hpc.cluster import accelerator, efficiency

KOR_LAYER = tuple(f"kor-{number:04d}" for number in range(15, 25))
SIMU_DENSE = tuple(
    f"simu-{number:04d}" for number in (*range(1, 11, 3), *range(19, 29, 3), *range(37, 47, 3), 55, 58, 61, 64)
)
MPF_TWO = ("mpf-0004", "mpf-0005")

NVLINK = "NVIDIA/nccl-tests #212: 370 of 450 GB/s without in-switch reduction, about 20 % of protocol overhead"
NDR = "NVIDIA/nccl-tests #290: 46 to 48 of 50 GB/s a NIC, NDR"
FRAMEWORK = (3e9, "context, workspaces and communicators take 2 to 4 GB")
INSEPARABLE = (0.0, "not separable from gemm in the fitted rows")
FLASH_2 = "FlashAttention-2 (arXiv 2307.08691), figures 5 and 6: causal, head size 128, read off"
FLASH_3 = "FlashAttention-3 (arXiv 2407.08608), figures 5 and 6: causal, head size 128, 4k to 16k tokens, read off"
XMOE = "X-MoE project page: GEMMs reach about 60 % of peak on MI250X (see arXiv 2508.13337)"
ALCF = "ALCF user guides (2026-08-19), measured 2026-01-12"
BOUNDS = {"launch_s": (0.0, 1e-4), "step_host_s": (0.0, 0.5), "gemm_edge": (0.0, 1000.0)}
SHARE = (0.05, 1.0)
T = TypeVar("T")
CONFIDENCE = 0.95
"""The quantile of Student's t whose double-sided interval holds 90 %."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What a file of conf/efficiency holds without a fit.

    tied: constant -> the one that it equals. carried: constant -> the other file it comes from. public: constant ->
    (value, source). assumed: constant -> (value, reason), where no source prints it.
    """

    device: str
    tied: dict[str, str] = field(default_factory=dict)
    carried: dict[str, str] = field(default_factory=dict)
    public: dict[str, tuple[float, str]] = field(default_factory=dict)
    assumed: dict[str, tuple[float, str]] = field(default_factory=dict)

    def document(
        self, moved: Mapping[str, float], rows: Sequence[str], derived: str, spread: Mapping[str, float]
    ) -> dict[str, Any]:
        """The file's content, where the constants `moved` rest on `rows`; derived: how gemm follows from them."""
        stated = self.public | self.assumed
        constants = {**moved, **{key: value for key, (value, _) in stated.items()}}
        return {
            "constants": self._with_tied(constants),
            "tied": dict(self.tied),
            "carried": dict(self.carried),
            "fitted": {key: list(rows) for key in self._with_tied(moved)},
            "sources": self._with_tied({key: source for key, (_, source) in self.public.items()}),
            "assumed": self._with_tied({key: reason for key, (_, reason) in self.assumed.items()}),
            **({"derived": {"gemm": derived}} if derived else {}),
            "spread": self._with_tied(spread),
        }

    def _with_tied(self, of: Mapping[str, T]) -> dict[str, T]:
        return {**of, **{key: of[other] for key, other in self.tied.items() if other in of}}


@dataclass(frozen=True, kw_only=True)
class Fit(Preset):
    """rows: all that it sees. free: constant -> first guess."""

    rows: tuple[str, ...]
    free: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Derived(Preset):
    """A device that no row is of. like: the fits whose share of the best measured product its gemm reaches too."""

    like: tuple[str, ...] = ()


FITS = {
    "a100": Fit(
        device="a100_80gb",
        rows=KOR_LAYER,
        free={"gemm": 0.75, "gemm_edge": 100.0, "memory": 0.85, "link.node": 0.8},
        tied={"grouped_gemm": "gemm"},
        public={
            "attention_forward": (0.6, FLASH_2),
            "attention_backward": (0.5, FLASH_2),
            "link.system": (0.85, "NVIDIA/nccl-tests #119: 84.8 of 100 GB/s on average, all-reduce, HDR"),
        },
        assumed={
            "launch_s": (0.0, "not seen apart: the fitted rows are of one large layer"),
            "step_host_s": (0.0, "not seen: the fitted rows are of one layer"),
            "framework_bytes": FRAMEWORK,
        },
    ),
    "b200": Fit(
        device="b200",
        rows=SIMU_DENSE,
        free={"gemm": 0.45, "launch_s": 2e-5, "attention_forward": 0.43, "step_host_s": 0.02},
        tied={"grouped_gemm": "gemm", "attention_backward": "attention_forward"},
        carried={"memory": "a100"},
        public={"link.node": (0.82, NVLINK), "link.system": (0.94, NDR)},
        assumed={"gemm_edge": INSEPARABLE, "framework_bytes": FRAMEWORK},
    ),
    "h100": Fit(
        device="h100",
        rows=MPF_TWO,
        free={"gemm": 0.65},
        tied={"grouped_gemm": "gemm"},
        carried={"memory": "a100", "launch_s": "b200", "step_host_s": "b200"},
        public={
            "attention_forward": (0.55, FLASH_3),
            "attention_backward": (0.45, FLASH_3),
            "link.node": (0.82, NVLINK),
            "link.system": (0.94, NDR),
        },
        assumed={"gemm_edge": INSEPARABLE, "framework_bytes": FRAMEWORK},
    ),
}
"""In the order in which they carry constants over."""


ELSEWHERE = {"memory": "a100", "launch_s": "b200", "step_host_s": "b200"}
TIED = {"grouped_gemm": "gemm", "attention_backward": "attention_forward"}
INSTINCT = Derived(
    device="mi300x",
    like=("a100", "h100"),
    tied=TIED,
    carried=ELSEWHERE,
    assumed={
        "attention_forward": (0.35, "not looked up for this device"),
        "gemm_edge": (0.0, "not known for this device"),
        "framework_bytes": FRAMEWORK,
        "link.node": (0.8, "as NVLink in NVIDIA/nccl-tests #212"),
        "link.system": (0.85, "as HDR in NVIDIA/nccl-tests #119"),
    },
)

DERIVED = {
    "mi250x": Derived(
        device="mi250x_gcd",
        tied=TIED,
        carried=ELSEWHERE,
        public={
            "gemm": (0.6, XMOE),
            "framework_bytes": (7e9, "X-MoE's own planner (Megatron-DeepSpeed fork): 7 GB of a 64 GB GCD"),
            "link.node": (1.0, "the cluster files state an achieved all-to-all rate"),
            "link.system": (1.0, "CSCS cscs-reframe-tests (2026-08-21): all-reduce 105 GB/s over four NICs of 25"),
        },
        assumed={
            "attention_forward": (0.3, "none published for this device apart from projections"),
            "gemm_edge": (0.0, "not known for this device"),
        },
    ),
    "max_1550": Derived(
        device="max_1550_tile",
        tied=TIED,
        carried={"launch_s": "b200", "step_host_s": "b200"},
        public={
            "gemm": (0.564, f"{ALCF}: 2,487 TF of a node, 207 of 367 a tile"),
            "memory": (0.61, f"{ALCF}: triad of 1 TB/s a tile, of 1.638"),
        },
        assumed={
            "attention_forward": (0.3, "none published for this device"),
            "gemm_edge": (0.0, "not known for this device"),
            "framework_bytes": FRAMEWORK,
            "link.node": (0.8, "as NVLink in NVIDIA/nccl-tests #212"),
            "link.system": (0.85, "as HDR in NVIDIA/nccl-tests #119"),
        },
    ),
    "mi300x": INSTINCT,
    "mi325x": replace(INSTINCT, device="mi325x"),
    "mi355x": replace(INSTINCT, device="mi355x"),
}
"""Written after the fits, from whose files they are derived."""

PRESETS: dict[str, Preset] = {**FITS, **DERIVED}


def content(name: str) -> tuple[dict[str, Any], npt.NDArray[np.float64]]:
    """What belongs into the file `name`, and the errors in per cent on the rows it saw; none where it is derived."""
    return fitted(name) if name in FITS else (derived(name), np.zeros(0))


def fitted(name: str) -> tuple[dict[str, Any], npt.NDArray[np.float64]]:
    """The content of one of FITS, and the errors in per cent on the rows that it saw."""
    fit = FITS[name]
    device = accelerator.facts(fit.device)
    every = runs(load())
    seen = [run for run in every if {row.row_id for row in run.rows} & set(fit.rows)]

    def errors(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        free = dict(zip(fit.free, values.tolist(), strict=True))
        trial = accelerator.build(device, efficiency.resolve(fit.document(free, fit.rows, "", {"model": 0.0}), name))

        def priced(request: Request) -> Outcome:
            return replace(predict.predict(request, trial), fitted_on=())

        judged = [one for one in judge.judge(seen, priced, every) if one.row.row_id in fit.rows]
        return np.log([float(row.predicted or 0) / float(row.measured or 0) for row in judged])

    start = np.array(list(fit.free.values()))
    low, high = np.array([BOUNDS.get(key, SHARE) for key in fit.free]).T
    found = least_squares(errors, start, bounds=(low, high), x_scale=np.maximum(start, 1e-9), diff_step=1e-4)
    free = {key: float(f"{value:.4g}") for key, value in zip(fit.free, found.x.tolist(), strict=True)}
    return fit.document(free, fit.rows, "", spread(tuple(fit.free), found)), 100 * np.expm1(found.fun)


def spread(free: Sequence[str], found: Any) -> dict[str, float]:
    """Half of the 90 % interval of every free constant over its value, from the fit's covariance, and of `model`.

    model: by how much the time of one more row may be off, as a ratio less 1. Both by Student's t with the degrees of
    freedom that the rows leave, so that a fit of two rows by one constant is as unsure as it should be.
    found: of scipy.optimize.least_squares on logarithms of ratios.
    """
    degrees = len(found.fun) - len(found.x)
    variance = float(found.fun @ found.fun) / degrees
    quantile = float(student.ppf(CONFIDENCE, degrees))
    covariance = np.linalg.pinv(found.jac.T @ found.jac) * variance
    half = quantile * np.sqrt(np.diag(covariance)) / np.maximum(np.abs(found.x), 1e-12)
    model = float(np.expm1(quantile * np.sqrt(variance)))
    return {key: float(f"{value:.3g}") for key, value in zip((*free, "model"), (*half.tolist(), model), strict=True)}


def derived(name: str) -> dict[str, Any]:
    """The content of one of DERIVED: gemm is the device's best measured product, as far as the fits reach theirs.

    The model is as far off as in the least sure of the fits.
    """
    preset = DERIVED[name]
    files = {fit: efficiency.read(fit) for fit in FITS}
    model = {"model": max(float(file["spread"]["model"]) for file in files.values())}
    if not preset.like:
        return preset.document({}, (), "", model)
    device = accelerator.facts(preset.device)
    reached = [files[fit]["constants"]["gemm"] / best_share(accelerator.facts(FITS[fit].device)) for fit in preset.like]
    share = sum(reached) / len(reached)
    rows = sorted({row for fit in preset.like for row in files[fit]["fitted"]["gemm"]})
    text = (
        f"{device.mamf_source('bfloat16')}: best product {device.mamf_flops['bfloat16'] / 1e12:.1f} of "
        f"{device.peak_flops['bfloat16'] / 1e12:.1f} TF, times {share:.3f}, the mean share of their best products that "
        f"the fits of {' and '.join(preset.like)} reach"
    )
    return preset.document({"gemm": float(f"{share * best_share(device):.4g}")}, rows, text, model)


def best_share(device: accelerator.DeviceFacts) -> float:
    """The best measured bfloat16 GEMM over the data sheet's peak, 0 to 1 (MAMF: maximum achievable matmul FLOPS)."""
    return device.mamf_flops["bfloat16"] / device.peak_flops["bfloat16"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit, derive, write the files, and say how well the rows that were seen are met."""
    parser = argparse.ArgumentParser(prog="python -m analysis.validation.fit", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PRESETS)}; all where none is given")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where a file would differ")
    chosen = parser.parse_args(arguments)
    names = chosen.names or list(PRESETS)
    if unknown := sorted(set(names) - set(PRESETS)):
        parser.error(f"NAME={unknown[0]}: must be one of {', '.join(PRESETS)}, for example a100")
    differs = False
    for name in [name for name in PRESETS if name in names]:
        document, errors = content(name)
        how = f"{len(errors)} rows, mean error {np.abs(errors).mean():.2f} %" if errors.size else "no row"
        text = f"# What kernels reach of {PRESETS[name].device}. Written by: python -m analysis.validation.fit {name}\n"
        text += yaml.safe_dump(document, sort_keys=False, width=118)
        path = efficiency.path_of(name)
        same = path.exists() and path.read_text(encoding="utf-8") == text
        differs |= not same
        if not chosen.check:
            path.write_text(text, encoding="utf-8")
        print(f"{name}: {how}, {path.name} {'same' if same else 'new'}")
    if chosen.check and differs:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
