"""The model card of an exported model: README.md with the hub's front matter.

It is written from the files of the run: config, versions and results.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from clipsmall.export import usage

Rows = list[tuple[str, ...]]
# Columns of the table of results.
MEASURES = ("data", "measure", "result", "chance", "over")


@dataclass
class Card:
    """The content of a model card; empty fields are left out."""

    # title of the card
    name: str
    where: usage.Where
    # licence as the hub identifies it
    licence: str
    # logit scale (not its log) and bias
    scale: float
    bias: float | None
    # the model it was fine-tuned from: model.name and model.pretrained of the run
    base: str = ""
    pretrained: str = ""
    # sentences on limitations of the folder
    notes: list[str] = field(default_factory=list)
    # content of run.yaml
    config: dict[str, Any] = field(default_factory=dict)
    # samples seen
    pairs: int = 0
    # contents of eval/*.json
    cells: list[dict[str, Any]] = field(default_factory=list)
    # content of env.json
    versions: dict[str, Any] = field(default_factory=dict)
    # targets and options of the adapters
    lora: dict[str, Any] = field(default_factory=dict)


def card_text(card: Card) -> str:
    """The whole README.md."""
    front = yaml.safe_dump(_front_matter(card), sort_keys=False)
    parts = [
        f"---\n{front}---",
        f"# {card.name}",
        "Embeds images and texts in one space, for zero-shot classification and retrieval. "
        + _origin(card),
        *card.notes,
        "## Use",
        usage.snippets(card.where, card.base, card.pretrained),
    ]
    if card.config:
        parts += ["## Training", _table(("", ""), _training(card))]
    if card.cells:
        parts += ["## Results", _table(MEASURES, _results(card))]
    if card.config:
        parts.append(_folded("The whole config", card.config))
    if card.versions:
        parts.append(_folded("Versions", card.versions))
    licence = card.licence or "Not stated by whoever exported this model."
    parts.append(f"## Licence\n\n{licence}")
    return scrubbed("\n\n".join(parts)) + "\n"


def _origin(card: Card) -> str:
    """A sentence on the model's origin."""
    base = f"`{shown(card.base)}`"
    if card.pretrained:
        base += f" ({card.pretrained})"
    if not card.config:
        return f"Written by clipsmall from {base}."
    start = f", starting from {base}" if card.base else ""
    return f"Trained with clipsmall{start}."


def _front_matter(card: Card) -> dict[str, Any]:
    formats = card.where.formats
    tags = [card.where.family, "clipsmall", *formats]
    if card.lora:
        tags.append("lora")
    front = {
        "license": card.licence or "unknown",
        "library_name": formats[0],
        "pipeline_tag": "zero-shot-image-classification",
        "tags": tags,
    }
    # the base, if its name is a hub id
    hub_id = re.fullmatch(r"(?:hf:)?([\w.-]+/[\w.-]+)", card.base)
    if hub_id and not Path(card.base).exists():
        front["base_model"] = hub_id[1]
        if "peft" in formats:
            front["base_model_relation"] = "adapter"
    return front


def _training(card: Card) -> Rows:
    """Rows with the most important training options."""
    config = card.config
    optim = config["optim"]
    model = config["model"]
    towers = shown(model["name"])
    if model["pretrained"]:
        towers += f" ({model['pretrained']})"
    objective = config["objective"]["name"]
    if isinstance(objective, dict):
        # a mix: weights by name
        objective = " + ".join(f"{weight:g} {name}" for name, weight in objective.items())
    rows: Rows = [
        ("towers", towers),
        ("data", ", ".join(shown(path) for path in config["data"]["train"])),
        ("pairs seen", f"{card.pairs:,}"),
        ("objective", objective),
        ("batch", f"{config['data']['batch_size']:,} pairs over all devices"),
        ("learning rate", f"{optim['lr']:g}, weight decay {optim['weight_decay']:g}"),
    ]
    tuned = config.get("tune", {})
    if (tuned.get("image", "full"), tuned.get("text", "full")) != ("full", "full"):
        rows.append(("trained", f"image tower: {tuned['image']}, text tower: {tuned['text']}"))
    if card.lora:
        options = card.lora["options"]
        size = f"rank {options['rank']}, alpha {options['alpha']:g}"
        rows.append(("LoRA", f"{size}, {len(card.lora['targets'])} modules"))
    rows.append(("logit scale", f"{card.scale:.6g} (1/temperature)"))
    if card.bias is not None:
        rows.append(("logit bias", f"{card.bias:.6g}"))
    return rows


def _results(card: Card) -> Rows:
    """One row per measure."""
    rows: Rows = []
    for cell in sorted(card.cells, key=lambda cell: (cell["dataset"], cell["task"])):
        # files that CLIP_benchmark wrote have neither
        chances = cell.get("chance", {})
        counts = cell.get("counts", {})
        over = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)
        for name, value in cell["metrics"].items():
            chance = f"{chances[name]:.2%}" if name in chances else ""
            rows.append((cell["dataset"], name, f"{value:.2%}", chance, over))
    return rows


def _table(head: tuple[str, ...], rows: Rows) -> str:
    """A table in Markdown."""
    lines = []
    for row in [head, ("---",) * len(head), *rows]:
        cells = " | ".join(_cell(value) for value in row)
        lines.append(f"| {cells} |")
    return "\n".join(lines)


def _cell(value: str) -> str:
    """Escape characters that would end a table cell, and join lines."""
    one_line = " ".join(str(value).split())
    return one_line.replace("\\", "\\\\").replace("|", "\\|")


def _folded(title: str, content: dict[str, Any]) -> str:
    """A collapsed section with YAML."""
    dumped = yaml.safe_dump(_shown_throughout(content), sort_keys=False, allow_unicode=True)
    return f"<details><summary>{title}</summary>\n\n```yaml\n{dumped}```\n\n</details>"


def _shown_throughout(value: Any) -> Any:
    """A tree in which every string is replaced by `shown`."""
    if isinstance(value, dict):
        return {key: _shown_throughout(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_shown_throughout(inner) for inner in value]
    if isinstance(value, str):
        return shown(value)
    return value


def shown(name: str) -> str:
    """The last two parts of an absolute path; any other name unchanged.

    A card must not reveal the machine's folder names.
    """
    found = re.fullmatch(r"((?:hf:|open_clip:|local-dir:)*)([/~].+)", name)
    if found is None:
        return name
    prefix, path = found.groups()
    last = Path(path).parts[-2:]
    return prefix + "/".join(["…", *last])


def scrubbed(text: str) -> str:
    """The text without secrets: users and queries of URLs, tokens of the hub."""
    text = re.sub(r"(\w://)[^/\s@'\"]+@", r"\1", text)
    text = re.sub(r"(\w://[^\s?'\",]+)\?[^\s'\",\]]+", r"\1", text)
    return re.sub(r"\bhf_[A-Za-z0-9]{16,}", "…", text)
