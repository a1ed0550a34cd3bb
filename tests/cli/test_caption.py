"""`llama-acc caption`: every image gets its caption or its error, and what is printed can be used."""

import json
import re
from html import unescape
from pathlib import Path

import pytest

from tests.cli.commands import complete, invoke, run
from tests.cli.conftest import ANSWER
from tests.cli.terminal import Terminal
from tests.core.data.pictures import encoded, plain, write_pictures
from tests.core.data.test_tar_shards import samples, write_shard

# Of the model `seer`: it says ANSWER of every image, and after a text that ends with ":".


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of three pictures and a file that is none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    write_pictures(folder, 3)
    (folder / "captions.json").write_text("{}", encoding="utf-8")
    return folder


def test_the_caption_of_one_image_stands_alone_on_standard_output(seer: Path, photos: Path) -> None:
    result = invoke("caption", "--ckpt", seer, photos / "0000.png")
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{ANSWER}\n", "")


def test_many_images_are_a_table_in_their_order(seer: Path, photos: Path) -> None:
    long = photos / "a longer name.jpg"
    long.write_bytes(encoded(plain((9, 9, 9)), "JPEG"))
    result = invoke("caption", "--ckpt", seer, photos / "0002.png", photos / "0000.png", long)
    width = len(str(long))
    names = [photos / "0002.png", photos / "0000.png", long]
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == "".join(f"{name!s:<{width}}  {ANSWER}\n" for name in names)


def test_on_a_terminal_a_caption_stands_plain_beside_a_bold_name(seer: Path, photos: Path) -> None:
    first, second = photos / "0000.png", photos / "0001.png"
    with Terminal("caption", "--ckpt", seer, first, second, term="xterm") as terminal:
        assert terminal.end() == 0
        for name in (first, second):
            assert f"\x1b[1m{name}  \x1b[0m{ANSWER}\r\n" in terminal.seen


@pytest.mark.parametrize("kind", ["folder", "glob", "list"])
def test_folders_globs_and_lists_name_images(seer: Path, photos: Path, kind: str) -> None:
    words = {"folder": photos, "glob": photos / "*.p?g", "list": "-"}[kind]
    listed = f"{photos / '0000.png'}\n\n{photos / '0001.png'}\n{photos / '0002.png'}\n"
    result = complete("caption", "--ckpt", seer, words, "--json", input=listed if kind == "list" else None)
    assert [json.loads(line) for line in result.stdout.splitlines()] == [
        {"image": str(photos / f"000{i}.png"), "caption": ANSWER} for i in range(3)
    ]


def test_images_that_fail_do_not_stop_the_rest(seer: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(encoded(plain(0, size=(90, 90)), "JPEG")[:-200])
    words = [tmp_path / "no.png", photos / "captions.json", photos / "0001.png", broken, tmp_path / "empty"]
    words += [tmp_path / "*.gif"]
    result = invoke("caption", "--ckpt", seer, *words, photos / "0002.png")
    assert result.exit_code == 2
    assert [line.split()[-2:] for line in result.stdout.splitlines()] == [ANSWER.split()] * 2
    assert f"error: {tmp_path / 'no.png'}: was not found" in result.stderr
    assert f"error: {photos / 'captions.json'}: is not a picture of a known kind" in result.stderr
    assert f"error: {broken}: is broken" in result.stderr
    assert f"error: {tmp_path / 'empty'}: no images in this folder" in result.stderr
    assert f"error: {tmp_path / '*.gif'}: no file matches" in result.stderr
    assert "5 of 7 images failed" in result.stderr
    as_json = invoke("caption", "--ckpt", seer, *words, "--json")
    assert as_json.exit_code == 2
    lines = [json.loads(line) for line in as_json.stdout.splitlines()]
    assert ["caption" in line for line in lines] == [False, False, True, False, False, False]
    assert lines[0] == {"image": str(tmp_path / "no.png"), "error": "was not found"}
    for one, said in (
        ([tmp_path / "no.png"], f"error: {tmp_path / 'no.png'}: was not found"),
        ([photos / "0000.png", "--max-pixels", 1199], "has 40 x 30 pixels, more than 1,199"),
    ):
        result = invoke("caption", "--ckpt", seer, *one)
        assert (result.exit_code, result.stdout) == (2, "")
        assert said in result.stderr


def test_a_prompt_is_the_beginning_of_the_caption(seer: Path, photos: Path) -> None:
    one = invoke("caption", "--ckpt", seer, photos / "0000.png", "--prompt", "the name of the town: ")
    assert (one.exit_code, one.stdout) == (0, f"the name of the town: {ANSWER}\n")
    many = invoke("caption", "--ckpt", seer, photos, "--prompt", "the name:", "--json")
    assert {json.loads(line)["caption"] for line in many.stdout.splitlines()} == {f"the name: {ANSWER}"}


def test_an_instruction_is_put_in_the_models_format(seer: Path, photos: Path) -> None:
    # Alpaca's prompt ends with ":".
    result = invoke("caption", "--ckpt", seer, photos, "--template", "alpaca", "--instruction", "What?", "--json")
    assert [json.loads(line)["caption"] for line in result.stdout.splitlines()] == [ANSWER] * 3
    asked = invoke("caption", "--ckpt", seer, photos / "0000.png", "--template", "alpaca")
    assert (asked.exit_code, asked.stdout) == (0, f"{ANSWER}\n")
    assert "follows instructions (template alpaca): asking 'Describe the image.'" in asked.stderr


def test_shards_say_what_is_expected(seer: Path, tmp_path: Path) -> None:
    members = {**samples(3), "0001.txt": ANSWER}
    shard = write_shard(tmp_path / "a.tar", {**members, "0009.txt": "no picture"})
    result = invoke("caption", "--ckpt", seer, shard, "--json")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.exit_code == 2
    assert lines[1] == {"image": f"{shard}: item 2 (0001)", "caption": ANSWER, "expected": ANSWER}
    assert lines[3] == {"image": f"{shard}: item 4 (0009)", "error": "no picture beside 0009.txt"}
    assert "1 of 3 captions exactly as expected (33.3%)" in result.stderr


def test_a_page_shows_the_images_and_nothing_comes_from_elsewhere(
    seer: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile = photos / '"><script>alert(1)<script>.png'
    hostile.write_bytes(encoded(plain((1, 2, 3))))
    page = tmp_path / "sheet.html"
    result = invoke("caption", "--ckpt", seer, photos, tmp_path / "no.png", "--html", page)
    assert result.exit_code == 2
    assert result.stdout.count(ANSWER) == 4, "captions are printed besides"
    text = page.read_text(encoding="utf-8")
    assert text.count('<img src="data:image/jpeg;base64,') == 4
    assert text.count(f"<p>{ANSWER}</p>") == 4
    assert '<p class="wrong">was not found</p>' in text
    assert "<script" not in text
    assert hostile.name in unescape(text)
    assert not re.search(r"(src|href)=\"(?!data:image/jpeg;base64,)", text)
    assert "default-src 'none'; img-src data:" in text

    def broken(*arguments: object) -> bytes:
        raise RuntimeError("out of luck")

    monkeypatch.setattr("llama_acc.core.generate.caption.thumbnail", broken)
    assert invoke("caption", "--ckpt", seer, photos, "--html", page).exit_code == 1
    assert page.read_text(encoding="utf-8") == text, "whole or not at all"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "sheet.html"]


def test_several_processes_and_a_model_in_four_bits_say_the_same(seer: Path, photos: Path) -> None:
    done = run("caption", "--ckpt", seer, photos, photos / "no.png", "--json", "--device", "cpu", "--nproc", 2)
    assert done.returncode == 2, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line.get("caption") for line in lines] == [ANSWER] * 3 + [None]
    told = [line for line in done.stderr.splitlines() if not line.startswith("loading")]
    assert told == [f"error: {photos / 'no.png'}: was not found", "error: 1 of 4 images failed"]
    small = invoke("caption", "--ckpt", seer, photos, "--json", "--quant", "nf4", "--device", "cpu")
    assert [json.loads(line)["caption"] for line in small.stdout.splitlines()] == [ANSWER] * 3


def test_chat_takes_an_image(seer: Path, photos: Path, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    talk = f"/image\n/image {tmp_path}/no.png\n/image {photos}/0000.png\nwhat is it?\n/save {saved}\n"
    talk += f"/image {photos}/0001.png\nand this?\n/reset\nand now?\n"
    result = complete("chat", "--ckpt", seer, "--template", "alpaca", "--temperature", "0", input=talk)
    assert result.stdout == f"{ANSWER}\n" * 3
    assert "which picture? /image FILE" in result.stderr
    assert "no.png: was not found" in result.stderr
    assert "it takes the place of the picture before" in result.stderr
    (item,) = json.loads(saved.read_text(encoding="utf-8"))
    assert item["image"] == [str(photos / "0000.png")]


def test_pictures_of_a_dialogue_stay_in_view(seer: Path, photos: Path, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    talk = f"/image {photos}/0000.png\nwhat is it?\n/image {photos}/0001.png\nand this?\n/save {saved}\n"
    result = invoke("chat", "--ckpt", seer, "--template", "dialogue", "--temperature", "0", input=talk)
    assert (result.exit_code, result.stdout) == (0, f"{ANSWER}\n" * 2), result.stderr
    (item,) = json.loads(saved.read_text(encoding="utf-8"))
    assert item["image"] == [str(photos / "0000.png"), str(photos / "0001.png")]
    assert len(item["conversations"]) == 4


def test_one_question_about_an_image(seer: Path, photos: Path) -> None:
    flags = ["--template", "alpaca", "--temperature", "0", "--prompt", "What?", "--image", photos / "0000.png"]
    result = invoke("chat", "--ckpt", seer, *flags)
    assert (result.exit_code, result.stdout) == (0, f"{ANSWER}\n"), result.stderr
