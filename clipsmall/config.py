"""A run, described: strict pydantic models, read from YAML files and `--section.field=value` words."""

import argparse
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Model(Section):
    name: str = Field("configs/towers/glyph.json", description="tower JSON, open_clip model, folder or HF hub id")
    pretrained: str = Field("", description="open_clip weight tag; none = fresh weights")
    logit_scale: float | Literal["auto"] = Field("auto", description="1/temperature at the start (not its log)")
    logit_bias: float | Literal["auto"] = Field("auto", description="auto = -log(batch_size - 1), for sigmoid")

    @model_validator(mode="after")
    def _positive(self) -> "Model":
        if self.logit_scale != "auto" and not 1 <= self.logit_scale <= 100:
            raise ValueError("logit_scale must be auto or between 1 and 100")
        return self


class Data(Section):
    train: list[str] = Field(min_length=1, description="folders, globs or brace lists of tar shards")
    batch_size: int = Field(256, ge=2, description="pairs of one step over all ranks")
    workers: int = Field(1, ge=0, description="loader processes a rank; never changes the order")
    shuffle_window: int = Field(65_536, ge=0, description="pairs shuffled together; 0 = as they lie")
    crop_scale: float = Field(1.0, gt=0, le=1, description="least area of a random crop; 1 = no augmentation")
    max_pixels: int = Field(89_478_485, ge=1, description="larger images are refused from their header")
    max_error_rate: float = Field(0.01, ge=0, le=1, description="share of bad pairs that stops the run")
    streaming: bool = Field(False, description="remote or un-indexed shards: resampled order, no exact resume")


class Objective(Section):
    name: Literal["softmax", "sigmoid", "sinkhorn"] = "softmax"
    mask_duplicates: bool = Field(True, description="equal captions are no negatives; false = the papers' losses")
    iterations: int = Field(20, ge=1, description="sinkhorn: at most")
    tolerance: float = Field(1e-3, ge=0, description="sinkhorn: largest row error to stop at")


class Optim(Section):
    lr: float = Field(1e-3, gt=0)
    lr_scaling: Literal["none", "sqrt"] = Field("none", description="sqrt: lr is meant for batch 256")
    pairs: int = Field(300_000, ge=1, description="pairs to train on, over all ranks")
    warmup_pairs: int = Field(10_000, ge=0)
    weight_decay: float = Field(0.1, ge=0)
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = Field(1e-8, gt=0)
    clip: float = Field(1.0, gt=0, description="largest gradient norm")


class Run(Section):
    precision: Literal["no", "fp16", "bf16"] = Field("no", description="no = fp32")
    log_every: int = Field(10, ge=1, description="steps")
    checkpoint_every: int = Field(500, ge=1, description="steps")
    keep_checkpoints: int = Field(2, ge=2, description="one may be in the process of being written")
    evaluate_every: int = Field(0, ge=0, description="steps; 0 = only at the end")
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field([], description="beside metrics.jsonl")


class ZeroShot(Section):
    name: str = Field(description="of the result")
    data: list[str] = Field(min_length=1, description="shards")
    classes: str = Field("captions", description="imagenet, captions, labels, or a file with a class a line")
    templates: str = Field("plain", description="plain, simple, openai, or a file of lines with {c}")
    label: str = Field("", description="json field of a pair's class; default: .cls member, else its caption")


class Retrieval(Section):
    name: str = Field(description="of the result")
    data: list[str] = Field(min_length=1, description="shards")


class Evaluate(Section):
    batch_size: int = Field(512, ge=1)
    zero_shot: list[ZeroShot] = []
    retrieval: list[Retrieval] = []


class Config(Section):
    out: str = Field("runs/run", description="folder of the run's results")
    resume: str = Field("", description="auto = the newest checkpoint of `out`, or a checkpoint folder")
    seed: int = Field(0, ge=0)
    data: Data
    model: Model = Model()
    objective: Objective = Objective()
    optim: Optim = Optim()
    run: Run = Run()
    evaluate: Evaluate = Evaluate()

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        if self.optim.pairs < self.data.batch_size:
            raise ValueError(f"optim.pairs={self.optim.pairs} is less than one batch of {self.data.batch_size}")
        return self

    @property
    def steps(self) -> int:
        return self.optim.pairs // self.data.batch_size


class ConfigError(ValueError):
    """Everything that is wrong with a config, one line each."""


class _StrictLoader(yaml.SafeLoader):
    """YAML says the last of two equal keys wins, silently; we say no."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f"key {key!r} stands twice (line {node.start_mark.line + 1})")
        return super().construct_mapping(node, deep=deep)


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _StrictLoader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not YAML: {' '.join(str(error).split())}") from None
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def read_yaml(path: str) -> dict[str, Any]:
    """A YAML file as nested dicts. Raises ConfigError naming the file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    found = _parse(text, path)
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: must hold `section: ...`, not {type(found).__name__}")
    return found


def lay_over(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` over `base`, section by section."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = lay_over(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def fields(model: type[BaseModel] = Config, prefix: str = "") -> dict[str, Any]:
    """Every leaf as `section.field` -> its pydantic FieldInfo."""
    found: dict[str, Any] = {}
    for name, info in model.model_fields.items():
        inner = info.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found |= fields(inner, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = info
    return found


def _numbers(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as a string."""
    if isinstance(value, dict):
        return {k: _numbers(v) for k, v in value.items()}
    if isinstance(value, str) and value[:1] in "+-.0123456789":
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _line(error: ErrorDetails, known: list[str]) -> str:
    path = ".".join(str(part) for part in error["loc"] if part not in ("float", "literal['auto']")) or "config"
    if error["type"] == "extra_forbidden":
        near = get_close_matches(path, known, n=1, cutoff=0.5)
        return f"{path}: no such key" + (f"; did you mean {near[0]}?" if near else "")
    if error["type"] == "missing":
        return f"{path}: must be given"
    return f"{path}: {error['msg'].removeprefix('Value error, ')} (got {error['input']!r})"[:300]


def validated(tree: dict[str, Any]) -> Config:
    """Raises ConfigError with one line for each thing wrong."""
    try:
        return Config.model_validate(_numbers(tree))
    except ValidationError as error:
        known = list(fields())
        lines = dict.fromkeys(_line(each, known) for each in error.errors())
        raise ConfigError("\n".join(lines)) from None


def help_text() -> str:
    lines = ["options, each as --section.field=value or in the YAML file:"]
    for name, info in fields().items():
        default = "required" if info.is_required() else yaml.safe_dump(info.get_default(call_default_factory=True), default_flow_style=True).split("\n")[0] if not isinstance(info.default, BaseModel) else ""
        lines.append(f"  --{name:<26} {info.description or ''} [{default}]")
    return "\n".join(lines)


def read(words: list[str]) -> Config:
    """`--config FILE` (several are laid over one another) and `--section.field=value`, which win.

    Prints and leaves with 0 on --help and --print_config.

    Raises:
        ConfigError: unknown or ill-valued keys, all of them at once.
    """
    parser = argparse.ArgumentParser(
        prog="clipsmall/train.py", epilog=help_text(), formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, description="Train a dual encoder.",
    )  # fmt: skip
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help="YAML; may be given again")
    parser.add_argument("--print_config", action="store_true", help="print the resolved config and leave")
    known, rest = parser.parse_known_args(words)
    tree: dict[str, Any] = {}
    for path in known.config:
        tree = lay_over(tree, read_yaml(path))
    while rest:
        word = rest.pop(0)
        name, equals, text = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not (equals or (rest and not rest[0].startswith("--"))):
            raise ConfigError(f"{word}: expected --section.field=value")
        value = _parse(text if equals else rest.pop(0), f"--{name}")
        for part in reversed(name.split(".")):
            value = {part: value}
        tree = lay_over(tree, value)
    config = validated(tree)
    if known.print_config:
        print(written(config), end="")
        sys.exit(0)
    return config


def written(config: Config) -> str:
    """The whole resolved config as YAML, which `read` takes back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def refuse(error: Exception) -> NoReturn:
    """How every command ends on bad input: the message, one `error:` a line, and exit code 2."""
    for line in str(error).splitlines():
        print(f"error: {line}", file=sys.stderr)
    sys.exit(2)
