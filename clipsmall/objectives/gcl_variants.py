"""The published algorithms of gcl: what they differ in, and their own values."""

from typing import Literal, NamedTuple

from clipsmall.objectives.gcl_temperature import Rule


class Variant(NamedTuple):
    """What the papers' algorithms differ in, with their own values."""

    # learned: the model's logit_scale
    temperature: Literal["fixed", "learned", "each"]
    gamma: float
    cosine: (
        # gamma falls from 1 to `gamma` over the first half of the run, else it is constant
        bool
    )
    # fixed, or each at the start; None: `model.logit_scale` says
    tau: float | None = 0.07
    # None: τ is no part of what is minimised over
    rho: float | None = None
    # of each pair's τ
    lr_tau: float | None = None
    # of each pair's τ
    bounds: tuple[float, float] = (0.01, 1.0)
    rule: Rule = "adam"
    # a pair's term is multiplied by its τ
    multiplied: bool = True


VARIANTS = {
    "sogclr": Variant("fixed", 0.8, False),
    "isogclr": Variant(
        "each", 0.8, False, 0.01, rho=6.0, lr_tau=0.03, bounds=(0.005, 1.0), rule="momentum"
    ),
    "fastclip_v0": Variant("learned", 0.2, True, None, multiplied=False),
    "fastclip_v1": Variant("fixed", 0.2, True),
    "fastclip_v2": Variant("each", 0.2, True, 0.03, rho=7.0, lr_tau=0.0133),
    "fastclip_v3": Variant("learned", 0.2, True, None, rho=6.5),
}


def chosen(name: str, options: dict[str, float | None]) -> Variant:
    """The paper's, with the user's own values where given."""
    if name not in VARIANTS:
        raise ValueError(f"gcl: variant is one of {', '.join(VARIANTS)}, not {name!r}")
    given = {key: value for key, value in options.items() if value is not None}
    for key, value in given.items():
        if getattr(VARIANTS[name], key) is None:
            raise ValueError(f"gcl: {name} has no {key}")
        if value < 0 or (key != "rho" and value == 0):
            raise ValueError(f"gcl: {key} is positive, not {value}")
    made = VARIANTS[name]._replace(**given)  # type: ignore[arg-type]
    if made.gamma > 1:
        raise ValueError(f"gcl: gamma is at most 1, not {made.gamma}")
    if (
        made.temperature == "each"
        and made.tau is not None
        and not made.bounds[0] <= made.tau <= made.bounds[1]
    ):
        raise ValueError(
            f"gcl: tau of {name} is from {made.bounds[0]} to {made.bounds[1]}, not {made.tau}"
        )
    return made
