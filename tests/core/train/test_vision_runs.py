"""Runs with images: the same numbers however they are dealt, cached or stopped; checkpoints anybody can go on with."""

import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from llama_acc.core.checkpoint.convert import Request, convert
from llama_acc.core.checkpoint.layout import inspect
from llama_acc.core.checkpoint.load import read_weights
from llama_acc.core.data.images import ImageJob, Transform, pixels
from llama_acc.core.errors import UserError
from llama_acc.core.finetune import dry_run
from llama_acc.core.generate.chat import generate
from llama_acc.core.generate.load import load_model
from llama_acc.core.memory.predict import rank_share
from llama_acc.core.model.transformer import parameter_count, shapes_of
from llama_acc.core.model.vision import Tower, tower_shapes
from llama_acc.core.train.callback import Callback
from llama_acc.core.train.log import describe_plan
from tests.core.ranks import run_ranks
from tests.core.seeing import CLIP, QFORMER, SEEING, TINY, blip2, random_tower, seeing_model
from tests.core.tiny import save_model
from tests.core.train.image_runs import TUNED, overrides_of, words_for, write_data
from tests.core.train.runs import losses, metrics, plan_of, quickstart, run, saved_state, saved_weights

pytest.importorskip("transformers")
SPLIT = "parallel.model_parallel_size=2"
# No float32 weight is changed by such a step; a rate of 0 is refused.
STILL = ("optimizer.lr=1e-30", "optimizer.min_lr=0")
SQUARE = "data.images.transform=pad_to_square"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of one process, by kind, with their data."""
    folder = tmp_path_factory.mktemp("alone")
    for name in TUNED:
        run(folder / name, *overrides_of(name, folder))
    return folder


@pytest.fixture(scope="module")
def of_four(alone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of 2 x 2 processes on the same data."""
    folder = tmp_path_factory.mktemp("four")
    todo = [
        {"output": str(folder / f"{name}-{mode}"), "overrides": [*overrides_of(name, alone), SPLIT, f"{MODE}={mode}"]}
        for name, mode in RUNS_OF_FOUR
    ]
    cached = [*overrides_of("qformer", alone), SPLIT, SQUARE, "vision.cache_features=true"]
    todo.append({"output": str(folder / "cached"), "overrides": cached})
    run_ranks(4, "tests.core.train.parallel_work:runs", todo=todo)
    return folder


MODE = "parallel.data_parallel"
RUNS_OF_FOUR = [("qformer", "fsdp"), ("clip", "ddp"), ("tiny", "sdp")]


def curve(output: Path) -> list[tuple[float, float]]:
    return [(line["loss"], line["grad_norm"]) for line in metrics(output) if "loss" in line]


def assert_same_curve(output: Path, expected: Path) -> None:
    """Loss and gradient norm within 1e-5 at the first step and 1e-4 over all."""
    ours, theirs = curve(output), curve(expected)
    assert len(ours) == len(theirs) == 6
    for step, (actual, wanted) in enumerate(zip(ours, theirs, strict=True)):
        assert actual == pytest.approx(wanted, rel=1e-5 if step == 0 else 1e-4), step


def weights(checkpoint: Path) -> dict[str, Tensor]:
    return {name: part.to(part.dtype) for name, part in read_weights([inspect(checkpoint)]).tensors.items()}


@pytest.mark.parametrize("name", TUNED)
def test_micro_batches_of_any_size_train_the_same(name: str, alone: Path, tmp_path: Path) -> None:
    for how in ("train.batch_size=1", "train.micro_batch_tokens=70"):
        run(tmp_path / how, *overrides_of(name, alone), how)
        assert_same_curve(tmp_path / how, alone / name)


@pytest.mark.parametrize(("name", "mode"), RUNS_OF_FOUR)
def test_2x2_processes_train_with_images_as_one_does(name: str, mode: str, alone: Path, of_four: Path) -> None:
    assert_same_curve(of_four / f"{name}-{mode}", alone / name)
    expected, found = weights(alone / name / "epoch1"), weights(of_four / f"{name}-{mode}" / "epoch1")
    assert found.keys() == expected.keys()
    for parameter, tensor in found.items():
        torch.testing.assert_close(tensor, expected[parameter], rtol=1e-3, atol=1e-4)


def test_every_shard_has_all_of_what_vision_adds(of_four: Path) -> None:
    shards = [
        torch.load(of_four / "qformer-fsdp" / "epoch1" / f"consolidated.0{rank}-of-02.model.pth", weights_only=True)
        for rank in range(2)
    ]
    seen = {f"llma.{name}" for name in (*tower_shapes(QFORMER), *shapes_of(SEEING["qformer"], "vision"))}
    for shard in shards:
        assert seen < shard["model"].keys()
    assert all(torch.equal(shards[0]["model"][name], shards[1]["model"][name]) for name in seen)


@pytest.mark.parametrize("name", ["qformer", "tiny"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one_with_its_random_crops(
    name: str, alone: Path, tmp_path: Path
) -> None:
    words = overrides_of(name, alone)
    run(tmp_path / "stopped", *words, "train.max_steps=4")
    run(tmp_path / "stopped", *words, resume=True)
    assert curve(tmp_path / "stopped") == curve(alone / name)
    for read in (saved_weights, saved_state):
        ours, theirs = read(tmp_path / "stopped" / "epoch1"), read(alone / name / "epoch1")
        assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())


def test_random_crops_differ_from_epoch_to_epoch(alone: Path, tmp_path: Path) -> None:
    words = [*overrides_of("qformer", alone), *STILL, "train.shuffle=false", "train.global_batch_size=16"]
    run(tmp_path / "random", *words)
    run(tmp_path / "square", *words, SQUARE)
    first, second = losses(tmp_path / "random")
    assert first != pytest.approx(second, rel=1e-7)
    assert losses(tmp_path / "square")[0] == losses(tmp_path / "square")[1]


@contextmanager
def images_encoded() -> Iterator[Counter[int]]:
    """Counts the images that pass through towers."""
    counts: Counter[int] = Counter()

    def count(module: nn.Module, arguments: Any, output: Any) -> None:
        if isinstance(module, Tower):
            counts["images"] += len(arguments[0])

    handle = nn.modules.module.register_module_forward_hook(count)
    try:
        yield counts
    finally:
        handle.remove()


def test_with_the_cache_the_tower_sees_an_image_once(alone: Path, tmp_path: Path) -> None:
    words = [*overrides_of("qformer", alone), SQUARE]
    with images_encoded() as plain:
        run(tmp_path / "plain", *words)
    with images_encoded() as cached:
        run(tmp_path / "cached", *words, "vision.cache_features=true")
    with images_encoded() as again:
        run(tmp_path / "again", *words, "vision.cache_features=true", "train.batch_size=2")
    assert (plain["images"], cached["images"], again["images"]) == (30, 15, 0)
    assert_same_curve(tmp_path / "cached", tmp_path / "plain")
    assert_same_curve(tmp_path / "again", tmp_path / "plain")


def test_kept_features_leave_the_checkpoints_their_room_on_the_disk(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*overrides_of("qformer", alone), SQUARE, "vision.cache_features=true", "train.seed=5"]
    plan = plan_of(*words)
    assert re.search(r"features are kept, up to .* \(.* are free\)", dict(describe_plan(plan))["vision"])
    total, used, _ = shutil.disk_usage(tmp_path)
    left = type(shutil.disk_usage(tmp_path))(total, used, plan.disk_bytes())
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: left)
    with images_encoded() as counts:
        run(tmp_path / "full", *words)
    assert counts["images"] == 30  # nothing was kept of the first epoch, and all checkpoints were written


def test_ranks_share_cached_features(alone: Path, of_four: Path, tmp_path: Path) -> None:
    run(tmp_path / "plain", *overrides_of("qformer", alone), SQUARE)
    assert_same_curve(of_four / "cached", tmp_path / "plain")


@pytest.mark.parametrize(
    "change", ["train.seed=1", "data.images.transform=centre_crop", "train.precision=bf16"], ids=str
)
def test_another_encoder_transform_or_type_has_features_of_its_own(change: str, alone: Path, tmp_path: Path) -> None:
    words = [
        *overrides_of("qformer", alone),
        SQUARE,
        "vision.cache_features=true",
        "train.max_steps=1",
        "train.warmup_epochs=0",
    ]
    run(tmp_path / "first", *words)
    with images_encoded() as counts:
        run(tmp_path / "other", *words, change)  # a seed makes another tower of random weights
    assert counts["images"] > 0


def test_caching_what_is_random_is_refused(alone: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"set data\.images\.transform=pad_to_square"):
        run(tmp_path, *overrides_of("qformer", alone), "vision.cache_features=true")


def held_out(alone: Path) -> list[str]:
    return ["data.validation.fraction=0.25", *overrides_of("qformer", alone)]


def test_held_out_images_are_padded_and_not_random(alone: Path, tmp_path: Path) -> None:
    words = [*held_out(alone), *STILL]
    run(tmp_path, *words)
    found = [line["validation_loss"] for line in metrics(tmp_path) if "validation_loss" in line]
    assert len(found) == 3
    assert len(set(found)) == 1


def image_of(data: Path, size: int) -> np.ndarray[Any, Any]:
    return pixels(ImageJob(str(data.parent / "images" / "1-0.png"), Transform("pad_to_square", size)))


@pytest.mark.parametrize("name", TUNED)
def test_a_trained_checkpoint_answers_about_an_image(name: str, alone: Path) -> None:
    loaded = load_model(alone / name, device="cpu")
    assert loaded.vision is not None
    assert loaded.vision == {"qformer": QFORMER, "clip": CLIP, "tiny": TINY}[name]
    picture = image_of(alone / f"data-{name}" / "items.json", loaded.vision.image_size)
    told = generate(loaded, "What is in 1?", images=[picture], temperature=0, max_new_tokens=8)
    assert told == generate(loaded, "What is in 1?", images=[picture.copy()], temperature=0, max_new_tokens=8)


def test_only_what_trains_is_saved_and_loads_over_its_bases(tmp_path: Path) -> None:
    llama, tower = base_folders(tmp_path)
    data = write_data(tmp_path / "data")
    words = words_for(QFORMER, data, "tuning.method=frozen", "checkpoint.trainable_only=true")
    finished = run(tmp_path / "first", *words, f"model.pretrained=[{llama}, {tower}]")
    assert saved_weights(finished.checkpoint).keys() == {
        f"llma.{name}" for name in shapes_of(SEEING["qformer"], "vision")
    }
    assert json.loads((finished.checkpoint / "meta.json").read_text()) == {"llama_type": "llama_qformerv2"}
    loaded = load_model(llama, tower, tmp_path / "first", device="cpu")
    assert loaded.vision == QFORMER
    with pytest.raises(UserError, match="holds only what was trained on top of"):
        load_model(tmp_path / "first", device="cpu")
    with pytest.raises(UserError, match=r"was trained on .*llama and .*blip2, and .*llama holds other weights"):
        load_model(llama, tmp_path / "first", device="cpu")


def base_folders(folder: Path) -> tuple[Path, Path]:
    """A LLaMA, and a folder as Hugging Face has BLIP-2's, of one size."""
    from llama_acc.core.model.transformer import build_on_meta, initialize

    plan = plan_of()
    model = build_on_meta(plan.config, torch.float32)
    model.to_empty(device="cpu")
    initialize(model, 5)
    (folder / "llama").mkdir()
    save_model(model, folder / "llama", torch.float32)
    shutil.copy(plan.tokenizer.path, folder / "llama" / "tokenizer.model")
    theirs = blip2(QFORMER, 16)
    theirs.load_state_dict(random_tower(QFORMER).state_dict(), strict=False)
    theirs.save_pretrained(folder / "blip2", safe_serialization=True)
    return folder / "llama", folder / "blip2"


def test_stage_two_goes_on_from_stage_one_and_says_so_where_there_is_none(tmp_path: Path) -> None:
    llama, tower = base_folders(tmp_path)
    data = write_data(tmp_path / "data")
    first = words_for(QFORMER, data, "tuning.method=frozen", "checkpoint.trainable_only=true", "train.max_steps=2")
    run(tmp_path / "first", *first, f"model.pretrained=[{llama}, {tower}]")
    second = words_for(QFORMER, data, "vision.stage=2", "tuning.method=lora_bias_norm", "tuning.lora_rank=4")
    with pytest.raises(
        UserError, match=r"nothing of what stage one of vision trains is in .*llama and .*blip2: start_img"
    ) as caught:
        run(tmp_path / "without", *second, f"model.pretrained=[{llama}, {tower}]")
    assert "--pretrained RUN" in str(caught.value)
    with pytest.raises(UserError, match=r"no vision tower \(qformer\.\*\) is in .*llama") as caught:
        run(tmp_path / "blind", *second, f"model.pretrained=[{llama}]")
    assert "blip2-opt-2.7b" in str(caught.value)
    bases = f"model.pretrained=[{llama}, {tower}, {tmp_path / 'first'}]"
    part = ("checkpoint.trainable_only=true", "tuning.quantize=nf4")
    finished = run(tmp_path / "second", *second, bases, *part)
    saved = saved_weights(finished.checkpoint)
    assert not any(name.startswith("llma.qformer.") for name in saved)
    assert {f"llma.{name}" for name in shapes_of(SEEING["qformer"], "vision")} < saved.keys()
    load_model(llama, tower, tmp_path / "first", tmp_path / "second", device="cpu", quantize="nf4")
    run(tmp_path / "stopped", *second, bases, *part, "train.max_steps=4")
    run(tmp_path / "stopped", *second, bases, *part, resume=True)
    assert curve(tmp_path / "stopped") == curve(tmp_path / "second")


def reference_checkpoint(folder: Path, name: str, size: int) -> dict[str, Tensor]:
    """What LLaMA2-Accessory writes of a model that sees, made up at a tiny size: the tower in every shard."""
    from llama_acc.core.model.transformer import split_dimension

    config = SEEING[name]
    state = {f"{n}": p.detach() for n, p in seeing_model(name).named_parameters()}
    state |= {f"qformer.{n}": p.detach() for n, p in random_tower(QFORMER).named_parameters()}
    folder.mkdir(parents=True)
    for rank in range(size):
        part = {}
        for key, tensor in state.items():
            dimension = split_dimension(key)
            part[f"llma.{key}"] = tensor if dimension is None else tensor.chunk(size, dimension)[rank].clone()
        torch.save({"model": part}, folder / f"consolidated.{rank:02d}-of-{size:02d}.model.pth")
    (folder / "config.json").write_text(json.dumps(config.to_params()))
    (folder / "meta.json").write_text(json.dumps({"llama_type": config.llama_type}))
    (folder / "vision.json").write_bytes(QFORMER.to_json())
    return state


@pytest.mark.parametrize("name", ["qformer", "qformer_peft"])
@pytest.mark.parametrize("size", [1, 2])
def test_a_checkpoint_with_the_reference_s_keys_is_read_and_converted(name: str, size: int, tmp_path: Path) -> None:
    state = reference_checkpoint(tmp_path / "theirs", name, size)
    converted = convert(Request(tmp_path / "theirs", tmp_path / "ours", "consolidated", model_parallel_size=3 - size))
    assert converted.tensors == len(state)
    for folder in ("theirs", "ours"):
        found = weights(tmp_path / folder)
        assert found.keys() == state.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in state.items())
    assert json.loads((tmp_path / "ours" / "meta.json").read_text()) == {"llama_type": SEEING[name].llama_type}
    assert (tmp_path / "ours" / "vision.json").read_bytes() == QFORMER.to_json()
    for target in ("hf", "meta"):
        with pytest.raises(UserError, match=f"encoder .qformer., which layout '{target}' has no place for"):
            convert(Request(tmp_path / "theirs", tmp_path / target, target))  # type: ignore[arg-type]


def test_data_with_images_needs_a_model_that_sees(alone: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the items have images, and this model has no vision encoder"):
        run(tmp_path, f"data.sources=[{{path: {alone / 'data-qformer' / 'items.json'}}}]")
    clip = [*overrides_of("clip", alone), f"data.sources.0.path={alone / 'data-qformer' / 'items.json'}"]
    with pytest.raises(UserError, match=r"(?s)takes one image for each item.*items.json item 3 has 2"):
        run(tmp_path, *clip)


def test_words_alone_train_a_model_that_sees(alone: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", most_images=0)
    run(tmp_path / "run", *words_for(QFORMER, data, "tuning.method=lora_bias_norm", "tuning.lora_rank=4"))
    assert len(losses(tmp_path / "run")) == 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["vision.encoder=qfromer"], "did you mean 'qformer'"),
        (["vision.encoder=clip"], "vision.encoder clip and tuning.method adapter go together, not clip and full"),
        (["tuning.method=frozen"], "method frozen trains only what vision adds: set vision.encoder"),
        (["vision.encoder=tiny", "vision.cache_features=true"], "cache_features is for encoders that are frozen"),
        (["vision.cache_features=true"], "without vision.encoder there is nothing else to say of vision"),
        (["vision.encoder=tiny", "vision.params={widht: 3}"], "did you mean 'width'"),
    ],
)
def test_recipes_that_cannot_see_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        quickstart(*words)
    assert message in str(caught.value)


def test_without_transformers_a_run_says_what_to_install(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    for act in (
        lambda: run(tmp_path / "run", *overrides_of("qformer", alone)),
        lambda: load_model(alone / "clip", device="cpu"),
    ):
        with pytest.raises(UserError, match="need the package transformers") as caught:
            act()
        assert "pip install 'llama-acc[vision]'" in str(caught.value)
    assert load_model(alone / "tiny", device="cpu").vision == TINY


def test_a_transformers_beside_packages_of_another_age_is_told_of(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "transformers").mkdir()
    said = "huggingface-hub>=0.19.3,<1.0 is required, but found huggingface-hub==2.4.0."
    (tmp_path / "transformers" / "__init__.py").write_text(f"raise ImportError({said + chr(10)!r} 'Try: ...')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "transformers")
    with pytest.raises(UserError, match="transformers, which cannot be imported: huggingface-hub") as caught:
        load_model(alone / "qformer", device="cpu")
    assert "Try" not in str(caught.value)
    assert "pip install --upgrade 'llama-acc[vision]'" in str(caught.value)


def test_all_of_a_llama_trains_beside_a_frozen_tower_and_goes_on_bitwise(tmp_path: Path) -> None:
    llama, tower = base_folders(tmp_path)
    words = words_for(QFORMER, write_data(tmp_path / "data"), f"model.pretrained=[{llama}, {tower}]")
    run(tmp_path / "whole", *words)
    run(tmp_path / "stopped", *words, "train.max_steps=3")
    run(tmp_path / "stopped", *words, resume=True)
    ours, theirs = (saved_weights(tmp_path / name / "epoch1") for name in ("stopped", "whole"))
    assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())
    before = read_weights([inspect(tower)]).tensors
    assert all(torch.equal(theirs[f"llma.{key}"], part.to(part.dtype)) for key, part in before.items())


def test_a_dry_run_counts_the_tower_and_the_images(alone: Path, tmp_path: Path) -> None:
    recipe = quickstart(*overrides_of("qformer", alone))
    plan = dry_run(recipe, None, callback=Callback())
    share = rank_share(plan.recipe, plan.config, 1)
    tower = sum(torch.Size(shape).numel() for shape in tower_shapes(QFORMER).values())
    text = dict(describe_plan(plan))["vision"]
    assert f"encoder qformer, stage 1; {tower:,} of the parameters are its tower, which is frozen" in text
    assert "15 images of 34 positions each, random_resized_crop" in text
    assert parameter_count(plan.config) == share.parameters
    whole = sum(tensor.numel() for tensor in saved_weights(alone / "qformer" / "epoch1").values())
    assert parameter_count(plan.config) == whole
    # Two tokens of 34 positions: what an image costs is counted.
    assert int(plan.train.lengths.sum()) == sum(line["tokens"] for line in metrics(alone / "qformer")[:3])
