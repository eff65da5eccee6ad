"""A real server on which everything is scarce: two slots for six variants, little KV cache, short steps."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from loadtests.harness.client import complete
from tests.support.bundles import bundle_of, publish, random_bundle
from tests.support.engine import Serving
from vllm_edits.edit_store import Bundle, EditStore, Offset, Role, SigningKey

pytestmark = pytest.mark.vllm

VARIANTS = [f"variant-{seed}" for seed in range(6)]


def ask(serving: Serving, model: str, prompt: str, tokens: int = 12, **options: Any) -> tuple[str, str]:
    """Version and text of one answer."""
    answer = complete(serving.url, model, prompt, tokens, ignore_eos=True, **options)
    return answer["headers"]["x-edits-version"], answer["choices"][0]["text"]


def at_once(serving: Serving, asked: list[tuple[str, str]], tokens: int = 12) -> list[tuple[str, str]]:
    with ThreadPoolExecutor(len(asked)) as pool:
        return list(pool.map(lambda pair: ask(serving, *pair, tokens), asked))


def test_more_variants_than_slots_are_all_served(small_server: Serving) -> None:
    """Six variants and the base at once through two slots: requests wait for a slot, none fails, all are right."""
    asked = [(name, prompt) for prompt in ("One two three", "Red green blue") for name in [*VARIANTS, "base"]]
    solo = [ask(small_server, *pair) for pair in asked]
    together = at_once(small_server, asked)
    assert together == solo
    assert len({text for _, text in solo}) > len(VARIANTS)  # positive control: variants differ
    for (name, _), (version, _) in zip(asked, together, strict=True):
        assert version == ("base" if name == "base" else small_server.store.resolve(name))
    assert small_server.metric("vllm_edits_slots_total") == 2
    assert small_server.metric("vllm_edits_slots_used") <= 2
    assert small_server.metric("vllm_edits_installs_total", result="ok") > 2


def test_preemption_and_chunked_prefill_change_nothing(small_server: Serving) -> None:
    """Long prompts through short steps and a small KV cache: requests are chunked, evicted and computed again, and
    every one answers as it does alone."""
    if small_server.engines > 1:
        pytest.skip("each of several engines preempts by itself, as one does")
    models = ("base", "variant-0", "variant-1")
    prompts = [f"Chapter {number}. " + "The sea, the hills and the road between them. " * 30 for number in range(3)]

    def texts(model: str, *prompts: str) -> list[str]:
        answer = complete(small_server.url, model, list(prompts), 250, ignore_eos=True)
        return [choice["text"] for choice in answer["choices"]]

    solo = [[text for prompt in prompts for text in texts(model, prompt)] for model in models]
    before = small_server.metric("vllm:num_preemptions_total")
    for _ in range(6):  # how requests fall together is up to the machine; three of one client are too many already
        with ThreadPoolExecutor(len(models)) as pool:
            assert list(pool.map(lambda model: texts(model, *prompts), models)) == solo
        if small_server.metric("vllm:num_preemptions_total") > before:
            break
    else:
        pytest.fail("positive control: nothing was ever preempted")
    assert len({text for of in solo for text in of}) == len(models) * len(prompts)


def test_structured_output_and_several_answers_are_the_variants_own(small_server: Serving) -> None:
    """A grammar chooses among what the variant likes: of many pairs of words not all are chosen as the base would."""
    pairs = [["yes", "no"], ["red", "blue"], ["sea", "hill"], ["one", "two"], ["old", "new"], ["day", "night"]]
    chosen = {}
    for model in ("base", *VARIANTS):
        said = [complete(small_server.url, model, "It is", 8, structured_outputs={"choice": pair}) for pair in pairs]
        chosen[model] = [answer["choices"][0]["text"] for answer in said]
        assert all(text in pair for text, pair in zip(chosen[model], pairs, strict=True)), chosen
        version = "base" if model == "base" else small_server.store.resolve(model)
        assert {answer["headers"]["x-edits-version"] for answer in said} == {version}
    assert len(set(map(tuple, chosen.values()))) > 1, "positive control"
    answer = complete(small_server.url, "variant-0", "It is", 6, n=3, temperature=1, seed=1)
    assert len({choice["text"] for choice in answer["choices"]}) > 1


def test_beam_search_is_the_variants_own(small_server: Serving) -> None:
    """One beam is the greedy answer; the best of several is at least as likely. vLLM asks for every token anew."""
    prompt, found = "One two three", {}
    for name in ("base", *VARIANTS):
        greedy = ask(small_server, name, prompt, 6)
        assert ask(small_server, name, prompt, 6, use_beam_search=True) == greedy
        found[name] = ask(small_server, name, prompt, 6, use_beam_search=True, n=3)
        assert found[name][0] == greedy[0]
    assert len({text for _, text in found.values()}) > len(VARIANTS) / 2, "positive control: variants differ"


def test_a_version_can_be_named_by_its_beginning_or_by_a_tag(small_server: Serving) -> None:
    version = publish(small_server.store, random_bundle("variant-0", small_server.base, seed=77), tag="staging")
    small_server.sync()
    assert ask(small_server, f"variant-0@{version[:8]}", "One two three")[0] == version
    assert ask(small_server, "variant-0@staging", "One two three")[0] == version
    assert ask(small_server, "variant-0@prod", "One two three")[0] == small_server.store.resolve("variant-0")
    listed = {card["id"]: card for card in httpx.get(f"{small_server.url}/v1/models").json()["data"]}
    assert set(listed) == {"base", *VARIANTS, "variant-0@staging"}
    assert listed["variant-0"]["parent"] == "base"
    assert listed["variant-0"]["root"] == f"variant-0@{small_server.store.resolve('variant-0')}"


def test_unknown_names_are_vllms_own_404(small_server: Serving) -> None:
    """The error has the very form of vLLM's own (seen at a path the plugin does not touch), with the nearest names."""
    body = {"model": "variant-00", "prompt": "x"}
    ours = httpx.post(f"{small_server.url}/v1/completions", json=body)
    assert ours.status_code == 404
    assert "Did you mean 'variant-0'" in ours.json()["error"]["message"]
    assert set(ours.json()["error"]) == {"message", "type", "param", "code"}
    assert ours.json()["error"]["type"] == "NotFoundError"
    assert ours.json()["error"]["param"] == "model"
    for gone in ("variant-0@nosuchtag", "variant-0@123456789a", "Variant 0"):
        assert httpx.post(f"{small_server.url}/v1/completions", json={**body, "model": gone}).status_code == 404


def refused(serving: Serving, bundle: Bundle, code: str) -> None:
    """Promote `bundle` over variant-2 behind the store's back, and see it refused while the old version serves."""
    store, old = serving.store, serving.store.resolve("variant-2")
    before = ask(serving, "variant-2", "One two three")
    counted = serving.metric("vllm_edits_bundles_rejected_total", reason=code)
    version = bundle.version
    backend = store.backend
    backend.put(f"manifests/sha256/{version[:2]}/{version}.json", bundle.manifest.to_bytes())
    blob = bundle.manifest.tensors.sha256
    backend.put(f"blobs/sha256/{blob[:2]}/{blob}", bundle.tensor_bytes)
    store.attest(version, serving.signer.sign(Role.AUTHOR, version, "variant-2"))
    change = {"version": version, "operation": "promote", "reason": "test"}
    store._append(store.head("variant-2"), "variant-2", "prod", actor=None, **change)
    try:
        answer = serving.sync()
        assert code in answer["swaps"][0]["error"], answer
        assert ask(serving, "variant-2", "One two three") == before
        assert before[0] == old
        assert serving.metric("vllm_edits_bundles_rejected_total", reason=code) == counted + 1
        entry = next(row for row in serving.status()["refused"] if row["name"] == "variant-2")
        assert code in entry["error"]
    finally:
        store.rollback("variant-2")
        serving.sync()
    assert not [row for row in serving.status()["refused"] if row["name"] == "variant-2"]


def test_a_bundle_for_another_model_is_refused_and_the_old_one_serves(small_server: Serving) -> None:
    other = small_server.base.model_copy(update={"name": "other", "files": {"model.safetensors": "0" * 64}})
    refused(small_server, random_bundle("variant-2", other, seed=1), "base_model")


def test_a_bundle_that_was_tampered_with_is_refused_and_the_old_one_serves(small_server: Serving) -> None:
    good = random_bundle("variant-2", small_server.base, seed=33)
    cut = Bundle(good.manifest, good.tensor_bytes[:-4])
    refused(small_server, cut, "digest")


def test_a_bundle_with_nan_is_refused_and_the_old_one_serves(small_server: Serving) -> None:
    vector = {"vector": [float("nan")] * small_server.base.widths.hidden}
    refused(
        small_server, bundle_of("variant-2", small_server.base, [(Offset(site="layers.3.resid"), vector)]), "not_finite"
    )


def test_a_bundle_that_is_not_reserved_is_refused_with_the_setting(small_server: Serving) -> None:
    vector = {"vector": [0.5] * small_server.base.widths.hidden}
    bundle = bundle_of("variant-2", small_server.base, [(Offset(site="layers.0.resid"), vector)])
    refused(small_server, bundle, "capacity")
    assert "edits.reserve" in small_server.server.log_text()


def test_promoting_over_http_needs_the_admin_token(small_server: Serving) -> None:
    """PUT appends to the store and follows at once; without the token nothing changes."""
    version = publish(small_server.store, random_bundle("variant-5", small_server.base, seed=91), tag=None)
    url, old = f"{small_server.url}/v1/edits/variant-5", small_server.store.resolve("variant-5")
    for headers in ({}, {"x-edits-admin-token": "wrong"}):
        assert httpx.put(url, json={"version": version}, headers=headers).status_code == 401
    assert small_server.store.resolve("variant-5") == old
    token = {"x-edits-admin-token": "let-me-in"}
    answer = httpx.put(url, json={"version": version[:10], "reason": "better"}, headers=token, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.json()["entry"]["reason"] == "better"
    assert ask(small_server, "variant-5", "One two three")[0] == version
    assert httpx.post(f"{url}/rollback", json={}, headers=token, timeout=60).status_code == 200
    assert ask(small_server, "variant-5", "One two three")[0] == old


def test_what_is_not_signed_as_the_trust_file_asks_is_refused(small_server: Serving) -> None:
    """Unsigned, by a stranger, run out, or an old entry replayed: the old version serves, each reason is counted."""
    name, prompt = "variant-4", "One two three"
    store, signer = small_server.store, small_server.signer
    old = store.resolve(name)
    before = ask(small_server, name, prompt)
    bundle = random_bundle(name, small_server.base, 77)
    version = bundle.version

    def attempt(code: str, promoter: SigningKey | None, author: bytes | None) -> None:
        counted = small_server.metric("vllm_edits_bundles_rejected_total", reason=code)
        attempting = EditStore(store.url, signer=promoter)
        EditStore(store.url).publish(bundle)
        if author is not None:
            store.attest(version, author)
        attempting.promote(f"{name}@{version}")
        swap = small_server.sync()["swaps"][-1]
        assert f"[{code}]" in swap["error"], swap
        assert ask(small_server, name, prompt) == before
        assert small_server.metric("vllm_edits_bundles_rejected_total", reason=code) > counted

    yesterday = datetime.now(UTC) - timedelta(days=1)
    attempt("unsigned", None, None)
    attempt("untrusted_key", SigningKey.generate(), None)
    attempt("unsigned", signer, None)
    attempt("expired", signer, signer.sign(Role.AUTHOR, version, name, expires_at=yesterday))
    # Somebody who may write to the store puts the tag's first entry, which is signed, at its end once more.
    log, head = store.tag_log(name, "prod"), store.head(name)
    assert head is not None
    first = log.get(1)
    assert first is not None
    replayed = f"tags/{name}/prod/{head.sequence + 1:020d}.json"
    store.backend.create(replayed, first.to_bytes())
    small_server.sync()
    assert ask(small_server, name, prompt) == before
    assert [row["name"] for row in small_server.status()["broken_histories"]] == [name]
    store.backend.delete(replayed)
    # Positive control: with both signatures it is followed at once.
    store.attest(version, signer.sign(Role.AUTHOR, version, name))
    store.promote(f"{name}@{version}")
    assert small_server.sync()["swaps"][-1]["error"] == ""
    assert ask(small_server, name, prompt)[0] == version
    assert small_server.status()["broken_histories"] == small_server.status()["refused"] == []
    store.promote(f"{name}@{old}")
    small_server.sync()
    assert ask(small_server, name, prompt) == before


def test_a_store_that_is_down_leaves_the_server_serving(small_server: Serving) -> None:
    """Variants on the device go on; the failure is told and counted; the server recovers by itself."""
    before = ask(small_server, "variant-3", "One two three")
    errors = small_server.metric("vllm_edits_store_errors_total")
    root = small_server.store.backend.root  # type: ignore[attr-defined]
    hidden = root.with_name("store-away")
    root.rename(hidden)
    try:
        assert small_server.sync()["swaps"] == []
        assert ask(small_server, "variant-3", "One two three") == before
        assert small_server.metric("vllm_edits_store_errors_total") > errors
    finally:
        hidden.rename(root)
    small_server.sync()
    assert small_server.metric("vllm_edits_store_head_age_seconds") < 5


def test_metrics_equal_what_the_client_counted(small_server: Serving) -> None:
    name = "variant-4"
    labels = {"variant": name, "version": small_server.store.resolve(name)[:12]}
    counted = {
        kind: small_server.metric("vllm_edits_tokens_total", kind=kind, **labels) for kind in ("prompt", "generation")
    }
    requests = small_server.metric("vllm_edits_requests_total", outcome="ok", **labels)
    sent = [complete(small_server.url, name, "One two three", tokens, ignore_eos=True)["usage"] for tokens in (3, 5, 9)]
    assert small_server.metric("vllm_edits_requests_total", outcome="ok", **labels) == requests + 3
    for kind, field in (("prompt", "prompt_tokens"), ("generation", "completion_tokens")):
        total = sum(usage[field] for usage in sent)
        assert small_server.metric("vllm_edits_tokens_total", kind=kind, **labels) == counted[kind] + total
    assert small_server.metric("vllm_edits_time_to_first_token_seconds_count", variant=name) >= 3
    assert small_server.metric("vllm_edits_requests_in_flight") == 0


def test_every_way_of_asking_works_on_a_variant(small_server: Serving) -> None:
    """Chat, completions, responses and messages, streaming and not, with logprobs, stop strings, tools, structured
    output and n > 1: each answers with the variant's version in its headers and the variant's name as its model."""
    name = "variant-1"
    version = small_server.store.resolve(name)
    chat = {"model": name, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 6}
    flag = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    tool = {"type": "function", "function": {"name": "f", "parameters": flag}}
    schema = {"type": "json_schema", "json_schema": {"name": "s", "schema": flag}}
    asked = {
        "chat": ("/v1/chat/completions", {**chat, "logprobs": True, "top_logprobs": 2}),
        "n": ("/v1/chat/completions", {**chat, "n": 3, "temperature": 1.0, "seed": 1}),
        "tools": (
            "/v1/chat/completions",
            {**chat, "max_tokens": 60, "tools": [tool], "tool_choice": {"type": "function", "function": {"name": "f"}}},
        ),
        "structured": ("/v1/chat/completions", {**chat, "max_tokens": 60, "response_format": schema}),
        "completion": ("/v1/completions", {"model": name, "prompt": ["One", "Two"], "max_tokens": 4}),
        "responses": ("/v1/responses", {"model": name, "input": "Hello", "max_output_tokens": 6}),
        "messages": ("/v1/messages", chat),
        "stream chat": ("/v1/chat/completions", {**chat, "stream": True}),
        "stream completion": ("/v1/completions", {"model": name, "prompt": "One", "max_tokens": 4, "stream": True}),
        "stream responses": (
            "/v1/responses",
            {"model": name, "input": "Hello", "max_output_tokens": 6, "stream": True},
        ),
        "stream messages": ("/v1/messages", {**chat, "stream": True}),
    }
    for what, (path, body) in asked.items():
        answer = httpx.post(f"{small_server.url}{path}", json=body, timeout=120)
        assert answer.status_code == 200, (what, answer.text)
        assert answer.headers["x-edits-variant"] == name, what
        assert answer.headers["x-edits-version"] == version, what
        assert f'"model":"{name}"' in answer.text.replace('"model": ', '"model":'), what
    stopped = complete(small_server.url, name, "One two three", 40, ignore_eos=True)["choices"][0]["text"]
    stop = stopped[len(stopped) // 2 : len(stopped) // 2 + 4]
    again = complete(small_server.url, name, "One two three", 40, ignore_eos=True, stop=[stop])["choices"][0]
    assert again["finish_reason"] == "stop"
    assert again["text"] == stopped[: stopped.index(stop)]
