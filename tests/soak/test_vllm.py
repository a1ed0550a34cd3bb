"""vLLM itself reads what `--to hf` writes: its configuration, what ends an answer, its tokens, and every weight.

Its only build is for CUDA, which its engine needs; what reads a folder runs without. pip gets it into a folder of its
own, with no torch; VLLM_PACKAGES names one that is there already.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llama_acc.core.checkpoint.convert import Request, convert
from llama_acc.core.data.templates import TEMPLATES, Turn
from llama_acc.core.tokenizer import load_tokenizer
from tests.core.checkpoint.folders import state, write_meta
from tests.core.model.test_families import FAMILIES, write_family
from tests.core.tiny import SMALL
from tests.core.tokenizers import END, START, chatml

VERSION = "0.33.0"
# What its readers import that an environment for development has not.
_BESIDES = (
    *("apache-tvm-ffi", "blake3", "cachetools", "cbor2", "compressed-tensors", "depyf", "einops", "loguru", "pyzmq"),
    *("mistral-common", "openai-harmony", "partial-json-parser", "py-cpuinfo", "pybase64", "pycountry", "uvloop"),
    "xgrammar",
)
_RUN = """
import json, sys
import torch
import vllm.platforms
from vllm.platforms.cpu import CpuPlatform
vllm.platforms._current_platform = CpuPlatform()
torch.accelerator.empty_cache = lambda: None  # there is none
from safetensors.torch import save_file
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model
from vllm.tokenizers import get_tokenizer

folder, out = sys.argv[1:]
config = EngineArgs(model=folder, dtype="float32", enforce_eager=True).create_engine_config()
with set_current_vllm_config(config):
    init_distributed_environment(1, 0, f"file://{out}.rendezvous", 0, "gloo")
    initialize_model_parallel(1, 1)
    model = get_model(vllm_config=config)
save_file({name: tensor.clone() for name, tensor in model.named_parameters()}, out)
tokenizer, messages = get_tokenizer(folder), [{"role": "user", "content": "what is 10 + 32?"}]
prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
print(json.dumps({
    "model": type(model).__name__,
    "context": config.model_config.max_model_len,
    "ends": config.model_config.try_get_generation_config().get("eos_token_id"),
    "prompt": tokenizer.encode(prompt, add_special_tokens=False),
}))
"""


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> str:
    if given := os.environ.get("VLLM_PACKAGES"):
        return given
    folder = tmp_path_factory.mktemp("vllm")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:", "--target", folder)
    done = subprocess.run([*pip, f"vllm=={VERSION}", *_BESIDES], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip cannot get it: {done.stderr.strip().splitlines()[-1]}")
    return str(folder)


@pytest.mark.soak
@pytest.mark.parametrize("family", ["", "qwen3", "granite"])
def test_vllm_reads_all_of_a_folder(family: str, packages: str, tokenizer_path: Path, tmp_path: Path) -> None:
    source = chatml(tmp_path / "source", tokenizer_path, "added_tokens.json")
    (source / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": [START, END]}))
    tokenizer = load_tokenizer(source)
    if family:
        write_family(tmp_path / "made", FAMILIES[family] | {"vocab_size": tokenizer.vocab_size})
    else:
        config = replace(SMALL, dim=128, vocab_size=tokenizer.vocab_size)
        write_meta(tmp_path / "made", state(config), config=config)
    for path in (tmp_path / "made").iterdir():
        path.rename(source / path.name)
    (source / "template.json").write_text(TEMPLATES["chatml"].to_json())
    convert(Request(source, tmp_path / "hf", "hf", dtype="fp32", file_bytes=200_000))
    assert (tmp_path / "hf" / "model.safetensors.index.json").is_file()

    paths = os.pathsep.join([packages, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", _RUN, tmp_path / "hf", tmp_path / "vllm"]
    environment = os.environ | {"PYTHONPATH": paths, "VLLM_TARGET_DEVICE": "cpu"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    said = json.loads(ran.stdout.splitlines()[-1])
    assert said["context"] == json.loads((tmp_path / "hf" / "config.json").read_text())["max_position_embeddings"]
    assert said["ends"] == [tokenizer.eos_id, tokenizer.token_id(END)]
    assert said["prompt"] == TEMPLATES["chatml"].prompt_ids(tokenizer, [Turn("human", "what is 10 + 32?")])
    written = {k: v for path in (tmp_path / "hf").glob("*.safetensors") for k, v in load_file(path).items()}
    for name, theirs in load_file(tmp_path / "vllm").items():
        whole, parts = {"qkv_proj": ("qkv_proj", "qkv"), "gate_up_proj": ("gate_up_proj", ("gate", "up"))}.get(
            name.split(".")[-2], ("", ())
        )
        names = [name.replace(whole, f"{part}_proj") for part in parts] or [name]
        ours = torch.cat([written.pop(one) for one in names])
        assert torch.equal(theirs[: len(ours)], ours), name  # the vocabulary is padded there
    assert not written
