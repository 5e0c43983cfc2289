"""Tests of exported folders: both libraries load them and see, read and score alike; cards run;
nothing by halves.

Seen to fail when: SigLIP's padding is masked, its captions keep their case or are not cut, or its
tokenizer is not named for open_clip; LoRA is not merged; the scale, or a learned bias, is not the
trained one, or lands in a CLIPModel; squash becomes a crop; features or preprocessing that differ
pass the comparison; a full folder is written into, or a half one stays; small towers, heads, or
adapters without their other trained weights or for a base of this machine pass; an adapter's
scale.json has no log, or its card does not set it; SigLIP's card says softmax; a cell's `|` or
backslash ends the table's; paths, passwords, signed queries or tokens stay; results of another step
are told; a push does not ask first, is public though asked to be private, or fails without saying
why.
"""

import contextlib
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file
from torch import Tensor

from clipsmall import train
from clipsmall.data.preprocess import ImageSpec
from clipsmall.export import __main__ as export
from clipsmall.export import card, folder
from clipsmall.model.saved import load_model
from tests.local_clip import local_clip, local_siglip, timm_siglip
from tests.model.test_towers import (
    OPEN_CLIP,
    pictures,
    pixels,
    word_tokenizer,
    write_open_clip_folder,
    write_open_clip_json,
)
from tests.shards_for_tests import config, write_glyphs

CAPTIONS = [
    "a photo of a cat",
    "The DOG's, of the house!!!",
    "",
    "é 猫 🐈 👨‍👩‍👧",
    "a red heart " * 60,
]
# transformers crops an odd rest differently (tests/model/test_towers.py)
SIZES = [(32, 32), (64, 32), (101, 60), (60, 102)]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """clip, siglip: HF folders; run: a CLIP trained by softmax, evaluated; lora: by sigmoid, with
    adapters.
    """
    folder = tmp_path_factory.mktemp("export")
    write_glyphs(folder / "glyphs")
    local_clip(folder / "clip")
    timm_siglip()
    local_siglip(folder / "siglip")
    common = {
        "model.name": folder / "clip",
        "optim.pairs": 96,
        "optim.warmup_pairs": 32,
        "optim.lr": 1e-3,
    }
    test = f"[{{name: 'a|b\\c', data: {folder / 'glyphs' / 'test'}}}]"
    assert (
        train.main(
            config(folder / "glyphs", folder / "run", **common, **{"evaluate.retrieval": test})
        )
        == 0
    )
    tuned = {"tune.image": "lora", "tune.text": "lora", "objective": "sigmoid"}
    assert train.main(config(folder / "glyphs", folder / "lora", **common, **tuned)) == 0
    return folder


def run(*words: Any) -> int:
    return export.main([str(word) for word in words])


def refused(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        run(*words)
    assert left.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    return lines[0]


@torch.no_grad()
def ours(name: Path) -> tuple[Any, Any, Tensor, Tensor]:
    model, loaded = load_model(str(name))
    model.eval()
    images = pictures(SIZES)
    return (
        model,
        loaded,
        model.encode_image(pixels(loaded.spec, images)),
        model.encode_text(loaded.tokenize(CAPTIONS)),
    )


def close(found: Tensor, expected: Tensor) -> None:
    assert expected.std(dim=0).max() > 1e-3, (
        "features that do not depend on the input prove nothing"
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def seen_by_transformers(folder: Path) -> tuple[Any, Tensor, Tensor, Tensor]:
    """Model, unit features of images and captions, pixels; as a user would, with AutoProcessor."""
    from transformers import AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer

    model = AutoModel.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    tokens = processor(text=CAPTIONS, padding="max_length", truncation=True, return_tensors="pt")
    auto = AutoTokenizer.from_pretrained(folder)(
        CAPTIONS, padding="max_length", truncation=True, return_tensors="pt"
    )
    assert torch.equal(auto["input_ids"], tokens["input_ids"])
    seen = AutoImageProcessor.from_pretrained(folder, backend="pil")(
        pictures(SIZES), return_tensors="pt"
    )["pixel_values"]
    default = processor(images=pictures(SIZES), return_tensors="pt")["pixel_values"]
    # it resizes tensors: a grey level off here and there
    assert (default - seen).abs().mean() < 0.02
    image = model.get_image_features(pixel_values=seen).pooler_output
    return (
        model,
        F.normalize(image, dim=-1),
        F.normalize(model.get_text_features(**tokens).pooler_output, dim=-1),
        seen,
    )


@torch.no_grad()
def seen_by_open_clip(folder: Path) -> tuple[Any, Tensor, Tensor, Tensor]:
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval()
    seen = torch.stack([preprocess(image) for image in pictures(SIZES)])
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(CAPTIONS)
    return (
        model,
        model.encode_image(seen, normalize=True),
        model.encode_text(tokens, normalize=True),
        seen,
    )


# ---- both libraries


@pytest.mark.parametrize("source", ["clip", "run", "lora", "siglip"])
def test_both_libraries_load_the_folder(source: str, places: Path, tmp_path: Path) -> None:
    assert run(places / source, "--to", tmp_path / "out") == 0
    model, _, image, text = ours(places / source)
    theirs, their_image, their_text, their_pixels = seen_by_transformers(tmp_path / "out")
    kind = "Siglip" if source == "siglip" else "CLIP"
    assert type(theirs).__name__ == f"{kind}Model"
    close(their_image, image)
    close(their_text, text)
    assert theirs.logit_scale.item() == model.logit_scale.item()
    opened, open_image, open_text, open_pixels = seen_by_open_clip(tmp_path / "out")
    close(open_image, image)
    close(open_text, text)
    close(open_pixels, their_pixels)
    assert opened.logit_scale.item() == model.logit_scale.item()
    assert {"siglip": -3.0, "lora": model.logit_bias.item()}.get(source) == (
        opened.logit_bias.item() if opened.logit_bias is not None else None
    )
    if source == "siglip":
        assert theirs.logit_bias.item() == -3.0
    again, _, same_image, same_text = ours(tmp_path / "out")
    close(same_image, image)
    close(same_text, text)
    assert again.logit_scale.item() == pytest.approx(model.logit_scale.item(), abs=1e-6)
    # this test runs offline
    assert "local_files_only" not in (tmp_path / "out" / "tokenizer_config.json").read_text()
    for path in (tmp_path / "out").iterdir():
        assert path.suffix == ".safetensors" or str(tmp_path) not in path.read_text(), path


def test_lora_is_merged(places: Path, tmp_path: Path) -> None:
    """What is exported is what was tuned, and not its base; no trace of an adapter is left."""
    run(places / "lora", "--to", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    base = load_file(places / "clip" / "model.safetensors")
    assert tensors.keys() == base.keys()
    changed = {name for name in base if not torch.equal(tensors[name], base[name])}
    assert {name.split(".")[-2] for name in changed - {"logit_scale"}} == {
        "fc1",
        "fc2",
        "q_proj",
        "k_proj",
        "v_proj",
        "out_proj",
    }
    bias = load_model(str(places / "lora"))[0].logit_bias.item()
    assert (
        f"has no logit_bias: add {bias:.6g} to its logits"
        in (tmp_path / "out" / "README.md").read_text()
    )


def test_an_open_clip_model_for_transformers(tmp_path: Path) -> None:
    path = write_open_clip_json(tmp_path, "tiny-export.json", quick_gelu=True, init_logit_bias=-2)
    torch.manual_seed(0)
    run(path, "--pretrained", "none", "--to", tmp_path / "out")
    model, image, text, seen = seen_by_transformers(tmp_path / "out")
    opened, open_image, open_text, open_pixels = seen_by_open_clip(tmp_path / "out")
    close(image, open_image)
    close(text, open_text)
    close(seen, open_pixels)
    assert model.config.text_config.hidden_act == "quick_gelu"
    assert model.logit_scale.item() == opened.logit_scale.item()


def write_open_siglip(folder: Path) -> Path:
    """As of the hub: a tokenizer of HF, before which open_clip takes out punctuation and upper
    case.
    """
    vision = {
        "image_size": 32,
        "timm_model_name": timm_siglip(),
        "timm_pool": "map",
        "timm_proj": "none",
    }
    text = {
        "context_length": 12,
        "vocab_size": 10,
        "width": 48,
        "heads": 3,
        "layers": 1,
        "no_causal_mask": True,
        "pool_type": "last",
        "proj_bias": True,
        "hf_tokenizer_name": "x",
        "norm_kwargs": {"eps": 1e-6},
        "tokenizer_kwargs": {"clean": "canonicalize"},
    }
    cfg = {
        "embed_dim": 64,
        "init_logit_bias": -7,
        "custom_text": True,
        "vision_cfg": vision,
        "text_cfg": text,
    }
    from open_clip.model import CustomTextCLIP
    from safetensors.torch import save_file

    folder.mkdir()
    torch.manual_seed(0)
    model = CustomTextCLIP(**{key: value for key, value in cfg.items() if key != "custom_text"})
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    both = {
        "model_cfg": cfg,
        "preprocess_cfg": {"size": 32, "resize_mode": "squash", "mean": [0.5] * 3},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(both))
    word_tokenizer().save_pretrained(folder)
    return folder


def test_an_open_clip_siglip_for_transformers(tmp_path: Path) -> None:
    run(write_open_siglip(tmp_path / "in"), "--to", tmp_path / "out")
    model, image, text, seen = seen_by_transformers(tmp_path / "out")
    opened, open_image, open_text, open_pixels = seen_by_open_clip(tmp_path / "in")
    close(image, open_image)
    close(text, open_text)
    close(seen, open_pixels)
    assert (model.logit_scale.item(), model.logit_bias.item()) == (
        opened.logit_scale.item(),
        opened.logit_bias.item(),
    )
    _, again_image, again_text, _ = seen_by_open_clip(tmp_path / "out")
    assert torch.equal(again_image, open_image)
    assert torch.equal(again_text, open_text)


@pytest.mark.parametrize("case", ["resnet", "siglip"])
def test_what_one_library_has_is_written_for_it(
    case: str, places: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if case == "resnet":
        vision = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32}
        source = write_open_clip_json(tmp_path, "tiny-resnet.json", vision_cfg=vision)
        reason = "ResNet"
    else:
        source = local_siglip(tmp_path / "siglip", patch_size=4)
        reason = "timm has none of this size"
    run(source, *["--pretrained", "none"] * (case == "resnet"), "--to", tmp_path / "out")
    assert reason in capsys.readouterr().err
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "open_clip_config.json"} & written == (
        {"open_clip_config.json"} if case == "resnet" else {"config.json"}
    )
    told = (tmp_path / "out" / "README.md").read_text()
    assert reason in told
    assert len(snippets(told)) == 2


# ---- what is refused


def test_what_no_library_has_is_refused(
    places: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {"optim.pairs": 32, "optim.warmup_pairs": 0}
    assert train.main(config(places / "glyphs", tmp_path / "small", **words)) == 0
    assert "small towers are in neither" in refused(
        capsys, tmp_path / "small", "--to", tmp_path / "out"
    )
    words |= {"objective": "simsiam", "model.name": places / "clip"}
    assert train.main(config(places / "glyphs", tmp_path / "through", **words)) == 0
    assert "retrieves through its head" in refused(
        capsys, tmp_path / "through", "--to", tmp_path / "out"
    )
    coca = {
        "attentional_pool": True,
        "attn_pooler_heads": 2,
        "output_tokens": True,
        **OPEN_CLIP["vision_cfg"],
    }
    text = {"embed_cls": True, "output_tokens": True, **OPEN_CLIP["text_cfg"]}
    path = write_open_clip_json(
        tmp_path,
        "tiny-coca.json",
        vision_cfg=coca,
        text_cfg=text,
        multimodal_cfg=OPEN_CLIP["text_cfg"],
        custom_text=True,
    )
    assert "no weights named, its towers would be random" in refused(
        capsys, path, "--to", tmp_path / "out"
    )
    assert "captioner" in refused(capsys, path, "--pretrained", "none", "--to", tmp_path / "out")
    path.unlink()
    assert "no complete checkpoint" in refused(
        capsys, make(tmp_path / "e" / "checkpoints").parent, "--to", tmp_path / "out"
    )
    (make(tmp_path / "through" / "eval") / "cut.json").write_text('{"dataset": ')
    assert "cut.json: not JSON" in refused(capsys, tmp_path / "through", "--to", tmp_path / "out")
    assert "is no tower JSON" in refused(capsys, "nonsense", "--to", tmp_path / "out")
    # no out, no .tmp
    assert {path.name for path in tmp_path.iterdir()} == {
        "small",
        "through",
        "e",
    }


def make(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def test_a_full_folder_is_left_alone(
    places: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (make(tmp_path / "out") / "mine").write_text("mine")
    assert "is there already" in refused(capsys, places / "clip", "--to", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    (tmp_path / "out" / "mine").unlink()
    # an empty one may be there
    assert run(places / "clip", "--to", tmp_path / "out") == 0
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode & 0o044, "others may read it"


@pytest.mark.parametrize("breaks", ["weights", "tokens", "pixels"])
def test_a_wrong_folder_never_gets_its_name(
    breaks: str,
    places: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was written is loaded again and compared: a library's change of mind shows here, not at
    the user's.
    """
    if breaks == "weights":
        real = folder.to_open_clip

        def wrong(*given: Any) -> Any:
            made, tensors = real(*given)
            tensors["ln_final.bias"] += 0.01
            return made, tensors

        monkeypatch.setattr(folder, "to_open_clip", wrong)
    elif breaks == "tokens":
        monkeypatch.setattr("open_clip.tokenizer.SimpleTokenizer.encode", lambda self, text: [320])
    else:
        grey = ImageSpec(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        real_processor = folder.image_processor
        monkeypatch.setattr(folder, "image_processor", lambda spec: real_processor(grey))
    assert "would load another model" in refused(capsys, places / "clip", "--to", tmp_path / "out")
    assert not list(tmp_path.iterdir())


# ---- adapters


def test_an_adapter_alone(places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(places / "lora", "--to", tmp_path / "adapter", "--adapter")
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "scale.json", "README.md"}
    assert all(
        "lora_" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    )
    model, _, image, _ = ours(places / "lora")
    scale = json.loads((tmp_path / "adapter" / "scale.json").read_text())
    assert scale["log_logit_scale"] == model.logit_scale.item()
    assert scale["logit_scale"] == pytest.approx(model.logit_scale.exp().item())
    assert scale["logit_bias"] == model.logit_bias.item() != 0
    told = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == str(places / "clip")
    front = front_matter(tmp_path / "adapter")
    assert front["library_name"] == "peft"
    (code,) = snippets((tmp_path / "adapter" / "README.md").read_text())
    variables = executed(code, tmp_path, monkeypatch)
    tuned = variables["model"]
    assert tuned.logit_scale.item() == model.logit_scale.item()
    with torch.no_grad():
        pixels_seen = (
            pixels(load_model(str(places / "clip"))[1].spec, pictures(SIZES)).float() - model.mean
        ) / model.std
        close(
            F.normalize(tuned.get_image_features(pixel_values=pixels_seen).pooler_output, dim=-1),
            image,
        )


def test_lora_on_a_model_of_open_clip(
    places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = {"size": 32, "interpolation": "bicubic", "resize_mode": "shortest"}
    write_open_clip_folder(tmp_path / "base", looks)
    words = {
        "optim.pairs": 96,
        "optim.warmup_pairs": 0,
        "model.name": tmp_path / "base",
        "optim.lr": 1e-2,
    }
    tuned = {"tune.image": "lora", "tune.text": "lora", "objective": "sigmoid"}
    assert train.main(config(places / "glyphs", tmp_path / "run", **words, **tuned)) == 0
    run(tmp_path / "run", "--to", tmp_path / "merged")
    model, _, image, text = ours(tmp_path / "run")
    for library in (seen_by_transformers, seen_by_open_clip):
        theirs, their_image, their_text, _ = library(tmp_path / "merged")
        close(their_image, image)
        close(their_text, text)
    # learned; its base has none
    assert theirs.logit_bias.item() == model.logit_bias.item() != 0
    run(tmp_path / "run", "--to", tmp_path / "adapter", "--adapter")
    (code,) = snippets((tmp_path / "adapter" / "README.md").read_text())
    adapted = executed(code, tmp_path, monkeypatch)["model"]
    with torch.no_grad():
        close(
            adapted.encode_text(
                load_model(str(tmp_path / "run"))[1].tokenize(CAPTIONS), normalize=True
            ),
            text,
        )
    assert adapted.logit_scale.item() == model.logit_scale.item()


def test_an_adapter_that_would_lose_something_is_refused(
    places: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("--to", tmp_path / "out", "--adapter")
    assert "without LoRA" in refused(capsys, places / "run", *out)
    words = {
        "optim.pairs": 32,
        "optim.warmup_pairs": 0,
        "model.name": places / "clip",
        "tune.image": "lora",
    }
    assert (
        train.main(config(places / "glyphs", tmp_path / "both", **words, **{"tune.text": 1})) == 0
    )
    assert re.search(
        r"\d+ tensors beside the adapters .*would be lost", refused(capsys, tmp_path / "both", *out)
    )
    # which has both
    run(tmp_path / "both", "--to", tmp_path / "merged")
    assert (
        train.main(
            config(places / "glyphs", tmp_path / "new", **words, **{"model.pretrained": "none"})
        )
        == 0
    )
    message = refused(capsys, tmp_path / "new", *out)
    assert "would be lost" in message or "fresh weights" in message
    api = FakeHub()
    with pytest.raises(SystemExit):
        export.main([str(places / "lora"), *map(str, out), "--push", "me/adapter"], api)
    assert "nobody else can load" in capsys.readouterr().err
    assert api.calls == ["whoami"]


# ---- cards


def front_matter(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
    return found


def snippets(told: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", told, re.DOTALL)


def executed(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A snippet's variables, and as `printed` what it says; run beside a photo.jpg."""
    monkeypatch.chdir(folder)
    pictures([(32, 32)])[0].save("photo.jpg", quality=95)
    variables: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(code, "README.md", "exec"), variables)
    return variables | {"printed": out.getvalue()}


@pytest.mark.parametrize("source", ["run", "siglip"])
def test_a_cards_snippets_run_and_agree(
    source: str, places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(places / source, "--to", tmp_path / "my model")
    found = [
        executed(code, tmp_path, monkeypatch)
        for code in snippets((tmp_path / "my model" / "README.md").read_text())
    ]
    assert len(found) == 3
    bias = -3.0 if source == "siglip" else 0.0
    first = found[0]["logits"] - bias
    assert first.shape == (1, 2)
    assert abs(first[0, 0] - first[0, 1]) > 1e-3
    for each in found[1:]:
        torch.testing.assert_close(each["logits"], first, rtol=0, atol=1e-3)
    chances = first.add(bias).sigmoid() if source == "siglip" else first.softmax(-1)
    assert f"'a photo of a cat': {chances[0, 0].item():.3f}"[:-1] in found[0]["printed"]


def test_a_card_tells_the_run(places: Path, tmp_path: Path) -> None:
    run(places / "run", "--to", tmp_path / "out", "--licence", "apache-2.0", "--name", "My model")
    told = (tmp_path / "out" / "README.md").read_text()
    front = front_matter(tmp_path / "out")
    assert front == {
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["clip", "clipsmall", "transformers", "open_clip"],
    }
    assert "# My model\n" in told
    assert "| objective | softmax |" in told
    assert "| pairs seen | 96 |" in told
    assert "| data | …/glyphs/train |" in told
    (cell,) = [json.loads(path.read_text()) for path in (places / "run" / "eval").glob("*.json")]
    value = cell["metrics"]["text_retrieval_recall@5"]
    chance = cell["chance"]["text_retrieval_recall@5"]
    row = rf"| a\|b\\c | text_retrieval_recall@5 | {value:.2%} | {chance:.2%} | "
    assert f"{row}60 images, 60 captions |" in told
    assert str(places) not in told
    assert (
        yaml.safe_load(re.findall(r"```yaml\n(.*?)```", told, re.DOTALL)[0])["optim"]["lr"] == 1e-3
    )
    assert "torch: " in told


def test_results_of_another_step_are_not_told(places: Path, tmp_path: Path) -> None:
    checkpoint = sorted((places / "run" / "checkpoints").iterdir())[-1]
    run(checkpoint, "--to", tmp_path / "out")
    assert "## Results" in (tmp_path / "out" / "README.md").read_text()
    later = tmp_path / "later"
    later.mkdir()
    for path in ("run.yaml", "env.json", "eval", "checkpoints"):
        (later / path).symlink_to(places / "run" / path)
    (later / "metrics.jsonl").write_text('{"step": 99, "acc": 1}\n')
    assert "cells" not in export.find_run(str(later))[1]


def test_a_card_keeps_secrets() -> None:
    told = card.scrubbed(
        "s3://key:secret@host/x https://h/a.tar?X-Amz-Signature=abc&b=2, "
        "hf_abcdefghijklmnopqrstuv end"
    )
    assert told == "s3://host/x https://h/a.tar, … end"
    assert card.shown("/home/me/secret/data/x") == "…/data/x"
    assert card.shown("~/data/x/y") == "…/x/y"
    assert card.shown("hf:/home/me/base/x") == "hf:…/base/x"
    assert card.shown("openai/clip-vit-base-patch32") == "openai/clip-vit-base-patch32"


def test_a_card_names_its_base() -> None:
    where = card.usage.Where("me/x", True, "clip", ["peft", "transformers"], "abc123")
    made = card.Card("x", where, "", 20.0, None, "openai/clip-vit-base-patch32")
    told = card.card_text(made)
    assert yaml.safe_load(told.split("---\n")[1])["base_model"] == "openai/clip-vit-base-patch32"
    assert 'from_pretrained("openai/clip-vit-base-patch32", revision="abc123")' in told
    assert 'hf_hub_download("me/x", "scale.json")' in told
    compile(snippets(told)[0], "README.md", "exec")
    where = card.usage.Where("me/x", True, "clip", ["open_clip"])
    told = card.card_text(card.Card("x", where, "", 20.0, None, "RN50", "openai"))
    assert "base_model" not in told
    assert 'create_model_and_transforms("hf-hub:me/x")' in told
    assert 'load_model("open_clip:hf-hub:me/x")' in told


# ---- the hub


class FakeHub:
    """Notes what is asked of it; raises `error` at the call named `at`."""

    def __init__(self, at: str = "", error: Exception | None = None, private: bool = True) -> None:
        self.at = at
        self.error = error
        self.private = private
        self.calls: list[str] = []
        self.given: dict[str, Any] = {}

    def _note(self, name: str, **given: Any) -> None:
        self.calls.append(name)
        self.given |= given
        if name == self.at and self.error:
            raise self.error

    def whoami(self) -> None:
        self._note("whoami")

    def create_repo(self, repo: str, private: bool, exist_ok: bool) -> None:
        self._note("create_repo", repo=repo, asked_private=private)

    def repo_info(self, repo: str) -> Any:
        self._note("repo_info")
        return SimpleNamespace(private=self.private)

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> None:
        self._note("upload_folder", files={path.name for path in Path(folder_path).iterdir()})


def test_a_push_uploads_the_folder(
    places: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    api = FakeHub()
    words = [str(places / "siglip"), "--to", str(tmp_path / "out"), "--push", "me/it", "--private"]
    assert export.main(words, api) == 0
    assert api.calls == ["whoami", "create_repo", "repo_info", "upload_folder"]
    assert (api.given["repo"], api.given["asked_private"]) == ("me/it", True)
    assert {
        "README.md",
        "config.json",
        "model.safetensors",
        "open_clip_config.json",
        "tokenizer.json",
    } <= api.given["files"]
    assert "https://huggingface.co/me/it" in capsys.readouterr().out
    told = (tmp_path / "out" / "README.md").read_text()
    assert 'AutoModel.from_pretrained("me/it")' in told
    assert '"hf-hub:me/it"' in told
    cfg = json.loads((tmp_path / "out" / "open_clip_config.json").read_text())["model_cfg"]
    # open_clip reads it from there for hf-hub: names
    assert cfg["text_cfg"]["hf_tokenizer_name"] == "me/it"


class Refusal(OSError):
    def __init__(self, status: int) -> None:
        super().__init__(f"{status} from\nthe hub")
        self.response = SimpleNamespace(status_code=status)


def hub_errors() -> list[tuple[str, Exception, str]]:
    from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

    return [
        (
            "whoami",
            LocalTokenNotFoundError("no token"),
            "not logged in; run `hf auth login`, or set HF_TOKEN",
        ),
        ("whoami", OfflineModeIsEnabled("offline mode is enabled"), "offline mode is enabled"),
        ("whoami", RuntimeError("name resolution failed"), "name resolution failed"),
        ("create_repo", Refusal(403), "403 from the hub; this account may not write there"),
        ("upload_folder", Refusal(401), "401 from the hub; run `hf auth login`"),
    ]


@pytest.mark.parametrize("case", range(5))
def test_a_push_that_fails_says_why(
    case: int, places: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at, error, message = hub_errors()[case]
    with pytest.raises(SystemExit) as left:
        export.main(
            [str(places / "siglip"), "--to", str(tmp_path / "out"), "--push", "me/it"],
            FakeHub(at, error),
        )
    assert left.value.code == 2
    # which is asked before the work
    done = at != "whoami"
    later = (
        f"; the folder is complete, so `hf upload me/it {tmp_path / 'out'}` is all that is left"
        if done
        else ""
    )
    assert f"error: --push me/it: {message}{later}\n" in capsys.readouterr().err
    assert (tmp_path / "out").exists() == done


def test_a_push_goes_where_it_was_meant(
    places: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "give ORG/NAME" in refused(
        capsys, places / "siglip", "--to", tmp_path / "a", "--push", "name"
    )
    api = FakeHub(private=False)
    with pytest.raises(SystemExit):
        export.main(
            [str(places / "siglip"), "--to", str(tmp_path / "b"), "--push", "me/it", "--private"],
            api,
        )
    assert "there already and public" in capsys.readouterr().err
    assert "upload_folder" not in api.calls
