"""HTML of the report: text, terms with tooltips, tables, data URIs."""

import base64
import html
from collections.abc import Iterable

from attmask_jax.runs import metric_names
from attmask_jax.text import printable


class Markup(str):
  """HTML that is inserted as it is; other text is escaped."""


def text(value: object) -> str:
  """A value as HTML."""
  if isinstance(value, Markup):
    return value
  return html.escape(printable(str(value)), quote=True)


def term(name: str, label: str | None = None) -> Markup:
  """The name of a metric, with its meaning as a tooltip.

  Args:
    name: as logged.
    label: replaces the name.
  """
  metric = metric_names.find(name)
  content = text(label or name)
  if metric is None:
    return Markup(content)
  title = text(f"{name}: {metric.tooltip}" if label else metric.tooltip)
  return Markup(f'<abbr title="{title}">{content}</abbr>')


def table(headings: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
  """A table that scrolls where it is too wide."""
  cells = lambda row, tag: "".join(f"<{tag}>{text(c)}</{tag}>" for c in row)
  body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
  head = f"<tr>{cells(headings, 'th')}</tr>"
  return (
    f'<div class="wide"><table><thead>{head}</thead>'
    f"<tbody>{body}</tbody></table></div>"
  )


def uri(content: bytes, kind: str) -> str:
  """A file as a data URI."""
  return f"data:{kind};base64,{base64.b64encode(content).decode()}"
