"""Small answers the node gives by itself."""

from __future__ import annotations

from typing import Any

FRONT_PAGE = b"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>mesh</title>
<style>body{font:16px/1.5 system-ui,sans-serif;max-width:40em;margin:4em auto;padding:0 1em}</style>
<h1>mesh</h1>
<p>Several machines serve one large language model together, and this is one of them. Programs that speak the OpenAI API
use it at <code>/v1</code> on this address; any API key will do unless keys were set.
<ul>
<li><a href="/v1/models">/v1/models</a> the model that is served
<li><code>POST /v1/chat/completions</code>, <code>/v1/completions</code>, <code>/v1/embeddings</code> and the rest of
llama-server's API
<li><a href="/mesh/status">/mesh/status</a> who takes part, and who carries which layers
<li><a href="/health">/health</a> whether a model is served right now
</ul>
"""


def health(serving: bool) -> tuple[int, dict[str, Any]]:
    """As llama-server says it, but about the mesh. ``(HTTP status, JSON)``."""
    if serving:
        return 200, {"status": "ok"}
    return 503, {"error": {"code": 503, "message": "the mesh serves no model right now", "type": "unavailable_error"}}


def model_list(name: str | None) -> dict[str, Any]:
    """OpenAI's list, of the one model or none."""
    models = [] if name is None else [{"id": name, "object": "model", "created": 0, "owned_by": "mesh"}]
    return {"object": "list", "data": models}
