#!/usr/bin/env python3
"""A seeded grammar of short English stories, and the checker that is compiled from its tables.

A story introduces people, places and things by name and refers to them again: things change hands, get lost and are
found where they were lost, pronouns follow the last person who did something. A sentence is a form (a row of FORMS)
with an opening; forms say what must hold before (who holds what) and what holds after.

    grammar.py --seed 7 --count 3        print stories, one a line
    grammar.py --check FILE              parse stories, one a line; exit 1 if fewer than 95 % are in the grammar
    grammar.py --self-test               generated stories parse, damaged ones do not
"""

import argparse
import math
import random
import re
import sys

GIRLS = "Anna Clara Edith Grace Hanna Ida Julia Lena Maria Nora Olga Rosa Sofia Tilda Vera Wilma".split()
BOYS = "Adam Ben Carl David Emil Frank Georg Hugo Ivan Jonas Karl Leo Martin Oscar Peter Tom".split()
PLACES = (
    "village forest garden mill harbor market meadow castle library bakery school station farm orchard river valley "
    "bridge tower workshop cellar kitchen stable island lighthouse chapel square well hill barn field"
).split()
THINGS = (
    "lantern key book flute kite basket map letter ring coat compass bell drum mirror hammer rope boat clock candle "
    "feather shell coin blanket brush ladder wheel cup knife violin box scarf stone"
).split()
ADJECTIVES = (
    "red blue green grey new small heavy golden silver wooden broken bright strange pretty dusty round warm black white "
    "yellow shiny plain tiny long"
).split()
FEELINGS = "happy sad tired proud curious brave hungry thankful worried glad calm quiet".split()
KINDS = {"girl": "she", "woman": "she", "boy": "he", "man": "he"}
JOBS = "baker farmer sailor teacher painter miller hunter singer tailor weaver fisher gardener".split()
ANIMALS = "dog cat horse goat bird fox goose hen".split()

# Openings of a sentence in the middle of a story.
OPENINGS = [
    "", "", "", "Then ", "Later ", "The next day ", "In the morning ", "At noon ", "In the evening ", "After a while ",
    "Soon ", "One day ", "Suddenly ", "On the way home ",
]

# What may follow a sentence of the kinds in TAILED, before its full stop.
TAILS = ["", "", "", "", " with a smile", " before supper", " while the sun shines", " as the wind blows", " without a word"]
TAILED = {"meet", "get", "use", "give", "lose", "find", "go"}

# kind, text. {N}: a person who is new; {P}, {Q}: two people who are known; {S}: the pronoun of the last one who did
# something; {A}: a thing that is new, with an adjective; {T}: a known thing; {L}: any place; {K}: a known place.
# What a kind asks for and does to the holder of {T} is in `step`.
FORMS = [
    ("open", "{N} is a {kind} who lives near the {L}."),
    ("open", "Once there was a {kind} named {N} who lived by the {L}."),
    ("open", "In a house by the {L} lives a {kind} named {N}."),
    ("open", "There is a {kind} by the {L} whose name is {N}."),
    ("job", "{P} works as a {job} and likes the {L}."),
    ("job", "{S} is a good {job} and has a {animal}."),
    ("job", "{P} has a {animal} that sleeps near the {L}."),
    ("job", "{P} works by the {K} as a {job}."),
    ("meet", "{P} meets a {kind} named {N} by the {L}."),
    ("meet", "{P} has a friend named {N} who is a {kind}."),
    ("meet", "a {kind} named {N} comes to the {L} and greets {P}."),
    ("get", "{P} finds a {A} near the {L}."),
    ("get", "{P} buys a {A} by the {L}."),
    ("get", "{P} makes a {A} by the {L}."),
    ("get", "{P} sees a {A} under a tree and takes it home."),
    ("use", "{P} carries the {T} to the {L}."),
    ("use", "{P} looks at the {T} for a long time."),
    ("use", "{P} cleans the {T} with care."),
    ("use", "{P} shows the {T} to {Q}."),
    ("use", "{P} puts the {T} on the table."),
    ("use", "{P} keeps the {T} in a safe place."),
    ("use", "{P} takes the {T} back to the {K}."),
    ("use", "{P} looks at the {T} and thinks of the {K}."),
    ("give", "{P} gives the {T} to {Q}."),
    ("give", "{P} lends the {T} to {Q} for a day."),
    ("give", "{P} brings {Q} the {T}."),
    ("give", "{P} is kind and lets {Q} have the {T}."),
    ("lose", "{P} loses the {T} near the {L}."),
    ("lose", "{P} leaves the {T} by the {L}."),
    ("lose", "{P} drops the {T} by the {L} and does not notice."),
    ("seek", "{P} looks for the {T} everywhere."),
    ("seek", "{P} and {Q} search for the {T} until dark."),
    ("seek", "{P} asks {Q} where the {T} is."),
    ("find", "{P} goes back to the {K} and finds the {T}."),
    ("find", "{P} sees the {T} by the {K} and picks it up."),
    ("find", "{P} returns to the {K} where the {T} still lies."),
    ("go", "{P} walks to the {L}."),
    ("go", "{P} runs to the {L} with a {animal}."),
    ("go", "{P} and {Q} go to the {L} together."),
    ("go", "{P} rests by the {K} and listens to the wind."),
    ("go", "{P} goes back to the {K} and waits there."),
    ("go", "{P} and {Q} return to the {K}."),
    ("feel", "{S} is {feeling}."),
    ("feel", "{S} feels {feeling} and smiles."),
    ("feel", "{S} is {feeling} but does not say so."),
    ("feel", "{S} thinks of the {K} and is {feeling}."),
    ("say", "{P} tells {Q} about the {T}."),
    ("say", "{P} tells {Q} a story about the {K}."),
    ("say", "{P} thanks {Q} and is {feeling}."),
    ("say", "{P} asks {Q} to come to the {K}."),
    ("say", "{P} shows {Q} the way to the {K}."),
    ("say", "{Q} laughs and {P} laughs too."),
    ("close", "{P} and {Q} walk home from the {K} as friends."),
    ("close", "from that day {P} and {Q} are good friends."),
    ("close", "{P} holds the {T} and thinks of {Q}."),
    ("close", "{P} goes to sleep by the {K} and dreams of the {T}."),
    ("close", "{P} and {Q} eat bread and soup by the {K}."),
    ("close", "everyone near the {K} is {feeling} and the day is over."),
]
# A story ends with one of these before its last sentence's form.
ENDINGS = ["At last ", "In the end ", "That night ", "Finally "]

GENDER = {name: "she" for name in GIRLS} | {name: "he" for name in BOYS}
WORDS = {
    "N": GENDER, "P": GENDER, "Q": GENDER, "S": ("she", "he"), "L": PLACES, "K": PLACES, "T": THINGS,
    "kind": KINDS, "job": JOBS, "animal": ANIMALS, "feeling": FEELINGS,
}
SLOT = re.compile(r"\{(\w+)\}")


class State:
    """What the story has told so far."""

    def __init__(self):
        self.people, self.places, self.subject, self.job = [], [], None, False
        self.thing, self.holder, self.lies = None, None, None

    def copy(self):
        other = State()
        other.__dict__.update(self.__dict__, people=list(self.people), places=list(self.places))
        return other


def step(state, kind, slots):
    """The state after a sentence, or the reason why it cannot follow."""
    after = state.copy()
    people, thing = state.people, slots.get("T")
    p, q, n = slots.get("P"), slots.get("Q"), slots.get("N")
    for name in (p, q):
        if name and name not in people:
            return f"{name} was not introduced"
    if p and p == q:
        return f"{p} twice"
    if n and n in people:
        return f"{n} was introduced already"
    if n and slots["kind"] and KINDS[slots["kind"]] != GENDER[n]:
        return f"{n} is no {slots['kind']}"
    if "S" in slots and (not state.subject or GENDER[state.subject] != slots["S"]):
        return f"{slots['S']} is nobody"
    if "K" in slots and slots["K"] not in state.places:
        return f"the {slots['K']} was not named"
    if thing and thing != state.thing:
        return f"the {thing} was not named"
    if kind == "open" and people:
        return "a second opening"
    if kind != "open" and not people:
        return "no opening"
    if kind in ("use", "give", "lose") and state.holder != p:
        return f"{p} does not have the {thing}"
    if kind in ("seek", "find") and not state.lies:
        return f"the {thing} is not lost"
    if kind == "seek" and thing and not state.thing:
        return "nothing to seek"
    if kind == "find" and state.lies != slots["K"]:
        return f"the {thing} is not at the {slots['K']}"
    if "A" in slots and state.thing:
        return "a second thing"
    if kind == "close" and "holds" in slots["form"] and state.holder != p:
        return f"{p} does not hold the {thing}"
    if n:
        after.people.append(n)
    place = slots.get("L")
    if place:
        after.places.append(place)
    if "A" in slots:
        after.thing, after.holder = slots["A"].split()[1], p
    if kind == "give":
        after.holder = q
    elif kind == "lose":
        after.holder, after.lies = None, place
    elif kind == "find":
        after.holder, after.lies = p, None
    after.subject = p or n or state.subject
    return after


def people_of(form):
    return {"P", "Q"} & set(SLOT.findall(form))


def capital(sentence):
    return sentence[0].upper() + sentence[1:]


def fill(rng, form, kind, state, wish):
    """Words for a form's slots, or None where the state has none."""
    slots = {"form": form}
    names = SLOT.findall(form)
    holder_first = kind in ("use", "give", "lose") or (kind == "close" and "holds" in form)
    known = list(state.people)
    rng.shuffle(known)
    if holder_first:
        if not state.holder:
            return None
        known.remove(state.holder)
        known.insert(0, state.holder)
    for name in names:
        if name == "N":
            fresh = [person for person in GENDER if person not in state.people]
            wished = [person for person in wish if person in fresh]
            slots["N"] = wished[0] if wished else rng.choice(fresh)
        elif name in ("P", "Q"):
            if not known:
                return None
            slots[name] = known.pop(0)
        elif name == "S":
            slots["S"] = GENDER[state.subject]
        elif name == "A":
            things = [thing for thing in wish if thing in THINGS]
            slots["A"] = f"{rng.choice(ADJECTIVES)} {things[0] if things else rng.choice(THINGS)}"
        elif name == "T":
            if not state.thing:
                return None
            slots["T"] = state.thing
        elif name == "K":
            slots["K"] = state.lies if kind == "find" else rng.choice(state.places)
            if slots["K"] is None:
                return None
        elif name == "L":
            slots["L"] = rng.choice(PLACES)
        elif name != "kind":
            slots[name] = rng.choice(list(WORDS[name]))
    if "kind" in names:
        slots["kind"] = rng.choice([kind for kind, pronoun in KINDS.items() if pronoun == GENDER[slots["N"]]])
    return slots


def chance(rng, share):
    return rng.chance(share) if isinstance(rng, Every) else rng.random() < share


def plan(rng):
    """The kinds of a story's sentences."""
    yield "open"
    if chance(rng, 0.4):
        yield "job"
    first, second = ("get", "meet") if chance(rng, 0.5) else ("meet", "get")
    yield first
    if chance(rng, 0.3):
        yield "feel"
    yield second
    plot = rng.choice(["give", "lose", "use", "go"])
    if plot == "give":
        yield from rng.choice([["use", "give"], ["give", "feel"], ["say", "give"], ["give"]])
        if chance(rng, 0.4):
            yield "use"
    elif plot == "lose":
        yield from rng.choice([["lose", "seek", "find"], ["lose", "feel", "find"], ["lose", "seek", "feel", "find"]])
    elif plot == "use":
        yield from rng.choice([["use", "say"], ["use", "feel"], ["use", "go"]])
    else:
        yield from rng.choice([["go", "say"], ["go", "feel"], ["go", "use"], ["say", "go"]])
    yield "close"


def story(rng, wish=()):
    """One story. It honours the names and things in `wish`."""
    return tell(rng, plan(rng), wish)[0]


def tell(rng, kinds, wish=()):
    """A story of sentences of these kinds, and how surprising it is where nothing is wished for: the negative logarithm of
    its probability among the stories of these kinds."""
    state, sentences, surprise = State(), [], 0.0
    for kind in kinds:
        while True:
            form = rng.choice([text for form_kind, text in FORMS if form_kind == kind])
            slots = fill(rng, form, kind, state, wish)
            if slots is None:
                continue
            after = step(state, kind, slots)
            if isinstance(after, State):
                break
        surprise += sentence_surprise(kind, slots, state)
        text = SLOT.sub(lambda slot: slots[slot[1]], form)
        if kind != "open":
            beginnings = ENDINGS if kind == "close" else OPENINGS
            beginning = rng.choice(beginnings)
            surprise -= math.log(beginnings.count(beginning) / len(beginnings))
            text = beginning + text
        if kind in TAILED:
            tail = rng.choice(TAILS)
            surprise -= math.log(TAILS.count(tail) / len(TAILS))
            text = text[:-1] + tail + "."
        sentences.append(capital(text))
        state = after
    return " ".join(sentences), surprise


def sentence_surprise(kind, slots, state):
    """The negative logarithm of the probability of a form and its words, after what the story has told so far."""
    forms = [form for form_kind, form in FORMS if form_kind == kind]
    # A form whose words cannot be had is drawn again; whether they can depends on the state only.
    possible = sum(fill(random.Random(0), form, kind, state, ()) is not None for form in forms)
    ways = [possible]
    people = len(state.people)
    holder_first = kind in ("use", "give", "lose") or (kind == "close" and "holds" in slots["form"])
    for name in SLOT.findall(slots["form"]):
        if name == "N":
            ways.append(len(GENDER) - people)
        elif name == "kind":
            ways.append(2)
        elif name in ("P", "Q"):
            ways.append(1 if holder_first and name == "P" else people)
            people -= 1
        elif name == "A":
            ways.append(len(ADJECTIVES) * len(THINGS))
        elif name == "K" and kind != "find":
            ways.append(len(state.places) / state.places.count(slots["K"]))
        elif name in ("L", "job", "animal", "feeling"):
            ways.append(len(WORDS[name]))
    return sum(map(math.log, ways))


class Every:
    """In place of a generator of random numbers: takes every way through `plan` in turn, and knows its probability."""

    def __init__(self):
        self.taken, self.depth, self.probability = [], 0, 1.0

    def pick(self, weights):
        if self.depth == len(self.taken):
            self.taken.append([0, len(weights)])
        index = self.taken[self.depth][0]
        self.depth += 1
        self.probability *= weights[index]
        return index

    def choice(self, options):
        return options[self.pick([1 / len(options)] * len(options))]

    def chance(self, share):
        return self.pick([share, 1 - share]) == 0

    def advance(self):
        """The next way; False when there is none."""
        while self.taken and self.taken[-1][0] + 1 == self.taken[-1][1]:
            self.taken.pop()
        if not self.taken:
            return False
        self.taken[-1][0] += 1
        self.depth, self.probability = 0, 1.0
        return True


def plans():
    """Every sequence of kinds, with its probability."""
    found, every = {}, Every()
    while True:
        kinds = tuple(plan(every))
        found[kinds] = found.get(kinds, 0.0) + every.probability
        if not every.advance():
            return found


def surprises(seed):
    """The stories of `stories`, each with the negative logarithm of its probability: what a model that knew the grammar
    would lose on it, and no model less on the mean."""
    rng, known = random.Random(seed), plans()
    while True:
        kinds = []
        text, surprise = tell(rng, (kinds.append(kind) or kind for kind in plan(rng)))
        yield text, surprise - math.log(known[tuple(kinds)])


def stories(seed):
    """Stories without end."""
    rng = random.Random(seed)
    while True:
        yield story(rng)


def request(rng):
    """What somebody may ask for, and a story that honours it."""
    name, thing = rng.choice(list(GENDER)), rng.choice(THINGS)
    asked = rng.choice([
        f"Tell me a story about {name} and a {thing}.", f"Write about {name} and the {thing}.",
        f"I want a story with {name} in it.", f"A story about a {thing}, please.",
    ])
    return asked, story(rng, [word for word in (name, thing) if word in asked])


def compiled():
    """A pattern for each form, with the openings that its kind may have."""
    def slot(name):
        words = [f"{a} {t}" for a in ADJECTIVES for t in THINGS] if name == "A" else WORDS[name]
        return f"(?P<{name}>" + "|".join(sorted(words, key=len, reverse=True)) + ")"

    patterns = []
    for kind, form in FORMS:
        openings = [""] if kind == "open" else ENDINGS if kind == "close" else sorted(set(OPENINGS), reverse=True)
        parts = enumerate(SLOT.split(form.removesuffix(".")))
        body = "".join(slot(part) if index % 2 else re.escape(part) for index, part in parts)
        tails = "|".join(sorted(set(TAILS), reverse=True)) if kind in TAILED else ""
        patterns.append((kind, form, re.compile(f"(?:{'|'.join(openings)}){body}(?:{tails})\\.")))
    return patterns


PATTERNS = compiled()


def readings(sentence):
    """The forms that a sentence has: its kind and its slots. The first letter may be a capital one."""
    for text in {sentence, sentence[:1].lower() + sentence[1:]}:
        for kind, form, pattern in PATTERNS:
            match = pattern.fullmatch(text)
            if match:
                yield kind, match.groupdict() | {"form": form}


def check(text, strict=True):
    """None if a story is in the grammar, else the reason why not. Unless `strict`, names need not be straight."""
    sentences = re.findall(r"[^.]+\.", text)
    if "".join(sentences).strip() != text.strip() or not sentences:
        return "it does not end with a sentence"
    states, last = [State()], None
    for sentence in map(str.strip, sentences):
        found = list(readings(sentence))
        if not found:
            return f"no form: {sentence}"
        outcomes = [step(state, kind, slots) for state in states for kind, slots in found]
        last = {kind for kind, _ in found}
        if strict:
            states = [after for after in outcomes if isinstance(after, State)]
            if not states:
                return f"{outcomes[0]}: {sentence}"
    return None if "close" in last else "it has no ending"


def self_test():
    rng, made = random.Random(1), 0
    for seed in range(20):
        for _, text in zip(range(100), stories(seed)):
            assert check(text) is None, (check(text), text)
            made += 1
            words = text.split()
            place = rng.randrange(len(words))
            foreign = " ".join(words[:place] + ["zebra"] + words[place + 1 :])
            assert check(foreign) is not None, foreign
            first = re.search("|".join(GENDER), text)[0]
            other = next(name for name in GENDER if name not in text and GENDER[name] == GENDER[first])
            head, _, tail = text.rpartition(first)
            if first in head:
                assert check(head + other + tail) is not None, head + other + tail
            sentence = rng.choice(text.split(". "))
            mixed = sentence.split()
            rng.shuffle(mixed)
            if mixed != sentence.split():
                assert check(text.replace(sentence, " ".join(mixed))) is not None, (sentence, mixed)
    assert abs(sum(plans().values()) - 1) < 1e-9
    for text, (again, surprise), _ in zip(stories(3), surprises(3), range(100)):
        assert text == again and surprise > 0
    # Of all stories of one kind that are told often, each comes as often as it is said to.
    rng, counts, said = random.Random(5), {}, {}
    for _ in range(60_000):
        text, surprise = tell(rng, ["open"])
        form = next(form for _, form, pattern in PATTERNS if pattern.fullmatch(text))
        counts[form], said[form] = counts.get(form, 0) + 1, surprise
    assert len(counts) == 4 and all(abs(count / 15_000 - 1) < 0.05 for count in counts.values()), counts
    assert all(abs(surprise - math.log(4 * len(GENDER) * 2 * len(PLACES))) < 1e-9 for surprise in said.values()), said
    for _ in range(200):
        asked, text = request(rng)
        assert check(text) is None and all(word in text for word in [*GENDER, *THINGS] if word in asked.split()), text
    print(f"{made} stories parse, and what is damaged does not")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--check", metavar="FILE")
    parser.add_argument("--self-test", action="store_true")
    arguments = parser.parse_args()
    if arguments.self_test:
        return self_test()
    if not arguments.check:
        for _, text in zip(range(arguments.count), stories(arguments.seed)):
            print(text)
        return None
    with open(arguments.check, encoding="utf-8") as file:
        lines = [line.strip() for line in file if line.strip()]
    loose = [check(line, strict=False) for line in lines]
    strict = [check(line) for line in lines]
    for line, reason in zip(lines, strict):
        if reason:
            print(f"{reason}\n    {line}")
    good, straight = loose.count(None), strict.count(None)
    print(f"{good} of {len(lines)} stories are in the grammar, {straight} keep their names straight")
    return 0 if lines and good >= 0.95 * len(lines) else 1


if __name__ == "__main__":
    sys.exit(main())
