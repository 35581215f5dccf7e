"""Malformed and hostile config.json files: the exact exception, one line that names file and fault, nothing imported or fetched."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from autopar.errors import AutoparError, FileFormatError, UsageError
from autopar.models.load import load_model

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96,
}  # fmt: skip


def deep(levels: int, innermost: object = 1) -> object:
    for _ in range(levels):
        innermost = {"a": innermost}
    return innermost


def changed(**fields: object) -> bytes:
    return json.dumps({**LLAMA, **fields}).encode()


def text(replaced: str, by: str) -> bytes:
    return json.dumps(LLAMA).replace(replaced, by).encode()


FILES: dict[str, tuple[bytes, type[AutoparError], str]] = {
    "empty": (b"", FileFormatError, ":1:1: not JSON"),
    "cut off": (json.dumps(LLAMA).encode()[:-20], FileFormatError, "not JSON"),
    "trailing comma": (b'{"a": 1,\n}', FileFormatError, ":2:1: not JSON"),
    "a list": (b"[]", FileFormatError, "holds a list"),
    "a number": (b"3", FileFormatError, "holds a int"),
    "null": (b"null", FileFormatError, "holds a NoneType"),
    "not UTF-8": (b"\xff\xfe{}", FileFormatError, "not UTF-8"),
    "binary": (bytes(range(256)), FileFormatError, "not UTF-8"),
    "pickle": (b"\x80\x04\x95\x10\x00", FileFormatError, "not UTF-8"),
    "too large": (b" " * (4 * 2**20 + 1), FileFormatError, "larger than 4 MiB"),
    "deep lists": (b"[" * 2_000_000, FileFormatError, "nested deeper than 64"),
    "deep tables": (changed(extra=deep(70)), FileFormatError, "nested deeper than 64"),
    "deep mixed": (changed(extra=[[deep(62)]]), FileFormatError, "nested deeper than 64"),
    "duplicate key": (b'{"a": 1, "a": 2}', FileFormatError, "key 'a' is given twice"),
    "NaN": (text('"hidden_size": 64', '"rms_norm_eps": NaN'), FileFormatError, "NaN is not a number"),
    "infinity": (text('"hidden_size": 64', '"rms_norm_eps": -Infinity'), FileFormatError, "-Infinity is not a number"),
    "overflowing float": (text('"hidden_size": 64', '"rms_norm_eps": 1e999'), FileFormatError, "rms_norm_eps' is not finite"),
    "endless integer": (text("64", "9" * 5000), FileFormatError, "too long to read"),
    "huge integer": (text("64", "9" * 100), FileFormatError, "hidden_size' = 999999… (100 digits)"),
    "million layers": (changed(num_hidden_layers=10**6), FileFormatError, "'num_hidden_layers' = 1000000 is outside 1 to 2000"),
    "no layers": (changed(num_hidden_layers=0), FileFormatError, "outside 1 to 2000"),
    "negative layers": (changed(num_hidden_layers=-1), FileFormatError, "outside 1 to 2000"),
    "billion words": (changed(vocab_size=10**9), FileFormatError, "outside 1 to 10000000"),
    "no words": (changed(vocab_size=0), FileFormatError, "outside 1 to 10000000"),
    "negative width": (changed(hidden_size=-64), FileFormatError, "outside 1 to 1000000"),
    "no heads": (changed(num_attention_heads=0), FileFormatError, "outside 1 to 100000"),
    "too many labels": (changed(num_labels=10**9), FileFormatError, "outside 0 to 1000000"),
    "too many positions": (changed(max_position_embeddings=10**12), FileFormatError, "outside -1 to 100000000"),
    "too many parameters": (changed(hidden_size=10**6, num_hidden_layers=2000), FileFormatError, "parameters; the limit is 1e+14"),
    "nested hostile": (changed(text_config={"num_hidden_layers": 10**9}), FileFormatError, "'text_config.num_hidden_layers'"),
    "listed hostile": (changed(depths=[2, 10**9]), FileFormatError, "'depths'"),
    "long key": (changed(**{"k" * 1000: 1}), FileFormatError, "not a short text"),
    "fractional layers": (changed(num_hidden_layers=2.5), FileFormatError, "num_hidden_layers"),
    "layers as text": (changed(num_hidden_layers="2"), FileFormatError, "num_hidden_layers"),
    "width as list": (changed(hidden_size=[64]), FileFormatError, "hidden_size"),
    "vocabulary null": (changed(vocab_size=None), FileFormatError, "vocab_size"),
    "heads do not divide": (changed(num_attention_heads=5), FileFormatError, "hidden size (64) is not a multiple"),
    "unknown activation": (changed(hidden_act="os.system"), FileFormatError, "os.system"),
    "unknown rope": (changed(rope_scaling={"rope_type": "evil", "factor": 2.0}), FileFormatError, "evil"),
    "rope as number": (changed(rope_scaling=5), FileFormatError, "LlamaForCausalLM cannot be built"),
    "a method": (changed(to_dict=1), FileFormatError, "'to_dict' would replace a method"),
    "a nested method": (changed(rope_scaling={"get_text_config": 1}), FileFormatError, "'get_text_config' would replace a method"),
    "labels as text": (changed(id2label="x"), FileFormatError, "LlamaForCausalLM cannot be built"),
    "remote backbone": (changed(backbone="someone/model"), FileFormatError, "names a model kept elsewhere"),
    "timm inside": (changed(backbone_config={"model_type": "timm_backbone"}), FileFormatError, "builds through timm"),
    "timm class": (json.dumps({"architectures": ["TimmWrapperModel"], "architecture": "hf-hub:x/y"}).encode(), UsageError, "through timm"),
    "million numbers": (changed(depths=[1] * 10**6 + [10**9]), FileFormatError, "'depths'"),
    "million keys": (b"{" + b",".join(b'"k%d":1' % i for i in range(300_000)) + b',"k7":2}', FileFormatError, "'k7' is given twice"),
    "wrong type": (changed(model_type="gpt2"), FileFormatError, "model_type 'gpt2' does not belong to LlamaForCausalLM"),
    "no architectures": (json.dumps({"model_type": "llama"}).encode(), FileFormatError, "architectures is None"),
    "empty architectures": (changed(architectures=[]), FileFormatError, "architectures is []"),
    "architectures as text": (changed(architectures="LlamaForCausalLM"), FileFormatError, "architectures is 'Llama"),
    "architectures nested": (changed(architectures=[["LlamaForCausalLM"]]), FileFormatError, "architectures is [["),
    "dotted class": (changed(architectures=["os.system"]), FileFormatError, "architectures is ['os.system']"),
    "dunder class": (changed(architectures=["__import__"]), FileFormatError, "architectures is ['__import__']"),
    "class with a line break": (changed(architectures=["Llama\nForCausalLM"]), FileFormatError, "architectures is ['Llama"),
    "misspelt class": (changed(architectures=["LlamaForCasualLM"]), UsageError, "did you mean LlamaForCausalLM"),
    "unknown class": (changed(architectures=["Zzzzzz"]), UsageError, "has no model class Zzzzzz"),
    "not a model": (changed(architectures=["LlamaConfig"]), UsageError, "has no model class LlamaConfig"),
    "a function": (changed(architectures=["pipeline"]), UsageError, "has no model class pipeline"),
    "automatic class": (changed(architectures=["AutoModel"]), UsageError, "has no model class AutoModel"),
    "abstract class": (changed(architectures=["LlamaPreTrainedModel"]), UsageError, "has no model class LlamaPreTrainedModel"),
    "base class": (changed(architectures=["PreTrainedModel"]), UsageError, "has no model class PreTrainedModel"),
}


@pytest.mark.parametrize("case", FILES)
def test_malformed_file_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    content, error, words = FILES[case]
    file = tmp_path / "config.json"
    file.write_bytes(content)
    began = time.monotonic()
    with pytest.raises(AutoparError) as caught:
        load_model(str(tmp_path), batch=1, seq=4)
    message = str(caught.value)
    assert type(caught.value) is error
    assert words in message and message.startswith(str(file))
    assert "\n" not in message and len(message) < 700
    assert time.monotonic() - began < 5


def test_missing_file_folder_and_device_are_usage_errors(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "config.json", Path("/dev/zero")):
        with pytest.raises(UsageError, match=r"no config\.json here"):
            load_model(str(path), batch=1)


def test_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(LLAMA).encode())
    assert load_model(str(tmp_path), batch=1, seq=4).labels_kind == "token"


AUDIT = """
import json, pathlib, sys
import torch, transformers
from autopar.errors import AutoparError
from autopar.models.load import load_model

folder, payloads = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
FORBIDDEN = {"socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "pickle.find_class"}
seen = []

def watch(event, arguments):
    if event in FORBIDDEN or (event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")):
        seen.append((event, str(arguments)[:200]))

load_model("llama-tiny", batch=1)  # what a first load writes or starts on its own is not the file's doing
sys.addaudithook(watch)
for payload in payloads:
    (path := folder / "config.json").write_text(json.dumps(payload)); seen.clear()
    try:
        load_model(str(path), batch=1, seq=4)
    except AutoparError:
        pass
    assert not seen, (payload, seen)
print("clean")
"""
PAYLOADS = [
    {"auto_map": {"AutoConfig": "evil/repo--configuration.Config", "AutoModelForCausalLM": "evil/repo--modeling.Model"}},
    {"trust_remote_code": True, "_name_or_path": "evil/repo", "name_or_path": "evil/repo"},
    {"attn_implementation": "evil/kernel"},
    {"_attn_implementation": "evil/kernel:function", "_attn_implementation_internal": "evil/kernel"},
    {"experts_implementation": "evil/kernel", "_experts_implementation_internal": "evil/kernel", "use_kernels": True},
    {"kernel_config": {"RMSNorm": "evil/kernel:RMSNorm"}},
    {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    {"torch_dtype": "os.system", "dtype": "hub.load"},
    {"hidden_act": "__import__('os').system('true')"},
    {"architectures": ["RagModel"], "model_type": "rag", "question_encoder": {"model_type": "bert"}, "generator": {"model_type": "bart"}},
    {"architectures": ["DetrModel"], "model_type": "detr", "backbone": "evil/resnet", "use_pretrained_backbone": True},
    {
        "architectures": ["DetrModel"],
        "model_type": "detr",
        "use_timm_backbone": True,
        "backbone_config": {"model_type": "timm_backbone", "backbone": "evil"},
    },
    {"architectures": ["TimmWrapperModel"], "model_type": "timm_wrapper", "architecture": "hf-hub:evil/repo"},
    {"architectures": ["EncoderDecoderModel"], "model_type": "encoder-decoder", "encoder": {"model_type": "evil"}, "decoder": {}},
    {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "text_config": "evil/repo", "vision_config": "evil/repo"},
    {"per_layer_config": {"0": {"auto_map": {"AutoModel": "evil--m.M"}}}},
]


def test_hostile_files_fetch_start_and_write_nothing(tmp_path: Path) -> None:
    payloads = [{**LLAMA, **payload} for payload in PAYLOADS]
    command = [sys.executable, "-c", AUDIT, str(tmp_path), json.dumps(payloads)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.stdout.strip().endswith("clean"), run.stderr[-2000:]
