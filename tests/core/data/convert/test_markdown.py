"""What a reader of Markdown sees of a cleaned page is what the page showed."""

import html
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from llama_acc.core.data.convert.markdown import cleaned

# As the page of 2023 had them. The button's picture is longer there.
_HEADS = (
    '<pre><div class="bg-black"><div class="flex items-center"><span class="">{0}</span><button class="flex"><svg '
    'height="1em"><path d="M16 4h2"></path></svg>Copy code</button></div><div class="p-4"><code class="!whitespace-pre '
    'hljs language-{0}">',
    '<pre class="x"><div><div>{0}<button>Copy code</button></div><div><code class="language-{0}">',
    '<pre><code class="hljs language-{0}">',
)
_ENDS = ("</code></div></div></pre>", "</code></div></div></pre>", "</code></pre>")
# A page has its lines end in LF, and no NUL; in front of a fence, four spaces would be a block of their own.
_CODE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0")).filter(str.strip)


@given(_CODE, st.sampled_from(range(len(_HEADS))), st.data())
def test_code_keeps_every_character(code: str, head: int, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(code)), max_size=6)))
    pieces = [code[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(code)], strict=True)]
    coloured = "".join(
        f'<span class="hljs-string">{html.escape(piece)}</span>' if number % 2 else html.escape(piece)
        for number, piece in enumerate(pieces)
    )
    page = f"<div><p>See:</p>{_HEADS[head].format('python')}{coloured}{_ENDS[head]}<p>End.</p></div>"
    fenced = re.fullmatch(r"See:\n\n(`{3,})python\n(.*)\1\n\nEnd\.", cleaned(page), re.DOTALL)
    assert fenced is not None, cleaned(page)
    assert fenced[2] == (code if code.endswith("\n") else f"{code}\n")
    assert f"\n{fenced[1]}" not in f"\n{code}"


_WORDS = st.lists(st.sampled_from(["a", "Bee", "x1", "über", "数据", "😀", "4,5", "so."]), min_size=1, max_size=4).map(
    " ".join
)


def _tagged(name: str, content: st.SearchStrategy[str], end: str | None = None) -> st.SearchStrategy[str]:
    return content.map(lambda text: f"<{name}>{text}</{end or name}>")


_PIECE = st.one_of(
    _WORDS,
    _tagged("strong", _WORDS),
    _tagged("em", _WORDS),
    _tagged("code", st.sampled_from(["f(x_1)", "a &lt; b", "**p", "`", "&amp;amp;"])),
    _tagged('a href="https://a.b/c?d=e&amp;f=1"', _WORDS, "a"),
)
_LINE = st.lists(_PIECE, min_size=1, max_size=4).map(" ".join)
_ITEMS = st.deferred(
    lambda: st.lists(
        _tagged("li", st.tuples(_LINE, st.one_of(st.just(""), _LIST)).map("".join)), min_size=1, max_size=3
    )
)
_LIST = st.one_of(_tagged("ul", _ITEMS.map("".join)), _tagged("ol", _ITEMS.map("".join)))
_BLOCK = st.one_of(
    _tagged("p", _LINE),
    _tagged("p", st.tuples(_LINE, _LINE).map("<br>".join)),
    _tagged("blockquote", _tagged("p", _LINE)),
    _tagged("h3", _LINE),
    _tagged('pre><code class="language-js"', st.sampled_from(["x = 1;\n", "if (a &lt; b)\n\n  c()\n"]), "code></pre"),
    _LIST,
    st.just("<hr>"),
)
_TABLE = "<table><thead><tr><th>a</th><th>b|c</th></tr></thead><tbody><tr><td>1</td><td>2</td></tr></tbody></table>"


def _rendered(markdown: str) -> str:
    return MarkdownIt("commonmark").enable("table").render(markdown)


def _compact(page: str) -> str:
    """HTML of which only what is seen is left: white space between tags is not, outside of code."""
    page = page.replace("<br />", "<br>").replace("<hr />", "<hr>").replace("&quot;", '"')
    parts = re.split(r"(<pre>.*?</pre>)", page, flags=re.DOTALL)
    return "".join(part if number % 2 else re.sub(r"\s*\n\s*", "", part) for number, part in enumerate(parts))


@given(st.lists(_BLOCK, min_size=1, max_size=5))
def test_a_reader_of_markdown_sees_the_page(blocks: list[str]) -> None:
    page = f'<div class="markdown prose w-full break-words dark"><p>Hello.</p>{"".join(blocks)}<p>Bye.</p></div>'
    assert _compact(_rendered(cleaned(page))) == f"<p>Hello.</p>{''.join(blocks)}<p>Bye.</p>"


@pytest.mark.parametrize("head", range(len(_HEADS)))
def test_code_stays_in_its_place_of_a_list(head: int) -> None:
    code = f"{_HEADS[head].format('c++')}x\n\n  y\n{_ENDS[head]}"
    page = f"<div><ol><li><p>a</p>{code}<p>b</p></li><li><p>c</p></li></ol><p>d</p></div>"
    assert cleaned(page) == "1. a\n\n   ```c++\n   x\n   \n     y\n   ```\n\n   b\n\n2. c\n\nd"


@pytest.mark.parametrize(
    ("page", "text"),
    [
        (f"<p>x</p>{_TABLE}", "x\n\n| a | b\\|c |\n| --- | --- |\n| 1 | 2 |"),
        ("<p>Of &amp;lt; and $x_1^{2*3}$, *, _, [0] and #.</p>", "Of &lt; and $x_1^{2*3}$, *, _, [0] and #."),
        ("<p>a</p><script>f()</script><style>p {}</style>", "a"),
        (
            "<ol start='3'><li>c</li><li><p>d</p><pre><code>x\n</code></pre></li></ol>",
            "3. c\n4. d\n   ```\n   x\n   ```",
        ),
        ("<div>" * 5000 + "text" + "</div>" * 5000, "text"),
        ("<p>a<p>b</div></li></p>", "a\n\nb"),
    ],
)
def test_a_page_of_any_kind_is_read_as_a_browser_reads_it(page: str, text: str) -> None:
    assert cleaned(f"<div>{page}</div>") == text


@given(
    st.lists(
        st.sampled_from([*"<>/&;\"'=` \n", "div", "p", "pre", "code", "li", "a href", "<!--", "x", "\ud800", "\0"])
    )
)
def test_nothing_that_looks_like_a_page_fails(pieces: list[str]) -> None:
    cleaned(f"<div>{''.join(pieces)}</div>")
