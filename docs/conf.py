"""The documentation site: ``make docs`` builds it, and a warning or a dead link fails it.

``-D plot_gallery=0`` leaves the gallery's programs unexecuted; ``-b linkcheck`` asks the links to
other sites.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import fastbptt  # noqa: E402

project = "fastbptt"
author = "The fastbptt authors"
copyright = author
release = version = fastbptt.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["gallery/*"]

html_theme = "furo"
html_title = f"fastbptt {release}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_show_sourcelink = False
html_theme_options = {"top_of_page_buttons": []}

# Markdown. Links to files of the repository that are no pages become downloads.
myst_heading_anchors = 3

# The reference. Types of torch's and of the standard library have no page here to link to.
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings give shapes and units
napoleon_numpy_docstring = False
napoleon_use_param = False
napoleon_use_rtype = False
nitpick_ignore_regex = [
    ("py:.*", r"(torch|matplotlib|collections|typing)\..*"),
    ("py:.*", r"(object|bool|int|float|str|tuple|Tensor|PackedSequence)"),
]

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "auto_gallery",
    "filename_pattern": r"/plot_",
    "within_subsection_order": "FileNameSortKey",
    "download_all_examples": False,
    "remove_config_comments": True,
    "abort_on_example_error": True,
    "min_reported_time": 1,
    "show_memory": False,
    "show_signature": False,
    "plot_gallery": "True",
}

linkcheck_timeout = 20
linkcheck_workers = 4

_SECTION = re.compile(r"^(Args|Returns|Raises|Attributes|Yields|Note|Example)s?:$")


def _sections(lines: list[str]) -> list[tuple[str, list[str]]]:
    """A Google docstring's parts: the section's name ("" for text) and its lines below that."""
    parts: list[tuple[str, list[str]]] = [("", [])]
    for line in lines:
        if match := _SECTION.match(line):
            parts.append((match[0], []))
        elif line and not line.startswith(" ") and parts[-1][0]:
            parts.append(("", [line]))
        else:
            parts[-1][1].append(line)
    return parts


def _with_formulas(text: list[str]) -> list[str]:
    """Indented lines outside of the sections are formulas: a literal block."""
    marked: list[str] = []
    is_formula = False
    for line in text:
        starts = line.startswith("    ") and bool(marked) and not marked[-1].strip()
        if starts and not is_formula:
            marked += ["::", ""]
        is_formula = line.startswith("    ") if line.strip() else is_formula
        marked.append(line.replace("``", "") if is_formula else line)
    return marked


def _items(lines: list[str]) -> list[str]:
    """What begins at the section's own indent, each in one line."""
    items: list[str] = []
    for line in filter(str.strip, lines):
        if line.startswith("     ") and items:
            items[-1] += " " + line.strip()
        else:
            items.append(line.strip())
    return items


def _are_named(items: list[str]) -> bool:
    """Whether each says its name first, and none is the rest of a sentence."""
    return all(re.match(r"[(\w][^.;:]*: ", item) for item in items)


def rewrite_docstring(app, what, name, obj, options, lines: list[str]) -> None:
    """The docstrings are written to be read in a terminal; this is what Napoleon needs of them.

    Formulas get their ``::``; names that are described together and take two lines come onto one;
    several results become a list.
    """
    new: list[str] = []
    for section, body in _sections(lines):
        if not section:
            new += _with_formulas(body)
        elif section == "Returns:" and len(_items(body)) > 1 and _are_named(_items(body)):
            new += [":returns:", *(f"    - {item}" for item in _items(body)), ""]
        else:
            new.append(section)
            for line in body:
                names = re.match(r"    (\w+, )+\w+,$", new[-1])
                if names and line.startswith("        "):
                    new[-1] += " " + line.strip()
                else:
                    new.append(line)
    lines[:] = new


def setup(app) -> None:
    """Called by Sphinx. Napoleon, whose priority is 500, reads what this leaves."""
    app.connect("autodoc-process-docstring", rewrite_docstring, priority=400)
