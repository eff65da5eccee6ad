"""What a method is judged by: measures on data that no build reads, of a transformers model as it is at the moment."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vllm_edits.edit_store.authoring
from vllm_edits.edit_store.authoring.chat import asked
from vllm_edits.edit_store.authoring.host import Host, batches, divergence
from vllm_edits.edit_store.authoring.linear_probe import accuracy
from vllm_edits.edit_store.authoring.methods.r_tuning import Question, answered, precision, right
from vllm_edits.edit_store.authoring.methods.refusal_direction import log_odds
from vllm_edits.edit_store.authoring.methods.sahara import FRAME, angle

EXAMPLES = Path(vllm_edits.edit_store.authoring.__path__[0]) / "examples"
NEUTRAL_TOKENS = 48
NEUTRAL_TEXTS = 16
Rows = list[dict[str, Any]]
Effect = Callable[[Host], float]


def rows(name: str) -> Rows:
    """The rows of an example's file."""
    return [json.loads(line) for line in (EXAMPLES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


# --- facts ------------------------------------------------------------------------------------------------------------


def preference(host: Host, prompts: Sequence[str], wanted: Sequence[str], other: Sequence[str]) -> Tensor:
    """Log-likelihood per token of the wanted answers less that of the others, [prompts]."""
    return host.likelihood(prompts, wanted) - host.likelihood(prompts, other)


def facts_changed(name: str) -> Effect:
    """Share of facts whose new answer is likelier than the old one."""
    facts = rows(name)

    def share(host: Host) -> float:
        prompts = [row["prompt"].replace("{}", row["subject"]) for row in facts]
        found = preference(host, prompts, *([row[column] for row in facts] for column in ("answer", "was")))
        return float((found > 0).float().mean())

    return share


def neighbours_kept(host: Host) -> float:
    """Share of other facts that the model goes on with greedily as it should."""
    return _said_so(host, rows("neighbours"), 3)


def answers_given(name: str) -> Effect:
    """Share of prompts that the model answers greedily as the file says."""
    wanted = rows(name)
    return lambda host: _said_so(host, wanted, 6)


def _said_so(host: Host, wanted: Rows, tokens: int) -> float:
    """Share of prompts that go on with their answers; some tokenizers leave out the space before the first word."""
    said = host.answers([row["prompt"] for row in wanted], tokens)
    right = [each.text.strip().startswith(row["answer"].strip()) for each, row in zip(said, wanted, strict=True)]
    return sum(right) / len(right)


FORMS = ("question", "fill-in", "choice", "sub-token")
"""Forms of a probe in ORT: a question, a gap, a choice of four, and a question whose letters stand apart."""


def redirected(form: str, concepts: Sequence[tuple[str, str, str]]) -> Effect:
    """Preference for the target's answer over the concept's own, in nats per token, in one form of probe.

    concepts: each a country, its own capital, and its target's.
    """
    options = ["Paris", "Rome", "Tokyo", "Moscow", "Athens", "Vienna", "Cairo", "Madrid", "Berlin", "Beijing"]

    def mean(host: Host) -> float:
        prompts = []
        for concept, own, target in concepts:
            text = f"What is the capital of {concept}?"
            shown = [own, target, *[each for each in options if each not in (own, target)][:2]]
            prompts.append({
                "question": f"Question: {text}\nAnswer:",
                "fill-in": f"The capital of {concept} is",
                "choice": f"Question: {text}\nChoices: {', '.join(sorted(shown))}.\nAnswer:",
                "sub-token": f"Question:\n{spelled(text)}Answer:",
            }[form])  # fmt: skip
        wanted = preference(host, prompts, [f" {each[2]}" for each in concepts], [f" {each[1]}" for each in concepts])
        return float(wanted.mean())

    return mean


def spelled(text: str) -> str:
    """Every character of a text on a line of its own, as ORT's sub-token probes are."""
    return "".join("\n" if each == " " else f"{each}\n" for each in text)


# --- two kinds of text ------------------------------------------------------------------------------------------------


def good_moods(host: Host) -> float:
    """Preference for the good one of two texts, in nats per token."""
    pairs = rows("moods_held_out")
    begin = [host.tokenizer.bos_token or host.tokenizer.eos_token] * len(pairs)
    return float(preference(host, begin, *([row[side] for row in pairs] for side in ("positive", "negative"))).mean())


def right_preferred(host: Host) -> float:
    """Preference for the right one of two answers, in nats per token."""
    return float(_right_over_wrong(host).mean())


def right_likelier(host: Host) -> float:
    """Share of prompts with the right answer likelier than the wrong one."""
    return float((_right_over_wrong(host) > 0).float().mean())


def _right_over_wrong(host: Host) -> Tensor:
    pairs = rows("answers_held_out")
    right, wrong = ([row for row in pairs if row["right"] == side] for side in (True, False))
    prompts = [row["prompt"] for row in right]
    return preference(host, prompts, *([row["answer"] for row in side] for side in (right, wrong)))


def labels_told(host: Host) -> float:
    """Share of reviews whose own label is likelier than the other one."""
    reviews = rows("reviews_held_out")
    other = {"red": " blue", "blue": " red"}
    prompts, answers = [row["prompt"] for row in reviews], [f" {row['answer']}" for row in reviews]
    found = preference(host, prompts, answers, [other[row["answer"]] for row in reviews])
    return float((found > 0).float().mean())


def probe_accuracy(layer: Callable[[Host], int]) -> Effect:
    """Accuracy of a linear probe for the mood of held-out texts, behind one layer."""

    def share(host: Host) -> float:
        site = f"layers.{layer(host)}.resid"
        sides = []
        for name in ("mood_texts", "mood_texts_held_out"):
            of = rows(name)
            found = host.activations([row["text"] for row in of], [site])[site]
            labels = [row["label"] == "good" for row, states in zip(of, found, strict=True) for _ in states[1:]]
            sides.append((torch.cat([states[1:] for states in found]), torch.tensor(labels)[:, None].float()))
        return accuracy(*sides)

    return share


# --- behaviours -------------------------------------------------------------------------------------------------------


def refusal(host: Host) -> float:
    """Log-odds that the answer to a harmful prompt begins as a refusal."""
    prompts = [asked(host.tokenizer, row["prompt"]) for row in rows("harmful_held_out")]
    first = [host.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("I", "As", "Sorry")]
    return log_odds(host.next_token(prompts), torch.tensor(first))


def harmful_moved(base: Tensor) -> Effect:
    """Divergence of the next token behind held-out harmful prompts from the base model's."""
    return lambda host: float(divergence(base, next_harmful(host)).mean())


def next_harmful(host: Host) -> Tensor:
    """Log-probabilities behind the harmful prompts that no build reads."""
    return host.next_token([asked(host.tokenizer, row["prompt"]) for row in rows("harmful_held_out")])


def harmful_turned(base: Tensor) -> Effect:
    """Angle between the main directions of held-out harmful prompts in the base model and now, in degrees."""
    return lambda host: angle(base, framed_states(host))


def framed_states(host: Host) -> Tensor:
    """Last states of the harmful prompts that no build reads, in Sahara's frame."""
    return host.last_states([FRAME.format(row["prompt"]) for row in rows("harmful_held_out")])


def perturbation_felt(host: Host) -> float:
    """Divergence of the next token between texts and the same texts with noise in front, in nats."""
    pairs = rows("perturbed_held_out")
    clean, noisy = (host.next_token([row[side] for row in pairs]) for side in ("text", "perturbed"))
    return float(divergence(clean, noisy).mean())


def confidence_precision(host: Host) -> float:
    """Average precision of the confidence on held-out questions."""
    return precision(host, [Question(**row) for row in rows("questions_held_out")], chat=True)


def answered_rightly(host: Host) -> float:
    """Share of held-out questions that the model answers rightly."""
    questions = [Question(**row) for row in rows("questions_held_out")]
    return sum(right(questions, answered(host, questions, chat=True))) / len(questions)


def task_accuracy(*names: str) -> Effect:
    """Share of held-out questions of these tasks whose right answer is the likelier one."""

    def share(host: Host) -> float:
        of = [row for row in rows("tasks_held_out") if row["task"] in names]
        found = preference(host, [row["prompt"] for row in of],
                           *([f" {row[side]}" for row in of] for side in ("right", "wrong")))  # fmt: skip
        return float((found > 0).float().mean())

    return share


# --- side effects -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Neutral:
    """Ordinary text that no build reads, and what the base model says of it."""

    texts: tuple[str, ...]
    base: tuple[Tensor, ...]

    @classmethod
    def of(cls, host: Host) -> Neutral:
        texts = []
        for row in rows("text_held_out")[:NEUTRAL_TEXTS]:
            ids = host.tokenizer(row["text"], add_special_tokens=False)["input_ids"][:NEUTRAL_TOKENS]
            texts.append(host.tokenizer.decode(ids))
        return cls(tuple(texts), tuple(_every_token(host, texts)))

    def side_effects(self, host: Host) -> Mapping[str, float]:
        """Divergence of every next token in nats, and the perplexity over that of the base model."""
        moved, losses = [], []
        for text, before, now in zip(self.texts, self.base, _every_token(host, self.texts), strict=True):
            moved.append(divergence(before[:-1], now[:-1]))
            ids = torch.tensor(host.tokenizer(text)["input_ids"])[1:, None]
            losses.append((before[:-1].gather(1, ids) - now[:-1].gather(1, ids))[:, 0])
        return {"kl": float(torch.cat(moved).mean()), "perplexity": float(torch.cat(losses).mean().exp())}


@torch.inference_mode()
def _every_token(host: Host, texts: Sequence[str]) -> list[Tensor]:
    """Log-probabilities of the next token at every token of each text."""
    found = []
    for some in batches(texts):
        ids, lengths = host.tokens(some)
        logits = host.model(ids, use_cache=False).logits.log_softmax(-1)
        found += [row[:length].clone() for row, length in zip(logits, lengths, strict=True)]
    return found
