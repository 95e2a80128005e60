"""The miniature world of the demo: invented people, towns, firms, novels, and English that tells of them.

An *entity* has a name and a kind. Each kind has five attributes; an entity and an attribute make a *fact*,
whose answer comes from the attribute's pool. A document states one fact in one sentence and adds one or two
sentences of colour, which answer nothing. Questions avoid the documents' wording: the entity's name finds
the entity's documents, but not which of them answers. Names are made of few parts: a tiny network compares
what it can spell.

In the phrases, {n} is the entity's name and {a} the answer.
"""

from dataclasses import dataclass
from itertools import product
from random import Random


@dataclass(frozen=True)
class Attribute:
    """What can be said of one kind of entity, and asked in two sets of wordings."""

    answers: str | tuple[str, ...]  # a pool of answers, or the kind whose names are the answers
    statements: tuple[str, ...]
    questions: tuple[str, ...]  # used in the training and dev rows
    test_questions: tuple[str, ...]  # used in the test queries alone


@dataclass(frozen=True)
class Fact:
    kind: str
    name: str
    attribute: str
    answer: str


def words(text: str) -> tuple[str, ...]:
    """A comma-separated list as a tuple."""
    return tuple(word.strip() for word in text.split(","))


def pairs(first: str, second: str, joint: str = " ") -> tuple[str, ...]:
    """Every part of `first` with every part of `second`."""
    return tuple(a + joint + b for a, b in product(words(first), words(second)))


GIVEN = (
    "Mara, Tobin, Elsa, Corin, Ada, Felix, Nora, Hugo, Iris, Jonas, Vera, Oskar, Lena, Silas, Greta, Bruno, "
    "Ruth, Anton, Clara, Emil"
)
SURNAMES = (
    "Tollen, Harrow, Quill, Vane, Lindqvist, Marsh, Okafor, Pell, Brandt, Sorrel, Kettle, Drummond, Falk, "
    "Whitlow, Ferris, Garrick, Holm, Jarvis, Keane, Larkin, Mott, Novak, Orrin, Penrose, Rask, Stroud"
)
PLACES = (
    "Calder, Aster, Marlow, Hollin, Bracken, Thorn, Winter, Sable, Linden, Raven, Copper, Otter, Salt, "
    "Hazel, Amber, Stone, Heron, Maple, Fallow, Gull, Ember, Wren, Pike, Juniper"
)
PLACE_ENDS = "Bridge, Bay, Cross, Ferry, Heath, Point, Vale, Wells, Moor, Gate, Haven, Ridge"
TITLE_FIRST = (
    "Glass, Silent, Burning, Second, Hollow, Paper, Midnight, Patient, Broken, Distant, Velvet, Crooked, "
    "Last, Hidden, Wandering, Iron, Borrowed, Sleeping, Frozen, Painted, Narrow, Restless, Gentle, Bitter"
)
TITLE_SECOND = (
    "Orchard, Harbour, Staircase, Garden, Mirror, Island, Letter, Clock, Forest, Carnival, Window, Shore, "
    "Lantern, Sparrow, Kingdom, Attic, Voyage, Season, Tower, Winter"
)

TRADES = words(
    "glassblower, lighthouse keeper, beekeeper, clockmaker, ferryman, schoolteacher, baker, map maker, piano "
    "tuner, stonemason, midwife, judge, shepherd, tailor, postman, bookbinder, locksmith, gardener, surgeon, "
    "night watchman"
)
MONTHS = "January, February, March, April, May, June, July, August, September, October, November, December"
YEARS = tuple(str(year) for year in range(1610, 1990, 3))

NAMES = {
    "person": pairs(GIVEN, SURNAMES),
    "town": pairs(PLACES, PLACE_ENDS),
    "firm": tuple(
        name for name in pairs(SURNAMES, SURNAMES, " & ") if name.split(" & ")[0] != name.split(" & ")[1]
    ),
    "novel": tuple(f"The {title}" for title in pairs(TITLE_FIRST, TITLE_SECOND)),
}

ATTRIBUTES = {
    "person": {
        "birthplace": Attribute(
            "town",
            (
                "{n} was born in {a}, in a narrow house above a bakery.",
                "The parish register of {a} records the baptism of {n} on a cold Sunday.",
                "{n} spent sixteen years in {a} before taking the coach to the city.",
            ),
            (
                "Where did {n} grow up?",
                "What is the home town of {n}?",
                "From which place does {n} come?",
            ),
            ("Where are the roots of {n}?", "In which place did {n} grow up?"),
        ),
        "trade": Attribute(
            TRADES,
            (
                "{n} earned a living as a {a} for more than thirty years.",
                "The tax rolls list {n} as a {a} with two apprentices.",
                "Before the war {n} was the only {a} for miles around.",
            ),
            (
                "What did {n} do for work?",
                "What job did {n} have?",
                "What was the profession of {n}?",
            ),
            ("Which occupation did {n} follow?", "What profession did {n} have?"),
        ),
        "teacher": Attribute(
            "person",
            (
                "{n} learned everything from {a}, who was strict but kind.",
                "As a pupil of {a}, {n} practised every evening until dark.",
                "{n} had the first lessons from {a}, who never asked for payment.",
            ),
            ("Who taught {n}?", "Who was the teacher of {n}?", "Under whom did {n} study?"),
            ("Who instructed {n}?", "Who was it that taught {n}?"),
        ),
        "instrument": Attribute(
            words(
                "fiddle, viola, flute, bassoon, harp, trumpet, tuba, bagpipes, zither, cello, mandolin, "
                "clarinet, drums, lute, banjo, church organ"
            ),
            (
                "{n} played the {a} at every wedding in the valley.",
                "After supper {n} took up the {a} and performed for the neighbours.",
                "Friends remember {n} bent over the {a}, tuning it by ear.",
            ),
            (
                "What musical instrument did {n} know?",
                "On what did {n} make music?",
                "Which instrument belonged to {n}?",
            ),
            ("With what did {n} entertain an audience?", "With which instrument did {n} make music?"),
        ),
        "pet": Attribute(
            words(
                "grey parrot, tame fox, three-legged dog, white goat, tortoise, ginger cat, raven, hedgehog, "
                "blind pony, ferret, goose, barn owl, pet rat, lame donkey, spotted pig, green lizard"
            ),
            (
                "{n} kept a {a} that slept beside the stove.",
                "A {a} followed {n} everywhere, even to church.",
                "{n} shared the house with a {a} and spoke to it like a friend.",
            ),
            ("What animal did {n} own?", "What pet did {n} have?", "Which creature lived with {n}?"),
            ("What was the animal companion of {n}?", "Which pet lived with {n}?"),
        ),
    },
    "town": {
        "mayor": Attribute(
            "person",
            (
                "Since the last election {a} has led the council of {n}.",
                "The voters of {n} sent {a} to the town hall with a large majority.",
                "In {n} the chain of office is worn by {a}.",
            ),
            ("Who is the mayor of {n}?", "Who governs {n}?", "Who is in charge of {n}?"),
            ("Who runs {n}?", "Which mayor governs {n}?"),
        ),
        "founded": Attribute(
            YEARS,
            (
                "The first houses of {n} went up in {a} on dry ground.",
                "A royal charter of {a} gave {n} its walls and its market.",
                "{n} goes back to {a}, when six families settled there.",
            ),
            ("When was {n} founded?", "In what year did {n} begin?", "Which year saw the birth of {n}?"),
            ("Since when has {n} existed?", "Which year was {n} founded in?"),
        ),
        "emblem": Attribute(
            pairs("silver, black, red, golden", "heron, lion, key, crown, swan, wheel, stag, ship"),
            (
                "The flag of {n} shows a {a} on a white field.",
                "A {a} is carved in stone above the old gate of {n}.",
                "Every lamp post in {n} carries a {a} made of tin.",
            ),
            (
                "What is the emblem of {n}?",
                "Which symbol represents {n}?",
                "What is in the coat of arms of {n}?",
            ),
            ("What badge does {n} use?", "Which symbol is in the coat of arms at {n}?"),
        ),
        "festival": Attribute(
            pairs("early, late", MONTHS),
            (
                "In {a} the streets of {n} are hung with lanterns and nobody sleeps.",
                "The great fair of {n} opens in {a} and lasts nine days.",
                "Visitors crowd into {n} in {a} to see the boats blessed.",
            ),
            (
                "When does {n} celebrate its festival?",
                "In what month is the holiday of {n}?",
                "At what time of year do people feast in {n}?",
            ),
            ("When is the big party in {n}?", "At what time of year is the festival of {n}?"),
        ),
        "river": Attribute(
            words(
                "Tarn, Wensel, Ouse, Brill, Lodden, Sarre, Meer, Issel, Dove, Kenner, Arrow, Yelm, Teign, "
                "Rother, Vesk, Nidd, Colne, Glaven, Swale, Perrin"
            ),
            (
                "{n} lies on the {a}, which floods the meadows each spring.",
                "At {n} five stone arches carry the road over the {a}.",
                "The {a} turns the mills of {n} and then slows down.",
            ),
            (
                "Which river flows through {n}?",
                "What water is {n} built beside?",
                "What is the stream at {n} called?",
            ),
            ("On the banks of which river is {n}?", "What is the river at {n} called?"),
        ),
    },
    "firm": {
        "founder": Attribute(
            "person",
            (
                "With a borrowed cart and one horse {a} opened {n}.",
                "{n} was the idea of {a}, who sold a farm to pay for it.",
                "It was {a} who set up {n} after years abroad.",
            ),
            ("Who founded {n}?", "Who started {n}?", "Who is the founder of {n}?"),
            ("Who created {n}?", "Who was the founder that started {n}?"),
        ),
        "product": Attribute(
            words(
                "umbrellas, bicycle bells, tin toys, raincoats, ladders, garden chairs, fountain pens, "
                "kettles, mattresses, spectacles, bath tubs, door locks, playing cards, tea cups, sewing "
                "needles, lamp shades"
            ),
            (
                "The catalogue of {n} offers {a} in nine sizes.",
                "{n} has manufactured {a} ever since it bought its first machine.",
                "Half of the {a} in the country leave the gates of {n}.",
            ),
            ("What does {n} sell?", "What are the goods of {n}?", "Which product comes from {n}?"),
            ("What can one buy from {n}?", "Which goods does {n} sell?"),
        ),
        "seat": Attribute(
            "town",
            (
                "The offices of {n} stand in {a}, opposite the railway.",
                "{n} moved its desks to {a} and never left again.",
                "Letters to {n} are addressed to {a}.",
            ),
            (
                "Where is {n} based?",
                "What is the headquarters of {n}?",
                "In which town is {n} located?",
            ),
            ("Where does {n} have its seat?", "In which town is {n} based?"),
        ),
        "colour": Attribute(
            pairs("dark, pale, bright", "green, blue, yellow, brown, purple, pink, grey, red"),
            (
                "The vans of {n} are painted {a} from roof to wheel.",
                "Every box from {n} is tied with a {a} ribbon.",
                "Workers at {n} wear {a} aprons with brass buttons.",
            ),
            (
                "What colour does {n} use?",
                "What is the house colour of {n}?",
                "Which shade stands for {n}?",
            ),
            ("In what colour does {n} present itself?", "Which colour stands for {n}?"),
        ),
        "staff": Attribute(
            tuple(str(count) for count in range(120, 990, 10)),
            (
                "{n} employs {a} people, most of them from nearby.",
                "At the last count {a} names stood on the payroll of {n}.",
                "Each morning {a} men and women clock in at {n}.",
            ),
            (
                "How many staff does {n} have?",
                "What is the size of {n}?",
                "How large is the workforce of {n}?",
            ),
            ("How big is the crew of {n}?", "How large is the staff of {n}?"),
        ),
    },
    "novel": {
        "author": Attribute(
            "person",
            (
                "In one winter {a} wrote {n}, mostly at night.",
                "{n} is the third book by {a} and by far the shortest.",
                "The manuscript of {n} is in the hand of {a}.",
            ),
            ("Who is the author of {n}?", "Which writer created {n}?", "Whose work is {n}?"),
            ("From whose pen is {n}?", "Which author created {n}?"),
        ),
        "setting": Attribute(
            "town",
            (
                "The story of {n} takes place in {a} during a long strike.",
                "{n} leads its readers through the back streets of {a}.",
                "Every chapter of {n} opens with a view of {a}.",
            ),
            (
                "Where is {n} set?",
                "What is the setting of {n}?",
                "In what town does the plot of {n} unfold?",
            ),
            ("Where do the events of {n} happen?", "In what town is {n} set?"),
        ),
        "published": Attribute(
            YEARS,
            (
                "{n} reached the shops in {a} and sold out in a week.",
                "The first edition of {n} is dated {a}.",
                "{n} came off the press in {a}, on cheap paper.",
            ),
            (
                "When was {n} published?",
                "In what year did {n} appear?",
                "When could people first buy {n}?",
            ),
            ("Since when can one read {n}?", "In what year was {n} published?"),
        ),
        "hero": Attribute(
            TRADES,
            (
                "{n} follows a {a} through one hard summer.",
                "At the centre of {n} stands a {a} with a secret.",
                "In {n} a {a} tells the tale and cannot be trusted.",
            ),
            (
                "Who is the hero of {n}?",
                "Who is the main character of {n}?",
                "What does the protagonist of {n} do?",
            ),
            ("About whom is {n}?", "Who is the protagonist of {n}?"),
        ),
        "prize": Attribute(
            pairs("Calder, Linden, Heron, Amber, Raven, Juniper, Marlow, Sable", "Prize, Medal, Cup"),
            (
                "{n} won the {a} against eleven rivals.",
                "The jury of the {a} chose {n} without much debate.",
                "A gold band on each copy of {n} recalls the {a}.",
            ),
            (
                "Which award did {n} receive?",
                "What honour was given to {n}?",
                "What distinction did {n} earn?",
            ),
            ("Which trophy went to {n}?", "What award did {n} earn?"),
        ),
    },
}

COLOUR = {
    "person": (
        "Not much else is certain about that life.",
        "The diaries of {n} fill eleven boxes.",
        "Old photographs show a tall figure with a walking stick.",
        "{n} disliked long speeches and short winters.",
        "A cousin told the rest to a newspaper.",
        "{n} never learned to swim.",
        "The family spoke of it for years.",
        "A street was later named after {n}.",
    ),
    "town": (
        "The view from the church tower is worth the climb.",
        "Rain falls in {n} on half the days of the year.",
        "Two roads and one railway line lead there.",
        "The school has a clock that is always slow.",
        "Many young people leave {n} and some return.",
        "A guidebook devotes two pages to the matter.",
        "The walls of {n} were pulled down long ago.",
        "Winters there are mild and foggy.",
    ),
    "firm": (
        "The accounts are in good order.",
        "A history of {n} was printed for its jubilee.",
        "The lamps in the yard burn all night.",
        "Rivals speak of {n} with respect.",
        "There was a fire once, but nobody was hurt.",
        "{n} has never borrowed from a bank.",
        "The whistle can be heard across the fields.",
        "Its annual report mentions this in one line.",
    ),
    "novel": (
        "Critics were divided at first.",
        "Many schools still read {n} aloud.",
        "A worn copy is kept in the national library.",
        "{n} has been translated nine times.",
        "The last page surprises everyone.",
        "A stage version of {n} ran for two seasons.",
        "Few people finish it in one sitting.",
        "Its long sentences are much admired.",
    ),
}


def draw_name(kind: str, rng: Random, taken: set[str]) -> str:
    """A random name of that kind that is not among the `taken` ones."""
    while (name := rng.choice(NAMES[kind])) in taken:
        pass
    return name


def draw_fact(kind: str, name: str, attribute: str, rng: Random, taken: set[str]) -> Fact:
    """State an attribute of an entity; a person or town that is the answer is not among the `taken` names."""
    pool = ATTRIBUTES[kind][attribute].answers
    answer = draw_name(pool, rng, taken={name, *taken}) if isinstance(pool, str) else rng.choice(pool)
    return Fact(kind, name, attribute, answer)


def write_document(fact: Fact, rng: Random) -> dict[str, str]:
    """Two or three sentences that state the fact, as `{"title", "text"}`."""
    statement = rng.choice(ATTRIBUTES[fact.kind][fact.attribute].statements)
    sentences = [statement, *rng.sample(COLOUR[fact.kind], rng.choice((1, 1, 2)))]
    if "{n}" in sentences[1] and rng.random() < 0.7:  # colour that names the entity may also open the text
        sentences[0], sentences[1] = sentences[1], sentences[0]
    text = " ".join(sentences).format(n=fact.name, a=fact.answer)
    return {"title": fact.name, "text": text}


def questions(fact: Fact, split: str) -> list[str]:
    """All wordings of the fact's question: those of the test split are its own."""
    attribute = ATTRIBUTES[fact.kind][fact.attribute]
    wordings = attribute.test_questions if split == "test" else attribute.questions
    return [wording.format(n=fact.name) for wording in wordings]
