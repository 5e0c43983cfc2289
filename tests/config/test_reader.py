"""Tests of the config: which value wins, what is refused, and that a refusal writes nothing.

Seen to fail when: `lay_over` replaces whole sections; `StrictLoader` lets the second of two keys
win; `read` takes `yaml.Loader`; 1e5 is read as a word, or a quoted '2024' as a number;
`train.run_training` claims its folder before it opens the shards.
"""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import yaml

from clipsmall.compare.grid import load_comparison
from clipsmall.config import Config
from clipsmall.config.objectives import Name, ObjectiveSection
from clipsmall.config.reader import config_yaml, lay_over, option_fields, read
from clipsmall.objectives import OBJECTIVES
from clipsmall.storage.yaml_files import ConfigError
from tests import ROOT
from tests.shards_for_tests import config as tiny

DATA = "--data.train=[shards]"


def file(folder: Path, text: str, name: str = "run.yaml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def refusal(*words: str) -> list[str]:
    """The lines of the error."""
    with pytest.raises(ConfigError) as caught:
        read(list(words))
    return str(caught.value).splitlines()


# ---- what wins ----


def test_only_the_shards_must_be_given() -> None:
    config = read([DATA])
    assert config == Config.model_validate({"data": {"train": ["shards"]}})
    assert refusal() == ["data: must be given"]
    assert refusal("--data.workers=1") == ["data.train: must be given"]


def test_the_command_line_wins_over_later_files_which_win_over_earlier_ones(tmp_path: Path) -> None:
    one = file(
        tmp_path,
        "data: {train: [a], batch_size: 64, workers: 3}\noptim: {lr: 0.1}\nseed: 1\n",
        "one.yaml",
    )
    two = file(tmp_path, "data: {batch_size: 32}\noptim: {lr: 0.2, clip: 2.0}\n", "two.yaml")
    config = read(["--config", one, "--optim.lr=0.3", f"--config={two}"])
    assert (config.data.train, config.data.batch_size, config.data.workers) == (["a"], 32, 3)
    assert (config.optim.lr, config.optim.clip, config.seed) == (0.3, 2.0, 1)
    assert read(["--config", two, "--config", one]).data.batch_size == 64


def test_words_take_equals_or_a_space_and_the_last_one_wins() -> None:
    config = read(
        [
            "--data.train",
            "[a, 'b c']",
            "--optim.lr",
            "0.5",
            "--seed=1",
            "--seed=2",
            "--model.logit_bias",
            "-7",
        ]
    )
    assert config.data.train == ["a", "b c"]
    assert (config.optim.lr, config.seed, config.model.logit_bias) == (0.5, 2, -7)


def test_sections_are_laid_over_and_the_base_is_left_alone() -> None:
    base = {"a": {"b": 1, "c": 2}, "d": [1]}
    assert lay_over(base, {"a": {"c": 3}, "d": [2]}) == {"a": {"b": 1, "c": 3}, "d": [2]}
    assert base == {"a": {"b": 1, "c": 2}, "d": [1]}


@pytest.mark.parametrize("number", ["1e-3", "1E-3", "0.001", ".1e-2", "+1e-3", "1.e-3"])
def test_numbers_with_an_exponent_are_numbers(number: str, tmp_path: Path) -> None:
    assert read([DATA, f"--optim.lr={number}"]).optim.lr == 1e-3
    assert read([DATA, "--config", file(tmp_path, f"optim:\n  lr: {number}\n")]).optim.lr == 1e-3


def test_whole_numbers_may_have_an_exponent_too() -> None:
    config = read(
        [DATA, "--optim.pairs=3e5", "--optim.betas=[0.8, 9e-1]", "--model.logit_scale=1e1"]
    )
    assert (config.optim.pairs, config.optim.betas, config.model.logit_scale) == (
        300_000,
        (0.8, 0.9),
        10.0,
    )


def test_a_section_may_be_merged_from_an_anchor(tmp_path: Path) -> None:
    text = "optim: &o {lr: 0.1, clip: 3}\ndata: {train: [a]}\nrun: {}\n"
    assert read(["--config", file(tmp_path, text)]).optim.lr == 0.1
    merged = "data: {train: [a]}\noptim:\n  <<: {lr: 0.1, clip: 3}\n  lr: 0.2\n"
    optim = read(["--config", file(tmp_path, merged)]).optim
    assert (optim.lr, optim.clip) == (0.2, 3.0)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("--optim.lrr=1", "optim.lrr: no such key; did you mean optim.lr?"),
        ("--data.batchsize=4", "data.batchsize: no such key; did you mean data.batch_size?"),
        ("--lr=1", "lr: no such key; did you mean optim.lr?"),
        ("--run.lr=1", "run.lr: no such key; did you mean optim.lr?"),
        ("--warmup_pairs=1", "warmup_pairs: no such key; did you mean optim.warmup_pairs?"),
        (
            "--objective.temprature=1",
            "objective.temprature: no such key; did you mean objective.triplet?",
        ),
        ("--xyzzy=1", "xyzzy: no such key"),
        ("--=1", "config: no such key"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(word: str, line: str) -> None:
    (found,) = refusal(DATA, word)
    assert found.split(";")[0] == line.split(";")[0]
    # whatever is near: only that there is one is promised
    if "temprature" not in word:
        assert found == line


def test_unknown_keys_in_files_are_refused_alike(tmp_path: Path) -> None:
    path = file(
        tmp_path,
        "data: {train: [a], batchsize: 3}\nopt: {lr: 1}\n"
        "evaluate: {zero_shot: [{nam: x, data: [b]}]}\n",
    )
    lines = refusal("--config", path)
    assert any(line.startswith("data.batchsize: no such key") for line in lines)
    assert any(line.startswith("opt: no such key") for line in lines)
    assert any(line.startswith("evaluate.zero_shot.0.nam: no such key") for line in lines)
    assert "evaluate.zero_shot.0.name: must be given" in lines
    assert len(lines) == 4


def test_all_that_is_wrong_is_said_at_once() -> None:
    lines = refusal(
        "--optim.lr=-1",
        "--data.batch_size=1",
        "--objective.name=sotfmax",
        "--seed=x",
        "--nonsense=1",
    )
    assert [line.split(":")[0] for line in sorted(lines)] == [
        "data.batch_size",
        "data.train",
        "nonsense",
        "objective.name",
        "optim.lr",
        "seed",
    ]
    assert (
        "objective.name: there is no objective 'sotfmax'; did you mean softmax? (got 'sotfmax')"
        in lines
    )
    assert "optim.lr: Input should be greater than 0 (got -1)" in lines


@pytest.mark.parametrize(
    "word",
    [
        "data.batch_size=two",
        "data.batch_size=2.5",
        "data.batch_size=[2]",
        "data.batch_size=",
        "data.train=7",
        "data.train=[]",
        "data.train=[[a]]",
        "data.streaming=perhaps",
        "optim.betas=[0.9]",
        "optim.betas=0.9",
        "out=[a]",
        "optim=3",
        "run=",
        "evaluate.retrieval={name: a}",
        "evaluate.retrieval=[a]",
        "model.logit_scale=hot",
        "run.trackers=tensorboard",
        "seed={a: 1}",
        "model.name=",
    ],
)
def test_wrong_types_are_refused_by_name(word: str) -> None:
    lines = refusal(DATA, f"--{word}")
    assert all(line.startswith(word.partition("=")[0]) for line in lines)


@pytest.mark.parametrize(
    "word",
    [
        "optim.lr=0",
        "optim.lr=-1e-3",
        "optim.lr=.nan",
        "optim.lr=nan",
        "optim.lr=.inf",
        "optim.lr=inf",
        "optim.clip=.inf",
        "optim.eps=0",
        "optim.weight_decay=-0.1",
        "optim.pairs=0",
        "optim.betas=[0.9, 1.0]",
        "optim.betas=[-0.1, 0.9]",
        "optim.betas=[.nan, 0.9]",
        "data.batch_size=1",
        "data.batch_size=0",
        "data.batch_size=-4",
        "data.workers=-1",
        "data.crop_scale=0",
        "data.crop_scale=1.01",
        "data.max_error_rate=2",
        "model.logit_scale=0.5",
        "model.logit_scale=101",
        "model.logit_scale=.nan",
        "model.logit_bias=.inf",
        "objective.sinkhorn.iterations=-1",
        "objective.sinkhorn.tolerance=.nan",
        "run.log_every=0",
        "run.keep_checkpoints=1",
        "seed=-1",
        "seed=9223372036854775808",
        "evaluate.batch_size=0",
    ],
)
def test_values_out_of_range_are_refused_by_name(word: str) -> None:
    name = word.partition("=")[0]
    lines = refusal(DATA, f"--{word}")
    assert all(line.startswith((name, "model: logit_scale")) for line in lines)


def test_less_than_a_batch_of_pairs_is_refused() -> None:
    assert "optim.pairs=100 is less than one batch of 256" in refusal(DATA, "--optim.pairs=100")[0]
    assert read([DATA, "--optim.pairs=100", "--data.batch_size=30"]).steps == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 1\nseed: 2\n", "'seed' is given twice"),
        ("data: {train: [a], workers: 1, workers: 1}\n", "'workers' is given twice"),
        ("", "not NoneType"),
        ("# nothing\n", "not NoneType"),
        ("- a\n- b\n", "not list"),
        ("just words\n", "not str"),
        ("data:\n\ttrain: [a]\n", "cannot start any token"),
        ("data: {train: [a]\n", "not YAML"),
        ("seed: *nowhere\n", "undefined alias"),
        ("seed: 1\n---\nseed: 2\n", "single document"),
        ("[a]: 1\n", "unhashable"),
        (
            "seed: !!python/object/apply:os.system ['touch PWNED']\n",
            "could not determine a constructor",
        ),
        ("seed: !!python/name:os.system\n", "could not determine a constructor"),
    ],
)
def test_a_file_that_is_no_config_is_refused_by_name(
    text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = file(tmp_path, text)
    (line,) = refusal("--config", path)
    assert line.startswith(f"{path}: ")
    assert said in line
    assert [found.name for found in tmp_path.iterdir()] == ["run.yaml"]


def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    assert refusal("--config", str(tmp_path / "no.yaml")) == [
        f"{tmp_path / 'no.yaml'}: No such file or directory"
    ]
    assert refusal("--config", str(tmp_path)) == [f"{tmp_path}: Is a directory"]
    path = tmp_path / "latin.yaml"
    path.write_bytes("out: café".encode("latin-1"))
    assert refusal("--config", str(path))[0].startswith(f"{path}: not UTF-8")


@pytest.mark.parametrize(
    "words", [["nonsense"], ["--seed"], ["--seed", "--out=a"], ["-seed=1"], ["--"]]
)
def test_words_that_set_nothing_are_refused(words: list[str]) -> None:
    assert refusal(DATA, *words) == [f"{words[0]}: expected --section.field=value"]


def test_a_word_may_bring_no_objects() -> None:
    assert refusal(DATA, "--seed=!!python/object/apply:os.getcwd []")[0].startswith(
        "--seed: not YAML"
    )
    assert refusal(DATA, "--optim={lr: 1, lr: 2}") == ["--optim: key 'lr' is given twice (line 1)"]


def test_abbreviations_are_no_options(tmp_path: Path) -> None:
    path = file(tmp_path, "data: {train: [a]}\n")
    assert refusal(DATA, f"--conf={path}")[0].startswith("conf: no such key")


# ---- what is written ----


def everything(tmp_path: Path) -> list[str]:
    path = file(
        tmp_path,
        "evaluate:\n  zero_shot: [{name: 'a: b', data: [x], classes: labels}]\n"
        "  retrieval: [{name: r, data: [y, z]}]\n",
    )
    return [
        "--config",
        path,
        "--data.train=['a b', '2024', 'c{0..3}.tar']",
        "--out=läufe/eins",
        "--optim.lr=1e-7",
        "--optim.eps=1e-12",
        "--model.logit_bias=-10",
        "--model.logit_scale=20",
        "--run.trackers=[tensorboard]",
        "--objective.name=sigmoid",
        "--data.streaming=true",
        "--optim.betas=[0.1, 0.2]",
        "--resume=auto",
        "--model.pretrained=none",
    ]


def test_a_written_config_reads_back_equal(tmp_path: Path) -> None:
    for words in ([DATA], everything(tmp_path)):
        config = read(words)
        assert read(["--config", file(tmp_path, config_yaml(config), "written.yaml")]) == config


def test_print_config_prints_what_reads_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = everything(tmp_path)
    with pytest.raises(SystemExit) as left:
        read([*words, "--print_config"])
    assert left.value.code == 0
    printed = capsys.readouterr().out
    assert read(["--config", file(tmp_path, printed, "printed.yaml")]) == read(words)
    assert yaml.safe_load(printed)["optim"]["lr"] == 1e-7
    # a bad config is not printed
    assert refusal("--print_config", "--optim.lr=-1", DATA)
    assert not capsys.readouterr().out


def test_help_lists_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        read(["--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert len(option_fields()) > 30
    for name, info in option_fields().items():
        (line,) = [line for line in text.splitlines() if line.split()[:1] == [f"--{name}"]]
        assert (info.description or "") in line
        assert line.endswith("[required]" if info.is_required() else "]")
    assert "[0.001]" in text


@pytest.mark.parametrize("name", [path.name for path in sorted((ROOT / "configs").glob("*.yaml"))])
def test_the_configs_are_good(name: str) -> None:
    config = read(["--config", str(ROOT / "configs" / name)])
    assert config.data.train
    assert config.out.startswith("runs/")


@pytest.mark.parametrize(
    "name", [path.name for path in sorted((ROOT / "configs" / "compare").glob("*.yaml"))]
)
def test_the_grids_are_good(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    grid = load_comparison(str(Path("configs") / "compare" / name))
    assert grid.out == f"runs/compare/{Path(name).stem}"


# ---- a refusal writes nothing ----


@pytest.fixture
def signals() -> Iterator[None]:
    """`main` takes over the signals of the process it runs in."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optim.lrr": 1}, ["error: optim.lrr: no such key; did you mean optim.lr?"]),
        ({"optim.lr": -1, "seed": "x"}, ["error: optim.lr: ", "error: seed: "]),
        ({"data.train": "[nowhere]"}, ["nowhere: no shards there"]),
        (
            {"data.batch_size": 512, "optim.pairs": 1024},
            ["data.batch_size=512 is more than the 300 pairs"],
        ),
        ({"resume": "."}, ["not a clipsmall checkpoint"]),
        ({"resume": "nowhere"}, ["nowhere: not a clipsmall checkpoint"]),
        ({"model.name": "nothing"}, ["'nothing' is no tower JSON"]),
        ({"evaluate.retrieval": "[{name: a, data: [nowhere]}]"}, ["nowhere: no shards there"]),
        ({"data.train": "['s3://bucket/a.tar']"}, ["s3://bucket/a.tar"]),
    ],
)
def test_a_run_that_cannot_start_ends_with_2_and_writes_nothing(
    changes: dict[str, object],
    said: list[str],
    glyphs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from clipsmall.train import main

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        main(tiny(glyphs, tmp_path / "run", **changes))
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert all(part in error for part in said)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("signals")
def test_the_tiny_config_itself_is_good(glyphs: Path, tmp_path: Path) -> None:
    from clipsmall.train import main

    assert main(tiny(glyphs, tmp_path / "run", **{"optim.pairs": 64})) == 0
    assert read(["--config", str(tmp_path / "run" / "run.yaml")]).optim.pairs == 64


@pytest.mark.parametrize("value", ["auto", "fp32", "fp16", "bf16"])
def test_every_precision_can_be_given(value: str) -> None:
    assert read(["--data.train=x", f"--run.precision={value}"]).run.precision == value


def test_words_that_look_like_something_else_stay_words() -> None:
    config = read(["--data.train=x", "--out=2026", "--model.pretrained=no", "--model.name=1.5"])
    assert (config.out, config.model.pretrained, config.model.name) == ("2026", "no", "1.5")
    assert read(["--data.train=x", "--data.streaming=true"]).data.streaming is True


@pytest.mark.parametrize(
    ("words", "mix"),
    [
        ([], {"softmax": 1.0}),
        (["--objective=dcl"], {"dcl": 1.0}),
        (["--objective.name=vse++"], {"vse++": 1.0}),
        (["--objective={softmax: 1, vicreg: 0.1}"], {"softmax": 1.0, "vicreg": 0.1}),
        (["--objective.name={softmax: 1, vicreg: 1e-1}"], {"softmax": 1.0, "vicreg": 0.1}),
        (["--objective={softmax: 1, vicreg: 0.1}", "--objective={sigmoid: 2}"], {"sigmoid": 2.0}),
        (["--objective={softmax: 1}", "--objective=hsic"], {"hsic": 1.0}),
    ],
)
def test_objectives_are_mixed_by_weight(
    words: list[str], mix: dict[str, float], tmp_path: Path
) -> None:
    """The last mix named replaces the one before, and leaves the options alone."""
    base = file(
        tmp_path, "objective: {name: softmax, mask_duplicates: false, sinkhorn: {iterations: 3}}\n"
    )
    config = read([DATA, "--config", base, *words])
    assert config.objective.mix == mix
    assert (config.objective.mask_duplicates, config.objective.sinkhorn.iterations) == (False, 3)
    assert read(["--config", file(tmp_path, config_yaml(config), "written.yaml")]) == config


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("objective={softmax: 0}", "above 0"),
        ("objective={softmax: 1, vicrag: 1}", "did you mean vicreg"),
        ("objective={sofmax: 1}", "did you mean softmax"),
        ("objective.name={}", "at least one"),
        ("objective=softmacks", "did you mean softmax"),
        ("objective=[softmax, vicreg]", "give a mix under name, as in name: {softmax: 1"),
        ("objective={softmax: 1, exchange: ring}", "give a mix under name"),
        ("objective.name.vicreg=0.2", "give the whole mix"),
        ("objective.vicreg=0.2", "give the whole mix"),
    ],
)
def test_a_mix_that_cannot_be_is_refused(word: str, said: str) -> None:
    (line,) = refusal(DATA, f"--{word}")
    assert "objective" in line
    assert said in line


def test_options_that_contradict_one_another_are_refused() -> None:
    (line,) = refusal(DATA, "--objective.align_uniform.cross=true")
    assert "opposite poles" in line
    (line,) = refusal(DATA, "--objective=swav", "--objective.swav.queue=0")
    assert "cannot be shared out" in line


def test_names_in_a_list_stay_names() -> None:
    assert list(read(["--data.train=['2024', '1e3', a]"]).data.train) == ["2024", "1e3", "a"]
    assert read([DATA, "--out='2024'"]).out == "2024"


def test_every_objective_has_a_name_and_a_section() -> None:
    assert set(get_args(Name)) == set(OBJECTIVES)
    assert all(hasattr(ObjectiveSection(), kind.section) for kind in OBJECTIVES.values())
