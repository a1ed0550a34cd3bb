"""`llama-acc chat` for scripts: one answer, piped conversations, prompt formats."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from llama_acc.core.tokenizer import load_tokenizer
from tests.cli.chains import write_chain
from tests.cli.commands import COMMAND, PATIENCE, Result, complete, environment, invoke, refused, run, start
from tests.cli.conftest import ANSWER
from tests.core.tokenizers import END, START, byte_level

# Of the model `talker`: after ":" it answers, after "?" it never ends.


def chat(talker: Path, *flags: object, template: str = "alpaca", input: str | bytes | None = None) -> Result:
    """Greedy answers."""
    return invoke("chat", "--ckpt", talker, "--template", template, "--temperature", "0", *flags, input=input)


def test_the_answer_stands_alone_on_standard_output(talker: Path) -> None:
    done = run("chat", "--ckpt", talker, "--template", "alpaca", "--temperature", "0", "--prompt", "hello")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{ANSWER}\n", "")
    by_pipe = chat(talker, "--prompt", "-", template="none", input="say:")
    assert (by_pipe.exit_code, by_pipe.stdout, by_pipe.stderr) == (0, f"{ANSWER}\n", "")
    without_format = chat(talker, "--prompt", "say:", template="auto")
    assert (without_format.exit_code, without_format.stdout) == (0, f"{ANSWER}\n")
    assert "the checkpoint keeps no prompt format: template none" in without_format.stderr


def test_bytes_that_are_no_text_are_refused(talker: Path) -> None:
    refused(chat(talker, "--prompt", "-", input=b"\xff\xfe"), "standard input is not utf-8 text", "cannot be decoded")


@pytest.mark.parametrize("prompt", ["", " ", "\x00", "🦙\u202e\u2028"])
def test_any_text_is_a_prompt(talker: Path, prompt: str) -> None:
    result = chat(talker, "--prompt", prompt)
    assert (result.exit_code, result.stdout) == (0, f"{ANSWER}\n")


def test_options_shape_the_answer(talker: Path, trained_once: Path) -> None:
    assert chat(talker, "--prompt", "who?", "--max-new-tokens", "3", template="none").stdout == "the the the\n"
    for temperature in ("1e-300", "0.01"):
        flags = ["--template", "alpaca", "--temperature", temperature, "--seed", "1"]
        assert invoke("chat", "--ckpt", talker, "--prompt", "hello", *flags).stdout == f"{ANSWER}\n"

    def drawn(seed: int) -> str:
        flags = ["--seed", seed, "--temperature", "1.5", "--max-new-tokens", "20"]
        return invoke("chat", "--ckpt", trained_once, "--prompt", "What is LLaMA?", *flags).stdout

    assert drawn(1) == drawn(1) != drawn(2)


def test_a_run_means_its_latest_checkpoint_and_later_ones_override(trained_once: Path, talker: Path) -> None:
    flags = ["--prompt", "What is LLaMA?", "--temperature", "0", "--max-new-tokens", "20"]
    answers = []
    for ckpt in ([trained_once], [trained_once / "epoch0"], [talker, trained_once]):
        result = invoke("chat", *(word for folder in ckpt for word in ("--ckpt", folder)), *flags)
        assert (result.exit_code, result.stderr) == (0, "")
        answers.append(result.stdout)
    assert answers == [answers[0]] * 3


# Conversations through a pipe


def test_a_piped_conversation_puts_nothing_but_answers_on_standard_output(talker: Path, tmp_path: Path) -> None:
    saved = tmp_path / "chat.json"
    typed = [
        "/save " + str(saved),
        "hello",
        "/system you are a town",
        "/system",
        "and again",
        f"/save {saved}",
        "/reset",
        "once more",
        "/hlep",
        "/save",
        f"/save {tmp_path / 'no' / 'chat.json'}",
        "",
        "/help",
        "/quit",
        "this is not asked",
    ]
    done = chat(talker, template="dialogue", input="\n".join(typed) + "\n")
    assert done.exit_code == 0
    assert done.stdout == f"{ANSWER}\n" * 3
    assert done.stderr.splitlines()[:5] == [
        "error: there is nothing to save yet",
        "system: you are a town",
        "system: you are a town",
        f"wrote 4 turns to {saved}",
        "forgotten",
    ]
    assert "error: there is no /hlep" in done.stderr
    assert "error: to which file? /save FILE" in done.stderr
    assert f"error: cannot write {tmp_path / 'no' / 'chat.json'}: No such file or directory" in done.stderr
    assert done.stderr.count("/reset         forget the conversation") == 2
    [item] = json.loads(saved.read_text())
    assert item["system"] == "you are a town"
    turns = item["conversations"]
    assert [(turn["from"], turn["value"]) for turn in turns] == [
        ("human", "hello"),
        ("gpt", ANSWER),
        ("human", "and again"),
        ("gpt", ANSWER),
    ]


@pytest.fixture
def second(talker: Path, tmp_path: Path) -> Path:
    """A model that answers otherwise, without a prompt format."""
    tokenizer = talker / "tokenizer.model"
    return write_chain(tmp_path / "second", tokenizer, answer=" the country", after=":", max_seq_len=4096)


def test_another_answer_another_question_and_another_model(
    talker: Path, second: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a heading has the folder as it was typed, as far as the line is long
    Path("talker").symlink_to(talker)
    saved = second.with_name("chat.json")
    typed = ["/retry", "/edit", "hello", "/retry", "/edit", "good day", "/edit bye", "/compare second"]
    typed += ["and now", "/compare", "alone", "/compare nowhere", f"/save {saved}"]
    done = chat(Path("talker"), template="dialogue", input="\n".join(typed))
    other = "the country"
    assert done.stdout.splitlines() == [*[ANSWER] * 4, other, ANSWER, other, ANSWER]
    assert done.stderr.count("there is no question yet") == 2
    assert "the next line takes the place of: hello" in done.stderr
    assert "second keeps no prompt format: it is asked in dialogue" in done.stderr
    headings = [line.split()[0] for line in done.stderr.splitlines() if line.endswith("──")]
    assert headings == ["second", "talker", "second"]
    assert "there is no checkpoint folder nowhere" in done.stderr
    turns = json.loads(saved.read_text())[0]["conversations"]
    assert [turn["value"] for turn in turns] == ["bye", ANSWER, "and now", ANSWER, "alone", ANSWER]


def test_a_prompt_is_answered_by_both_models_which_a_single_process_compares(
    talker: Path, second: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--prompt", "hello", "--compare", second]
    assert chat(talker, *flags).stdout.splitlines() == [ANSWER, "the country"]
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    refused(chat(talker, *flags), "two models are compared by a single process")


def test_the_tokens_that_were_fed_and_written_are_shown_with_ids_and_probabilities(talker: Path) -> None:
    done = chat(talker, template="none", input="/tokens\nsay:\n/tokens\n")
    assert done.stdout == f"{ANSWER}\n"
    said, fed, written = re.split("the model was fed, with ids:|it wrote, with ids and probabilities:", done.stderr)
    assert "error: there is no answer yet" in said
    tokenizer = load_tokenizer(talker / "tokenizer.model")
    shown = [int(number) for number in re.findall(r"\((\d+)\)", fed)]
    assert shown == [tokenizer.bos_id, *tokenizer.encode("say:")]
    assert fed.split()[0] == f"<s>({tokenizer.bos_id})"
    ids = [int(number) for number in re.findall(r"\((\d+)\)\d+%", written)]
    assert (tokenizer.decode(ids[:-1]).strip(), ids[-1]) == (ANSWER, tokenizer.eos_id)
    assert written.split()[-1] == f"</s>({tokenizer.eos_id})100%"


def test_a_saved_conversation_is_data_to_train_on(talker: Path, tmp_path: Path) -> None:
    saved = tmp_path / "chat.json"
    talk = ["chat", "--ckpt", talker, "--template", "dialogue", "--temperature", "0"]
    assert invoke(*talk, input=f"hello\nand again\n/save {saved}\n").exit_code == 0
    kind = ["data.sources.0.format=dialogue", "data.sources.0.template=dialogue"]
    trained = complete(
        "finetune", "--recipe", "quickstart", "--pretrained", talker, "--data", saved, "--dry-run", "--no-timing", *kind
    )
    assert f"{ANSWER}\n###" in trained.stdout


def test_a_question_too_long_is_reported_and_the_conversation_goes_on_to_the_end_of_the_input(talker: Path) -> None:
    result = chat(talker, input="x" * 9000 + "\nhello")
    assert (result.exit_code, result.stdout) == (0, f"{ANSWER}\n")
    assert "the model's context is 4096" in result.stderr


def test_a_long_conversation_forgets_its_oldest_turns_and_says_so(talker: Path) -> None:
    result = chat(talker, template="dialogue", input=("q" * 1500 + "\n") * 4)
    assert (result.exit_code, result.stdout) == (0, f"{ANSWER}\n" * 4)
    assert "the conversation is long: forgot its 2 oldest turns" in result.stderr


# Where the output goes


def test_a_reader_who_has_seen_enough_ends_it_quietly(talker: Path) -> None:
    flags = ["--template", "none", "--temperature", "0", "--max-new-tokens", "100000"]
    with start("chat", "--ckpt", talker, *flags, "--prompt", "who?") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(5) == "the t"
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 0


@pytest.mark.parametrize("words", ["chat --ckpt TALKER --template none <&-", "recipes >&-"])
def test_a_closed_stream_is_no_traceback(talker: Path, words: str) -> None:
    command = f"{shlex.join(COMMAND)} {words.replace('TALKER', str(talker))}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, env=environment(), timeout=PATIENCE)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full device")
def test_a_full_disk_is_one_line_and_exit_code_1() -> None:
    with open("/dev/full", "w") as full, start("recipes", "show", "lima", stdout=full) as process:
        _, said = process.communicate()
    assert process.returncode == 1
    assert "error: No space left on device" in said
    assert "Traceback" not in said


def test_what_the_terminal_cannot_show_is_shown_as_its_code(single_turn: Path) -> None:
    done = run("convert-data", "alpaca", single_turn, "--preview", 1, PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert "### Response:\\u27e6the answer is 0" in done.stdout


# A Hugging Face tokenizer and its chat template


@pytest.fixture(scope="session")
def instruct_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ChatML tokenizer as Hugging Face lays it out, without a model."""
    folder = byte_level(tmp_path_factory.mktemp("instruct"), {"bos_token": START, "eos_token": END}).parent
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    return folder


def test_the_chat_template_of_a_hugging_face_folder_is_used_and_said(instruct_folder: Path) -> None:
    write_chain(instruct_folder, answer=ANSWER, after="\n")
    flags = ["--ckpt", instruct_folder, "--temperature", "0"]
    result = invoke("chat", *flags, "--prompt", "What is it?")
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{ANSWER}\n", "")
    spoken = invoke("chat", *flags, input="hello\n/system be brief\nand now?\n")
    assert (spoken.exit_code, spoken.stdout) == (0, f"{ANSWER}\n" * 2)
    assert spoken.stderr == "system: be brief\n"


@pytest.mark.parametrize(("eos", "end"), [("<|eot_id|>", END), (END, "<|eot_id|>")])
def test_special_tokens_never_leak_into_an_answer(instruct_folder: Path, tmp_path: Path, eos: str, end: str) -> None:
    folder = shutil.copytree(instruct_folder, tmp_path / "instruct")
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": START, "eos_token": eos}))
    write_chain(folder, answer=ANSWER, after="\n", end=load_tokenizer(folder).token_id(end))
    result = invoke("chat", "--ckpt", folder, "--prompt", "Where?", "--temperature", "0", "--max-new-tokens", "9")
    assert (result.exit_code, result.stdout) == (0, f"{ANSWER}\n")


def test_a_chat_template_that_fails_is_told_with_its_file(instruct_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(instruct_folder, tmp_path / "broken")
    write_chain(folder, answer=ANSWER, after="\n")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('only cats may ask') }}")
    refused(invoke("chat", "--ckpt", folder, "--prompt", "x"), str(folder / "chat_template.jinja"), "only cats may ask")
    (folder / "chat_template.jinja").write_text("{% for %}")
    refused(invoke("chat", "--ckpt", folder, "--prompt", "x"), "chat_template.jinja is not a chat template")
