"""The search page: Gradio on 127.0.0.1, without access to this machine's files."""

import os
from collections.abc import Callable
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from clipsmall.search import answer_html
from clipsmall.search.searcher import Answer, Searcher

# Largest value of the slider, about 2 MB of pictures; --k may exceed it.
MOST_PICTURES = 200
CSS = """
.gradio-container { width: 100%; max-width: 84rem !important; margin: 0 auto !important; }
#head h1 { font-size: 1.5rem; font-weight: 650; line-height: 1.25; overflow-wrap: anywhere;
  margin: .5rem 0 0; }
#head p { opacity: .7; margin: .15rem 0 0; }
#head .html-container, #answer .html-container { padding: 0 !important; }
"""
# On a phone the answer is below the query, so scroll to it.
SHOW_ANSWER = """() => {
  if (innerWidth < 700) document.querySelector('#answer').scrollIntoView({behavior: 'smooth'});
}"""
HINT = "Type a text and press Enter, or drop a picture."


def require_gradio() -> None:
    """Raises ValueError if Gradio is not installed."""
    if find_spec("gradio") is None:
        raise ValueError("the search page needs Gradio: pip install 'clipsmall[demo]'")


def build_search_page(searcher: Searcher, data: str, model: str, k: int) -> Any:
    """The page as `gradio.Blocks`: a text or a picture, k, and the answer.

    Args:
        data, model: their names, for the heading.
        k: how many pictures an answer has at first.
    """
    # read by Gradio on import: no analytics, so nothing leaves this machine
    for setting in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_RUN_HISTORY"):
        os.environ.setdefault(setting, "False")

    import gradio as gr

    answers = _Answers(searcher)
    title = f"Search {data}"

    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.HTML(_heading(searcher, data, model), elem_id="head")
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
                # a slider needs two ends
                most = max(2, min(max(MOST_PICTURES, k), searcher.images))
                many = gr.Slider(1, most, value=k, step=1, label="How many")
                examples = gr.Dataset(
                    components=[text],
                    samples=[[caption] for caption in searcher.examples()],
                    label="For example",
                    type="values",
                )

            with gr.Column(scale=3, min_width=320):
                answer = gr.HTML(answer_html.note_html(HINT), elem_id="answer")

        # One query at a time, as all share one model; no public API.
        quiet: dict[str, Any] = {
            "concurrency_id": "search",
            "api_visibility": "private",
            "show_progress": "hidden",
        }
        # a query by text clears the picture, and the other way round
        asked = text.submit(answers.to_text, [text, many], [answer, image], **quiet)
        asked.then(js=SHOW_ANSWER)
        shown = image.input(answers.to_image, [image, many], [answer, text], **quiet)
        shown.then(js=SHOW_ANSWER)
        both = [text, image, many]
        many.input(answers.to_either, both, answer, trigger_mode="always_last", **quiet)
        chosen = examples.click(lambda sample: sample[0], examples, text, **quiet)
        asked = chosen.then(answers.to_text, [text, many], [answer, image], **quiet)
        asked.then(js=SHOW_ANSWER)

    return page


def _heading(searcher: Searcher, data: str, model: str) -> str:
    broken = searcher.found.broken
    left_out = f", {broken:,} unreadable" if broken else ""
    facts = (
        f"{searcher.images:,} images{left_out} · {searcher.captions:,} captions"
        f" · searched with {escape(model)}"
    )
    return f"<h1>{escape(data)}</h1><p>{facts}</p>"


class _Answers:
    """The page's event handlers: each returns the answer as HTML, and may clear the other field."""

    def __init__(self, searcher: Searcher) -> None:
        self.searcher = searcher

    def to_text(self, text: str, k: int) -> tuple[str, None]:
        return self._html(lambda: self.searcher.by_text(text, int(k))), None

    def to_image(self, image: str | None, k: int) -> tuple[str, str]:
        if image is None:
            return answer_html.note_html(HINT), ""

        data = Path(image).read_bytes()
        return self._html(lambda: self.searcher.by_image(data, int(k))), ""

    def to_either(self, text: str, image: str | None, k: int) -> str:
        """Repeat the current query with another k."""
        if image:
            return self.to_image(image, k)[0]
        if text.strip():
            return self.to_text(text, k)[0]

        return answer_html.note_html(HINT)

    def _html(self, ask: Callable[[], Answer]) -> str:
        return answer_or_error(ask, self.searcher.images)


def answer_or_error(ask: Callable[[], Answer], images: int) -> str:
    """HTML of the answer, or of the error in the query."""
    try:
        return answer_html.answer_html(ask(), images)
    except ValueError as error:
        return answer_html.note_html(f"{error}")


def launch_search_page(page: Any, port: int) -> str:
    """Serve the page on 127.0.0.1; returns the address.

    Raises:
        ValueError: the port is taken.
    """
    import gradio as gr

    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    # no fonts from the network
    theme = gr.themes.Default(**fonts)

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
            css=answer_html.CSS + CSS,
        )
    except (OSError, OverflowError):
        raise ValueError(f"--port={port}: taken or not permitted; give another") from None

    return str(address)
