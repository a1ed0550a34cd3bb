"""What a reader of Markdown sees of a cleaned page is what the page showed."""

import html
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from llama_acc.core.data.convert.markdown import html_to_markdown

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
    fenced = re.fullmatch(r"See:\n\n(`{3,})python\n(.*)\1\n\nEnd\.", html_to_markdown(page), re.DOTALL)
    assert fenced is not None, html_to_markdown(page)
    assert fenced[2] == (code if code.endswith("\n") else f"{code}\n")
    assert f"\n{fenced[1]}" not in f"\n{code}"


TABLE = "<table><thead><tr><th>a</th><th>b|c</th></tr></thead><tbody><tr><td>1</td><td>2</td></tr></tbody></table>"


@pytest.mark.parametrize(
    ("page", "text"),
    [
        (f"<p>x</p>{TABLE}", "x\n\n| a | b\\|c |\n| --- | --- |\n| 1 | 2 |"),
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
    assert html_to_markdown(f"<div>{page}</div>") == text


@given(
    st.lists(
        st.sampled_from([*"<>/&;\"'=` \n", "div", "p", "pre", "code", "li", "a href", "<!--", "x", "\ud800", "\0"])
    )
)
def test_nothing_that_looks_like_a_page_fails(pieces: list[str]) -> None:
    html_to_markdown(f"<div>{''.join(pieces)}</div>")


REPLY = (
    '<div class="markdown prose w-full break-words dark"><p>Use <strong>this</strong>, with <code>a &lt; b</code>:</p>'
    '<pre><div class="bg-black rounded-md"><div class="flex items-center"><span>python</span><button class="flex">Copy '
    'code</button></div><div class="p-4 overflow-y-auto"><code class="!whitespace-pre hljs language-python"><span '
    'class="hljs-keyword">def</span> <span>f</span>(x_1):\n    <span>return</span> x_1 * 2 &gt; 3\n</code></div></div>'
    '</pre><ol><li>One</li><li>Two</li></ol><p>snake_case &amp; <a href="https://a.b/c">more</a></p></div>'
)
CLEAN = (
    "Use **this**, with `a < b`:\n\n```python\ndef f(x_1):\n    return x_1 * 2 > 3\n```\n\n1. One\n2. Two\n\n"
    "snake_case & [more](https://a.b/c)"
)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (REPLY, CLEAN),
        ("2 / 2\n\n<p>a</p>\n<p>b<br>c</p>", "a\n\nb  \nc"),
        ("```pythonCopy code\nx = 1\n```", "```python\nx = 1\n```"),
        ("```\ncssCopy code\na {}\n```", "```css\na {}\n```"),
        ("an answer\nCopy3 chars / 1 words\n", "an answer\n\n"),
        ('<div class="whitespace-pre-wrap"><div>a<br>b &lt;p&gt;<br><br>c</div></div>', "a\nb <p>\n\nc"),
        (f'<div class="flex gap-4 whitespace-pre-wrap">{REPLY}</div>', CLEAN),
        ('<div class="min-h whitespace-pre-wrap">a\n  b &lt;c&gt;\n\nd</div>', "a\n  b <c>\n\nd"),
        # Text that is not HTML as a whole stays.
        *(
            (text, text)
            for text in (
                "#include <stdio.h>\nint main() { return a < b; }",
                "What does <b>bold</b> mean in HTML?",
                "```html\n<div>x</div>\n```",
                "<T> void f(T x) // a </T>",
                "a List<String> x <= 3 and <y>",
                "it is 3 / 4 of them",
                "",
            )
        ),
    ],
)
def test_a_web_page_becomes_markdown_and_text_stays(text: str, clean: str) -> None:
    assert html_to_markdown(text) == clean


@pytest.mark.parametrize(
    ("page", "shown"),
    [
        ("<p>one<br><br>two</p>", "<p>one</p><p>two</p>"),
        ("<p>one<br/>\n<br /><br>two<br><br></p>", "<p>one</p><p>two</p>"),
        ("<p>one<span><br></span><br>two</p>", "<p>one</p><p>two</p>"),
        ("<p>one<br>or<br>two</p>", "<p>one<br />or<br />two</p>"),
        ("<ul><li>one<br><br>two</li></ul>", "<ul><li><p>one</p><p>two</p></li></ul>"),
        ("<blockquote><p>one<br><br>two</p></blockquote>", "<blockquote><p>one</p><p>two</p></blockquote>"),
        ("<p>so <b>one<br><br>two</b></p>", "<p>so <strong>one</strong></p><p><strong>two</strong></p>"),
        ("<pre><code>one<br><br>two</code></pre>", "<pre><code>one two </code></pre>"),
        ("<p>x<sup>2</sup> and H<sub>2</sub>O</p>", "<p>x<sup>2</sup> and H<sub>2</sub>O</p>"),
        ("<p>a<svg><title>icon</title></svg></p>", "<p>a</p>"),
        ('<pre class="lang-py"><code>x</code></pre>', '<pre><code class="language-py">x </code></pre>'),
        ('<div class="highlight-source-c"><pre>x</pre></div>', '<pre><code class="language-c">x </code></pre>'),
        ('<pre><code data-lang="go">x</code></pre>', '<pre><code class="language-go">x </code></pre>'),
    ],
)
def test_a_reader_of_the_markdown_sees_what_the_page_showed(page: str, shown: str) -> None:
    markdown = html_to_markdown(page)
    rendered = MarkdownIt("commonmark", {"html": True}).render(markdown)
    assert re.sub(r"\s+", " ", rendered).replace("> <", "><").replace("/> ", "/>").strip() == shown
    assert not re.search(r"^[ >]*\\$", markdown, re.MULTILINE), markdown


_MATHML = "<math{0}><semantics><mrow><mi>x</mi><mo>&lt;</mo><mn>2</mn></mrow>{1}</semantics></math>"
_NOTE = '<annotation encoding="application/x-tex">x_1 &lt; \\frac{1}{2}</annotation>'
_TEX = r"x_1 < \frac{1}{2}"
_KATEX = (
    f'<span class="katex"><span class="katex-mathml">{_MATHML.format("", _NOTE)}</span><span class="katex-html" '
    'aria-hidden="true"><span class="base"><span class="mord">x</span><span>&lt;2</span></span></span></span>'
)
_MATHJAX = '<span class="MathJax_Preview">x</span><span class="MathJax"><nobr>x&lt;2</nobr></span>'
_SPOKEN = f"<mjx-assistive-mml>{_MATHML.format('', '')}</mjx-assistive-mml>"


@pytest.mark.parametrize(
    ("formula", "text"),
    [
        (_KATEX, f"a ${_TEX}$ b"),
        (f'<span class="math math-inline">{_KATEX}</span>', f"a ${_TEX}$ b"),
        (f'<span class="katex-display">{_KATEX}</span>', f"a\n\n$${_TEX}$$\n\nb"),
        (f'<div class="math math-display"><span class="katex-display">{_KATEX}</span></div>', f"a\n\n$${_TEX}$$\n\nb"),
        (f'{_MATHJAX}<script type="math/tex">x_1 < \\frac{{1}}{{2}}</script>', f"a ${_TEX}$ b"),
        (f'{_MATHJAX}<script type="math/tex; mode=display">x_1</script>', "a\n\n$$x_1$$\n\nb"),
        (
            f'<mjx-container class="MathJax"><mjx-math data-latex="x_1">x</mjx-math>{_SPOKEN}</mjx-container>',
            "a $x_1$ b",
        ),
        (f'<mjx-container class="MathJax"><mjx-math>x</mjx-math>{_SPOKEN}</mjx-container>', "a x<2 b"),
        (_MATHML.format(' alttext="{\\displaystyle x_1}"', ""), "a $x_1$ b"),
        (
            f'<span class="mwe-math-element">{_MATHML.format("", _NOTE)}<img src="x.svg" alt="x"></span>',
            f"a ${_TEX}$ b",
        ),
        (_MATHML.format("", ""), "a x<2 b"),
    ],
)
def test_a_formula_is_its_tex_once(formula: str, text: str) -> None:
    assert html_to_markdown(f"<div>a {formula} b</div>") == text
