"""Talking about images: what is said is what the whole model says, cached, in batches, and split over processes."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llama_acc.core.checkpoint.convert import Request, convert
from llama_acc.core.data.images import normalize
from llama_acc.core.errors import UserError
from llama_acc.core.generate.chat import Conversation, encode_question, generate, insert_images
from llama_acc.core.generate.engine import Engine, Prompt
from llama_acc.core.generate.load import LoadedModel, load_model
from llama_acc.core.model.transformer import shapes_of
from llama_acc.core.model.vision import Images
from tests.core.generate.decoding import decode
from tests.core.generate.images_work import GREEDY, pictures, seen_logits
from tests.core.model.test_vision_parity import huggingface_llama, their_features, their_logits
from tests.core.ranks import run_ranks
from tests.core.seeing import QFORMER, SEEING, blip2, random_tower, seeing_model
from tests.core.tiny import difference

pytest.importorskip("transformers")
KINDS = ("qformer", "clip", "tiny")
WORDS = [1, 20, 21, 22, 23]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> dict[str, Path]:
    """Checkpoints of random weights, by kind, as LLaMA2-Accessory writes them."""
    made = {}
    for name in KINDS:
        folder, config = tmp_path_factory.mktemp(name), SEEING[name]
        assert config.vision is not None
        state = {f"llma.{n}": p.detach() for n, p in seeing_model(name).named_parameters()}
        if not config.vision.trains_encoder:
            tower = random_tower(config.vision)
            state |= {f"llma.{config.vision.tower_prefix}{n}": p.detach() for n, p in tower.named_parameters()}
        torch.save({"model": state}, folder / "consolidated.00-of-01.model.pth")
        (folder / "config.json").write_text(json.dumps(config.to_params()))
        (folder / "meta.json").write_text(json.dumps({"llama_type": config.llama_type}))
        (folder / "vision.json").write_bytes(config.vision.to_json())
        shutil.copy(tokenizer_path, folder / "tokenizer.model")
        made[name] = folder
    return made


def load(folder: Path, template: str = "none") -> LoadedModel:
    return load_model(folder, device="cpu", template=template)


def images_for(loaded: LoadedModel, count: int, seed: int = 0) -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
    assert loaded.vision is not None
    return pictures(count, loaded.vision.image_size, seed)


def uncached_greedy(loaded: LoadedModel, prompt: list[int], images: list[np.ndarray[Any, Any]]) -> list[int]:
    """The likeliest token of a full forward pass, again and again."""
    tokens: list[int] = []
    while len(tokens) < GREEDY.max_new_tokens:
        ids, seen = torch.tensor([*prompt, *tokens]), None
        with torch.no_grad():
            if images:
                assert loaded.vision_encoder is not None
                inputs = loaded.vision_encoder.encode(torch.from_numpy(np.stack(images)))
                seen = Images(inputs, (ids < 0).nonzero().flatten(), [0] * len(images))
            hidden = loaded.model(ids.clamp(min=0), torch.arange(len(ids)), [len(ids)], images=seen)
            token = int(loaded.model.logits(hidden[-1:])[0].argmax())
        if token in loaded.tokenizer.end_ids:
            break
        tokens.append(token)
    return tokens


@pytest.mark.parametrize("name", KINDS)
def test_answers_about_images_are_those_of_the_whole_model_one_at_a_time_and_in_batches(
    name: str, folders: dict[str, Path]
) -> None:
    """Also of an image with no words before it, and the same again."""
    loaded = load(folders[name])
    counts = [1, 1, 0, 1, 1 if name == "clip" else 2, 0]
    images = [images_for(loaded, count, seed) for count, seed in zip(counts, (0, 1, 0, 0, 2, 0), strict=True)]
    prompts = [
        encode_question(loaded, "the answer" + " is" * (len(given) == 2), len(given))._replace(images=given)
        for given in images
    ]
    prompts += [Prompt(insert_images(loaded, [1], 1), images[0])] * 2
    expected = [uncached_greedy(loaded, list(prompt.tokens), list(prompt.images)) for prompt in prompts]
    for batch_size in (1, 3):
        replies = decode(Engine(loaded), prompts, GREEDY, batch_size)
        assert {reply.index: reply.tokens for reply in replies} == dict(enumerate(expected)), batch_size


def test_a_conversation_keeps_its_image_and_the_tower_encodes_it_once(folders: dict[str, Path]) -> None:
    loaded = load(folders["qformer"], "dialogue")
    assert loaded.vision_encoder is not None
    encoded: list[int] = []
    loaded.vision_encoder.tower.register_forward_hook(lambda module, given, out: encoded.append(len(given[0])))  # type: ignore[union-attr]
    conversation = Conversation(loaded, GREEDY)
    image = images_for(loaded, 1)
    first = "".join(conversation.ask("what is it?", image))
    second = "".join(conversation.ask("what else?"))
    assert encoded == [1]
    seen = [one.piece for one in conversation.token_view() if one.token < 0]
    assert seen == [f"<{loaded.vision.positions} image positions>"]  # type: ignore[union-attr]
    ids = loaded.template.prompt_ids(loaded.tokenizer, conversation.turns[:-1])
    again = decode(Engine(loaded), [Prompt(insert_images(loaded, ids, 1), image)], GREEDY)[0]
    assert loaded.tokenizer.decode(again.tokens).strip().startswith(second.strip())
    conversation.reset()
    assert conversation.images == []
    assert first == "".join(Conversation(loaded, GREEDY).ask("what is it?", image))


def test_images_a_model_does_not_take_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    clip = load(folders["clip"])
    with pytest.raises(UserError, match="takes one image at a time"):
        generate(clip, "what?", images=images_for(clip, 2))
    state = torch.load(folders["tiny"] / "consolidated.00-of-01.model.pth", weights_only=True)["model"]
    parts = shapes_of(SEEING["tiny"], "vision")
    words_only = {name: t for name, t in state.items() if name.removeprefix("llma.") not in parts}
    torch.save({"model": words_only}, tmp_path / "consolidated.00-of-01.model.pth")
    for name in ("config.json", "tokenizer.model", "meta.json"):
        shutil.copy(folders["tiny"] / name, tmp_path / name)
    with pytest.raises(UserError, match="this model takes no images"):
        generate(load(tmp_path), "what?", images=images_for(clip, 1))


def test_from_pixels_to_logits_everything_is_transformers_own_whole_or_split_over_two_processes(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """The trained encoder is split, too; of a frozen one, an image is encoded once."""
    theirs = blip2(QFORMER, 16)
    theirs.load_state_dict(random_tower(QFORMER).state_dict(), strict=False)
    pixels = torch.from_numpy(np.stack(pictures(2, QFORMER.image_size)))
    features = their_features(theirs, normalize(pixels, torch.float32))
    model, whole, tiny = seeing_model("qformer"), load(folders["qformer"]), load(folders["tiny"])
    logits = their_logits(huggingface_llama(model), model, torch.tensor(WORDS), features)

    def assert_is_theirs(found: dict[str, Any], expected: Tensor) -> None:
        assert difference(torch.tensor(found["logits"]), expected) < 1e-5

    convert(Request(folders["qformer"], tmp_path / "two", "consolidated", model_parallel_size=2))
    todo = [(str(tmp_path / "two"), 2), (str(folders["tiny"]), 1)]
    first, second = run_ranks(2, "tests.core.generate.images_work:split_logits", todo=todo, words=WORDS)
    for found in (first[0], second[0], seen_logits(whole, WORDS, 2)):
        assert difference(torch.tensor(found["features"]), features) < 1e-5
        assert_is_theirs(found, logits)
    assert (first[0]["encoded"], second[0]["encoded"]) == (2, 0)
    for found in (first[1], second[1]):
        assert_is_theirs(found, torch.tensor(seen_logits(tiny, WORDS, 1)["logits"]))
    for loaded, found in ((whole, first[0]), (tiny, first[1])):
        count = 2 if loaded is whole else 1
        about_images = uncached_greedy(loaded, insert_images(loaded, WORDS, count), images_for(loaded, count))
        assert found["said"] == [about_images, uncached_greedy(loaded, WORDS, []), about_images]


def test_nf4_leaves_the_tower_and_the_projection_alone(folders: dict[str, Path]) -> None:
    loaded = load_model(folders["qformer"], device="cpu", template="none", quantize="nf4")
    assert loaded.model.is_quantized
    found, whole = seen_logits(loaded, WORDS, 1), seen_logits(load(folders["qformer"]), WORDS, 1)
    assert found["features"] == whole["features"]
    assert found["logits"] != whole["logits"]
