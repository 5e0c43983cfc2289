"""The model card of an exported model: README.md with the hub's front matter, as the run itself
describes it.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from clipsmall.export import usage

Rows = list[tuple[str, ...]]


@dataclass
class Card:
    """What a card tells; what is empty is left out.

    `where` is the folder's name or the hub's ORG/NAME, as the snippets spell it.
    """

    name: str
    where: usage.Where
    licence: str
    scale: float
    bias: float | None
    base: str = ""
    pretrained: str = ""
    notes: list[str] = field(default_factory=list)
    # run.yaml
    config: dict[str, Any] = field(default_factory=dict)
    # seen
    pairs: int = 0
    # eval/*.json
    cells: list[dict[str, Any]] = field(default_factory=list)
    # env.json
    versions: dict[str, Any] = field(default_factory=dict)
    # targets, options
    lora: dict[str, Any] = field(default_factory=dict)


def card_text(card: Card) -> str:
    """The whole README.md."""
    measures = ("data", "measure", "result", "chance", "over")
    parts = [
        f"---\n{yaml.safe_dump(_front(card), sort_keys=False)}---",
        f"# {card.name}",
        f"Embeds images and texts in one space, for zero-shot classification and retrieval. {_origin(card)}",
        *card.notes,
        "## Use",
        usage.snippets(card.where, card.base, card.pretrained),
        *(["## Training", _table(("", ""), _training(card))] if card.config else []),
        *(["## Results", _table(measures, _results(card))] if card.cells else []),
        *([_folded("The whole config", card.config)] if card.config else []),
        *([_folded("Versions", card.versions)] if card.versions else []),
        f"## Licence\n\n{card.licence or 'Not stated by whoever exported this model.'}",
    ]
    return scrubbed("\n\n".join(parts)) + "\n"


def _origin(card: Card) -> str:
    base = f"`{shown(card.base)}`" + (f" ({card.pretrained})" if card.pretrained else "")
    if not card.config:
        return f"Written by clipsmall from {base}."
    start = f", starting from {base}" if card.base else ""
    return f"Trained with clipsmall{start}."


def _front(card: Card) -> dict[str, Any]:
    formats = card.where.formats
    adapter = "peft" in formats
    hub_id = re.fullmatch(r"(?:hf:)?([\w.-]+/[\w.-]+)", card.base)
    base = {"base_model": hub_id[1]} if hub_id and not Path(card.base).exists() else {}
    if adapter and base:
        base["base_model_relation"] = "adapter"
    return {
        "license": card.licence or "unknown",
        "library_name": formats[0],
        "pipeline_tag": "zero-shot-image-classification",
        "tags": [card.where.family, "clipsmall", *formats, *(["lora"] if card.lora else [])],
        **base,
    }


def _training(card: Card) -> Rows:
    config = card.config
    lora = card.lora
    objective = config["objective"]["name"]
    mix = (
        " + ".join(f"{weight:g} {name}" for name, weight in objective.items())
        if isinstance(objective, dict)
        else ""
    )
    optim = config["optim"]
    model = config["model"]
    tag = f" ({model['pretrained']})" if model["pretrained"] else ""
    rows: Rows = [
        ("towers", f"{shown(model['name'])}{tag}"),
        ("data", ", ".join(shown(path) for path in config["data"]["train"])),
        ("pairs seen", f"{card.pairs:,}"),
        ("objective", mix or objective),
        ("batch", f"{config['data']['batch_size']:,} pairs over all devices"),
        ("learning rate", f"{optim['lr']:g}, weight decay {optim['weight_decay']:g}"),
    ]
    tuned = config.get("tune", {})
    if (tuned.get("image", "full"), tuned.get("text", "full")) != ("full", "full"):
        rows.append(("trained", f"image tower: {tuned['image']}, text tower: {tuned['text']}"))
    if lora:
        options = lora["options"]
        rows.append(
            (
                "LoRA",
                f"rank {options['rank']}, alpha {options['alpha']:g}, {len(lora['targets'])} modules",
            )
        )
    rows.append(("logit scale", f"{card.scale:.6g} (1/temperature)"))
    if card.bias is not None:
        rows.append(("logit bias", f"{card.bias:.6g}"))
    return rows


def _results(card: Card) -> Rows:
    rows: Rows = []
    for cell in sorted(card.cells, key=lambda cell: (cell["dataset"], cell["task"])):
        # CLIP_benchmark's own cells have neither
        chances = cell.get("chance", {})
        counts = cell.get("counts", {})
        over = ", ".join(f"{value:,} {name}" for name, value in counts.items() if value)
        for name, value in cell["metrics"].items():
            chance = f"{chances[name]:.2%}" if name in chances else ""
            rows.append((cell["dataset"], name, f"{value:.2%}", chance, over))
    return rows


def _table(head: tuple[str, ...], rows: Rows) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value: str) -> str:
    """A name may hold what ends a cell of a Markdown table, or a line of it."""
    return " ".join(str(value).split()).replace("\\", "\\\\").replace("|", "\\|")


def _folded(title: str, content: dict[str, Any]) -> str:
    dumped = yaml.safe_dump(_without_home(content), sort_keys=False, allow_unicode=True)
    return f"<details><summary>{title}</summary>\n\n```yaml\n{dumped}```\n\n</details>"


def _without_home(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_home(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_home(inner) for inner in value]
    return shown(value) if isinstance(value, str) else value


def shown(name: str) -> str:
    """A name as it is, but of an absolute path only the last two parts: nothing of the machine."""
    found = re.fullmatch(r"((?:hf:|open_clip:|local-dir:)*)([/~].+)", name)
    return f"{found[1]}{'/'.join(['…', *Path(found[2]).parts[-2:]])}" if found else name


def scrubbed(text: str) -> str:
    """Without what opens doors: users and queries of URLs, tokens of the hub."""
    text = re.sub(r"(\w://)[^/\s@'\"]+@", r"\1", text)
    text = re.sub(r"(\w://[^\s?'\",]+)\?[^\s'\",\]]+", r"\1", text)
    return re.sub(r"\bhf_[A-Za-z0-9]{16,}", "…", text)
