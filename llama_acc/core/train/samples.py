"""Answers of the model in training to a run's sample prompts: greedy, in the run's template.

The decoding engine runs on the parameters that train, on every rank, and draws nothing: the run is, to the bit, what it
is without. Up to 8 answers are under way at a time, whose keys and values the prediction of memory counts.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch

from llama_acc.core.data.templates import Template, Turn
from llama_acc.core.errors import UserError
from llama_acc.core.generate.chat import checked_text, encode_question
from llama_acc.core.generate.engine import Engine, Reply, stop_followers
from llama_acc.core.generate.load import LoadedModel
from llama_acc.core.generate.sampling import Sampler, Sampling
from llama_acc.core.input_files import read_text
from llama_acc.core.tokenizer import Tokenizer
from llama_acc.core.train.base import beside
from llama_acc.core.train.data_parallel import DataParallel

_AT_A_TIME = 8


class Samples(NamedTuple):
    """What is answered while a run trains."""

    prompts: list[str]  # all different
    max_new_tokens: int  # of an answer
    length: int  # most positions of an answer, with its prompt

    @property
    def at_a_time(self) -> int:
        """How many answers are under way together."""
        return min(len(self.prompts), _AT_A_TIME)


def read_prompts(given: list[str] | str | None, folder: Path | None) -> list[str]:
    """The sample prompts of a recipe in `folder`: its list, or the lines of its text file."""
    prompts = given or []
    if isinstance(prompts, str):
        path = beside(prompts, folder)
        if path.suffix != ".txt":
            hint = 'write a list such as ["Who are you?"], or name a .txt file with a prompt on each line'
            raise UserError(f"train.sample_prompts: {prompts!r} is no .txt file", hint)
        prompts = [line for line in read_text(path).splitlines() if line.strip()]
        if not prompts:
            raise UserError(f"train.sample_prompts: {path} holds no prompt", "write a prompt on each line")
    return list(dict.fromkeys(map(checked_text, prompts)))


def plan_samples(
    prompts: list[str], max_new_tokens: int, template: Template, tokenizer: Tokenizer, context: int
) -> Samples:
    """What answering the prompts takes."""
    longest = 0
    for prompt in prompts:
        length = len(template.prompt_ids(tokenizer, [Turn("human", prompt)]))
        if length >= context:
            raise UserError(
                f"the sample prompt {prompt[:40]!r} has {length} tokens, the model's context is {context}",
                "shorten it, or raise model.max_seq_len",
            )
        longest = max(longest, length)
    return Samples(prompts, max_new_tokens, min(longest + max_new_tokens, context))


def answer_prompts(
    loaded: LoadedModel, data_parallel: DataParallel, samples: Samples, compiled: bool
) -> dict[str, str]:
    """The answer to each prompt, on rank 0; the other ranks compute their part. `compiled`: the model's blocks are."""
    engine = Engine(loaded)
    # A compiled block would be compiled anew for the shapes of decoding.
    with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
        answers: dict[str, Reply] = {}
        if loaded.model.parallel.is_main:
            questions = (encode_question(loaded, prompt) for prompt in samples.prompts)
            sampler = Sampler(Sampling(temperature=0, max_new_tokens=samples.max_new_tokens))
            for reply, _ in engine.generate(questions, sampler, _AT_A_TIME):
                answers[samples.prompts[reply.index]] = reply
            stop_followers(loaded)
        else:
            engine.follow()
    data_parallel.after_evaluation()
    return {prompt: answers[prompt].text for prompt in samples.prompts if answers}
