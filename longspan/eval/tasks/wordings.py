"""Facts and questions in other words than those of the needle sentence."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from longspan.eval.prompt import Materials
from longspan.eval.task import Example
from longspan.eval.tasks.needles import Fact, NumberTask, Quiz, ask_one
from longspan.eval.tasks.passkey import MAX_ANSWER_TOKENS
from longspan.eval.words import draw_keys, draw_number

Wording = tuple[str, str]
"""A sentence and its question."""
NUM_HIDDEN = 5
UNSEEN: Sequence[Wording] = (
    ("For the record, parcel {key} was weighed in at {value} milligrams.",
     "How many milligrams did parcel {key} weigh?"),
    ("Visitors who ask after the {key} are told to dial {value}.",
     "Which digits does one dial to hear about the {key}?"),
    ("Seat {value} in the stadium stays reserved for the {key}.",
     "Which seat is kept for the {key}?"),
    ("The lighthouse keeper counted {value} flashes before the {key} came into view.",
     "After how many flashes did the {key} appear?"),
    ("In the auction, bidder {value} went home with the {key}.",
     "Who bought the {key}? Give the bidder's number."))
"""No training row of nano has these. Some share a verb with one, and the recipe was changed after
it had failed in them, so they tell what was learned and not how far it carries."""
FRESH: Sequence[Wording] = (
    ("Restoring the {key} swallowed {value} guilders of the parish's savings.",
     "What did the repair of the {key} cost the parish?"),
    ("Nobody has touched the {key} since catalogue entry {value} was written about it.",
     "Under which catalogue entry does one find the {key}?"),
    ("It took the {key} {value} seconds to sink to the bottom of the lake.",
     "How long, in seconds, did the {key} need to go down?"),
    ("Her grandmother's {key} was insured under policy {value} until the fire.",
     "Give the policy that covered the {key}."),
    ("When the {key} finally arrived, its odometer showed {value}.",
     "What mileage did the {key} have?"),
    ("On the chart, the {key} is drawn at a depth of {value} fathoms.",
     "How deep down does the chart put the {key}?"),
    ("The tribunal filed everything about the {key} as case {value}.",
     "Under what docket did judges hear about the {key}?"),
    ("Whoever wants the {key} back must quote ticket {value} at the counter.",
     "What ticket releases the {key}?"),
    ("As for the {key}, the beekeeper swears that it drew {value} stings.",
     "How many times did bees attack the {key}?"),
    ("The choir rehearsed below the {key}, some {value} paces from the gate.",
     "How many paces separate the gate from the {key}?"),
    ("Treasure hunters found the {key} again after {value} hours of digging.",
     "How many hours of work did it take to dig up the {key}?"),
    ("The {key} outlived {value} owners, or so the plaque claims.",
     "How many people owned the {key}, by the plaque?"),
    ("Locker {value} at the swimming pool still smells of the {key}.",
     "Which locker once held the {key}?"),
    ("After {value} votes were tallied, the {key} became the town's emblem.",
     "By how many votes was the {key} elected?"),
    ("Train {value} was delayed because the {key} lay across the rails.",
     "Which train did the {key} hold up?"),
    ("The orchard yielded {value} pears in the year of the {key}.",
     "How large was the pear harvest when the {key} was celebrated?"),
    ("He hummed hymn {value} until the {key} began to shine.",
     "Which hymn made the {key} glow?"),
    ("Recipe {value} in her notebook calls for a spoonful of the {key}.",
     "In which recipe does the {key} go?"),
    ("With a ransom of {value} florins the duke freed the {key}.",
     "How many florins bought the freedom of the {key}?"),
    ("Some {value} moths circled the lamp beside the {key} that evening.",
     "How many insects were near the {key}?"),
    ("Runner {value} tripped over the {key} before the finish line.",
     "Whom did the {key} bring down? Answer with the number on the shirt."),
    ("Shelf mark {value} is where the archive keeps letters about the {key}.",
     "Where in the archive are letters on the {key}?"),
    ("They drained {value} barrels of water before the {key} could be reached.",
     "How many barrels had to go before anybody got to the {key}?"),
    ("Channel {value} broadcast nothing but the {key} all winter.",
     "On which channel could one watch the {key}?"))
"""Written when nano's recipe stood, and not to be looked at when it is changed: half of them name
the key first, half the number."""


@dataclass(frozen=True, kw_only=True)
class WordingsTask(NumberTask):
    """One fact in a wording of a list among others in other ones of it."""

    name: str = "unseen_wordings"
    wordings: Sequence[Wording] = UNSEEN
    max_tokens: int = MAX_ANSWER_TOKENS

    def build(
        self, materials: Materials, num_tokens: int, index: int, rng: random.Random
    ) -> list[Example]:
        """Build one prompt; the wordings take turns, others hide facts of their own."""
        asked = index % len(self.wordings)
        others = [other for other in range(len(self.wordings)) if other != asked]
        if len(others) >= NUM_HIDDEN:
            others = rng.sample(others, NUM_HIDDEN - 1)
        chosen = sorted((asked, *others))
        keys, place = draw_keys(rng, len(chosen)), chosen.index(asked)
        facts = [Fact(rng.random(), key, draw_number(rng), f"{self.wordings[each][0]}\n")
                 for key, each in zip(keys, chosen, strict=True)]
        quiz = Quiz(facts, self.wordings[asked][1].format(key=keys[place]), place)
        return [ask_one(quiz, self, materials, num_tokens, rng)]
