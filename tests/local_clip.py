"""Small CLIP and SigLIP checkpoints in HF's format, written here: real architectures, random
weights, no network.
"""

import math
from pathlib import Path
from typing import Any

import torch

from clipsmall.export.tokenizer import VOCABULARY, clip_tokenizer

WORDS = [
    "a",
    "photo",
    "of",
    "the",
    "cat",
    "dog",
    "small",
    "letter",
    "red",
    "heart",
    "face",
    "with",
    "black",
    "white",
]


def local_clip(
    folder: Path,
    *,
    image_size: int = 32,
    patch_size: int = 8,
    width: int = 64,
    layers: int = 2,
    heads: int = 4,
    projection: int = 32,
    hidden_act: str = "quick_gelu",
    context_length: int = 77,
    seed: int = 0,
) -> Path:
    """A HF `CLIPModel` with CLIP's own BPE tokenizer (49,408 ids) and processor; scale 20. Returns
    `folder`.
    """
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    sides = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_act": hidden_act,
        "projection_dim": projection,
    }
    marks = {
        "bos_token_id": VOCABULARY - 2,
        "eos_token_id": VOCABULARY - 1,
        "pad_token_id": VOCABULARY - 1,
    }
    text = {**sides, **marks, "vocab_size": VOCABULARY, "max_position_embeddings": context_length}
    vision = {**sides, "image_size": image_size, "patch_size": patch_size}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection)
    processor = CLIPImageProcessor(
        size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
    )
    _save(CLIPModel, config, CLIPProcessor(processor, clip_tokenizer(context_length)), folder, seed)
    return folder


def local_siglip(
    folder: Path,
    *,
    image_size: int = 32,
    patch_size: int = 8,
    width: int = 64,
    layers: int = 2,
    heads: int = 4,
    context_length: int = 16,
    seed: int = 0,
) -> Path:
    """A HF `SiglipModel` with a tokenizer of a few words and processor; scale 20, bias -3. Returns
    `folder`.
    """
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel, SiglipProcessor

    sides = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    tokenizer = word_tokenizer(context_length)
    marks = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1}
    text = {
        **sides,
        **marks,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": context_length,
    }
    config = SiglipConfig(
        text_config=text,
        vision_config={**sides, "image_size": image_size, "patch_size": patch_size},
    )
    processor = SiglipImageProcessor(size={"height": image_size, "width": image_size})
    _save(SiglipModel, config, SiglipProcessor(processor, tokenizer), folder, seed)
    return folder


def word_tokenizer(context_length: int) -> Any:
    """A HF tokenizer of whole words, which ends and pads with one mark, as SigLIP's does."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[UNK]", "</s>", *WORDS]
    made = Tokenizer(
        models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="[UNK]")
    )
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="</s>",
        eos_token="</s>",
        unk_token="[UNK]",
        model_max_length=context_length,
    )


def timm_siglip(
    image_size: int = 32, patch_size: int = 8, width: int = 64, layers: int = 2, heads: int = 4
) -> str:
    """Makes timm know a small image tower of SigLIP's kind, with tanh's GELU as HF's; returns its
    name.

    open_clip can only name a tower of timm, so a `local_siglip` of these sizes is exported to
    open_clip, too.
    """
    import timm
    from timm.models.vision_transformer import VisionTransformer

    def create(pretrained: bool = False, **options: Any) -> Any:
        known = {key: options[key] for key in ("num_classes", "global_pool") if key in options}
        return VisionTransformer(
            img_size=image_size,
            patch_size=patch_size,
            embed_dim=width,
            depth=layers,
            num_heads=heads,
            class_token=False,
            act_layer="gelu_tanh",
            **{"global_pool": "map", **known},
        )

    create.__name__ = f"vit_w{width}d{layers}h{heads}_patch{patch_size}_siglip_{image_size}"
    if create.__name__ not in timm.list_models():
        timm.models.register_model(create)
    return create.__name__


def _save(kind: Any, config: Any, processor: Any, folder: Path, seed: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(config)
        scatter(model)
        model.logit_scale.data.fill_(math.log(20.0))
        if hasattr(model, "logit_bias"):
            model.logit_bias.data.fill_(-3.0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)


@torch.no_grad()
def scatter(model: torch.nn.Module) -> None:
    """Noise on every weight: LayerNorms of ones and biases of zeros would not show that they went
    astray.
    """
    for parameter in model.parameters():
        parameter += 0.05 * torch.randn_like(parameter)
