"""A report as one HTML file without anything outside it."""

from __future__ import annotations

import base64

from uncomp.eval.report.blocks import Block, Picture
from uncomp.eval.report.contents import Document
from uncomp.eval.report.template import PAGE, STYLE


def html(document: Document) -> str:
    """The page. Every text is escaped; plots are inline images.

    Raises:
        ImportError: jinja2 is missing; says how to install it.
    """
    try:
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise ImportError(f"the page needs jinja2 ({error}): pip install 'uncomp[eval]'") from error
    # StrictUndefined: a name missing in the template is an error, not an empty space.
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(PAGE)
    return template.render(document=document, style=Markup(STYLE), kind_of=_kind, inline=_inline)


def _kind(block: Block) -> str:
    return type(block).__name__


def _inline(picture: Picture) -> str:
    # An image of its own, not inline markup: ids of several plots must not meet.
    return "data:image/svg+xml;base64," + base64.b64encode(picture.svg.encode()).decode()
