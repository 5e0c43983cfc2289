"""The search page: Gradio on 127.0.0.1 alone, which serves no file of this machine."""

import os
from collections.abc import Callable
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from clipsmall.search import results
from clipsmall.search.searcher import Answer, Searcher

# pictures on a page: 2 MB
MOST = 200
CSS = """
.gradio-container { width: 100%; max-width: 84rem !important; margin: 0 auto !important; }
#head h1 { font-size: 1.5rem; font-weight: 650; line-height: 1.25; overflow-wrap: anywhere; margin:
#.5rem 0 0; } head p { opacity: .7; margin: .15rem 0 0; }
#head .html-container, #answer .html-container { padding: 0 !important; }
"""
# on a phone the answer lies below the query
SHOW = "() => { if (innerWidth < 700) document.querySelector('#answer').scrollIntoView({behavior: 'smooth'}); }"
HINT = "Type a text and press Enter, or drop a picture."


def require_gradio() -> None:
    """Raises ValueError where it is not installed."""
    if find_spec("gradio") is None:
        raise ValueError("the search page needs Gradio: pip install 'clipsmall[demo]'")


def answered(ask: Callable[[], Answer], images: int) -> str:
    """What stands on the page: the answer, or what was wrong with the query."""
    try:
        return results.html(ask(), images)
    except ValueError as error:
        return results.note(f"{error}")


def build(searcher: Searcher, data: str, model: str, k: int) -> Any:
    """The page as `gradio.Blocks`: a text or a picture, k, and the answer."""
    # read on import: nothing leaves this machine
    for asked in (
        "GRADIO_ANALYTICS_ENABLED",
        "GRADIO_RUN_HISTORY",
    ):
        os.environ.setdefault(asked, "False")
    import gradio as gr

    def text_answer(text: str, k: int) -> tuple[str, None]:
        return answered(lambda: searcher.by_text(text, int(k)), searcher.images), None

    def image_answer(image: str | None, k: int) -> tuple[str, str]:
        if image is None:
            return results.note(HINT), ""
        return answered(
            lambda: searcher.by_image(Path(image).read_bytes(), int(k)), searcher.images
        ), ""

    def again(text: str, image: str | None, k: int) -> str:
        if not image and not text.strip():
            return results.note(HINT)
        return image_answer(image, k)[0] if image else text_answer(text, k)[0]

    left_out = f", {searcher.found.broken:,} unreadable" if searcher.found.broken else ""
    facts = f"{searcher.images:,} images{left_out} · {searcher.captions:,} captions · searched with {escape(model)}"
    with gr.Blocks(
        title=f"Search {data}", analytics_enabled=False, delete_cache=(600, 3600)
    ) as page:
        gr.HTML(f"<h1>{escape(data)}</h1><p>{facts}</p>", elem_id="head")
        with gr.Row():
            with gr.Column(scale=1, min_width=260, elem_id="query"):
                text = gr.Textbox(
                    label="Text",
                    placeholder="what should be in the picture",
                    submit_btn=True,
                    max_lines=3,
                    autofocus=True,
                )
                image = gr.Image(
                    label="or a picture",
                    type="filepath",
                    image_mode=None,
                    sources=["upload", "clipboard"],
                    height=180,
                )
                many = gr.Slider(
                    1, max(2, min(max(MOST, k), searcher.images)), value=k, step=1, label="How many"
                )
                picked = gr.Dataset(
                    components=[text],
                    samples=[[each] for each in searcher.examples()],
                    label="For example",
                    type="values",
                )
            with gr.Column(scale=3, min_width=320):
                answer = gr.HTML(results.note(HINT), elem_id="answer")
        quiet: dict[str, Any] = {
            "concurrency_id": "search",
            "api_visibility": "private",
            "show_progress": "hidden",
        }
        text.submit(text_answer, [text, many], [answer, image], **quiet).then(js=SHOW)
        image.input(image_answer, [image, many], [answer, text], **quiet).then(js=SHOW)
        many.input(again, [text, image, many], answer, trigger_mode="always_last", **quiet)
        chosen = picked.click(lambda sample: sample[0], picked, text, **quiet)
        chosen.then(text_answer, [text, many], [answer, image], **quiet).then(js=SHOW)
    return page


def launch(page: Any, port: int) -> str:
    """Start to serve on 127.0.0.1; returns the address.

    Raises:
        ValueError: the port is taken.
    """
    import gradio as gr

    theme = gr.themes.Default(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    try:
        _, address, _ = page.launch(
            server_name="127.0.0.1",
            server_port=port,
            share=False,
            allowed_paths=[],
            max_file_size="50mb",
            enable_monitoring=False,
            ssr_mode=False,
            footer_links=[],
            quiet=True,
            prevent_thread_lock=True,
            theme=theme,
            css=results.CSS + CSS,
        )
    except (OSError, OverflowError):
        raise ValueError(f"--port={port}: taken, or not to be had; give another") from None
    return str(address)
