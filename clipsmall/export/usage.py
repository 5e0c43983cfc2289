"""The code snippets of a model card.

Each runs unchanged in a folder with the model's folder and a photo.jpg.
"""

import json
from dataclasses import dataclass

NAMES = 'names = ["a photo of a cat", "a photo of a dog"]'
HUB = "hf-hub:"


@dataclass
class Where:
    """Where a model is, and how it can be loaded."""

    # the folder's name, or ORG/NAME of the hub
    path: str
    hub: bool
    # clip or siglip
    family: str
    # transformers, open_clip, or peft
    formats: list[str]
    # hub revision of an adapter's base
    revision: str = ""


def snippets(where: Where, base: str, pretrained: str) -> str:
    """All snippets, each under its library's name.

    Args:
        base: for an adapter, the base model; with `pretrained`, an open_clip name.
    """
    if "peft" in where.formats:
        title = "The adapter and the temperature it was trained with, on its base:"
        return f"{title}\n\n{_block(_peft(where, base, pretrained))}"
    parts = []
    if "transformers" in where.formats:
        parts.append(f"With transformers:\n\n{_block(_transformers(where))}")
    if "open_clip" in where.formats:
        parts.append(f"With open_clip:\n\n{_block(_open_clip(where))}")
    parts.append(f"With clipsmall:\n\n{_block(_clipsmall(where))}")
    return "\n\n".join(parts)


def _block(code: str) -> str:
    return f"```python\n{code.strip()}\n```"


def _transformers(where: Where) -> str:
    path = json.dumps(where.path)
    return f"""
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained({path}).eval()
processor = AutoProcessor.from_pretrained({path})
{_scored_by_transformers(where)}"""


def _scored_by_transformers(where: Where) -> str:
    """Logits to probabilities: a sigmoid each for SigLIP, a softmax over captions for CLIP."""
    chance = "sigmoid()" if where.family == "siglip" else "softmax(dim=-1)"
    options = 'padding="max_length", truncation=True, return_tensors="pt"'
    return f"""{NAMES}
photo = Image.open("photo.jpg").convert("RGB")
inputs = processor(text=names, images=photo, {options})
with torch.no_grad():
    logits = model(**inputs).logits_per_image
print(dict(zip(names, logits.{chance}[0].tolist())))
"""


def _open_clip(where: Where) -> str:
    source = json.dumps(f"{HUB if where.hub else 'local-dir:'}{where.path}")
    return f"""
import open_clip
import torch
from PIL import Image

model, _, preprocess = open_clip.create_model_and_transforms({source})
tokenizer = open_clip.get_tokenizer({source})
model.eval()
{_scored_by_open_clip()}"""


def _scored_by_open_clip() -> str:
    return f"""{NAMES}
with torch.no_grad():
    image = model.encode_image(preprocess(Image.open("photo.jpg"))[None], normalize=True)
    text = model.encode_text(tokenizer(names), normalize=True)
    logits = model.logit_scale.exp() * image @ text.T
print(dict(zip(names, logits.softmax(dim=-1)[0].tolist())))
"""


def _clipsmall(where: Where) -> str:
    source = where.path
    if where.hub and where.formats == ["open_clip"]:
        # without this prefix a hub id means a transformers model
        source = f"open_clip:{HUB}{where.path}"
    return f"""
import torch
from clipsmall.data.preprocess import ImageTransform
from clipsmall.model.saved import load_model

model, loaded = load_model({json.dumps(source)})
model.eval()
{NAMES}
with open("photo.jpg", "rb") as file, torch.no_grad():
    image = model.encode_image(ImageTransform(loaded.spec)(file.read())[None])
    logits = model.logit_scale.exp() * image @ model.encode_text(loaded.tokenize(names)).T
print(dict(zip(names, logits.softmax(dim=-1)[0].tolist())))
"""


def _peft(where: Where, base: str, pretrained: str) -> str:
    """Load base, logit scale and adapter; peft handles only the adapter."""
    name = json.dumps(base)
    imports = ["import torch"]
    if where.hub:
        imports.append("from huggingface_hub import hf_hub_download")
        scale = f'hf_hub_download("{where.path}", "scale.json")'
    else:
        scale = json.dumps(f"{where.path}/scale.json")
    imports += ["from peft import PeftModel", "from PIL import Image"]
    if "transformers" in where.formats:
        imports.append("from transformers import AutoModel, AutoProcessor")
        revision = f', revision="{where.revision}"' if where.revision else ""
        made = (
            f"model = AutoModel.from_pretrained({name}{revision})\n"
            f"processor = AutoProcessor.from_pretrained({name}{revision})"
        )
        scored = _scored_by_transformers(where)
    else:
        imports.insert(0, "import open_clip")
        weights = f", pretrained={json.dumps(pretrained)}" if pretrained else ""
        made = (
            f"model, _, preprocess = open_clip.create_model_and_transforms({name}{weights})\n"
            f"tokenizer = open_clip.get_tokenizer({name})"
        )
        scored = _scored_by_open_clip()
    bias = ""
    if where.family == "siglip":
        bias = 'model.logit_bias.data.fill_(scale["logit_bias"])\n'
    lines = "\n".join(imports)
    return f"""
import json

{lines}

{made}
with open({scale}) as file:
    scale = json.load(file)
model.logit_scale.data.fill_(scale["log_logit_scale"])
{bias}model = PeftModel.from_pretrained(model, {json.dumps(where.path)}).eval()
{scored}"""
