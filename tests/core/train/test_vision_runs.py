"""Runs with images: the same numbers however they are dealt, cached or stopped; checkpoints anybody can go on with."""

import json
import re
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llama_acc.cli.run_console import describe_plan
from llama_acc.core.checkpoint.convert import Request, convert
from llama_acc.core.checkpoint.layout import inspect
from llama_acc.core.checkpoint.load import read_weights
from llama_acc.core.errors import UserError
from llama_acc.core.finetune import dry_run
from llama_acc.core.generate.load import load_model
from llama_acc.core.memory.guard import setup_of_run
from llama_acc.core.memory.predict import rank_parameters
from llama_acc.core.model.transformer import build_on_meta, initialize, parameter_count, shapes_of
from llama_acc.core.model.vision import Tower, tower_shapes
from llama_acc.core.train import step
from llama_acc.core.train.runs import Callback
from tests.core.seeing import QFORMER, SEEING, blip2, random_tower
from tests.core.tiny import save_model
from tests.core.train.image_runs import TUNED, overrides_of, words_for, write_data
from tests.core.train.runs import (
    assert_same_curve,
    assert_same_run,
    curve,
    losses,
    metrics,
    plan_of,
    quickstart,
    run,
    saved_weights,
)

pytest.importorskip("transformers")
# No float32 weight is changed by such a step; a rate of 0 is refused.
STILL = ("optimizer.lr=1e-30", "optimizer.min_lr=0")
SQUARE = "data.images.transform=pad_to_square"
CACHE = "vision.cache_features=true"
LORA = ("tuning.method=lora_bias_norm", "tuning.lora_rank=4")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of each kind, with their data."""
    folder = tmp_path_factory.mktemp("alone")
    for name in TUNED:
        run(folder / name, *overrides_of(name, folder))
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A LLaMA, and a folder as Hugging Face has BLIP-2's, of one size."""
    folder, plan = tmp_path_factory.mktemp("bases"), plan_of()
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


@pytest.mark.parametrize("name", TUNED)
def test_micro_batches_of_any_size_train_the_same(
    name: str, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack, packed_by = step.pack, list[str]()
    monkeypatch.setattr(step, "pack", lambda *args: packed_by.append(threading.current_thread().name) or pack(*args))
    run(tmp_path, *overrides_of(name, alone), "train.micro_batch_tokens=70")
    assert_same_curve(tmp_path, alone / name)
    # The largest is tried first, twice; the thread that makes the next ones packs them.
    assert packed_by == ["MainThread"] * 2 + ["batches_0"] * (len(packed_by) - 2)


def test_a_resumed_run_is_bitwise_the_uninterrupted_one_with_its_random_crops(alone: Path, tmp_path: Path) -> None:
    words = overrides_of("tiny", alone)
    run(tmp_path, *words, "train.max_steps=4")
    run(tmp_path, *words, resume=True)
    assert_same_run(tmp_path, alone / "tiny")


def test_random_crops_differ_from_epoch_to_epoch_and_held_out_images_are_never_random(
    alone: Path, tmp_path: Path
) -> None:
    words = [*overrides_of("qformer", alone), *STILL, "train.shuffle=false", "train.global_batch_size=16"]
    run(tmp_path, *words, f"data.validation.path={alone / 'data-qformer' / 'items.json'}")
    first, second = (line["grad_norm"] for line in metrics(tmp_path) if "grad_norm" in line)
    assert first != second
    held_out = [line["validation_loss"] for line in metrics(tmp_path) if "validation_loss" in line]
    assert len(held_out) == 3
    assert len(set(held_out)) == 1


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


def test_with_the_cache_the_tower_encodes_an_image_once_unless_something_is_another(
    alone: Path, tmp_path: Path
) -> None:
    words = [*overrides_of("qformer", alone), SQUARE]
    short = ["train.max_steps=1", "train.warmup_epochs=0"]
    counted = {}
    for name, more in {
        "plain": [],
        "cached": [CACHE],
        "again": [CACHE, "train.batch_size=2"],
        "seed": [CACHE, "train.seed=1", *short],  # of a tower of random weights
        "transform": [CACHE, "data.images.transform=center_crop", *short],
        "precision": [CACHE, "train.precision=bf16", *short],
    }.items():
        with images_encoded() as counts:
            run(tmp_path / name, *words, *more)
        counted[name] = counts["images"]
    assert (counted["plain"], counted["cached"], counted["again"]) == (30, 15, 0)
    assert min(counted["seed"], counted["transform"], counted["precision"]) > 0
    assert_same_curve(tmp_path / "cached", tmp_path / "plain")
    assert_same_curve(tmp_path / "again", tmp_path / "plain")


def test_kept_features_leave_the_checkpoints_their_room_on_the_disk(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*overrides_of("qformer", alone), SQUARE, CACHE, "train.seed=5"]
    plan = plan_of(*words)
    assert re.search(r"features are kept, up to .* \(.* are free\)", dict(describe_plan(plan))["vision"])
    total, used, _ = shutil.disk_usage(tmp_path)
    left = type(shutil.disk_usage(tmp_path))(total, used, plan.disk_bytes())
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: left)
    with images_encoded() as counts:
        run(tmp_path / "full", *words)
    assert counts["images"] == 30  # nothing was kept of the first epoch, and all checkpoints were written


def test_stages_train_alone_and_go_on_top_of_each_other(bases: tuple[Path, Path], tmp_path: Path) -> None:
    llama, tower = bases
    data, first = write_data(tmp_path / "data"), tmp_path / "first"
    words = words_for(QFORMER, data, "tuning.method=frozen", "checkpoint.trainable_only=true", "train.max_steps=2")
    saved = saved_weights(run(first, *words, f"model.pretrained=[{llama}, {tower}]").checkpoint)
    parts = {f"llma.{name}" for name in shapes_of(SEEING["qformer"], "vision")}
    assert saved.keys() == parts
    assert json.loads((first / "epoch0-iter2" / "meta.json").read_text()) == {"llama_type": "llama_qformerv2"}
    assert load_model(llama, tower, first, device="cpu").vision == QFORMER
    with pytest.raises(UserError, match="holds only what was trained on top of"):
        load_model(first, device="cpu")
    with pytest.raises(UserError, match=r"was trained on .*llama and .*blip2, and .*llama holds other weights"):
        load_model(llama, first, device="cpu")

    second = words_for(QFORMER, data, "vision.stage=2", *LORA)
    for pretrained, message, hint in (
        ([llama, tower], r"nothing of what stage one of vision trains is in .*llama and .*blip2: start_img", "--pret"),
        ([llama], r"no vision tower \(qformer\.\*\) is in .*llama", "blip2-opt-2.7b"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            run(tmp_path / "refused", *second, f"model.pretrained=[{', '.join(map(str, pretrained))}]")
        assert hint in str(caught.value)
    second += [f"model.pretrained=[{llama}, {tower}, {first}]"]
    second += ["checkpoint.trainable_only=true", "tuning.quantize=nf4"]
    saved = saved_weights(run(tmp_path / "second", *second).checkpoint)
    assert not any(name.startswith("llma.qformer.") for name in saved)
    assert parts < saved.keys()
    load_model(llama, tower, first, tmp_path / "second", device="cpu", quantize="nf4")
    run(tmp_path / "stopped", *second, "train.max_steps=4")
    run(tmp_path / "stopped", *second, resume=True)
    assert curve(tmp_path / "stopped") == curve(tmp_path / "second")


def test_all_of_a_llama_trains_beside_a_frozen_tower(bases: tuple[Path, Path], tmp_path: Path) -> None:
    llama, tower = bases
    words = words_for(QFORMER, write_data(tmp_path / "data"), f"model.pretrained=[{llama}, {tower}]")
    run(tmp_path / "whole", *words)
    saved = saved_weights(tmp_path / "whole" / "epoch1")
    before = read_weights([inspect(tower)]).tensors
    assert all(torch.equal(saved[f"llma.{key}"], part.to(part.dtype)) for key, part in before.items())


@pytest.mark.parametrize("target", ["hf", "meta"])
def test_a_layout_without_a_place_for_vision_is_refused(target: Any, alone: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"encoder .tiny., which layout '{target}' has no place for"):
        convert(Request(alone / "tiny" / "epoch1", tmp_path / "converted", target))


def test_images_need_a_model_and_an_encoder_that_take_them(alone: Path, tmp_path: Path) -> None:
    two_images = alone / "data-qformer" / "items.json"
    for words, message in (
        ([f"data.sources=[{{path: {two_images}}}]"], "the items have images, and this model has no vision encoder"),
        (
            [*overrides_of("clip", alone), f"data.sources.0.path={two_images}"],
            r"(?s)takes one image for each item.*items.json item 3 has 2",
        ),
        ([*overrides_of("qformer", alone), CACHE], r"set data\.images\.transform=pad_to_square"),
    ):
        with pytest.raises(UserError, match=message):
            run(tmp_path, *words)


def test_words_alone_train_a_multimodal_model(tmp_path: Path) -> None:
    run(tmp_path / "run", *words_for(QFORMER, write_data(tmp_path / "data", most_images=0), *LORA))
    assert len(losses(tmp_path / "run")) == 6


def test_without_a_usable_transformers_a_run_says_what_to_install(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)
        for act in (
            lambda: run(tmp_path / "run", *overrides_of("qformer", alone)),
            lambda: load_model(alone / "clip", device="cpu"),
        ):
            with pytest.raises(UserError, match="need the package transformers") as caught:
                act()
            assert "pip install 'llama-acc[vision]'" in str(caught.value)
        load_model(alone / "tiny", device="cpu")
    (tmp_path / "transformers").mkdir()
    said = "huggingface-hub>=0.19.3,<1.0 is required, but found huggingface-hub==2.4.0."
    (tmp_path / "transformers" / "__init__.py").write_text(f"raise ImportError({said + chr(10)!r} 'Try: ...')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "transformers")
    with pytest.raises(UserError, match="transformers, which cannot be imported: huggingface-hub") as caught:
        load_model(alone / "qformer", device="cpu")
    assert "Try" not in str(caught.value)
    assert "pip install --upgrade transformers" in str(caught.value)


def test_a_dry_run_counts_the_tower_and_the_images(alone: Path) -> None:
    plan = dry_run(quickstart(*overrides_of("qformer", alone)), None, callback=Callback(), device=torch.device("cpu"))
    tower = sum(torch.Size(shape).numel() for shape in tower_shapes(QFORMER).values())
    text = dict(describe_plan(plan))["vision"]
    assert f"encoder qformer, stage 1; {tower:,} of the parameters are its tower, which is frozen" in text
    assert "15 images of 34 positions each, random_resized_crop" in text
    whole = sum(tensor.numel() for tensor in saved_weights(alone / "qformer" / "epoch1").values())
    assert parameter_count(plan.config) == rank_parameters(setup_of_run(plan, 1, "cpu")) == whole
    # Two tokens of 34 positions: what an image costs is counted.
    assert int(plan.train.lengths.sum()) == sum(line["tokens"] for line in metrics(alone / "qformer")[:3])
