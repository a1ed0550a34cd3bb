"""Addresses are understood as users write or copy them."""

import pytest

from llama_acc.core.download.address import Address, HubAddress, WebAddress, parse_address
from llama_acc.core.errors import UserError

LIMA = "64bits/lima_vicuna_format"


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("hf:owner/name", HubAddress("owner/name")),
        ("hf://owner/name", HubAddress("owner/name")),
        ("hf:owner/name@v1.0", HubAddress("owner/name", revision="v1.0")),
        ("hf:models/owner/name/", HubAddress("owner/name", "model")),
        (f"hf:datasets/{LIMA}", HubAddress(LIMA, "dataset")),
        ("hf:owner/name/a/b.json", HubAddress("owner/name", path="a/b.json")),
        ("hf:owner/name@main/a/*.json", HubAddress("owner/name", revision="main", path="a/*.json")),
        ("hf:owner/name@refs/convert/parquet/a", HubAddress("owner/name", revision="refs/convert/parquet", path="a")),
        # pages, as copied from a browser
        ("https://huggingface.co/owner/name", HubAddress("owner/name", "model")),
        ("https://huggingface.co/owner/name/tree/main", HubAddress("owner/name", "model")),
        ("https://huggingface.co/owner/name/tree/main/a/b", HubAddress("owner/name", "model", path="a/b")),
        ("https://huggingface.co/owner/name/blob/v1/a.pth", HubAddress("owner/name", "model", "v1", "a.pth")),
        ("https://hf.co/owner/name/resolve/main/a.pth?download=true", HubAddress("owner/name", "model", path="a.pth")),
        (
            f"https://huggingface.co/datasets/{LIMA}/tree/refs%2Fconvert%2Fparquet/default",
            HubAddress(LIMA, "dataset", "refs/convert/parquet", "default"),
        ),
        (f"https://huggingface.co/datasets/{LIMA}/raw/main/x.json", HubAddress(LIMA, "dataset", path="x.json")),
        (
            "https://github.com/o/n/blob/main/d/a.json",
            WebAddress("https://raw.githubusercontent.com/o/n/main/d/a.json"),
        ),
        ("https://example.org/a%20b.json?x=1", WebAddress("https://example.org/a%20b.json?x=1")),
    ],
)
def test_what_an_address_means(text: str, meant: Address) -> None:
    assert parse_address(text) == meant


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hf:owner", "is no address on Hugging Face"),
        ("hf:owner/name/../../secret", "leads out of its repository"),
        ("hf:owner/name with space", "is no address on Hugging Face"),
        ("ftp://example.org/a", "is no address that can be fetched"),
        ("file:///etc/passwd", "is no address that can be fetched"),
        ("https://", "names no host"),
        ("https://example.org/", "names no file"),
    ],
)
def test_what_is_none(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_address(text)


def test_a_plain_address_is_shown_without_what_is_secret_in_it() -> None:
    address = WebAddress("https://user:secret@example.org:8443/a.json?key=hush#part")
    assert str(address) == "https://example.org:8443/a.json"
    assert "secret" not in address.identity
    assert "hush" not in address.identity
    assert address.identity != WebAddress("https://user:secret@example.org:8443/a.json?key=other").identity
    assert address.file_name == "a.json"


def test_the_folder_that_everything_meant_lies_in() -> None:
    folders = {"": "", "a.json": "", "a/b/c.json": "a/b", "a/b/*.json": "a/b", "a/*/c.json": "a", "*/x/c": ""}
    assert {path: HubAddress("o/n", path=path).fixed_folder for path in folders} == folders
