"""Runs whose frozen blocks stay in their files: the same numbers, with two blocks in memory at a time."""

import contextlib
import json
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from llama_acc.cli.run_console import describe_plan
from llama_acc.core.checkpoint.convert import Request, convert
from llama_acc.core.checkpoint.layout import inspect
from llama_acc.core.checkpoint.load import read_weights
from llama_acc.core.checkpoint.streaming import stream_blocks
from llama_acc.core.distributed.groups import Parallel
from llama_acc.core.errors import RunError, UserError
from llama_acc.core.generate.chat import generate
from llama_acc.core.generate.load import load_model
from llama_acc.core.memory import guard
from llama_acc.core.memory.predict import assumed_rate
from llama_acc.core.memory.simulate import Setup, empty_batch, standing_for
from llama_acc.core.model import layers
from llama_acc.core.model.tuning import METHODS
from llama_acc.core.model.tuning.lora import LoRA
from llama_acc.core.recipe import TrainSection
from llama_acc.core.train.plan import StepSettings
from llama_acc.core.train.runs import Callback
from llama_acc.core.train.step import train_step
from llama_acc.core.train.trainer import assemble
from tests.core.memory.setups import setup
from tests.core.tiny import SMALL, random_model, save_model
from tests.core.train.runs import assert_same_run, plan_of, quickstart, run
from tests.core.train.test_gpu_trace import META, Work, _norm

TUNED = [name for name in METHODS if name not in ("full", "frozen")]
# Ten steps; validation goes through the blocks without gradients: from the last one to the first.
LONG = (
    *("train.epochs=1", "train.max_steps=10", "train.global_batch_size=2", "optimizer.lr=5e-3"),
    *("data.validation.fraction=0.1", "data.validation.every_steps=3"),
)
LAST = "epoch0-iter10"
SHAPE = "n_heads: 4, n_kv_heads: 2, multiple_of: 16, max_seq_len: 256"
DEEP = f"model.params={{dim: 32, n_layers: 5, {SHAPE}}}"
STREAMED, RESIDENT = "train.stream_base=true", "train.stream_base=false"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of five blocks in each type, and in NF4."""
    folder, few = tmp_path_factory.mktemp("bases"), "train.max_steps=2"
    found = {kind: run(folder / kind, DEEP, few, f"train.precision={kind}").checkpoint for kind in ("bf16", "fp32")}
    convert(Request(str(found["fp32"]), folder / "nf4", "consolidated", quantize="nf4"))
    return found | {"nf4": folder / "nf4"}


def words(base: Path, kind: str, method: str = "lora") -> list[str]:
    keys = (f"tuning.method={method}", f"tuning.quantize={'nf4' if kind == 'nf4' else 'none'}")
    step = (f"train.precision={'bf16' if kind == 'bf16' else 'fp32'}", "train.activation_checkpointing=true")
    return [f"model.pretrained={base}", *keys, *step, "checkpoint.trainable_only=true", *LONG]


@pytest.mark.parametrize("kind", ["nf4", "bf16"])
@pytest.mark.parametrize("method", TUNED)
def test_a_streamed_run_is_bitwise_the_resident_one(
    method: str, kind: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    for name, how in (("resident", RESIDENT), ("streamed", STREAMED)):
        run(tmp_path / name, *words(bases[kind], kind, method), how)
    assert_same_run(tmp_path / "streamed", tmp_path / "resident", LAST)


@pytest.mark.parametrize("kind", ["nf4", "fp32"])
def test_a_run_goes_on_streamed_or_not(kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    common = words(bases[kind], kind)
    run(tmp_path / "whole", *common)
    for number, (stop, how) in enumerate(((3, RESIDENT), (6, STREAMED), (10, RESIDENT))):
        run(tmp_path / "resumed", *common, how, f"train.max_steps={stop}", resume=number > 0)
    lines = [json.loads(line) for line in (tmp_path / "resumed" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 11))
    assert_same_run(tmp_path / "resumed", tmp_path / "whole", LAST)


class AtSave(Callback):
    """Does something once, when a checkpoint was saved."""

    def __init__(self, action: Callable[[], None]) -> None:
        self.action: Callable[[], None] | None = action

    def saved(self, folder: Path) -> None:
        action, self.action = self.action, None
        if action is not None:
            action()


EACH = ("checkpoint.every_steps=3", "checkpoint.asynchronous=false", STREAMED)


@pytest.mark.parametrize("harm", ["cut short", "gone", "replaced"])
def test_a_file_that_is_lost_ends_the_run_by_name_and_a_resumed_run_is_the_whole_one(
    harm: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for file in bases["nf4"].iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    weights = base / "consolidated.00-of-01.model.pth"
    content = weights.read_bytes()

    def lose() -> None:
        if harm == "cut short":
            os.truncate(weights, len(content) // 2)
        else:
            weights.unlink()
        if harm == "replaced":
            weights.write_bytes(content)

    common = [*words(base, "nf4"), *EACH]
    said = {"cut short": "it ends too early", "gone": "No such file", "replaced": "another file has taken its place"}
    with pytest.raises(RunError, match=f"cannot read {weights}, from which the model is streamed: {said[harm]}"):
        run(tmp_path / "run", *common, callback=AtSave(lose))
    weights.write_bytes(content)
    run(tmp_path / "run", *common, resume=True)
    run(tmp_path / "whole", *common)
    assert_same_run(tmp_path / "run", tmp_path / "whole", LAST)


def test_a_run_that_is_killed_while_it_streams_is_resumed(bases: dict[str, Path], tmp_path: Path) -> None:
    common = [*words(bases["nf4"], "nf4"), *EACH]
    assert in_child(killed_at_its_first_save, tmp_path / "run", common) == -signal.SIGKILL
    run(tmp_path / "run", *common, resume=True)
    run(tmp_path / "whole", *common)
    assert_same_run(tmp_path / "run", tmp_path / "whole", LAST)


def in_child(work: Callable[..., None], *arguments: object) -> int | None:
    """Does something in a process of its own; its exit code."""
    child = multiprocessing.get_context("forkserver").Process(target=_with, args=(dict(os.environ), work, *arguments))
    child.start()
    child.join(240)
    return child.exitcode


def _with(environment: dict[str, str], work: Callable[..., None], *arguments: object) -> None:
    os.environ.clear()  # it may be that of a rank of another test, which the process was forked for first
    os.environ.update(environment)
    work(*arguments)


def killed_at_its_first_save(output: Path, keys: list[str]) -> None:
    run(output, *keys, callback=AtSave(lambda: os.kill(os.getpid(), signal.SIGKILL)))


def within_a_limit(output: Path, small: list[str], keys: list[str], group: Path | None) -> None:
    """A run in that control group, after a small one outside of it, which takes what any run takes.

    It leaves a file of how much memory that is of no file it has taken at its save.
    """
    run(output.with_name("small"), *small)
    if group is not None:
        (group / "cgroup.procs").write_text(str(os.getpid()))
    before = anonymous()

    def keep() -> None:
        output.with_suffix(".grown").write_text(str(anonymous() - before))

    run(output, *keys, callback=AtSave(keep))


def anonymous() -> int:
    """This process's memory that is of no file, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of 200 MB in 16 blocks."""
    folder = tmp_path_factory.mktemp("large")
    config = plan_of(f"model.params={{dim: 512, n_layers: 16, {SHAPE}}}").config
    save_model(random_model(config), folder, torch.float32)
    return folder


FEW = ("train.max_steps=2", "train.global_batch_size=1", "data.validation.fraction=0")


@contextlib.contextmanager
def memory_limit(limit: int) -> Iterator[Path | None]:
    """A control group of so many bytes, below that of this process; none where there can be none."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    for _, controllers, path in lines:
        root = Path("/sys/fs/cgroup") / ("memory" if controllers == "memory" else "") / path[1:]
        name = "memory.limit_in_bytes" if controllers == "memory" else "memory.max"
        group = root / f"llama-acc-{os.getpid()}"
        if controllers not in ("", "memory") or not (root / "cgroup.procs").exists():
            continue
        with contextlib.suppress(OSError):
            group.mkdir()
            try:
                (group / name).write_text(str(limit))
                yield group
                return
            except FileNotFoundError:
                continue  # this hierarchy has no memory controller
            finally:
                group.rmdir()
    yield None


@pytest.mark.skipif(sys.platform != "linux", reason="memory is counted as Linux does")
def test_two_blocks_are_in_memory_and_a_limit_below_the_base_is_enough(
    bases: dict[str, Path], large: Path, tmp_path: Path
) -> None:
    small, common = ([*words(base, "fp32"), *FEW] for base in (bases["fp32"], large))
    limit = (large / "consolidated.00-of-01.model.pth").stat().st_size * 3 // 4
    with memory_limit(limit) as group:
        streamed = (tmp_path / "streamed", [*small, STREAMED], [*common, STREAMED], group)
        assert in_child(within_a_limit, *streamed) == 0
    assert int((tmp_path / "streamed.grown").read_text()) < limit
    run(tmp_path / "resident", *common, RESIDENT)
    assert_same_run(tmp_path / "streamed", tmp_path / "resident", "epoch0-iter2")


def test_auto_streams_what_does_not_fit_and_what_cannot_be_streamed_is_refused_with_what_to_type(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(*words(bases["nf4"], "nf4"))
    cpu = torch.device("cpu")
    assert guard.stream_if_needed(plan, 1, cpu) is plan
    least = guard.setup_of_run(plan.with_chosen(plan.recipe.train.without_auto(1024), ""), 1, "cpu")
    free = guard.predict(least).allocated - 1
    monkeypatch.setattr(guard, "free_memory", lambda device: free)
    monkeypatch.setattr(guard, "_FAR_BELOW", 1 << 20)
    streamed = guard.stream_if_needed(plan, 1, cpu)
    assert streamed.settings.stream_base
    assert "two blocks" in dict(describe_plan(streamed))["streamed"]
    assert guard.stream_if_needed(plan, 2, cpu) is plan
    quantized_now = plan_of(*words(bases["fp32"], "nf4"))
    assert guard.stream_if_needed(quantized_now, 1, cpu) is quantized_now
    with pytest.raises(UserError, match=r"wq is quantized while it is loaded(.|\n)*--to consolidated --quantize nf4"):
        run(tmp_path / "run", *words(bases["fp32"], "nf4"), STREAMED)
    with pytest.raises(UserError, match=r"float32, and bfloat16 is needed(.|\n)*--dtype bf16"):
        run(tmp_path / "run", *words(bases["fp32"], "bf16"), STREAMED)
    convert(Request(str(bases["bf16"]), tmp_path / "hf", "hf"))
    with pytest.raises(UserError, match="is put together or reordered"):
        load_model(tmp_path / "hf", device="cpu", stream=True)
    with pytest.raises(UserError, match=r"wq is in none: it is random(.|\n)*--pretrained"):
        run(tmp_path / "run", *words(bases["bf16"], "bf16"), STREAMED, "model.pretrained=null")
    for key, said in (("tuning.method=full", "trains all"), ("checkpoint.trainable_only=false", "only what trains")):
        with pytest.raises(UserError, match=said):
            plan_of(*words(bases["bf16"], "bf16"), STREAMED, key)


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_a_streamed_base_is_predicted_to_take_two_blocks_however_many_there_are(device_type: str) -> None:
    keys = ("tuning.method=lora", "checkpoint.trainable_only=true", "train.activation_checkpointing=true")
    found: dict[int, Any] = {}
    for depth in (4, 12):
        resident = setup(*keys, n_layers=depth, device_type=device_type)
        streamed = replace(resident, settings=replace(resident.settings, stream_base=True))
        sizes = [guard.predict(one).parts["weights"] for one in (resident, streamed)]
        assert sizes[0] - sizes[1] == pytest.approx(guard.streaming(resident).stays * (depth - 2) / depth, rel=1e-3)
        found[depth] = sizes
    # The norms of eight blocks more, and on a GPU what trains in bf16.
    assert found[12][1] - found[4][1] < 0.2 * (found[12][0] - found[4][0])


def test_auto_takes_as_many_tokens_as_hide_the_copying() -> None:
    """By operations to bytes; at least 4,096 tokens, which keep a GPU busy, and at most what fits."""
    train = quickstart(*(f"train.{key}=auto" for key in ("batch_size", "micro_batch_tokens"))).train
    train.stream_base = True
    resident = setup("tuning.method=lora", "checkpoint.trainable_only=true", dim=64, device_type="cuda")
    streamed = replace(resident, settings=replace(resident.settings, stream_base=True))

    def setup_with(section: TrainSection) -> Setup:
        tokens = section.bounds()[1]
        assert tokens is not None
        return replace(streamed, lengths=(512,) * (tokens // 512))

    def tokens_at(rate: float, memory: int = 1 << 40) -> Any:
        return guard.fill(train, setup_with, memory, lambda predict, run: predict(run), rate)[0].micro_batch_tokens

    some = setup_with(train.without_auto(4096))
    # At this rate copying is as long as computing 8,000 tokens.
    rate = 8000 / some.tokens * guard.predict(some).flops * 8e9 / guard.streaming(some).moved
    assert 7500 < tokens_at(rate) < 9000
    assert tokens_at(rate / 4) == 4096
    assert tokens_at(10 * rate) == tokens_at(math.inf) == 16_384
    assert tokens_at(rate, guard.predict(setup_with(train.without_auto(6144))).total) in (6144, 7168)  # slack has steps


def test_the_plan_says_what_share_of_the_time_is_copying(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(*words(bases["nf4"], "nf4"), STREAMED)
    setup = guard.setup_of_run(plan, 1, "cuda")
    monkeypatch.setattr(guard, "free_memory", lambda device: 1 << 30)
    monkeypatch.setattr(guard, "device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    train, said = guard.fill_memory(plan, 1, torch.device("cuda"))
    slowdown = guard.streaming(setup).slowdown(guard.predict(setup).flops, 0.4 * 312e12)
    assert slowdown > 1.1
    assert said == (
        "at most 8 examples, with activation checkpointing: as the recipe says; "
        f"{1 - 1 / slowdown:.0%} of the time is waiting for blocks on NVIDIA A100-SXM4-80GB, assumed: docs/memory.md"
    )
    assert ("micro-batches", said) in describe_plan(plan.with_chosen(train, said))
    monkeypatch.setattr(guard, "device_name", lambda device: "another")
    assert "the rate of another is not known" in guard.fill_memory(plan, 1, torch.device("cuda"))[1]


@pytest.mark.parametrize(
    ("gpu", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA H200", 989),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA A10G", None),
    ],
)
def test_the_rate_of_a_gpu_is_known_by_its_name(gpu: str, tflops: float | None) -> None:
    assert assumed_rate(gpu) == (math.inf if tflops is None else pytest.approx(0.4e12 * tflops))


@pytest.mark.parametrize("kind", ["nf4", "bf16"])
def test_a_streamed_model_answers_as_the_one_in_memory(kind: str, bases: dict[str, Path]) -> None:
    answers = []
    for stream in (False, True):
        loaded = load_model(bases[kind], device="cpu", stream=stream)
        answers.append(generate(loaded, "What is LLaMA?", temperature=0, max_new_tokens=12))
        assert (loaded.stream is not None) == stream
    assert answers[0] == answers[1]
    assert loaded.stream is not None
    assert loaded.stream.bytes_read > 10 * sum(slot.nbytes for slot in loaded.stream.slots)
    loaded.stream.close()


class Streams:
    """Stands for CUDA's streams and events: what each stream knows to be done before what it does next."""

    def __init__(self) -> None:
        self.current, self.known = "compute", dict[str, set[str]](compute=set(), copy=set())

    def event(self) -> Any:
        streams, seen = self, set[str]()

        class Event:
            def record(self) -> None:
                seen.clear()
                seen.update(streams.known[streams.current])

            def synchronize(self) -> None:
                """Called by the thread that reads, which may wait."""

            def taken(self, stream: str) -> None:
                streams.known[stream] |= seen

        return Event()

    def stream(self, name: str) -> Any:
        class Stream:
            def wait_event(self, event: Any) -> None:
                event.taken(name)

        return Stream()

    @contextlib.contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        self.current = "copy"
        yield
        self.current = "compute"


def test_on_a_gpu_copies_and_blocks_wait_for_each_other_and_the_host_for_neither(tmp_path: Path) -> None:
    config = replace(SMALL, n_layers=5)
    save_model(random_model(config), tmp_path, torch.bfloat16)
    config, streams = replace(config, tuning=LoRA(8)), Streams()
    adamw = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "clip_grad_norm": 1.0}
    settings = StepSettings(torch.bfloat16, None, False, True, 1, "ddp", False, adamw, stream_base=True)
    held, copies, order, uses = dict[int, str](), list[str](), list[int](), set[str]()
    copy, found = Tensor.copy_, list[Any]()

    def copied(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        slot = next((number for number, slot in enumerate(found[0].slots) if slot is target), -1) if found else -1
        if slot >= 0:
            assert (streams.current, non_blocking) == ("copy", True)
            before = {use for use in uses if use.endswith(f"in {slot}")}
            assert before <= streams.known["copy"], "a block is still computing that is copied over"
            held[slot] = f"copy {len(copies)}"
            copies.append(held[slot])
            streams.known["copy"].add(held[slot])
        return copy(target, source, non_blocking)

    def used(number: int) -> None:
        assert held[number % 2] in streams.known["compute"], "it computes before its block is there"
        order.append(number)
        uses.add(f"use {len(order)} in {number % 2}")
        streams.known["compute"] |= uses

    fakes = {"Stream": lambda device: streams.stream("copy"), "Event": streams.event, "stream": streams.on}
    with contextlib.ExitStack() as stack:
        stack.enter_context(standing_for("cuda"))
        for name, fake in fakes.items():
            stack.enter_context(patch.object(torch.cuda, name, fake))
        stack.enter_context(patch.object(torch.cuda, "current_stream", lambda: streams.stream("compute")))
        stack.enter_context(patch.object(Tensor, "pin_memory", lambda self: self))
        stack.enter_context(patch.object(Tensor, "copy_", copied))
        stack.enter_context(patch.object(nn.utils, "get_total_norm", _norm))
        weights = read_weights([inspect(tmp_path)])

        def materialize(model: Any) -> None:
            found.append(stream_blocks(model, weights, META))
            for number, block in enumerate(model.layers):
                block.register_forward_pre_hook(lambda module, inputs, number=number: used(number))

        model, data_parallel, optimizer = assemble(config, settings, Parallel(), "cuda", materialize)
        optimizer.make_state()
        with META:
            batch = empty_batch((30, 12))
        with Work() as work, patch.object(layers, "fused_rms_norm", work.norm):
            train_step(model, optimizer, data_parallel, [batch] * 2, 10, 1e-3, META, (0.0, 1.0))
    found[0].close()
    assert order == [0, 1, 2, 3, 4, 4, 3, 2, 1, 0] * 2
    # Forward three blocks are not there yet, and backward three; at first all are not.
    assert len(copies) == 5 + 3 + 3 + 3
    assert (work.waits, work.of_two_devices) == ({}, {})
    assert work.copies_from_host == 3 + len(copies)
