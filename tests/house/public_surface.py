"""Everything that users may name, one thing a line, by what the code declares: `python -m tests.house.public_surface`.

Its output is kept in public_surface.txt, so that whoever changes one of these names sees it, and a reviewer too.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastapi.routing import APIRoute
from typer.main import get_command

import vllm_edits
from vllm_edits import edit_store
from vllm_edits.edit_store.cli import build
from vllm_edits.edit_store.kinds import KINDS
from vllm_edits.edit_store.sites import POINTS
from vllm_edits.plugin.cli.commands import app
from vllm_edits.plugin.cli.serve_arguments import OURS
from vllm_edits.plugin.headers import OF_ANSWERS, OF_REQUESTS
from vllm_edits.plugin.http.routes import router
from vllm_edits.plugin.metrics import METRICS, PREFIX
from vllm_edits.plugin.request import STRENGTH_ARGUMENT
from vllm_edits.server_config.settings import KEY, PROFILES, EditSettings, Reserve, ReserveWeight

KEPT = Path(__file__).with_suffix(".txt")
PROJECT: dict[str, Any] = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


def surface() -> list[str]:
    """Every line, in order."""
    found = (packaging(), python(), commands(), settings(), metrics(), endpoints(), headers(), edits())
    return sorted(line for lines in found for line in lines)


def packaging() -> Iterator[str]:
    """What an installation adds, and what vLLM is told of it."""
    yield from (f"command {name}" for name in PROJECT["scripts"])
    yield from (f"extra {name}" for name in PROJECT["optional-dependencies"])
    for group, entries in PROJECT["entry-points"].items():
        yield from (f"entry point {group} {name}" for name in entries)
    yield from (f"flag of vllm {flag} {value}" for flag, value in OURS.items())


def python() -> Iterator[str]:
    """Names to import."""
    for package in (vllm_edits, edit_store):
        yield from (f"python {package.__name__}.{name}" for name in package.__all__)


def commands() -> Iterator[str]:
    """Every command with its arguments and flags, and the variables of the environment that stand for flags."""
    variables = set()
    methods = (["vllm-edits", "build"], get_command(build.application()))
    pending = [(["vllm-edits"], get_command(app)), methods]
    while pending:
        words, command = pending.pop()
        if inner := getattr(command, "commands", None):
            pending += [([*words, name], each) for name, each in inner.items()]
            continue
        variables |= {parameter.envvar for parameter in command.params if parameter.envvar}
        arguments = [each.name.upper() for each in command.params if each.param_type_name == "argument"]
        flags = sorted(flag for each in command.params for flag in each.opts if flag.startswith("-"))
        yield " ".join(["command", *words, *arguments, *flags])
    yield from (f"variable {name}" for name in variables)


def settings() -> Iterator[str]:
    """What stands under `edits` in --additional-config."""
    for prefix, model in (
        (KEY, EditSettings),
        (f"{KEY}.reserve[]", Reserve),
        (f"{KEY}.weights_reserve[]", ReserveWeight),
    ):
        yield from (f"setting {prefix}.{name}" for name in model.model_fields)
    yield from (f"profile of setting {KEY}.reserve {name}" for name in PROFILES)


def metrics() -> Iterator[str]:
    """Series as Prometheus names them, with their labels."""
    for metric in METRICS:
        name = PREFIX + metric.name + ("_total" if metric.kind == "counter" else "")
        yield f"metric {metric.kind} {name}{{{','.join(metric.labels)}}}"


def endpoints() -> Iterator[str]:
    """Methods and paths, and what requests to vLLM's own may say besides."""
    routes = router(lambda: None, lambda: None, lambda: None).routes  # type: ignore[arg-type, return-value]
    for route in routes:
        if isinstance(route, APIRoute):
            yield from (f"endpoint {method} {route.path}" for method in route.methods)
    yield f"argument vllm_xargs.{STRENGTH_ARGUMENT}"


def headers() -> Iterator[str]:
    """HTTP headers of requests and answers."""
    yield from (f"header of requests {name}" for name in OF_REQUESTS)
    yield from (f"header of answers {name}" for name in OF_ANSWERS)


def edits() -> Iterator[str]:
    """What bundles may say."""
    yield from (f"kind {name}" for name in KINDS)
    yield from (f"point {name}" for name in POINTS)


if __name__ == "__main__":
    sys.stdout.write("".join(f"{line}\n" for line in surface()))
