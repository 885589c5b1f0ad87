"""Sphinx: ``sphinx-build -W docs docs/_build``. Offline; a warning is an error."""

from __future__ import annotations

import sys
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import pages  # noqa: E402
import reference  # noqa: E402

import spo_jax  # noqa: E402

project = "spo_jax"
author = "the authors of spo_jax"
project_copyright = author
release = version = spo_jax.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build", "style"]
html_theme = "furo"
html_title = f"spo_jax {version}"
html_show_sphinx = False
html_copy_source = False
html_math_renderer = "mathml"
html_static_path = ["style"]
html_css_files = ["site.css"]
highlight_language = "text"
copybutton_prompt_text = "$ "

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
add_module_names = False
python_maximum_signature_line_length = 96
python_display_short_literal_types = True
napoleon_google_docstring = True


def write_pages(app) -> None:
    """Make the pages of ``docs/site``, touching only those that changed."""
    made = {
        f"{name}.md": pages.relink(pages.document(page), page.source, f"{pages.SITE}/{name}.md")
        for name, page in pages.PAGES.items()
    }
    made["configuration.md"] = reference.configuration_page()
    made["api.md"] = reference.api_index()
    for name, (title, rooms) in reference.GROUPS.items():
        made[f"api/{name}.rst"] = reference.api_page(title, rooms.split())
    for path in (HERE.parent / pages.SITE).rglob("*.*"):  # of another version
        if path.relative_to(HERE.parent / pages.SITE).as_posix() not in made:
            path.unlink()
    for name, text in made.items():
        path = HERE.parent / pages.SITE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_text() != text:
            path.write_text(text)


def read_source(app, name: str, source: list[str]) -> None:
    """Links of the documents in ``docs``; the table of contents behind the index."""
    if not name.startswith("site/"):
        file = f"docs/{name}.md"
        source[0] = pages.relink(source[0], file, file)
        if name == "index":
            source[0] += "\n" + pages.table_of_contents(source[0])


def sign(app, what, name, found, options, signature, result):
    """Signatures as the source has them."""
    try:
        return (
            reference.source_signature(found, bound=what == "method") if callable(found) else None
        )
    except (TypeError, ValueError):  # not written in Python
        return None


def visit_math(self, node: nodes.Element) -> None:
    """Formulas as MathML, which browsers show by themselves: nothing is fetched."""
    self.body.append(tex2mathml(node.astext(), as_block=isinstance(node, nodes.math_block)))
    raise nodes.SkipNode


def setup(app) -> None:
    """What is ours: made pages, links, signatures, formulas."""
    app.connect("builder-inited", write_pages)
    app.connect("source-read", read_source)
    app.connect("autodoc-process-signature", sign)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
