"""The built bundles on a real server, in float32: what it says of a text is what the edited transformers model says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import httpx
import torch

from loadtests.harness.server import Server
from vllm_edits.edit_store import Bundle, EditStore, TrustPolicy
from vllm_edits.edit_store.authoring.build import pairs_of
from vllm_edits.edit_store.authoring.host import Host, edited

TEXTS = (
    "The capital of France is Rome, and the film was wonderful from beginning to end.",
    "Review of a lamp: it works better than promised. Label: red",
    "Question: What is the capital of Norway? Answer: Oslo. Are you sure?",
)
SEEN = 20
"""Times that what the edits move must be above the largest difference: else the base model would pass too."""
FLAGS = ("--dtype", "float32", "--max-model-len", "256", "--enforce-eager", "--no-enable-prefix-caching")


def served_errors(
    host: Host,
    model: Path,
    folder: Path,
    bundles: Mapping[str, Bundle],
    *,
    in_weights: bool,
    say: Callable[[str], None],
) -> dict[str, float]:
    """Largest difference of a log-probability between server and transformers, by the row that a bundle is of."""
    folder.mkdir(parents=True, exist_ok=True)
    store = EditStore(str(folder / "store"), create=True)
    TrustPolicy(privileged=True).save(folder / "trust.json")
    versions = {row: store.publish(bundle) for row, bundle in bundles.items()}
    settings: dict[str, object] = {
        "poll_seconds": 3600, "trust_file": str(folder / "trust.json"), "cache_folder": str(folder / "node"),
    }  # fmt: skip
    names = {row: bundle.manifest.name for row, bundle in bundles.items()}
    if in_weights:
        (name,) = set(names.values())
        settings["weights"] = name
    else:
        settings["slots"] = len(bundles) + 1
        for row, version in versions.items():
            store.promote(f"{names[row]}@{version}")
    found = {}
    say("starting a server")
    with Server.with_edits(model, folder / "store", folder / "server.log", *FLAGS, settings=settings) as server:
        for row, version in versions.items():
            say(row)
            if in_weights:
                store.promote(f"{names[row]}@{version}")
                httpx.post(f"{server.url}/v1/edits/sync", timeout=300).raise_for_status()
            found[row] = _apart(host, server.url, f"{names[row]}@{version[:12]}", bundles[row])
    return found


@torch.inference_mode()
def _apart(host: Host, url: str, variant: str, bundle: Bundle) -> float:
    worst = moved = 0.0
    for text in TEXTS:
        ids = host.tokenizer(text)["input_ids"]
        base = host.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        with edited(host.model, pairs_of(bundle)):
            expected = host.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        body = {"model": variant, "prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
        if answer.status_code != 200:
            raise RuntimeError(f"{variant}: {answer.text}")
        told = answer.json()["choices"][0]["prompt_logprobs"][1:]
        for place, (token, row) in enumerate(zip(ids[1:], told, strict=True)):
            worst = max(worst, abs(row[str(token)]["logprob"] - float(expected[place, token])))
            moved = max(moved, abs(float(base[place, token] - expected[place, token])))
    if moved < SEEN * worst:
        raise RuntimeError(f"{variant}: the edits move {moved:.1e}, too little to be told from an error of {worst:.1e}")
    return worst
