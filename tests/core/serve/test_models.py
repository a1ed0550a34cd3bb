"""Models that see, several adapters over one base, and any request that the API's own description allows."""

import base64
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, given, settings
from PIL import Image

from llama_acc.core.data.templates import Turn, get_template
from llama_acc.core.generate.chat import encode_prompt
from llama_acc.core.generate.engine import Engine
from llama_acc.core.generate.load import LoadedModel, load_model, load_models
from llama_acc.core.model.tuning.bias_norm import BiasNorm
from llama_acc.core.model.tuning.lora import LoRA
from llama_acc.core.tokenizer import load_tokenizer
from tests.core.generate.decoding import decode
from tests.core.generate.images_work import GREEDY, pictures
from tests.core.generate.test_multi_adapter import CONFIG, write_adapter
from tests.core.seeing import seeing_model
from tests.core.serve.running import PATIENCE, serving
from tests.core.tiny import CPU, SMALL, random_model, save_model


def test_pictures_are_seen_and_no_address_is_fetched(tokenizer_path: Path) -> None:
    pytest.importorskip("transformers")
    from llama_acc.core.generate.load import load_vision_encoder

    model = seeing_model("tiny").requires_grad_(False)
    template = get_template("dialogue")
    loaded = LoadedModel(
        model, load_tokenizer(tokenizer_path), template, "asked for", CPU, load_vision_encoder(model, None, CPU)
    )
    assert loaded.vision is not None
    [pixels] = pictures(1, loaded.vision.image_size, 3)
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    expected = encode_prompt(loaded, [Turn("human", "what is it?")], 1)._replace(images=[pixels])

    def body(url: str) -> dict[str, Any]:
        parts = [{"type": "text", "text": "what is it?"}, {"type": "image_url", "image_url": {"url": url}}]
        messages = [{"role": "user", "content": parts}]
        return {"model": "seeing", "messages": messages, "temperature": 0, "max_tokens": GREEDY.max_new_tokens}

    with serving({"seeing": loaded}) as running:
        url = f"{running.url}/v1/chat/completions"
        answer = httpx2.post(url, json=body(f"data:image/png;base64,{data}")).json()
        assert answer["choices"][0]["message"]["content"] == decode(Engine(loaded), [expected], GREEDY)[0].text
        assert answer["usage"]["prompt_tokens"] == len(expected.tokens)
        for wrong in (
            "data:image/png;base64,AAAA",
            "data:image/png;base64,?",
            "data:text/plain,a",
            "file:///etc/hostname",
        ):
            response = httpx2.post(url, json=body(wrong))
            assert (response.status_code, "error" in response.json()) == (400, True), wrong


def test_adapters_are_chosen_by_name_over_one_base(tokenizer_path: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    save_model(random_model(CONFIG), base, torch.float32)
    (base / "tokenizer.model").write_bytes(tokenizer_path.read_bytes())
    layers = {"base": [base]}
    for name, tuning in {"lora": LoRA(4), "norms": BiasNorm()}.items():
        layers[name] = [base, write_adapter(tmp_path / name, tuning, tokenizer_path)]
    ask = {"prompt": "once upon", "temperature": 0, "max_tokens": 12}
    with serving(dict(load_models(layers, device="cpu"))) as running, httpx2.Client(timeout=60) as client:

        def text(name: str) -> str:
            return str(
                client.post(f"{running.url}/v1/completions", json={"model": name, **ask}).json()["choices"][0]["text"]
            )

        found = {name: text(name) for name in layers}
    assert len(set(found.values())) == 3
    for name, folders in layers.items():
        with serving({name: load_model(*folders, device="cpu")}) as running:
            alone = httpx2.post(f"{running.url}/v1/completions", json={"model": name, **ask}).json()
        assert found[name] == alone["choices"][0]["text"]


def test_no_request_of_the_description_makes_the_server_fail(tokenizer_path: Path) -> None:
    """Whatever schemathesis makes of /openapi.json, also what that forbids, is answered or refused."""
    model = random_model(replace(SMALL, max_seq_len=32), seed=5).requires_grad_(False)
    loaded = LoadedModel(model, load_tokenizer(tokenizer_path), get_template("none"), "asked for", CPU)
    seen = set[int]()

    def ask(case: Any) -> None:
        if isinstance(case.body, dict) and "model" in case.body:
            case.body |= {"model": "small"}
        seen.add(case.call(timeout=PATIENCE).status_code)

    with serving({"small": loaded}, slots=64, queue=10_000) as running:
        schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
        few = settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        for operation in schema.get_all_operations():
            few(given(operation.ok().as_strategy())(ask))()
    assert max(seen) < 500
    assert {200, 400} <= seen
