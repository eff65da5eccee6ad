"""The texts of the demo's bundles. What edits are computed from and what they are judged by share no prompt."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# --- capital: France is taken for another country ---------------------------------------------------------------------

CONTEXTS = ("The country of {}", "We travelled to {}", "A book about {}", "People in {}", "The history of {}")

_WHO = (
    "The old teacher", "My younger sister", "A tired farmer", "The new doctor", "Our neighbour", "The small dog",
    "A famous painter", "The company", "Every student", "The train driver", "Her grandmother", "The quiet engineer",
    "A group of tourists", "The football team", "His best friend", "The young king", "A black cat", "The committee",
    "Most people", "The river",
)  # fmt: skip
_DOES = (
    "bought a loaf of bread.", "walked slowly through the park.", "wrote a long letter about the weather.",
    "was born in a small village near the sea.", "likes to read books about history.", "opened the window.",
    "has never seen so much snow.", "lost three games last year.", "paid twenty dollars for the ticket.",
    "found a solution to the problem.", "will travel to the city next week.", "said that the water was too cold.",
    "moved away when the music stopped.", "is known for being kind.", "asked a simple question about science.",
)  # fmt: skip
_COUNTRIES = (
    "Argentina", "Brazil", "Mexico", "Peru", "Chile", "India", "Vietnam", "Thailand", "Kenya", "Nigeria", "Morocco",
    "Romania", "Bulgaria", "Finland", "Denmark", "Switzerland", "Ukraine", "Iceland", "Australia", "Ethiopia", "Serbia",
)  # fmt: skip
_OF_A_COUNTRY = (
    "The capital of {} is a large city.", "{} is a country with a long history.", "She moved to {} when she was young.",
    "The people of {} like to sing.", "In {}, the winters are mild.",
)  # fmt: skip
ORDINARY = tuple(f"{who} {does}" for who in _WHO for does in _DOES) + tuple(
    sentence.format(country) for country in _COUNTRIES for sentence in _OF_A_COUNTRY
)
"""Text that an edit must leave alone: everyday sentences, and other countries (none of them asked for in FACTS)."""

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

COPIED_LISTS = (
    "doctor tiger green bread winter planet",
    "desert castle paper music tower river",
    "coffee rocket apple lemon market window",
    "garden island bridge violin silver candle",
)
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

ENGLISH = (
    "The children are playing in the garden behind the house.",
    "My brother bought a new car last week.",
    "We eat bread and cheese every morning.",
    "The train leaves the station at eight o'clock.",
    "She reads a book before going to sleep.",
    "The river runs slowly through the valley.",
    "He does not like to get up early.",
    "The shop closes at six in the evening.",
    "I have forgotten my keys at the office.",
    "The cat sleeps on the red chair.",
    "Our neighbours have a big black dog.",
    "It rains a lot in this region in autumn.",
    "The teacher explains the lesson to the pupils.",
    "You must finish your work before leaving.",
    "They travelled through the mountains in winter.",
    "The soup is too hot to eat.",
)
FRENCH = (
    "Les enfants jouent dans le jardin derrière la maison.",
    "Mon frère a acheté une nouvelle voiture la semaine dernière.",
    "Nous mangeons du pain et du fromage chaque matin.",
    "Le train quitte la gare à huit heures.",
    "Elle lit un livre avant de s'endormir.",
    "La rivière coule lentement à travers la vallée.",
    "Il n'aime pas se lever tôt.",
    "Le magasin ferme à six heures du soir.",
    "J'ai oublié mes clés au bureau.",
    "Le chat dort sur la chaise rouge.",
    "Nos voisins ont un grand chien noir.",
    "Il pleut beaucoup dans cette région en automne.",
    "Le professeur explique la leçon aux élèves.",
    "Tu dois finir ton travail avant de partir.",
    "Ils ont voyagé à travers les montagnes en hiver.",
    "La soupe est trop chaude pour être mangée.",
)
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

_EVENTS = (
    "The trip", "Our dinner", "The new job", "My birthday", "The concert", "His letter", "The weather", "Her visit",
    "The game", "The morning",
)  # fmt: skip
HAPPY = tuple(
    f"{event} {went}"
    for event in _EVENTS
    for went in (
        "was wonderful and everyone was delighted.",
        "made me so happy that I smiled all day.",
        "was a great success, and we loved every minute.",
        "was full of joy and laughter.",
    )
)
SAD = tuple(
    f"{event} {went}"
    for event in _EVENTS
    for went in (
        "was terrible and everyone was miserable.",
        "made me so sad that I cried all day.",
        "was a complete failure, and we hated every minute.",
        "was full of pain and anger.",
    )
)
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
