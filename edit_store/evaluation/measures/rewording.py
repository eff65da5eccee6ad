"""Robustness under rewording: the edit holds where the words change and the meaning does not, and not where it does.

Prompts are changed as ReCode does it for the text of a prompt (arXiv 2212.10264): case, typing errors, punctuation,
words of the same meaning, and spaces; each kind `variants` times, by a seed. As there, the robust share counts a prompt
only if all its variants of one kind hold. The table `altered` has the converse (Small Edits): prompts with another
meaning, for which the new answer would be wrong.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar

from pydantic import Field

from vllm_edits.edit_store.authoring.data import Data, Row, Table, Text
from vllm_edits.edit_store.evaluation.figure import Figure
from vllm_edits.edit_store.evaluation.measure import MEASURES, Measure
from vllm_edits.edit_store.evaluation.speaker import Speaker

SYNONYMS: Mapping[str, tuple[str, ...]] = {
    "answer": ("reply",), "begin": ("start",), "big": ("large",), "capital": ("capital city",), "city": ("town",),
    "country": ("nation", "state"), "famous": ("well-known",), "give": ("tell",), "located": ("situated",),
    "make": ("create",), "name": ("state",), "question": ("query",), "seat": ("home",), "small": ("little",),
    "tell": ("inform",), "what": ("which",), "works": ("is working",), "wrote": ("authored",),
}  # fmt: skip
"""A few words that may stand for each other in most prompts."""
_KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")


class Held(Row):
    """A prompt with the answer that the edited model shall give, and the one that it shall not."""

    prompt: Text
    answer: Text
    was: Text


def upper(prompt: str, _: random.Random) -> str:
    """Every letter large."""
    return prompt.upper()


def lower(prompt: str, _: random.Random) -> str:
    """Every letter small."""
    return prompt.lower()


def typo(prompt: str, chance: random.Random) -> str:
    """One letter of a longer word is a neighbour on the keyboard, is doubled, left out, or changes places."""
    words = list(re.finditer(r"[A-Za-z]{4,}", prompt))
    if not words:
        return prompt
    word = chance.choice(words)
    place = chance.randrange(word.start() + 1, word.end() - 1)
    letter, following = prompt[place], prompt[place + 1]
    slips = (letter * 2 + following, following, following + letter, _beside(letter, chance) + following)
    changed = chance.choice([slip for slip in slips if slip != letter + following])
    return prompt[:place] + changed + prompt[place + 2 :]


def _beside(letter: str, chance: random.Random) -> str:
    row = next((keys for keys in _KEYS if letter.lower() in keys), letter.lower())
    place = row.index(letter.lower())
    return chance.choice((row[max(0, place - 1)], row[min(len(row) - 1, place + 1)]))


def punctuation(prompt: str, chance: random.Random) -> str:
    """Marks within the prompt are left out, or a comma is put between two words."""
    without = re.sub(r"[,;:'\"!?-](?=\s)", "", prompt)
    gaps = [found.start() for found in re.finditer(r"(?<=[a-z]) (?=[a-z])", prompt)]
    if without != prompt or not gaps:
        return without
    place = chance.choice(gaps)
    return f"{prompt[:place]},{prompt[place:]}"


def synonym(prompt: str, chance: random.Random) -> str:
    """One word becomes another of the same meaning."""
    words = [found for found in re.finditer(r"[A-Za-z]+", prompt) if found[0].lower() in SYNONYMS]
    if not words:
        return prompt
    word = chance.choice(words)
    new = chance.choice(SYNONYMS[word[0].lower()])
    return prompt[: word.start()] + (new.capitalize() if word[0][0].isupper() else new) + prompt[word.end() :]


def spaces(prompt: str, chance: random.Random) -> str:
    """One space is doubled."""
    gaps = [found.start() for found in re.finditer(r"(?<=\w) (?=\w)", prompt)]
    place = chance.choice(gaps) if gaps else None
    return prompt if place is None else f"{prompt[:place]} {prompt[place:]}"


Reworded = Callable[[str, random.Random], str]
KINDS: Mapping[str, Reworded] = {
    "upper case": upper, "lower case": lower, "typing error": typo, "punctuation": punctuation, "synonym": synonym,
    "spaces": spaces,
}  # fmt: skip


class Rewording(Measure):
    """Effect under rewording: the share of prompts that hold in every variant of a kind, and altered meanings."""

    tables: ClassVar[Mapping[str, Table]] = {
        "prompts": Table(Held, "prompts with the new answer and the old"),
        "altered": Table(Held, "prompts of another meaning: with the new answer, wrong here, and the right one",
                         least=0),
    }  # fmt: skip

    variants: int = Field(3, gt=0, description="Variants of each prompt and kind.")
    seed: int = Field(0, description="Seed of the variants.")

    def figures(self, base: Speaker, edited: Speaker, data: Data) -> Iterator[Figure]:
        rows = data["prompts"]
        yield Figure.share("as it is", (_held(speaker, rows) for speaker in (base, edited)), "more")
        for name, reworded in KINDS.items():
            chance = random.Random(f"{self.seed}:{name}")  # noqa: S311  no secret
            many = [[each.model_copy(update={"prompt": reworded(each.prompt, chance)}) for _ in range(self.variants)]
                    for each in rows]  # fmt: skip
            changed = [(row, some) for row, some in zip(rows, many, strict=True)
                       if any(each.prompt != row.prompt for each in some)]  # fmt: skip
            if changed:
                held = ([all(_held(speaker, some)) for _, some in changed] for speaker in (base, edited))
                yield Figure.share(f"{name}: all variants", held, "more")
        if altered := data["altered"]:
            held = (_held(speaker, altered) for speaker in (base, edited))
            yield Figure.share("altered meaning: the new answer all the same", held, "less")


def _held(speaker: Speaker, rows: Sequence[Held]) -> list[bool]:
    """True where the new answer is likelier per token than the old one."""
    prompts = [row.prompt for row in rows]
    new, old = (speaker.likelihoods(prompts, [getattr(row, column) for row in rows]) for column in ("answer", "was"))
    return [a > b for a, b in zip(new, old, strict=True)]


MEASURES.add(Rewording.called(), Rewording)
