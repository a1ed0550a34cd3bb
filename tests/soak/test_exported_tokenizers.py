"""A folder made for transformers gives SentencePiece's ids in transformers of several ages, over real code and text."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor

from llama_acc.core.checkpoint.tokenizer_files import write_tokenizer
from llama_acc.core.data.templates import TEMPLATES, Turn
from llama_acc.core.tokenizer import load_tokenizer
from tests.soak.test_transformers_versions import OF_ITS_AGE, install

_TRY = """
import json, sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
texts, messages = json.load(open(sys.argv[2]))
ids = [tokenizer(text)["input_ids"] for text in texts]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
json.dump([ids, prompt], open(sys.argv[3], "w"))
"""


@pytest.mark.soak
@pytest.mark.parametrize("version", [*(age for age in OF_ITS_AGE if age >= "4.57"), "installed"])
def test_transformers_of_any_age_gives_the_ids_of_sentencepiece(version: str, tmp_path: Path, shared: Path) -> None:
    packages = [os.environ.get("PYTHONPATH", "")]
    if version != "installed":
        install(version, tmp_path / "packages")
        packages.insert(0, str(tmp_path / "packages"))
    tokenizer = load_tokenizer(shared / "assets" / "tokenizer")
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes((shared / "assets/tokenizer/tokenizer.model").read_bytes())
    (folder / "template.json").write_text(TEMPLATES["dialogue"].to_json())
    write_tokenizer(tokenizer, folder, {"bos_token_id": 1, "eos_token_id": 2})
    texts = [path.read_text() for path in sorted(Path(__file__).parents[2].rglob("*.py"))]
    texts += [" ".join(item.values()) for item in json.loads((shared / "assets/data/alpaca_5000.json").read_text())]
    texts += [mark * count for mark in " \n\t-=#*" for count in range(1, 80)]
    texts = [text for text in texts if not any(token in text for token in ("<s>", "</s>", "<unk>"))]
    messages = [{"role": "user", "content": "Tabs\tand  spaces?\n"}]
    (tmp_path / "texts.json").write_text(json.dumps([texts, messages]))
    command = [sys.executable, "-c", _TRY, folder, tmp_path / "texts.json", tmp_path / "ids.json"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, packages))}
    subprocess.run(command, env=environment, cwd=tmp_path, check=True)
    ids, prompt = json.loads((tmp_path / "ids.json").read_text())
    processor = SentencePieceProcessor(model_file=str(shared / "assets/tokenizer/tokenizer.model"))
    assert ids == [[1, *encoded] for encoded in processor.encode(texts)]
    assert prompt == TEMPLATES["dialogue"].prompt_ids(tokenizer, [Turn("human", messages[0]["content"])])
