"""HTML as text: elements, tables with headers, the document around them. Whoever calls escapes what comes from data.

Next: style.py (how it looks), charts.py, images.py.
"""

import html
from collections.abc import Sequence

from skysense_jax.page.style import STYLE


def element(name: str, content: str = "", **attributes: object) -> str:
    """An element of SVG or HTML; ``class_`` and ``for_`` are the attributes without the line."""
    listed = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(_short(value))}"' for key, value in attributes.items()
    )
    return f"<{name}{listed}>{content}</{name}>"


def _short(value: object) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)


def many(number: int, word: str) -> str:
    """The number and the word, in the plural unless it is one."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def swatch(name: str, colour: str) -> str:
    """A square of the colour and the name behind it, without underscores."""
    return element("span", class_="swatch", style=f"background:{colour}") + html.escape(name.replace("_", " "))


def guide(text: str, *, good: str, bad: str) -> str:
    """How a part of a page is read: what is seen, what is a good sign and what a bad one; all HTML."""
    signs = element("li", element("b", "Good: ") + good) + element("li", element("b", "Bad: ") + bad)
    return element("p", text) + element("ul", signs, class_="guide")


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], *, classes: Sequence[str] = ()) -> str:
    """A table whose cells are HTML; the first of a row is its header. ``classes``: of the columns."""
    of = [*classes, *[""] * (len(head) - len(classes))]
    styled = lambda name, text, kind, **more: element(name, text, **more, **({"class_": kind} if kind else {}))  # noqa: E731
    top = "".join(styled("th", text, kind, scope="col") for text, kind in zip(head, of))
    lines = [
        element(
            "tr",
            styled("th", row[0], of[0], scope="row") + "".join(map(lambda c, k: styled("td", c, k), row[1:], of[1:])),
        )
        for row in rows
    ]
    content = element("caption", caption) + element("thead", element("tr", top)) + element("tbody", "".join(lines))
    return element(
        "div",
        element("table", content),
        class_="scroll",
        tabindex="0",
        role="region",
        aria_label=html.unescape(caption),
    )


def document(title: str, heading: str, head: str, sections: Sequence[tuple[str, str, str]], *, style: str = "") -> str:
    """A whole page without script: heading, what comes first, links to the sections, the sections.

    Args:
      title: of the window; ``heading``: of the page; ``head``: HTML beneath it.
      sections: address, title and HTML of each.
      style: of this page alone, behind what all pages share.
    """
    links = "".join(element("li", element("a", name, href=f"#{key}")) for key, name, _ in sections)
    body = element("h1", html.escape(heading)) + head + element("nav", element("ul", links), aria_label="Sections")
    body += "".join(element("section", element("h2", name, id=key) + content) for key, name, content in sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )
