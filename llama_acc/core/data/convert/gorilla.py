"""Gorilla's APIBench: a row's `code` holds an instruction and what is to be answered, in one text.

The rule is LLaMA2-Accessory's, to the byte. It knows one form ("###Instruction: ... ###Output: ..."); TorchHub's
training data has another, which `all_forms` understands.
"""

import re
from collections.abc import Iterable

from llama_acc.core.data.convert.rules import Malformed, Record, Row, Rule, Skipped, text_of

# {'Instruction': Find me an API., 'Output': {...}}: a Python dictionary in looks only, as quotes are missing. Some rows
# break off before the end.
_DICTIONARY = re.compile(r"\s*\{\s*['\"]Instruction['\"]\s*:(.*?),\s*['\"]Output['\"]\s*:(.*)", re.DOTALL)


class Gorilla(Rule):
    """APIBench's rows to single-turn items."""

    keys = ("code",)
    may_give_nothing = True

    def records(self, row: Row) -> Iterable[Record]:
        code = text_of(row, "code").replace("###Instruction.", "###Instruction:")
        if "Output:" in code:
            return [_by_the_rule(code)]
        form = _DICTIONARY.fullmatch(code)
        if form is None:
            raise Skipped("no 'Output:' in 'code'")
        if not self.options.all_forms:
            raise Skipped("of the form {'Instruction': ...}, which the rule does not know (--all-forms takes it)")
        return [_item(_unquoted(form[1]), _inside(form[2]))]


def _by_the_rule(code: str) -> Record:
    question, output = code.split("Output:")[:2]
    if "Instruction:" not in question:
        raise Malformed("no 'Instruction:' before 'Output:' in 'code'")
    return _item(question.split("Instruction:")[1].split("###")[0], output)


def _item(instruction: str, output: str) -> Record:
    return {"instruction": instruction, "input": "", "output": output}


def _unquoted(text: str) -> str:
    text = text.strip()
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


def _inside(text: str) -> str:
    """Without the brace that closes the whole, which is one more than were opened."""
    text = text.rstrip()
    return text[:-1] if text.endswith("}") and text.count("}") > text.count("{") else text
