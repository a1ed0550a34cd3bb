"""What every test may use: a home of its own, a tiny tokenizer, and the real inputs where they are present."""

import gc
import io
import itertools
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub import Servers, running

if shutil.which("nvidia-smi") is None:
    # Without a GPU Triton's kernels run in its interpreter, which has to be said before Triton is imported.
    os.environ["TRITON_INTERPRET"] = "1"

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As a shell's `&` begins the tests: the commands that they start would ignore Ctrl-C, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)

_ROOT = Path(__file__).resolve().parents[1]
_SHARED = _ROOT.parent / "shared"

_TRAINING_TEXT = """\
Below is an instruction that describes a task. Write a response that appropriately completes the request.
A chat between a curious human and an artificial intelligence assistant.
the answer is in the question, and the question is in the answer
once upon a time there was a little model that wanted to learn to talk
what is the name of the capital of the country? it is the name of a town
### Instruction: ### Response: ### Human: ### Assistant:
"""

_HOMES = itertools.count()
_LONGEST = (
    *("test_parallel.py", "test_caption_quickstart.py", "test_launch.py", "test_vision_runs.py", "test_fit.py"),
    *("test_measured.py", "test_streaming.py", "test_web.py", "test_serve.py", "test_gpu_benchmark.py", "test_docs.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes come first: begun at the end, one would keep a worker busy while the others have done."""
    items.sort(key=lambda item: item.path.name not in _LONGEST)


def pytest_collection_finish() -> None:
    """What is imported by now stays: Python's collector need not look through all of it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def nowhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty folder that tests stand in, so that none depends on what lies around the repository or changes it."""
    folder = tmp_path_factory.mktemp("nowhere")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        # Processes that tests start find the package and the tests from there, too.
        patch.setenv("PYTHONPATH", str(_ROOT), prepend=os.pathsep)
        yield folder


@pytest.fixture(autouse=True)
def nothing_is_left_where_tests_stand(nowhere: Path) -> Iterator[None]:
    """What a test writes goes to its `tmp_path` or LLAMA_ACC_HOME."""
    yield
    left = [path.name for path in nowhere.iterdir()]
    assert not left, f"left in the working directory: {left}"


@pytest.fixture(autouse=True)
def llama_acc_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or fills the user's own downloads and token cache."""
    # `mktemp` would look through the folders of all tests before.
    home = tmp_path_factory.getbasetemp() / "homes" / str(next(_HOMES))
    home.mkdir(parents=True)
    monkeypatch.setenv("LLAMA_ACC_HOME", str(home))
    monkeypatch.delenv("LLAMA_ACC_CACHE_GIB", raising=False)
    return home


@pytest.fixture(scope="session", autouse=True)
def nothing_waits_for_the_disk() -> Iterator[None]:
    """No test cuts the power: small files need not be on the disk before a test goes on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def compiled_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiled blocks are kept for one test run: those of another environment may be linked to its torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real inputs beside the repository."""
    if not _SHARED.is_dir():
        pytest.skip("no ../shared beside the repository")
    return _SHARED


@pytest.fixture
def servers(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Servers]:
    """A hub that HF_ENDPOINT points to, here and in commands started; the user's own token and cache are away."""
    folder = tmp_path_factory.mktemp("huggingface")
    monkeypatch.setenv("HF_HOME", str(folder))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    # huggingface_hub reads these once, when it is imported.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(folder / "token"))
    with running() as found:
        monkeypatch.setenv("HF_ENDPOINT", found.url)
        yield found


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model like LLaMA's (BPE, byte fallback, identity normalisation), but of 300 pieces."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_TRAINING_TEXT.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=300,
        character_coverage=0.98,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path
