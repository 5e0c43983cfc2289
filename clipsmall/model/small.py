"""Towers that train on a laptop's CPU: a few strided convolutions, and a shallow transformer over
words.
"""

import json
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.trainers import WordLevelTrainer
from torch import Tensor, nn

PAD = 0


class SmallImage(BaseModel):
    model_config = ConfigDict(extra="forbid")
    size: int = Field(32, ge=8, description="pixels, square; halved once for each width")
    widths: tuple[int, ...] = Field(
        (32, 64, 128), min_length=1, description="channels after each halving"
    )
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    @model_validator(mode="after")
    def _halves(self) -> "SmallImage":
        if self.size % 2 ** len(self.widths):
            raise ValueError(f"size={self.size} cannot be halved {len(self.widths)} times")
        return self


class SmallText(BaseModel):
    model_config = ConfigDict(extra="forbid")
    width: int = Field(128, ge=8)
    layers: int = Field(1, ge=1)
    heads: int = Field(4, ge=1)
    context_length: int = Field(16, ge=2, description="words")
    vocab_size: int = Field(
        8192, ge=16, description="words at most, the most frequent of the training captions"
    )

    @model_validator(mode="after")
    def _divides(self) -> "SmallText":
        if self.width % self.heads:
            raise ValueError(f"width={self.width} does not divide by heads={self.heads}")
        return self


class SmallConfig(BaseModel):
    """The `small` kind of tower JSON."""

    model_config = ConfigDict(extra="forbid")
    kind: str = Field("small", pattern="^small$")
    embed_dim: int = Field(128, ge=2)
    image: SmallImage = SmallImage()
    text: SmallText = SmallText()


class SmallTowers(nn.Module):
    def __init__(self, config: SmallConfig) -> None:
        super().__init__()
        self.config = config
        channels = (3, *config.image.widths)
        layers: list[nn.Module] = []
        for before, after in pairwise(channels):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GELU()]
        side = config.image.size // 2 ** len(config.image.widths)
        self.visual = nn.Sequential(
            *layers, nn.Flatten(), nn.Linear(side * side * channels[-1], config.embed_dim)
        )
        text = config.text
        self.words = nn.Embedding(text.vocab_size, text.width, padding_idx=PAD)
        self.positions = nn.Parameter(torch.randn(text.context_length, text.width) * 0.01)
        block = nn.TransformerEncoderLayer(
            text.width,
            text.heads,
            4 * text.width,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.blocks = nn.TransformerEncoder(block, text.layers, enable_nested_tensor=False)
        self.head = nn.Linear(text.width, config.embed_dim)

    def image(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) normalised -> (B, D)."""
        features: Tensor = self.visual(pixels)
        return features

    def text(self, ids: Tensor) -> Tensor:
        """(B, L) word ids -> (B, D): the mean over a caption's words."""
        there = ids != PAD
        x = self.words(ids) + self.positions
        x = self.blocks(x, src_key_padding_mask=~there)
        weights = there.to(x.dtype)[:, :, None]
        features: Tensor = self.head((x * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1))
        return features


class WordTokenizer:
    """Captions -> (n, context_length) word ids; 0 pads, 1 is an unknown word."""

    def __init__(self, tokenizer: Tokenizer, context_length: int) -> None:
        self.tokenizer = tokenizer
        tokenizer.enable_truncation(context_length)
        tokenizer.enable_padding(length=context_length, pad_id=PAD, pad_token="[PAD]")

    @classmethod
    def train(cls, captions: Iterable[str], config: SmallText) -> "WordTokenizer":
        """The words of the training captions, most frequent first; the same captions give the same
        vocabulary.
        """
        tokenizer = Tokenizer(WordLevel(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = WordLevelTrainer(
            vocab_size=config.vocab_size, special_tokens=["[PAD]", "[UNK]"], show_progress=False
        )
        tokenizer.train_from_iterator(captions, trainer)
        return cls(tokenizer, config.context_length)

    @classmethod
    def load(cls, path: Path, context_length: int) -> "WordTokenizer":
        return cls(Tokenizer.from_str(path.read_text(encoding="utf-8")), context_length)

    def to_json(self) -> str:
        return json.dumps(json.loads(self.tokenizer.to_str()), ensure_ascii=False, indent=1)

    def __call__(self, captions: list[str]) -> Tensor:
        ids = torch.tensor([encoding.ids for encoding in self.tokenizer.encode_batch(captions)])
        ids[ids.eq(PAD).all(dim=1), 0] = (
            # a caption of nothing but symbols the splitter drops: one unknown word
            1
        )
        return ids
