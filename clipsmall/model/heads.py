"""Heads: learnable parts beside the towers that an objective asks for; they deliver
`Embeddings.extra`.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipsmall.batch import Pairs, RunContext
from clipsmall.distributed.batch_norm import GlobalBatchNorm
from clipsmall.model.dual_encoder import MAX_LOG_SCALE, unit
from clipsmall.model.momentum import MovingAverage

Outputs = Callable[[Any], tuple[Tensor, Tensor]]


class Head(nn.Module):
    """Called with a batch and what the towers made of it; what it returns is put into
    `Embeddings.extra`.

    A head is built as `Head(setting, **options)`, belongs to the model, and is trained, averaged by
    DDP and saved with it. `after_step` is called once after every optimizer step.
    """

    def forward(
        self, pairs: Pairs, image: Tensor, text: Tensor, outputs: Outputs
    ) -> dict[str, Tensor]:
        """
        Args:
            image, text: (B, D) the towers' outputs, not normalised.
            outputs: towers -> what they make of the same pairs, in the model's chunks.
        """
        raise NotImplementedError

    def after_step(self, towers: nn.Module) -> None:
        """What changes with a step and not by a gradient."""

    def retrieve_image(self, image: Tensor) -> Tensor:
        """Unit rows to retrieve by, of the tower's outputs (B, D); asked only of heads that
        retrieval goes through.
        """
        raise NotImplementedError

    def retrieve_text(self, text: Tensor) -> Tensor:
        raise NotImplementedError


def _hidden(before: int, after: int) -> list[nn.Module]:
    """No bias: the normalisation would take it away again, and its gradient is 0."""
    return [nn.Linear(before, after, bias=False), GlobalBatchNorm(after), nn.ReLU()]


class Projectors(Head):
    """An MLP for each modality: `image_projected`, `text_projected`, not normalised; for barlow and
    vicreg.

    Hidden layers are Linear, batch normalisation, ReLU; the last is Linear without bias (Barlow
    Twins, arXiv 2103.03230, §2.2; VICReg, arXiv 2105.04906, §4.2: three layers of 8,192).

    Args:
        widths: of the layers, the last the output's. Default none: the towers' outputs as they are.
            With a projector
            retrieval goes through it: between the towers' outputs before it nothing has been
            matched, as each modality has its own (the papers throw theirs away for linear probes).
    """

    def __init__(self, setting: RunContext, widths: Sequence[int] = ()) -> None:
        super().__init__()
        self.image, self.text = (_projector([setting.width, *widths]) for _ in range(2))

    def forward(
        self, pairs: Pairs, image: Tensor, text: Tensor, outputs: Outputs
    ) -> dict[str, Tensor]:
        return {"image_projected": self.image(image), "text_projected": self.text(text)}

    def retrieve_image(self, image: Tensor) -> Tensor:
        return unit(self.image(image))

    def retrieve_text(self, text: Tensor) -> Tensor:
        return unit(self.text(text))


def _projector(widths: Sequence[int]) -> nn.Sequential:
    steps = list(pairwise(widths))
    layers = [layer for before, after in steps[:-1] for layer in _hidden(before, after)]
    return nn.Sequential(
        *layers, *(nn.Linear(before, after, bias=False) for before, after in steps[-1:])
    )


class Predictors(Head):
    """What each modality predicts of the other: `image_predicted`, `text_predicted`; and
    `image_raw`, `text_raw`.

    Linear, batch normalisation, ReLU, Linear; (B, D) -> (B, D). Models trained through them
    retrieve through them: `image(x)` and `text(x)` also serve in evaluation, with the running
    statistics.

    Args:
        hidden: width of the hidden layer in multiples of D. SimSiam narrows to ¼ (arXiv 2011.10566,
            §3: 2,048 to 512), BYOL widens to 16 (arXiv 2006.07733, §3.2: 256 to 4,096). Between two
            views of an image that matters little; between modalities the predictor is all that maps
            one onto the other. Synthetic pairs, D = 32,
            batch 64, recall through predictors of ¼, 1, 4, 16: simsiam 4, 68, 93, 97 %; byol from 1
                on 77, 94, 97 %.
    """

    def __init__(self, setting: RunContext, hidden: float = 4.0) -> None:
        super().__init__()
        between = max(1, round(hidden * setting.width))
        self.image, self.text = (
            nn.Sequential(*_hidden(setting.width, between), nn.Linear(between, setting.width))
            for _ in range(2)
        )

    def forward(
        self, pairs: Pairs, image: Tensor, text: Tensor, outputs: Outputs
    ) -> dict[str, Tensor]:
        predicted = {"image_predicted": self.image(image), "text_predicted": self.text(text)}
        return {**predicted, "image_raw": image, "text_raw": text}

    def retrieve_image(self, image: Tensor) -> Tensor:
        """(B, 2D): the prediction of the text beside the image's embedding. Its product with a
        text's (embedding beside prediction of the image) is the mean of the two cosines."""
        return torch.cat([unit(self.image(image)), unit(image)], dim=-1) / math.sqrt(2)

    def retrieve_text(self, text: Tensor) -> Tensor:
        return torch.cat([unit(text), unit(self.text(text))], dim=-1) / math.sqrt(2)


class Momentum(Head):
    """A moving average of the towers, without gradient: `image_target`, `text_target`, not
    normalised.

    See `MovingAverage`. Costs a third more time a step, and the towers' memory once more.

    Args:
        momentum: the average's share at the start: BYOL .996; ALBEF .995 and OTTER .999, both
            constant.
        schedule: cosine (to 1 at the end of the run) or constant.
    """

    def __init__(
        self,
        setting: RunContext,
        momentum: float = 0.996,
        schedule: Literal["cosine", "constant"] = "cosine",
    ) -> None:
        super().__init__()
        self.average = MovingAverage(
            setting.towers, momentum, setting.steps if schedule == "cosine" else 0
        )

    @torch.no_grad()
    def forward(
        self, pairs: Pairs, image: Tensor, text: Tensor, outputs: Outputs
    ) -> dict[str, Tensor]:
        image, text = outputs(self.average.towers)
        return {"image_target": image, "text_target": text}

    def after_step(self, towers: nn.Module) -> None:
        self.average.update(towers)


class Prototypes(Head):
    """Directions that features are assigned to: `prototypes` (P, D), unit rows, for swav; not one
    row a pair.
    """

    def __init__(self, setting: RunContext, prototypes: int = 512) -> None:
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.randn(prototypes, setting.width), dim=1))

    def forward(
        self, pairs: Pairs, image: Tensor, text: Tensor, outputs: Outputs
    ) -> dict[str, Tensor]:
        return {"prototypes": self.weight}

    @torch.no_grad()
    def after_step(self, towers: nn.Module) -> None:
        self.weight.copy_(F.normalize(self.weight, dim=1))


class SoftScale(Head):
    """A second temperature, of the logits that meet soft targets: `soft_scale` (), for
    sinkhorn_targets.

    Starts at e^3.9 = 49.4 and stays between 1 and 100, as in OTTER's code (arXiv 2112.09445).
    """

    def __init__(self, setting: RunContext) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.tensor(3.9))

    def forward(
        self, pairs: Pairs, image: Tensor, text: Tensor, outputs: Outputs
    ) -> dict[str, Tensor]:
        return {"soft_scale": self.log.exp()}

    @torch.no_grad()
    def after_step(self, towers: nn.Module) -> None:
        self.log.clamp_(0.0, MAX_LOG_SCALE)


class Tokens(Head):
    """Which words the image says: `token_logits` (B, V) from the image tower's output, and
    `token_ids` (B, L).

    Raises:
        ValueError: the vocabulary's size is not known.
    """

    def __init__(self, setting: RunContext) -> None:
        super().__init__()
        if not setting.vocabulary:
            raise ValueError(
                "superclass needs the size of the text tower's vocabulary, which this model does not tell"
            )
        self.classes = nn.Linear(setting.width, setting.vocabulary)

    def forward(
        self, pairs: Pairs, image: Tensor, text: Tensor, outputs: Outputs
    ) -> dict[str, Tensor]:
        return {"token_logits": self.classes(image), "token_ids": pairs.text}


HEADS: dict[str, type[Head]] = {
    "projectors": Projectors,
    "predictors": Predictors,
    "momentum": Momentum,
    "prototypes": Prototypes,
    "soft_scale": SoftScale,
    "tokens": Tokens,
}
