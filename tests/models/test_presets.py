"""Presets: sizes against published figures, and every tiny one runs and exports."""

import subprocess
import sys

import pytest
import torch

from autopar.errors import UsageError
from autopar.models import catalog
from autopar.models.load import load_model

TINY = [preset.name for preset in catalog.presets() if preset.is_tiny]
PUBLISHED = {
    "gpt2": (124_439_808, "sum over the tensors of OpenAI's 124M checkpoint"),
    "gpt2-xl": (1_558e6, "OpenAI's name of the release, 1558M"),
    "gpt3-175b": (174_600e6, "Brown et al. 2020, appendix D"),
    "llama-2-7b": (6.74e9, "model card, 6.74B"),
    "llama-3.1-8b": (8.03e9, "model card, 8.03B"),
    "llama-3.1-70b": (70.6e9, "model card, 70.6B"),
    "llama-3.1-405b": (406e9, "model card, 406B"),
    "mixtral-8x7b": (46.7e9, "Mistral AI's announcement, 46.7B in total"),
    "t5-base": (223e6, "model card, 223M"),
    "vit-base": (86_567_656, "torchvision documentation of vit_b_16"),
    "alexnet": (61_100_840, "torchvision documentation of alexnet"),
    # The encoder with pooler is 109,482,240 and 335,141,888; the word head replaces the pooler h*h + h by
    # a layer h*h + h, a norm 2h and a bias per word.
    "bert-base": (109_482_240 + 2 * 768 + 30_522, "BERT base uncased, encoder count adjusted for the head"),
    "bert-large": (335_141_888 + 2 * 1024 + 30_522, "BERT large uncased, encoder count adjusted for the head"),
    # MLPerf's rows at 128 numbers each, and the two towers 13-512-256-128, 479-1024-1024-512-256-1.
    "dlrm": (187_767_399 * 128 + 155_520 + 2_197_505 + 1024, "MLPerf DLRM: rows x width and both towers"),
    "mlp": (8 * (4096**2 + 4096) + 4097 * 1000, "by hand"),
    "transformer": (12 * (12 * 768**2 + 13 * 768) + 2 * 768 + (2 * 50_304 + 1024) * 768, "by hand"),
}


def count(name: str) -> int:
    return sum(p.numel() for p in load_model(name, batch=1).module.parameters())


@pytest.mark.parametrize("name", catalog.names())
def test_parameter_count_is_the_stored_and_the_published_one(name: str) -> None:
    counted = count(name)
    assert counted == catalog.preset(name).parameters
    if name not in TINY:
        figure, _ = PUBLISHED[name]
        assert counted == pytest.approx(figure, rel=1e-3)


@pytest.mark.parametrize("name", TINY)
def test_tiny_preset_has_a_finite_loss_and_all_gradients(name: str) -> None:
    loaded = load_model(name, batch=2, device="cpu")
    out = loaded.module(**loaded.kwargs)
    loss = out if isinstance(out, torch.Tensor) else out.loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in loaded.module.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", TINY)
def test_tiny_preset_exports_on_meta(name: str) -> None:
    loaded = load_model(name, batch=2)
    program = torch.export.export(loaded.module, (), loaded.kwargs, strict=False).run_decompositions({})
    tensors = {n.meta["val"].device.type for n in program.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)}
    assert tensors == {"meta"}


def test_same_seed_same_weights_and_batch() -> None:
    one, same, other = (load_model("gpt2-tiny", batch=2, device="cpu", seed=seed) for seed in (3, 3, 4))
    state = one.module.state_dict()
    assert all(torch.equal(value, same.module.state_dict()[key]) for key, value in state.items())
    assert torch.equal(one.kwargs["input_ids"], same.kwargs["input_ids"])
    assert not torch.equal(one.kwargs["input_ids"], other.kwargs["input_ids"])
    assert not torch.equal(state["transformer.wte.weight"], other.module.state_dict()["transformer.wte.weight"])


def test_loading_leaves_generator_and_default_dtype_alone() -> None:
    before = torch.get_rng_state()
    load_model("mlp-tiny", batch=2, device="cpu", dtype="bf16", seed=9)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("name", ["llama-tiny", "mlp-tiny"])
def test_dtype_and_mode_are_as_asked(name: str) -> None:
    loaded = load_model(name, batch=2, dtype="bf16", train=False)
    assert {p.dtype for p in loaded.module.parameters()} == {torch.bfloat16}
    assert not loaded.module.training


def test_rotary_tables_stay_in_float32_under_bfloat16() -> None:
    module = load_model("llama-tiny", batch=1, device="cpu", dtype="bfloat16").module
    assert {buffer.dtype for buffer in module.buffers()} == {torch.float32}


def test_overrides_reach_aliases_tables_and_own_classes() -> None:
    gpt = load_model("gpt2", batch=1, overrides={"num_hidden_layers": 2, "hidden_size": 96})
    assert len(gpt.module.transformer.h) == 2 and gpt.module.config.n_embd == 96
    llama = load_model("llama-3.1-8b", batch=1, overrides={"num_hidden_layers": 1, "rope_scaling": {"factor": 4.0}})
    assert llama.module.config.rope_parameters["factor"] == 4.0
    assert llama.module.config.rope_parameters["rope_type"] == "llama3"
    assert len(load_model("mlp", batch=1, overrides={"depth": 3}).module.layers) == 3


@pytest.mark.parametrize(
    "name, overrides, words",
    [
        ("gpt2", {"n_layers": 2}, "n_layers is not a field of GPT2Config; did you mean n_layer"),
        ("gpt2", {"n_layer": 10**6}, "outside 1 to 2000"),
        ("gpt2", {"dtype": "bfloat16"}, "not about the model's shape"),
        ("mlp", {"height": 2}, "height is not an argument of MLP"),
        ("mlp", {"width": -4}, "outside 1 to 1000000"),
        ("mlp", {"width": "wide"}, "preset mlp: cannot be built with {'width': 'wide'}"),
    ],
)
def test_bad_override_is_named(name: str, overrides: dict, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_model(name, batch=1, overrides=overrides)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "spec, words",
    [
        ("gpt-2", "did you mean gpt2"),
        ("lama-3.1-8b", "did you mean llama-3.1-8b"),
        ("zzzz", "give a preset"),
        ("meta-llama/Llama-3.1-8B", "unknown"),
        ("", "unknown"),
        ("a\0b", "unknown"),
        ("x" * 10_000, "unknown"),
        ("nowhere/config.json", "no config.json here"),
    ],
)
def test_unknown_model_says_what_to_type(spec: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_model(spec, batch=1)
    assert words in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "arguments", [{"batch": 0}, {"batch": 2, "seq": 0}, {"batch": True}, {"batch": 1, "device": "tpu"}, {"batch": 1, "dtype": "int8"}]
)
def test_bad_argument_is_refused(arguments: dict) -> None:
    with pytest.raises(UsageError):
        load_model("mlp-tiny", **arguments)


@pytest.mark.parametrize("name", ["gpt2-tiny", "transformer-tiny", "bert-tiny"])
def test_seq_beyond_learned_positions_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="seq 65 is longer than the 64 "):
        load_model(name, batch=1, seq=65)


def test_default_seq_follows_fewer_positions() -> None:
    assert load_model("gpt2-tiny", batch=1).tokens_per_batch == 32
    assert load_model("gpt2-tiny", batch=1, overrides={"n_positions": 8}).tokens_per_batch == 8
    assert load_model("transformer", batch=1, overrides={"positions": 8}).tokens_per_batch == 8


def test_catalog_needs_no_torch_and_lists_everything() -> None:
    code = "import sys; from autopar.models import catalog; print(catalog.describe()); assert 'torch' not in sys.modules"
    text = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert len(text.splitlines()) == len(catalog.names()) == len(set(catalog.names()))
    assert "llama-3.1-405b" in text and "406 B" in text


def test_changing_a_config_changes_no_preset() -> None:
    catalog.preset("gpt2").config["n_layer"] = 1
    assert catalog.preset("gpt2").config["n_layer"] == 12
