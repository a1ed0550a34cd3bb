"""Models and local tasks for lm-evaluation-harness, and what several processes do with them."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as Fast
from tokenizers.processors import TemplateProcessing

from llama_acc.core.data.templates import get_template
from tests.core.tiny import SMALL, random_model, save_model
from tests.core.tokenizers import llama3_style

TASKS = ["choices", "answers", "texts", "endings"]
_COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
fewshot_split: test
"""
_TASKS = {
    "choices": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "answers": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
gen_prefix: "It is"
generation_kwargs: {until: ["at#", "esd", "RG"], max_gen_toks: 12}
metric_list: [{metric: exact_match}]
""",
    "texts": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "endings": """
output_type: loglikelihood
description: "Go on."
doc_to_text: "{{text}} "
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
""",
}
# Without a place for a system text, as Gemma's.
_CHAT = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ bos_token }}"
    "{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def write_tasks(folder: Path) -> Path:
    """Tasks of each kind about a few documents, some of which are longer than a tiny model's context."""
    words = ("town", "country", "model", "little", "question")
    documents = [
        {
            "question": f"what is the {word} of {i}?",
            "choices": ["the", "a", "the answer", "once upon"],
            "gold": i % 4,
            "answer": "the town",
            "text": "once upon a time there was a little model " * (1 + 5 * i),
        }
        for i, word in enumerate(words)
    ]
    data = folder / "documents.json"
    data.write_text(json.dumps(documents))
    for name, task in _TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}" + _COMMON.format(data=data) + task)
    return folder


def write_model(folder: Path, tokenizer_path: Path | None) -> Path:
    """A random model, with LLaMA's kind of tokenizer or, without one, with LLaMA 3's and a chat template."""
    folder.mkdir()
    rows, never_said = SMALL.vocab_size, [*range(2, 259)]  # EOS, and bytes: two libraries show wrong ones differently
    if tokenizer_path is None:
        path = llama3_style(folder)
        fast = Fast.from_file(str(path))
        begin = "<|begin_of_text|>"
        fast.post_processor = TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, fast.token_to_id(begin))]
        )
        fast.save(str(path))
        rows = fast.get_vocab_size()
        never_said = [*range(rows - 5, rows - 1)]  # special tokens, all of which end an answer here
        (folder / "chat_template.jinja").write_text(_CHAT)
    else:
        shutil.copy(tokenizer_path, folder / "tokenizer.model")
        (folder / "template.json").write_text(get_template("dialogue").to_json())
    model = random_model(replace(SMALL, vocab_size=rows), seed=5)
    with torch.no_grad():
        model.output.weight[never_said] = 0
    save_model(model, folder, torch.float32)
    return folder


def answers(samples: Any) -> list[list[Any]]:
    """What a model said to each request of a task, with the request."""
    return json.loads(json.dumps([(sample["arguments"], sample["resps"]) for sample in samples]))


def shared_answers(folder: str, tasks: str, names: Sequence[str]) -> dict[str, list[Any]]:
    """Those of a model that all processes share."""
    from llama_acc.core.distributed.groups import init_distributed
    from llama_acc.core.evaluate.lm_eval import EngineLM, load_tasks, run_tasks
    from llama_acc.core.generate.engine import Engine, stop_followers
    from llama_acc.core.generate.load import load_model
    from tests.core.tiny import CPU

    with init_distributed(CPU, 2) as parallel:
        loaded = load_model(folder, device="cpu", parallel=parallel)
        if not parallel.is_main:
            Engine(loaded).follow()
            return {}
        model = EngineLM(loaded, 500, lambda *_: None)
        samples = run_tasks(model, load_tasks(names, Path(tasks)), bootstrap_iters=0)["samples"]
        stop_followers(loaded)
        return {name: answers(samples[name]) for name in names}
