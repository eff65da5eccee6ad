"""The proofs: for each method the example that it is built from, the effect that is looked for, and a control."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from tests.proofs.authoring import effects, sentences
from tests.proofs.authoring.effects import Effect
from vllm_edits.edit_store.authoring.host import Host
from vllm_edits.edit_store.authoring.methods.stealth import SELECTIVITY_FILE

AVERAGE = "half of each bundle"
RANDOM = "random numbers of the same length"
SAME_LAYERS = "random heads of the same layers"
Of = Callable[[Host], Effect]
"""An effect that compares with the base model, which it is given first."""

CAPITALS = (
    ("France", "Paris", "Rome"), ("Japan", "Tokyo", "Moscow"), ("Greece", "Athens", "Vienna"),
    ("Egypt", "Cairo", "Madrid"), ("Germany", "Berlin", "Beijing"),
)  # fmt: skip
"""Concepts of the example for ROCR: each with its own capital, and its target's."""
MANY = (
    *CAPITALS, ("Russia", "Moscow", "Lisbon"), ("Ireland", "Dublin", "Oslo"), ("Poland", "Warsaw", "Havana"),
    ("Canada", "Ottawa", "Nairobi"), ("Turkey", "Ankara", "Stockholm"), ("Peru", "Lima", "Copenhagen"),
    ("Ukraine", "Kyiv", "Budapest"),
)  # fmt: skip
"""Those of the example with twelve concepts, one redirected after the other."""


@dataclass(frozen=True)
class Built:
    """Words of one `vllm-edits build`: options, and files of the examples by table."""

    data: Sequence[str]
    options: Sequence[str] = ()


@dataclass(frozen=True)
class Proof:
    """One method, or one form of it."""

    name: str
    """of the row; the method's, with its form behind a space"""
    build: Built
    measure: str
    """of the effect, with its unit; more is more of what is meant, unless it says less"""
    effect: Of
    control: str = RANDOM
    """what the control is, in words"""
    control_build: Built | None = None
    """the control as a build; None for random numbers in the same edits"""
    more: Mapping[str, Of] = field(default_factory=dict)
    """further figures"""
    seeds: int = 1
    """builds with other seeds, for the spread"""
    negated: bool = True
    """False where the edits have no opposite"""
    served: Literal["slots", "weights"] = "slots"
    members: Sequence[Proof] = ()
    """proofs, the bundles of which are its data"""
    told: Callable[[Path], str] = lambda _: ""
    """a further figure in words, from the files beside the bundle"""

    @property
    def method(self) -> str:
        """The command's word."""
        return self.name.split()[0]


def plain(effect: Effect) -> Of:
    """An effect that needs no base."""
    return lambda _: effect


KEPT = {"neighbours kept": plain(effects.neighbours_kept)}
PARAPHRASED = {"paraphrases changed": plain(effects.facts_changed("facts_held_out")), **KEPT}
FORMS = {
    form: plain(effects.redirected(form, CAPITALS)) for form in effects.FORMS
}  # fmt: skip
STRONGER = ("--rate", "0.5", "--clamp", "4", "--decay", "0.001")
"""As in EasyEdit's files for Llama and Qwen."""
STEALTH = ["edits=exact_prompts", "text=text", f"held_out={sentences.NAME}"]
QUESTIONS = ["questions=questions", "held_out=questions_held_out"]
REVIEWS = ["examples=reviews", "held_out=reviews_held_out"]
SHUFFLED = ["examples=reviews_shuffled", "held_out=reviews_held_out"]


def _locate(name: str, *options: str) -> Proof:
    return Proof(
        name, Built(["facts=facts", "text=text"], options), "facts changed, share",
        plain(effects.facts_changed("facts")), more=PARAPHRASED,
    )  # fmt: skip


def _taught(name: str, *options: str, served: Literal["slots", "weights"] = "slots") -> Proof:
    return Proof(
        name, Built(REVIEWS, options), "labels told, share", plain(effects.labels_told),
        control="trained on shuffled labels", control_build=Built(SHUFFLED, options), more=KEPT, seeds=3,
        served=served,
    )  # fmt: skip


def _stealthy(name: str, form: str) -> Proof:
    return Proof(
        name, Built(STEALTH, ("--form", form)), "answers given greedily, share",
        plain(effects.answers_given("exact_prompts")),
        more=KEPT, negated=False, told=_false_positives,
    )  # fmt: skip


def _false_positives(folder: Path) -> str:
    note = json.loads((folder / SELECTIVITY_FILE).read_text())
    held, bound = note["held_out"], note["bound_for_all_edits"]
    share = held["false_positives"] / held["tokens"]
    return (
        f"gates opened by {held['false_positives']} of {held['tokens']:,} tokens in {held['texts']:,} sentences, a "
        f"share of {share:.1g}, with a bound of {bound:.1g}"
    )


def _shifted(name: str, *options: str) -> Proof:
    return Proof(
        name, Built(["answers=answers"], options), "preference for right answers, nats per token",
        plain(effects.right_preferred), control="random heads",
        control_build=Built(["answers=answers"], (*options, "--random-heads")),
        more={**KEPT, "right answers likelier, share": plain(effects.right_likelier)}, seeds=3,
    )  # fmt: skip


def _both(host: Host) -> float:
    return (effects.labels_told(host) + effects.facts_changed("facts")(host)) / 2


_REVIEWS_BY_LOCFT = _taught("locft-bf", "--batch", "16", served="weights")
_FACTS_BY_LOCFT = replace(
    _locate("locft-bf facts"), build=Built(["examples=new_answers"], ("--batch", "8")), served="weights"
)
PROOFS = (
    Proof(
        "rocr", Built(["concepts=concepts", "text=text"]), FIRST := "question, preference for the target in nats",
        FORMS["question"], more={form: of for form, of in FORMS.items() if form != "question"} | KEPT,
    ),
    Proof(
        "rocr twelve", Built(["concepts=many_concepts", "text=text"]), FIRST,
        plain(effects.redirected("question", MANY)), more=KEPT,
    ),
    _locate("rome"), _locate("memit"), _locate("memit stronger", *STRONGER), _locate("alphaedit"),
    _locate("alphaedit stronger", *STRONGER, "--ridge", "1"),
    _stealthy("stealth jet-pack", "jetpack"), _stealthy("stealth in-place", "in-place"),
    Proof(
        "steer", Built(["pairs=moods"], ("--sweep",)), "preference for good moods, nats per token",
        plain(effects.good_moods), more=KEPT,
    ),
    Proof(
        "steer pca", Built(["pairs=moods"], ("--sweep", "--direction", "pca")),
        "preference for good moods, nats per token", plain(effects.good_moods), more=KEPT,
    ),
    Proof(
        "leace", Built(["texts=mood_texts"]), "accuracy of a linear probe, less",
        plain(effects.probe_accuracy(lambda host: round(0.4 * host.widths.layers))), more=KEPT, negated=False,
    ),
    Proof(
        "model-surgery", Built(["texts=judged", "held_out=judged_held_out"]),
        "preference for good moods, nats per token", plain(effects.good_moods), more=KEPT, seeds=3,
    ),
    _shifted("iti"), _shifted("iti weaker", "--heads", "13", "--alpha", "3"),
    Proof(
        "refusal-direction", Built(["harmful=harmful", "harmless=harmless"], ("--privileged",)),
        "log-odds of a refusal, less", plain(effects.refusal), more=KEPT, negated=False,
    ),
    Proof(
        "ships", Built(["prompts=harmful"], ("--privileged", "--count", "5")), "divergence of the next token, nats",
        lambda host: effects.harmful_moved(effects.next_harmful(host)), control=SAME_LAYERS, more=KEPT,
        negated=False,
    ),
    Proof(
        "sahara", Built(["prompts=harmful"], ("--privileged", "--steps", "3")), "angle of the prompts, degrees",
        lambda host: effects.harmful_turned(effects.framed_states(host)), control=SAME_LAYERS, more=KEPT,
        negated=False,
    ),
    Proof(
        "eigenshield", Built(["texts=text", "pairs=perturbed"]), "divergence by the perturbation, nats, less",
        plain(effects.perturbation_felt), more=KEPT, negated=False,
    ),
    _taught("lofit", "--epochs", "8"),
    _taught("hut"),
    _taught("apet"),
    _taught("sara", "--epochs", "8", "--layers", "20-29", served="weights"),
    _REVIEWS_BY_LOCFT,
    _FACTS_BY_LOCFT,
    Proof(
        "pcb-merge", Built([]), "labels told and facts changed, mean of the shares", plain(_both), control=AVERAGE,
        more={
            "labels told": plain(effects.labels_told), "facts changed": plain(effects.facts_changed("facts")), **KEPT,
        }, members=(_REVIEWS_BY_LOCFT, _FACTS_BY_LOCFT), served="weights",
    ),
    Proof(
        "r-tuning", Built(QUESTIONS, ("--chat",)), "average precision of the confidence",
        plain(effects.confidence_precision), control="known shuffled",
        control_build=Built(QUESTIONS, ("--chat", "--shuffled")),
        more={"answered rightly": plain(effects.answered_rightly), **KEPT},
    ),
    Proof(
        "random-labels", Built(["questions=tasks", "held_out=tasks_held_out"], ("--forget", "animals")),
        "accuracy on the task, less", plain(effects.task_accuracy("animals")), control="trained on the right labels",
        control_build=Built(["questions=tasks", "held_out=tasks_held_out"], ("--forget", "animals", "--true-labels")),
        more={**KEPT, "other tasks, accuracy": plain(effects.task_accuracy("foods", "capitals", "moods"))},
    ),
)  # fmt: skip
"""In the order of the table."""
