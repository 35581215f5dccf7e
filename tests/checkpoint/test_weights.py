"""Weights from and to Hugging Face's own folders: what transformers writes we read, what we write transformers reads, bit for bit."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor

import autopar
from autopar.errors import CheckpointError
from autopar.models.load import load_model
from autopar.runtime.launch import Worker, launch

MODELS = {"gpt2-tiny": "tp=2", "t5-tiny": "dp=2"}
"""Both tie weights; t5 one weight under three names."""

SMALL = 60_000
"""Bytes of a file, so that there are several."""


def load(name: str, seed: int) -> nn.Module:
    return load_model(name, batch=4, seq=8, device="cpu", dtype="float32", seed=seed).module


def planned(name: str, pin: str, seed: int) -> nn.Module:
    loaded = load_model(name, batch=4, seq=8, device="cpu", dtype="float32", seed=seed)
    return autopar.parallelize(loaded.module, autopar.Cluster.local(2), loaded.kwargs, pins=[pin])


def equal(module: nn.Module, other: nn.Module) -> bool:
    mine, theirs = dict(module.named_parameters(remove_duplicate=False)), dict(other.named_parameters(remove_duplicate=False))
    whole = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in mine.items()}
    return set(mine) <= set(theirs) and all(torch.equal(x, theirs[name]) for name, x in whole.items())


def there_and_back(worker: Worker, folder: str) -> None:
    for name, pin in MODELS.items():
        mine, theirs = Path(folder, name, "mine"), Path(folder, name, "theirs")
        module = planned(name, pin, seed=1)
        assert not equal(module, load(name, seed=2))
        autopar.load_weights(theirs, module)
        assert equal(module, load(name, seed=2))
        autopar.save_weights(mine, module, max_file_bytes=SMALL)
        with pytest.raises(CheckpointError, match="weights already"):
            autopar.save_weights(mine, module)
        other = planned(name, "tp=2" if pin == "dp=2" else "dp=2", seed=3)
        autopar.load_weights(mine, other)
        assert equal(other, load(name, seed=2))
    worker.send(True)


@pytest.mark.gloo
def test_transformers_and_we_read_each_other(tmp_path: Path) -> None:
    for name in MODELS:
        load(name, seed=2).save_pretrained(tmp_path / name / "theirs", max_shard_size=SMALL)
        assert len(list((tmp_path / name / "theirs").glob("model-*.safetensors"))) > 1
    received: list[bool] = []
    launch(there_and_back, 2, str(tmp_path), on_message=received.append)
    assert received == [True, True]
    for name in MODELS:
        want, mine = load(name, seed=2), tmp_path / name / "mine"
        files = list(mine.iterdir())
        assert len(files) > 2 and all(file.name.startswith("model") for file in files)
        index = json.loads((mine / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in want.parameters())
        want.config.save_pretrained(mine)
        back, report = type(want).from_pretrained(mine, output_loading_info=True)
        assert equal(back, want) and not report["missing_keys"] and not report["unexpected_keys"]


def test_head_and_no_head(tmp_path: Path) -> None:
    """A model with a head takes the weights of the model without, and the other way round."""
    want = load("gpt2-tiny", seed=2)
    autopar.save_weights(tmp_path / "bare", want.transformer)
    found = load("gpt2-tiny", seed=1)
    autopar.load_weights(tmp_path / "bare", found)
    assert equal(found, want)
    autopar.save_weights(tmp_path / "full", want)
    bare = load("gpt2-tiny", seed=1).transformer
    autopar.load_weights(tmp_path / "full", bare)
    assert equal(bare, want.transformer)
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["model.safetensors"]


def test_dtypes_are_converted(tmp_path: Path) -> None:
    module = nn.Linear(4, 3)
    save_file({name: x.detach().bfloat16() for name, x in module.state_dict().items()}, tmp_path / "model.safetensors")
    other = nn.Linear(4, 3, dtype=torch.float64)
    autopar.load_weights(tmp_path, other)
    assert torch.equal(other.weight, module.weight.bfloat16().double())


def test_buffers_that_are_saved(tmp_path: Path) -> None:
    module, other = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    module(torch.randn(8, 3))
    module.register_buffer("scratch", torch.ones(2), persistent=False)
    autopar.save_weights(tmp_path, module)
    assert set(load_file(tmp_path / "model.safetensors")) == {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    autopar.load_weights(tmp_path, other)
    assert torch.equal(other.running_mean, module.running_mean)


def write(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors")


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    module = nn.Linear(4, 3)
    with pytest.raises(CheckpointError, match="neither model.safetensors nor"):
        autopar.load_weights(tmp_path, module)
    write(tmp_path, {"weight": torch.zeros(3, 4)})
    with pytest.raises(CheckpointError, match="no tensor for bias"):
        autopar.load_weights(tmp_path, module)
    write(tmp_path, {"weight": torch.zeros(4, 3), "bias": torch.zeros(3)})
    with pytest.raises(CheckpointError, match=r"weight has shape \[4, 3\], weight of the model \[3, 4\]"):
        autopar.load_weights(tmp_path, module)
    write(tmp_path, {"weight": torch.zeros(3, 4), "bias": torch.zeros(3), "other": torch.zeros(1)})
    with pytest.warns(UserWarning, match="1 tensors are not of this model and were left out, other"):
        autopar.load_weights(tmp_path, module)
    write(tmp_path, {"weight": torch.zeros(4, 4), "bias": torch.zeros(4)})
    with pytest.raises(CheckpointError, match="stands for two tensors"):
        autopar.load_weights(tmp_path, nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"weight": "../model.safetensors"}}))
    with pytest.raises(CheckpointError, match="of the same folder"):
        autopar.load_weights(tmp_path, module)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"gone": "model.safetensors"}}))
    with pytest.raises(CheckpointError, match="gone is not in"):
        autopar.load_weights(tmp_path, module)
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="model.safetensors"):
        autopar.load_weights(tmp_path, module)
