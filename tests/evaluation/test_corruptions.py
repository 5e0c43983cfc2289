"""Tests of corruptions: the same every time, worse with severity, and met by the model before its
own preprocessing.

Seen to fail when: dice depend on the moment; a strength of one table is out of order; large
pictures are not made small first; corruption comes after the model's own resizing, or not at all;
robustness measures clean pictures again; all pictures get the same dice; strengths in between lie
on another line; the probe is learned anew for each corruption.
"""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipsmall.data import open_catalog
from clipsmall.evaluation.corruptions import COMMON, FAMILIES, SEVERITIES, Corruption, strength
from clipsmall.evaluation.distortions import (
    brightness,
    contrast,
    defocus_blur,
    gaussian_noise,
    impulse_noise,
    saturate,
)
from clipsmall.evaluation.features import Encoder
from clipsmall.evaluation.sets import open_set
from clipsmall.evaluation.suite import TaskRequest, measure, option_values
from clipsmall.evaluation.tasks import linear_probe
from clipsmall.evaluation.tasks.robustness import robustness
from clipsmall.evaluation.view import DataView
from tests.evaluation.test_evaluation import COLOURS, small_encoder, write_pictures


def scene(width: int, height: int, seed: int = 0) -> Image.Image:
    """Soft noise with sharp discs."""
    random = np.random.default_rng(seed)
    soft = Image.fromarray(random.integers(40, 216, (5, 5, 3), dtype=np.uint8)).resize(
        (width, height), 3
    )
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    pixels = np.asarray(soft).copy()
    for _ in range(6):
        cx, cy, radius = *random.random(2), random.uniform(0.05, 0.2)
        pixels[(x - cx) ** 2 + (y - cy) ** 2 < radius**2] = random.integers(0, 256, 3)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("side", [32, 64, 224])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_corruption_is_always_the_same_and_worse_with_severity(name: str, side: int) -> None:
    scenes = [scene(side, side + side // 4, seed) for seed in range(3)]
    distances = []
    for severity in SEVERITIES:
        change = Corruption(name, severity, side)
        found = []
        for number, image in enumerate(scenes):
            changed = change(image, number)
            assert changed.size == image.size
            assert changed.mode == "RGB"
            assert (
                changed.tobytes()
                == Corruption(name, severity, side)(image.copy(), number).tobytes()
            )
            found.append(np.abs(np.asarray(changed, dtype=float) - np.asarray(image)).mean())
        distances.append(np.mean(found))
    assert distances == sorted(distances)
    # of 255
    assert distances[0] > 0.3
    assert min(np.diff(distances)) > 0.02


@pytest.mark.parametrize(
    "name", ["gaussian_noise", "snow", "motion_blur", "elastic_transform", "glass_blur"]
)
def test_dice_are_thrown_anew_for_each_picture_and_family(name: str) -> None:
    image = scene(48, 48)
    change = Corruption(name, 3, 48)
    assert change(image, 1).tobytes() != change(image, 2).tobytes()
    # any number a pair may have
    assert change(image, 2**62).tobytes() != change(image, -1).tobytes()


def test_the_tables_are_those_of_the_benchmark() -> None:
    assert len(FAMILIES) == 19
    assert COMMON == (
        "gaussian_noise",
        "shot_noise",
        "impulse_noise",
        "defocus_blur",
        "glass_blur",
        "motion_blur",
        "zoom_blur",
        "snow",
        "frost",
        "fog",
        "brightness",
        "contrast",
        "elastic_transform",
        "pixelate",
        "jpeg_compression",
    )
    for name, (_, small, large) in FAMILIES.items():
        assert list(small) == sorted(set(small)), name
        assert list(large) == sorted(set(large)), name
    assert strength("gaussian_noise", 5, 32) == strength("gaussian_noise", 5, 16) == 0.10
    assert strength("gaussian_noise", 5, 224) == strength("gaussian_noise", 5, 1000) == 0.38
    middle = round((32 * 224) ** 0.5)
    assert strength("gaussian_noise", 5, middle) == pytest.approx(0.24, abs=0.002)


def test_distortions_do_what_they_say() -> None:
    random = np.random.default_rng(0)
    grey = np.full((200, 200, 3), 0.5)
    x = np.asarray(scene(50, 40), dtype=float) / 255
    assert np.std(gaussian_noise(grey, 0.1, random) - grey) == pytest.approx(0.1, rel=0.02)
    hit = impulse_noise(grey, 0.2, random)
    assert (hit == 1).mean() == pytest.approx(0.1, abs=0.01)
    assert (hit == 0).mean() == pytest.approx(0.1, abs=0.01)
    assert np.allclose(contrast(x, 0.7, random).std(axis=(0, 1)), 0.3 * x.std(axis=(0, 1)))
    assert np.allclose(contrast(x, 0.7, random).mean(axis=(0, 1)), x.mean(axis=(0, 1)))
    assert np.allclose(defocus_blur(grey, 3.3, random), grey)
    point = np.zeros((21, 21, 3))
    point[10, 10] = 1
    disc = defocus_blur(point, 4.0, random)[..., 0]
    assert (disc > 1e-9).sum() == pytest.approx(np.pi * 4**2, rel=0.5)
    assert disc.sum() == pytest.approx(1)
    lighter = brightness(x, 0.1, random)
    assert np.allclose(lighter.max(axis=2), np.clip(x.max(axis=2) + 0.1, 0, 1))
    assert np.allclose(saturate(x, 0.5, random).max(axis=2), x.max(axis=2))
    assert np.allclose(saturate(grey, 3.0, random), grey)


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (17, 2)])
@pytest.mark.parametrize("name", FAMILIES)
def test_odd_sizes_are_no_accident(name: str, size: tuple[int, int]) -> None:
    assert Corruption(name, 5, 224)(Image.new("RGB", size, "teal"), 0).size == size
    assert Corruption(name, 5, 224)(Image.new("RGB", size, "black"), 0).size == size


def test_large_pictures_are_made_as_small_as_the_model_sees_them() -> None:
    assert Corruption("contrast", 1, 32)(scene(200, 100), 0).size == (64, 32)
    assert Corruption("contrast", 1, 224)(scene(200, 100), 0).size == (200, 100)


@pytest.mark.parametrize(("name", "severity"), [("rain", 1), ("snow", 0), ("snow", 6)])
def test_no_such_corruption(name: str, severity: int) -> None:
    with pytest.raises(ValueError, match=r"unknown; choose from|must be 1, 2, 3, 4 or 5"):
        Corruption(name, severity, 32)


def test_the_model_sees_the_corrupted_picture_through_its_own_preprocessing(tmp_path: Path) -> None:
    catalog = open_catalog(str(write_pictures(tmp_path / "p", 12, broken=(3,))))
    encoder = small_encoder()
    change = Corruption("gaussian_noise", 5, 16)
    found, rows = encoder.images(catalog, change=change)
    assert rows.tolist() == [row for row in range(12) if row != 3]
    assert not torch.allclose(found, encoder.images(catalog)[0])
    assert torch.equal(found, encoder.images(catalog, change=change)[0])
    assert torch.equal(found, small_encoder(workers=2).images(catalog, change=change)[0])
    image = Image.open(BytesIO(catalog.read(5).image)).convert("RGB")
    changed = change(image, int(catalog.index[5]))
    from torchvision.transforms import v2

    steps = v2.Compose(
        [v2.Resize(16, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(16)]
    )
    pixels = torch.from_numpy(np.array(steps(changed))).permute(2, 0, 1)[None]
    torch.testing.assert_close(encoder.model.eval().encode_image(pixels)[0], found[4])


def view_of(folder: Path) -> DataView:
    write_pictures(folder / "test")
    write_pictures(folder / "train", 60)
    (folder / "classnames.txt").write_text("\n".join(COLOURS[:-1]))
    return DataView(small_encoder(), open_set(str(folder), label="kind"))


def test_robustness_is_the_mean_of_the_tasks_on_corrupted_pictures(tmp_path: Path) -> None:
    view = view_of(tmp_path)
    names = ("contrast", "fog")
    severities = (2, 5)
    tasks = ("zero_shot", "retrieval", "knn")
    options = option_values(k=3, corruptions=names, severities=severities)
    cell = measure(view, TaskRequest("robustness", view.data, options, repeated=tasks))
    for task in tasks:

        def main(there: DataView, task: str = task) -> float:
            metrics = measure(there, TaskRequest(task, view.data, options)).metrics
            if task != "retrieval":
                return metrics["acc1"]
            return (metrics["image_retrieval_recall@1"] + metrics["text_retrieval_recall@1"]) / 2

        fresh = {
            (name, severity): main(
                DataView(view.encoder, view.data, change=Corruption(name, severity, 16))
            )
            for name in names
            for severity in severities
        }
        clean = main(DataView(view.encoder, view.data))
        assert cell.metrics[f"{task}_clean"] == pytest.approx(clean)
        assert cell.metrics[f"{task}_corrupted"] == pytest.approx(np.mean([*fresh.values()]))
        if clean:
            assert cell.metrics[f"{task}_relative"] == pytest.approx(
                np.mean([*fresh.values()]) / clean
            )
        assert cell.details[task] == {
            name: [pytest.approx(fresh[name, s]) for s in severities] for name in names
        }
    assert cell.details["severities"] == [2, 5]


def test_the_probe_is_learned_once_and_from_clean_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = view_of(tmp_path)
    seen = []
    real = Encoder.images
    monkeypatch.setattr(Encoder, "images", lambda *a, **k: seen.append((a, k)) or real(*a, **k))
    fitted = []
    real_fit = linear_probe.fit
    monkeypatch.setattr(linear_probe, "fit", lambda *a: fitted.append(a) or real_fit(*a))
    options = option_values(corruptions=("fog",), severities=(1, 3))
    measure(view, TaskRequest("robustness", view.data, options, repeated=("linear_probe",)))
    train = [k for a, k in seen if a[1] is view.data.training]
    assert train == [{}]
    assert len(seen) == 4
    assert len(fitted) == 1


def test_robustness_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a task"):
        robustness(view_of(tmp_path), {}, ("fog",), (1,))
