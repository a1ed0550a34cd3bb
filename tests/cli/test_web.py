"""`chat --web` and `runs --web` in a real browser: what a person sees, types and clicks."""

import json
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
from PIL import Image

from llama_acc.cli import web
from llama_acc.core.generate.engine import Engine
from llama_acc.core.generate.load import load_model
from llama_acc.core.generate.sampling import Sampling
from llama_acc.core.generate.service import Service
from tests.cli.chains import write_chain
from tests.cli.commands import PATIENCE, complete, invoke, refused, start
from tests.cli.conftest import ANSWER

pytest.importorskip("gradio", reason="the extra web brings it")

OTHER = "the name"


_NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER_PATIENCE = 60_000  # milliseconds; only a test that has failed waits so long


@contextmanager
def browsing() -> Iterator[Any]:
    """A browser's context: the tabs of one person. Skips where there is no browser."""
    api = pytest.importorskip("playwright.sync_api", reason="the extra dev brings it")
    program = next(filter(None, map(shutil.which, _NAMES)), None)
    if program is None:
        pytest.skip("there is no browser: apt-get install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        context = browser.new_context(accept_downloads=True)
        context.set_default_timeout(BROWSER_PATIENCE)
        api.expect.set_options(timeout=BROWSER_PATIENCE)
        asked_elsewhere: list[str] = []

        def own_host_only(route: Any) -> None:
            if route.request.url.startswith("http://127.0.0.1:"):
                route.continue_()
            else:
                asked_elsewhere.append(route.request.url)
                route.abort()

        context.route("**/*", own_host_only)
        yield context
        browser.close()
        assert not asked_elsewhere


@contextmanager
def served(page: Any) -> Iterator[str]:
    """The address of a page."""
    import uvicorn

    from llama_acc.core.web.site import make_app

    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(make_app(page), log_level="error"))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    finally:
        server.should_exit = server.force_exit = True
        thread.join()


@pytest.fixture(scope="module")
def person() -> Iterator[Any]:
    with browsing() as context:
        yield context


class _Gated(Engine):
    """Makes as many steps as it may."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.gate = threading.Semaphore(0)

    def step(self) -> Any:
        self.gate.acquire()
        return super().step()


@pytest.fixture(scope="module")
def other(talker: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says OTHER where the talker says ANSWER."""
    folder = tmp_path_factory.mktemp("other")
    return write_chain(folder, talker / "tokenizer.model", answer=f" {OTHER}", after=":")


@pytest.fixture
def chats() -> Iterator[Any]:
    """Serves the chat page of checkpoints, in a prompt format; gives its address and engines."""
    from llama_acc.core.web.chat_page import ChatPage, Served

    with ExitStack() as stack:

        def serve(
            *folders: Path, template: str = "dialogue", engine: type[Engine] = Engine
        ) -> tuple[str, list[Engine]]:
            models = []
            for folder in folders:
                loaded = load_model(folder, device="cpu", template=template)
                service = stack.enter_context(Service(engine(loaded, slots=2)).running())
                if engine is _Gated:  # it is closed between two steps
                    stack.callback(service.engine.gate.release, 10**6)
                models.append(Served(folder.name, loaded, service))
            page = ChatPage(models, Sampling(temperature=0, max_new_tokens=200)).blocks
            return stack.enter_context(served(page)), [model.service.engine for model in models]

        yield serve


def open_page(person: Any, address: str) -> Any:
    tab = person.new_page()
    tab.goto(address)
    tab.locator("#question textarea").wait_for()
    return tab


def ask(tab: Any, question: str) -> None:
    tab.locator("#question textarea").fill(question)
    tab.locator("#question textarea").press("Enter")


def expect(locator: Any) -> Any:
    from playwright.sync_api import expect

    return expect(locator)


def answered(tab: Any, *answers: str) -> None:
    """Waits until these are the answers to be seen, and another question can be asked."""
    expect(tab.locator(".bot.message")).to_have_text(list(answers))
    expect(tab.locator("#question .submit-button")).to_be_visible()


@contextmanager
def answering(tab: Any, engine: Any) -> Iterator[None]:
    """Waits until what is clicked within is being answered, then lets it: the page may look the same before."""
    while engine.gate.acquire(blocking=False):
        pass
    yield
    expect(tab.locator("#question .stop-button")).to_be_visible()
    engine.gate.release(400)


def saved(tab: Any, folder: Path) -> Any:
    """The items of the data file that is downloaded as `data.json`."""
    with tab.expect_download() as saving:
        tab.get_by_role("button", name="Save as data file").click()
    saving.value.save_as(folder / "data.json")
    return json.loads((folder / "data.json").read_text(encoding="utf-8"))


def test_what_is_said_is_markdown_without_markup_and_its_tokens_are_shown(
    person: Any, chats: Any, talker: Path
) -> None:
    """No page elsewhere is asked for a picture, and nothing in the text acts on the page."""
    address, _ = chats(talker)
    tab = open_page(person, address)
    question = "**bold** `a<b` <b>tag</b> ![x](http://elsewhere.example/x.png) ${alert(1)} {{this}}"
    ask(tab, question)
    answered(tab, ANSWER)
    asked = tab.locator(".user.message")
    assert asked.locator("strong").inner_text() == "bold"
    assert asked.locator("code").inner_text() == "a<b"
    assert "<b>tag</b>" in asked.inner_text()
    tab.get_by_role("button", name="Tokens").click()
    assert question in "".join(tab.locator(".tokens .fed").all_inner_texts())
    said = tab.locator(".tokens .reply")
    assert "".join(said.all_inner_texts()).strip() == ANSWER
    assert re.match(r"\d+\.\d%  '▁a', id \d+\n\n *\d+\.\d%  '▁a'\n", said.first.get_attribute("title"))
    assert tab.locator(".tokens .special").first.inner_text() == "<s>"
    tab.close()


def test_a_picture_is_uploaded_and_asked_about(person: Any, chats: Any, seer: Path, tmp_path: Path) -> None:
    address, _ = chats(seer, template="caption")
    Image.new("RGB", (20, 10), "red").save(tmp_path / "red.png")
    tab = open_page(person, address)
    with tab.expect_file_chooser() as choosing:
        tab.get_by_label("Upload a file").click()
    choosing.value.set_files(tmp_path / "red.png")
    tab.locator("#question img").wait_for()
    ask(tab, "")
    answered(tab, ANSWER)
    shown = tab.locator(".user-row img")
    expect(shown).to_have_js_property("naturalWidth", 20)
    expect(tab.get_by_label("Share")).not_to_be_visible()
    tab.get_by_label("Edit").click()
    tab.locator("textarea.edit-textarea").fill("say:")
    tab.get_by_label("Submit").first.click()
    expect(tab.locator(".user-row .message-content")).to_have_text("say:")
    answered(tab, ANSWER)
    expect(shown).to_have_count(1)
    [item] = saved(tab, tmp_path)
    assert item["conversations"][0]["value"] == "say:"
    [kept] = item["image"]
    assert Path(kept).read_bytes() == (tmp_path / "red.png").read_bytes()
    tab.close()


def test_a_question_that_is_refused_stays_in_the_box(person: Any, chats: Any, talker: Path) -> None:
    address, _ = chats(talker)
    tab = open_page(person, address)
    ask(tab, "the " * 5000)
    expect(tab.get_by_text("the model's context is 4096")).to_be_visible()
    assert len(tab.locator("#question textarea").input_value()) == 20_000
    assert tab.locator(".message").count() == 0
    tab.close()


def test_an_answer_ends_with_the_tab_that_it_was_for(person: Any, chats: Any, talker: Path) -> None:
    address, [engine] = chats(talker, template="none", engine=_Gated)
    tab = open_page(person, address)
    ask(tab, "who?")
    engine.gate.release(3)
    expect(tab.locator(".bot.message")).to_have_text("the the the")
    [reply] = engine.running
    tab.close()
    while not reply.ended:  # it would after 200 tokens, by its length
        engine.gate.release()
        time.sleep(0.05)
    assert reply.finish_reason == "cancelled"


def test_an_answer_streams_in_and_stops_where_it_is_stopped(person: Any, chats: Any, talker: Path) -> None:
    address, [engine] = chats(talker, template="none", engine=_Gated)
    tab = open_page(person, address)
    ask(tab, "who?")
    engine.gate.release(5)  # one for the prompt gives the first of five words
    answered_so_far = tab.locator(".bot.message")
    expect(answered_so_far).to_have_text("the the the the the")
    assert len(engine.running) == 1
    with tab.expect_response(lambda response: response.request.method == "POST"):
        tab.locator("#question .stop-button").click()
    engine.gate.release(400)
    expect(tab.locator("#question .submit-button")).to_be_visible()
    assert 5 <= answered_so_far.inner_text().count("the") <= 6
    ask(tab, "say:")
    answered(tab, answered_so_far.first.inner_text(), ANSWER)
    assert not engine.running
    tab.close()


def test_two_models_answer_side_by_side_and_another_tab_has_its_own_conversation(
    person: Any, chats: Any, talker: Path, other: Path
) -> None:
    address, _ = chats(talker, other)
    tab, second = open_page(person, address), open_page(person, address)
    ask(tab, "what is it?")
    answered(tab, ANSWER, OTHER)
    assert second.locator(".message").count() == 0
    ask(second, "and here?")
    answered(second, ANSWER, OTHER)
    ask(tab, "once more")
    answered(tab, ANSWER, ANSWER, OTHER, OTHER)
    expect(tab.locator(".user.message")).to_have_text(["what is it?", "once more"] * 2)
    second.reload()
    expect(second.locator(".message")).to_have_count(0)
    tab.close()
    second.close()


def test_a_question_is_edited_an_answer_retried_and_the_conversation_saved_as_data(
    person: Any, chats: Any, talker: Path, tmp_path: Path
) -> None:
    address, [engine] = chats(talker, engine=_Gated)
    tab = open_page(person, address)
    tab.get_by_role("button", name="Settings").click()
    for question in ("first", "second"):
        with answering(tab, engine):
            ask(tab, question)
        expect(tab.locator("#question .submit-button")).to_be_visible()
    tab.get_by_label("System text").fill("Be brief.")  # once the page has settled
    with answering(tab, engine):
        tab.get_by_label("Retry").click()
    answered(tab, ANSWER, ANSWER)
    tab.get_by_label("Edit").first.click()
    tab.locator(".user.message textarea, textarea.edit-textarea").first.fill("another <b>one</b>")
    with answering(tab, engine):
        tab.get_by_label("Submit").first.click()
    answered(tab, ANSWER)
    expect(tab.locator(".user.message")).to_have_text(["another <b>one</b>"])
    turns = [{"from": "human", "value": "another <b>one</b>"}, {"from": "gpt", "value": ANSWER}]
    assert saved(tab, tmp_path) == [{"system": "Be brief.", "conversations": turns}]
    complete("convert-data", "check", tmp_path / "data.json")
    tab.get_by_role("button", name="New conversation").click()
    expect(tab.locator(".message")).to_have_count(0)
    tab.close()


def test_the_address_is_told_when_it_can_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    import gradio
    import uvicorn

    listener, told = web.listen("127.0.0.1", 0), list[str]()

    def note(text: str) -> None:
        socket.create_connection(listener.getsockname(), timeout=PATIENCE).close()  # is refused by who does not listen
        told.append(text)

    monkeypatch.setattr(web.console, "note", note)
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: sockets[0].close())
    web.serve_page(listener, lambda: gradio.Blocks(analytics_enabled=False))
    assert "in a browser" in told[0]


@contextmanager
def command(*words: object) -> Iterator[str]:
    """The address of a page that a command serves until Ctrl-C."""
    process = start(*words, "--web", "--port", 0)
    assert process.stderr is not None
    try:
        said = iter(process.stderr.readline, "")
        yield next(found[1] for line in said if (found := re.search(r"open (http://\S+) in a browser", line)))
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=PATIENCE)
        assert process.returncode == 130, rest
    finally:
        process.kill()


def test_chat_serves_the_page_to_this_machine_alone(person: Any, talker: Path, other: Path) -> None:
    chat = ("chat", "--ckpt", talker, "--device", "cpu")
    refused(invoke(*chat, "--web", "--host", "0.0.0.0"), "has no password", "ssh -L")
    refused(invoke(*chat, "--web", "--prompt", "hello"), "--web goes without --prompt")
    with command(*chat, "--template", "dialogue", "--compare", other, "--temperature", 0) as address:
        tab = open_page(person, address)
        ask(tab, "what is it?")
        answered(tab, ANSWER, OTHER)
        for header, value, status in (
            ("Host", "elsewhere.example", 403),
            ("Origin", "http://elsewhere.example", 403),
            ("Host", urlsplit(address).netloc, 200),
        ):
            assert httpx2.get(address, headers={header: value}).status_code == status
        tab.close()


def test_runs_are_shown_over_each_other_and_followed(person: Any, trained_once: Path, tmp_path: Path) -> None:
    for name, rate in (("one", "0.001"), ("two", "0.002")):
        folder = shutil.copytree(trained_once, tmp_path / name)
        recipe = (folder / "recipe.yaml").read_text(encoding="utf-8")
        (folder / "recipe.yaml").write_text(re.sub(r"\blr: .*", f"lr: {rate}", recipe), encoding="utf-8")
    samples = tmp_path / "two" / "samples.jsonl"
    samples.write_text(json.dumps({"step": 2, "prompt": "who?", "answer": "<i>{{me}}</i>"}) + "\n", encoding="utf-8")
    refused(invoke("runs", tmp_path / "one", tmp_path / "nowhere", "--web"), "there is no folder")
    with command("runs", tmp_path / "one", tmp_path / "two") as address:
        tab = person.new_page()
        tab.goto(address)
        expect(tab.locator(".curve canvas, .curve svg.marks")).to_have_count(6)
        expect(tab.locator(".sheet tr").filter(has_text="4/4")).to_have_count(2)
        tab.get_by_role("tab", name="Recipes").click()
        expect(tab.locator(".sheet").last.locator("td")).to_have_text(["optimizer.lr", "0.001", "0.002"])
        tab.get_by_role("tab", name="Sample answers").click()
        expect(tab.get_by_text("<i>{{me}}</i>", exact=True)).to_be_visible()
        with samples.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": 4, "prompt": "who?", "answer": "another"}) + "\n")
        expect(tab.get_by_text("another", exact=True)).to_be_visible()
        tab.get_by_label("one", exact=True).click()
        expect(tab.locator(".sheet tr").filter(has_text="4/4")).to_have_count(1)
        tab.close()


def test_a_curve_is_thinned_out_and_keeps_its_mean() -> None:
    from llama_acc.core.web.run_page import curve

    lines = [{"step": step, "loss": float(step)} for step in range(1, 1001)] + [{"step": 1001, "loss": float("nan")}]
    thin = curve({"run": lines, "other": lines[:2], "empty": []}, "loss")
    of_run = thin[thin["run"] == "run"]
    assert len(of_run) == 334
    assert list(of_run["loss"][:2]) == [2.0, 5.0]
    assert list(of_run["step"])[-1] == 1000
    assert list(thin[thin["run"] == "other"]["loss"]) == [1.0, 2.0]
