"""The model card: README.md of an exported model folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from selfpruner import notation
from selfpruner.results import Results

_MARKDOWN = re.compile(r"([\\`*_\[\]<>|#&~$!])")


def model_card(results: Results, stock: bool) -> str:
    """Return the card: YAML front matter, then Markdown.

    Args:
        results: numbers of the run.
        stock: whether transformers loads the folder without code of its own.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    # Markdown has no HTML escaping: every value of an expression is escaped on its way out.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        finalize=_escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(notation.FILTERS)
    return environment.get_template("model_card.md.j2").render(
        front_matter=Markup(_front_matter(results)),
        results=results,
        removed=_removed(results),
        stock=stock,
    )


def _removed(results: Results) -> str:
    """Return in words of which units some layer has lost any."""
    dense, units = results.units_dense, results.units
    lost = {
        "KV groups": any(x.kv_groups < dense.kv_groups for x in units),
        "query heads": any(x.q_per_group < dense.q_per_group for x in units),
        "MLP channels": any(x.mlp_channels < dense.mlp_channels for x in units),
    }
    *others, last = [name for name, is_lost in lost.items() if is_lost] or ["no units"]
    return f"{', '.join(others)} and {last}" if others else last


def _front_matter(results: Results) -> str:
    # One line each: readers that split at a line of dashes must not find one in a name.
    name, family = (" ".join(x.split()) for x in (results.model.name, results.model.family))
    fields = {
        "base_model": name,
        "library_name": "transformers",
        "license": "unknown",  # that of the base model, which its files do not always name
        "pipeline_tag": "text-generation",
        "tags": ["self-pruner", "structured-pruning", "pruned", family],
    }
    return yaml.safe_dump(fields, sort_keys=True, allow_unicode=True, width=10**6)


def _escape(value: Any) -> Any:
    """Return a value as one line of literal Markdown; `Markup` passes as it is."""
    if isinstance(value, Markup):
        return value
    line = " ".join(str(value).split())
    return _MARKDOWN.sub(r"\\\1", line).replace("://", "\\://")
