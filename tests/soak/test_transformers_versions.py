"""Models that see, with transformers of several ages: pip gets each into a folder of its own, and no torch with it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
# transformers refuses to be imported beside a tokenizers or huggingface_hub of another age.
OF_ITS_AGE = {
    "4.40.2": ("tokenizers==0.19.1", "huggingface_hub==0.24.7"),
    "4.57.6": ("tokenizers==0.22.1", "huggingface_hub==0.36.2"),
    "5.0.0": ("tokenizers==0.22.1", "huggingface_hub==1.3.7"),
    "5.10.1": ("tokenizers==0.22.2", "huggingface_hub==1.33.0"),
}
# What these import that the packages of today need not bring.
_BESIDES = (
    *("regex", "requests", "urllib3", "certifi", "idna", "charset_normalizer"),
    *("httpx", "httpcore", "h11", "anyio", "shellingham"),
)
_TESTS = (
    "tests/core/checkpoint/test_towers.py",
    "tests/core/model/test_accessory.py",
    "tests/core/model/test_vision.py",
    "tests/core/model/test_vision_parity.py",
    "tests/core/generate/test_images.py",
    "tests/core/train/test_vision_runs.py",
    "tests/cli/test_caption.py",
)


def install(version: str, folder: Path) -> None:
    """Puts a transformers and what goes with it into a folder; nothing that the environment has is changed."""
    packages = (f"transformers=={version}", *OF_ITS_AGE[version], *_BESIDES)
    pip = (sys.executable, "-m", "pip", "install", "--no-deps", "--only-binary", ":all:", "--disable-pip-version-check")
    done = subprocess.run([*pip, "--quiet", "--target", folder, *packages], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip cannot get them: {done.stderr.strip().splitlines()[-1]}")
    assert not (folder / "torch").exists()


@pytest.mark.soak
@pytest.mark.parametrize("version", OF_ITS_AGE)
def test_models_see_with_transformers_of_any_age(
    version: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "packages"
    install(version, folder)
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}

    def python(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *words]
        return subprocess.run(command, env=environment, cwd=_ROOT, capture_output=True, text=True)

    assert python("-c", "import transformers; print(transformers.__version__)").stdout.strip() == version
    tested = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not soak", *_TESTS)
    with capsys.disabled():
        print(f"\ntransformers {version}: {(tested.stdout.splitlines() or ['?'])[-1]}")
    assert tested.returncode == 0, tested.stdout[-6000:] + tested.stderr[-2000:]
