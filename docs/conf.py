"""How the documentation site is built (``make docs``): Markdown pages of this folder, and the API from docstrings."""

import importlib
import os
import re
from pathlib import Path

import cl_bench

DOCS = Path(__file__).parent
ROOT = DOCS.parent
PACKAGE = ROOT / "cl_bench"
GENERATED = DOCS / "generated"

project = "cl_bench"
release = cl_bench.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"  # its styles, scripts and fonts are its own or the system's: a page asks no other server
html_title = "cl_bench"
html_copy_source = False
html_show_sphinx = False
highlight_language = "text"
myst_heading_anchors = 3
toc_object_entries = False  # with every method of every class, each page's list of pages takes most of the time
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # a docstring gives shapes and units; the signature has the names
autodoc_mock_imports = ["avalanche", "timm", "wandb", "mlflow", "trackio", "tensorboard"]
napoleon_use_ivar = True
suppress_warnings = ["ref.python"]  # one word may be an attribute of several classes; it is no link then

API = ("methods", "buffers", "backbones", "scenarios", "metrics")
"""Folders of the package that have a page each; api/parts.md has what their variants share."""

LINK = r"\[([^\]]+)\]\(((?!https?:|#)[^)\s]+)\)"


def write_generated() -> None:
    """The README as a page, and one page for each folder of variants: what files and classes say of themselves."""
    GENERATED.mkdir(exist_ok=True)

    def move(found: re.Match[str]) -> str:
        return f"[{found[1]}]({os.path.relpath(ROOT / found[2], GENERATED)})"

    pages = {"readme": re.sub(LINK, move, (ROOT / "README.md").read_text())}
    for folder in API:
        names = sorted(file.stem for file in (PACKAGE / folder).glob("*.py") if file.stem not in ("__init__", "base"))
        blocks = [f"## {name}\n\n```{{eval-rst}}\n.. automodule:: cl_bench.{folder}.{name}\n```\n" for name in names]
        pages[folder] = "\n".join([f"# {folder.title()}\n", *blocks])
    for name, text in pages.items():
        page = GENERATED / f"{name}.md"
        if not page.exists() or page.read_text() != text:  # Sphinx reads again what is newer
            page.write_text(text)


def resolve_links(app, name: str, content: list[str]) -> None:
    """Links to files outside this folder: to the README, its page; to a module, the API; to others, a download."""

    def replace(found: re.Match[str]) -> str:
        text, target = found[1], found[2]
        path, sign, anchor = target.partition("#")
        file = ((DOCS / name).parent / path).resolve()
        if file == ROOT / "README.md":
            return f"[{text}](/generated/readme.md{sign}{anchor})"
        if file.is_relative_to(DOCS) or not file.exists():
            return found[0]
        if file.is_relative_to(PACKAGE) and file.suffix == ".py":
            module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
            return f"{{py:mod}}`{text.strip('`')} <{module}>`"
        return f"[{text}](path:{path})" if file.is_file() else text

    content[0] = re.sub(rf"(?<!!){LINK}", replace, content[0])


def keep_as_written(app, what: str, name: str, obj, options, lines: list[str]) -> None:
    """Show formulas of docstrings as they stand: signs are no markup, indented lines of a module are a block."""
    previous, literal = "", False
    result = []
    for line in lines:
        indented = line.startswith("    ")
        if what == "module" and indented and not literal and not previous.strip():
            literal = True
            result += ["::", ""]
        elif line.strip() and not indented:
            literal = False
        if not literal:
            parts = re.split(r"(``.*?``|:[\w:]+:`.*?`|(?<!\w)\*\w+\*(?!\w))", line)
            line = "".join(part if i % 2 else re.sub(r"([|*\\])", r"\\\1", part) for i, part in enumerate(parts))
        result.append(line)
        previous = line
    lines[:] = result


def setup(app) -> None:
    """Called by Sphinx."""
    importlib.import_module("cl_bench.testing")  # loads torch once, before Sphinx starts processes for `--jobs`
    write_generated()
    app.connect("source-read", resolve_links)
    app.connect("autodoc-process-docstring", keep_as_written, priority=400)  # before napoleon
