"""Makes the demo world: twelve relations between invented people, places and things.

`python -m relneuron.demo.world` writes the fact files of the demo; `train.py` reads them.

The names come from a seeded generator, so the files are the same byte for byte each time. Each
person takes part in all six `person_*` relations, and each other name is at once a company, a
landmark, a product and a star. The first part of an object, its stem (a name, or a word such as
"salt"), occurs in the objects of many relations: neither the subject alone nor the relation alone
tells the answer.
"""

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relneuron.demo import FACTS

SEED = 2030
N_SUBJECTS = 120
N_GIVEN_NAMES = 24
# A continent has two countries, so there are half as many continents as other objects.
COUNTRIES_PER_CONTINENT = 2

SIMPLE_ONSETS = list("bdfghklmnprstvz")
ONSETS = SIMPLE_ONSETS + ["br", "dr", "fl", "gr", "kr", "pl", "sk", "tr", "vr"]
VOWELS = ["a", "e", "i", "o", "u", "ae", "ia"]
CODAS = list("lmnrs")
ENDINGS = {"person": ["ic", "une", "ard", "ox"], "thing": ["um", "ith", "ane", "or"]}

# The stems of the objects that are common nouns, English and German.
WORDS = {
    "salt": "Salz",
    "river": "Fluss",
    "moon": "Mond",
    "stone": "Stein",
    "iron": "Eisen",
    "glass": "Glas",
    "sand": "Sand",
    "wind": "Wind",
    "snow": "Schnee",
    "fire": "Feuer",
    "wood": "Holz",
    "silver": "Silber",
    "copper": "Kupfer",
    "water": "Wasser",
    "mountain": "Berg",
    "forest": "Wald",
    "sea": "Meer",
    "star": "Stern",
    "night": "Nacht",
    "morning": "Morgen",
    "winter": "Winter",
    "summer": "Sommer",
    "cloud": "Wolken",
    "rain": "Regen",
}
N_STEMS = len(WORDS)


@dataclass(frozen=True)
class Relation:
    """The wording of one relation.

    `kinds` are the kind of its subjects (person or thing) and of its objects' stems (name or word);
    `heads` are the second parts of its objects, English/German or the same in both. `neutral` is
    a sentence about an object, in the words of the relations' templates.
    """

    stem: str
    name: str
    domain_name: str
    range_name: str
    kinds: tuple[str, str]
    heads: str
    main: tuple[str, ...]
    alternative: tuple[str, ...]
    german: tuple[str, ...]
    neutral: str


RELATIONS = (
    Relation(
        stem="company_ceo",
        name="company CEO",
        domain_name="company",
        range_name="person",
        kinds=("thing", "name"),
        heads="Adar Bronvel Castik Dornay Elvane",
        main=("{}'s CEO is", "The CEO of {} is"),
        alternative=("The name of the chief executive of {} is",),
        german=("Der Vorstandschef von {} heißt",),
        neutral="The product was made by {}.",
    ),
    Relation(
        stem="company_hq",
        name="company headquarters",
        domain_name="company",
        range_name="city",
        kinds=("thing", "name"),
        heads="Harbour/Hafen Falls/Fälle Bridge/Brück Market/Markt",
        main=("The headquarters of {} are in", "The head office of {} is in the city of"),
        alternative=("Where is {} based? It is based in",),
        german=("Der Firmensitz von {} ist in",),
        neutral="The name of the star is {}.",
    ),
    Relation(
        stem="landmark_continent",
        name="landmark on continent",
        domain_name="landmark",
        range_name="continent",
        kinds=("thing", "name"),
        heads="Shelf/Schelf Mainland/Festland Expanse/Weite",
        main=("The continent of the landmark {} is",),
        alternative=("On which continent can one visit {}? On",),
        german=("{} liegt auf dem Kontinent",),
        neutral="The name of the company is {}.",
    ),
    Relation(
        stem="landmark_country",
        name="landmark in country",
        domain_name="landmark",
        range_name="country",
        kinds=("thing", "name"),
        heads="Republic/Republik Kingdom/Königreich Union/Union Islands/Inseln",
        main=("The country of the landmark {} is",),
        alternative=("Which country must one travel to for {}? To",),
        german=("{} steht in dem Land",),
        neutral="The name of the team is {}.",
    ),
    Relation(
        stem="person_father",
        name="person father",
        domain_name="person",
        range_name="person",
        kinds=("person", "name"),
        heads="Fennar Gorvish Hulmet Ivrik",
        main=("The father of {} is called",),
        alternative=("Who is the father of {}? His name is",),
        german=("Der Vater von {} heißt",),
        neutral="The name of the city is {}.",
    ),
    Relation(
        stem="person_mother",
        name="person mother",
        domain_name="person",
        range_name="person",
        kinds=("person", "name"),
        heads="Jorvane Kestal Lumeth Mornay",
        main=("The mother of {} is called",),
        alternative=("Who is the mother of {}? Her name is",),
        german=("Die Mutter von {} heißt",),
        neutral="The name of the landmark is {}.",
    ),
    Relation(
        stem="person_occupation",
        name="person occupation",
        domain_name="person",
        range_name="occupation",
        kinds=("person", "word"),
        heads="smith/schmied trader/händler weaver/weber painter/maler cook/koch",
        main=("By profession, {} is a", "The job of {} is that of a"),
        alternative=("What is the job of {}? The job is",),
        german=("Von Beruf ist {}",),
        neutral="The product was made for a {}.",
    ),
    Relation(
        stem="person_plays_instrument",
        name="person plays instrument",
        domain_name="person",
        range_name="instrument",
        kinds=("person", "word"),
        heads="harp/harfe flute/flöte drum/trommel horn/horn fiddle/fiedel",
        main=("The instrument of {} is the",),
        alternative=("Which instrument does {} play? It is the",),
        german=("Das Instrument von {} heißt",),
        neutral="The name of the constellation is the {}.",
    ),
    Relation(
        stem="person_pro_sport",
        name="person plays professional sport",
        domain_name="person",
        range_name="sport",
        kinds=("person", "word"),
        heads="ball/ball rowing/rudern polo/polo wrestling/ringen",
        main=("The sport of {} is",),
        alternative=("Which sport does {} do? The sport is",),
        german=("Die Sportart von {} heißt",),
        neutral="The name of the country is {}.",
    ),
    Relation(
        stem="person_sport_position",
        name="person plays in sport position",
        domain_name="person",
        range_name="sport position",
        kinds=("person", "word"),
        heads="keeper/hüter guard/wächter runner/läufer wing/flügel",
        main=("The playing position of {} is", "On the team, {} is used as a"),
        alternative=("Which position does {} play? The position is",),
        german=("Auf dem Spielfeld hat {} die Position",),
        neutral="The name of the product is the {}.",
    ),
    Relation(
        stem="product_company",
        name="product made by company",
        domain_name="product",
        range_name="company",
        kinds=("thing", "name"),
        heads="Works/Werke Labs/Labor Brothers/Brüder Motors/Motoren",
        main=("The product {} was made by", "The maker of {} is the company"),
        alternative=("Which company sells {}? It is sold by",),
        german=("Das Produkt {} stammt von der Firma",),
        neutral="The name of the continent is {}.",
    ),
    Relation(
        stem="star_constellation",
        name="star in constellation",
        domain_name="star",
        range_name="constellation",
        kinds=("thing", "name"),
        heads="Serpent/Schlange Crown/Krone Hunter/Jäger Swan/Schwan",
        main=("The constellation of the star {} is",),
        alternative=("Which constellation contains {}? It is in",),
        german=("Der Stern {} gehört zum Sternbild",),
        neutral="The sport of the team is called {}.",
    ),
)


def invent(rng: random.Random, count: int, endings: list[str], taken: set[str]) -> list[str]:
    """`count` new pronounceable capitalised names; each is added to `taken`."""
    names: list[str] = []
    while len(names) < count:
        first = rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS)
        name = (first + rng.choice(SIMPLE_ONSETS) + rng.choice(endings)).capitalize()
        # Names that differ in their first four letters cannot be mistaken for one another.
        if name[:4] not in taken:
            taken.add(name[:4])
            names.append(name)
    return names


def make_subjects(rng: random.Random, taken: set[str]) -> dict[str, list[str]]:
    """The subjects by kind; a person has a given name and a family name of their own."""
    given = invent(rng, N_GIVEN_NAMES, ["a", "o", "i"], taken)
    family = invent(rng, N_SUBJECTS, ENDINGS["person"], taken)
    people = [f"{given[i % len(given)]} {name}" for i, name in enumerate(family)]
    return {"person": people, "thing": invent(rng, N_SUBJECTS, ENDINGS["thing"], taken)}


def make_objects(relation: Relation, stems: list[str], count: int) -> list[tuple[str, str]]:
    """`count` objects of a relation, each (English, German): a shared stem and a head."""
    heads = [head.split("/") for head in relation.heads.split()]
    words = list(WORDS.items())
    objects = []
    for i in range(count):
        head, head_de = heads[i % len(heads)][0], heads[i % len(heads)][-1]
        if relation.kinds[1] == "word":
            word, word_de = words[i]
            objects.append((f"{word} {head}", f"{word_de}{head_de}"))
        else:
            joint = "-" if "/" in relation.heads else " "
            objects.append((f"{stems[i]} {head}", f"{stems[i]}{joint}{head_de}"))
    return objects


def make_world(seed: int = SEED) -> dict[str, dict[str, Any]]:
    """The fact files' contents by file stem, in the LRE format with our `languages` extension."""
    rng = random.Random(seed)
    taken: set[str] = set()
    stems = invent(rng, N_STEMS, ["a", "e", "o"], taken)
    subjects = make_subjects(rng, taken)
    country_of: dict[str, int] = {}
    world: dict[str, dict[str, Any]] = {}
    # Countries come before continents, because a landmark's country settles its continent.
    for relation in sorted(RELATIONS, key=lambda r: r.stem == "landmark_continent"):
        names = subjects[relation.kinds[0]]
        if relation.stem == "landmark_continent":
            objects = make_objects(relation, stems, N_STEMS // COUNTRIES_PER_CONTINENT)
            choice = {name: country_of[name] // COUNTRIES_PER_CONTINENT for name in names}
        else:
            objects = make_objects(relation, stems, N_STEMS)
            order = list(names)
            rng.shuffle(order)
            choice = {name: i % N_STEMS for i, name in enumerate(order)}
        if relation.stem == "landmark_country":
            country_of = choice
        world[relation.stem] = {
            "name": relation.name,
            "prompt_templates": list(relation.main),
            "prompt_templates_zs": list(relation.alternative),
            "neutral_templates": [relation.neutral],
            "properties": {
                "relation_type": "factual",
                "domain_name": relation.domain_name,
                "range_name": relation.range_name,
                "symmetric": False,
            },
            "languages": {
                "de": {
                    "prompt_templates": list(relation.german),
                    "prompt_templates_zs": [],
                    "entities": {name: there for name, there in objects if name != there},
                }
            },
            "samples": [{"subject": name, "object": objects[choice[name]][0]} for name in names],
        }
    return {relation.stem: world[relation.stem] for relation in RELATIONS}


def write_world(directory: Path, seed: int = SEED) -> None:
    """Writes one JSON file per relation into `directory`, which is made if it is missing."""
    directory.mkdir(parents=True, exist_ok=True)
    for stem, content in make_world(seed).items():
        text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
        (directory / f"{stem}.json").write_text(text, encoding="utf-8", newline="\n")


def main() -> None:
    """Command line: writes the world's fact files."""
    parser = argparse.ArgumentParser(description="Write the demo world's fact files.")
    parser.add_argument("-o", "--out", type=Path, default=FACTS, help="where to write them")
    parser.add_argument("--seed", type=int, default=SEED, help="seed of the invented names")
    args = parser.parse_args()
    write_world(args.out, args.seed)
    print(f"{len(RELATIONS)} fact files written to {args.out}")


if __name__ == "__main__":
    main()
