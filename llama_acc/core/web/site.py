"""What all pages have in common: how they look, who may open them, and that a browser loads nothing from elsewhere."""

import html
import os

from llama_acc.core.input_files import home

# Gradio reads them when it is imported, or when a page is made. What is uploaded stays: data files name it.
os.environ["GRADIO_ANALYTICS_ENABLED"] = os.environ["GRADIO_SHARE"] = "False"
os.environ["GRADIO_TEMP_DIR"] = str(home() / "uploads")

import gradio as gr
from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama_acc.core.serve.guard import Access, Guard
from llama_acc.core.text import escape_control_chars

# The browser itself refuses whatever a model writes of other hosts, such as an image's address.
_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
    "frame-ancestors 'none'; form-action 'self'; base-uri 'self'"
)
_LARGEST_UPLOAD = 64 << 20  # bytes
_FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
_CSS = """
.tokens { font-family: var(--font-mono); font-size: var(--text-sm); line-height: 1.7; white-space: pre-wrap;
  overflow-wrap: anywhere; max-height: 22rem; overflow-y: auto; }
.tokens span { cursor: default; border-radius: 3px; }
.tokens .fed { color: var(--body-text-color-subdued); }
.tokens .special { color: #a626a4; font-weight: 700; }
.tokens .reply { color: #1a7f37; background: color-mix(in srgb, #d1242f calc((1 - var(--p, 1)) * 40%), transparent); }
.tokens span:hover { outline: 1px solid currentColor; }
.dark .tokens .special { color: #e38ce3; }
.dark .tokens .reply { color: #6fdd8b; }
.sheet.sheet, .sheet tr { width: 100%; border: 0; border-collapse: collapse; }
.sheet.sheet :is(td, th) { border: 0; border-bottom: 1px solid var(--border-color-primary); padding: .4rem .6rem;
  text-align: left; vertical-align: top; white-space: pre-wrap; overflow-wrap: break-word; }
.scrolled { overflow-x: auto; }
/* Pictures have a button that shares them with everybody, where Gradio runs on Hugging Face's machines. */
.message-buttons-right .icon-button-wrapper > .download-link + button { display: none; }
"""


def make_app(page: gr.Blocks) -> FastAPI:
    """A page, made with `analytics_enabled=False`, as an application that a browser may call localhost."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    theme = gr.themes.Default(primary_hue="teal", secondary_hue="teal", neutral_hue="slate", **_FONTS)
    off = {"run_history": False, "ssr_mode": False, "pwa": False, "mcp_server": False, "enable_monitoring": False}
    app = gr.mount_gradio_app(
        app, page, "/", footer_links=[], theme=theme, css=_CSS, max_file_size=_LARGEST_UPLOAD, **off
    )
    access = Access(media_types=("application/json", "multipart/form-data"))
    app.add_middleware(Guard, access=access, done=lambda path, status: None)
    app.add_middleware(_WithPolicy)
    return app


class _WithPolicy:
    """Adds the policy to all responses."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = _POLICY
            await send(message)

        await self._app(scope, receive, with_policy)


def in_html(text: str) -> str:
    """Text for a page's source, in which nothing acts."""
    return html.escape(escape_control_chars(text))
