"""The page that documents the API, made from its OpenAPI schema; it needs no network."""

import html
import re
from collections.abc import Iterator, Mapping
from typing import Any

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 58rem; margin: 0 auto; padding: 1.5rem;
  background: light-dark(#fafafa, #131417); color: light-dark(#202124, #e8eaed); }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; }
td, th { text-align: left; vertical-align: top; padding: .3rem .9rem .3rem 0;
  border-bottom: 1px solid light-dark(#dadce0, #3a3d42); }
code, pre { font: .9em ui-monospace, monospace; }
pre { padding: .8rem; overflow-x: auto; background: light-dark(#eef0f2, #22252a);
  border-radius: 7px; }
a { color: light-dark(#1a56db, #8ab4f8); }
"""
EXAMPLE = """\
curl --no-buffer --header 'Content-Type: application/json' \\
     --data '{"prompt": "The [[2]] sat on the [[3]].", "temperature": 0.8}' \\
     http://127.0.0.1:7860/api/generate | tee events.jsonl
tail -n 1 events.jsonl   # the trace
"""


def reference(schema: Mapping[str, Any], events: Mapping[str, str]) -> str:
    """An HTML page.

    schema: as FastAPI's `app.openapi()` gives it.
    events: what each event of /api/generate holds.
    """
    return "".join(_lines(schema, events))


def _lines(schema: Mapping[str, Any], events: Mapping[str, str]) -> Iterator[str]:
    yield '<!doctype html><html lang="en"><meta charset="utf-8"><link rel="icon" href="data:,">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>API of lomdm_jax</title><style>{STYLE}</style><h1>API of lomdm_jax</h1>"
    yield '<p>The <a href="/">page</a> uses nothing else. For programs: '
    yield f'<a href="/openapi.json">openapi.json</a>.</p><pre>{html.escape(EXAMPLE)}</pre>'
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            yield f"<h2><code>{method.upper()} {path}</code></h2><p>{operation['summary']}. "
            yield f"{html.escape(operation.get('description', ''))}</p>"
            if "requestBody" in operation:
                fields = schema["components"]["schemas"]["Request"]
                yield f"<p>{_text(fields['description'])}</p>"
                yield _table({name: _field(field) for name, field in fields["properties"].items()})
                yield "<p>The events, each with its name as <code>event</code>:</p>"
                yield _table(events)
    yield "<h2>Refusals</h2><p>Status 400 to 503, and <code>error</code> says why.</p></html>"


def _field(field: Mapping[str, Any]) -> str:
    kinds = [kind.get("type") for kind in field.get("anyOf", [field])]
    return f"{field['description']} ({', '.join(kind for kind in kinds if kind != 'null')})"


def _table(rows: Mapping[str, str]) -> str:
    cells = (
        f"<tr><th scope=row><code>{name}</code></th><td>{_text(text)}</td></tr>"
        for name, text in rows.items()
    )
    return f"<table>{''.join(cells)}</table>"


def _text(text: str) -> str:
    """Escaped, with what stands in backticks as code."""
    return re.sub("`(.*?)`", r"<code>\1</code>", html.escape(text))
