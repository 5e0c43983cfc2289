"""The rows of a plan: the config as it is, and alternatives, each with its largest batch."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from clipsmall.config import Config
from clipsmall.plan.largest_batch import MOST, FitAnswer, Planner, changed

# The whole batch at once, with nothing recomputed.
WHOLE_BATCH = {
    "model.attention": "auto",
    "model.checkpoint_activations": False,
    "model.chunk_size": 0,
}


class PlanRow(NamedTuple):
    """One set of options: memory for the config's batch, and the largest batch that fits."""

    title: str
    # `section.field` -> value, for options that differ from the config
    options: dict[str, Any]
    # pairs per rank in the config's batch
    rows: int
    # bytes at the peak of a step with that batch
    peak: int
    largest: FitAnswer
    # FLOPs per pair
    flops: float


def plan_rows(planner: Planner, config: Config, rows: int) -> Iterator[PlanRow]:
    """The row of the config itself, then the possible alternatives without repeats.

    rows: pairs per rank in the config's batch.
    """
    base = as_configured(planner, config, rows)
    yield plan_row(planner, base, {}, f"as configured: {describe(base)}", rows)
    seen = {base.model_dump_json()}
    for changes in alternatives(planner, base, rows):
        options = {}
        for name, value in changes.items():
            if value != value_of(base, name):
                options[name] = value

        other = changed(base, options)
        key = other.model_dump_json()
        if key in seen or not is_possible(planner, other, rows):
            continue
        seen.add(key)
        yield plan_row(planner, other, options, describe(other), rows)


def plan_row(
    planner: Planner, config: Config, options: dict[str, Any], title: str, rows: int
) -> PlanRow:
    peak = planner.peak(config, rows)
    largest = planner.largest(config, rows)
    chunk = config.model.chunk_size
    # at least two chunks, so that FLOPs are those of a batch in chunks
    counted = max(rows, 2 * chunk) if isinstance(chunk, int) else rows
    flops = planner.flops(config, counted)
    return PlanRow(title, options, rows, peak, largest, flops)


def as_configured(planner: Planner, config: Config, rows: int) -> Config:
    """The config with `auto` resolved as in a run; unchanged if nothing fits."""
    chunk = config.model.chunk_size
    checkpoint = config.model.checkpoint_activations
    plain = {
        "model.chunk_size": 0 if chunk == "auto" else chunk,
        "model.checkpoint_activations": checkpoint is True,
    }
    config = changed(config, plain)

    # a run resolves `auto` by the memory of its GPU, and only if needed
    decides = planner.machine.device == "cuda" and "auto" in (chunk, checkpoint)
    if not decides or planner.fits(config, rows):
        return config
    if chunk == "auto":
        size = rows
        while size > 1 and not planner.fits(changed(config, {"model.chunk_size": size}), rows):
            size = (size + 1) // 2
        return changed(config, {"model.chunk_size": size})

    if checkpoint == "auto" and not config.model.chunk_size:
        checkpointed = changed(config, {"model.checkpoint_activations": True})
        if is_possible(planner, checkpointed, rows):
            return checkpointed

    return config


def is_possible(planner: Planner, config: Config, rows: int) -> bool:
    """Whether a run would accept it: towers may lack an option, and BatchNorm forbids chunks."""
    try:
        planner.peak(config, rows)
    except ValueError:
        return False
    return True


def alternatives(planner: Planner, base: Config, rows: int) -> Iterator[dict[str, Any]]:
    """Options that could be changed to save memory or time, by `section.field`."""
    yield WHOLE_BATCH | {"model.attention": "eager"}
    yield WHOLE_BATCH
    yield WHOLE_BATCH | {"model.checkpoint_activations": True}
    whole = changed(base, WHOLE_BATCH)
    most = planner.largest(whole, rows).rows

    # chunks are pointless if every batch size fits
    if most < MOST:
        sizes = (longest_chunk(planner, whole, most), 8)
        for size in dict.fromkeys(sizes):
            yield WHOLE_BATCH | {"model.chunk_size": size}

    adapted = "lora" in (base.tune.image, base.tune.text)
    tune = "full" if adapted else "lora"
    yield WHOLE_BATCH | {"tune.image": tune, "tune.text": tune}


def longest_chunk(planner: Planner, whole: Config, most: int) -> int:
    """The largest power of two as chunk size with which a batch of 4 · `most` pairs fits.

    most: pairs that fit at once. A chunk must be smaller, as gradients and the embeddings of all
    pairs are in memory beside it.
    """
    size = power_of_two(most)
    while size > 1:
        try:
            if planner.fits(changed(whole, {"model.chunk_size": size}), 4 * most):
                break
        except ValueError:
            # BatchNorm; the row with chunks will be refused, too
            break

        size //= 2

    return size


def power_of_two(number: int) -> int:
    """The largest power of two up to `number`; at least 1."""
    return 1 << max(number, 1).bit_length() - 1


def value_of(config: Config, name: str) -> Any:
    """The value of a `section.field`."""
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def describe(config: Config) -> str:
    """The options that cost or save memory, in words."""
    tune = config.tune
    model = config.model
    tuned = str(tune.image)
    if tune.image != tune.text:
        tuned = f"{tune.image} image, {tune.text} text"
    if "lora" in tuned:
        tuned = tuned.replace("lora", f"LoRA r={tune.lora.rank}", 1)
    parts = [tuned, "eager attention" if model.attention == "eager" else "SDPA"]
    if model.checkpoint_activations is True:
        parts.append("checkpointing")
    if model.chunk_size:
        parts.append(f"chunks of {model.chunk_size}")
    return ", ".join(parts)


def best_row(rows: Sequence[PlanRow]) -> PlanRow | None:
    """The row of the largest batch, with the fewest FLOPs among equals; None if it is the first."""
    best = max(rows, key=lambda row: (row.largest.rows, -row.flops))
    return best if best.largest.rows > rows[0].largest.rows else None
