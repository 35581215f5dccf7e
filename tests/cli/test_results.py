"""What commands print when they succeed: JSON for programs, a page for people, and exit codes."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autopar.choice import Chosen, Looked
from autopar.cli import plan_command
from autopar.cli.layout import axis_uses, parameter_groups
from autopar.core.cluster import Cluster
from autopar.core.plan import Plan
from autopar.models import catalog
from autopar.verification import VerifyReport
from tests.cli.calling import Call, Called
from tests.cli.conftest import PLANNED


def content(called: Called, code: int = 0) -> dict[str, Any]:
    """The one JSON object on stdout, beside nothing on stderr."""
    assert (called.code, called.err) == (code, "")
    found = json.loads(called.out, parse_constant=pytest.fail)
    assert found["schema_version"] == 1
    return found


def finding(plan: Plan) -> Callable[..., tuple[Chosen, dict[str, float]]]:
    """A search whose only plan is this one, for the whole cluster."""

    def search(_: object, cluster: Cluster, *__: object, **___: object) -> tuple[Chosen, dict[str, float]]:
        looked = Looked(cluster, plan)
        return Chosen(looked, (looked,)), {"trace": 0.0, "search": 0.0}

    return search


def test_plan_json(call: Call, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    found = content(call("plan", *PLANNED, "--json", "-o", path))
    assert {"plan", "predicted", "proof", "seconds", "model", "cluster", "layout", "notes"} <= set(found)
    assert {"step_time_s", "peak_memory_bytes", "tokens_per_s", "mfu"} <= set(found["predicted"])
    assert {"objective", "bound", "gap"} <= set(found["proof"])
    assert set(found["seconds"]) == {"trace", "search"}
    assert found["layout"] == "dp2 x tp2" and found["model"] == "mlp-tiny"
    assert found["plan"] == json.loads(path.read_text())
    plan = Plan.from_json(json.dumps(found["plan"]))
    assert plan == Plan.load(path) and plan.predicted.step_time_s == found["predicted"]["step_time_s"] > 0


def test_a_plan_for_part_of_the_cluster(call: Call, tmp_path: Path) -> None:
    """The page lists the parts, the file is one for the part, and the next command takes it with the whole cluster's name."""
    path = tmp_path / "part.json"
    found = content(call("plan", "mlp-tiny", "--cluster", "local:4", "--objective", "cost", "--json", "-o", path))
    looked = {part["devices"]: part for part in found["objective"]["looked"]}
    assert found["objective"]["best"] == "cost" and set(looked) == {1, 2, 4}
    best = min(looked.values(), key=lambda part: part["device_s"])
    plan = Plan.load(path)
    assert (plan.num_ranks, plan.cluster) == (best["devices"], best["cluster"]) and plan.num_ranks < 4
    page = call("plan", "mlp-tiny", "--cluster", "local:4", "--objective", "cost")
    rows = [line for line in page.out.splitlines() if line.startswith(">")]
    assert len(rows) == 1 and rows[0].split()[1] == str(best["devices"]) and f"--cluster {best['cluster']} --batch 8" in page.out
    assert content(call("verify", "mlp-tiny", "--cluster", "local:4", "--plan", path, "--steps", "1", "--json"))["equal"] is True


def test_the_page_of_a_pipeline_lists_its_stages(call: Call, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    pins = ("--pin", "pp=2", "--pin", "dp=2", "--pin", "schedule=gpipe")
    called = call("plan", "mlp-tiny", "--cluster", "local:4", "--batch", "16", "--micro-batches", "4", *pins, "-o", path)
    assert (called.code, called.err) == (0, "")
    plan, lines = Plan.load(path), called.out.splitlines()
    assert plan.pipeline is not None and plan.num_ranks == 4
    assert lines[0].startswith("pp2(gpipe) x dp2, 4 microbatches") and "bubble" in called.out
    first = next(n for n, line in enumerate(lines) if line.startswith("STAGE"))
    for n, stage in enumerate(plan.predicted.stages):
        words = lines[first + 1 + n].split()
        assert words[:2] == [str(n), str(stage.rank)] and stage.first in words and stage.last in words and "4" in words
    assert [use.name for use in axis_uses(plan, Cluster.local(4))] == ["pp", "dp"]


def test_the_same_command_gives_the_same_plan(call: Call, plan_text: str, tmp_path: Path) -> None:
    path = tmp_path / "again.json"
    assert call("plan", *PLANNED, "-o", path).code == 0
    assert path.read_text() == plan_text


def test_plan_page(call: Call, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    called = call("plan", "gpt2-tiny", "--cluster", "local:4", "--pin", "dp=2", "--pin", "tp=2", "-o", path)
    assert (called.code, called.err) == (0, "")
    lines = called.out.splitlines()
    assert lines[0].startswith("dp2 x tp2  for gpt2-tiny on local:4: ")
    assert "\x1b" not in called.out
    stored = {line.split()[0]: line.split()[1:] for line in lines if line.startswith("transformer.h.*.")}
    assert stored["transformer.h.*.mlp.c_fc.weight"] == ["tp=S1", "x2"]
    assert any(line.startswith("proof") and "faster" in line for line in lines)
    assert lines[-1] == f"next: autopar verify gpt2-tiny --cluster local:4 --plan {path}"


SHARDED = ("--pin", "dp=2", "--pin", "tp=2", "--pin", "zero=2", "--pin", "recompute=full", "--micro-batches", "3", "--offload")


def test_what_is_done_about_memory(call: Call, tmp_path: Path) -> None:
    """On the page of the plan, in its file, and in the proof of that file: a bfloat16 plan is verified in bfloat16."""
    path = tmp_path / "plan.json"
    called = call("plan", "gpt2-tiny", "-c", "local:4", "--dtype", "bfloat16", *SHARDED, "-o", path)
    assert (called.code, called.err) == (0, "")
    said = {line.split()[0]: line.split(None, 1)[1] for line in called.out.splitlines() if " " in line}
    assert said["ZeRO"] == "stage 2 over dp: 28 of 28 parameters"
    assert said["recompute"].startswith("2 blocks full; ") and said["recompute"].endswith(" flops more per device and step")
    assert said["microbatches"] == "3 a step"
    assert said["master"] == "float32 copy of the weights, updated by the optimizer, on the host"
    found = content(call("verify", "gpt2-tiny", "-c", "local:4", "--plan", path, "--steps", 1, "--json"))
    assert found["equal"] is True and found["dtype"] == "bfloat16" and found["bytes_predicted"] == found["bytes_counted"] > 0
    assert found["layout"] == "dp2(zero2) x tp2, recompute 2 full, 3 microbatches, optimizer state on the host"


def test_a_plan_for_another_model_names_both(call: Call, plan_file: Path) -> None:
    called = call("verify", "dlrm-tiny", "-c", "local:4", "--plan", plan_file)
    assert called.code == 2 and "mlp-tiny" in called.err and "DLRM" in called.err


@pytest.mark.parametrize(
    "arguments,following",
    [
        (("mlp-tiny", "-c", "local:2"), "next: autopar verify mlp-tiny --cluster local:2"),
        (("mlp-tiny", "-c", "a10g:1x2", "--pin", "dp=2", "-o", "p.json"), "next: autopar verify mlp-tiny --cluster a10g:1x2 --plan p.json"),
        (("mlp-tiny", "-c", "local:2", "--micro-batches", "2", "--offload"), "autopar verify mlp-tiny --cluster local:2 --micro-batches 2 --offload"),
        (("llama-2-7b", "-c", "h100-sxm:1x2", "--pin", "tp=2", "--seq", "128"), "--pin tp=2 -o plan.json"),
        (("llama-2-7b", "-c", "h100-sxm:1x2", "--pin", "tp=2", "--seq", "128", "-o", "p.json"), "next: autopar verify llama-tiny --cluster local:4"),
    ],
)
def test_next_command(
    arguments: tuple[str, ...], following: str, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan_text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    found = Plan.from_json(plan_text)
    monkeypatch.setattr(plan_command, "search", finding(found))
    assert call("plan", *arguments).out.splitlines()[-1].endswith(following)


@pytest.mark.parametrize("option,code", [((), 4), (("--allow-gap",), 0)])
def test_exit_code_when_the_time_was_over(option: tuple[str, ...], code: int, call: Call, monkeypatch: pytest.MonkeyPatch, plan_text: str) -> None:
    found = Plan.from_json(plan_text)
    proof = replace(found.proof, bound=found.proof.objective / 2, gap=0.5, status="budget over 1 mesh")
    monkeypatch.setattr(plan_command, "search", finding(replace(found, proof=proof)))
    called = call("plan", "mlp-tiny", "-c", "local:4", *option)
    assert called.code == code and "50.00% more" in called.out


@pytest.mark.parametrize("options", [("--plan",), ("--pin", "tp=4")])
def test_verify_json(options: tuple[str, ...], call: Call, plan_file: Path) -> None:
    given = ("--plan", plan_file) if options == ("--plan",) else options
    found = content(call("verify", "mlp-tiny", "-c", "local:4", *given, "--steps", 2, "--json"))
    assert found["equal"] is True and found["num_ranks"] == 4 and found["steps"] == 2
    for key in ("loss_rel_err", "grad_rel_err_max", "grad_norm_rel_err", "param_rel_err_max"):
        assert 0 <= found[key] < 1e-9, key
    assert found["bytes_predicted"] == found["bytes_counted"] > 0
    assert found["ops_without_rule"] == []


def test_verify_page(call: Call) -> None:
    called = call("verify", "mlp-tiny", "-c", "local:2", "--pin", "tp=2", "--steps", 1, "--dtype", "float32")
    assert called.code == 0
    assert called.out.startswith("equal: mlp-tiny as tp2 on 2 simulated ranks and in one process, float32, 1 step\n")


def test_verify_says_when_it_is_not_equal(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    report = VerifyReport(
        equal=False, dtype="float64", num_ranks=2, steps=1, loss_rel_err=float("nan"), grad_rel_err_max=0.5, grad_norm_rel_err=0.1, param_rel_err_max=0.2,
        worst_parameter="head.weight", bytes_predicted=8, bytes_counted=16, ops_without_rule=("sort",), failures=("gradient differs by 5.0e-01",),
    )  # fmt: skip
    monkeypatch.setattr("autopar.api.verify", lambda *_, **__: report)
    found = content(call("verify", "mlp-tiny", "-c", "local:2", "--pin", "tp=2", "--json"), code=5)
    assert found["equal"] is False and found["loss_rel_err"] is None
    called = call("verify", "mlp-tiny", "-c", "local:2", "--pin", "tp=2")
    assert called.code == 5 and called.out.startswith("NOT EQUAL") and "gradient differs" in called.out and "sort" in called.out


def test_models(call: Call) -> None:
    found = content(call("models", "--json"))["models"]
    assert [row["name"] for row in found] == list(catalog.names())
    page = call("models").out
    assert all(row["name"] in page for row in found)


def test_clusters(call: Call) -> None:
    found = content(call("clusters", "--json"))["clusters"]
    assert [row["name"] for row in found] == list(Cluster.preset_names())
    assert all(row["memory_bytes"] > 1e9 and row["intra_node"]["bandwidth_bytes_per_s"] > 0 for row in found)
    page = call("clusters").out
    assert all(row["name"] in page for row in found) and "local:N" in page



def layouts(*params: tuple[str, str], ops: tuple[tuple[str, str], ...] = (), text: str) -> Plan:
    """A plan with other parameters and operators on dp2 x tp2."""
    data = json.loads(text) | {"params": dict(params), "ops": dict(ops)}
    return Plan.from_json(json.dumps(data))


def test_layers_are_counted_together(plan_text: str) -> None:
    plan = layouts(("h.0.w", "I,S1"), ("h.1.w", "I,S1"), ("h.2.w", "S0,S1"), ("0.h.11.w.3", "I,I"), ("h.0.w2", "I,S0/3"), text=plan_text)
    found = [(group.pattern, group.layout, group.count, group.whole) for group in parameter_groups(plan)]
    assert found == [
        ("h.*.w", "tp=S1", 2, False),
        ("h.*.w", "dp=S0 tp=S1", 1, False),
        ("*.h.*.w.*", "whole", 1, True),
        ("h.*.w2", "tp=S0/3", 1, False),
    ]


def test_axes_say_what_they_cut_and_where_they_talk(plan_text: str) -> None:
    ops = (("addmm", "dp:m,tp:k"), ("addmm_1", "dp:m,tp:n"), ("addmm_2", "dp:m,tp:n"), ("view", "dp:f0,tp:f1"), ("sum_default_1", "dp:I,tp:I"))
    plan = layouts(("w", "I,I"), ops=ops, text=plan_text)
    outer, inner = axis_uses(plan, Cluster.preset("h100-sxm", nodes=2, devices_per_node=2))
    assert (outer.name, outer.size, outer.cuts, outer.link) == ("dp", 2, "addmm m x3", "InfiniBand")
    assert (inner.name, inner.size, inner.cuts) == ("tp", 2, "addmm n x2, k") and inner.link.startswith("NVLink")
