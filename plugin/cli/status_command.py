"""The command `status`: the state of a running server, for people."""

from __future__ import annotations

from typing import Any

from vllm_edits.edit_store.cli import JsonOption, app, as_script, explained, plain, show
from vllm_edits.plugin.cli_client import DEFAULT_URL, ApiKeyOption, UrlOption, answered, authorization


@app.command()
@explained
def status(
    url: UrlOption = DEFAULT_URL,
    api_key: ApiKeyOption = "",
    as_json: JsonOption = False,
) -> None:
    """Show the state of a running server: variants, versions, slots, requests in
    flight, the last swap.

    \b
    Example:
      vllm-edits status --url http://127.0.0.1:8000
    """
    found = answered("GET", f"{url}/v1/edits", authorization(api_key), seconds=10)
    if as_json:
        as_script(found)
        return
    show_status(found)


def show_status(found: dict[str, Any]) -> None:
    """Print the answer of `GET /v1/edits`."""
    rows = [
        {
            **row,
            "digits": row["version"][:12],
            "resident": _place(row),
            "probed": (row["probes"] or {}).get("result", ""),
        }
        for row in found["variants"]
    ]
    columns = {
        "name": "variant", "tag": "tag", "digits": "version", "sequence": "#", "resident": "on device",
        "in_flight": "in flight", "probed": "probes",
    }  # fmt: skip
    show(rows, columns, as_json=False)
    base, slots, swap, store = found["base"], found["slots"], found["last_swap"], found["store"]
    plain(f"base {', '.join(base['names'])}, {base['in_flight']} in flight")
    plain(
        f"slots {slots['used']} of {slots['total']}; store {store['url']}, read {_age(store)}, "
        f"signatures {found['signatures']}"
    )
    if slots["waiting"]:
        requests = sum(row["requests"] for row in slots["waiting"])
        longest = max(row["seconds"] for row in slots["waiting"])
        plain(
            f"{requests} requests wait for a slot, the first for {longest:.1f} s. If that happens often, raise "
            "edits.slots"
        )
    if found["weights"]["variant"]:
        held = (found["weights"]["version"] or "the base model")[:14]
        plain(f"the weights serve {found['weights']['variant']}, and now hold {held}")
    if found["weights"]["error"]:
        plain(f"the content of the weights is unknown, so no request is answered: {found['weights']['error']}")
    if swap:
        phases = ", ".join(f"{phase} {seconds * 1000:.0f} ms" for phase, seconds in swap["seconds"].items())
        ended = swap["error"] or phases or "nothing to install"
        version = (swap["to_version"] or "none")[:12]
        plain(f"last swap {swap['variant']}@{swap['tag']} to {version} at {swap['at']}: {ended}")
    if found["reservation"]["growing"]:
        _tell_growth(found["reservation"])
    for refused in found["refused"]:
        outcome = "waits" if refused["awaits_capacity"] else "refused"
        plain(f"{outcome} {refused['name']}@{refused['tag']}: {refused['error']}")
    for broken in found["broken_histories"]:
        plain(f"broken history of {broken['name']}@{broken['tag']}: {broken['error']}")


def _tell_growth(reservation: dict[str, Any]) -> None:
    growth, waiting = reservation["last"], ", ".join(reservation["waiting"])
    if growth and growth["phase"] != "done" and not growth["error"]:
        plain(f"the reservation grows for {', '.join(growth['wanted_by'])}, phase {growth['phase']}")
    elif waiting:
        plain(f"the reservation is about to grow for {waiting}")


def _place(row: dict[str, Any]) -> str:
    return "in weights" if row["in_weights"] else "yes" if row["resident"] else "paged out"


def _age(store: dict[str, Any]) -> str:
    seconds = store["head_age_seconds"]
    return "never" if seconds is None else f"{seconds:.1f} s ago"
