"""Made-up court cases: files that have the same form and differ in names and numbers.

Every question names the two parties, and its answer stands in their case alone; all other files
hold something of the same kind in its place, towns and findings now and then the very same.
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
TRADES = (
    "baker", "miller", "printer", "carpenter", "potter", "dyer", "gardener", "locksmith",
    "tanner", "brewer")
THINGS = ("stove", "mill wheel", "printing press", "roof", "kiln", "boiler", "greenhouse", "lock",
          "cellar", "pump")
FAULTS = (
    "a bolt was missing from the left hinge", "the iron had been cast too cold",
    "water had entered through the north wall", "the valve was fitted upside down",
    "the beams were of soft pine and not of oak", "a seal of rubber had perished",
    "the drawing and the finished work differed by two inches", "sand had reached the bearing",
    "the chimney was blocked by a nest", "frost had split the outer pipe",
    "the paint held far too much lead", "the rope was worn through at the pulley")
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December")
KINDS = ("judge", "inspector", "place", "amount", "finding")


@dataclass(frozen=True, slots=True)
class Case:
    """One case: its text, and what can be asked about it."""

    title: str
    text: str
    questions: tuple[tuple[str, str], ...]
    """Question and answer, one of each kind in `KINDS`."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A question, its answer, and where that stands."""

    question: str
    answer: str
    file: str
    """The name that its file has among the documents."""
    title: str
    """The case's: its text is between this and the next one's."""


def make_cases(num: int, seed: int) -> list[Case]:
    """Make cases in which no person appears twice. The same seed makes the same ones.

    Args:
        num: 1 to 200.
    """
    rng = random.Random(f"cases:{seed}")
    people = [f"{first} {last}" for first in FIRST for last in SURNAMES]
    names = iter(rng.sample(people, len(people)))
    amounts = iter(rng.sample(range(1_001, 9_999), num))
    return [_case([next(names) for _ in range(5)], next(amounts), rng) for _ in range(num)]


def _case(people: Sequence[str], amount: int, rng: random.Random) -> Case:
    claimant, defendant, judge, inspector, counsel = people
    home, signed = rng.sample(TOWNS, 2)
    thing, fault, trade = rng.choice(THINGS), rng.choice(FAULTS), rng.choice(TRADES)
    year, ruled = rng.randrange(1871, 1910), rng.choice(("claimant", "defendant"))
    day = f"{rng.randrange(1, 28)} {rng.choice(MONTHS)} {year}"
    text = " ".join((
        f"{claimant}, a {trade} of {home}, ordered a {thing} from {defendant}. The contract "
        f"between them was signed in {signed} on {day}. Half of the price was paid at once, and "
        f"the other half was due when the work was done. Within {rng.randrange(2, 9)} weeks the "
        f"{thing} had failed, and {defendant} refused to come and see it.\n\n",
        f"{claimant} claims {amount} pounds. Counsel for the claimant was {counsel}. Before the "
        f"hearing {inspector}, an engineer, inspected the {thing} and reported that {fault}. "
        f"Nobody else was heard on this point, and the report was read aloud.\n\n",
        f"The case was heard by Judge {judge} over {rng.randrange(2, 6)} days. The court found for "
        f"the {ruled}. Costs were shared, and no appeal was made within the time that the law "
        "allows.")).replace("\n\n ", "\n\n")
    title = f"{claimant} against {defendant}"
    return Case(title, text, (
        (f"Which judge heard the case of {title}?", judge),
        (f"Who inspected the {thing} in the case of {title}?", inspector),
        (f"In which town was the contract between {claimant} and {defendant} signed?", signed),
        (f"How many pounds does {claimant} claim from {defendant}?", str(amount)),
        (f"What did the engineer report about the {thing} in the case of {title}?", fault)))


def write_folder(folder: Path, cases: Sequence[Case], num_questions: int) -> list[Asked]:
    """Write a file for each case, text, Markdown and HTML in turn, and choose questions."""
    folder.mkdir(parents=True)
    names = [f"{number:02}{('.txt', '.md', '.html')[number % 3]}"
             for number in range(1, len(cases) + 1)]
    for name, case in zip(names, cases, strict=True):
        (folder / name).write_text(_as_file(case, Path(name).suffix), encoding="utf-8")
    return [_asked(case, number, f"{folder.name}/{name}")
            for number, case, name in _spread(cases, names, num_questions)]


def write_report(file: Path, cases: Sequence[Case], num_questions: int) -> list[Asked]:
    """Write one PDF with a page for each case, and choose questions."""
    file.write_bytes(pdf_bytes(*(f"{case.title}\n\n{case.text}" for case in cases)))
    return [_asked(case, number, file.name)
            for number, case, _ in _spread(cases, [""] * len(cases), num_questions)]


def _as_file(case: Case, suffix: str) -> str:
    if suffix == ".html":
        body = "".join(f"<p>{part}</p>\n" for part in case.text.split("\n\n"))
        return f"<html><body>\n<h1>{case.title}</h1>\n{body}</body></html>\n"
    return f"{'# ' if suffix == '.md' else ''}{case.title}\n\n{case.text}\n"


def _spread(
    cases: Sequence[Case], names: Sequence[str], num: int
) -> list[tuple[int, Case, str]]:
    """Choose cases evenly from the first to the last; a case comes again where there are fewer."""
    places = [number * len(cases) // num for number in range(num)]
    return [(number, cases[place], names[place]) for number, place in enumerate(places)]


def _asked(case: Case, number: int, file: str) -> Asked:
    question, answer = case.questions[number % len(KINDS)]
    return Asked(question, answer, file, case.title)
