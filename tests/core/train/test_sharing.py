"""Ranks of one machine go through the data once, and hold one copy of it."""

import json
from pathlib import Path

import pytest

from tests.core.ranks import run_ranks
from tests.core.train.runs import plan_of


def test_all_ranks_map_the_files_that_one_of_them_encoded(
    tmp_path: Path, llama_acc_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a cache, too."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    for name in ("a", "b"):
        items = [{"instruction": f"{name} {i}", "output": "ok " * (i % 7 + 1)} for i in range(200)]
        (tmp_path / f"{name}.json").write_text(json.dumps(items))
    overrides = [
        f"data.sources=[{{path: {tmp_path / 'a.json'}}}, {{path: {tmp_path / 'b.json'}, ratio: 0.5}}]",
        "data.validation.fraction=0.25",
    ]
    alone = plan_of(*overrides)
    assert alone.validation is not None
    (llama_acc_home / "cache").rename(tmp_path / "cache")

    first, others = run_ranks(2, "tests.core.train.sharing:planned", overrides=overrides, cache_sizes=["0", "10"])
    for ours, theirs in zip(first, others, strict=True):
        assert (ours.pop("encoded"), theirs.pop("encoded")) == (["a.json", "b.json"], [])
        assert len(ours["mapped"]) == 2
        assert ours == theirs
        assert ours["fingerprints"] == [alone.train.fingerprint(), alone.validation.fingerprint()]
        assert ours["report"] == alone.report
        assert ours["documents"][17] == alone.train.document(17)[0].tolist()
    assert [path.suffix for path in llama_acc_home.rglob("[!.]*") if path.is_file()] == [".tokens"] * 2
    assert list(temporary.iterdir()) == []
