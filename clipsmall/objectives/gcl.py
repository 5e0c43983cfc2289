"""Global contrastive losses: every pair remembers the mean over its negatives of all steps, not of
one batch.
"""

import math

import torch
from torch import Tensor, nn

from clipsmall.batch import Embeddings, RunContext
from clipsmall.distributed import similarity, world
from clipsmall.distributed.similarity import Layout
from clipsmall.objectives.gcl_temperature import Temperatures, mean_exponent
from clipsmall.objectives.gcl_variants import chosen
from clipsmall.objectives.pairs import Direction, directions, layout, negatives


class Gcl(nn.Module):
    """SogCLR (Yuan et al. 2022, arXiv 2202.12387, algorithm 1), iSogCLR (Qiu et al. 2023, arXiv
    2305.11965, algorithm 1), FastCLIP (Wei et al. 2024, arXiv 2407.01445, eq. GCL, RGCL and RGCL-g,
    algorithm 1).

    L = mean_i [ τ (log(ε + u_i) + ρ) + the same for the texts ],  u_i ← (1 − γ) u_i + γ g_i  (first
    visit: g_i), g_i = mean over the batch's negatives of e^{(cos_ij − cos_ii) / τ};  dL by
    features: τ dg_i / (ε + u_i).

    | variant     | τ                                      | γ        | ρ   |
    | sogclr      | fixed                                  | constant | –   |
    | isogclr     | of every image and text, by momentum   | constant | yes |
    | fastclip_v0 | the model's, learned; terms without it | cosine   | –   |
    | fastclip_v1 | fixed                                  | cosine   | –   |
    | fastclip_v2 | of every image and text, by Adam       | cosine   | yes |
    | fastclip_v3 | the model's, learned                   | cosine   | yes |

    What a batch of 64 estimates from 63 negatives, u_i knows from all that the pair has met: where
    features move slowly the gradient is that of a batch of the whole data set. γ = 1 forgets: the
    gradient is that of 2 τ `dcl`. For batches of 16 to 1,024 and several epochs; the smaller the
    batch, the smaller γ (0.6 to 0.2).

    With ρ, τ rests where the negatives' weights are ρ nats from uniform (slope: ρ − KL). So ρ must
    lie below the log of the data set's size; while γ is near 1 a batch below e^ρ (665 for 6.5) can
    only lower τ.

    Memory: 2 floats a pair; isogclr 6; fastclip_v2 8 and an integer.

    Args:
        setting: uses `ids` and `steps`.
        gamma: constant or at the end; None = 0.8 (sogclr, isogclr), 0.2 (fastclip).
        tau: fixed or at the start; None = 0.07, isogclr 0.01, fastclip_v2 0.03. v0 and v3:
            `model.logit_scale` says.
        rho: None = 6 (isogclr), 7 (fastclip_v2), 6.5 (fastclip_v3).
        lr_tau: of each pair's τ; None = 0.03 (isogclr), 0.0133 (fastclip_v2).
        epsilon: pairs whose u lies far below it no longer learn.
        mask_duplicates: leave columns with the row's own caption out.

    Called with rows and columns it returns `loss` (L over my rows), `accuracy`,
    `effective_negatives`, `gamma` and `temperature` (the mean over my rows).

    Raises:
        ValueError: a stream (no ids), a pair that is not among the ids, a batch of one pair; an
            unknown variant, an option out of range or of another variant.
    """

    def __init__(
        self,
        setting: RunContext,
        variant: str = "fastclip_v3",
        gamma: float | None = None,
        tau: float | None = None,
        rho: float | None = None,
        lr_tau: float | None = None,
        epsilon: float = 1e-14,
        mask_duplicates: bool = True,
    ) -> None:
        super().__init__()
        if setting.ids is None:
            raise ValueError(
                "gcl remembers every pair: it needs a data set whose pairs are known, not a stream"
            )
        if not 0 <= epsilon < 1:
            raise ValueError(f"gcl: epsilon is from 0 to 1, not {epsilon}")
        self.variant = made = chosen(
            variant, {"gamma": gamma, "tau": tau, "rho": rho, "lr_tau": lr_tau}
        )
        self.epsilon = epsilon
        self.mask_duplicates = mask_duplicates
        self.decay = max(setting.steps // 2, 1)
        count = len(setting.ids)
        self.ids: Tensor
        self.log_u: Tensor
        self.step: Tensor
        # the data set's: it is checked on resume itself
        self.register_buffer("ids", setting.ids, persistent=False)
        # of image and text; −inf: not met yet
        self.register_buffer("log_u", torch.full((count, 2), -torch.inf))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.temperatures: Temperatures | None = None
        if made.temperature == "each":
            assert made.tau is not None
            assert made.lr_tau is not None
            self.temperatures = Temperatures(count, made.tau, made.lr_tau, made.bounds, made.rule)

    def forward(self, rows: Embeddings, columns: Embeddings) -> dict[str, Tensor]:
        if len(columns.index) < 2:
            raise ValueError("gcl compares pairs with one another: it needs a batch of at least 2")
        place = layout(rows, columns, self.mask_duplicates)
        gamma = self.gamma
        spots = self._spots(columns.index)[place.own]
        image, text, tau = self._compared(rows, columns, place, spots)
        own = torch.stack([image.own, text.own], dim=1)
        others = torch.stack([image.others, text.others], dim=1)
        told_apart = negatives(place)
        # every column has the row's caption: nothing to learn from, or to remember
        alone = told_apart[:, None] == 0
        with torch.no_grad():
            log_g = others - own - told_apart.to(own.dtype).log()[:, None]
            before = self.log_u[spots].to(own.dtype)
            log_u = torch.where(
                before == -torch.inf, log_g, _mixed(before, log_g, gamma.to(own.dtype))
            )
            floored = log_u.logaddexp(torch.full_like(log_u, self.epsilon).log())
            weight = (log_g - floored).exp().masked_fill(alone, 0.0)
            value = (floored + (self.variant.rho or 0.0)).masked_fill(alone, 0.0)
        factor = tau if self.variant.multiplied else torch.ones_like(tau)
        pulls = (weight * (others - own)).masked_fill(alone, 0.0)
        # L itself; of its gradient only the part where τ stands in front
        by_tau = (factor * value).sum(dim=1).mean()
        # the rest of the gradient, by features and by τ within u
        pull = (factor.detach() * pulls).sum(dim=1).mean()
        slopes = None
        if self.temperatures is not None:
            of_image = mean_exponent(rows.image, columns.text, 1 / tau[:, 0], place, image)
            of_text = mean_exponent(rows.text, columns.image, 1 / tau[:, 1], place, text)
            slopes = value - weight * torch.stack([of_image, of_text], dim=1)
        self._remember(spots, told_apart > 0, log_u, slopes)
        return {
            "loss": by_tau + (pull - pull.detach()),
            "accuracy": (image.accuracy + text.accuracy) / 2,
            "effective_negatives": told_apart.float().mean(),
            "gamma": gamma,
            "temperature": tau.detach().mean(),
        }

    @property
    def gamma(self) -> Tensor:
        """() of this step."""
        if not self.variant.cosine:
            return torch.full_like(self.log_u[0, 0], self.variant.gamma)
        done = (self.step.to(self.log_u.dtype) / self.decay).clamp(max=1.0)
        return (
            self.variant.gamma + (1 - self.variant.gamma) * (1 + (math.pi * done).cos()) / 2
        ).clamp(max=1.0)

    def _spots(self, index: Tensor) -> Tensor:
        """(N,) where these pairs stand in the tables; of all columns, so that all ranks refuse a
        pair together.
        """
        spots = torch.searchsorted(self.ids, index).clamp(max=len(self.ids) - 1)
        unknown = index[self.ids[spots] != index]
        if len(unknown):
            raise ValueError(
                f"gcl: pair {unknown[0].item()} is not one of the {len(self.ids)} it was built for"
            )
        return spots

    def _compared(
        self, rows: Embeddings, columns: Embeddings, place: Layout, spots: Tensor
    ) -> tuple[Direction, Direction, Tensor]:
        """Images among texts, texts among images, and the τ of both: (b, 2) or (1, 1)."""
        if self.temperatures is not None:
            tau = self.temperatures.tau[spots].to(similarity.wide(rows.image))
            return *directions(rows, columns, place, (1 / tau[:, 0], 1 / tau[:, 1])), tau
        if self.variant.tau is not None:
            rows = rows._replace(
                logit_scale=torch.full_like(rows.logit_scale, 1 / self.variant.tau)
            )
        return *directions(rows, columns, place), 1 / rows.logit_scale.view(1, 1)

    @torch.no_grad()
    def _remember(self, spots: Tensor, met: Tensor, log_u: Tensor, slopes: Tensor | None) -> None:
        """What all ranks found, put into the tables of each; a pair that met no negative stays as
        it was.

        So does one whose numbers are not finite: fp16 skips that step, and in a table a NaN would
        stay for ever.
        """
        met = world.gather((met & log_u.isfinite().all(dim=1)).int()) > 0
        spots = world.gather(spots)[met]
        self.log_u[spots] = world.gather(log_u)[met].to(self.log_u.dtype)
        if self.temperatures is not None and slopes is not None:
            self.temperatures.update(spots, world.gather(slopes)[met])
        self.step += 1


def _mixed(before: Tensor, log_g: Tensor, gamma: Tensor) -> Tensor:
    """log((1 − γ) u + γ g); at γ = 1 log 0 = −inf is as good as any."""
    return (before + (1 - gamma).log()).logaddexp(log_g + gamma.log())
