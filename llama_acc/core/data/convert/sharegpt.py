"""ShareGPT: conversations that people shared, as web pages had them."""

from collections.abc import Iterable

from llama_acc.core.data.convert.markdown import cleaned
from llama_acc.core.data.convert.rules import Options, Record, Row, Rule, Skipped, list_of, system_of
from llama_acc.core.data.convert.splitting import Splitter
from llama_acc.core.data.convert.turns import Turn, dialogue, each_turn, in_exchanges, turn_of


class ShareGpt(Rule):
    """Dialogues with HTML made Markdown, in exchanges, split at a number of tokens, in languages asked for."""

    keys = turns_in = ("conversations", "items")

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._splitter = None
        if options.tokenizer is not None and options.max_tokens is not None:
            self._splitter = Splitter(options.tokenizer, options.max_tokens, self.notes)

    def records(self, row: Row) -> Iterable[Record]:
        # Older collections call it "items".
        field = "items" if "items" in row and "conversations" not in row else "conversations"
        exchanges = in_exchanges(each_turn(list_of(row, field), self._turn), self.notes, system_of(row))
        if self.options.languages:
            self._check_language(exchanges.turns)
        parts = [exchanges] if self._splitter is None else self._splitter.parts(exchanges)
        if len(parts) == 1:
            yield dialogue(row, exchanges)
            return
        for number, part in enumerate(parts):
            yield dialogue(row, part, number)

    def _turn(self, value: object) -> Turn:
        turn = turn_of(value)
        if self.options.keep_html:
            return turn
        clean = cleaned(turn.text)
        if clean == turn.text:
            return turn
        self.notes["turns had HTML or marks of the web page, which were cleaned"] += 1
        return turn._replace(text=clean)

    def _check_language(self, turns: list[Turn]) -> None:
        from llama_acc.core.data.language import language_of

        language = next((found for turn in turns if (found := language_of(turn.text))), None)
        if language is not None and language not in self.options.languages:
            raise Skipped(f"in another language ({language})")
