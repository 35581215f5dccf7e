"""transformers classes, each from a config.json in a folder of its own: they load, run with a finite loss, and export."""

import json
import logging
from pathlib import Path

import pytest
import torch

from autopar.models.load import LoadedModel, load_model

CONFIGS = json.loads((Path(__file__).parent / "tiny_configs.json").read_text())
WITHOUT_LOSS = {"BertModel"}


def load(folder: Path, name: str, fields: dict, **arguments) -> LoadedModel:
    (folder / "config.json").write_text(json.dumps({"architectures": [name], **fields}))
    return load_model(str(folder), **{"batch": 2, "seq": 16, **arguments})


@pytest.mark.parametrize("name", CONFIGS)
def test_class_runs_on_cpu(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        loaded = load(tmp_path, name, CONFIGS[name], device="cpu")
        out = loaded.module(**loaded.kwargs)
    assert type(loaded.module).__name__ == name
    if name in WITHOUT_LOSS:
        assert loaded.labels_kind is None
    else:
        assert loaded.labels_kind is not None
        out.loss.backward()
        assert torch.isfinite(out.loss)
    assert "past_key_values" not in out
    assert not [record.getMessage() for record in caplog.records if "token_id" in record.getMessage() or "loss_type" in record.getMessage()]


@pytest.mark.parametrize("name", CONFIGS)
def test_class_exports_from_meta(tmp_path: Path, name: str) -> None:
    loaded = load(tmp_path, name, CONFIGS[name])
    program = torch.export.export(loaded.module, (), loaded.kwargs, strict=False).run_decompositions({})
    assert program.graph_signature.user_outputs


@pytest.mark.parametrize("name", ["Qwen2ForCausalLM", "BartForConditionalGeneration", "CLIPModel"])
def test_meta_and_cpu_batches_have_the_same_shapes(tmp_path: Path, name: str) -> None:
    meta, cpu = (load(tmp_path, name, CONFIGS[name], device=device) for device in ("meta", "cpu"))
    assert [(k, getattr(v, "shape", v), getattr(v, "dtype", v)) for k, v in meta.kwargs.items()] == [
        (k, getattr(v, "shape", v), getattr(v, "dtype", v)) for k, v in cpu.kwargs.items()
    ]


def test_file_and_folder_name_the_same_model(tmp_path: Path) -> None:
    load(tmp_path, "BertModel", CONFIGS["BertModel"])
    by_file = load_model(str(tmp_path / "config.json"), batch=1)
    assert by_file.name.endswith("config.json")


def test_choices_made_in_python_are_off(tmp_path: Path) -> None:
    config = load(tmp_path, "BartForConditionalGeneration", CONFIGS["BartForConditionalGeneration"]).module.config
    assert (config.encoder_layerdrop, config.decoder_layerdrop, config.use_cache) == (0.0, 0.0, False)
    config = load(tmp_path, "Wav2Vec2ForSequenceClassification", CONFIGS["Wav2Vec2ForSequenceClassification"]).module.config
    assert (config.layerdrop, config.apply_spec_augment) == (0.0, False)


def test_special_tokens_move_into_a_small_vocabulary(tmp_path: Path) -> None:
    fields = {**CONFIGS["Qwen2ForCausalLM"], "bos_token_id": 151643, "eos_token_id": [151645, 7], "pad_token_id": -1}
    config = load(tmp_path, "Qwen2ForCausalLM", fields).module.config
    assert config.eos_token_id[1] == 7
    moved = [config.bos_token_id, config.eos_token_id[0], config.pad_token_id]
    assert len(set(moved)) == 3 and all(0 <= token < 96 for token in moved)


def test_run_settings_of_the_file_are_ignored(tmp_path: Path) -> None:
    settings = {
        "torch_dtype": "float16", "return_dict": False, "use_cache": True, "output_attentions": True, "_attn_implementation": "flash_attention_2",
        "attn_implementation": "someone/kernel", "auto_map": {"AutoModel": "evil--code.Model"}, "quantization_config": {"quant_method": "fp8"},
    }  # fmt: skip
    loaded = load(tmp_path, "Qwen2ForCausalLM", {**CONFIGS["Qwen2ForCausalLM"], **settings}, device="cpu")
    out = loaded.module(**loaded.kwargs)
    assert out.loss.dtype == torch.float32
    assert loaded.module.config._attn_implementation == "sdpa"
    assert list(out) == ["loss", "logits"]


def test_layer_lists_follow_an_overridden_number_of_layers(tmp_path: Path) -> None:
    fields = {**CONFIGS["Gemma2ForCausalLM"], "layer_types": ["sliding_attention", "full_attention"]}
    config = load(tmp_path, "Gemma2ForCausalLM", fields, overrides={"num_hidden_layers": 3}).module.config
    assert config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
