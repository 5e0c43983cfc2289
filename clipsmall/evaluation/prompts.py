"""Class names and prompt templates: open_clip's built-in ones, a user's files, or the data set's
own words.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

Template = Callable[[str], str]


def templates(name: str) -> list[Template]:
    """`plain` = the class name alone; `simple` and `openai` = open_clip's 7 and 80; else a file of
    lines with {c}.

    Raises:
        ValueError: no such file, or a line without {c}.
    """
    if name == "plain":
        return [str]
    if name in ("simple", "openai"):
        import open_clip

        named = (
            open_clip.SIMPLE_IMAGENET_TEMPLATES
            if name == "simple"
            else open_clip.OPENAI_IMAGENET_TEMPLATES
        )
        return list(named)
    lines = _lines(name, "templates (plain, simple, openai or a file)")
    for number, line in enumerate(lines, start=1):
        if "{c}" not in line:
            raise ValueError(f"{name}, line {number}: {line!r} has no {{c}} for the class name")
    return [lambda c, line=line: line.replace("{c}", c) for line in lines]  # type: ignore[misc]


def classes(name: str, captions: list[list[str]], labels: list[str | int]) -> list[str]:
    """`imagenet`, `captions` and `labels` (the data set's distinct ones, sorted), or a file with a
    class a line.

    Names that differ in letter case alone are one class.

    Raises:
        ValueError: no such file, or class numbers where names are needed.
    """
    if name in ("captions", "labels") and any(isinstance(label, int) for label in labels):
        raise ValueError(
            f"classes={name}: labels are numbers here; give a classnames.txt beside the data, or --classes FILE"
        )
    if name == "imagenet":
        import open_clip

        return list(open_clip.IMAGENET_CLASSNAMES)
    if name == "captions":
        return _distinct(caption for all_of_one in captions for caption in all_of_one)
    if name == "labels":
        return _distinct(map(str, labels))
    return _lines(name, "classes (imagenet, captions, labels or a file)")


def _distinct(names: Iterable[str]) -> list[str]:
    return sorted({name.casefold(): name for name in sorted(names, reverse=True)}.values())


def _lines(path: str, what: str) -> list[str]:
    try:
        lines = [
            line.strip()
            for line in Path(path).read_text(encoding="utf-8").splitlines()
            if line.strip()
        ]
    except OSError as error:
        raise ValueError(f"{what}: {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    if not lines:
        raise ValueError(f"{path}: holds no line")
    return lines
