"""A run, described: strict pydantic models; every field has a default or must be given."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from clipsmall.config.objectives import ObjectiveSection, Section

Shards = Annotated[
    list[str],
    BeforeValidator(lambda given: [given] if isinstance(given, str) else given),
    Field(min_length=1, description="folders, globs or brace lists of tar shards"),
]


class ModelSection(Section):
    name: str = Field(
        "configs/towers/glyph.json", description="tower JSON, open_clip model, folder or HF hub id"
    )
    pretrained: str = Field("", description="open_clip weight tag; none = fresh weights")
    chunk_size: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        0,
        description="pairs of a rank that go through the towers at a time; 0 = all; auto = as many as fit the GPU",
    )
    attention: Literal["auto", "sdpa", "eager"] = Field(
        "auto", description="of HF towers; auto = sdpa, the lean one"
    )
    checkpoint_activations: bool | Literal["auto"] = Field(
        "auto",
        description="make each block's activations anew; auto: on a GPU, where a rank's pairs do not fit at once",
    )
    logit_scale: float | Literal["auto"] = Field(
        "auto", description="1/temperature at the start (not its log)"
    )
    logit_bias: float | Literal["auto"] = Field(
        "auto", description="auto: sigmoid starts at -log(negatives)"
    )

    @model_validator(mode="after")
    def _positive(self) -> "ModelSection":
        if self.logit_scale != "auto" and not 1 <= self.logit_scale <= 100:
            raise ValueError("logit_scale must be auto or between 1 and 100")
        return self


class DataSection(Section):
    train: Shards
    batch_size: int = Field(256, ge=2, description="pairs of one step over all ranks")
    workers: int = Field(1, ge=0, description="loader processes a rank; never changes the order")
    shuffle_window: int = Field(
        65_536, ge=0, description="pairs shuffled together; 0 = as they lie"
    )
    crop_scale: float = Field(
        1.0, gt=0, le=1, description="least area of a random crop; 1 = no augmentation"
    )
    max_pixels: int = Field(
        89_478_485, ge=1, description="larger images are refused from their header"
    )
    max_error_rate: float = Field(
        0.01, ge=0, le=1, description="share of bad pairs that stops the run"
    )
    plan: str = Field(
        "",
        description="batches put together beforehand by data_tools.mine_shards; none = shuffled pairs",
    )
    streaming: bool = Field(
        False, description="remote or un-indexed shards: resampled order, no exact resume"
    )


class LoraSection(Section):
    rank: int = Field(16, ge=1)
    alpha: float = Field(32, gt=0, description="what adapters make is multiplied by alpha/rank")
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: list[str] | str = Field(
        "auto",
        description="names of modules, or one regular expression of full names; auto: all linear maps in blocks",
    )
    dora: bool = Field(False, description="a length of its own for each column (arXiv 2402.09353)")
    rslora: bool = Field(False, description="alpha/sqrt(rank) instead (arXiv 2312.03732)")


Amount = Annotated[int, Field(ge=1)] | Literal["full", "lora", "frozen"]


class TuneSection(Section):
    image: Amount = Field(
        "full", description="what of the image tower trains; a number: its last so many blocks"
    )
    text: Amount = Field("full", description="what of the text tower trains")
    projections: bool | Literal["auto"] = Field(
        "auto",
        description="the maps onto the embeddings; auto: unless their tower is frozen or has adapters",
    )
    logit_scale: bool = Field(
        True, description="false = stays as it is, whatever the objective would learn"
    )
    logit_bias: bool = True
    lora: LoraSection = LoraSection()
    cache: bool = Field(
        True,
        description="features of a frozen tower are computed once, if nothing augments its input",
    )
    cache_folder: str = Field("", description="of these features; none = beside the shards")


Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimSection(Section):
    lr: float = Field(1e-3, gt=0)
    lr_scaling: Literal["none", "sqrt"] = Field(
        "none", description="sqrt: lr is meant for batch 256"
    )
    pairs: int = Field(300_000, ge=1, description="pairs to train on, over all ranks")
    warmup_pairs: int = Field(10_000, ge=0)
    weight_decay: float = Field(0.1, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.98)
    eps: float = Field(1e-8, gt=0)
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="lr of a block over that of the block after it"
    )
    clip: float = Field(1.0, gt=0, description="largest gradient norm")
    accumulate: int = Field(
        1, ge=1, description="parts of a batch compared within themselves: the naive baseline"
    )


class MiningSection(Section):
    method: Literal[
        "none", "groups", "chain", "kmeans", "spectral", "shuffled", "osgd", "learnability"
    ] = "none"
    group: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        "auto",
        description="pairs of a batch made hard for one another; 0 = all of them; auto: 4 for `groups`, else 0",
    )
    pool: int = Field(
        2048, ge=4, description="pairs scored and dealt out together, two batches or more"
    )
    fraction: float = Field(
        1.0, gt=0, le=1, description="share of mined batches; the others stay as they come"
    )
    start: float = Field(0.05, ge=0, lt=1, description="share of the run before the first pool")
    end: float = Field(0.9, gt=0, le=1, description="share of the run after which no pool begins")
    swaps: int = Field(0, ge=0, description="sweeps of exchanges that make the arrangement harder")
    guard: float = Field(
        0.001,
        ge=0,
        lt=1,
        description="share of pairs of pairs kept apart as too hard to be negatives",
    )
    ratio: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        "auto",
        description="fixed threshold in place of that share: negative cosine over the positives'",
    )
    near: float = Field(
        0.95,
        gt=0,
        le=1,
        description="cosine of two images or captions that are duplicates; 1 = none",
    )
    keep: float = Field(
        0.1, gt=0, le=1, description="share of a pool that osgd and learnability train on"
    )
    weights: Literal["auto", "softmax", "sigmoid"] = Field(
        "auto", description="what hard means; auto: the objective's"
    )
    reference: str = Field(
        "", description="of learnability: folder of a scorer's sidecars, or the shards' own"
    )

    @model_validator(mode="after")
    def _in_order(self) -> "MiningSection":
        if self.start >= self.end:
            raise ValueError(f"start={self.start} must be less than end={self.end}")
        if self.group == 1:
            raise ValueError("group=1: a pair alone is not hard; 0 is the whole batch")
        return self


class RunSection(Section):
    precision: Literal["auto", "fp32", "fp16", "bf16"] = Field(
        "auto", description="auto = the launcher's; if none, what the GPU has"
    )
    log_every: int = Field(10, ge=1, description="steps")
    checkpoint_every: int = Field(500, ge=1, description="steps")
    max_bad_steps: int = Field(
        20, ge=1, description="steps in a row that fp16 may skip before the run ends"
    )
    keep_checkpoints: int = Field(2, ge=2, description="one may be in the process of being written")
    evaluate_every: int = Field(0, ge=0, description="steps; 0 = only at the end")
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        [], description="beside metrics.jsonl"
    )


class ZeroShotSection(Section):
    name: str = Field(description="of the result")
    data: Shards
    classes: str = Field(
        "captions", description="imagenet, captions, labels, or a file with a class a line"
    )
    templates: str = Field(
        "plain", description="plain, simple, openai, or a file of lines with {c}"
    )
    label: str = Field(
        "", description="json field of a pair's class; default: .cls member, else its caption"
    )


class RetrievalSection(Section):
    name: str = Field(description="of the result")
    data: Shards


class EvaluateSection(Section):
    batch_size: int = Field(512, ge=1)
    zero_shot: list[ZeroShotSection] = Field([])
    retrieval: list[RetrievalSection] = Field([])


class Config(Section):
    out: str = Field("runs/run", description="folder of the run's results")
    resume: str = Field(
        "", description="auto = the newest checkpoint of `out`, or a checkpoint folder"
    )
    seed: int = Field(0, ge=0, lt=2**63)
    data: DataSection
    model: ModelSection = ModelSection()
    objective: ObjectiveSection = ObjectiveSection()
    tune: TuneSection = TuneSection()
    optim: OptimSection = OptimSection()
    mining: MiningSection = MiningSection()
    run: RunSection = RunSection()
    evaluate: EvaluateSection = EvaluateSection()

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        if self.optim.pairs < self.data.batch_size:
            raise ValueError(
                f"optim.pairs={self.optim.pairs} is less than one batch of {self.data.batch_size}"
            )
        if self.data.batch_size % self.optim.accumulate or self.compared < 2:
            raise ValueError(
                f"optim.accumulate={self.optim.accumulate} does not cut data.batch_size={self.data.batch_size} into "
                "equal parts of two pairs or more"
            )
        if self.mining.method != "none" and self.optim.accumulate > 1:
            raise ValueError(
                "mining makes whole batches hard, optim.accumulate compares parts of them: take one"
            )
        if (
            isinstance(self.mining.group, int)
            and self.mining.group
            and self.data.batch_size % self.mining.group
        ):
            raise ValueError(
                f"mining.group={self.mining.group} does not divide data.batch_size={self.data.batch_size}"
            )
        if self.data.plan and self.data.streaming:
            raise ValueError(
                "data.plan names pairs of indexed shards, which data.streaming does not read"
            )
        if problem := self.objective.too_small(self.data.batch_size):
            raise ValueError(problem)
        return self

    @property
    def compared(self) -> int:
        """Pairs that are compared with one another: the batch, or a part of it."""
        return self.data.batch_size // self.optim.accumulate

    @property
    def steps(self) -> int:
        return self.optim.pairs // self.data.batch_size
