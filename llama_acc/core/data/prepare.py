"""What is done with the rows of a data file, some at a time: they are looked at, and their items encoded."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from llama_acc.core.data.checks import format_findings, merged_finding
from llama_acc.core.data.encode import Chunk, encode_chunk
from llama_acc.core.data.readers import Checked
from llama_acc.core.data.survey import Survey
from llama_acc.core.data.templates import PromptFormat
from llama_acc.core.tokenizer import Tokenizer

Batch = Sequence[tuple[int, Checked]]
"""Rows of a file and their numbers from 0: items, and what is none."""

KEPT_PLACES = 20
"""Of what is found in a file, for each kind."""


@dataclass(frozen=True)
class Job:
    """What to make of items."""

    tokenizer: Path
    template: PromptFormat
    max_tokens: int
    image_positions: int = 0


class Prepared(NamedTuple):
    """What became of a batch."""

    chunk: Chunk
    """Its items as documents."""
    survey: Survey
    """What was found in its rows."""


def prepare_batch(batch: Batch, job: Job, tokenizer: Tokenizer) -> Prepared:
    """Encodes the items of a batch, and looks at all of its rows."""
    items = [(index, row.item) for index, row in batch if row.item is not None]
    survey = Survey(KEPT_PLACES)
    chunk = encode_chunk(items, job.template, tokenizer, job.max_tokens, job.image_positions)
    merged, looks = set(chunk.merged), (job.template.text_stops(tokenizer), job.template.marks(tokenizer))
    for index, row in batch:
        survey.add(row.where, row.item, row.problems)
        if row.item is not None:
            found = [*format_findings(row.item, row.where, *looks)]
            found += [merged_finding(row.item, row.where, job.template)] * (index in merged)
            for finding in found:
                survey.findings.add(finding)
    return Prepared(chunk, survey)
