"""`package.module:function`: what the user's code returns, and every way it can fail, in one line."""

from pathlib import Path

import pytest
import torch

from autopar.errors import UsageError
from autopar.models.load import load_model

SOURCE = """
import sys
import torch
from torch import nn

class Custom(Exception): pass

def module_only(): return nn.Linear(4, 3)
def with_tuple(): return nn.Linear(4, 3), (torch.randn(2, 4),)
def with_tensor(): return nn.Linear(4, 3), torch.randn(2, 4)
def with_dict(batch, seq): return nn.Linear(4, 3), {"input": torch.randn(batch, 4)}
def own():
    from autopar.models.own import Transformer
    return Transformer(vocab=12, positions=8, hidden=12, layers=1, heads=2)
def huggingface():
    from transformers import BertConfig, BertModel
    return BertModel(BertConfig(vocab_size=96, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24))
def dummy():
    module = nn.Linear(4, 3)
    module.dummy_inputs = {"input": torch.randn(5, 4)}
    return module
def fails(): raise Custom("first line\\nsecond line")
def exits(): sys.exit("bye")
def interrupted(): raise KeyboardInterrupt
def wrong_type(): return 3
def too_many(): return nn.Linear(4, 3), (torch.randn(1), torch.randn(1))
def not_tensors(): return nn.Linear(4, 3), {"input": [1, 2]}
needs_more = lambda width: nn.Linear(width, 3)
number = 5
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "users_own_models.py").write_text(SOURCE)
    (tmp_path / "users_broken_module.py").write_text("1 +")
    (tmp_path / "users_missing_import.py").write_text("import surely_not_installed")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("function", ["with_tuple", "with_tensor", "with_dict"])
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_example_inputs_are_named_and_moved(folder: Path, function: str, device: str) -> None:
    loaded = load_model(f"users_own_models:{function}", batch=2, device=device)
    assert {name: (tuple(value.shape), value.device.type) for name, value in loaded.kwargs.items()} == {"input": ((2, 4), device)}
    assert next(loaded.module.parameters()).device.type == device
    assert loaded.tokens_per_batch == 2


def test_module_may_bring_its_own_inputs(folder: Path) -> None:
    own = load_model("users_own_models:own", batch=2, seq=4)
    assert (own.labels_kind, own.tokens_per_batch) == ("token", 8)
    assert load_model("users_own_models:huggingface", batch=2, seq=4).kwargs["input_ids"].shape == (2, 4)
    assert load_model("users_own_models:dummy", batch=2).kwargs["input"].shape == (5, 4)


def test_function_is_seeded(folder: Path) -> None:
    one, two = (load_model("users_own_models:with_tensor", batch=2, device="cpu", seed=5) for _ in range(2))
    assert torch.equal(one.module.weight, two.module.weight)


@pytest.mark.parametrize(
    "spec, words",
    [
        ("users_own_models:module_only", "what Linear takes is not known; return (module, example_inputs)"),
        ("users_own_models:fails", "the function failed; correct it there (Custom: first line second line)"),
        ("users_own_models:exits", "the function failed; correct it there (SystemExit: bye)"),
        ("users_own_models:wrong_type", "returned int"),
        ("users_own_models:too_many", "2 example inputs for 1 arguments"),
        ("users_own_models:not_tensors", "example input 'input' is a list"),
        ("users_own_models:needs_more", "the function failed"),
        ("users_own_models:number", "has no function number"),
        ("users_own_models:nothing", "has no function nothing"),
        ("users_broken_module:f", "cannot import users_broken_module"),
        ("users_missing_import:f", "No module named 'surely_not_installed'"),
        ("no_such_package.at_all:f", "No module named 'no_such_package'"),
    ],
)
def test_failure_is_one_line(folder: Path, spec: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_model(spec, batch=2)
    assert words in str(caught.value) and spec in str(caught.value) and "\n" not in str(caught.value)


def test_overrides_do_not_apply(folder: Path) -> None:
    with pytest.raises(UsageError, match="overrides width apply to presets"):
        load_model("users_own_models:with_dict", batch=2, overrides={"width": 3})


def test_interrupt_passes_through(folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        load_model("users_own_models:interrupted", batch=2)
