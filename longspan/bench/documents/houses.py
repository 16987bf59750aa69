"""Made-up houses of made-up towns, one a file: library, lighthouse, bakery and so on.

All files have the same form, and no two are of one kind; persons and numbers are in one file alone.
Every question has one answer, and all other files hold something of the same kind in its place.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from longspan.bench.documents.pdf import pdf_bytes

FIRST = (
    "Ada", "Bram", "Clara", "Dora", "Edgar", "Freya", "Gregor", "Hilda", "Ivo", "Jonas",
    "Karin", "Ludo", "Mira", "Nils", "Orla", "Piet", "Runa", "Sven", "Tilda", "Ulf", "Vera",
    "Willem", "Ylva", "Zeno")
SURNAMES = (
    "Ashdown", "Belling", "Corrigan", "Draycott", "Elmsley", "Fenwick", "Garside", "Holloway",
    "Inskip", "Jessop", "Kestrel", "Lovatt", "Marsden", "Norbury", "Oakley", "Pemberton",
    "Quayle", "Rastrick", "Selwyn", "Thorley", "Underhill", "Varley", "Wexford", "Yardley",
    "Zeller", "Amberson", "Birkett", "Coverdale", "Dunmore", "Eastwick", "Farrow", "Gledhill",
    "Hartnell", "Ilford", "Jarrow", "Kirkby", "Lanyon", "Mowbray", "Nettleton", "Orford",
    "Plumtree", "Ridley", "Stainton", "Tolland", "Upton", "Vickers", "Wardle", "Yelland")
TOWNS = (
    "Varby", "Holmstead", "Lindow", "Karsted", "Brenholt", "Ostby", "Fallmere", "Grenby",
    "Torvik", "Wendle", "Sandrup", "Hallby", "Norvik", "Eldham", "Maddow", "Skelby",
    "Ravenholt", "Thurlby", "Ulmstead", "Quernby")
KINDS = (
    "archive", "bakery", "bathhouse", "boathouse", "brewery", "bridge", "butchery", "chapel",
    "cinema", "college", "dairy", "ferry", "foundry", "gallery", "glassworks", "harbour",
    "hospital", "hotel", "laundry", "library", "lighthouse", "market", "mill", "mint", "museum",
    "observatory", "opera", "orchard", "pharmacy", "pottery", "prison", "quarry", "railway",
    "sawmill", "school", "shipyard", "stable", "tannery", "theatre", "windmill")
FINDS = (
    "a box of silver spoons", "the bones of a bear", "a map of the coast", "two iron anchors",
    "a Roman mosaic", "forty letters", "a bell without a clapper", "a jar of amber", "an oak canoe",
    "a set of chessmen", "a locked safe", "three brass telescopes", "a crate of port wine",
    "a painted ceiling", "a stone with runes", "a sealed well", "a child's sledge",
    "a bag of pepper",
    "a printing press", "a pair of skates", "the keel of a ship", "a tin of buttons",
    "a carved lion", "a sack of coins", "a glass eye", "a silk flag", "a row of beehives",
    "an old cannon", "a clay whistle", "a golden ring", "a bundle of maps", "a broken harp",
    "a marble hand", "a copper still", "a leather saddle", "a wax seal", "a stuffed owl",
    "a barrel of tar", "a wooden leg", "a lead coffin")
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December")
MATERIALS = ("red brick", "grey granite", "yellow sandstone", "oak and clay", "white marble")
WORKS = ("a new roof", "a second floor", "a garden wall", "larger windows", "a stove for each room")


@dataclass(frozen=True, slots=True)
class House:
    """One house: its text, and what can be asked about it."""

    title: str
    """Stands once in all files, above the text."""
    text: str
    questions: tuple[tuple[str, str], ...]
    """Question and answer, one of each sort."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A question, its answer, and where that stands."""

    question: str
    answer: str
    file: str
    """The name that its file has among the documents."""
    title: str
    """The house's: its text is between this and the next one's."""


def make_houses(num: int, seed: int) -> list[House]:
    """Make some houses, 1 to 40. The same seed makes the same ones."""
    rng = random.Random(f"houses:{seed}")
    people = iter(rng.sample([f"{first} {last}" for first in FIRST for last in SURNAMES], 3 * num))
    years = iter(rng.sample(range(1701, 1900), num))
    costs = iter(rng.sample(range(103, 999), num))
    return [_house(kind, [next(people) for _ in range(3)], next(years), next(costs), found, rng)
            for kind, found in zip(rng.sample(KINDS, num), rng.sample(FINDS, num), strict=True)]


def _house(
    kind: str, people: Sequence[str], year: int, cost: int, found: str, rng: random.Random
) -> House:
    director, architect, guest = people
    name = f"the {kind} of {rng.choice(TOWNS)}"
    other, month = rng.choice(TOWNS), rng.choice(MONTHS)
    text = (
        f"T{name[1:]} was founded in {year}, after a long dispute about the site. Its "
        f"first director was {director}, who had come from {other} in the spring and stayed for "
        f"{rng.randrange(6, 30)} years. The plans were drawn by {architect}, and the walls are of "
        f"{rng.choice(MATERIALS)}. People of the town still speak of the opening, which took place "
        f"on {rng.randrange(1, 29)} {month} in heavy rain.\n\n"
        f"When the floor was taken up for repairs, the workers came upon {found}, and work stood "
        f"still for a week. The repairs cost {cost} crowns, more than the council had allowed, and "
        f"brought {rng.choice(WORKS)}. A visitor of those years, {guest}, left a short account of "
        f"the place, in which the cold is mentioned more often than anything else.\n\n"
        "Little has been changed since. The house is open on most days, and the key is kept next "
        "door.")
    return House(f"History of {name}", text, (
        (f"Who was the first director of {name}?", director),
        (f"In which year was {name} founded?", str(year)),
        (f"Who drew the plans of {name}?", architect),
        (f"How many crowns did the repairs of {name} cost?", str(cost)),
        (f"What did the workers find under the floor of {name}?", found.partition(" ")[2])))


def write_folder(folder: Path, houses: Sequence[House], num_questions: int) -> list[Asked]:
    """Write a file for each house, text, Markdown and HTML in turn, and choose questions."""
    folder.mkdir(parents=True)
    names = [f"{number:02}{('.txt', '.md', '.html')[number % 3]}"
             for number in range(1, len(houses) + 1)]
    for name, house in zip(names, houses, strict=True):
        (folder / name).write_text(_as_file(house, Path(name).suffix), encoding="utf-8")
    return _questions(houses, [f"{folder.name}/{name}" for name in names], num_questions)


def write_report(file: Path, houses: Sequence[House], num_questions: int) -> list[Asked]:
    """Write one PDF with a page for each house, and choose questions."""
    file.write_bytes(pdf_bytes(*(f"{house.title}\n\n{house.text}" for house in houses)))
    return _questions(houses, [file.name] * len(houses), num_questions)


def _as_file(house: House, suffix: str) -> str:
    if suffix == ".html":
        body = "".join(f"<p>{part}</p>\n" for part in house.text.split("\n\n"))
        return f"<html><body>\n<h1>{house.title}</h1>\n{body}</body></html>\n"
    return f"{'# ' if suffix == '.md' else ''}{house.title}\n\n{house.text}\n"


def _questions(houses: Sequence[House], files: Sequence[str], num: int) -> list[Asked]:
    """Choose houses evenly from the first to the last, and questions in turn; a house comes again
    where there are fewer, with another question."""
    asked = []
    for number in range(num):
        place = number * len(houses) // num
        sorts = houses[place].questions
        question, answer = sorts[(number + number // len(sorts)) % len(sorts)]
        asked.append(Asked(question, answer, files[place], houses[place].title))
    return asked
