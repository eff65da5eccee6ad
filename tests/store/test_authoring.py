"""Edits computed from a model: the mathematics on a small random model, the demo's claims on the real one."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadtests.demo import prompts
from tests.support.bundles import KINDS, Pairs, random_pairs
from vllm_edits.edit_store import BaseModelRef, Bundle, LowRank, Scale, identify
from vllm_edits.edit_store.verify import check
from vllm_edits.plugin.graph.reservation import Reservation

torch = pytest.importorskip("torch")
from loadtests.demo import bundles  # noqa: E402
from vllm_edits.edit_store.authoring.host import Host, edited  # noqa: E402

TEXTS = ["The river runs slowly.", "She has never seen so much snow, and it was cold.", "Two dogs"]
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(scope="module")
def host(tiny_model: Path) -> Host:
    return Host.load(tiny_model)


def passes(host: Host, site: str, pairs: Pairs = ()) -> np.ndarray:
    """All token vectors of TEXTS at a site, `[tokens, width]`."""
    with edited(host.model, pairs):
        return torch.cat(host.activations(TEXTS, [site])[site]).numpy()


class TestEditedByFormula:
    """`edited` is the oracle of the served engine, so it is itself held to the reference in numpy."""

    @pytest.mark.parametrize("kind", KINDS)
    def test_each_kind_does_what_its_reference_does(self, host: Host, kind: str):
        """What passes the site inside `edited` is `apply` of what passed it before; the layer below is untouched."""
        [(edit, fields)] = pairs = random_pairs(kind, 2, host.widths, seed=1)
        before, after = passes(host, edit.site), passes(host, edit.site, pairs)
        inputs = (passes(host, edit.reads),) if kind == "low_rank" else ()
        np.testing.assert_allclose(after, edit.apply(*inputs, before, **fields), **CLOSE)
        assert np.abs(after - before).max() > 0.01
        np.testing.assert_array_equal(passes(host, "layers.1.resid", pairs), passes(host, "layers.1.resid"))

    def test_kinds_at_one_site_apply_in_the_declared_order(self, host: Host):
        """The filter comes before the offset, in whatever order they are given."""
        (keep, filtered), (push, pushed) = pairs = [
            *random_pairs("subspace_filter", 1, host.widths, seed=1),
            *random_pairs("offset", 1, host.widths, seed=2),
        ]
        before = passes(host, keep.site)
        expected = push.apply(keep.apply(before, **filtered), **pushed)
        np.testing.assert_allclose(passes(host, keep.site, pairs), expected, **CLOSE)
        np.testing.assert_allclose(passes(host, keep.site, pairs[::-1]), expected, **CLOSE)
        assert np.abs(keep.apply(push.apply(before, **pushed), **filtered) - expected).max() > 0.01

    def test_the_model_is_restored_exactly_even_after_an_error(self, host: Host):
        """Afterwards every log-probability has its old bits; inside, it has not."""
        pairs = list(chain.from_iterable(random_pairs(kind, 1, host.widths, seed=3) for kind in KINDS))
        before = host.next_token(TEXTS)
        with edited(host.model, pairs):
            assert not torch.equal(host.next_token(TEXTS), before)
        assert torch.equal(host.next_token(TEXTS), before)
        with pytest.raises(ZeroDivisionError), edited(host.model, pairs):
            _ = 1 / 0
        assert torch.equal(host.next_token(TEXTS), before)

    def test_a_wider_model_is_edited_in_its_own_dtype(self, tiny_model: Path):
        """A float64 model stays a float64 reference: its offset is exact where float32 would round."""
        wide = Host.load(tiny_model)
        wide.model.double()
        [(edit, fields)] = random_pairs("offset", 2, wide.widths, seed=4)
        moved = passes(wide, edit.site, [(edit, fields)]) - passes(wide, edit.site)
        np.testing.assert_allclose(moved, np.broadcast_to(fields["vector"], moved.shape), atol=1e-12)


class TestHost:
    """What the author reads from a model does not depend on which texts share a batch."""

    def test_padding_changes_nothing(self, host: Host):
        """Activations, next tokens and likelihoods of a text are the same alone and beside a longer one."""
        alone = host.activations(TEXTS[2:], ["layers.3.resid"])["layers.3.resid"][0]
        beside = host.activations(TEXTS, ["layers.3.resid"])["layers.3.resid"][2]
        torch.testing.assert_close(alone, beside, **CLOSE)
        torch.testing.assert_close(host.next_token(TEXTS[2:])[0], host.next_token(TEXTS)[2], **CLOSE)
        answers = [" and so it was", " cold", " river"]
        torch.testing.assert_close(
            host.likelihood(TEXTS[2:], answers[2:])[0], host.likelihood(TEXTS, answers)[2], **CLOSE
        )

    def test_no_site_depends_on_the_others_that_are_read(self, host: Host):
        """Layers above the last site are left out, but not where something behind them is read too."""
        sites = ["embed.out", "layers.1.resid", "layers.3.resid", "final", "logits"]
        together = host.activations(TEXTS, sites)
        for site in sites:
            torch.testing.assert_close(host.activations(TEXTS, [site])[site], together[site], **CLOSE)

    def test_likelihood_is_what_next_token_says(self, host: Host):
        """For an answer of one token they are the same number."""
        token = host.tokenizer(" river")["input_ids"]
        assert len(token) == 1
        expected = host.next_token(TEXTS)[:, token[0]]
        torch.testing.assert_close(host.likelihood(TEXTS, [" river"] * 3), expected, **CLOSE)


class TestHeads:
    """Ablation by contribution."""

    def test_factor_zero_removes_exactly_that_head(self, host: Host):
        """The attention output loses W_o's columns of that head times its z, and nothing else."""
        widths, head = host.widths, 2
        columns = slice(head * widths.head_dim, (head + 1) * widths.head_dim)
        factor = np.ones(widths.heads, dtype=np.float32)
        factor[head] = 0
        pairs = [(Scale(site="layers.1.attn.z"), {"factor": factor})]
        share = passes(host, "layers.1.attn.z")[:, columns]
        share = share @ host.model.model.layers[1].self_attn.o_proj.weight[:, columns].T.numpy()
        lost = passes(host, "layers.1.attn.out") - passes(host, "layers.1.attn.out", pairs)
        np.testing.assert_allclose(lost, share, **CLOSE)
        assert np.abs(share).max() > 0.01


def test_nothing_is_judged_by_what_it_was_made_from():
    """No claim's prompt, and no country it asks for, is among the texts that edits are computed from."""
    rows = [json.loads(line) for file in bundles.DATA.iterdir() for line in file.read_text().splitlines()]
    made_from = {text for row in rows for text in row.values() if isinstance(text, str)}
    judged_by = {prompt for exhibit in bundles.EXHIBITS for claim in exhibit.claims for prompt in claim.prompts}
    assert not made_from & (judged_by | set(prompts.UNRELATED))
    assert not [each for each in prompts.HELD_LISTS if any(each in text for text in made_from)]
    asked = [fact.removeprefix("The capital of ").split()[0] for fact in prompts.FACTS if "capital" in fact]
    assert len(asked) == 10
    ordinary = [row["text"] for row in rows if set(row) == {"text"}]
    assert len(ordinary) == 405
    assert not [country for country in asked if any(country in text for text in ordinary)]


EVERY = (*bundles.EXHIBITS, bundles.LATE)
Built = dict[tuple[str, str], tuple[bundles.Exhibit, Bundle]]


@pytest.fixture(scope="module")
def base(smollm2: Path) -> BaseModelRef:
    return identify(smollm2)


@pytest.fixture(scope="module")
def built(smollm2: Path, base: BaseModelRef) -> Built:
    """The demo's bundles, computed as the demo computes them."""
    steps: list[str] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two that wait for each other are ten times slower where servers of other tests still run
    try:
        made = bundles.build(smollm2, base, steps.append, created_at=datetime(2026, 1, 1, tzinfo=UTC))
    finally:
        torch.set_num_threads(threads)
    assert len(steps) == 1 + len(EVERY)
    return {(exhibit.name, exhibit.label): (exhibit, bundle) for exhibit, bundle in made}


def figures(bundle: Bundle) -> dict[str, Any]:
    return {row.metric: row for row in bundle.manifest.measurements}


@pytest.mark.long
class TestDemoBundles:
    """Each bundle on the real model: a measured effect and a measured side effect."""

    @pytest.mark.parametrize("key", [(exhibit.name, exhibit.label) for exhibit in EVERY], ids=" ".join)
    def test_every_claim_holds(self, built: Built, base: BaseModelRef, key: tuple[str, str]):
        """The bundle keeps every rule; each claim holds of it; its first claim does not hold of the base itself."""
        exhibit, bundle = built[key]
        check(bundle, base)
        rows = bundle.manifest.measurements
        assert [row.metric for row in rows[:-1]] == [claim.metric for claim in exhibit.claims]
        assert not [why for claim, row in zip(exhibit.claims, rows[:-1], strict=True) if (why := claim.broken(row))]
        unedited = rows[0].model_copy(update={"edited": rows[0].base})
        assert exhibit.claims[0].broken(unedited)

    @pytest.mark.parametrize(("label", "city"), [("1", " Rome"), ("2", " Berlin")])
    def test_the_capital_moves_and_other_facts_stay(self, built: Built, label: str, city: str):
        """4 of 5 wordings, p(Paris) under 0.1 in all of them, 18 of 20 facts; rank one at three layers does it."""
        _, bundle = built["capital", label]
        rows = figures(bundle)
        assert rows[f"answers{city}"].edited * rows[f"answers{city}"].n >= 4
        assert rows["highest p(Paris)"].base > 0.7
        assert rows["highest p(Paris)"].edited < 0.1
        assert rows["facts kept"].edited * rows["facts kept"].n >= 18
        assert [edit.rank for edit in bundle.manifest.edits if isinstance(edit, LowRank)] == [1, 1, 1]

    def test_the_base_knows_what_is_moved(self, smollm2: Path):
        """ "The capital of France is" has Paris on top at about 0.77, as every wording has."""
        answers = Host.load(smollm2).answers(prompts.CAPITAL_WORDINGS, 1)
        assert [answer.text for answer in answers] == [" Paris"] * 5
        assert answers[0].first[" Paris"] == pytest.approx(0.77, abs=0.02)

    def test_four_heads_carry_the_copying(self, built: Built):
        """Four factors are zero, all others one; such a bundle is privileged, and no other one is."""
        _, bundle = built["no-copy", "1"]
        assert [name for (name, _), (_, each) in built.items() if each.manifest.privileged] == ["no-copy"]
        factors = np.concatenate(list(check(bundle).values()))
        assert sorted(set(factors.tolist())) == [0, 1]
        assert np.count_nonzero(factors == 0) == 4

    def test_side_effects_are_small_and_named(self, built: Built):
        """The divergence from the base on unrelated text is measured for every bundle, and none is large. Gates leave
        such text exactly as it was, which redirections without gates do not."""
        divergences = {key: figures(bundle)["divergence on unrelated text, nats"] for key, (_, bundle) in built.items()}
        assert divergences.pop(("gated-capital", "1")).edited == 0
        assert len(divergences) == len(bundles.EXHIBITS)
        assert all(0 < row.edited < 0.3 for row in divergences.values())

    def test_the_late_bundle_needs_what_no_other_needs(self, built: Built):
        """So a server that has reserved for the others must grow for it."""
        late = built[bundles.LATE.name, bundles.LATE.label][1].manifest
        others = Reservation.for_versions(bundle.manifest for _, bundle in built.values() if bundle.manifest != late)
        assert {reason.code for reason in others.missing(late)} == {"capacity"}
        assert len(others.missing(late)) == len(late.edits)
        assert not Reservation.for_versions([late]).missing(late)
