"""lm-evaluation-harness over the decoding engine: its tasks for every checkpoint that loads here, without an export.

Texts become tokens by the rules of the harness's class for Hugging Face folders, `lm_eval.models.huggingface`: where
BOS stands, where a continuation begins, what is cut off on the left.
"""

import contextlib
import json
import logging
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from importlib.metadata import version
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from jinja2 import TemplateError

from llama_acc.core.checkpoint.tokenizer_files import adds_bos_to_texts, chat_template
from llama_acc.core.data.chat_rendering import renderer
from llama_acc.core.data.chat_template import ChatTemplate
from llama_acc.core.data.templates import Template
from llama_acc.core.errors import RunError, UserError, did_you_mean
from llama_acc.core.generate.engine import Engine, Prompt
from llama_acc.core.generate.load import LoadedModel
from llama_acc.core.generate.sampling import Sampler, Sampling
from llama_acc.core.input_files import read_object
from llama_acc.core.tokenizer_folder import CONFIG_FILE

try:
    from datasets import disable_progress_bars
    from lm_eval.api.model import TemplateLM
    from lm_eval.evaluator import evaluate
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, handle_non_serializable, make_disjoint_window
    from lm_eval.utils import simple_parse_args_string as parse_settings
except ImportError as error:
    problem = f"lm-evaluation-harness cannot be imported: {error}"
    raise UserError(problem, "type: pip install 'llama-acc[eval]'") from error

logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every setting that a task leaves to it
disable_progress_bars()
# The harness's own.
_PYTHON_SEED, _SEED, _MAX_NEW_TOKENS = 0, 1234, 256
_SETTINGS = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"}

Progress = Callable[[str, int, int], None]
"""Gets what is done, how much of it, and of how much."""


class EngineLM(TemplateLM):
    """A loaded model as the harness takes it."""

    def __init__(self, loaded: LoadedModel, batch_tokens: int, progress: Progress) -> None:
        super().__init__()
        self.loaded, self.batch_tokens, self.progress = loaded, batch_tokens, progress
        self.max_length = loaded.model.config.max_seq_len
        self.truncated = 0  # so many requests lost their beginning, as they were longer than the context
        self.without_system = 0  # so many prompts lost their system text, as the chat template refuses one

    @property
    def eot_token_id(self) -> int:
        """EOS."""
        return self.loaded.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context follows."""
        return self.loaded.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        """Differs where a tokenizer does."""
        return self.loaded.tokenizer.fingerprint()

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The tokens of a text, which may have special ones in it, such as a chat template's BOS."""
        tokenizer = self.loaded.tokenizer
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(tokenizer.piece(tokenizer.bos_id))
        return tokenizer.encode(string, bos=add_special_tokens and self._begins_with_bos)

    @cached_property
    def _begins_with_bos(self) -> bool:
        """Whether an exported folder's tokenizer begins texts with BOS."""
        tokenizer = self.loaded.tokenizer
        adds = adds_bos_to_texts(tokenizer, read_object(tokenizer.path.parent / CONFIG_FILE, optional=True))
        if adds is None:
            from tokenizers import Tokenizer as Fast

            adds = Fast.from_str(json.dumps(tokenizer.to_json())).encode("a").ids[:1] == [tokenizer.bos_id]
        return adds

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages in the prompt format, up to where the model is to answer, or to go on with the last one."""
        try:
            text = self._render(chat_history, add_generation_prompt)
        except TemplateError as error:
            rest = [message for message in chat_history if message["role"] != "system"]
            if len(rest) == len(chat_history):
                raise UserError(f"the prompt format {self.loaded.template.shown} fails: {error}") from error
            self.without_system += 1
            return self.apply_chat_template(rest, add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].lstrip()
        last = last if last in text else last.rstrip()
        return text[: text.rindex(last) + len(last)]

    @cached_property
    def _render(self) -> Callable[[Sequence[Mapping[str, str]], bool], str]:
        """An exported folder's chat template."""
        template, tokenizer = self.loaded.template, self.loaded.tokenizer
        if isinstance(template, ChatTemplate):
            return renderer(template.source, template.variables)
        source = chat_template(template, tokenizer)
        if source is None:
            hint = "leave out --apply-chat-template, or give another --template"
            raise UserError(f"the prompt format {template.name!r} cannot be written as a chat template", hint)
        bos, eos = map(tokenizer.piece, (tokenizer.bos_id, tokenizer.eos_id))
        return renderer(source, {"bos_token": bos, "eos_token": eos})

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        by_document = defaultdict[tuple[int, ...], list[int]](list)
        for number, (_, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length:
                limits = f"from 1 to {self.max_length}, the model's context"
                raise UserError(f"a text to be scored has {len(continuation)} tokens, and must have {limits}")
            document = ((context or [self.prefix_token_id]) + continuation)[:-1]
            self.truncated += len(document) > self.max_length
            # Choices of one token have one document.
            by_document[tuple(document[-self.max_length :])].append(number)
        found = [(0.0, False)] * len(requests)
        done, longest_first = 0, sorted(by_document, key=len, reverse=True)
        places = accumulate(map(len, longest_first))
        batch_of = {doc: end // self.batch_tokens for doc, end in zip(longest_first, places, strict=True)}
        for _, documents in groupby(longest_first, batch_of.__getitem__):
            batch = list(documents)
            owners = [(place, number) for place, document in enumerate(batch) for number in by_document[document]]
            scores = Engine(self.loaded).score(batch, [(place, requests[number][2]) for place, number in owners])
            for (_, number), score in zip(owners, scores, strict=True):
                found[number] = score
            done += len(owners)
            self.progress("scored", done, len(requests))
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text, in windows of the model's context."""
        windows, owners = list[Any](), list[int]()
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += score
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each prompt, up to the first of its stop strings."""
        by_settings = defaultdict[str, list[int]](list)
        for number, request in enumerate(requests):
            by_settings[json.dumps(request.args[1], sort_keys=True)].append(number)
        texts, done = [""] * len(requests), 0
        for settings, numbers in by_settings.items():
            sampling, stops = _sampling(json.loads(settings))
            room = self.max_length - sampling.max_new_tokens
            if room < 1:
                problem = f"max_gen_toks ({sampling.max_new_tokens}) must be less than the model's context"
                raise UserError(f"{problem} ({self.max_length})", "give --gen-kwargs max_gen_toks=N")
            prompts = [(self.tok_encode(requests[number].args[0]) or [self.prefix_token_id]) for number in numbers]
            self.truncated += sum(len(prompt) > room for prompt in prompts)
            asked = sorted(zip(numbers, prompts, strict=True), key=lambda pair: -len(pair[1]))
            batch_size = self.batch_tokens // (min(len(asked[0][1]), room) + sampling.max_new_tokens)
            engine = Engine(replace(self.loaded, template=Template(name="lm-eval", kind="single_turn", stop=stops)))
            replies = engine.generate(
                [Prompt(prompt[-room:]) for _, prompt in asked], Sampler(sampling), max(1, batch_size)
            )
            for reply in (reply for reply, _ in replies if reply.ended):
                texts[asked[reply.index][0]] = reply.text
                done += 1
                self.progress("answered", done, len(requests))
        return texts


def _sampling(settings: dict[str, Any]) -> tuple[Sampling, tuple[str, ...]]:
    """How a task wants its answers, and where they end."""
    known = normalize_gen_kwargs(settings, _MAX_NEW_TOKENS)
    unknown = [key for key in known if key not in _SETTINGS and (key, known[key]) != ("num_beams", 1)]
    if unknown:
        raise UserError(
            f"answers cannot be generated with {', '.join(unknown)}", f"what can be set: {', '.join(sorted(_SETTINGS))}"
        )
    temperature = float(known["temperature"]) if known["do_sample"] else 0.0
    sampling = Sampling(temperature, known.get("top_p", 1.0), _SEED, known["max_gen_toks"], known.get("top_k", 0))
    return sampling, tuple(filter(None, known["until"]))


def load_tasks(names: Sequence[str], include_path: Path | None) -> Mapping[str, Any]:
    """The harness's tasks and groups of these names, globs or YAML files, with their data.

    `include_path` is a folder with YAML files of more tasks.

    Raises:
        UserError: a name is unknown, or a task cannot be made.
        RunError: data cannot be fetched.
    """
    # The index of the harness's own tasks is made of 14,000 files.
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if manager.all_groups or any(not _matches(manager, name) for name in names):
        manager = TaskManager(include_path=include_path)
    unknown = [name for name in names if not _matches(manager, name)]
    if unknown:
        near = did_you_mean(unknown[0], manager.all_tasks)
        raise UserError(f"unknown task: {', '.join(unknown)}", near or "lm_eval ls tasks lists them")
    try:
        tasks = manager.load(list(dict.fromkeys(match for name in names for match in _matches(manager, name))))
    except ConnectionError as error:
        raise RunError(f"the data of a task cannot be fetched: {error}", "it is kept once it was fetched") from error
    except Exception as error:  # a task is data, YAML and code
        problem = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise UserError(f"cannot load {', '.join(names)}: {problem}", "add --debug to see where") from error
    if unsafe := [name for name, task in tasks["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]:
        raise UserError(f"{', '.join(unsafe)}: the task runs code that a model writes, which is not done here")
    return tasks


def _matches(manager: Any, name: str) -> list[str]:
    return [name] if Path(name).is_file() else manager.match_tasks([name])


def run_tasks(
    model: EngineLM,
    tasks: Mapping[str, Any],
    num_fewshot: int | None = None,
    gen_kwargs: str | None = None,
    fewshot_as_multiturn: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """What `lm_eval.simple_evaluate` makes of a model, with its samples; `options` go to `lm_eval.evaluate`."""
    random.seed(_PYTHON_SEED)
    np.random.seed(_SEED)
    for task in tasks["tasks"].values():
        if gen_kwargs and task.get_config("output_type") == "generate_until":
            task.set_config("generation_kwargs", parse_settings(gen_kwargs), update=True)
        own = task.get_config("num_fewshot")
        if own is None or (num_fewshot is not None and own != 0):  # a task's own zero stays
            task.set_config("num_fewshot", num_fewshot or 0)
        task.set_fewshot_seed(seed=_SEED)

    def bar(items: Sequence[Any], **_: Any) -> Sequence[Any]:
        return items

    # Its bars would stand between ours, and what it prints in the results.
    with (
        mock.patch("lm_eval.api.task.tqdm", bar),
        mock.patch("lm_eval.api.model.tqdm", bar),
        contextlib.redirect_stdout(sys.stderr),
    ):
        results = evaluate(model, tasks, fewshot_as_multiturn=fewshot_as_multiturn, **options)
    return {**json.loads(json.dumps(results, default=handle_non_serializable)), "lm_eval_version": version("lm_eval")}
