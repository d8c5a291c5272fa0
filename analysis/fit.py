"""Fit what kernels reach of a device on published rows: `python -m analysis.fit [NAME...]` rewrites conf/efficiency.

Each fit names the rows it may see and the constants it may move; everything else is carried over or has a public
source. No other row is looked at. The rows' layouts are stated, or searched by the rule of analysis/published/fill.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml
from scipy.optimize import least_squares
from scipy.stats import t as student

from analysis.published import judge, predict
from analysis.published.request import Outcome, Request
from analysis.published.rows import load, runs
from piper_hpc.cluster import accelerator, efficiency

KOR_LAYER = tuple(f"kor-{number:04d}" for number in range(15, 25))
SIMU_DENSE = tuple(
    f"simu-{number:04d}" for number in (*range(1, 11, 3), *range(19, 29, 3), *range(37, 47, 3), 55, 58, 61, 64)
)
MPF_TWO = ("mpf-0004", "mpf-0005")

NVLINK = "NVIDIA/nccl-tests #212: 370 of 450 GB/s without in-switch reduction, about 20 % of protocol overhead"
FRAMEWORK = (3e9, "assumed: context, workspaces and communicators take 2 to 4 GB")
FLASH_2 = "FlashAttention-2 (arXiv 2307.08691), figures 5 and 6: causal, head size 128, read off"
FLASH_3 = "FlashAttention-3 (arXiv 2407.08608), figures 5 and 6: causal, head size 128, 4k to 16k tokens, read off"
BOUNDS = {"launch_s": (0.0, 1e-4), "step_host_s": (0.0, 0.5), "gemm_edge": (0.0, 1000.0)}
SHARE = (0.05, 1.0)


@dataclass(frozen=True)
class Fit:
    """rows: all that it sees. free: constant -> first guess. tied: constant -> the free one that it equals.

    carried: constant -> the other file it comes from. public: constant -> (value, source).
    """

    device: str
    rows: tuple[str, ...]
    free: dict[str, float]
    tied: dict[str, str] = field(default_factory=dict)
    carried: dict[str, str] = field(default_factory=dict)
    public: dict[str, tuple[float, str]] = field(default_factory=dict)


FITS = {
    "a100": Fit(
        "a100_80gb",
        KOR_LAYER,
        free={"gemm": 0.75, "gemm_edge": 100.0, "memory": 0.85, "link.node": 0.8},
        tied={"grouped_gemm": "gemm"},
        public={
            "attention_forward": (0.6, FLASH_2),
            "attention_backward": (0.5, FLASH_2),
            "launch_s": (0.0, "not seen apart: the fitted rows are of one large layer"),
            "step_host_s": (0.0, "not seen: the fitted rows are of one layer"),
            "framework_bytes": FRAMEWORK,
            "link.system": (0.85, "NVIDIA/nccl-tests #119: 84.8 of 100 GB/s on average, all-reduce, HDR"),
        },
    ),
    "b200": Fit(
        "b200",
        SIMU_DENSE,
        free={"gemm": 0.45, "launch_s": 2e-5, "attention_forward": 0.43, "step_host_s": 0.02},
        tied={"grouped_gemm": "gemm", "attention_backward": "attention_forward"},
        carried={"memory": "a100"},
        public={
            "gemm_edge": (0.0, "not separable from gemm in the fitted rows"),
            "link.node": (0.82, NVLINK),
            "framework_bytes": FRAMEWORK,
            "link.system": (0.94, "NVIDIA/nccl-tests #290: 46 to 48 of 50 GB/s a NIC, NDR"),
        },
    ),
    "h100": Fit(
        "h100",
        MPF_TWO,
        free={"gemm": 0.65},
        tied={"grouped_gemm": "gemm"},
        carried={"memory": "a100", "launch_s": "b200", "step_host_s": "b200"},
        public={
            "attention_forward": (0.55, FLASH_3),
            "attention_backward": (0.45, FLASH_3),
            "gemm_edge": (0.0, "not separable from gemm in the fitted rows"),
            "link.node": (0.82, NVLINK),
            "framework_bytes": FRAMEWORK,
            "link.system": (0.94, "NVIDIA/nccl-tests #290: 46 to 48 of 50 GB/s a NIC, NDR"),
        },
    ),
}
"""In the order in which they carry constants over."""


def fitted(name: str) -> tuple[dict[str, Any], npt.NDArray[np.float64]]:
    """The file's content, and the errors in per cent on the rows that it saw."""
    fit = FITS[name]
    device = accelerator.facts(fit.device)
    every = runs(load())
    seen = [run for run in every if {row.row_id for row in run.rows} & set(fit.rows)]

    def document(values: npt.NDArray[np.float64]) -> dict[str, Any]:
        free = {key: float(f"{value:.4g}") for key, value in zip(fit.free, values.tolist(), strict=True)}
        return _document(fit, free | {key: free[other] for key, other in fit.tied.items()})

    def errors(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        free = dict(zip(fit.free, values.tolist(), strict=True))
        trial = accelerator.build(
            device,
            efficiency.resolve(_document(fit, free | {key: free[other] for key, other in fit.tied.items()}), name),
        )

        def priced(request: Request) -> Outcome:
            return replace(predict.predict(request, trial), fitted_on=())

        judged = [one for one in judge.judge(seen, priced, every) if one.row.row_id in fit.rows]
        return np.log([float(row.predicted or 0) / float(row.measured or 0) for row in judged])

    start = np.array(list(fit.free.values()))
    low, high = np.array([BOUNDS.get(key, SHARE) for key in fit.free]).T
    found = least_squares(errors, start, bounds=(low, high), x_scale=np.maximum(start, 1e-9), diff_step=1e-4)
    model = {"model": float(f"{np.exp(1.645 * np.std(found.fun)) - 1:.3g}")}
    return document(found.x) | {"spread": _spread(fit, found) | model}, 100 * np.expm1(found.fun)


def _document(fit: Fit, values: dict[str, float]) -> dict[str, Any]:
    return {
        "constants": values | {key: value for key, (value, _) in fit.public.items()},
        "carried": fit.carried,
        "fitted": {key: list(fit.rows) for key in values},
        "sources": {key: source for key, (_, source) in fit.public.items()},
        "spread": {"model": 0.0},
    }


def _spread(fit: Fit, found: Any) -> dict[str, float]:
    """Half of the 90 % interval of every free constant over its value, from the fit's covariance."""
    degrees = len(found.fun) - len(found.x)
    covariance = np.linalg.pinv(found.jac.T @ found.jac) * float(found.fun @ found.fun) / degrees
    half = student.ppf(0.95, degrees) * np.sqrt(np.diag(covariance)) / np.maximum(np.abs(found.x), 1e-12)
    own = {key: float(f"{value:.3g}") for key, value in zip(fit.free, half.tolist(), strict=True)}
    return own | {key: own[other] for key, other in fit.tied.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit, write the files, and say how well the rows that were seen are met."""
    parser = argparse.ArgumentParser(prog="python -m analysis.fit", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FITS)}; all where none is given")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where a file would differ")
    chosen = parser.parse_args(arguments)
    names = chosen.names or list(FITS)
    if unknown := sorted(set(names) - set(FITS)):
        parser.error(f"NAME={unknown[0]}: must be one of {', '.join(FITS)}, for example a100")
    differs = False
    for name in [name for name in FITS if name in names]:
        document, errors = fitted(name)
        text = f"# What kernels reach of {FITS[name].device}. Written by: python -m analysis.fit {name}\n"
        text += yaml.safe_dump(document, sort_keys=False, width=118)
        path = efficiency.path_of(name)
        same = path.exists() and path.read_text(encoding="utf-8") == text
        differs |= not same
        if not chosen.check:
            path.write_text(text, encoding="utf-8")
        mean_pct = np.abs(errors).mean()
        print(
            f"{name}: {len(FITS[name].rows)} rows, mean error {mean_pct:.2f} %, {path.name} {'same' if same else 'new'}"
        )
    if chosen.check and differs:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
