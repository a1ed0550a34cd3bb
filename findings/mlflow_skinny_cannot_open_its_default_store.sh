#!/usr/bin/env bash
# mlflow-skinny: a client without settings cannot be made, as the store that it takes by default is one it has not got.
#
# One would expect: MlflowClient() of a fresh installation logs into the current folder, as that of mlflow does.
# What happens: without MLFLOW_TRACKING_URI it chooses sqlite:///mlflow.db, and mlflow-skinny has no store for databases:
# UnsupportedModelRegistryStoreURIException, whose list of supported schemes begins with "file". With a file: address it
# ends too, as that store is "in maintenance mode", unless MLFLOW_ALLOW_FILE_STORE=true says otherwise. mlflow works.
# What follows: mlflow-skinny is for a server (MLFLOW_TRACKING_URI=http://...); to log locally, install mlflow.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q mlflow-skinny==3.17.2
cd "$folder"
unset MLFLOW_TRACKING_URI MLFLOW_REGISTRY_URI MLFLOW_ALLOW_FILE_STORE
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import os
import sys

from mlflow import MlflowClient
from mlflow.version import VERSION


def attempt(what, **settings):
    try:
        client = MlflowClient(**settings)
        client.create_run(client.create_experiment("one"))
        end = "works"
    except Exception as error:
        end = f"{type(error).__name__}: {str(error).strip()[:150]}"
    print(f"{what}: {end}")
    return end


print("mlflow-skinny", VERSION)
store = f"file://{sys.argv[1]}/store"
by_default = attempt("no setting")
file = attempt("a file: address", tracking_uri=store)
os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
allowed = attempt("the same with MLFLOW_ALLOW_FILE_STORE=true", tracking_uri=store)
as_seen = "sqlite:" in by_default and "maintenance mode" in file and allowed == "works"
print("as described" if as_seen else "the behavior changed")
sys.exit(0 if as_seen else 1)
PYTHON
