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
from tests.core.generate.decoding import decode
from tests.core.generate.images_work import GREEDY, pictures, seen_logits
from tests.core.model.test_vision_parity import huggingface_llama, their_features, their_logits
from tests.core.ranks import run_ranks
from tests.core.seeing import QFORMER, SEEING, blip2, random_tower, seeing_model
from tests.core.tiny import difference

pytest.importorskip("transformers")
KINDS = ("qformer", "clip", "tiny")


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


def load(folder: Path) -> LoadedModel:
    return load_model(folder, device="cpu", template="none")


def images_for(loaded: LoadedModel, count: int, seed: int = 0) -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
    assert loaded.vision is not None
    return pictures(count, loaded.vision.image_size, seed)


def whole_logits(loaded: LoadedModel, prompt: list[int], images: list[np.ndarray[Any, Any]]) -> Tensor:
    """Of all of a prompt at once, without a cache."""
    from llama_acc.core.model.vision import Images

    assert loaded.vision_encoder is not None
    ids = torch.tensor(prompt)
    with torch.no_grad():
        seen = None
        if images:
            inputs = loaded.vision_encoder.encode(torch.from_numpy(np.stack(images)))
            seen = Images(inputs, (ids < 0).nonzero().flatten(), [0] * len(images))
        hidden = loaded.model(ids.clamp(min=0), torch.arange(len(ids)), [len(ids)], images=seen)
        return loaded.model.logits(hidden[-1:])[0]


def uncached_greedy(loaded: LoadedModel, prompt: list[int], images: list[np.ndarray[Any, Any]]) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < GREEDY.max_new_tokens:
        token = int(whole_logits(loaded, [*prompt, *tokens], images).argmax())
        if token in loaded.tokenizer.end_ids:
            break
        tokens.append(token)
    return tokens


@pytest.mark.parametrize("name", KINDS)
def test_an_answer_about_images_is_that_of_the_whole_model(name: str, folders: dict[str, Path]) -> None:
    loaded = load(folders[name])
    engine = Engine(loaded)
    words = [1, 50, 60, 70]
    answers = []
    for count, seed in ((1, 0), (1, 1), (0, 0), (1, 0), *(((2, 0),) if name != "clip" else ())):
        images = images_for(loaded, count, seed)
        prompt = insert_images(loaded, words, count)
        answers.append(decode(engine, [Prompt(prompt, images)], GREEDY)[0].tokens)
        assert answers[-1] == uncached_greedy(loaded, prompt, images), (count, seed)
    assert answers[0] == answers[3]


def test_a_caption_with_no_words_before_it_can_be_asked_for_again(folders: dict[str, Path]) -> None:
    loaded = load(folders["qformer"])
    engine, images = Engine(loaded), images_for(loaded, 1)
    prompt = insert_images(loaded, [1], 1)
    expected = uncached_greedy(loaded, prompt, images)
    assert [decode(engine, [Prompt(prompt, images)], GREEDY)[0].tokens for _ in range(2)] == [expected, expected]


@pytest.mark.parametrize("name", KINDS)
def test_answers_in_a_batch_are_those_of_one_at_a_time(name: str, folders: dict[str, Path]) -> None:
    loaded = load(folders[name])
    counts = [1, 0, 1, 0, 1] if name == "clip" else [1, 0, 2, 0, 1]
    images = [images_for(loaded, count, seed) for seed, count in enumerate(counts)]
    prompts = [
        encode_question(loaded, "the answer" + " is" * seed, len(given))._replace(images=given)
        for seed, given in enumerate(images)
    ]
    expected = [uncached_greedy(loaded, list(prompt.tokens), list(prompt.images)) for prompt in prompts]
    for batch_size in (1, 3):
        replies = decode(Engine(loaded), prompts, GREEDY, batch_size)
        assert {reply.index: reply.tokens for reply in replies} == dict(enumerate(expected))


def test_a_conversation_keeps_its_image_and_the_tower_sees_it_once(folders: dict[str, Path]) -> None:
    loaded = load_model(folders["qformer"], device="cpu", template="dialogue")
    assert loaded.vision_encoder is not None
    seen: list[int] = []
    loaded.vision_encoder.tower.register_forward_hook(lambda module, given, out: seen.append(len(given[0])))  # type: ignore[union-attr]
    conversation = Conversation(loaded, GREEDY)
    image = images_for(loaded, 1)
    first = "".join(conversation.ask("what is it?", image))
    second = "".join(conversation.ask("what else?"))
    assert seen == [1]
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


@pytest.fixture(scope="module")
def theirs() -> Any:
    model = blip2(QFORMER, 16)
    model.load_state_dict(random_tower(QFORMER).state_dict(), strict=False)
    return model


@pytest.mark.parametrize("count", [1, 3])
def test_from_pixels_to_logits_everything_is_transformers_own(
    count: int, theirs: Any, folders: dict[str, Path]
) -> None:
    expected = expected_of(theirs, count)
    found = seen_logits(load(folders["qformer"]), WORDS, count)
    assert difference(torch.tensor(found["features"]), expected[0]) < 1e-5
    assert difference(torch.tensor(found["logits"]), expected[1]) < 1e-5


WORDS = [1, 20, 21, 22, 23]


def expected_of(theirs: Any, count: int) -> tuple[Tensor, Tensor]:
    pixels = torch.from_numpy(np.stack(pictures(count, QFORMER.image_size)))
    features = their_features(theirs, normalize(pixels, torch.float32))
    model = seeing_model("qformer")
    return features, their_logits(huggingface_llama(model), model, torch.tensor(WORDS), features)


def test_split_over_two_processes_it_is_the_same_and_an_image_is_encoded_once(
    theirs: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    convert(Request(folders["qformer"], tmp_path / "two", "consolidated", model_parallel_size=2))
    both = run_ranks(
        2, "tests.core.generate.images_work:split_logits", folder=str(tmp_path / "two"), words=WORDS, images=2
    )
    features, logits = expected_of(theirs, 2)
    for found in both:
        assert difference(torch.tensor(found["features"]), features) < 1e-5
        assert difference(torch.tensor(found["logits"]), logits) < 1e-5
    assert [found["encoded"] for found in both] == [2, 0]
    loaded = load(folders["qformer"])
    about_images = uncached_greedy(loaded, insert_images(loaded, WORDS, 2), images_for(loaded, 2))
    assert both[0]["said"] == [about_images, uncached_greedy(loaded, WORDS, []), about_images]


def test_the_trained_encoder_is_split_over_processes_too(folders: dict[str, Path]) -> None:
    both = run_ranks(
        2, "tests.core.generate.images_work:split_logits", folder=str(folders["tiny"]), words=WORDS, images=1
    )
    loaded = load(folders["tiny"])
    expected = torch.tensor(seen_logits(loaded, WORDS, 1)["logits"])
    assert all(difference(torch.tensor(found["logits"]), expected) < 1e-5 for found in both)
    about_image = uncached_greedy(loaded, insert_images(loaded, WORDS, 1), images_for(loaded, 1))
    assert both[0]["said"] == [about_image, uncached_greedy(loaded, WORDS, []), about_image]


def test_the_matrices_in_four_bits_leave_the_tower_and_the_projection_alone(folders: dict[str, Path]) -> None:
    loaded = load_model(folders["qformer"], device="cpu", template="none", quantize="nf4")
    assert loaded.model.is_quantized
    assert loaded.vision_encoder is not None
    found = seen_logits(loaded, WORDS, 1)
    whole = seen_logits(load(folders["qformer"]), WORDS, 1)
    assert found["features"] == whole["features"]
    assert found["logits"] != whole["logits"]
