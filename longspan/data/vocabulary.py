"""Random keys and values for planted facts. Everything is drawn from the ``rng`` passed in."""

from __future__ import annotations

import random
from dataclasses import dataclass


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _split(
    """able amber ancient angry arctic azure bitter black blue bold brave brief bright broken
    calm careful cheap clean clever cloudy cold common cosmic crimson curious damp dark deep
    distant double dry dusty eager early eastern elegant empty fair famous fancy fast fierce
    flat fluffy foggy formal fragile free fresh frosty gentle giant glad golden grand grateful
    gray green happy harsh heavy hidden hollow honest humble hungry icy idle jolly kind large
    late lazy light little lonely loud lucky lunar mellow mighty misty modern muddy narrow neat
    noble noisy northern odd old open orange pale patient plain polite proud purple quick quiet
    rapid rare red remote rich rough round royal rustic sad scarlet secret shallow sharp shiny
    short shy silent silver simple sleepy slow small smooth soft solar southern spare square
    steady steep still strange strong subtle sunny sweet swift tall tame tender thick thin tidy
    tiny tired tough urban vast violet vivid warm weary western wet white wide wild wise witty
    wooden yellow young zealous"""
)
NOUNS = _split(
    """acorn anchor apple arrow badger balloon banjo barrel basket beacon beaver bell bench
    bicycle blanket boat bottle bridge broom bucket butter button cabin camel candle canoe canyon
    captain carpet castle cedar chapel cherry cloud clover coast comet compass copper coral corner
    cottage cricket crown crystal curtain daisy desert diamond dolphin donkey door dragon drum
    eagle ember engine falcon farmer feather fence ferry field finch flame flute forest fountain
    fox garden gate ginger glacier goose grape guitar hammer harbor harvest hawk helmet heron
    hill honey horse island ivory jacket jaguar jungle kettle kitten ladder lagoon lake lantern
    lemon library lion lizard lobster lotus magnet mango maple marble market meadow melon mirror
    monkey moon mountain mouse needle nest notebook oak ocean olive orchid otter owl paddle panda
    parrot peach pebble pencil penguin pepper piano pigeon pillow pine planet plum pocket pony
    prairie puzzle quilt rabbit raven ribbon river robin rocket rose saddle sailor salmon sandal
    scarf shadow shell shepherd shovel signal spider spoon spruce squirrel statue stone storm
    sunset swan table teapot temple thunder tiger timber tower trumpet tulip tunnel turtle valley
    velvet village violin wagon walnut walrus whale willow window winter wolf zebra"""
)
CITIES = _split(
    """Accra Adelaide Algiers Amsterdam Ankara Athens Auckland Baghdad Baku Bangkok Barcelona
    Beijing Belgrade Bergen Berlin Bogota Boston Bremen Brussels Bucharest Budapest Cairo Calgary
    Caracas Chicago Copenhagen Dakar Dallas Delhi Denver Dhaka Doha Dresden Dublin Durban
    Edinburgh Geneva Genoa Glasgow Granada Hamburg Hanoi Harare Havana Helsinki Houston Istanbul
    Jakarta Kabul Kampala Karachi Kigali Kingston Kyoto Lagos Leipzig Lima Lisbon Liverpool London
    Luanda Lusaka Lyon Madrid Malaga Manila Marseille Melbourne Miami Milan Minsk Montreal Moscow
    Mumbai Munich Nairobi Naples Nassau Odessa Osaka Oslo Ottawa Oxford Palermo Paris Perth
    Phoenix Porto Prague Quebec Quito Rabat Reykjavik Riga Rome Rotterdam Santiago Seattle Seoul
    Seville Shanghai Singapore Sofia Stockholm Sydney Taipei Tallinn Tampa Tehran Tirana Tokyo
    Toronto Tripoli Tunis Turin Valencia Vancouver Venice Vienna Vilnius Warsaw Yerevan
    Zagreb Zurich"""
)
FIRST_NAMES = _split(
    """Ada Alan Alice Amir Anna Arthur Ben Boris Carla Chen Clara Daniel David Diego Elena Emil
    Emma Erik Eva Fatima Felix Fiona Frank Grace Hana Hugo Ibrahim Ingrid Iris Ivan Jack James
    Jane Jonas Julia Karim Kate Kenji Laura Leo Lena Liam Lucy Maria Mark Marta Max Mei Mina
    Nadia Nina Noah Nora Olga Oliver Omar Oscar Paul Petra Priya Quinn Rachel Ravi Rosa Ruth Sam
    Sara Simon Sofia Stefan Sven Tara Theo Thomas Tina Uma Vera Victor Wei Yara Yusuf Zoe"""
)
LAST_NAMES = _split(
    """Adams Ahmed Baker Bauer Becker Brown Carter Castro Chang Clark Cohen Costa Cruz Davis Diaz
    Eriksen Evans Fischer Foster Garcia Gomez Green Gupta Hall Hansen Harris Hill Ito Ivanov
    Jackson Jensen Johnson Jones Kaya Keller Khan Kim King Klein Kumar Larsen Lee Lopez Martin
    Meyer Miller Moore Mori Nelson Nguyen Novak Okafor Olsen Park Patel Perez Peters Popov Reed
    Reyes Rossi Sato Schmidt Scott Silva Singh Smith Stone Suzuki Tanaka Taylor Torres Turner
    Vargas Wagner Walker Wang Weber White Wilson Wong Wright Yilmaz Young Zhang"""
)
_ONSETS = _split("b br c cl d dr f fl g gr h j k kr l m n p pr qu r s sh sk st t tr v w z")
_VOWELS = _split("a e i o u ai ea ou")
_CODAS = ["", "", "", "n", "r", "s", "l", "x", "m", "th"]


def pseudo_word(rng: random.Random, syllables: int = 3) -> str:
    """Make a pronounceable word that no corpus holds."""
    return "".join(
        rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(syllables))


def digits(rng: random.Random, count: int) -> str:
    """``count`` decimal digits, the first not 0."""
    return str(rng.randrange(10 ** (count - 1), 10**count))


def uuid4(rng: random.Random) -> str:
    """Draw a version-4 UUID in its 36-character form."""
    h = f"{rng.getrandbits(128):032x}"
    return f"{h[:8]}-{h[8:12]}-4{h[13:16]}-{rng.choice('89ab')}{h[17:20]}-{h[20:]}"


@dataclass(frozen=True, slots=True)
class Words:
    """Word pools of one row; a small pool makes keys share their parts (hard distractors)."""

    adjectives: tuple[str, ...]
    nouns: tuple[str, ...]
    corpus: tuple[str, ...]

    @classmethod
    def draw(cls, rng: random.Random, corpus: list[str], num_keys: int, hard: bool) -> Words:
        """All words, or just enough of them for ``num_keys`` two-part keys when ``hard``."""
        if not hard:
            return cls(ADJECTIVES, NOUNS, tuple(corpus))
        side = max(4, int((3 * num_keys) ** 0.5) + 2)
        take = min(side, len(corpus))
        return cls(
            tuple(rng.sample(ADJECTIVES, min(side, len(ADJECTIVES)))),
            tuple(rng.sample(NOUNS, min(side, len(NOUNS)))), tuple(rng.sample(corpus, take)))


KEY_KINDS = ("adj-noun", "adj noun", "word", "words", "mixed", "pseudo", "uuid", "hex", "id")
KEY_WEIGHTS = (30, 6, 14, 12, 12, 10, 6, 4, 6)


def make_key(rng: random.Random, kind: str, words: Words) -> str:
    """One key of a kind in KEY_KINDS."""
    if kind in ("adj-noun", "adj noun"):
        return f"{rng.choice(words.adjectives)}{kind[3]}{rng.choice(words.nouns)}"
    if kind == "word":
        return rng.choice(words.corpus) if len(words.corpus) > 500 else pseudo_word(rng, 2)
    if kind == "words":
        return " ".join(rng.choice(words.corpus) for _ in range(rng.choice((2, 2, 3))))
    if kind == "mixed":
        return f"{rng.choice(words.corpus)}-{rng.choice(words.nouns)}"
    if kind == "pseudo":
        return pseudo_word(rng, rng.choice((2, 3)))
    if kind == "uuid":
        return uuid4(rng)
    if kind == "hex":
        return f"{rng.getrandbits(32):08x}"
    return f"{rng.choice(words.nouns)}_{rng.choice(words.corpus)}_{rng.randrange(100)}"


VALUE_KINDS = ("7", "5", "10", "digits", "uuid", "words")
VALUE_WEIGHTS = (70, 7, 5, 8, 4, 6)


def make_value(rng: random.Random, kind: str, words: Words) -> str:
    """One value of a kind in VALUE_KINDS."""
    if kind == "uuid":
        return uuid4(rng)
    if kind == "words":
        return f"{rng.choice(words.adjectives)}-{rng.choice(words.nouns)}"
    return digits(rng, rng.randrange(4, 10) if kind == "digits" else int(kind))


def value_noun(kind: str) -> str:
    """Return RULER's name of a kind of value: number, uuid or word."""
    return {"uuid": "uuid", "words": "word"}.get(kind, "number")
