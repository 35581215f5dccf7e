"""Files that come from anywhere: what is not a whole checkpoint is refused by name, and nothing in one is run."""

import json
import math
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from autopar.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from autopar.checkpoint.folder import MANIFEST, checkpoints
from autopar.checkpoint.held import Held, Place
from autopar.checkpoint.part import whole
from autopar.checkpoint.tree import Encoder, decode
from autopar.errors import AutoparError, CheckpointError, UsageError


def run() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    module(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()
    return module, optimizer


def saved(folder: Path, state: Any = None) -> Path:
    return save_checkpoint(folder, *run(), state)


def test_one_process_round_trip(tmp_path: Path) -> None:
    module, optimizer = run()
    save_checkpoint(tmp_path, module, optimizer)
    other = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    again = torch.optim.AdamW(other.parameters(), lr=9.0, betas=(0.1, 0.2))
    load_checkpoint(tmp_path, other, again)
    assert all(torch.equal(x, other.state_dict()[name]) for name, x in module.state_dict().items())
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(module.parameters(), other.parameters(), strict=True))
    a, b = optimizer.state_dict(), again.state_dict()
    assert a["param_groups"] == b["param_groups"]
    assert all(torch.equal(x, b["state"][n][key]) and x.dtype == b["state"][n][key].dtype for n, entry in a["state"].items() for key, x in entry.items())


def test_nothing_to_load(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "none", *run()) is None


def test_two_are_kept_and_numbers_grow(tmp_path: Path) -> None:
    for _ in range(4):
        saved(tmp_path)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-00000004", "checkpoint-00000003"]
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-00000004", "checkpoint-00000003"}
    with pytest.raises(CheckpointError, match="keep=0"):
        save_checkpoint(tmp_path, *run(), keep=0)


def test_a_damaged_one_does_not_count_among_those_that_are_kept(tmp_path: Path) -> None:
    first, second = saved(tmp_path), saved(tmp_path)
    (second / "rank-00000.safetensors").write_bytes(b"")
    saved(tmp_path)
    assert first.is_dir()


def _set(path: str, value: Any) -> Callable[[dict], None]:
    def change(data: dict) -> None:
        *parents, last = path.split(">")
        for key in parents:
            data = data[key]
        data[last] = value

    return change


WEIGHT = "tensors>parameters/0.weight"
CHANGES = {
    "another schema": (_set("schema_version", 99), "schema_version 99"),
    "a path": (_set("files", {"../../etc/passwd": [1, "0"]}), "file name like"),
    "a part outside": (_set(WEIGHT, [[8, 4], "float32", [["rank-00000.safetensors", [[[0, 9]], [[0, 4]]]]]]), "outside"),
    "an unlisted file": (_set(WEIGHT, [[8, 4], "float32", [["rank-00001.safetensors", [[[0, 8]], [[0, 4]]]]]]), "not listed"),
    "a hole": (_set(WEIGHT, [[8, 4], "float32", [["rank-00000.safetensors", [[[0, 7]], [[0, 4]]]]]]), "index says"),
    "no parts": (_set(WEIGHT, [[8, 4], "float32", []]), "32 of 32 elements"),
    "a negative size": (_set(WEIGHT, [[-8, 4], "float32", []]), "number from 0"),
    "another shape": (_set(WEIGHT, [[4, 8], "float32", []]), r"saved as float32\[4, 8\]"),
    "no values": (_set("values", None), "expected an object"),
    "no state": (_set("values", {}), "lacks the random stream"),
    "an optimizer of another kind": (_set("values>optimizer", [1]), "no groups"),
    "values of another kind": (_set("values>parameters", [1]), "not tensors by name"),
    "an unknown word": (_set("values>state", {"$call": "os.system"}), r"\$call"),
    "no such tensor": (_set("values>parameters>0.weight", {"$tensor": "x"}), "no tensor 'x'"),
    "no groups": (_set("values>optimizer", {"groups": 1}), "no groups"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_manifest(name: str, tmp_path: Path) -> None:
    change, message = CHANGES[name]
    path = saved(tmp_path) / MANIFEST
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with warnings.catch_warnings(record=True) as seen, pytest.raises(CheckpointError) as failed:
        warnings.simplefilter("always")
        load_checkpoint(tmp_path, *run())
    assert re.search(message, "\n".join([str(failed.value), *(str(w.message) for w in seen)]))


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b'{"a": NaN}', b'{"a": 1e999}', b"[" * 100_000, b'{"a":' * 80 + b"1" + b"}" * 80, b"\xff", b'{"a": ' + b"9" * 5000 + b"}"])
def test_a_manifest_that_is_none(text: bytes, tmp_path: Path) -> None:
    (saved(tmp_path) / MANIFEST).write_bytes(text)
    with pytest.warns(UserWarning, match="passed over"), pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        load_checkpoint(tmp_path, *run())


def test_every_torn_file_is_seen(tmp_path: Path) -> None:
    """A file of any other length, or with any byte changed, is not accepted; the checkpoint before is."""
    saved(tmp_path, {"number": 1})
    file = saved(tmp_path, {"number": 2}) / "rank-00000.safetensors"
    data = file.read_bytes()
    for cut in [0, 1, 8, len(data) // 2, len(data) - 1]:
        file.write_bytes(data[:cut])
        with pytest.warns(UserWarning, match="passed over"):
            assert load_checkpoint(tmp_path, *run()) == {"number": 1}
    for place in range(0, len(data), max(1, len(data) // 50)):
        file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.warns(UserWarning, match="passed over"):
            assert load_checkpoint(tmp_path, *run()) == {"number": 1}
    file.write_bytes(data)
    assert load_checkpoint(tmp_path, *run()) == {"number": 2}


def encoder() -> Encoder:
    return Encoder(lambda x: Held(x, tuple(x.shape), whole(x.shape), Place(0, 1)))


def test_trees_come_back_as_they_were() -> None:
    tree = {"a": [1, 2.5, True, None, "x"], "t": ((), (1,)), "$a": 1, 3: {"n": {-1: math.inf}}, "z": -0.0, "b~/": {"/": -math.inf}}
    back = decode(json.loads(json.dumps(encoder().encode(tree, "state"), allow_nan=False)))
    assert back == tree and list(back) == list(tree) and math.copysign(1, back["z"]) == -1
    assert math.isnan(decode(encoder().encode(math.nan)))


def test_tensors_have_keys_of_their_own() -> None:
    maker, x = encoder(), torch.zeros(1)
    maker.encode({"a/b": x, "a": {"b": torch.ones(1), "c": x}, "a~1b": torch.ones(2)}, "state")
    assert list(maker.tensors) == ["state/a~1b", "state/a/b", "state/a~01b"]


def test_tensors_below_other_keys_do_not_collide() -> None:
    maker = encoder()
    data = maker.encode({1: torch.zeros(1), "1": torch.ones(1), "$x": {True: torch.full((1,), 2.0)}}, "state")
    assert len(maker.tensors) == 3
    values = decode(data, lambda ref: float(maker.tensors[ref.key].local))
    assert list(values.values()) == [0.0, 1.0, {True: 2.0}]


@pytest.mark.parametrize("bad", [{"x": {1, 2}}, {"x": object()}, [b"bytes"], {"x": torch.zeros}])
def test_what_cannot_be_saved_is_named(bad: Any) -> None:
    with pytest.raises(UsageError, match="of the state is a"):
        encoder().encode(bad, "state")


def test_a_state_that_holds_itself() -> None:
    loop: list = []
    loop.append(loop)
    with pytest.raises(UsageError, match="nested deeper"):
        encoder().encode(loop, "state")


def test_an_old_folder_cannot_run_code(tmp_path: Path) -> None:
    """Loading neither unpickles nor compiles, and writes nothing."""
    saved(tmp_path, {"x": torch.ones(2)})
    target = run()
    events: list[str] = []
    watching = True

    def watch(event: str, args: tuple) -> None:
        writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
        if watching and (event in ("pickle.find_class", "exec", "os.system", "subprocess.Popen", "socket.connect") or writes):
            events.append(f"{event} {args}")

    sys.addaudithook(watch)
    load_checkpoint(tmp_path, *target)
    watching = False
    assert events == []


def test_errors_are_autopars() -> None:
    assert issubclass(CheckpointError, AutoparError)
