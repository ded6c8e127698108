#!/usr/bin/env python3
"""A small stream of six template tasks in three planted pairs: S1 T1 G1 S2 T2 G2, as JSONL files for `quadriga adapt`.

Two variants. `shared`: the second task of a pair has the same answers as the first. `conflict`: it has other answers for the same
classes, so that one adapter has to forget. Training and test prompts share their words: a test of forgetting, not of generalising.

usage: template_stream.py FOLDER [conflict|shared] [SEED]
"""

import json
import random
import sys
from pathlib import Path

GOOD = "wonderful superb delightful brilliant excellent charming lovely splendid marvelous fantastic terrific great amazing perfect pleasant".split()
BAD = "awful terrible dreadful boring horrible disgusting poor nasty miserable dull bland disappointing unpleasant rotten bad".split()
TASTY = "delicious tasty fresh juicy crisp rich savory tender divine heavenly great excellent lovely perfect yummy".split()
FOUL = "stale burnt soggy sour rotten bland bitter greasy raw cold awful terrible disgusting spoiled bad".split()
FILMS = "film movie plot acting story ending script cast".split()
DISHES = "soup steak salad pasta bread cake fish rice".split()
THINGS = {
    "animal": "dog cat horse cow lion tiger bear rabbit sheep goat fox wolf monkey pig deer mouse".split(),
    "vehicle": "car truck bus train boat bicycle plane ship tractor van taxi motorcycle helicopter tram ferry jeep".split(),
    "food": "apple bread cheese rice pasta carrot banana egg soup potato orange butter cake onion tomato bean".split(),
    "tool": "hammer saw drill wrench shovel axe screwdriver rake knife chisel pliers ladder brush scissors nail rope".split(),
}
PLACES = {
    "Europe": "France Germany Italy Spain Poland Sweden Norway Greece Portugal Austria Finland Ireland Hungary Belgium".split(),
    "Asia": "China Japan India Thailand Vietnam Korea Nepal Mongolia Pakistan Malaysia Indonesia Iran Iraq Laos".split(),
    "Africa": "Egypt Kenya Nigeria Ghana Morocco Ethiopia Uganda Senegal Zambia Angola Sudan Mali Rwanda Libya".split(),
}
ENDINGS = {
    "conflict": ("Mood:", "in the place:", "Paint:"),
    "shared": ("Opinion:", "with its type:", "Region:"),
}
OTHER = {
    "positive": "happy", "negative": "angry", "animal": "zoo", "vehicle": "garage", "food": "kitchen", "tool": "shed",
    "Europe": "blue", "Asia": "yellow", "Africa": "green",
}


def stream(variant, seed):
    rng = random.Random(seed)
    mood, place, paint = ENDINGS[variant]
    second = (lambda c: OTHER[c]) if variant == "conflict" else (lambda c: c)
    pick = rng.choice
    review = {"positive": GOOD, "negative": BAD}
    taste = {"positive": TASTY, "negative": FOUL}

    def kinds(template, rename):
        return lambda c: (template(c), rename(c))

    tasks = [
        ("S1", list(review), kinds(lambda c: f"Review: the {pick(FILMS)} was {pick(review[c])}. Sentiment:", lambda c: c)),
        ("T1", list(THINGS), kinds(lambda c: f"Item: {pick(['a', 'the', 'one', 'my'])} {pick(THINGS[c])}. Kind:", lambda c: c)),
        ("G1", list(PLACES), kinds(lambda c: f"{pick(['Country', 'Nation', 'State'])}: {pick(PLACES[c])}. Continent:", lambda c: c)),
        ("S2", list(taste), kinds(lambda c: f"Guest said the {pick(DISHES)} tasted {pick(taste[c])}. {mood}", second)),
        ("T2", list(THINGS), kinds(lambda c: f"Put {pick(['a', 'the', 'one', 'my'])} {pick(THINGS[c])} {place}", second)),
        ("G2", list(PLACES), kinds(lambda c: f"{pick(['Map', 'Chart', 'Atlas'])} entry {pick(PLACES[c])}. {paint}", second)),
    ]
    for name, classes, make in tasks:
        rename = second if name.endswith("2") else (lambda c: c)
        rows = []
        for split, n in (("train", 96), ("test", 48)):
            for i in range(n):
                prompt, label = make(classes[i % len(classes)])
                rows.append({"split": split, "prompt": prompt, "completion": " " + label})
        yield name, [" " + rename(c) for c in classes], rows


def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    variant = sys.argv[2] if len(sys.argv) > 2 else "conflict"
    seed = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, labels, rows) in enumerate(stream(variant, seed)):
        with open(folder / f"{number}-{name}.jsonl", "w") as out:
            print(json.dumps({"task": name, "labels": labels}), file=out)
            for row in rows:
                print(json.dumps(row), file=out)


if __name__ == "__main__":
    main()
