"""`compare`, `explain`, `whatif`: numbers that add up, pages that name what they compare, refusals in one line."""

import json
from pathlib import Path

import pytest

from tests.cli.calling import Call, assert_refused

GIVEN = ("mlp-tiny", "--cluster", "h100-sxm:1x4", "--batch", "64")


def test_compare_prices_names_pins_and_files_alike(call: Call, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    assert call("plan", *GIVEN, "--pin", "dp=2", "--pin", "tp=2", "-o", path).code == 0
    called = call("compare", *GIVEN, "searched", "ddp", "dp=2,tp=2", path, "--json")
    assert (called.code, called.err) == (0, "")
    plans = json.loads(called.out)["plans"]
    assert [p["name"] for p in plans] == ["searched", "ddp", "dp=2,tp=2", str(path)]
    for p in plans:
        assert sum(p["terms_s"].values()) == pytest.approx(p["step_time_s"], rel=1e-12)
        assert p["step_time_s"] >= plans[0]["step_time_s"] * (1 - 1e-9)
    assert {k: v for k, v in plans[2].items() if k != "name"} == {k: v for k, v in plans[3].items() if k != "name"}


def test_the_page_of_a_comparison(call: Call) -> None:
    called = call("compare", *GIVEN, "searched", "tp")
    assert (called.code, called.err) == (0, "")
    lines = called.out.splitlines()
    assert lines[0].split() == ["searched", "tp"] and any(line.startswith("step") for line in lines)
    assert lines[-1].startswith("tp against searched: ")


def test_explain_gives_decisions_others_and_reasons(call: Call) -> None:
    asked = ("--why-not", "tp=4", "--why-not", "tp=3", "--top", "2")
    called = call("explain", *GIVEN, *asked, "--json")
    assert (called.code, called.err) == (0, "")
    found = json.loads(called.out)
    assert found["decisions"] and all(d["extra_s"] > -1e-9 and d["chosen"] != d["alternative"] for d in found["decisions"])
    assert len(found["others"]) == 1 and found["others"][0]["step_time_s"] >= found["plan"]["step_time_s"]
    slower, refused = found["why_not"]
    assert slower["step_time_s"] >= found["plan"]["step_time_s"] and "tp=3" in refused["refusal"]
    page = call("explain", *GIVEN, *asked).out
    assert "DECISION" in page and "why not tp=4: " in page and "why not tp=3: pins tp=3 make 3 devices" in page


def test_explain_speaks_of_the_plan_that_plan_makes(call: Call, tmp_path: Path) -> None:
    """On several nodes that is the joint search's, whose decisions are of the whole plan."""
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_layer": 4, "n_embd": 256, "n_head": 4, "n_positions": 64, "vocab_size": 96}
    (tmp_path / "config.json").write_text(json.dumps(config))
    given = (tmp_path, "--cluster", "a100-sxm:2x2", "--batch", "32", "--seq", "64")
    planned = json.loads(call("plan", *given, "--json").out)
    called = call("explain", *given, "--why-not", "tp=4", "--json")
    assert (called.code, called.err) == (0, "")
    found = json.loads(called.out)
    assert found["plan"]["step_time_s"] == pytest.approx(planned["predicted"]["step_time_s"], rel=1e-12) and found["plan"]["layout"] == planned["layout"]
    assert {"pp", "tp", "zero", "recompute"} <= {d["what"] for d in found["decisions"]}
    # the search stops within 1 % of its bound: an alternative may turn out that much better
    assert all(d["extra_s"] is None or d["extra_s"] > -0.01 * found["plan"]["step_time_s"] for d in found["decisions"])
    compared = json.loads(call("compare", *given, "searched", "ddp", "megatron:tp2,pp2", "--json").out)["plans"]
    assert compared[0]["step_time_s"] == pytest.approx(planned["predicted"]["step_time_s"], rel=1e-12)


def test_whatif_plans_again(call: Call) -> None:
    forced = ("--pin", "dp=2", "--pin", "tp=2")
    called = call("whatif", *GIVEN, *forced, "--set", "intra_node.bandwidth*=0.001", "--json")
    assert (called.code, called.err) == (0, "")
    before, after = json.loads(called.out)["plans"]
    assert (before["name"], after["name"]) == ("as it is", "intra_node.bandwidth*=0.001") and after["step_time_s"] > before["step_time_s"]
    called = call("whatif", *GIVEN, *forced, "--sweep", "intra_node.bandwidth*=0.001..1:4", "--json")
    steps = [p["step_time_s"] for p in json.loads(called.out)["plans"]]
    assert len(steps) == 4 and steps == sorted(steps, reverse=True)
    assert "another plan" in call("whatif", *GIVEN[:3], "--batch", "65536", "--sweep", "intra_node.latency*=0.001..10000:3").out


def test_ends_of_a_row_of_machines_are_planned_as_each_is_alone(call: Call, tmp_path: Path) -> None:
    """Whatever processes there are; what lies between begins with their plans, and is as near to what is proven."""
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_layer": 4, "n_embd": 256, "n_head": 4, "n_positions": 64, "vocab_size": 96}
    (tmp_path / "config.json").write_text(json.dumps(config))
    given = ("whatif", tmp_path, "--cluster", "a100-sxm:2x2", "--batch", "32", "--seq", "64", "--json")
    called = call(*given, "--sweep", "inter_node.bandwidth*=0.01..10:4")
    assert (called.code, called.err) == (0, "")
    swept = json.loads(called.out)["plans"]
    assert [p["name"] for p in swept] == [f"inter_node.bandwidth*={factor}" for factor in ("0.01", "0.1", "1", "10")]
    alone = [json.loads(call(*given, "--set", swept[n]["name"]).out)["plans"][1] for n in (0, 2, 3)]
    assert [alone[0], alone[2]] == [swept[0], swept[3]]
    assert swept[2]["step_time_s"] <= alone[1]["step_time_s"] / 0.99  # a gap of 1 % is near enough


def test_whatif_under_a_budget_says_what_is_proven(call: Call, tmp_path: Path) -> None:
    """Of plans that its end cut short. On several nodes, where the joint search makes them."""
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_layer": 4, "n_embd": 256, "n_head": 4, "n_positions": 64, "vocab_size": 96}
    (tmp_path / "config.json").write_text(json.dumps(config))
    given = ("whatif", tmp_path, "--cluster", "a100-sxm:2x2", "--batch", "32", "--seq", "64", "--sweep", "inter_node.bandwidth*=0.5..2:2")
    cut = call(*given, "--budget", "0.000001")
    assert (cut.code, cut.err) == (0, "") and cut.out.count("gap ") == 2 and "gap " not in call(*given).out


def test_the_front_ends_with_the_leanest_plan(call: Call) -> None:
    called = call("whatif", *GIVEN, "--pin", "dp=4", "--front", "--json")
    assert (called.code, called.err) == (0, "")
    plans = json.loads(called.out)["plans"]
    held = [p["peak_memory_bytes"] for p in plans]
    assert len(plans) > 1 and all(after <= 0.97 * before for before, after in zip(held, held[1:], strict=False))
    assert plans[0]["step_time_s"] <= min(p["step_time_s"] for p in plans) * (1 + 1e-9)
    assert call("whatif", *GIVEN, "--pin", "dp=4", "--front").out.startswith("HOLDS AT MOST")


def test_memory_that_no_plan_fits_is_a_point_too(call: Call) -> None:
    called = call("whatif", *GIVEN, "--pin", "dp=4", "--set", "device.memory=1 kB")
    assert (called.code, called.err) == (0, "") and "no plan fits" in called.out


@pytest.mark.parametrize(
    "arguments,words",
    [
        (("compare", *GIVEN, "ddpp"), ["'ddpp' is no plan", "megatron:tp8,pp4"]),
        (("compare", *GIVEN, "nothing.json"), ["nothing.json"]),
        (("compare", *GIVEN, "tp=3"), ["tp=3", "4"]),
        (("compare", *GIVEN, "megatron:tp8"), ["megatron:tp8", "has 4"]),
        (("explain", *GIVEN, "--why-not", "fast"), ["'fast' is no plan"]),
        (("whatif", *GIVEN), ["--set", "--sweep", "--front"]),
        (("whatif", *GIVEN, "--sweep", "device.memory*=1..2:3", "--front"), ["--sweep", "--front"]),
        (("whatif", *GIVEN, "--set", "device.colour=red"), ["device.colour"]),
        (("whatif", *GIVEN, "--sweep", "device.memory*=1..2"), ["--sweep", "POINTS"]),
    ],
)  # fmt: skip
def test_refusals(call: Call, arguments: tuple[str, ...], words: list[str]) -> None:
    assert_refused(call(*arguments), 2, words)
