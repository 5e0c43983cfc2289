"""The rows of a plan: the config as it is, and what else could be chosen, each with its largest
batch.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from clipsmall.config import Config
from clipsmall.plan.largest import MOST, FitAnswer, Planner, changed

WHOLE = {"model.attention": "auto", "model.checkpoint_activations": False, "model.chunk_size": 0}


class PlanRow(NamedTuple):
    title: str
    # what the config has otherwise, by `section.field`
    options: dict[str, Any]
    # pairs of a rank in the config's batch
    rows: int
    # bytes with them
    peak: int
    largest: FitAnswer
    # a pair
    flops: float


def as_configured(planner: Planner, config: Config, rows: int) -> Config:
    """The config with `auto` decided as a run would decide it; what does not fit stays as it is."""
    chunk = config.model.chunk_size
    checkpoint = config.model.checkpoint_activations
    plain = {
        "model.chunk_size": 0 if chunk == "auto" else chunk,
        "model.checkpoint_activations": checkpoint is True,
    }
    found = changed(config, plain)
    if (
        planner.machine.device != "cuda"
        or "auto" not in (chunk, checkpoint)
        or planner.fits(found, rows)
    ):
        return found
    if chunk == "auto":
        size = rows
        while size > 1 and not planner.fits(changed(found, {"model.chunk_size": size}), rows):
            size = (size + 1) // 2
        return changed(found, {"model.chunk_size": size})
    if checkpoint == "auto" and not found.model.chunk_size:
        return (
            without_error(planner, changed(found, {"model.checkpoint_activations": True}), rows)
            or found
        )
    return found


def without_error(planner: Planner, config: Config, rows: int) -> Config | None:
    """None if such a run is refused: towers that cannot, BatchNorm in chunks."""
    try:
        planner.peak(config, rows)
    except ValueError:
        return None
    return config


def plan(planner: Planner, config: Config, rows: int) -> Iterator[PlanRow]:
    """First the config's own row; then others that are possible, each once."""
    base = as_configured(planner, config, rows)
    own = row(planner, base, {}, f"as configured: {words(base)}", rows)
    yield own
    seen = {base.model_dump_json()}
    for changes in alternatives(planner, base, rows):
        options = {name: value for name, value in changes.items() if value != valued(base, name)}
        other = changed(base, options)
        if other.model_dump_json() in seen or not without_error(planner, other, rows):
            continue
        seen.add(other.model_dump_json())
        yield row(planner, other, options, words(other), rows)


def alternatives(planner: Planner, base: Config, rows: int) -> Iterator[dict[str, Any]]:
    yield WHOLE | {"model.attention": "eager"}
    yield WHOLE
    yield WHOLE | {"model.checkpoint_activations": True}
    whole = changed(base, WHOLE)
    most = planner.largest(whole, rows).rows
    # else there is nothing to cut
    if most < MOST:
        for size in dict.fromkeys((longest_chunk(planner, whole, most), 8)):
            yield WHOLE | {"model.chunk_size": size}
    adapted = "lora" in (base.tune.image, base.tune.text)
    yield WHOLE | dict.fromkeys(("tune.image", "tune.text"), "full" if adapted else "lora")


def longest_chunk(planner: Planner, whole: Config, most: int) -> int:
    """The largest power of two that lets a batch through of which `most` pairs fit at once: beside
    a chunk there are gradients, and embeddings of all pairs."""
    size = power_of_two(most)
    while size > 1:
        try:
            if planner.fits(changed(whole, {"model.chunk_size": size}), 4 * most):
                break
        except ValueError:
            # BatchNorm: refused again when it is a row
            break
        size //= 2
    return size


def power_of_two(number: int) -> int:
    return 1 << max(number, 1).bit_length() - 1


def row(
    planner: Planner, config: Config, options: dict[str, Any], title: str, rows: int
) -> PlanRow:
    peak = planner.peak(config, rows)
    largest = planner.largest(config, rows)
    chunk = config.model.chunk_size
    flops = planner.flops(config, max(rows, 2 * chunk if isinstance(chunk, int) else 0))
    return PlanRow(title, options, rows, peak, largest, flops)


def valued(config: Config, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def words(config: Config) -> str:
    """What of it costs or saves memory."""
    tune = config.tune
    model = config.model
    tuned = str(tune.image) if tune.image == tune.text else f"{tune.image} image, {tune.text} text"
    if "lora" in tuned:
        tuned = tuned.replace("lora", f"LoRA r={tune.lora.rank}", 1)
    parts = [tuned, "eager attention" if model.attention == "eager" else "SDPA"]
    parts += ["checkpointing"] * (model.checkpoint_activations is True)
    parts += [f"chunks of {model.chunk_size}"] * bool(model.chunk_size)
    return ", ".join(parts)


def best(rows: Sequence[PlanRow]) -> PlanRow | None:
    """The one that buys most: the largest batch, the fewest FLOPs among equals; None if it is the
    config's own.
    """
    found = max(rows, key=lambda row: (row.largest.rows, -row.flops))
    return found if found.largest.rows > rows[0].largest.rows else None
