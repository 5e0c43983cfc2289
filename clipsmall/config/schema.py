"""The config of a run as strict pydantic models: names, types, ranges, defaults and help texts."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from clipsmall.config.objectives import ObjectiveSection, Section

Shards = Annotated[
    list[str],
    BeforeValidator(lambda given: [given] if isinstance(given, str) else given),
    Field(
        min_length=1,
        description="tar shards: folders, glob patterns or brace ranges (a/{000..127}.tar)",
    ),
]


class ModelSection(Section):
    name: str = Field(
        "configs/towers/glyph.json",
        description="a JSON file of clipsmall's small towers, an open_clip model name, or the "
        "folder or Hugging Face hub id of a CLIP or SigLIP",
    )
    pretrained: str = Field(
        "",
        description="weight tag of an open_clip model, such as laion2b_s34b_b79k; "
        "none = randomly initialised weights",
    )
    chunk_size: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        0,
        description="pairs that a rank encodes at a time (GradCache: less "
        "memory, same gradient); 0 = all; auto = as many as fit the GPU",
    )
    attention: Literal["auto", "sdpa", "eager"] = Field(
        "auto",
        description="attention implementation of Hugging Face towers; auto = sdpa, which needs "
        "less memory",
    )
    checkpoint_activations: bool | Literal["auto"] = Field(
        "auto",
        description="recompute each block's activations in the backward pass to save memory; "
        "auto = on a GPU, if a rank's pairs do not fit otherwise",
    )
    logit_scale: float | Literal["auto"] = Field(
        "auto",
        description="initial logit scale, 1/temperature (not its logarithm), 1 to 100; auto = that "
        "of the trained weights, else the objective's default",
    )
    logit_bias: float | Literal["auto"] = Field(
        "auto",
        description="initial value added to every logit; auto = that of the trained weights, else "
        "-log(negatives) for sigmoid and 0 for others",
    )

    @model_validator(mode="after")
    def _positive(self) -> "ModelSection":
        if self.logit_scale != "auto" and not 1 <= self.logit_scale <= 100:
            raise ValueError("logit_scale must be auto or between 1 and 100")
        return self


class DataSection(Section):
    train: Shards
    batch_size: int = Field(
        256, ge=2, description="image-text pairs in one step, over all ranks together"
    )
    workers: int = Field(
        1,
        ge=0,
        description="data loader processes per rank; does not change the order of pairs",
    )
    shuffle_window: int = Field(
        65_536,
        ge=0,
        description="pairs shuffled together (larger = more random, more seeks on the disk); "
        "0 = no shuffling",
    )
    crop_scale: float = Field(
        1.0,
        gt=0,
        le=1,
        description="smallest fraction of an image's area that a random crop keeps; "
        "1 = no random crops",
    )
    max_pixels: int = Field(
        89_478_485,
        ge=1,
        description="larger images count as unreadable; they are recognised without decoding them",
    )
    max_error_rate: float = Field(
        0.01,
        ge=0,
        le=1,
        description="fraction of unreadable pairs above which the run ends; below it they are "
        "replaced by other pairs",
    )
    plan: str = Field(
        "",
        description="file of batches made before training by data_tools.mine_shards; "
        "none = shuffled pairs",
    )
    streaming: bool = Field(
        False,
        description="read remote shards, or local ones without an index, from front to back: "
        "random order, and a resumed run does not continue exactly",
    )


class LoraSection(Section):
    rank: int = Field(16, ge=1, description="rank of each adapter's two matrices")
    alpha: float = Field(
        32, gt=0, description="scale of the adapters: their output is multiplied by alpha/rank"
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="dropout probability at the adapters' input"
    )
    targets: list[str] | str = Field(
        "auto",
        description="which modules get adapters: a list of module names, or one regular "
        "expression for full names; auto = all linear layers inside blocks",
    )
    dora: bool = Field(
        False,
        description="DoRA: also learn the norm of each weight column (arXiv 2402.09353)",
    )
    rslora: bool = Field(
        False, description="scale by alpha/sqrt(rank) instead of alpha/rank (arXiv 2312.03732)"
    )


Amount = Annotated[int, Field(ge=1)] | Literal["full", "lora", "frozen"]


class TuneSection(Section):
    image: Amount = Field(
        "full",
        description="what trains in the image tower: full, lora (adapters only), frozen "
        "(nothing), or a number n: its last n blocks",
    )
    text: Amount = Field(
        "full", description="what trains in the text tower: full, lora, frozen, or a number n"
    )
    projections: bool | Literal["auto"] = Field(
        "auto",
        description="train the linear maps from the towers to the embeddings; auto = only if "
        "their tower is neither frozen nor has adapters",
    )
    logit_scale: bool = Field(
        True,
        description="train the logit scale, if the objective uses it; false = keep its "
        "initial value",
    )
    logit_bias: bool = Field(
        True,
        description="train the logit bias, if the objective uses it; false = keep its "
        "initial value",
    )
    lora: LoraSection = LoraSection()
    cache: bool = Field(
        True,
        description="compute the features of a frozen tower once, then read them from disk; "
        "only if its input is not augmented",
    )
    cache_folder: str = Field(
        "", description="folder for these cached features; none = next to the shards"
    )


Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimSection(Section):
    lr: float = Field(1e-3, gt=0, description="highest learning rate of AdamW")
    lr_scaling: Literal["none", "sqrt"] = Field(
        "none",
        description="none = lr as given; sqrt = lr is for batch size 256 and grows with the "
        "square root of the batch size",
    )
    pairs: int = Field(
        300_000, ge=1, description="length of the run: pairs seen in training, over all ranks"
    )
    warmup_pairs: int = Field(
        10_000, ge=0, description="warm-up: pairs over which the learning rate rises at the start"
    )
    weight_decay: float = Field(
        0.1,
        ge=0,
        description="of weight matrices only, not of biases, norms and logit scale",
    )
    betas: tuple[Beta, Beta] = Field((0.9, 0.98), description="AdamW's two momentum coefficients")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon, added to the denominator")
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="learning rate of a block divided by that of the next one; 1 = equal rates",
    )
    clip: float = Field(
        1.0,
        gt=0,
        description="largest gradient norm; longer gradients are scaled down to it",
    )
    accumulate: int = Field(
        1,
        ge=1,
        description="naive gradient accumulation: cut the batch into this many parts, each "
        "compared only within itself (a baseline; see model.chunk_size)",
    )


class MiningSection(Section):
    method: Literal[
        "none", "groups", "chain", "kmeans", "spectral", "shuffled", "osgd", "learnability"
    ] = Field(
        "none",
        description="how hard batches are made from a pool of pairs: groups, chain, kmeans, "
        "spectral; shuffled (a control); osgd and learnability select batches; none = off",
    )
    group: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        "auto",
        description="pairs of a batch that are hard negatives of one another; 0 = the whole "
        "batch; auto = 4 for groups, else 0",
    )
    pool: int = Field(
        2048, ge=4, description="pairs in a pool, scored and made into batches together"
    )
    fraction: float = Field(
        1.0,
        gt=0,
        le=1,
        description="fraction of batches that are mined; the others stay random",
    )
    start: float = Field(0.05, ge=0, lt=1, description="fraction of the run before mining starts")
    end: float = Field(
        0.9, gt=0, le=1, description="fraction of the run after which no new pool is mined"
    )
    swaps: int = Field(
        0,
        ge=0,
        description="passes over a finished pool that swap pairs between batches to make them "
        "harder",
    )
    guard: float = Field(
        0.001,
        ge=0,
        lt=1,
        description="fraction of sample pairs treated as likely false negatives and never put in "
        "one batch",
    )
    ratio: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        "auto",
        description="fixed threshold instead of mining.guard's fraction: a negative's cosine "
        "divided by the positives' cosine",
    )
    near: float = Field(
        0.95,
        gt=0,
        le=1,
        description="two images, or two captions, with a larger cosine count as duplicates; "
        "1 = none do",
    )
    keep: float = Field(
        0.1,
        gt=0,
        le=1,
        description="osgd, learnability: fraction of a pool's batches to train on",
    )
    weights: Literal["auto", "softmax", "sigmoid"] = Field(
        "auto",
        description="how the hardness of a negative is measured: by its weight in this loss; "
        "auto = the objective's kind",
    )
    reference: str = Field(
        "",
        description="learnability: folder with the scores of a reference model, made by "
        "data_tools.mine_shards; none = next to the shards",
    )

    @model_validator(mode="after")
    def _in_order(self) -> "MiningSection":
        if self.start >= self.end:
            raise ValueError(f"start={self.start} must be less than end={self.end}")
        if self.group == 1:
            raise ValueError("group=1: a single pair has no negatives; 0 is the whole batch")
        return self


class RunSection(Section):
    precision: Literal["auto", "fp32", "fp16", "bf16"] = Field(
        "auto",
        description="precision of matrix products; auto = the launcher's setting, else the best "
        "that the GPU has, and fp32 on a CPU",
    )
    log_every: int = Field(10, ge=1, description="steps between lines in metrics.jsonl")
    checkpoint_every: int = Field(500, ge=1, description="steps between checkpoints")
    max_bad_steps: int = Field(
        20,
        ge=1,
        description="fp16: the run ends after so many skipped steps in a row (gradient not finite)",
    )
    keep_checkpoints: int = Field(2, ge=2, description="number of newest checkpoints to keep")
    evaluate_every: int = Field(
        0, ge=0, description="steps between evaluations; 0 = only at the end"
    )
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        [], description="trackers that also get the metrics: tensorboard, wandb, trackio"
    )


class ZeroShotSection(Section):
    name: str = Field(description="name of the result")
    data: Shards
    classes: str = Field(
        "captions", description="imagenet, captions, labels, or a file with one class per line"
    )
    templates: str = Field(
        "plain", description="plain, simple, openai, or a file of lines with {c}"
    )
    label: str = Field(
        "", description="json field with a pair's class; default: the .cls file, else the caption"
    )


class RetrievalSection(Section):
    name: str = Field(description="name of the result")
    data: Shards


class TaskSection(Section):
    """Any task of `clipsmall.evaluate`; its options are further keys, such as `k: 5` of knn."""

    # the task checks its own options
    model_config = ConfigDict(extra="allow")

    task: str = Field(description="zero_shot, retrieval, knn, ...: see clipsmall.evaluate --help")
    name: str = Field(description="name of the data set in the result")
    data: Shards
    train: list[str] = Field([], description="labelled training images for knn and probes")
    kind: Literal["", "retrieval", "multilabel"] = Field(
        "", description="what the data set is made for; default: what it contains"
    )
    classes: str = Field("captions", description="as in zero_shot")
    templates: str = Field("plain", description="as in zero_shot")
    label: str = Field("", description="as in zero_shot")

    @property
    def options(self) -> dict[str, Any]:
        """The further keys, which are options of the task."""
        return dict(self.model_extra or {})


class EvaluateSection(Section):
    """What is evaluated at the end of a run, and on the way (run.evaluate_every)."""

    batch_size: int = Field(512, ge=1, description="images or captions encoded at a time")
    zero_shot: list[ZeroShotSection] = Field(
        [], description="zero-shot classification, a list of {name: ..., data: ..., classes: ...}"
    )
    retrieval: list[RetrievalSection] = Field(
        [], description="image-text retrieval, a list of {name: ..., data: ...}"
    )
    tasks: list[TaskSection] = Field(
        [],
        description="further tasks of clipsmall.evaluate, a list of "
        "{task: knn, name: ..., data: ...}",
    )

    @property
    def all(self) -> list[TaskSection]:
        """Everything to evaluate, in the order of results: `zero_shot`, `retrieval`, `tasks`."""
        found = [TaskSection(task="zero_shot", **dict(each)) for each in self.zero_shot]
        found += [TaskSection(task="retrieval", **dict(each)) for each in self.retrieval]
        return found + self.tasks


class Config(Section):
    """Everything that a user can set for a run."""

    out: str = Field("runs/run", description="folder that the run writes its results to")
    resume: str = Field(
        "",
        description="continue a run: auto = from the newest checkpoint in `out`, if there is one; "
        "or a checkpoint's folder; none = start a new run",
    )
    seed: int = Field(
        0,
        ge=0,
        lt=2**63,
        description="seed of initial weights, the order of pairs and dropout",
    )
    data: DataSection
    model: ModelSection = ModelSection()
    objective: ObjectiveSection = ObjectiveSection()
    tune: TuneSection = TuneSection()
    optim: OptimSection = OptimSection()
    mining: MiningSection = MiningSection()
    run: RunSection = RunSection()
    evaluate: EvaluateSection = EvaluateSection()

    @model_validator(mode="after")
    def _has_a_step(self) -> "Config":
        if self.optim.pairs < self.data.batch_size:
            raise ValueError(
                f"optim.pairs={self.optim.pairs} is less than one batch of {self.data.batch_size}"
            )
        return self

    @model_validator(mode="after")
    def _accumulates(self) -> "Config":
        parts = self.optim.accumulate
        if self.data.batch_size % parts or self.compared < 2:
            raise ValueError(
                f"optim.accumulate={parts} does not cut data.batch_size={self.data.batch_size} "
                "into equal parts of two pairs or more"
            )
        if self.mining.method != "none" and parts > 1:
            raise ValueError(
                "mining makes whole batches hard, optim.accumulate compares parts of them: use one"
            )
        return self

    @model_validator(mode="after")
    def _mines(self) -> "Config":
        group = self.mining.group
        if group != "auto" and group and self.data.batch_size % group:
            raise ValueError(
                f"mining.group={group} does not divide data.batch_size={self.data.batch_size}"
            )
        return self

    @model_validator(mode="after")
    def _reads(self) -> "Config":
        if self.data.plan and self.data.streaming:
            raise ValueError(
                "data.plan names pairs of indexed shards, which data.streaming does not read"
            )
        if problem := self.objective.too_small(self.data.batch_size):
            raise ValueError(problem)
        return self

    @property
    def compared(self) -> int:
        """Number of pairs compared with one another: the batch, or one part of it."""
        return self.data.batch_size // self.optim.accumulate

    @property
    def steps(self) -> int:
        """Number of steps of the whole run."""
        return self.optim.pairs // self.data.batch_size
