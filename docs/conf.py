"""Sphinx configuration of the documentation: `make docs` builds it into docs/_build/html."""

import pathlib
import sys

import astroid.manager
from sphinx.application import Sphinx

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import generate  # noqa: E402 - it lies beside this file

import flexmoe_jax  # noqa: E402

project = "flexmoe_jax"
author = copyright = "the flexmoe_jax authors"
version = release = flexmoe_jax.__version__
extensions = ["myst_parser", "autodoc2"]
exclude_patterns = ["_build", "_generated"]
smartquotes = False  # options keep their two hyphens
nitpicky = True
nitpick_ignore_regex = [("py:.*", ".*")]  # annotations name classes of JAX, NumPy and the standard library

myst_heading_anchors = 4
myst_enable_extensions = ["dollarmath"]
myst_dmath_double_inline = True

html_theme = "furo"
html_title = "flexmoe_jax"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_show_sourcelink = False

autodoc2_packages = [
    {
        "path": "../flexmoe_jax",
        "exclude_dirs": ["__pycache__", "cli", "doctor", "flexmix", "model", "parallel", "plan", "study"],
        "exclude_files": ["experiment.py", "files.py", "modeling_flexmoe.py", "params.py", "progress.py"],
    }
]
autodoc2_output_dir = "reference/api"
autodoc2_render_plugin = "generate.ApiPages"
autodoc2_index_template = None
autodoc2_hidden_objects = ["dunder", "inherited", "private", "undoc"]
autodoc2_docstring_parser_regexes = [(".*", "myst")]


class OtherPackages:
    """Every module but ours: an analysis that follows imports into JAX and torch takes minutes, and adds nothing."""

    def __contains__(self, name: str) -> bool:
        return not name.startswith("flexmoe_jax")


astroid.manager.AstroidManager.brain["module_denylist"] = OtherPackages()


def setup(app: Sphinx) -> None:
    app.connect("builder-inited", lambda app: generate.write_all(HERE / "_generated"))
