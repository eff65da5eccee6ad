"""The model card (README.md) of a Hub repo with versions, made from their manifests.

The same manifests give the same bytes. People may write text around the generated part and add to the front matter:
both are kept. Texts in a manifest come from its author, so they are escaped and never become markup.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from vllm_edits.edit_store.bundle import Manifest, Measurement, Provenance
from vllm_edits.edit_store.canonical import sha256
from vllm_edits.edit_store.errors import EditsError

CARD_FILE = "README.md"
MAX_CARD_BYTES = 1 << 20
LIBRARY = "vllm-edits"
BEGIN = "<!-- begin: written by `vllm-edits hub push`; what you write outside of these marks is kept -->"
END = "<!-- end: written by `vllm-edits hub push` -->"
_FRONT_MATTER = re.compile(r"\A---[ \t]*\n(.*?)^---[ \t]*$\n?", re.DOTALL | re.MULTILINE)
_GENERATED = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
_REPO_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_MARKUP = re.compile(r"[\\`*_\[\]<>!|~$&]")
_COLUMNS = ("name", "label", "version", "made", "kinds", "sites", "measured", "description", "provenance")

_TEXT = """\
# {title}

Edits for {bases}: small changes that [vLLM](https://docs.vllm.ai) applies to each request separately, with one copy
of the weights. The sha256 of its manifest names a version.

## Versions

{table}

## Pull and serve

```bash
pip install 'vllm-edits[hub,server]'
vllm-edits init --store ./store
vllm-edits hub pull {repo} --store ./store
vllm-edits promote {reference} --store ./store
vllm-edits serve {base} --store ./store
```

Requests select the variant by its name: `"model": "{name}"`. `hub pull` checks every digest. To accept only signed
versions, write a trust file: see `vllm-edits trust --help`."""


def render(repo: str, manifests: Iterable[Manifest], present: str = "") -> str:
    """The card of a repo with these versions. `present` is its present card, whose other text is kept."""
    ordered = sorted(manifests, key=lambda each: (each.name, each.created_at.isoformat(), sha256(each.to_bytes())))
    metadata, body = _split(present.replace("\r\n", "\n"), repo)
    generated = f"{BEGIN}\n{_generated(repo, ordered)}\n{END}"
    if _GENERATED.search(body):
        body = _GENERATED.sub(lambda _: generated, body, count=1)
    else:
        body = f"{body.rstrip()}\n\n{generated}\n".lstrip()
    return f"---\n{_front_matter(metadata, ordered)}---\n\n{body.lstrip()}"


def _split(card: str, repo: str) -> tuple[str, str]:
    """Split a card into its front matter and the rest."""
    found = _FRONT_MATTER.match(card)
    if found is None:
        return "", card
    try:
        metadata = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        raise EditsError(
            f"{CARD_FILE} of {repo} has front matter that is not YAML: {error}. Correct it first"
        ) from None
    if not isinstance(metadata, dict | None):
        raise EditsError(f"{CARD_FILE} of {repo}: expected front matter with keys and values. Correct it first")
    return found[1] if metadata else "", card[found.end() :]


def _front_matter(present: str, manifests: list[Manifest]) -> str:
    """The front matter for the Hub. It stays as it is written if it already has all our keys."""
    metadata: dict[str, Any] = yaml.safe_load(present) or {}
    # A base that was read from a local folder is not on the Hub, and the Hub refuses cards that name such a model.
    bases = sorted({manifest.base.name for manifest in manifests if _REPO_NAME.fullmatch(manifest.base.name)})
    found = metadata.get("tags") or []
    tags = found if isinstance(found, list) else [found]
    ours: dict[str, Any] = {
        "base_model": bases[0] if len(bases) == 1 else bases,
        "base_model_relation": "adapter",
        "library_name": LIBRARY,
        "tags": [*tags, *(tag for tag in (LIBRARY, "model-editing") if tag not in tags)],
    }
    if not bases:
        del ours["base_model"], ours["base_model_relation"]
    if all(metadata.get(key) == value for key, value in ours.items()):
        return present
    return yaml.safe_dump({**metadata, **ours}, sort_keys=False, allow_unicode=True, width=1000)


def _generated(repo: str, manifests: list[Manifest]) -> str:
    example = manifests[-1]
    return _TEXT.format(
        repo=repo,
        title=plain(repo),
        bases=", ".join(sorted({plain(manifest.base.name) for manifest in manifests})),
        table="\n".join(map(_line, [_COLUMNS, ["---"] * len(_COLUMNS), *map(_row, manifests)])),
        name=example.name,
        reference=f"{example.name}@{sha256(example.to_bytes())[:12]}",
        base=_argument(example.base.name),
    )


def _row(manifest: Manifest) -> list[str]:
    version = sha256(manifest.to_bytes())
    return [
        plain(manifest.name),
        plain(manifest.label),
        f"`{version[:12]}`",
        f"{manifest.created_at:%Y-%m-%d}",
        ", ".join(sorted({plain(edit.kind) for edit in manifest.edits})),
        str(len({edit.site for edit in manifest.edits})),
        "<br>".join(map(_measured, manifest.measurements)),
        plain(manifest.description),
        _made_by(manifest.provenance),
    ]


def _measured(found: Measurement) -> str:
    return f"{plain(found.metric)}: {found.base:.4g} → {found.edited:.4g} (n={found.n})"


def _made_by(provenance: Provenance) -> str:
    told: Mapping[str, str] = {"": provenance.method, "with": provenance.tool, "from": provenance.source}
    return plain(" ".join(f"{how} {what}".strip() for how, what in told.items() if what))


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _argument(name: str) -> str:
    """A model's name for a command that people copy, or MODEL if a shell would not take the name literally."""
    return name if re.fullmatch(r"[\w./-]+", name, re.ASCII) and not name.startswith("-") else "MODEL"


def plain(text: str) -> str:
    """Text on one line, with every character of markup escaped."""
    visible = "".join(character if character.isprintable() else " " for character in text)
    return _MARKUP.sub(lambda found: f"\\{found[0]}", " ".join(visible.split()))
