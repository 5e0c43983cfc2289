"""The part of a config that names and tunes objectives: a mix by weight, and a section of options
for each kind.
"""

from difflib import get_close_matches
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Name = Literal[
    "softmax",
    "dcl",
    "dclw",
    "sigmoid",
    "bce",
    "triplet",
    "vse++",
    "spectral",
    "align_uniform",
    "sinkhorn",
    "sinkhorn_targets",
    "gcl",
    "nn",
    "simsiam",
    "byol",
    "swav",
    "barlow",
    "vicreg",
    "hsic",
    "superclass",
]


Schedule = Literal["cosine", "constant"]
TO_ONE = "of the momentum; cosine goes to 1 at the end of the run"
# pairs in a queue
LONGEST = 10_000_000
PROJECTOR = "layers of a projector, the last its output; [] = the towers' own outputs"


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, coerce_numbers_to_str=True, allow_inf_nan=False
    )


class Softmax(Section):
    intra_modal: bool = Field(
        False, description="images are negatives of images, too: SimCLR's NT-Xent"
    )


class Dcl(Section):
    intra_modal: bool = Field(False, description="images are negatives of images, too")
    sigma: float = Field(0.5, gt=0, description="dclw: temperature of the weights")


class Sigmoid(Section):
    relative_bias: bool = Field(False, description="logits are scale · (cos + bias)")


class Triplet(Section):
    margin: float = Field(0.2, gt=0, lt=2)
    warmup: float = Field(
        0.5, ge=0, le=1, description="vse++: share of the run that trains triplet"
    )


class Spectral(Section):
    mu: float = Field(10.0, gt=0, description="weight of the negatives")


class AlignUniform(Section):
    align: float = Field(1.0, gt=0)
    uniform: float = Field(1.0, ge=0)
    alpha: float = Field(2.0, gt=0)
    t: float = Field(2.0, gt=0)
    cross: bool = Field(
        False, description="uniformity of images against texts; needs align >= t * uniform"
    )

    @model_validator(mode="after")
    def _together(self) -> "AlignUniform":
        if self.cross and self.align < self.t * self.uniform:
            raise ValueError(
                f"cross=true with align={self.align:g} < t * uniform = {self.t * self.uniform:g} drives images and "
                "texts to opposite poles; raise align"
            )
        return self


class Sinkhorn(Section):
    iterations: int = Field(20, ge=0, description="at most; 0 = one direction of softmax")
    tolerance: float = Field(1e-3, ge=0, description="largest row error to stop at")
    unrolled: bool = Field(False, description="differentiate through the iterations")


class SinkhornTargets(Section):
    alpha: float = Field(0.5, ge=0, le=1, description="weight of the plain softmax")
    epsilon: float = Field(0.15, gt=0, description="temperature of the targets")
    iterations: int = Field(5, ge=1)
    momentum: float = Field(0.999, ge=0, lt=1, description="of the teacher's moving average")
    schedule: Schedule = Field("constant", description=TO_ONE)


class Bce(Section):
    mode: Literal["balanced", "warmup", "one"] = Field(
        "balanced", description="which negatives: all, k growing, one"
    )
    weight: float = Field(1.0, ge=0, description="of the negatives")


class Gcl(Section):
    variant: Literal[
        "sogclr", "isogclr", "fastclip_v0", "fastclip_v1", "fastclip_v2", "fastclip_v3"
    ] = "fastclip_v3"
    gamma: float | None = Field(
        None, gt=0, le=1, description="of the running mean; null = the variant's, as below"
    )
    tau: float | None = Field(None, gt=0, description="temperature where it is not the model's")
    rho: float | None = Field(None, ge=0)
    lr_tau: float | None = Field(None, gt=0, description="of each pair's temperature")
    epsilon: float = Field(1e-14, ge=0, lt=1)


class Neighbours(Section):
    size: int = Field(16_384, ge=2, description="entries of the queue")
    start: int = Field(4_096, ge=2, description="entries before neighbours are taken")
    images: bool = Field(True, description="texts learn from neighbours of images, too")


class Simsiam(Section):
    hidden: float = Field(4.0, gt=0, description="of the predictors, in widths of the embedding")


class Byol(Section):
    hidden: float = Field(4.0, gt=0, description="of the predictors, in widths of the embedding")
    momentum: float = Field(0.996, ge=0, lt=1)
    schedule: Schedule = Field("cosine", description=TO_ONE)


class Swav(Section):
    prototypes: int = Field(512, ge=2)
    queue: int = Field(
        1024, ge=0, description="past pairs that share the prototypes with the batch"
    )
    temperature: float = Field(0.1, gt=0)
    epsilon: float = Field(0.05, gt=0, description="temperature of the codes")
    iterations: int = Field(3, ge=1)
    freeze_steps: int = Field(100, ge=0, description="steps before prototypes move")


class Barlow(Section):
    redundancy: float = Field(5e-3, ge=0)
    widths: list[Annotated[int, Field(ge=1)]] = Field([], description=PROJECTOR)


class Vicreg(Section):
    invariance: float = Field(25.0, ge=0)
    variance: float = Field(25.0, ge=0)
    covariance: float = Field(1.0, ge=0)
    widths: list[Annotated[int, Field(ge=1)]] = Field([], description=PROJECTOR)


class Hsic(Section):
    gamma: float = Field(
        1.0, ge=0, description="weight of the spread; the paper's 3 is for a batch of 4,096"
    )
    width: float = Field(1.0, gt=0, description="of the kernel")


class Superclass(Section):
    pass


class Moco(Section):
    size: Annotated[int, Field(ge=1, le=LONGEST)] | Literal["auto"] = Field(
        "auto", description="pairs in the queue; auto: 0.5 · batch_size / (1 - momentum)"
    )
    momentum: float = Field(
        0.995, ge=0, lt=1, description="of the averaged towers that make the columns"
    )
    schedule: Schedule = Field("constant", description=TO_ONE)
    in_batch: bool = Field(
        True, description="other pairs of the batch are negatives, too; false: the queue's only"
    )
    alpha: float = Field(
        0.0, ge=0, le=1, description="softmax: weight of the averaged towers' soft targets"
    )
    ramp: float = Field(0.1, ge=0, le=1, description="share of the run over which alpha grows")


class Xbm(Section):
    size: Annotated[int, Field(ge=1, le=LONGEST)] | Literal["auto"] = Field(
        "auto", description="pairs; auto: 4 batches"
    )
    start: float = Field(0.3, ge=0, lt=1, description="share of the run before the queue is met")


class ObjectiveSection(Section):
    name: Name | dict[Name, float] = Field(
        "softmax", description=f"{', '.join(get_args(Name))}; or a mix {{softmax: 1, vicreg: 0.1}}"
    )
    mask_duplicates: bool = Field(
        True, description="equal captions are no negatives; false = the papers' losses"
    )
    queue: Literal["none", "moco", "xbm"] = Field(
        "none", description="pairs of former steps are columns, too"
    )
    exchange: Literal["gather", "ring", "host"] = Field(
        "gather",
        description="ring: no rank ever holds all embeddings; host: they lie in host memory",
    )
    softmax: Softmax = Softmax()
    dcl: Dcl = Dcl()
    sigmoid: Sigmoid = Sigmoid()
    triplet: Triplet = Triplet()
    spectral: Spectral = Spectral()
    align_uniform: AlignUniform = AlignUniform()
    sinkhorn: Sinkhorn = Sinkhorn()
    sinkhorn_targets: SinkhornTargets = SinkhornTargets()
    bce: Bce = Bce()
    gcl: Gcl = Gcl()
    nn: Neighbours = Neighbours()
    simsiam: Simsiam = Simsiam()
    byol: Byol = Byol()
    swav: Swav = Swav()
    barlow: Barlow = Barlow()
    vicreg: Vicreg = Vicreg()
    hsic: Hsic = Hsic()
    superclass: Superclass = Superclass()
    moco: Moco = Moco()
    xbm: Xbm = Xbm()

    @field_validator("name", mode="before")
    @classmethod
    def _known(cls, given: object) -> object:
        """One clear line for a misspelt name, where pydantic would tell of every branch of the
        union.
        """
        for each in given if isinstance(given, dict) else [given] if isinstance(given, str) else []:
            if each not in get_args(Name):
                if each in ("moco", "xbm"):
                    raise ValueError(
                        f"{each} is a queue around an objective: objective.queue={each}"
                    )
                near = get_close_matches(str(each), get_args(Name), 1)
                guess = (
                    f"did you mean {near[0]}?" if near else f"there are {', '.join(get_args(Name))}"
                )
                raise ValueError(f"there is no objective {each!r}; {guess}")
        return given

    @model_validator(mode="before")
    @classmethod
    def _mixed(cls, given: object) -> object:
        """Weights beside other options, and a list of names: say where they belong."""
        named = given if isinstance(given, list) else []
        if isinstance(given, dict):
            named = [
                key
                for key in given
                if key in get_args(Name) and not isinstance(given[key], dict | Section)
            ]
        if named:
            raise ValueError(f"a mix stands under name, as in name: {{{named[0]}: 1, vicreg: 0.1}}")
        return given

    @model_validator(mode="after")
    def _weighs(self) -> "ObjectiveSection":
        if not self.mix or any(weight <= 0 for weight in self.mix.values()):
            raise ValueError(
                f"name: a mix names at least one objective, with weights above 0, not {self.name}"
            )
        return self

    @property
    def mix(self) -> dict[str, float]:
        """Weights by name; a single objective weighs 1."""
        return (
            {str(name): weight for name, weight in self.name.items()}
            if isinstance(self.name, dict)
            else {self.name: 1.0}
        )

    @property
    def title(self) -> str:
        parts = [name if weight == 1 else f"{weight:g} {name}" for name, weight in self.mix.items()]
        return " + ".join(parts) + (f", {self.queue} queue" if self.queue != "none" else "")
