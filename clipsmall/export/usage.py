"""The snippets of a model card; every one runs as it stands, beside the model's folder and a
photo.jpg.
"""

import json
from dataclasses import dataclass

NAMES = 'names = ["a photo of a cat", "a photo of a dog"]'
HUB = "hf-hub:"


@dataclass
class Where:
    """`path`: the folder's name, or ORG/NAME of the hub; `formats`: transformers, open_clip, or
    peft.
    """

    path: str
    hub: bool
    # clip or siglip
    family: str
    formats: list[str]
    # of an adapter's base
    revision: str = ""


def text(where: Where, base: str, pretrained: str) -> str:
    """All snippets, each under the library's name.

    Args:
        base: of an adapter: the model it is for; with `pretrained` one of open_clip.
    """
    if "peft" in where.formats:
        told = "The adapter and the temperature it was trained with, on its base:"
        return f"{told}\n\n{_block(_peft(where, base, pretrained))}"
    writers = {"transformers": _transformers, "open_clip": _open_clip}
    parts = [f"With {library}:\n\n{_block(writers[library](where))}" for library in where.formats]
    return "\n\n".join([*parts, f"With clipsmall:\n\n{_block(_clipsmall(where))}"])


def _block(code: str) -> str:
    return f"```python\n{code.strip()}\n```"


def _transformers(where: Where) -> str:
    return f"""
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained({json.dumps(where.path)}).eval()
processor = AutoProcessor.from_pretrained({json.dumps(where.path)})
{_scored(where)}"""


def _scored(where: Where) -> str:
    """SigLIP's logits are each a probability of their own, CLIP's one of several."""
    chance = "sigmoid()" if where.family == "siglip" else "softmax(dim=-1)"
    return f"""{NAMES}
photo = Image.open("photo.jpg").convert("RGB")
inputs = processor(text=names, images=photo, padding="max_length", truncation=True, return_tensors="pt")
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
{_compared()}"""


def _compared() -> str:
    return f"""{NAMES}
with torch.no_grad():
    image = model.encode_image(preprocess(Image.open("photo.jpg"))[None], normalize=True)
    text = model.encode_text(tokenizer(names), normalize=True)
    logits = model.logit_scale.exp() * image @ text.T
print(dict(zip(names, logits.softmax(dim=-1)[0].tolist())))
"""


def _clipsmall(where: Where) -> str:
    source = json.dumps(
        f"open_clip:{HUB}{where.path}"
        if where.hub and where.formats == ["open_clip"]
        else where.path
    )
    return f"""
import torch
from clipsmall.data.preprocess import ImageTransform
from clipsmall.model.saved import load_model

model, loaded = load_model({source})
model.eval()
{NAMES}
with open("photo.jpg", "rb") as file, torch.no_grad():
    image = model.encode_image(ImageTransform(loaded.spec)(file.read())[None])
    logits = model.logit_scale.exp() * image @ model.encode_text(loaded.tokenize(names)).T
print(dict(zip(names, logits.softmax(dim=-1)[0].tolist())))
"""


def _peft(where: Where, base: str, pretrained: str) -> str:
    """Base, scale, adapter: peft carries only the last."""
    scale = json.dumps(f"{where.path}/scale.json")
    fetch = ""
    if where.hub:
        scale = f'hf_hub_download("{where.path}", "scale.json")'
        fetch = "from huggingface_hub import hf_hub_download\n"
    name = json.dumps(base)
    revision = f', revision="{where.revision}"' if where.revision else ""
    if "transformers" in where.formats:
        imports = f"import torch\n{fetch}from peft import PeftModel\nfrom PIL import Image\n"
        imports += "from transformers import AutoModel, AutoProcessor\n"
        made = f"model = AutoModel.from_pretrained({name}{revision})\n"
        made += f"processor = AutoProcessor.from_pretrained({name}{revision})"
    else:
        imports = f"import open_clip\nimport torch\n{fetch}from peft import PeftModel\nfrom PIL import Image\n"
        weights = f", pretrained={json.dumps(pretrained)}" if pretrained else ""
        made = f"model, _, preprocess = open_clip.create_model_and_transforms({name}{weights})\n"
        made += f"tokenizer = open_clip.get_tokenizer({name})"
    bias = 'model.logit_bias.data.fill_(scale["logit_bias"])\n' if where.family == "siglip" else ""
    return f"""
import json

{imports}
{made}
with open({scale}) as file:
    scale = json.load(file)
model.logit_scale.data.fill_(scale["log_logit_scale"])
{bias}model = PeftModel.from_pretrained(model, {json.dumps(where.path)}).eval()
{_scored(where) if "transformers" in where.formats else _compared()}"""
