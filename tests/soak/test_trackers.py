"""Trackers' real packages, in their local modes, in an environment of their own that pip makes beside this one."""

import json
import os
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest

from tests.cli.commands import QUICKSTART

_ROOT = Path(__file__).parents[2]
_PACKAGES = ("wandb==0.31.0", "mlflow==3.17.2", "trackio==0.43.0")
# Prints the steps that each package has kept of a loss and of a validation loss, and what it has of the recipe.
_READ = """
import glob, json, os, sqlite3, struct, sys
from mlflow import MlflowClient
from wandb.proto.wandb_internal_pb2 import Record

def records(path):  # LevelDB's log format, in blocks of 32 KiB, behind a head of 7 bytes
    data, at, held = open(path, "rb").read(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)
        held, at = held + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):
            yield Record.FromString(held)
            held = b""

run, names = sys.argv[1], ("loss", "validation_loss")
found = {name: {kind: [] for kind in names} for name in ("wandb", "mlflow", "trackio")}
recipes = {}
for path in sorted(glob.glob(f"{run}/wandb/offline-run-*/*.wandb")):
    for record in records(path):
        values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for name in names:
            if name in values:
                found["wandb"][name].append(values["_step"])
        for item in record.run.config.update:
            if item.key == "train":
                recipes.setdefault("wandb", json.loads(item.value_json)["epochs"])
client, known = MlflowClient(), json.load(open(f"{run}/trackers.json"))
for name in names:
    found["mlflow"][name] = [metric.step for metric in client.get_metric_history(known["mlflow"]["id"], name)]
recipes["mlflow"] = float(client.get_run(known["mlflow"]["id"]).data.params["train.epochs"])
found["status"] = client.get_run(known["mlflow"]["id"]).info.status
database = sqlite3.connect(f"{os.environ['TRACKIO_DIR']}/llama-acc.db")
for run_name, step, metrics in database.execute("select run_name, step, metrics from metrics order by id"):
    assert run_name == known["trackio"]["id"]
    for name in names:
        if name in json.loads(metrics):
            found["trackio"][name].append(step)
(config,) = [json.loads(config) for config, in database.execute("select config from configs")]
recipes["trackio"] = config["train"]["epochs"]
print(json.dumps([found, recipes]))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has the packages besides those that this one has."""
    folder = tmp_path_factory.mktemp("packages") / "venv"
    venv.create(folder, with_pip=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    (folder / "lib" / version / "site-packages" / "these.pth").write_text("\n".join(site.getsitepackages()))
    pip = (folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--only-binary", ":all:")
    done = subprocess.run([*pip, *_PACKAGES], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip cannot get them: {done.stderr.strip().splitlines()[-1]}")
    return folder / "bin" / "python"


@pytest.mark.soak
def test_a_resumed_run_is_one_run_in_each_without_doubled_points_or_secrets(python: Path, tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    of_this = {
        "HOME": str(tmp_path / "home"),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": "1",
        "HF_TOKEN": "SECRET",
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
    }
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")} | of_this

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [str(python), *words]
        done = subprocess.run(
            command, env=environment, cwd=here, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done

    output = tmp_path / "run"
    trackers = "train.trackers=[tensorboard,wandb,mlflow,trackio]"
    common = ("train.epochs=2", "checkpoint.every_steps=2", "checkpoint.keep=0", "train.sample_prompts=[Who are you]")
    held_out = ("data.validation.fraction=0.2", "data.validation.every_steps=2")
    secret = "description=https://user:SECRET@host/x?token=SECRET"
    words = ("-m", "llama_acc", *QUICKSTART, *common, *held_out, trackers, secret, "--output", str(output))
    done = run(*words, "train.max_steps=6")
    assert done.stdout == f"llama-acc chat --ckpt {output}\n"
    assert "curves end here" not in done.stderr
    assert "mlflow" not in done.stderr
    # As if it had been killed before its last checkpoint.
    shutil.rmtree(output / "epoch1-iter2")
    (output / "latest").unlink()
    resumed = run("-m", "llama_acc", "finetune", "--output", str(output), "--resume", "train.max_steps=8")
    assert "2 of 8 steps done" in resumed.stderr
    found, recipes = json.loads(run("-c", _READ, str(output)).stdout.splitlines()[-1])
    assert found.pop("status") == "FINISHED"
    steps: dict[str, Any] = {"loss": [*range(1, 9)], "validation_loss": [0, 2, 4, 6, 8]}
    assert found == {"wandb": steps, "mlflow": steps, "trackio": steps}
    assert recipes == {"wandb": 2, "mlflow": 2, "trackio": 2}
    ours = set(output.rglob("recipe.yaml"))
    for path in tmp_path.rglob("*"):
        if path.is_file() and path not in ours:
            assert b"SECRET" not in path.read_bytes(), path


@pytest.mark.soak
def test_servers_that_do_not_answer_cost_a_line_each(python: Path, tmp_path: Path) -> None:
    nowhere = "http://127.0.0.1:9"
    environment = {
        **os.environ,
        "HOME": str(tmp_path / "home"),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": "1",
        "MLFLOW_TRACKING_URI": nowhere,
        "WANDB_BASE_URL": nowhere,
        "WANDB_API_KEY": "0" * 40,
        "WANDB_MODE": "online",
    }
    words = (*QUICKSTART, "train.max_steps=2", "train.trackers=[wandb,mlflow]", "--output", str(tmp_path / "run"))
    done = subprocess.run(
        [str(python), "-m", "llama_acc", *words], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    for name in ("Weights & Biases", "MLflow"):
        assert done.stderr.count(f"{name}'s curves end here") == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "0" * 40 not in done.stderr
