"""Tests of towers against the libraries they come from: features, tokens, preprocessing, gradients,
and their files.

Seen to fail when: `encode_image` forgets the std; a folder's resize, interpolation or crop is not
taken over; HF weights stay in their file's dtype, or captions are cut one token early; `save_files`
leaves out an open_clip model's HF tokenizer; `take_scale_and_bias` leaves logit_scale in the
library's model; the clamp moves into forward.
"""

import json
import math
import shutil
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from clipsmall.batch import Pairs
from clipsmall.build import run as build
from clipsmall.config import Config
from clipsmall.data.preprocess import CLIP_MEAN, CLIP_STD, ImageSpec, ImageTransform
from clipsmall.distributed import world
from clipsmall.model.dual_encoder import MAX_LOG_SCALE, DualEncoder
from clipsmall.model.load import load_towers, rebuild, save_model_files
from clipsmall.model.towers import Loaded
from clipsmall.model.towers.small import SmallConfig, SmallText, SmallTowers, WordTokenizer
from clipsmall.objectives import OBJECTIVES
from tests.shards_for_tests import TOWERS

OPEN_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
CAPTIONS = [
    "a photo of a cat",
    "The DOG, of the house!",
    "",
    "latin small letter e with circumflex " * 9,
    "é 猫 🐈",
]
SIDES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
LANDSCAPE = (101, 60)
PORTRAIT = (60, 101)
SIZES = [LANDSCAPE, PORTRAIT, (32, 32), (33, 32), (32, 47), (10, 20), (1, 1), (3, 90), (400, 301)]


# ---- models made here, also for other tests


def write_open_clip_json(folder: Path, name: str = "tiny-open-clip.json", **changes: Any) -> Path:
    path = folder / name
    path.write_text(json.dumps({**OPEN_CLIP, **changes}))
    return path


def write_open_clip_folder(folder: Path, preprocess: dict[str, Any]) -> Any:
    """A folder as open_clip saves to the hub; returns the model in it."""
    import open_clip

    folder.mkdir()
    json_path = write_open_clip_json(folder.parent, "tiny-for-folder.json")
    open_clip.add_model_config(json_path)
    torch.manual_seed(1)
    model = open_clip.create_model("tiny-for-folder").eval()
    model.logit_scale.data.fill_(math.log(33.0))
    config = {"model_cfg": OPEN_CLIP, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )
    return model


def clip_tokenizer() -> Any:
    """CLIP's own byte-level BPE, of the first 2000 merges of the vocabulary that open_clip
    ships.
    """
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    whole = SimpleTokenizer()
    merges = list(whole.bpe_ranks)[:2000]
    letters = list(whole.byte_encoder.values())
    words = [
        *letters,
        *(f"{letter}</w>" for letter in letters),
        *("".join(pair) for pair in merges),
    ]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: place for place, word in enumerate(words)}, merges=merges)


def word_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "a", "photo", "of", "cat", "the", "dog", "letter", "small"]
    made = Tokenizer(
        models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="[UNK]")
    )
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]")


def write_clip(folder: Path, **processor: Any) -> Any:
    """A HF CLIP folder; returns the model in it."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    tokenizer = clip_tokenizer()
    special = {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    text = {**SIDES, **special, "vocab_size": len(tokenizer), "max_position_embeddings": 16}
    vision = {**SIDES, "image_size": 32, "patch_size": 8}
    torch.manual_seed(2)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).eval()
    model.logit_scale.data.fill_(math.log(42.0))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessor(**{**sizes, **processor}).save_pretrained(folder)
    return model


def write_siglip(folder: Path) -> Any:
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

    tokenizer = word_tokenizer()
    special = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0, "projection_size": 32}
    text = {**SIDES, **special, "vocab_size": len(tokenizer), "max_position_embeddings": 12}
    torch.manual_seed(3)
    config = SiglipConfig(
        text_config=text, vision_config={**SIDES, "image_size": 32, "patch_size": 8}
    )
    model = SiglipModel(config).eval()
    model.logit_scale.data.fill_(math.log(7.0))
    model.logit_bias.data.fill_(-3.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("clip")
    return folder, write_clip(folder)


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("siglip")
    return folder, write_siglip(folder)


@pytest.fixture(scope="module")
def open_clip_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_open_clip_json(tmp_path_factory.mktemp("open_clip"))


def no_captions() -> list[str]:
    raise AssertionError("only our own towers learn a vocabulary")


def encoder(loaded: Loaded, learn_bias: bool = False) -> DualEncoder:
    return DualEncoder(
        loaded.towers, loaded.spec, loaded.logit_scale or 10.0, 0.0, learn_bias
    ).eval()


def pictures(sizes: list[tuple[int, int]] = SIZES, mode: str = "RGB") -> list[Image.Image]:
    """Noise in every pixel: the least difference in resizing shows."""
    random = np.random.default_rng(0)
    return [
        Image.fromarray(random.integers(0, 256, (h, w, 3), dtype=np.uint8)).convert(mode)
        for w, h in sizes
    ]


def png(image: Image.Image) -> bytes:
    out = BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def pixels(spec: ImageSpec, images: list[Image.Image]) -> Tensor:
    transform = ImageTransform(spec)
    return torch.stack([transform(png(image)) for image in images])


def close(found: Tensor, expected: Tensor) -> None:
    assert len({tuple(row.tolist()) for row in expected}) > 1, (
        "features that do not depend on the input prove nothing"
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


# ---- open_clip


@torch.no_grad()
def test_an_open_clip_model_gives_the_librarys_features(open_clip_json: Path) -> None:
    import open_clip

    open_clip.add_model_config(open_clip_json)
    torch.manual_seed(0)
    theirs, _, preprocess = open_clip.create_model_and_transforms(open_clip_json.stem)
    theirs.eval()
    loaded = load_towers(str(open_clip_json), "", no_captions)
    # fresh: the objective's start
    assert (loaded.logit_scale, loaded.logit_bias) == (None, None)
    state = {name: tensor for name, tensor in theirs.state_dict().items() if name != "logit_scale"}
    loaded.towers.model.load_state_dict(state)
    model = encoder(loaded)
    images = pictures()
    expected = theirs.encode_image(
        torch.stack([preprocess(image) for image in images]), normalize=True
    )
    close(model.encode_image(pixels(loaded.spec, images)), expected)
    tokens = open_clip.get_tokenizer(open_clip_json.stem)(CAPTIONS)
    assert torch.equal(loaded.tokenize(CAPTIONS), tokens)
    close(model.encode_text(tokens), theirs.encode_text(tokens, normalize=True))


PREPROCESSING = [
    {
        "size": 32,
        "mean": CLIP_MEAN,
        "std": CLIP_STD,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    },
    {
        "size": 32,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "interpolation": "bicubic",
        "resize_mode": "squash",
    },
    {
        "size": 20,
        "mean": (0.4, 0.5, 0.6),
        "std": (0.1, 0.2, 0.3),
        "interpolation": "bilinear",
        "resize_mode": "shortest",
    },
]


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(
    "found", PREPROCESSING, ids=lambda found: f"{found['resize_mode']}-{found['interpolation']}"
)
def test_pixels_are_those_of_open_clips_validation_transform(
    found: dict[str, Any], mode: str
) -> None:
    from open_clip.transform import image_transform

    theirs = image_transform(
        found["size"],
        False,
        found["mean"],
        found["std"],
        found["resize_mode"],
        found["interpolation"],
    )
    spec = ImageSpec(
        found["size"], found["mean"], found["std"], found["interpolation"], found["resize_mode"]
    )
    model = DualEncoder(torch.nn.Identity(), spec, 10.0, 0.0, False)
    images = pictures(mode=mode)
    ours = pixels(spec, images)
    expected = torch.stack([theirs(image) for image in images])
    torch.testing.assert_close(
        (ours.float() - model.mean) / model.std, expected, rtol=1e-5, atol=1e-5
    )
    mean, std = (torch.tensor(found[name]).view(3, 1, 1) for name in ("mean", "std"))
    assert torch.equal(ours, ((expected * std + mean) * 255).round().to(torch.uint8))


@torch.no_grad()
@pytest.mark.parametrize(
    "preprocess", PREPROCESSING, ids=lambda f: f"{f['resize_mode']}-{f['interpolation']}"
)
def test_an_open_clip_folder_brings_weights_scale_and_preprocessing(
    preprocess: dict[str, Any], tmp_path: Path
) -> None:
    theirs = write_open_clip_folder(tmp_path / "model", preprocess)
    loaded = load_towers(str(tmp_path / "model"), "", no_captions)
    assert loaded.spec == ImageSpec(
        32,
        preprocess["mean"],
        preprocess["std"],
        preprocess["interpolation"],
        preprocess["resize_mode"],
    )
    assert loaded.logit_scale == pytest.approx(33.0)
    close(
        encoder(loaded).encode_text(loaded.tokenize(CAPTIONS)),
        theirs.encode_text(loaded.tokenize(CAPTIONS), normalize=True),
    )
    fresh = load_towers(str(tmp_path / "model"), "none", no_captions)
    assert fresh.logit_scale is None
    assert not torch.equal(
        fresh.towers.model.visual.conv1.weight, loaded.towers.model.visual.conv1.weight
    )


def test_an_open_clip_folder_without_weights_is_not_evaluated_with_random_ones(
    tmp_path: Path,
) -> None:
    write_open_clip_folder(tmp_path / "model", PREPROCESSING[0])
    (tmp_path / "model" / "open_clip_model.safetensors").unlink()
    with pytest.raises(ValueError, match="model' with pretrained=''"):
        load_towers(str(tmp_path / "model"), "", no_captions)
    load_towers(str(tmp_path / "model"), "none", no_captions)


def test_open_clips_longest_resize_is_refused(tmp_path: Path) -> None:
    write_open_clip_folder(tmp_path / "model", {**PREPROCESSING[0], "resize_mode": "longest"})
    with pytest.raises(ValueError, match="model' resizes by 'longest'"):
        load_towers(str(tmp_path / "model"), "", no_captions)


# ---- transformers


@torch.no_grad()
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_hf_model_gives_the_librarys_features(kind: str, request: pytest.FixtureRequest) -> None:
    from transformers import AutoImageProcessor, AutoTokenizer

    folder, theirs = request.getfixturevalue(kind)
    loaded = load_towers(str(folder), "", no_captions)
    model = encoder(loaded)
    # transformers crops 47 to 32 from the 7th column, torchvision, and so OpenAI's and open_clip's
    # CLIP, from the 8th
    images = pictures([size for size in SIZES if size != (32, 47)])
    # transformers' default resizes tensors, a grey level off here and there from Pillow, which CLIP
    # was trained with
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    assert type(processor).__name__.endswith("Pil")
    expected = theirs.get_image_features(**processor(images, return_tensors="pt")).pooler_output
    close(model.encode_image(pixels(loaded.spec, images)), F.normalize(expected, dim=-1))
    unresized = pictures([(32, 32), (32, 32)])
    expected = theirs.get_image_features(
        **AutoImageProcessor.from_pretrained(folder)(unresized, return_tensors="pt")
    ).pooler_output
    close(model.encode_image(pixels(loaded.spec, unresized)), F.normalize(expected, dim=-1))
    length = theirs.config.text_config.max_position_embeddings
    tokens = AutoTokenizer.from_pretrained(folder)(
        CAPTIONS, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )
    # trained with its padding in sight; its own tokenizer makes no mask
    if kind == "siglip":
        tokens = {"input_ids": tokens["input_ids"]}
    close(
        model.encode_text(loaded.tokenize(CAPTIONS)),
        F.normalize(theirs.get_text_features(**tokens).pooler_output, dim=-1),
    )


@torch.no_grad()
def test_clips_padding_changes_nothing(clip: tuple[Path, Any]) -> None:
    from transformers import AutoTokenizer

    folder, theirs = clip
    loaded = load_towers(str(folder), "", no_captions)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    alone = [
        theirs.get_text_features(
            **tokenizer([c], return_tensors="pt", truncation=True, max_length=16)
        )
        for c in CAPTIONS
    ]
    expected = F.normalize(torch.cat([features.pooler_output for features in alone]), dim=-1)
    close(encoder(loaded).encode_text(loaded.tokenize(CAPTIONS)), expected)


def test_scale_and_bias_are_taken_over(clip: tuple[Path, Any], siglip: tuple[Path, Any]) -> None:
    config = Config.model_validate({"data": {"train": ["x"]}, "objective": {"name": "sigmoid"}})
    loaded = load_towers(str(clip[0]), "", no_captions)
    assert (loaded.logit_scale, loaded.logit_bias) == (pytest.approx(42.0), None)
    model = build.dual_encoder(config, loaded, build.run_context(config, loaded, None))
    assert model.logit_scale.exp().item() == pytest.approx(42.0)
    assert model.logit_bias.item() == pytest.approx(-math.log(255))
    loaded = load_towers(str(siglip[0]), "", no_captions)
    assert (loaded.logit_scale, loaded.logit_bias) == (pytest.approx(7.0), pytest.approx(-3.0))
    model = build.dual_encoder(config, loaded, build.run_context(config, loaded, None))
    assert (model.logit_scale.exp().item(), model.logit_bias.item()) == (
        pytest.approx(7.0),
        pytest.approx(-3.0),
    )


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_none_gives_fresh_weights_and_no_scale(kind: str, request: pytest.FixtureRequest) -> None:
    folder, theirs = request.getfixturevalue(kind)
    loaded = load_towers(str(folder), "none", no_captions)
    assert (loaded.logit_scale, loaded.logit_bias) == (None, None)
    name, trained = next(
        (n, p) for n, p in theirs.named_parameters() if n.endswith("q_proj.weight")
    )
    assert not torch.equal(loaded.towers.model.get_parameter(name), trained)
    assert torch.equal(
        load_towers(str(folder), "", no_captions).towers.model.get_parameter(name), trained
    )


def test_half_precision_files_are_read_as_float32(clip: tuple[Path, Any], tmp_path: Path) -> None:
    shutil.copytree(clip[0], tmp_path / "half")
    clip[1].half().save_pretrained(tmp_path / "half")
    clip[1].float()
    loaded = load_towers(str(tmp_path / "half"), "", no_captions)
    assert {p.dtype for p in loaded.towers.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("processor", "said"),
    [
        ({"do_center_crop": False}, "do_center_crop"),
        ({"do_normalize": False}, "do_normalize"),
        ({"do_resize": False}, "do_resize"),
        ({"rescale_factor": 1.0}, "1/255"),
        ({"resample": 0}, "resample"),
        ({"size": {"shortest_edge": 40}}, "size"),
        ({"crop_size": {"height": 32, "width": 16}}, "crop"),
    ],
)
def test_preprocessing_we_do_not_speak_is_refused(
    processor: dict[str, Any], said: str, clip: tuple[Path, Any], tmp_path: Path
) -> None:
    from transformers import CLIPImageProcessor

    shutil.copytree(clip[0], tmp_path / "odd")
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessor(**{**sizes, **processor}).save_pretrained(tmp_path / "odd")
    with pytest.raises(ValueError, match=f"odd: preprocessing .*{said}"):
        load_towers(str(tmp_path / "odd"), "", no_captions)


def test_a_processor_saved_whole_is_found(clip: tuple[Path, Any], tmp_path: Path) -> None:
    from transformers import CLIPImageProcessor, CLIPProcessor

    clip[1].save_pretrained(tmp_path)
    image = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=image, tokenizer=clip_tokenizer()).save_pretrained(tmp_path)
    assert not (tmp_path / "preprocessor_config.json").exists()
    loaded, plain = (load_towers(str(folder), "", no_captions) for folder in (tmp_path, clip[0]))
    assert loaded.spec == plain.spec
    assert torch.equal(loaded.tokenize(CAPTIONS), plain.tokenize(CAPTIONS))


# ---- training


def towers_of(kind: str, request: pytest.FixtureRequest) -> Loaded:
    if kind == "small":
        loaded = load_towers(
            str(write_small(request.getfixturevalue("tmp_path"))), "", lambda: CAPTIONS
        )
    elif kind == "open_clip":
        loaded = load_towers(str(request.getfixturevalue("open_clip_json")), "", no_captions)
    else:
        loaded = load_towers(str(request.getfixturevalue(kind)[0]), "", no_captions)
    return loaded


def write_small(folder: Path, **changes: Any) -> Path:
    path = folder / "towers.json"
    path.write_text(json.dumps({**TOWERS, **changes}))
    return path


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
@pytest.mark.parametrize("kind", ["small", "open_clip", "clip", "siglip"])
def test_every_trainable_parameter_gets_a_gradient(
    kind: str, name: str, request: pytest.FixtureRequest
) -> None:
    loaded = towers_of(kind, request)
    model = encoder(loaded, learn_bias=OBJECTIVES[name].bias is not None).train()
    images = pictures([(32, 32)] * 4)
    captions = ["a photo of a cat", "the dog", "small letter", "of the house"]
    pairs = Pairs(
        pixels(loaded.spec, images), loaded.tokenize(captions), torch.arange(4), torch.arange(4)
    )
    rows = model(pairs)
    assert rows.logit_scale.item() == pytest.approx(loaded.logit_scale or 10.0)
    torch.testing.assert_close(rows.image.norm(dim=1), torch.ones(4))
    OBJECTIVES[name].make(rows, world.gathered_columns(rows))["loss"].backward()
    without = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert without == set(), "DDP refuses parameters that nothing uses"
    assert model.logit_bias.requires_grad is (name == "sigmoid")
    assert (model.logit_bias.grad is not None) is (name == "sigmoid")
    # the library's own are gone
    assert sum("logit_" in n for n, _ in model.named_parameters()) == 2


def test_the_optimizer_keeps_the_scale_between_1_and_100_and_lets_it_come_back() -> None:
    for start, direction in ((100.0, -1.0), (1.0, 1.0)):
        config = Config.model_validate({"data": {"train": ["x"]}, "optim": {"lr": 0.5}})
        model = DualEncoder(
            SmallTowers(SmallConfig.model_validate(TOWERS)), ImageSpec(16), start, 0.0, False
        )
        # the loss below does not reach them
        model.towers.requires_grad_(False)
        optimizer = build.optimizer(config, model)
        bound = MAX_LOG_SCALE if start == 100 else 0.0
        for push, expected in ((direction, bound), (direction, bound), (-direction, None)):
            optimizer.zero_grad()
            # its gradient runs through what the loss is given
            loss = push * model(small_pairs()).logit_scale
            loss.backward()
            assert model.logit_scale.grad.abs() > 0.5, "killed at the bound"
            # Adam's mean first forgets the other way
            for _ in range(20 if expected is None else 1):
                optimizer.step()
            if expected is not None:
                assert model.logit_scale.item() == pytest.approx(expected, abs=1e-6)
            assert 1 - 1e-5 <= model(small_pairs()).logit_scale.item() <= 100 + 1e-4
        assert abs(model.logit_scale.item() - bound) > 0.1


def small_pairs() -> Pairs:
    images = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    return Pairs(images, torch.ones(2, 8, dtype=torch.int64), torch.arange(2), torch.arange(2))


# ---- files


@torch.no_grad()
@pytest.mark.parametrize("kind", ["small", "open_clip", "clip", "siglip"])
def test_saved_files_rebuild_the_same_model(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    loaded = towers_of(kind, request)
    loaded.spec = ImageSpec(**{**loaded.spec.__dict__, "mean": (0.1, 0.2, 0.3)})
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_model_files(loaded, folder)
    torch.manual_seed(99)
    again = rebuild(folder)
    assert (again.spec, again.logit_scale, again.logit_bias) == (loaded.spec, None, None)
    assert torch.equal(again.tokenize(CAPTIONS), loaded.tokenize(CAPTIONS))
    one = encoder(loaded)
    two = encoder(again)
    images = pixels(loaded.spec, pictures())
    tokens = loaded.tokenize(CAPTIONS)
    # weights come from elsewhere
    assert not torch.equal(two.encode_image(images), one.encode_image(images))
    two.load_state_dict(one.state_dict())
    assert torch.equal(two.encode_image(images), one.encode_image(images))
    assert torch.equal(two.encode_text(tokens), one.encode_text(tokens))
    second = tmp_path / "second"
    second.mkdir()
    save_model_files(again, second)
    # a continued run saves again
    third = rebuild(second)
    assert third.spec == loaded.spec
    assert torch.equal(third.tokenize(CAPTIONS), tokens)
    assert set(third.towers.state_dict()) == set(loaded.towers.state_dict())


def test_an_open_clip_model_with_a_hf_tokenizer_takes_it_along(tmp_path: Path) -> None:
    source = tmp_path / "tokenizer"
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    word_tokenizer().save_pretrained(source)
    text = {**OPEN_CLIP["text_cfg"], "hf_tokenizer_name": str(source), "vocab_size": 16}
    path = write_open_clip_json(tmp_path, "tiny-hf-tokenizer.json", text_cfg=text)
    loaded = load_towers(str(path), "", no_captions)
    assert loaded.tokenize(["a cat"])[0, :3].tolist() == [2, 5, 0]
    save_model_files(loaded, folder)
    shutil.rmtree(source)
    assert torch.equal(rebuild(folder).tokenize(CAPTIONS), loaded.tokenize(CAPTIONS))


# ---- names


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not JSON"),
        (b"\xff", "not JSON"),
        ("[1]", "no JSON object"),
        ("{}", "is no tower JSON"),
        ('{"kind": "smal"}', "is no tower JSON"),
        ('{"kind": "small", "embed_dims": 3}', "embed_dims"),
        ('{"kind": "small", "image": {"size": 33}}', "size=33"),
        ('{"kind": "small", "text": {"width": 10, "heads": 3}}', "width=10"),
        (json.dumps({**OPEN_CLIP, "nonsense": 1}), "nonsense"),
        (
            json.dumps({**OPEN_CLIP, "vision_cfg": {**OPEN_CLIP["vision_cfg"], "nonsense": 1}}),
            "nonsense",
        ),
        (
            json.dumps({**OPEN_CLIP, "vision_cfg": {**OPEN_CLIP["vision_cfg"], "width": 33}}),
            "divisible",
        ),
        (json.dumps({**OPEN_CLIP, "vision_cfg": 3}), "odd-towers"),
    ],
)
def test_a_broken_tower_json_is_refused_by_name(
    content: str | bytes, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "odd-towers.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"(?s)odd-towers") as caught:
        load_towers(str(path), "", lambda: CAPTIONS)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "nothing-of-that-name",
        "no/such-model",
        "nowhere/towers.json",
        "open_clip:nothing",
        "hf:nothing",
        "open_clip:local-dir:nothing",
    ],
)
def test_an_unknown_name_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=name.rpartition(":")[2]):
        load_towers(name, "", no_captions)


def test_an_unknown_weight_tag_is_refused_by_name(open_clip_json: Path) -> None:
    with pytest.raises(ValueError, match="pretrained='no-such-tag'"):
        load_towers(str(open_clip_json), "no-such-tag", no_captions)


def break_bert(folder: Path) -> None:
    from transformers import BertConfig, BertModel

    shutil.rmtree(folder)
    BertModel(BertConfig(**SIDES, vocab_size=20)).save_pretrained(folder)


BREAKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "another model": (break_bert, "'bert' model"),
    "an empty folder": (
        lambda folder: [file.unlink() for file in folder.iterdir()],
        "Unrecognized model",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    "cut weights": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 100),
        "header",
    ),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer"),
    "no processor": (lambda folder: (folder / "preprocessor_config.json").unlink(), "broken"),
    "a broken config": (
        lambda folder: (folder / "config.json").write_text("{"),
        "not a valid JSON",
    ),
}


@pytest.mark.parametrize("what", BREAKS)
def test_a_broken_hf_folder_is_refused_by_name(
    what: str, clip: tuple[Path, Any], tmp_path: Path
) -> None:
    breaks, said = BREAKS[what]
    folder = tmp_path / "broken"
    shutil.copytree(clip[0], folder)
    breaks(folder)
    with pytest.raises(ValueError, match="broken") as caught:
        load_towers(str(folder), "", no_captions)
    assert said in str(caught.value)


# ---- our own words


def trained(captions: list[str], **options: Any) -> WordTokenizer:
    return WordTokenizer.train(
        captions, SmallText(**{"context_length": 4, "vocab_size": 64, **options})
    )


def test_the_vocabulary_depends_on_the_captions_and_not_on_their_order() -> None:
    """Most frequent first, equally frequent words by the alphabet: so with a vocabulary too small
    for all, too.
    """
    words = [f"w{i}" for i in range(100)]
    captions = [*words, "often often", "often"]
    expected = trained(captions, vocab_size=16).to_json()
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(captions))
        assert trained([captions[i] for i in order], vocab_size=16).to_json() == expected
    vocabulary = json.loads(expected)["model"]["vocab"]
    assert vocabulary == {
        "[PAD]": 0,
        "[UNK]": 1,
        "often": 2,
        **{w: i for i, w in enumerate(sorted(words)[:13], start=3)},
    }


def test_captions_are_padded_cut_and_folded() -> None:
    tokenizer = trained(["the cat", "the dog", "the"])
    the = 2
    cat = 3
    dog = 4
    found = tokenizer(["the cat", "THE  Dog\tthe\u00a0ﬁsh cat", "\uff54\uff48\uff45", "the, cat"])
    assert found.dtype == torch.int64
    assert found.tolist() == [
        [the, cat, 0, 0],
        [the, dog, the, 1],
        [the, 0, 0, 0],
        [the, 1, cat, 0],
    ]


def test_a_caption_of_nothing_is_one_unknown_word() -> None:
    tokenizer = trained(["the cat"])
    assert tokenizer(["", "   ", "\t\n"]).tolist() == [[1, 0, 0, 0]] * 3
    assert tokenizer(["!?", "🐈", "[PAD]"])[:, 0].tolist() == [1, 1, 1]
    towers = SmallTowers(
        SmallConfig.model_validate({**TOWERS, "text": {**TOWERS["text"], "context_length": 4}})
    ).eval()
    assert torch.isfinite(towers.text(tokenizer(["", "!?", "the cat"]))).all()


def test_the_text_tower_does_not_see_padding_or_neighbours() -> None:
    torch.manual_seed(0)
    towers = SmallTowers(SmallConfig.model_validate(TOWERS)).eval()
    ids = torch.tensor([[5, 6, 0, 0, 0, 0, 0, 0], [5, 6, 7, 8, 9, 10, 11, 12]])
    with torch.no_grad():
        both = towers.text(ids)
        torch.testing.assert_close(both[:1], towers.text(ids[:1]))
        # what padding looks like
        towers.words.weight[0] = 100.0
        towers.positions[2:] += 1.0
        changed = towers.text(ids)
    torch.testing.assert_close(changed[0], both[0])
    assert not torch.allclose(changed[1], both[1])
