"""Everything a user can get wrong: the exit code and one line that says what to do instead."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autopar.core.cluster import Cluster
from tests.cli.calling import Call, assert_refused

LOCAL = ("--cluster", "local:4")
PLAN = ("plan", "mlp-tiny", *LOCAL)
VERIFY = ("verify", "mlp-tiny", *LOCAL)
RUN = ("run", "gpt2-tiny", *LOCAL)

# arguments, words that the line must hold
ARGUMENTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "unknown command": (("plann",), ("plann", "Did you mean 'plan'")),
    "no model": (("plan",), ("MODEL",)),
    "no cluster": (("plan", "mlp-tiny"), ("--cluster",)),
    "unknown option": ((*PLAN, "--bogus"), ("--bogus",)),
    "two models": (("plan", "mlp-tiny", "gpt2-tiny", *LOCAL), ("gpt2-tiny",)),
    "calibration of nobody": (("calibrate", "--processes", "0"), ("--processes",)),
    "calibration of too many": (("calibrate", "--processes", "65"), ("--processes", "64")),
    "calibration into a folder that is not there": (("calibrate", "--out", "nowhere/machine.toml"), ("--out nowhere/machine.toml", "machine.toml")),
    "calibration into something else": (("calibrate", "--out", "machine.json"), ("machine.json", ".toml")),
    "batch is a word": ((*PLAN, "--batch", "many"), ("--batch",)),
    "batch of nothing": ((*PLAN, "--batch", "0"), ("--batch",)),
    "batch beyond any": ((*PLAN, "--batch", "10000000000000"), ("--batch",)),
    "seq below zero": ((*PLAN, "--seq", "-1"), ("--seq",)),
    "seq beyond the positions": (("plan", "gpt2-tiny", *LOCAL, "--seq", "4096"), ("4096", "64")),
    "dtype unknown": ((*PLAN, "--dtype", "float13"), ("float13", "bfloat16")),
    "budget below zero": ((*PLAN, "--budget", "-1"), ("--budget",)),
    "budget NaN": ((*PLAN, "--budget", "nan"), ("--budget",)),
    "budget of nothing": (("whatif", "mlp-tiny", *LOCAL, "--front", "--budget", "0"), ("--budget",)),
    "memory share of 2": ((*PLAN, "--max-memory", "2"), ("--max-memory",)),
    "memory share NaN": ((*PLAN, "--max-memory", "nan"), ("--max-memory",)),
    "objective unknown": ((*PLAN, "--objective", "speed"), ("speed", "choose from")),
    "within without a unit": ((*PLAN, "--within", "2"), ("--within", "unit")),
    "within no time": ((*PLAN, "--within", "0 s"), ("above 0",)),
    "least memory of fewer devices": ((*PLAN, "--objective", "memory", "--fewer-devices"), ("memory", "leave one")),
    "preset misspelt": (("plan", "gpt2-tyni", *LOCAL), ("gpt2-tyni", "did you mean gpt2-tiny")),
    "model is noise": (("plan", "?\x1b[31m\n?", *LOCAL), ("unknown",)),
    "model is empty": (("plan", "", *LOCAL), ("unknown",)),
    "config missing": (("plan", "nothing/config.json", *LOCAL), ("nothing/config.json", "config.json")),
    "module missing": (("plan", "no_such_module:model", *LOCAL), ("no_such_module",)),
    "function missing": (("plan", "json:no_such_function", *LOCAL), ("no_such_function",)),
    "function fails": (("plan", "json:loads", *LOCAL), ("json:loads",)),
    "cluster misspelt": (("plan", "mlp-tiny", "--cluster", "h100-smx:2"), ("h100-smx", "did you mean h100-sxm")),
    "cluster without size": (("plan", "mlp-tiny", "--cluster", "local"), ("local:4",)),
    "cluster of nothing": (("plan", "mlp-tiny", "--cluster", "local:0"), ("1 to",)),
    "cluster size a word": (("plan", "mlp-tiny", "--cluster", "h100-sxm:two"), ("h100-sxm:16",)),
    "groups of one name": (("plan", "mlp-tiny", "--cluster", "l4:2+l4:2"), ("two groups", "l4:2", "one group")),
    "groups of this machine": (("plan", "mlp-tiny", "--cluster", "local:2+local:2"), ("share its cores", "local:N")),
    "group misspelt": (("plan", "mlp-tiny", "--cluster", "l4:2+h100-smx:2"), ("h100-smx", "did you mean h100-sxm")),
    "least memory on groups": (("plan", "mlp-tiny", "--cluster", "l4:1+a10g:1", "--objective", "memory"), ("l4:1+a10g:1", "one group")),
    "front on groups": (("whatif", "mlp-tiny", "--cluster", "l4:1+a10g:1", "--front"), ("l4:1+a10g:1", "one group")),
    "run on groups elsewhere": (("run", "gpt2-tiny", "--cluster", "l4:1+a10g:1"), ("local:N",)),
    "change of no group": (("whatif", "mlp-tiny", "--cluster", "l4:1+a10g:1", "--set", "group.7.num_nodes=2"), ("group.7.num_nodes", "did you mean")),
    "more devices than the groups": (("plan", "mlp-tiny", "--cluster", "l4:1+a10g:1", "--pin", "dp=64"), ("64", "l4:1+a10g:1")),
    "cluster file missing": (("plan", "mlp-tiny", "--cluster", "missing.toml"), ("missing.toml", "no such file")),
    "cluster file a folder": (("plan", "mlp-tiny", "--cluster", "./"), ("TOML",)),
    "pin without number": ((*PLAN, "--pin", "dp"), ("'dp'", "dp=2")),
    "pin unknown": ((*PLAN, "--pin", "xp=2"), ("xp", "known are")),
    "pin of zero": ((*PLAN, "--pin", "dp=0"), ("'0'",)),
    "pin twice": ((*PLAN, "--pin", "dp=2", "--pin", "dp=4"), ("dp=2", "dp=4", "contradict")),
    "pins too large": ((*PLAN, "--pin", "dp=4", "--pin", "tp=4"), ("16", "local:4 has 4")),
    "pin does not divide": ((*PLAN, "--pin", "dp=3"), ("3", "4")),
    "pin of a pipeline that does not divide": ((*PLAN, "--pin", "pp=3"), ("pp=3", "local:4 has 4")),
    "pin of a pipeline that is none": ((*PLAN, "--pin", "pp=1", "--pin", "virtual=2"), ("pp=1", "no pipeline")),
    "pin of an unknown schedule": ((*PLAN, "--pin", "schedule=2f2b"), ("schedule", "1f1b")),
    "pin of a split backward with state sharding": ((*PLAN, "--pin", "pp=2,schedule=zero-bubble,zero=2"), ("reduce-scatter", "zero=1")),
    "pin of micro-batches that do not divide": ((*PLAN, "--pin", "dp=4", "--pin", "micro_batch=3"), ("micro_batch=3", "12 samples")),
    "pin of experts": ((*PLAN, "--pin", "ep=2"), ("ep",)),
    "pin of an axis that is not there": ((*PLAN, "--pin", "dp=4", "--pin", "*.weight=tp:S0"), ("tp",)),
    "pin of a word that cannot be": ((*PLAN, "--pin", "tp=4", "--pin", "*.weight=tp:S7"), ("S7",)),
    "out in no folder": ((*PLAN, "-o", "no/where/plan.json"), ("no/where", "does not exist")),
    "out is a folder": ((*PLAN, "-o", "."), ("folder",)),
    "verify in 16 bits of the other kind": ((*VERIFY, "--dtype", "float16"), ("float16", "float64, float32, bfloat16")),
    "run in float64": ((*RUN, "--dtype", "float64"), ("float64", "bfloat16")),
    "no microbatch": ((*PLAN, "--micro-batches", "0"), ("--micro-batches",)),
    "microbatches that do not divide": ((*PLAN, "--batch", "8", "--micro-batches", "3"), ("8", "3 microbatches")),
    "ZeRO beyond": ((*PLAN, "--pin", "zero=4"), ("zero=4", "0 to 3")),
    "recompute unknown": ((*PLAN, "--pin", "recompute=some"), ("recompute=some", "selective")),
    "verify of no step": ((*VERIFY, "--steps", "0"), ("--steps",)),
    "verify a large model": (("verify", "llama-3.1-8b", *LOCAL), ("8.03 B", "-tiny")),
    "verify on too many ranks": (("verify", "gpt2", "--cluster", "h100-sxm:16"), ("128 ranks", "-tiny")),
    "run elsewhere": (("run", "gpt2-tiny", "--cluster", "h100-sxm:1"), ("local:N",)),
    "run at no speed": ((*RUN, "--lr", "nan"), ("--lr",)),
    "text missing": ((*RUN, "--text", "missing.txt"), ("missing.txt", "No such file")),
    "text is a folder": ((*RUN, "--text", "."), ("--text",)),
    "text for a model that does not read": (("run", "mlp-tiny", *LOCAL, "--text", "/etc/hostname"), ("mlp-tiny", "does not read")),
    "plan and microbatches": ((*RUN, "--plan", "plan.json", "--micro-batches", "2"), ("--micro-batches 2", "plan.json")),
    "plan and offload": ((*VERIFY, "--plan", "plan.json", "--offload"), ("--offload", "plan.json")),
    "plan and pin": ((*VERIFY, "--plan", "plan.json", "--pin", "dp=2"), ("dp=2", "plan.json")),
}  # fmt: skip


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments(case: str, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, words = ARGUMENTS[case]
    assert_refused(call(*arguments), 2, words)


Edit = Callable[[dict[str, Any]], object]
DATA: dict[str, tuple[Edit, str]] = {
    "another schema": (lambda d: d.update(schema_version=99), "99"),
    "no schema": (lambda d: d.pop("schema_version"), "schema_version"),
    "no mesh": (lambda d: d.pop("mesh"), "mesh"),
    "mesh of words": (lambda d: d.update(mesh=[["dp", "two"]]), "two"),
    "mesh of a million": (lambda d: d.update(mesh=[["dp", 10**6], ["tp", 10**6]]), "ranks"),
    "layout unknown": (lambda d: d["params"].update({"head.bias": "I,X9"}), "X9"),
    "layout too short": (lambda d: d["params"].update({"head.bias": "I"}), "placements"),
    "params a list": (lambda d: d.update(params=[]), "not a valid plan"),
    "predicted a word": (lambda d: d["predicted"].update(step_time_s="soon"), "soon"),
    "unknown key": (lambda d: d["predicted"].update(happiness=1), "happiness"),
    "operator without strategy": (lambda d: d["ops"].popitem(), "no strategy"),
    "strategy of another axis": (lambda d: d["ops"].update({name: "zz:b" for name in d["ops"]}), "zz"),
    "route to nowhere": (lambda d: d["routes"].update({"linear.0": "I,I > P,P > S0,S9"}), ""),
    "parameter without layout": (lambda d: d["params"].pop("head.bias"), "head.bias"),
    "devices of another cluster": (lambda d: d.update(mesh=[["dp", 2], ["tp", 4]]), "8 devices"),
    "model of another": (lambda d: d.update(graph_digest="0" * 16), "plan again"),
}


@pytest.mark.parametrize("case", DATA)
def test_plans(case: str, call: Call, plan_data: dict[str, Any], tmp_path: Path) -> None:
    edit, word = DATA[case]
    edit(plan_data)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan_data))
    assert_refused(call(*VERIFY, "--plan", path), 2, (word,))


BYTES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda b: b"", "not JSON"),
    "not JSON": (lambda b: b"mesh: dp2", "not JSON"),
    "truncated": (lambda b: b[: len(b) // 2], "not JSON"),
    "a list": (lambda b: b"[1, 2]", "schema_version"),
    "not text": (lambda b: bytes(range(256)), "UTF-8"),
    "NaN": (lambda b: b.replace(b'"gap": ', b'"gap": NaN, "x": '), "NaN"),
    "infinite": (lambda b: b.replace(b'"gap": ', b'"gap": Infinity, "x": '), "Infinity"),
    "nested": (lambda b: b"[" * 200_000, "not JSON"),
    "digits": (lambda b: b.replace(b'"gap": ', b'"gap": ' + b"9" * 6000 + b', "x": '), "not JSON"),
}


@pytest.mark.parametrize("case", BYTES)
def test_plan_files(case: str, call: Call, plan_text: str, tmp_path: Path) -> None:
    edit, word = BYTES[case]
    path = tmp_path / "plan.json"
    path.write_bytes(edit(plan_text.encode()))
    assert_refused(call(*VERIFY, "--plan", path), 2, (str(path), word))


def test_plan_file_that_is_huge(call: Call, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with path.open("wb") as stream:
        stream.truncate(1 << 40)  # a hole, not a terabyte
    assert_refused(call(*VERIFY, "--plan", path), 2, ("larger than",))


@pytest.mark.parametrize("name,word", [("missing.json", "No such file"), (".", "directory")])
def test_plan_path(name: str, word: str, call: Call, tmp_path: Path) -> None:
    assert_refused(call(*VERIFY, "--plan", tmp_path / name), 2, (word,))


@pytest.mark.parametrize("arguments", [("verify", "gpt2-tiny", *LOCAL), (*VERIFY, "--batch", "16")])
def test_plan_of_another_model_or_shape(arguments: tuple[str, ...], call: Call, plan_file: Path) -> None:
    assert_refused(call(*arguments, "--plan", plan_file), 2, ("plan again",))


TOML: dict[str, tuple[Callable[[str], str], str]] = {
    "not TOML": (lambda t: "nodes: 4\n", "not valid TOML"),
    "empty": (lambda t: "", "missing"),
    "key missing": (lambda t: t.replace("num_nodes", "# num_nodes"), "num_nodes"),
    "key unknown": (lambda t: t.replace("num_nodes", "nun_nodes"), "did you mean 'num_nodes'"),
    "no unit": (lambda t: re.sub(r'memory = ".*"', "memory = 80", t), "bare number"),
    "no nodes": (lambda t: t.replace("num_nodes = 1", "num_nodes = 0"), "num_nodes"),
    "twice": (lambda t: t + "\nname = 'again'\nname = 'again'\n", "not valid TOML"),
}


@pytest.mark.parametrize("case", TOML)
def test_cluster_files(case: str, call: Call, tmp_path: Path) -> None:
    edit, word = TOML[case]
    path = tmp_path / "cluster.toml"
    path.write_text(edit(Cluster.local(2).to_toml()))
    assert_refused(call("plan", "mlp-tiny", "--cluster", path), 2, ("cluster.toml", word))


@pytest.mark.parametrize(
    "text,word",
    [("{", "not JSON"), ("[]", "object"), ("{}", "architectures"), ('{"architectures": ["GPT3LMHeadModel"]}', "GPT"), ('{"a": NaN}', "NaN")],
)
def test_config_files(text: str, word: str, call: Call, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    assert_refused(call("plan", tmp_path, *LOCAL), 2, ("config.json", word))


def test_folder_without_config(call: Call, tmp_path: Path) -> None:
    assert_refused(call("plan", tmp_path, *LOCAL), 2, ("config.json",))


def test_text_that_is_too_short(call: Call, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("to be")
    assert_refused(call(*RUN, "--text", path), 2, ("5 bytes",))


def test_model_that_does_not_fit(call: Call) -> None:
    assert_refused(call(*PLAN, "--max-memory", "1e-9"), 3, ("no plan fits",))


def test_a_time_that_no_plan_keeps(call: Call) -> None:
    assert_refused(call("plan", "mlp-tiny", *LOCAL, "--objective", "devices", "--within", "1 ns"), 3, ("within 1e-09 s", "the fastest takes"))


def test_model_that_does_not_fit_a_small_device(call: Call, tmp_path: Path) -> None:
    path = tmp_path / "small.toml"
    path.write_text(re.sub(r'memory = ".*"', 'memory = "1 kB"', Cluster.local(2).to_toml(), count=1))
    assert_refused(call("plan", "mlp-tiny", "--cluster", path), 3, ("no plan fits",))
