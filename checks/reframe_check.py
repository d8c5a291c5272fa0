"""ReFrame checks of a site: the launcher measures, and trains, and its JSON says how it went.

    reframe -c checks/reframe_check.py -r
    reframe -c checks/reframe_check.py -r -S overrides=cluster=frontier,cluster.account=abc123,cluster.nodes=2

For ReFrame 4. The launcher submits by itself and waits, so that a check runs where ReFrame does; its stage folder must
be one that compute nodes see (`--stage`). `-S python=` names the interpreter in which piper_hpc is installed. A
site's own references go into `reference` of a class derived from one of these.
"""

import json
import os

import reframe as rfm
import reframe.utility.sanity as sn
import reframe.utility.typecheck as typ
from reframe.core.builtins import deferrable, performance_function, run_before, sanity_function, variable


class LauncherCheck(rfm.RunOnlyRegressionTest):
    """One command of the launcher, whose standard output is one JSON document."""

    valid_systems = ["*"]  # noqa: RUF012
    valid_prog_environs = ["*"]  # noqa: RUF012
    local = True
    python = variable(str, value="python")
    overrides = variable(typ.List[str], value=[])
    command = ()
    time_limit = "2h"

    @run_before("run")
    def set_command(self):
        self.executable = f"{self.python} -m piper_hpc.launch"
        self.executable_opts = [*self.command, "format=json", *self.overrides]

    @deferrable
    def document(self):
        """What the launcher printed; its errors are in the check's rfm_job.err."""
        with open(os.path.join(self.stagedir, sn.evaluate(self.stdout))) as printed:
            return json.load(printed)

    @deferrable
    def ended_well_on_its_network(self):
        """Completed, and not over a slower network than the site's."""
        document = self.document().evaluate()
        fallbacks = document["network"].get("fallbacks", [])
        sn.evaluate(sn.assert_eq(document["status"]["state"], "completed"))
        return sn.evaluate(sn.assert_eq(fallbacks, [], msg=f"slow network: {fallbacks}"))


@rfm.simple_test
class TrainCheck(LauncherCheck):
    """A short training: its loss is a number, and how fast it was."""

    command = ("train=smoke",)

    @sanity_function
    def trained(self):
        return sn.all([self.ended_well_on_its_network(), sn.assert_ne(self.document()["metrics"]["loss"], None)])

    @performance_function("tokens/s")
    def tokens_per_s(self):
        return self.document()["metrics"]["tokens_per_s"]

    @run_before("performance")
    def set_step_time_error(self):
        """Predicted against measured, where there was a prediction."""
        (row,) = (row for row in self.document().evaluate()["table"] if row["key"] == "step_time_s")
        if row["error_pct"] is not None:
            self.perf_variables["step_time_error_pct"] = sn.make_performance_function(lambda: row["error_pct"], "%")


@rfm.simple_test
class MeasureCheck(LauncherCheck):
    """The calibration suite: every row has right values, and the rates of the best product and all-to-all."""

    command = ("task=microbench",)

    @sanity_function
    def measured(self):
        wrong = [row["operator"] for row in self.document().evaluate()["measurements"] if not row["correct"]]
        return sn.all([self.ended_well_on_its_network(), sn.assert_eq(wrong, [])])

    @performance_function("FLOP/s")
    def best_gemm(self):
        return self.best("gemm", lambda row: row["work"] / row["median_s"])

    @performance_function("B/s")
    def best_all_to_all(self):
        """Bus bandwidth, as nccl-tests counts it."""
        return self.best("all_to_all", lambda row: row["busbw_bytes_per_s"])

    def best(self, operator, rate):
        rows = self.document().evaluate()["measurements"]
        return max(rate(row) for row in rows if row["operator"].startswith(operator))
