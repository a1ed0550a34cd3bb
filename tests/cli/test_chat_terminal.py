"""`llama-acc chat` as a person sees it, in a terminal."""

from pathlib import Path

from tests.cli.conftest import ANSWER
from tests.cli.terminal import Terminal


def test_an_answer_streams_ctrl_c_stops_it_and_at_the_prompt_it_leaves(talker: Path) -> None:
    flags = ["--template", "none", "--temperature", "0", "--max-new-tokens", "4000"]
    with Terminal("chat", "--ckpt", talker, *flags) as terminal:
        terminal.expect("template: none (asked for). /help lists what else you can type.")
        terminal.expect("> ")
        terminal.type("who?\n")
        terminal.expect("the the the the")
        terminal.type("\x03")
        terminal.expect("answer cut short; Ctrl-C again at the prompt to leave")
        terminal.expect("> ")
        terminal.type("say:\n")
        terminal.expect(ANSWER)
        terminal.expect("> ")
        terminal.interrupt("stopped by Ctrl-C")
        assert terminal.end() == 130
        assert "Traceback" not in terminal.seen


def test_ctrl_d_leaves_and_the_template_of_a_run_is_said(trained_once: Path) -> None:
    with Terminal("chat", "--ckpt", trained_once) as terminal:
        terminal.expect("template: alpaca (alpaca, from template.json).")
        terminal.expect("each one stands alone")
        terminal.expect("> ")
        terminal.type("/system be kind\n")
        terminal.expect("system: be kind")
        terminal.expect("> ")
        terminal.type("\x04")
        assert terminal.end() == 0
