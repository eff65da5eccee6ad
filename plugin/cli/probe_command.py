"""The command `probe`: asks a running server whether a variant is served as its author made it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from vllm_edits.edit_store.cli import JsonOption, app, as_script, explained, plain, show
from vllm_edits.edit_store.cli.common import NameArgument
from vllm_edits.edit_store.errors import EditsError
from vllm_edits.plugin.cli.admin_call import TokenFileOption, changed
from vllm_edits.plugin.cli_client import DEFAULT_URL, ApiKeyOption, UrlOption, authorization

COLUMNS = {"strength": "strength", "effect": "effect", "error": "error", "limit": "limit", "passed": "passed"}


@app.command()
@explained
def probe(
    name: NameArgument,
    *,
    tag: Annotated[str | None, typer.Option("--tag", help="Tag of the variant. Default: the server's.")] = None,
    url: UrlOption = DEFAULT_URL,
    api_key: ApiKeyOption = "",
    token_file: TokenFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Probe a variant on a running server: does it say what its author recorded?

    The server lets the variant and the base model continue the prompts of the
    version's probes, and compares. A variant that fails gets no request any
    more until a probe passes. The exit code is 1 then.

    \b
    Example:
      vllm-edits probe polite --url http://127.0.0.1:8000 --admin-token-file token
    """
    query = "" if tag is None else f"?tag={tag}"
    found = changed(f"{url}/v1/edits/{name}/probe{query}", authorization(api_key), token_file)
    if as_json:
        as_script(found)
    else:
        tell(found)
    if found["result"] == "failed":
        raise typer.Exit(1)


def tell(found: dict[str, Any]) -> None:
    """Print the figures of a run, in nats."""
    plain(f"{found['name']}@{found['version'][:12]}: {found['result']}, {found['seconds']:.2f} s")
    if found["result"] == "none":
        raise EditsError("the version has no probes. Make some: vllm-edits probes add")
    plain(
        f"{found['share']:.1%} of the recorded change is there, expected 100% give or take {found['allowed']:.1%}; the "
        f"base model differs by {found['noise']:.2g} nats"
    )
    rows = [{**row, **{name: f"{row[name]:.3g}" for name in ("strength", "effect", "error", "limit")},
             "passed": "yes" if row["passed"] else "no"} for row in found["probes"]]  # fmt: skip
    show(rows, COLUMNS, as_json=False)
