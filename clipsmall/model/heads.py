"""Heads: learnable modules on top of the towers, which fill `Embeddings.extra` for objectives.

A head's options are declared in its `__init__`, as an objective's are in its signature: see
`objectives.options`.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from clipsmall.batch import Pairs, RunContext
from clipsmall.distributed.batch_norm import GlobalBatchNorm
from clipsmall.model.dual_encoder import MAX_LOG_SCALE, unit
from clipsmall.model.momentum import MovingAverage

# maps towers to their outputs for the current batch, images (B, D) and texts (B, D)
Outputs = Callable[[Any], tuple[Tensor, Tensor]]


class Head(nn.Module):
    """A learnable module that turns the towers' outputs into entries of `Embeddings.extra`.

    A head is built as `Head(context, **options)`. It belongs to the model: it is trained, averaged
    by DDP and saved with it.
    """

    # True: needs the token ids of every pair, so cached text features are not enough
    reads_token_ids = False

    def forward(
        self, pairs: Pairs, image: Tensor, text: Tensor, outputs: Outputs
    ) -> dict[str, Tensor]:
        """The entries of `Embeddings.extra`.

        Args:
            pairs: the batch.
            image: (B, D) the image tower's outputs, not normalised.
            text: (B, D) the text tower's.
            outputs: computes the outputs of other towers for the same batch, in the model's chunks.
        """
        raise NotImplementedError

    def after_step(self, towers: nn.Module) -> None:
        """Called after every optimizer step, for updates without a gradient."""

    def retrieve_image(self, image: Tensor) -> Tensor:
        """Unit image embeddings for retrieval, from the tower's outputs (B, D).

        Called only on the model's retrieval head.
        """
        raise NotImplementedError

    def retrieve_text(self, text: Tensor) -> Tensor:
        """Unit text embeddings for retrieval, from the tower's outputs (B, D)."""
        raise NotImplementedError


def _hidden_layer(before: int, after: int) -> list[nn.Module]:
    """Linear, batch normalisation, ReLU."""
    # no bias: batch normalisation would cancel it, and its gradient would be 0
    return [nn.Linear(before, after, bias=False), GlobalBatchNorm(after), nn.ReLU()]


class Projectors(Head):
    """An MLP per modality: `image_projected`, `text_projected` (B, widths[-1]), not normalised.

    Hidden layers are Linear, batch normalisation, ReLU; the last is Linear without bias (Barlow
    Twins, arXiv 2103.03230, §2.2; VICReg, arXiv 2105.04906, §4.2: three layers of 8,192).

    Retrieval uses the projectors' outputs: each modality has its own projector, so the towers' own
    outputs are not aligned (the papers discard the projectors before linear probes).

    Args:
        context: `width` is used.
        widths: widths of the layers, the last is the output. Empty: the towers' outputs unchanged.
    """

    def __init__(
        self,
        context: RunContext,
        widths: Annotated[
            tuple[Annotated[int, Field(ge=1)], ...],
            Field(
                description="layers of a projector, the last its output; [] = the towers' outputs"
            ),
        ] = (),
    ) -> None:
        super().__init__()
        all_widths = [context.width, *widths]
        self.image = _projector(all_widths)
        self.text = _projector(all_widths)

    def forward(
        self, pairs: Pairs, image: Tensor, text: Tensor, outputs: Outputs
    ) -> dict[str, Tensor]:
        return {"image_projected": self.image(image), "text_projected": self.text(text)}

    def retrieve_image(self, image: Tensor) -> Tensor:
        return unit(self.image(image))

    def retrieve_text(self, text: Tensor) -> Tensor:
        return unit(self.text(text))


def _projector(widths: Sequence[int]) -> nn.Sequential:
    """An MLP from widths[0] to widths[-1]; the identity if there is only one width."""
    if len(widths) == 1:
        return nn.Sequential()

    *hidden, last = pairwise(widths)
    layers: list[nn.Module] = []
    for before, after in hidden:
        layers += _hidden_layer(before, after)
    layers.append(nn.Linear(*last, bias=False))
    return nn.Sequential(*layers)


class Predictors(Head):
    """An MLP per modality that predicts the other: `image_predicted`, `text_predicted` (B, D).

    Also delivers the towers' outputs: `image_raw`, `text_raw` (B, D). Each MLP is Linear, batch
    normalisation, ReLU, Linear. Retrieval uses the predictors, too, with running
    statistics.

    SimSiam narrows to ¼ of D (arXiv 2011.10566, §3: 2,048 to 512), BYOL widens to 16 (arXiv
    2006.07733, §3.2: 256 to 4,096). Between two views of an image the width matters little; between
    modalities the predictor alone maps one onto the other. Synthetic pairs, D = 32, batch 64,
    recall through predictors of ¼, 1, 4, 16: simsiam 4, 68, 93, 97 %; byol from 1 on 77, 94, 97 %.

    Args:
        context: `width` is used.
        hidden: width of the hidden layer, as a multiple of D.
    """

    def __init__(
        self,
        context: RunContext,
        hidden: Annotated[
            float, Field(gt=0, description="hidden width of the predictors, in embedding widths")
        ] = 4.0,
    ) -> None:
        super().__init__()
        self.image = _predictor(context.width, hidden)
        self.text = _predictor(context.width, hidden)

    def forward(
        self, pairs: Pairs, image: Tensor, text: Tensor, outputs: Outputs
    ) -> dict[str, Tensor]:
        return {
            "image_predicted": self.image(image),
            "text_predicted": self.text(text),
            "image_raw": image,
            "text_raw": text,
        }

    def retrieve_image(self, image: Tensor) -> Tensor:
        """(B, 2D) the prediction of the text, then the image's embedding.

        For texts it is the embedding, then the prediction of the image. So the inner product of
        both is the mean of the two cosines between a prediction and its target.
        """
        return torch.cat([unit(self.image(image)), unit(image)], dim=-1) / math.sqrt(2)

    def retrieve_text(self, text: Tensor) -> Tensor:
        return torch.cat([unit(text), unit(self.text(text))], dim=-1) / math.sqrt(2)


def _predictor(width: int, hidden: float) -> nn.Sequential:
    """Linear, batch normalisation, ReLU, Linear: from D to D."""
    between = max(1, round(hidden * width))
    return nn.Sequential(
        *_hidden_layer(width, between),
        nn.Linear(between, width),
    )


class Momentum(Head):
    """Moving average of the towers, without gradient: `image_target`, `text_target` (B, D).

    They are not normalised; see `MovingAverage`. A step takes a third more time, and a second
    copy of the towers is in memory. BYOL averages with .996, growing to 1;
    ALBEF with .995 and OTTER with .999, both constant.

    Args:
        context: `towers` and `steps` are used.
        momentum: weight of the past in the average, at the start.
        schedule: cosine lets `momentum` grow to 1 at the end of the run.
    """

    def __init__(
        self,
        context: RunContext,
        momentum: Annotated[
            float,
            Field(ge=0, lt=1, description="weight of the past in the moving average of the towers"),
        ] = 0.996,
        schedule: Annotated[
            Literal["cosine", "constant"],
            Field(description="of the momentum; cosine goes to 1 at the end of the run"),
        ] = "cosine",
    ) -> None:
        super().__init__()
        steps = context.steps if schedule == "cosine" else 0
        self.average = MovingAverage(context.towers, momentum, steps)

    @torch.no_grad()
    def forward(
        self, pairs: Pairs, image: Tensor, text: Tensor, outputs: Outputs
    ) -> dict[str, Tensor]:
        image, text = outputs(self.average.towers)
        return {"image_target": image, "text_target": text}

    def after_step(self, towers: nn.Module) -> None:
        self.average.update(towers)


class Prototypes(Head):
    """Directions that features are assigned to: `prototypes` (P, D), unit rows.

    Unlike other entries of `Embeddings.extra` they are not one row per pair.

    Args:
        context: `width` is used.
        prototypes: how many, P.
    """

    def __init__(
        self,
        context: RunContext,
        prototypes: Annotated[
            int, Field(ge=2, description="directions that features are assigned to")
        ] = 512,
    ) -> None:
        super().__init__()
        directions = torch.randn(prototypes, context.width)
        self.weight = nn.Parameter(F.normalize(directions, dim=1))

    def forward(
        self, pairs: Pairs, image: Tensor, text: Tensor, outputs: Outputs
    ) -> dict[str, Tensor]:
        return {"prototypes": self.weight}

    @torch.no_grad()
    def after_step(self, towers: nn.Module) -> None:
        self.weight.copy_(F.normalize(self.weight, dim=1))


class SoftScale(Head):
    """A second logit scale, for the logits compared with soft targets: `soft_scale` ().

    Starts at e^3.9 = 49.4 and stays between 1 and 100, as in OTTER's code (arXiv 2112.09445).
    """

    def __init__(self, context: RunContext) -> None:
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
    """Predicts a caption's tokens from the image: `token_logits` (B, V) and `token_ids` (B, L).

    Args:
        context: `width` and `vocabulary` (V) are used.

    Raises:
        ValueError: the vocabulary's size is not known.
    """

    reads_token_ids = True

    def __init__(self, context: RunContext) -> None:
        super().__init__()
        if not context.vocabulary:
            raise ValueError(
                "predicting tokens needs the size of the text tower's vocabulary, which this model "
                "does not tell"
            )
        self.classes = nn.Linear(context.width, context.vocabulary)

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
