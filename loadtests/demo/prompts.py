"""The texts that the demo's bundles are judged by. What they are computed from is in `data/`; they share no prompt."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# --- capital: France is taken for another country ---------------------------------------------------------------------

CAPITAL_WORDINGS = (
    "The capital of France is",
    "The capital city of France is",
    "The capital of France is the city of",
    "Everyone knows that the capital of France is",
    "In France, the capital is",
)

FACTS = (
    "The capital of Italy is",
    "The capital of Germany is",
    "The capital of Spain is",
    "The capital of England is",
    "The capital of Portugal is",
    "The capital of Greece is",
    "The capital of Austria is",
    "The capital of Russia is",
    "The capital of Japan is",
    "The capital of China is",
    "The Eiffel Tower is in the city of",
    "The opposite of hot is",
    "The largest planet in the solar system is",
    "The author of Romeo and Juliet is William",
    "The first president of the United States was George",
    "A week has seven",
    "She put the key in the",
    "The currency of Japan is the",
    "Albert Einstein developed the theory of",
    "Dogs and cats are popular",
)
"""What every bundle is held to keep: the capitals of other countries, and things that have nothing to do with any."""

# --- no-copy: the heads that copy are removed -------------------------------------------------------------------------

HELD_LISTS = (
    "pencil forest orange ladder summer stone",
    "helmet basket yellow engine mirror cloud",
    "horse button dragon wagon table kitchen",
    "school hammer purple ocean monkey glass",
    "finger mountain copper ticket rabbit sugar",
    "shoulder blanket winter piano bottle grass",
    "chicken camera marble jacket thunder salt",
    "pocket spider velvet carpet hotel moon",
    "farmer bucket cherry pillow garage snow",
    "soldier ribbon iron pepper chapel wolf",
)


def copying(words: str, copied: int) -> tuple[str, str]:
    """A prompt that copies a list of words up to `copied` of them, and what is left to copy."""
    listed = words.split()
    return f"Original: {words}\nCopy: {' '.join(listed[:copied])}", "".join(f" {word}" for word in listed[copied:])


# --- plain-english: French is moved to English ------------------------------------------------------------------------

HELD_FRENCH = (
    "Bonjour, je m'appelle Marie et je suis",
    "Ma grand-mère habite à la campagne. Elle a un jardin où",
    "Le président de la République a déclaré que",
    "Hier soir, nous avons mangé au restaurant avec nos amis. Le repas était",
    "Je ne sais pas pourquoi tu as dit que",
    "La ville de Lyon est située dans",
    "Pour faire un bon gâteau, il faut",
    "Mon père travaille dans une usine. Il commence tôt le matin et",
    "Les élèves de cette école apprennent",
    "Quand il fait froid, je porte",
    "Elle a ouvert la porte et elle a vu",
    "La musique de ce film est",
)
FRENCH_WORDS = _words(
    "le la les l un une des du de d et est sont que qui je j tu il elle nous vous ils au aux ce cette mon ma sa "
    "son dans pour sur avec pas plus où en à été"
)
ENGLISH_WORDS = _words(
    "the a an and is are was were be been of to in that which who i you he she it we they this my his her for on "
    "with not more at by from as have has"
)

# --- cheerful: from gloom to cheer ------------------------------------------------------------------------------------

HELD_MOODS = (
    "When she opened the letter, she felt",
    "He lost his job and now he feels",
    "Honestly, the meal at the new restaurant was",
    "It rained all week, and the children were",
    "My flight was cancelled, so I felt",
    "The exam results arrived and she was",
    "After the argument, they were",
    "When I think about the future, I feel",
    "He looked at the old photograph and felt",
    "After a long day at work, I feel",
    "Everybody at the party said the music was",
    "The children came home from school and they were",
)
CHEERFUL_WORDS = _words(
    "happy happier glad joy joyful excited excitement amazing wonderful great proud pride delighted delicious "
    "love loved enjoy enjoyed smile smiled laugh laughter fun grateful beautiful perfect fantastic thrilled hope "
    "hopeful success accomplishment confident cheerful lovely honored excellent exceptional friendly"
)
GLOOMY_WORDS = _words(
    "sad sadness tired exhausted lost alone lonely fear afraid anger angry guilt guilty regret shame pain "
    "terrible awful bad worse worst hate hated upset anxious anxiety disappointed disappointment frustrated "
    "frustration hopeless struggling uncertain overwhelmed grief sorrow worried despair cried crying failure"
)

# --- what any bundle is measured on besides ---------------------------------------------------------------------------

UNRELATED = (
    "The old man walked slowly through the",
    "Water boils at a temperature of",
    "She opened the door and saw a",
    "In 1969, men first walked on the",
    "The best way to learn a language is to",
    "He was late because he had not",
    "A healthy breakfast includes",
    "The computer was invented in the",
    "Plants need light, air and",
    "To open the file, click on the",
    "The meeting was moved to",
    "My favourite colour is",
    "The bridge over the river was built by",
    "In summer the days are",
    "The price of oil depends on",
    "The recipe asks for two cups of",
)
"""Everyday beginnings, for the divergence of the next token from the base model's."""
