import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from llama_acc.core.errors import UserError
from llama_acc.core.recipe import RECIPES_FOLDER, Recipe, find_recipe, known_keys, recipe_names

# LLaMA2-Accessory's hyper-parameters: of one recipe all, of each other one what it is like and what
# differs. Its batch size x accumulation x ranks make a step; of 34B and 70B (2 x 64) no number of machines is named.
ALPACA = {
    "model.pretrained": "llama2-7b",
    "model.size": "llama2-7b",
    "model.max_seq_len": 4096,
    "data.sources.0.path": "alpaca",
    "data.sources.0.format": "single_turn",
    "data.sources.0.template": "alpaca",
    "data.max_tokens": 512,
    "optimizer.lr": 2e-5,
    "optimizer.betas": (0.9, 0.95),
    "optimizer.weight_decay": 0.0,
    "optimizer.clip_grad_norm": 2.0,
    "train.precision": "bf16",
    "train.epochs": 3,
    "train.warmup_epochs": 0.04,
    "train.global_batch_size": 4 * 8 * 8,
    "train.batch_size": "auto",
    "train.micro_batch_tokens": "auto",
    "train.activation_checkpointing": "auto",
    "checkpoint.keep": 3,
}
DIALOGUE = {"data.sources.0.format": "dialogue", "data.sources.0.template": "dialogue", "data.max_tokens": 4096}
LIKE: dict[str, tuple[str, dict[str, Any]]] = {}
LIKE |= {name: ("alpaca", {"data.sources.0.path": name}) for name in ("gorilla", "platypus")}
for name in ("lima", "sharegpt", "wizardlm", "wizardcode", "flacuna", "ultrachat", "moss"):
    LIKE[name] = ("alpaca", DIALOGUE | {"data.sources.0.path": name})
# Base, model-parallel size, data.max_tokens.
for name, (base, size, max_tokens) in {
    "lima-13b": ("llama2-13b", 2, 4096),
    "sharegpt-13b": ("llama2-13b", 2, 4096),
    "wizardcode-13b": ("llama2-13b", 2, 4096),
    "flacuna-13b": ("llama2-13b", 2, 2048),
    "wizardcode-34b": ("codellama-34b", 4, 4096),
    "sharegpt-70b": ("llama2-70b", 8, 4096),
}.items():
    changed = {"model.pretrained": base, "model.size": base, "parallel.model_parallel_size": size}
    changed |= {"train.global_batch_size": 128, "data.max_tokens": max_tokens}
    LIKE[name] = (name.rpartition("-")[0], changed)
# Settings of the method, data.max_tokens, epochs, epochs of warm-up, learning rate.
for name, (tuning, max_tokens, epochs, warmup, lr) in {
    "alpaca-biasnorm": ({"method": "bias_norm"}, 512, 4, 1, 5e-5),
    "alpaca-lora": ({"method": "lora_bias_norm", "lora_rank": 16}, 512, 4, 1, 5e-5),
    "alpaca-adapter": ({"method": "adapter", "prefix_layers": 30, "prefix_len": 10}, 1024, 4, 1, 5e-5),
    "gorilla-biasnorm": ({"method": "bias_norm"}, 512, 10, 2, 1e-3),
    "gorilla-lora": ({"method": "lora_bias_norm", "lora_rank": 16}, 512, 10, 2, 1e-3),
    "gorilla-adapter": ({"method": "adapter", "prefix_layers": 32, "prefix_len": 10}, 512, 10, 2, 1e-3),
    "sharegpt-lora": ({"method": "lora_bias_norm", "lora_rank": 16}, 4096, 4, 1, 5e-5),
}.items():
    changed = {f"tuning.{key}": value for key, value in tuning.items()} | {"data.max_tokens": max_tokens}
    changed |= {"optimizer.lr": lr, "optimizer.min_lr": 5e-6, "optimizer.weight_decay": 0.02}
    changed |= {"train.epochs": epochs, "train.warmup_epochs": warmup, "train.global_batch_size": 64}
    changed |= {"train.activation_checkpointing": False if name == "alpaca-adapter" else "auto"}
    LIKE[name] = (name.partition("-")[0], changed)
# The same with NF4.
for name, like, data, base in (
    ("alpaca-biasnorm-nf4", "alpaca-biasnorm", "alpaca", "llama2-7b"),
    ("alpaca-lora-nf4", "alpaca-lora", "alpaca", "llama2-7b"),
    ("platypus-biasnorm-nf4", "alpaca-biasnorm", "platypus", "llama2-7b"),
    ("alpaca-70b-biasnorm-nf4", "alpaca-biasnorm", "alpaca", "llama2-70b"),
    ("alpaca-70b-lora-nf4", "alpaca-lora", "alpaca", "llama2-70b"),
):
    changed = {"model.pretrained": base, "model.size": base, "data.sources.0.path": data, "tuning.quantize": "nf4"}
    changed |= {"parallel.data_parallel": "fsdp", "checkpoint.trainable_only": True}
    LIKE[name] = (like, changed)
SMALLEST: dict[str, Any] = {
    "name": "smallest",
    "model": {"pretrained": None},
    "data": {"sources": [{"path": "data.json"}]},
    "optimizer": {"lr": 1e-3},
}


def refused(*overrides: str, name: str | Path = "quickstart") -> str:
    with pytest.raises(UserError) as error:
        Recipe.load(name, overrides)
    assert error.value.exit_code == 2
    return str(error.value)


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_is_valid_and_says_what_it_is(name: str) -> None:
    recipe = Recipe.load(name)
    assert recipe.name == name
    assert recipe.description
    assert Recipe.from_mapping(yaml.safe_load(recipe.to_yaml())) == recipe


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Values by their dotted keys."""
    inner = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    found = {key: value for name, item in inner for key, value in flat(item, f"{prefix}{name}.").items()}
    return found or {prefix.rstrip("."): values}


def test_a_recipe_has_llama2_accessorys_hyper_parameters() -> None:
    recipe = flat(Recipe.load("alpaca").model_dump())
    own = {"name": "alpaca", "description": recipe["description"]}
    assert recipe == flat(Recipe.from_mapping(SMALLEST).model_dump()) | ALPACA | own


@pytest.mark.parametrize("name", LIKE)
def test_recipes_differ_only_in_what_is_listed(name: str) -> None:
    like, changed = LIKE[name]
    recipe = flat(Recipe.load(name).model_dump())
    assert changed.get("model.pretrained", "").rpartition("-")[2].upper() in recipe["description"].upper()
    own = {"name": name, "description": recipe["description"]}
    assert recipe == flat(Recipe.load(like).model_dump()) | changed | own


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.epochs=2.5", 2.5),
        ("optimizer.lr=1e-3", 1e-3),
        ("optimizer.betas=[0.8, 0.9]", (0.8, 0.9)),
        ("train.max_steps=null", None),
        ("train.shuffle=false", False),
        ("train.micro_batch_tokens=auto", "auto"),
        ("model.params={dim: 64, n_layers: 2}", {"dim": 64, "n_layers": 2}),
        ("model.params=[a.json, b.json]", ["a.json", "b.json"]),
        ("model.pretrained=[base, tuned]", ["base", "tuned"]),
        ("name=a=b", "a=b"),
        # In a mapping, a list, and a section that the file leaves out.
        ("model.params.dim=64", 64),
        ("data.sources.0.ratio=0.5", 0.5),
        ("data.validation.fraction=0.1", 0.1),
    ],
)
def test_any_key_may_be_overridden_with_a_yaml_value(override: str, value: Any) -> None:
    found: Any = Recipe.from_mapping(SMALLEST, [override]).model_dump()
    for key in override.partition("=")[0].split("."):
        found = found[int(key) if key.isdecimal() else key]
    assert found == value


def test_a_later_override_wins_and_the_recipe_given_is_left_alone() -> None:
    given = {**SMALLEST, "train": {"epochs": 2}}
    recipe = Recipe.from_mapping(given, ["train.epochs=4", "train.epochs=5"])
    assert (recipe.train.epochs, recipe.train.global_batch_size, recipe.checkpoint.dtype) == (5, 256, "auto")
    assert given["train"] == {"epochs": 2}


@pytest.mark.parametrize("number", ["1e-6", "1.0e-6", "1E-6", "0.000001"])
def test_a_number_may_be_written_in_any_way(number: str, tmp_path: Path) -> None:
    recipe = Recipe.load("quickstart", [f"optimizer.eps={number}", f"model.params.norm_eps={number}"])
    assert recipe.optimizer.eps == 1e-6
    assert recipe.model.params is not None
    assert recipe.model.params["norm_eps"] == 1e-6  # type: ignore[call-overload,index]
    path = tmp_path / "own.yaml"
    path.write_text(
        yaml.safe_dump(SMALLEST).replace("pretrained: null", f"params: {{norm_eps: {number}}}\n  pretrained:")
    )
    assert Recipe.load(path).model.params == {"norm_eps": 1e-6}


def test_a_recipe_survives_a_round_trip_through_its_yaml(tmp_path: Path) -> None:
    recipe = Recipe.load(
        "lima",
        [
            "description='Grüße: {a: 1} # ünïcode'",
            "model.params={dim: 64, norm_eps: 1e-6}",
            "model.pretrained=[a, b]",
            "optimizer.lr=1.25e-7",
            "train.max_steps=3",
            "name='1e5'",
            "data.sources.0.path=12e4-abc",
        ],
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert Recipe.load(path).model_dump() == recipe.model_dump()
    assert (Recipe.load(path).folder, Recipe.load("lima").folder) == (tmp_path, None)
    assert Recipe.load(path).to_yaml() == recipe.to_yaml()


def test_the_yaml_holds_every_key() -> None:
    written = flat(yaml.safe_load(Recipe.from_mapping(SMALLEST).to_yaml()))
    keys = {re.sub(r"\.\d+", "", key) for key in written}
    assert keys == {key for key in known_keys() if not any(other.startswith(f"{key}.") for other in known_keys())}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.precison=bf16", "unknown key 'train.precison': did you mean 'train.precision'"),
        ("epochs=1", "unknown key 'epochs': did you mean 'train.epochs'?"),
        ("optimizer.epochs=1", "unknown key 'optimizer.epochs': did you mean 'train.epochs'?"),
        ("train.batch_size=automatic", "train.batch_size: should be a valid integer or 'auto', not 'automatic'"),
        (
            "train.micro_batch_tokens=0",
            "train.micro_batch_tokens: should be greater than or equal to 1 or 'auto', not 0",
        ),
        (
            "train.activation_checkpointing=2",
            "train.activation_checkpointing: should be a valid boolean or 'auto', not 2",
        ),
        ("lr=1", "unknown key 'lr': did you mean 'optimizer.lr'?"),
        (
            "data.sources.0.tempalte=none",
            "unknown key 'data.sources.0.tempalte': did you mean 'data.sources.0.template'",
        ),
        ("trian={}", "unknown key 'trian': did you mean 'train'"),
        ("colour=red", "unknown key 'colour'"),
        ("optimizer.lr=fast", "optimizer.lr: should be a valid number, not 'fast'"),
        ("optimizer.lr=-1", "optimizer.lr: should be greater than or equal to 0, not -1"),
        ("optimizer.lr=.inf", "optimizer.lr: should be a finite number, not Infinity"),
        ("train.precision=fp16", "train.precision: should be 'bf16' or 'fp32', not 'fp16'"),
        ("train.global_batch_size=2.5", "train.global_batch_size: should be a valid integer, not 2.5"),
        ("train.shuffle=maybe", "train.shuffle: should be a valid boolean, not 'maybe'"),
        ("tuning.quantize_output=true", "unknown key 'tuning.quantize_output': did you mean 'tuning.quantize'"),
        ("optimizer.betas=[0.9]", "missing key 'optimizer.betas.1'"),
        ("vision.params={width: wide}", "vision.params.width: should be a valid integer or a valid number, not 'wide'"),
        ("train.warmup_epochs=60", "train: warmup_epochs (60) must be below epochs (60)"),
        ("optimizer.min_lr=1", "optimizer: min_lr (1.0) must not be above lr (0.002)"),
        ("data.validation={fraction: 0.5, path: x}", "give validation.fraction or validation.path, not both"),
        ("tuning.lora_targets=wq,wv", "tuning.lora_targets: should be a list, written [wq,wv], not 'wq,wv'"),
        ("data.sources=[]", "data.sources: List should have at least 1 item after validation, not 0"),
        (
            "tuning.method=magic",
            "tuning.method: there is no method 'magic': "
            "known are full, bias_norm, lora, lora_bias_norm, adapter, frozen",
        ),
        ("tuning.method=lore", "tuning.method: there is no method 'lore': did you mean 'lora'?"),
        ("model.pretrained=3", "model.pretrained: should be a valid string or a valid list, not 3"),
        ("model.pretrained=[a, 3]", "\n  model.pretrained.1: should be a valid string, not 3"),
        ("train=null", "train: should be a valid dictionary, not null"),
        ("optimizer={}", "missing key 'optimizer.lr'"),
        ("train.epochs", "'train.epochs': an override is written key=value, such as train.epochs=1"),
        ("=1", "'=1': an override is written key=value"),
        ("train.epochs=[1", "'train.epochs=[1': cannot read the value: it is not YAML"),
        ("data.sources.3.path=x", "there is no key 'data.sources.3.path'"),
        ("data.sources.first.path=x", "there is no key 'data.sources.first.path'"),
        ("name.first=x", "there is no key 'name.first'"),
    ],
)
def test_a_wrong_override_is_refused_saying_what_was_meant(override: str, message: str) -> None:
    told = refused(override)
    assert message in told
    # pydantic's own words
    assert not any(word in told for word in ("Value error", "Input should", "instance of", "unable to"))


CACHE, HELD_OUT = "vision.cache_features=true", "data.validation.fraction=0.25"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["vision.encoder=qfromer"], "did you mean 'qformer'"),
        (["vision.encoder=clip"], "vision.encoder clip and tuning.method adapter go together, not clip and full"),
        (["tuning.method=frozen"], "method frozen trains only what vision adds: set vision.encoder"),
        (["vision.encoder=tiny", CACHE], "cache_features is for encoders that are frozen"),
        ([CACHE], "without vision.encoder there is nothing else to say of vision"),
        (["vision.encoder=tiny", "vision.params={widht: 3}"], "did you mean 'width'"),
        (["train.early_stopping_patience=2"], "counts validations: set data.validation.fraction or .path"),
        (["train.early_stopping_patience=2", HELD_OUT, "checkpoint.keep=1"], "set checkpoint.keep=2"),
        (["train.early_stopping_patience=0", HELD_OUT], "train.early_stopping_patience"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(overrides: list[str], message: str) -> None:
    assert message in refused(*overrides)


def test_all_problems_of_a_recipe_are_reported_together() -> None:
    for first, *overrides in (
        ("recipe quickstart is not valid:", "train.epochs=-1", "optimizer.lr=fast", "train.precison=bf16"),
        ("these overrides cannot be applied:", "nonsense", "train.epochs=[1", "data.sources.3.path=x"),
    ):
        lines = refused(*overrides).splitlines()
        assert (lines[0], len(lines)) == (first, 4)
    with pytest.raises(UserError) as error:
        Recipe.from_mapping({"name": "x", "data": {}})
    assert re.findall(r"missing key '(.*)'", str(error.value)) == ["model", "data.sources", "optimizer"]


def test_a_recipe_is_found_by_its_shipped_name_or_as_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lima").write_text("name: other")
    assert find_recipe("lima") == RECIPES_FOLDER / "lima.yaml"
    assert find_recipe("./lima") == Path("lima")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "must be a mapping with keys such as model, data and train"),
        ("", "must be a mapping"),
        ("model: [", 'own.yaml", line 1'),
        ("name: a\ntrain:\n  epochs: 1\ntrain: {}\n", "the key 'train' is there twice"),
        ("model: !!python/object/apply:os.system [touch proof]", "it is not YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "own.yaml"
    path.write_text(text)
    assert message in refused(name=path)
    assert not (tmp_path / "proof").exists()


def test_values_are_checked_when_they_are_changed_in_python() -> None:
    recipe = Recipe.load("quickstart")
    recipe.train.epochs = 2.5
    with pytest.raises(ValueError, match="greater than 0"):
        recipe.train.epochs = 0
    with pytest.raises(ValueError, match="no attribute"):
        recipe.train.epoch = 3  # type: ignore[attr-defined]
