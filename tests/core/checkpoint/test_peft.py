"""Adapters of PEFT, its own and ours, over their base: the same logits as there, and all that cannot be is named."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_acc.core.checkpoint.layout import inspect, read_config
from llama_acc.core.checkpoint.load import read_weights
from llama_acc.core.errors import UserError
from llama_acc.core.generate.load import load_model
from llama_acc.core.model.config import ModelConfig
from llama_acc.core.model.transformer import shapes_of
from llama_acc.core.model.tuning import Tuning
from llama_acc.core.model.tuning.lora import LoRA, LoRABiasNorm
from tests.core.checkpoint.folders import GROUPED, state, tensors_of, write_consolidated
from tests.core.checkpoint.test_tuned import BOTH, LORA, TOKENS, logits, made, peft_logits, write_tuned
from tests.core.model.test_families import FAMILIES, write_family
from tests.core.tiny import difference, document_logits


@pytest.fixture
def base(tmp_path: Path) -> Path:
    consolidated = write_consolidated(tmp_path / "consolidated", state(GROUPED))
    return made(consolidated, tmp_path / "base", "hf").folder


def saved_by_peft(base: Path, folder: Path, **settings: Any) -> Path:
    """An adapter that PEFT has made, of random values."""
    import transformers
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    tuned.save_pretrained(folder)
    return folder


def with_keys(adapter: Path, **changed: Any) -> None:
    """Changes keys of adapter_config.json; None removes one."""
    path = adapter / "adapter_config.json"
    values = json.loads(path.read_text()) | changed
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def tuning_of(*folders: Path) -> Tuning:
    config = read_config([inspect(folder) for folder in folders])
    assert config is not None
    return config.tuning


@pytest.mark.parametrize(
    ("family", "settings", "tuning"),
    [
        (
            None,
            {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
            LoRA(4, lora_alpha=8, lora_targets=("wq", "wv")),
        ),
        (
            None,
            {"r": 4, "lora_alpha": 6, "use_rslora": True, "lora_dropout": 0.1, "target_modules": "all-linear"},
            LoRA(4, lora_alpha=6, use_rslora=True),
        ),
        (
            None,
            {"r": 8, "target_modules": r".*\.(k_proj|down_proj)", "modules_to_save": ["embed_tokens", "lm_head"]},
            LoRA(8, lora_targets=("wk", "w2")),
        ),
        (
            "llama3.2, tied",
            {"r": 8, "target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"]},
            LoRA(8, lora_alpha=8, lora_targets=("wv",)),
        ),
        (
            "llama3.2, tied",
            {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"], "ensure_weight_tying": True},
            LoRA(8, lora_alpha=8, lora_targets=("wv",)),
        ),
        ("qwen2", {"r": 4, "target_modules": "all-linear", "lora_bias": True}, LoRABiasNorm(4, lora_alpha=8)),
    ],
    ids=["list", "all-linear", "regex", "embedding alone", "embedding and output", "biases beside the base's"],
)
def test_an_adapter_of_peft_computes_the_same_here(
    family: str | None, settings: dict[str, Any], tuning: Tuning, base: Path, tmp_path: Path
) -> None:
    if family is not None:
        shutil.rmtree(base)
        write_family(base, FAMILIES[family])
    adapter = saved_by_peft(base, tmp_path / "adapter", **settings)
    assert tuning_of(base, adapter) == tuning
    assert difference(logits(base, adapter), peft_logits(base, adapter)) < 1e-5
    merged = made(adapter, tmp_path / "merged", "hf", base=base, merge=True).folder
    assert difference(logits(merged), peft_logits(base, adapter)) < 1e-5


@pytest.mark.parametrize(
    ("tuning", "config"),
    [(LORA, GROUPED), (BOTH, GROUPED), (BOTH, replace(GROUPED, qk_norm=True, family="qwen3"))],
    ids=["lora", "lora_bias_norm", "norms of queries and keys"],
)
def test_there_and_back_through_peft_nothing_is_lost(tuning: Tuning, config: ModelConfig, tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    source = write_tuned(tmp_path / "source", tuning, config=config)
    plain = {name: tensor for name, tensor in tensors_of(source).items() if name in shapes_of(config)}
    if tuning == BOTH:  # whose norms train
        plain |= {name: tensor / 2 for name, tensor in plain.items() if "norm" in name}
    consolidated = write_consolidated(tmp_path / "plain", plain, config=config)
    base = made(consolidated, tmp_path / "base", "hf").folder
    # PEFT can load Hugging Face's base only: another one is not named, and the note says what to type.
    for given, named in ((consolidated, None), (base, str(base.resolve()))):
        converted = made(source, tmp_path / f"on-{given.name}", "peft", base=str(given))
        adapter = converted.folder
        assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == named
        hints = [note for note in converted.notes if f"convert-checkpoint {consolidated} NEW --to hf" in note]
        assert bool(hints) == (named is None)
    assert difference(peft_logits(base, adapter), logits(source)) < 1e-5
    theirs = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32)
    assert theirs.get_base_model().config.model_type == config.family
    theirs.save_pretrained(tmp_path / "again")
    for folder in (adapter, tmp_path / "again"):
        assert tuning_of(base, folder) == tuning
        assert difference(logits(base, folder), logits(source)) < 1e-5
    kept = made(adapter, tmp_path / "kept", "consolidated", base=base).folder
    assert difference(logits(kept), logits(source)) < 1e-5


def test_chat_takes_tokenizer_and_format_of_the_base_where_the_adapter_has_none(
    tokenizer_path: Path, base: Path, tmp_path: Path
) -> None:
    adapter = saved_by_peft(base, tmp_path / "apart" / "adapter", r=2, target_modules=["o_proj"])
    shutil.copy(tokenizer_path, base / "tokenizer.model")
    (base / "chat_template.jinja").write_text("{{ messages[0].content }}")
    loaded = load_model(base, adapter, device="cpu")
    assert loaded.tokenizer.path.parent == base
    assert loaded.template_from == "the chat template, from chat_template.jinja"
    found = document_logits(loaded.model, [TOKENS])[0]
    assert difference(found, peft_logits(base, adapter)) < 1e-5


def test_what_is_not_said_is_as_in_peft_and_nothing_is_lost_on_the_way_back(base: Path, tmp_path: Path) -> None:
    adapter = saved_by_peft(base, tmp_path / "adapter", r=4, target_modules=["o_proj"], modules_to_save=["norm"])
    with_keys(adapter, lora_alpha=None)
    assert difference(logits(base, adapter), peft_logits(base, adapter)) < 1e-5
    with pytest.raises(UserError, match="whole modules, which would be lost"):
        made(adapter, tmp_path / "again", "peft", base=base)
    # An embedding that is saved along, as save_embedding_layers does, stays the output matrix of a tied base.
    write_family(tmp_path / "tied", FAMILIES["llama3.2, tied"])
    adapter = saved_by_peft(
        tmp_path / "tied", tmp_path / "e", target_modules=["q_proj"], modules_to_save=["embed_tokens"]
    )
    with_keys(adapter, modules_to_save=None)
    assert difference(logits(tmp_path / "tied", adapter), peft_logits(tmp_path / "tied", adapter)) < 1e-5


def test_its_shares_are_those_of_the_whole(base: Path, tmp_path: Path) -> None:
    layouts = [inspect(base), inspect(saved_by_peft(base, tmp_path / "adapter", r=4, target_modules="all-linear"))]
    whole = read_weights(layouts)
    parts = [read_weights(layouts, rank, 2) for rank in range(2)]
    for name in ("layers.0.attention.wq.lora_b.weight", "layers.1.feed_forward.w2.lora_a.weight"):
        dimension = 0 if "lora_b" in name else 1
        joined = torch.cat([part.tensors[name].to(torch.float32) for part in parts], dimension)
        assert torch.equal(joined, whole.tensors[name].to(torch.float32))


def test_another_base_is_noted_and_none_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = saved_by_peft(base, tmp_path / "adapter", r=2, target_modules=["o_proj"])
    assert not read_weights([inspect(base), inspect(adapter)]).notes
    base.rename(tmp_path / "other")
    [note] = read_weights([inspect(tmp_path / "other"), inspect(adapter)]).notes
    assert f"says that its base is {base}; it goes on {tmp_path / 'other'}" in note
    record = {"hf:owner/name": {"model.safetensors": 1}}
    (tmp_path / "other" / ".llama-acc-download").write_text(json.dumps(record))
    named = made(adapter, tmp_path / "named", "peft", base=tmp_path / "other").folder
    assert json.loads((named / "adapter_config.json").read_text())["base_model_name_or_path"] == "owner/name"
    assert not read_weights([inspect(tmp_path / "other"), inspect(named)]).notes
    with pytest.raises(UserError, match="it goes on its base") as caught:
        logits(adapter)
    assert f"--ckpt {base} --ckpt {adapter}" in str(caught.value.hint)
    with pytest.raises(UserError, match="it goes on its base"):
        made(adapter, tmp_path / "target", "hf", merge=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_dora": True}, "use_dora: true"),
        ({"rank_pattern": {"q_proj": 2}}, 'rank_pattern: {"q_proj": 2}'),
        ({"bias": "all"}, "bias: all"),
        ({"peft_type": "IA3"}, "peft_type: IA3"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: pissa, which changes the base"),
        ({"init_lora_weights": "newest"}, "init_lora_weights: newest, which changes the base"),
        ({"layers_to_transform": [0]}, "layers_to_transform: [0]"),
        ({"lora_bias": True}, "lora_bias on some of the matrices only"),
    ],
)
def test_what_is_not_computed_here_is_refused_by_name(
    change: dict[str, Any], said: str, base: Path, tmp_path: Path
) -> None:
    adapter = saved_by_peft(base, tmp_path / "adapter", r=2, target_modules=["o_proj"])
    with_keys(adapter, **change)
    with pytest.raises(UserError) as caught:
        read_weights([inspect(base), inspect(adapter)])
    assert said in caught.value.message
    assert "merge_and_unload" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["o_proj", "lm_head"], "a LoRA pair of output"),
        (r".*(layers\.0\.self_attn\.(q|o)|layers\.1\.self_attn\.q)_proj", "LoRA pairs of wo in 1 of 2 layers"),
    ],
)
def test_pairs_of_other_modules_are_refused(targets: list[str] | str, said: str, base: Path, tmp_path: Path) -> None:
    adapter = saved_by_peft(base, tmp_path / "adapter", r=2, target_modules=targets)
    with pytest.raises(UserError, match=said):
        read_weights([inspect(base), inspect(adapter)])
