"""What the processes of test_schedules.py do."""

from collections.abc import Sequence

from llama_acc.core.distributed.groups import init_distributed
from llama_acc.core.generate.engine import Engine, Prompt, stop_followers
from llama_acc.core.generate.load import load_model, load_models
from llama_acc.core.generate.sampling import Sampler, Sampling
from tests.core.tiny import CPU


def split_replies(folder: str, prompts: Sequence[Sequence[int]], most: int) -> list[list[int]]:
    """The greedy replies of a model that all processes share, two at a time and in small pieces; from rank 0."""
    with init_distributed(CPU, 2) as parallel:
        loaded = load_model(folder, device="cpu", parallel=parallel)
        if not parallel.is_main:
            Engine(loaded).follow()
            return []
        engine = Engine(loaded, slots=2, chunk=30)
        replies = [engine.add(Prompt(prompt), Sampler(Sampling(0, max_new_tokens=most))) for prompt in prompts]
        while engine.waiting or engine.running:
            engine.step()
        stop_followers(loaded)
    return [reply.tokens for reply in replies]


def mixed_replies(
    folders: dict[str, list[str]], prompts: Sequence[tuple[list[int], int]], most: int
) -> list[list[int]]:
    """The greedy replies of adapters over one base that all processes share; from rank 0."""
    with init_distributed(CPU, 2) as parallel:
        loaded = next(iter(load_models(folders, device="cpu", parallel=parallel).values()))
        if not parallel.is_main:
            Engine(loaded).follow()
            return []
        engine, sampler = Engine(loaded, slots=5, chunk=40), Sampler(Sampling(0, max_new_tokens=most))
        replies = [engine.add(Prompt(tokens, adapter=adapter), sampler) for tokens, adapter in prompts]
        while engine.waiting or engine.running:
            engine.step()
        stop_followers(loaded)
    return [reply.tokens for reply in replies]
