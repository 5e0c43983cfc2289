"""Global contrastive losses: every pair remembers the mean over its negatives of all steps."""

import math
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from clipsmall.batch import Embeddings, RunContext
from clipsmall.distributed import similarity, world
from clipsmall.distributed.similarity import Layout
from clipsmall.objectives.gcl_temperature import Rule, Temperatures, mean_exponent
from clipsmall.objectives.options import check_options
from clipsmall.objectives.pairs import Direction, directions, layout_of, negative_counts
from clipsmall.objectives.spec import ObjectiveSpec, Options

VariantName = Literal[
    "sogclr", "isogclr", "fastclip_v0", "fastclip_v1", "fastclip_v2", "fastclip_v3"
]


class Variant(NamedTuple):
    """What the papers' algorithms differ in, with their own values."""

    # learned: the model's logit_scale; each: one per image and per text
    temperature: Literal["fixed", "learned", "each"]
    # weight of the newest value in the running mean; constant, or at the end of the decay
    gamma: float
    # gamma falls from 1 to `gamma` over the first half of the run, else it is constant
    cosine: bool
    # temperature, fixed or initial; None: taken from `model.logit_scale`
    tau: float | None = 0.07
    # None: the loss has no ρ term for τ
    rho: float | None = None
    # learning rate of each pair's τ
    lr_tau: float | None = None
    # smallest and largest τ of a pair
    bounds: tuple[float, float] = (0.01, 1.0)
    # how each pair's τ is updated
    rule: Rule = "adam"
    # a pair's term is multiplied by its τ
    multiplied: bool = True


VARIANTS: dict[VariantName, Variant] = {
    "sogclr": Variant("fixed", gamma=0.8, cosine=False),
    "isogclr": Variant(
        "each",
        gamma=0.8,
        cosine=False,
        tau=0.01,
        rho=6.0,
        lr_tau=0.03,
        bounds=(0.005, 1.0),
        rule="momentum",
    ),
    "fastclip_v0": Variant("learned", gamma=0.2, cosine=True, tau=None, multiplied=False),
    "fastclip_v1": Variant("fixed", gamma=0.2, cosine=True),
    "fastclip_v2": Variant("each", gamma=0.2, cosine=True, tau=0.03, rho=7.0, lr_tau=0.0133),
    "fastclip_v3": Variant("learned", gamma=0.2, cosine=True, tau=None, rho=6.5),
}


class Gcl(nn.Module):
    """Global contrastive loss: the sum over negatives is a running mean over all steps.

    Also known as:
        GCL; SogCLR, iSogCLR, FastCLIP (by variant); global contrastive learning, compositional
        optimisation of the contrastive loss.

    Formula:
        L = mean_i [ τ (log(ε + u_i) + ρ) + the same for the texts ],
        u_i ← (1 − γ) u_i + γ g_i  (first visit: g_i),
        g_i = mean over the batch's negatives of e^{(cos_ij − cos_ii) / τ};
        dL by features: τ dg_i / (ε + u_i).

        | variant     | τ                                      | γ        | ρ   |
        |-------------|----------------------------------------|----------|-----|
        | sogclr      | fixed                                  | constant | –   |
        | isogclr     | of every image and text, by momentum   | constant | yes |
        | fastclip_v0 | the model's, learned; terms without it | cosine   | –   |
        | fastclip_v1 | fixed                                  | cosine   | –   |
        | fastclip_v2 | of every image and text, by Adam       | cosine   | yes |
        | fastclip_v3 | the model's, learned                   | cosine   | yes |

    Source:
        SogCLR, Yuan et al. 2022, arXiv 2202.12387, algorithm 1; iSogCLR, Qiu et al. 2023, arXiv
        2305.11965, algorithm 1; FastCLIP, Wei et al. 2024, arXiv 2407.01445, eq. GCL, RGCL and
        RGCL-g, algorithm 1.

    When to use:
        Batches of 16 to 1,024 and several epochs; the smaller the batch, the smaller γ (0.6 to
        0.2). What a batch of 64 estimates from 63 negatives, u_i knows from all that the pair has
        met: where features change slowly the gradient is that of a batch of the whole data set.

    When not:
        A stream, whose pairs are not known; a single epoch, in which u is met once; with γ near 1 a
        batch below e^ρ (665 for 6.5) can only lower τ.

    Related:
        `dcl`: γ = 1 forgets, and the gradient is that of 2 τ `dcl`. With ρ, τ rests where the
        negatives' weights are ρ nats from uniform (slope: ρ − KL), so ρ must lie below the log of
        the data set's size.

    Memory: 2 floats per pair of the data set; isogclr 6; fastclip_v2 8 and an integer.

    Called with rows, my b pairs, and columns, the N pairs of the global batch or more (a queue).

    Args:
        context: `ids` and `steps` are used.
        variant: one of the above.
        gamma: constant or at the end; None = 0.8 (sogclr, isogclr), 0.2 (fastclip).
        tau: fixed or at the start; None = 0.07, isogclr 0.01, fastclip_v2 0.03. v0 and v3:
            `model.logit_scale` says.
        rho: None = 6 (isogclr), 7 (fastclip_v2), 6.5 (fastclip_v3).
        lr_tau: of each pair's τ; None = 0.03 (isogclr), 0.0133 (fastclip_v2).
        epsilon: pairs whose u lies far below it no longer learn.
        mask_duplicates: leave columns with the row's own caption out.

    Returns:
        `loss` () L over my rows; `accuracy` (); `effective_negatives` (); `gamma` ();
        `temperature` () mean over my rows.

    Raises:
        ValueError: a stream (no ids), a pair that is not among the ids, a batch of one pair; an
            unknown variant, an option out of range or of another variant.

    Examples:
        >>> pairs = Embeddings.of(torch.eye(4), torch.eye(4), logit_scale=2.0)
        >>> context = RunContext(width=4, batch_size=4, steps=10, ids=torch.arange(4))
        >>> loss = Gcl(context, variant="fastclip_v0")
        >>> round(loss(pairs, pairs)["loss"].item(), 4)  # log e^−2, for images and for texts
        -4.0
    """

    def __init__(
        self,
        context: RunContext,
        variant: Annotated[
            VariantName, Field(description="the published algorithm")
        ] = "fastclip_v3",
        gamma: Annotated[
            float | None,
            Field(gt=0, le=1, description="of the running mean; null = the variant's, as below"),
        ] = None,
        tau: Annotated[
            float | None, Field(gt=0, description="temperature where it is not the model's")
        ] = None,
        rho: Annotated[
            float | None,
            Field(ge=0, description="how far a learned temperature concentrates, in nats"),
        ] = None,
        lr_tau: Annotated[
            float | None, Field(gt=0, description="learning rate of each pair's temperature")
        ] = None,
        epsilon: Annotated[
            float, Field(ge=0, lt=1, description="added to the running mean")
        ] = 1e-14,
        mask_duplicates: bool = True,
    ) -> None:
        super().__init__()
        if context.ids is None:
            raise ValueError(
                "gcl remembers every pair: it needs a data set whose pairs are known, not a stream"
            )
        changes = {"gamma": gamma, "tau": tau, "rho": rho, "lr_tau": lr_tau}
        check_options("gcl", Gcl, variant=variant, epsilon=epsilon, **changes)
        given: Options = {"variant": variant, **changes}
        if problem := contradiction(given):
            raise ValueError(f"gcl: {problem}")
        self.variant = chosen = chosen_variant(given)
        self.epsilon = epsilon
        self.mask_duplicates = mask_duplicates
        self.decay_steps = max(context.steps // 2, 1)
        count = len(context.ids)
        self.ids: Tensor
        self.log_u: Tensor
        self.step: Tensor
        # not saved, because they belong to the data set, which is checked on resume
        self.register_buffer("ids", context.ids, persistent=False)
        # log u of image and text; −inf: not seen yet
        self.register_buffer("log_u", torch.full((count, 2), -torch.inf))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.temperatures: Temperatures | None = None
        if chosen.temperature == "each":
            assert chosen.tau is not None
            assert chosen.lr_tau is not None
            self.temperatures = Temperatures(
                count, chosen.tau, chosen.lr_tau, chosen.bounds, chosen.rule
            )

    def forward(self, rows: Embeddings, columns: Embeddings) -> dict[str, Tensor]:
        if len(columns.index) < 2:
            raise ValueError("gcl compares pairs with one another: it needs a batch of at least 2")
        layout = layout_of(rows, columns, self.mask_duplicates)
        gamma = self.gamma
        # (b,) my rows of the tables
        positions = self._positions(columns.index)[layout.own]
        image, text, tau = self._compared(rows, columns, layout, positions)
        counts = negative_counts(layout)

        # from here on, (b, 2) stands for image and text
        own = torch.stack([image.own, text.own], dim=1)
        others = torch.stack([image.others, text.others], dim=1)
        # every column has the row's caption: nothing to learn from, or to remember
        no_negative = counts[:, None] == 0
        with torch.no_grad():
            # log of the mean over negatives
            log_counts = counts.to(own.dtype).log()[:, None]
            log_g = others - own - log_counts
            log_u = self._averaged(positions, log_g, gamma)

            # ε + u
            log_epsilon = torch.full_like(log_u, self.epsilon).log()
            floored = log_u.logaddexp(log_epsilon)

            # g / (ε + u), for the gradient
            weight = (log_g - floored).exp()
            weight = weight.masked_fill(no_negative, 0.0)

            # log(ε + u) + ρ, for the value
            value = floored + (self.variant.rho or 0.0)
            value = value.masked_fill(no_negative, 0.0)

        # L itself; of its gradient only the part where τ stands in front
        factor = tau if self.variant.multiplied else torch.ones_like(tau)
        by_tau = (factor * value).sum(dim=1).mean()

        # the rest of the gradient, by features and by τ within u
        pulls = weight * (others - own)
        pulls = pulls.masked_fill(no_negative, 0.0)
        pull = (factor.detach() * pulls).sum(dim=1).mean()

        # (b, 2) derivatives of L by each pair's temperatures
        slopes = None
        if self.temperatures is not None:
            of_image = mean_exponent(rows.image, columns.text, 1 / tau[:, 0], layout, image)
            of_text = mean_exponent(rows.text, columns.image, 1 / tau[:, 1], layout, text)
            exponents = torch.stack([of_image, of_text], dim=1)
            slopes = value - weight * exponents

        self._remember(positions, counts > 0, log_u, slopes)
        return {
            "loss": by_tau + (pull - pull.detach()),
            "accuracy": (image.accuracy + text.accuracy) / 2,
            "effective_negatives": counts.float().mean(),
            "gamma": gamma,
            "temperature": tau.detach().mean(),
        }

    @property
    def gamma(self) -> Tensor:
        """() γ at this step."""
        least = self.variant.gamma
        if not self.variant.cosine:
            return torch.full_like(self.log_u[0, 0], least)

        # fraction of the decay that is done
        step = self.step.to(self.log_u.dtype)
        done = (step / self.decay_steps).clamp(max=1.0)

        # from 1 to the least
        wave = 1 + (math.pi * done).cos()
        gamma = least + (1 - least) * wave / 2
        return gamma.clamp(max=1.0)

    def _averaged(self, positions: Tensor, log_g: Tensor, gamma: Tensor) -> Tensor:
        """(b, 2) log u after this step; at the first visit of a pair that is log g."""
        dtype = log_g.dtype
        before = self.log_u[positions].to(dtype)
        mixed = _mixed(before, log_g, gamma.to(dtype))

        first_visit = before == -torch.inf
        return torch.where(first_visit, log_g, mixed)

    def _positions(self, index: Tensor) -> Tensor:
        """(N,) rows of the tables that hold these pairs.

        Computed for all columns, so that all ranks raise together for an unknown pair.
        """
        count = len(self.ids)
        # a number beyond the last one is unknown, too
        positions = torch.searchsorted(self.ids, index).clamp(max=count - 1)

        unknown = index[self.ids[positions] != index]
        if len(unknown):
            first = unknown[0].item()
            raise ValueError(f"gcl: pair {first} is not one of the {count} it was built for")
        return positions

    def _compared(
        self, rows: Embeddings, columns: Embeddings, layout: Layout, positions: Tensor
    ) -> tuple[Direction, Direction, Tensor]:
        """Images among texts, texts among images, and the τ of both: (b, 2) or (1, 1)."""
        # one temperature per image and per text
        if self.temperatures is not None:
            tau = self.temperatures.tau[positions]
            tau = tau.to(similarity.wide(rows.image))
            scales = (1 / tau[:, 0], 1 / tau[:, 1])
            image, text = directions(rows, columns, layout, scales)
            return image, text, tau

        # a fixed temperature instead of the model's
        if self.variant.tau is not None:
            scale = torch.full_like(rows.logit_scale, 1 / self.variant.tau)
            rows = rows._replace(logit_scale=scale)

        image, text = directions(rows, columns, layout)
        tau = 1 / rows.logit_scale.view(1, 1)
        return image, text, tau

    @torch.no_grad()
    def _remember(
        self, positions: Tensor, has_negative: Tensor, log_u: Tensor, slopes: Tensor | None
    ) -> None:
        """Put what all ranks found into the tables; a pair without negatives stays as it was.

        So does a pair whose numbers are not finite: fp16 skips that step, and a NaN would stay in a
        table for ever.
        """
        is_finite = log_u.isfinite().all(dim=1)
        sound = has_negative & is_finite

        # gathered, because the tables are the same on all ranks
        taken = world.gather(sound.int()) > 0
        positions = world.gather(positions)[taken]
        all_log_u = world.gather(log_u)[taken]
        self.log_u[positions] = all_log_u.to(self.log_u.dtype)

        if self.temperatures is not None and slopes is not None:
            all_slopes = world.gather(slopes)[taken]
            self.temperatures.update(positions, all_slopes)
        self.step += 1


def _mixed(before: Tensor, log_g: Tensor, gamma: Tensor) -> Tensor:
    """log((1 − γ) u + γ g); at γ = 1 log 0 = −inf is as good as any."""
    return (before + (1 - gamma).log()).logaddexp(log_g + gamma.log())


def _changes(options: Options) -> dict[str, float]:
    """Values that replace the variant's own."""
    names = ("gamma", "tau", "rho", "lr_tau")
    return {name: options[name] for name in names if options[name] is not None}


def chosen_variant(options: Options) -> Variant:
    """The published variant, with the user's own values where given."""
    return VARIANTS[options["variant"]]._replace(**_changes(options))  # type: ignore[arg-type]


def contradiction(options: Options) -> str:
    """What is wrong with the user's values for this variant; "" = nothing."""
    name = options["variant"]
    for key in _changes(options):
        if getattr(VARIANTS[name], key) is None:
            return f"{name} has no {key}"
    chosen = chosen_variant(options)
    least, largest = chosen.bounds
    if (
        chosen.temperature == "each"
        and chosen.tau is not None
        and not least <= chosen.tau <= largest
    ):
        return f"tau of {name} is from {least} to {largest}, not {chosen.tau}"
    return ""


SPEC = ObjectiveSpec(
    Gcl,
    section="gcl",
    contradiction=contradiction,
    learns_scale=lambda options: VARIANTS[options["variant"]].temperature == "learned",
    queue=True,
)
