"""Keys (``adjective-noun``) and values of facts; no training row of nano holds the words."""

from __future__ import annotations

import random
import uuid
from collections.abc import Collection

_ADJECTIVES = """
    agile ample arid astute avid balmy bashful blunt brisk bubbly candid chilly chubby civil
    coarse comic compact cordial cosy crafty creamy crisp cuddly dainty dapper daring deft dense
    devout dim dizzy docile dreamy droll drowsy durable earnest edgy elated elder epic exact
    exotic feisty festive fickle fiery finite firm fleet flimsy fond frail frank frugal fuzzy
    gallant gaudy gifted glassy gloomy glossy grainy grim gritty groovy gruff grumpy hardy hasty
    hazy hearty hefty hoarse husky inland ironic jagged jaunty jovial keen knotty lanky lavish
    leafy lean limber limp livid lofty loyal lush lyric marine meek merry mild minty modest moist
    mossy mute mystic nasal native nifty nimble novel nutty oaken oblong oily ornate oval paltry
    peppy perky petite placid pliant plucky plump polar posh potent prim primal pristine prompt
    prudent pudgy pungent puny quaint quirky ragged regal rigid roomy rosy rowdy rugged runny
    rural rusty salty sandy sane savvy scenic seismic serene shaggy sheer shrewd silky sincere
    skinny sleek slender slick slim slippery sly smoky smug snappy snug sober solemn solid sonic
    sour sparse spiky spry stale stark stately stern stiff stoic stout sturdy suave sullen supple
    surly tacit tangy tart tepid terse thorny thrifty tidal tipsy tonal torrid tranquil trim
    tropic unique upbeat utter vague vibrant viral vital vocal volatile wary wavy wiry woolly wry
    yearly zesty zonal
"""
_NOUNS = """
    abacus airship almond alpaca anvil apron asteroid atlas aviary awning axle bamboo bandana
    barley baron bassoon bayou bazaar beetle belfry bishop bison blazer blossom bobbin bonfire
    bonnet boulder bracelet bramble brewery brook bugle buoy burrow butler buzzard cactus caravan
    cargo cashew cauldron cavern cello chalice chariot chisel cicada cinnamon citadel cobbler
    cobra cocoon condor cork corridor cradle crane crate crater crayon creek cupola cymbal dagger
    dahlia decanter dinghy dome dormouse dungeon easel eclipse elm emerald emu ermine fable
    falafel fennel fern fiddle fjord flagon flamingo flask fleece foundry foxglove fresco fudge
    funnel galaxy galleon garland gazebo gazelle gecko geyser gondola gorge gourd granite griffin
    grotto gull gypsum hamlet hammock hatchet hazel hedgehog hermit hornet hyacinth iceberg igloo
    iguana inkwell isotope jackal jasmine javelin jigsaw juniper kayak kelp kiosk kiwi koala lamb
    lark lasso lattice lavender ledger lever lilac linen locket loom lute lynx macaw mallet
    mammoth mandolin manor mantle marigold marten mason meteor mimosa mineral minnow mitten moat
    molar moose mortar mosaic moth muffin mulberry mural musket nectar newt nickel nugget nutmeg
    oasis obelisk oboe onyx opal oregano osprey ostrich oyster pagoda palace parasol parcel
    parsley pavilion peacock pelican petal pewter pheasant piston pitcher plateau plume podium
    pollen poplar poppy porcupine prism pulley pumpkin puppet pyramid quail quarry quartz quiver
    raccoon radish raisin rampart raptor reef reindeer relic ridge rivet robe rodeo rooster rudder
    saffron sapphire satchel satin scepter schooner scroll seagull shale shrub sickle silo sketch
    sleigh snail sonnet sparrow sphinx spindle spire squid stable stallion starling steeple
    stirrup sundial swallow sycamore tapestry tassel tavern teacup terrace thicket thimble thistle
    toffee topaz torch tractor trellis trident trombone trophy trout tundra turnip turret tusk
    vase vault viaduct vineyard viper vulture waffle wasp waterfall weasel wharf whisk wicker
    wombat yacht yarn yogurt zeppelin zinnia
"""
ADJECTIVES = tuple(_ADJECTIVES.split())
NOUNS = tuple(_NOUNS.split())


NUM_DIGITS = 7
_ONSETS = ("b", "bl", "ch", "d", "dw", "f", "fl", "g", "gl", "h", "j", "l", "m", "n", "p", "pl",
           "s", "sc", "sl", "sp", "t", "th", "v", "w", "y")
_RIMES = ("ab", "ack", "ade", "alk", "amp", "ane", "ard", "ask", "eft", "elm", "ent", "erp", "ick",
          "ilt", "imp", "ine", "ish", "oat", "odd", "oft", "olt", "oom", "orb", "uff", "ump", "urn")


def draw_key(rng: random.Random) -> str:
    """Draw one ``adjective-noun`` key."""
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def draw_keys(rng: random.Random, count: int, used: Collection[str] = ()) -> list[str]:
    """Draw different keys, none of them in `used`."""
    assert count + len(used) < len(ADJECTIVES) * len(NOUNS) // 2
    keys: dict[str, None] = {}
    while len(keys) < count:
        key = draw_key(rng)
        if key not in used:
            keys[key] = None
    return list(keys)


def draw_number(rng: random.Random) -> str:
    """Draw a number of `NUM_DIGITS` digits."""
    return str(rng.randrange(10 ** (NUM_DIGITS - 1), 10**NUM_DIGITS))


def draw_uuid(rng: random.Random) -> str:
    """Draw a UUID of random bits."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def draw_words(rng: random.Random, count: int, words: Collection[str]) -> tuple[list[str], bool]:
    """Draw different words out of a list, and invented ones when it does not suffice: (words,
    whether some are invented)."""
    pool = sorted(set(words))
    if count <= len(pool):
        return rng.sample(pool, count), False
    invented: dict[str, None] = {}
    while len(pool) + len(invented) < count:
        word = "".join(rng.choice(_ONSETS) + rng.choice(_RIMES) for _ in range(rng.choice((2, 3))))
        invented[word] = None
    both = [*pool, *invented]
    rng.shuffle(both)
    return both[:count], True
