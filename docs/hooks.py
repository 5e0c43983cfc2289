"""What MkDocs does not do by itself: reference pages from the source tree, and links out of docs/.

Pages link to files of the repository by their relative path, so that the links also work where the
Markdown is read as it is. The build copies such files into the site and points the links at them.
"""

import ast
import csv
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(\]\()((?:\.\./)+[^)#\s]+)")
RUNS = re.compile(r"^<!-- runs: (\S+) -->$", re.MULTILINE)


def packages() -> dict[str, list[str]]:
    """Title of a reference page -> the dotted names of its modules."""
    pages: dict[str, list[str]] = {"commands and shared types": []}
    for path in sorted((ROOT / "clipsmall").iterdir()):
        if path.suffix == ".py":
            name = "" if path.stem == "__init__" else f".{path.stem}"
            pages["commands and shared types"].append(f"clipsmall{name}")
        elif (path / "__init__.py").exists():
            pages[path.name] = modules(path)
    pages["data_tools"] = modules(ROOT / "data_tools")
    return pages


def modules(folder: Path) -> list[str]:
    """All modules below a package, the package itself first."""
    found = []
    for path in sorted(folder.rglob("*.py")):
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        found.append(".".join(parts))
    return sorted(found)


def reference(title: str, names: list[str]) -> str:
    lines = [f"# {title}", ""]
    for name in names:
        lines += [f"## `{name}`", "", f"::: {name}", ""]
    return "\n".join(lines)


def overview(pages: dict[str, list[str]]) -> str:
    lines = ["# Reference", "", "Made from the docstrings.", "", "| page | what |", "|---|---|"]
    for title, names in pages.items():
        package = ROOT / Path(*names[0].split(".")) / "__init__.py"
        doc = ast.get_docstring(ast.parse(package.read_text(encoding="utf-8"))) or ""
        first = " ".join(doc.partition("\n\n")[0].split()).replace("|", r"\|")
        lines.append(f"| [{title}]({file_name(title)}) | {first} |")
    return "\n".join([*lines, ""])


def file_name(title: str) -> str:
    return title.replace(" ", "-") + ".md"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    nav: list[Any] = config.nav or []
    for entry in nav:
        if isinstance(entry, dict) and "Reference" in entry:
            pages = [{title: f"api/{file_name(title)}"} for title in packages()]
            entry["Reference"] = ["api/index.md", *pages]

    # by itself it would be looked up from where the command is typed
    config.mdx_configs["pymdownx.snippets"]["base_path"] = [str(ROOT)]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    pages = packages()
    files.append(File.generated(config, "api/index.md", content=overview(pages)))
    for title, names in pages.items():
        content = reference(title, names)
        files.append(File.generated(config, f"api/{file_name(title)}", content=content))

    for path in linked_files(files):
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, f"files/{name}", abs_src_path=str(path)))
    return files


def linked_files(files: Files) -> list[Path]:
    """Files of the repository that pages link to."""
    found = set[Path]()
    for page in files.documentation_pages():
        if page.abs_src_path is None:
            continue
        for _, link in LINK.findall(Path(page.abs_src_path).read_text(encoding="utf-8")):
            target = (Path(page.abs_src_path).parent / link).resolve()
            if outside(target) and target.is_file():
                found.add(target)
    return sorted(found)


def outside(target: Path) -> bool:
    return target.is_relative_to(ROOT) and not target.is_relative_to(ROOT / "docs" / "pages")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    source = page.file.abs_src_path
    if source is None:
        return markdown

    def moved(match: re.Match[str]) -> str:
        target = (Path(source).parent / match[2]).resolve()
        if not outside(target):
            return match[0]
        inside = Path("files") / target.relative_to(ROOT)
        return match[1] + os.path.relpath(inside, Path(page.file.src_uri).parent)

    markdown = LINK.sub(moved, markdown)
    # a mean, its deviation and its mark stay on one line
    markdown = re.sub(" (?=[±▲▼])|(?<=±) ", "\N{NO-BREAK SPACE}", markdown)
    return RUNS.sub(lambda match: runs_table(ROOT / match[1]), markdown)


def runs_table(path: Path) -> str:
    """Every run of a study, folded away."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = [[shown(cell) for cell in row] for row in csv.reader(file)]
    header, *body = rows
    table = [header, ["---"] * len(header), *body]
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return f'??? note "All {len(body)} runs"\n\n' + "\n".join(f"    {line}" for line in lines)


def shown(cell: str) -> str:
    try:
        return cell if cell.isdigit() else f"{float(cell):.4g}"
    except ValueError:
        return cell.replace("|", r"\|")
