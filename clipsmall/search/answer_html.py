"""Answers as HTML: a grid of pictures and a list of captions.

Captions are escaped, and pictures are data: addresses, so that no file is served.
"""

from jinja2 import Environment, StrictUndefined

from clipsmall.pages.html_page import picture_address
from clipsmall.search.searcher import Answer

_TEMPLATE = """
<div class="answer">
<p class="note" role="status">{{ note }}</p>
{% if answer.captions %}<h2>Captions</h2>
<ol class="captions">
{% for hit in answer.captions -%}
<li><span class="cosine">{{ "%.3f" % hit.cosine }}</span> {{ hit.caption }}</li>
{% endfor %}</ol>
<h2>Pictures</h2>{% endif %}
<div class="pictures">
{% for hit, source, tiny in pictures %}<figure>
<img src="{{ source }}" alt="{{ hit.caption }}" title="{{ hit.caption }}"
{%- if tiny %} class="tiny"{% endif %}>
<figcaption><span class="cosine">{{ "%.3f" % hit.cosine }}</span> {{ hit.caption }}</figcaption>
{#- #}</figure>
{% endfor %}</div></div>"""

CSS = """
.answer h2 { margin: 1.25rem 0 .5rem; font-size: 1rem; font-weight: 600; }
.answer .note { margin: 0 0 .75rem; opacity: .7; font-size: .9rem; }
.answer .pictures { display: grid; gap: .75rem;
  grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); }
.answer figure { margin: 0; overflow: hidden; border: 1px solid var(--border-color-primary);
  border-radius: 8px; background: var(--block-background-fill); }
.answer img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain;
  background: #fff; }
.answer img.tiny { image-rendering: pixelated; }
.answer figcaption, .answer li { font-size: .85rem; line-height: 1.35; overflow-wrap: anywhere; }
.answer figcaption { padding: .4rem .55rem .5rem; display: -webkit-box;
  -webkit-box-orient: vertical; -webkit-line-clamp: 4; overflow: hidden; }
.answer .cosine { opacity: .65; font-variant-numeric: tabular-nums; margin-right: .3rem; }
.answer .captions { margin: 0; padding: 0; columns: 16rem; column-gap: 1.5rem; list-style: none; }
.answer .captions li { break-inside: avoid; padding: .2rem 0;
  border-top: 1px solid var(--border-color-primary); }
@media (max-width: 40rem) {
  .answer .pictures { gap: .5rem; grid-template-columns: repeat(auto-fill, minmax(6.5rem, 1fr)); }
}
"""


def answer_html(answer: Answer, images: int) -> str:
    """The answer as HTML; `images`: the number of images searched."""
    comparing = 1e3 * answer.comparing
    embedding = 1e3 * answer.embedding
    note = (
        f"{comparing:,.1f} ms to search {images:,} images, {embedding:,.1f} ms to embed the query"
    )
    return _fill(answer, note)


def note_html(text: str) -> str:
    """A message in place of an answer."""
    return _fill(Answer(0, 0, []), text)


def _fill(answer: Answer, note: str) -> str:
    pictures = []
    for hit in answer.images:
        address, tiny = picture_address(hit.image)
        pictures.append((hit, address, tiny))
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(_TEMPLATE)
    return template.render(answer=answer, pictures=pictures, note=note)
