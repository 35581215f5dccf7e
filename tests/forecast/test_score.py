"""The scoring command: what rows say, what is refused by name, and the four numbers on results made by hand."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from autopar.errors import UsageError
from autopar.forecast.cases import case_of
from autopar.forecast.command import validate
from autopar.forecast.price import Priced, Refused, Result, price, price_row, price_rows
from autopar.forecast.report import as_svg
from autopar.forecast.runs import OWN_ROWS, Row, read_rows
from autopar.forecast.score import score

ROW = {
    "id": "x-1", "source": "Korthikanti et al.", "model_family": "gpt", "layers": "48", "hidden": "6144", "heads": "64", "seq": "2048", "vocab": "51200",
    "gpu": "A100-80GB-SXM", "num_gpus": "8", "precision": "fp16", "tp": "8", "sp": "1", "pp": "1", "dp": "1", "micro_batch": "4", "global_batch": "4",
    "recompute": "selective", "flash_attention": "0", "metric": "iter_s", "value": "1.1", "kind": "run", "scorable": "full", "split_group": "k-22",
}  # fmt: skip


def row(**changed: str) -> Row:
    return Row({**ROW, **changed}, {})


def result(name: str, predicted: float, measured: float | None, *, source: str = "s", group: str = "", software: str = "one", setting: str = "", memory: int = 1) -> Result:
    return Result(id=name, source=source, group=group or name, machine=("gpu", software), setting=setting, predicted_s=predicted, measured_s=measured,
                  memory_bytes=memory, device_bytes=100, recompute="none", usable_bytes=90)  # fmt: skip


def test_the_22_billion_model_of_korthikanti_within_a_tenth() -> None:
    """1.42 s with full recomputation, 1.10 s with selective and sequence parallelism, on eight A100."""
    found = [price_row(r) for r in (row(), row(id="x-2", recompute="full", sp="0", value="1.42"))]
    assert all(isinstance(r, Result) and abs(r.log_error or 9) < 0.1 and r.fits for r in found)


def test_units_of_what_was_measured() -> None:
    seconds = case_of(row()).measured_s
    assert seconds == 1.1
    assert case_of(row(metric="tokens_per_s_per_gpu", value=str(4 * 2048 / 8 / 1.1))).measured_s == pytest.approx(1.1)
    hardware = "hardware, incl. full recompute"
    flops = 96 * 4 * 2048 * 48 * 6144**2 * (1 + 2048 / (6 * 6144) + 51200 / (16 * 48 * 6144))
    assert case_of(row(metric="tflops_per_gpu", tflops_convention=hardware, value=str(flops / 8 / 1.1 / 1e12))).measured_s == pytest.approx(1.1)


def test_what_notes_infer_fills_what_is_not_printed(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    notes = "MFU 40%; inferred: dp=8, global_batch=2048, vocab about 128k (from memory), ZeRO-1, 8 GPUs per node, fp8 (a footnote)"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*ROW, "notes", "zero_stage", "gpus_per_node"])
        writer.writeheader()
        writer.writerow({**ROW, "num_gpus": "64", "gpu": "H100", "precision": "", "dp": "", "global_batch": "", "vocab": "", "notes": notes})
    (read,) = read_rows(path)
    case = case_of(read)
    assert (case.plan.layout.dp, case.plan.num_microbatches, case.dims.vocab, case.plan.layout.zero) == (8, 64, 128000, 1)
    assert case.product_dtype == "float8_e4m3fn"


def test_what_a_row_leaves_open() -> None:
    """A network that notes name; a precision behind `inferred:`; of a plan of which nothing is printed beside its degrees, the fastest that fits."""
    named = case_of(row(notes="800 Gb/s per node")).cluster.inter_node
    assert named.bandwidth_bytes_per_s == 100e9 / 8 and "notes" in str(named.source_of("bandwidth"))
    assert case_of(row(notes="8x HDR InfiniBand 200 Gb/s per node")).cluster.inter_node.bandwidth_bytes_per_s == 200e9 / 8
    changed = {"num_gpus": "16", "pp": "2", "micro_batch": "", "recompute": "", "global_batch": "16"}
    (given, *others) = case_of(row(**changed)).plans
    assert (given.vpp, given.num_microbatches) == (1, 16) and {p.layout.micro_batch for p in others} == {1, 2, 4}
    assert {p.vpp for p in others} == {1, 2, 3, 4, 6, 8, 12, 24}
    assert case_of(row(**changed | {"vpp": "2"})).plans[1:] == ()
    micro, *rest = case_of(row(**changed | {"micro_batch": "2"})).plans
    assert {p.layout.micro_batch for p in (micro, *rest)} == {2} and {p.vpp for p in rest} == {1, 2, 3, 4, 6, 8, 12, 24}
    assert case_of(row(recompute="")).plans[1:] == ()
    core = {"source": "NVIDIA", "flash_attention": "1", "recompute": ""}
    assert case_of(row(**core)).recompute == ("none", "full") and case_of(row(**core | {"recompute": "selective"})).recompute == ("none",)


def test_activations_lie_on_a_host_that_is_near_and_only_without_a_pipeline() -> None:
    """A model of 70 billion parameters in FSDP on Grace hosts: nothing is computed again, as much is kept on the host as does not fit."""
    fsdp = {
        "source": "NVIDIA", "model_family": "llama", "layers": "80", "hidden": "8192", "heads": "64", "kv_heads": "8", "ffn_hidden": "28672", "seq": "8192",
        "vocab": "128256", "gpu": "GB200", "num_gpus": "64", "precision": "bf16", "tp": "1", "sp": "", "dp": "64", "zero_stage": "3", "micro_batch": "2",
        "global_batch": "256", "recompute": "", "flash_attention": "1", "value": "8",
    }  # fmt: skip
    near, far = case_of(row(**fsdp)), case_of(row(**fsdp | {"gpu": "B200"}))
    assert near.recompute == ("none", "offload", "full") and far.recompute == ("none", "full")
    assert case_of(row(**fsdp | {"pp": "4", "dp": "16", "vpp": "5"})).recompute == ("none", "full")
    kept, again = price(near), price(replace(near, recompute=("none", "full")))
    assert (kept.recompute, again.recompute) == ("offload", "full") and kept.fits and kept.predicted_s < again.predicted_s
    assert kept.predicted_s >= price(replace(near, recompute=("none",))).predicted_s


def test_runs_whose_launches_block_are_priced_so() -> None:
    assert case_of(row(source="BigScience BLOOM (tr11) prequel benchmarks")).kernels.launches_block
    assert not case_of(row(source="BigScience GPT-2 V100 experiments")).kernels.launches_block
    assert case_of(row(precision="mxfp8")).kernels.product_share < case_of(row(precision="fp8")).kernels.product_share == 1


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"experts": "8", "topk": "2"}, "mixture of experts"),
        ({"gpu": "TPU v4"}, "no preset"),
        ({"heads": ""}, "heads not published"),
        ({"dp": "3"}, "do not make 8 devices"),
        ({"layers": "two"}, "not a number"),
        ({"value": "inf"}, "value inf"),
        ({"metric": "train_days"}, "no step time"),
        ({"kind": "memory"}, "not the run of a step"),
        ({"scorable": "no"}, "not scorable"),
        ({"cp": "2", "num_gpus": "16"}, "several in a microbatch"),
        ({"notes": "MLA attention"}, "latent attention"),
    ],
)
def test_rows_that_cannot_be_priced_are_named_with_the_reason(changed: dict[str, str], reason: str) -> None:
    found = price_row(row(**changed))
    assert isinstance(found, Refused) and found.id == "x-1" and reason in found.reason


def test_files_that_hold_no_runs(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,kind\n1,run\n")
    with pytest.raises(UsageError, match="no column source"):
        read_rows(tmp_path / "a.csv")
    with pytest.raises(UsageError, match="cannot read"):
        read_rows(tmp_path / "none.csv")


def test_medians_of_groups_of_sources_and_one_fit_per_machine() -> None:
    """Source a: a group of three rows counts once. Both sources ran on one machine, whose fit is the median of its three groups."""
    e = math.e
    rows = [result(f"a{n}", e**0.1, 1.0, source="a", group="g") for n in range(3)] + [result("a3", e**0.3, 1.0, source="a"), result("b", e**-0.2, 1.0, source="b")]
    found = score(Priced(tuple(rows), ()))
    assert {s.source: (s.rows, s.groups) for s in found.sources} == {"a": (4, 2), "b": (1, 1)}
    assert found.error == pytest.approx((0.2 + 0.2) / 2)
    assert dict(found.efficiency)["gpu", "one"] == pytest.approx(0.1)
    assert found.fitted_error == pytest.approx((0.1 + 0.3) / 2)


def test_recall_and_false_alarms_of_the_sources_that_report_memory() -> None:
    full, free = 99, 10
    rows = [result("o1", 1, None, memory=full), result("o2", 1, None, memory=free), result("r1", 1, 1.0, memory=full), result("r2", 1, 1.0, memory=free)]
    found = score(Priced((*rows, result("z", 1, 1.0, source="other", memory=full)), ())).feasibility
    assert (found.recall, found.false_alarm_share, found.runs) == (0.5, 0.5, 2)


def test_the_command_on_a_small_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "runs.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(ROW) + ["experts"])
        writer.writeheader()
        writer.writerows([ROW, {**ROW, "id": "x-2", "experts": "8"}, {**ROW, "id": "x-3", "kind": "oom", "micro_batch": "64", "global_batch": "64", "recompute": "none"}])
    validate(path, as_text=True, plot=tmp_path / "plot.svg", workers=1)
    printed = json.loads(capsys.readouterr().out)
    assert [r["id"] for r in printed["rows"]] == ["x-1", "x-3"] and [r["id"] for r in printed["refused"]] == ["x-2"]
    assert printed["feasibility"]["recall"] == 1.0 and abs(printed["error"] - abs(printed["rows"][0]["log_error"])) < 1e-12
    assert (tmp_path / "plot.svg").read_text().count("<circle") == 1
    validate(path, workers=1)
    tables = capsys.readouterr().out
    assert "mixture of experts" in tables and "Korthikanti" in tables


def test_a_sample_of_the_rows_it_was_calibrated_on() -> None:
    """Every sixtieth row of each of the dense sources: the median is that of a calibrated model, no row is lost."""
    rows = [r for r in read_rows(OWN_ROWS) if not r.text("experts") and r.text("pp") in ("1", "2", "4")][::60]
    priced = price_rows(rows)
    errors = sorted(abs(r.log_error) for r in priced.results if r.log_error is not None)
    assert len(priced.results) + len(priced.refused) == len(rows) and len(errors) >= 5
    assert errors[len(errors) // 2] < 0.3
    assert as_svg(priced).count("<circle") == len(errors)
