#!/usr/bin/env python3
"""Prompts for a model to continue, composed of our own words: templates with slots, passages built sentence by sentence.

    prompts.py [--seed N] > prompts.jsonl
    prompts.py --check prompts.jsonl DEV.jsonl.gz...   # 8-word sequences that also stand in a file of others

A row is {"prompt", "kind"}; code to be completed as it stands has "raw": true. The output depends on the seed only.
"""
import argparse
import collections
import gzip
import json
import random
import re
import sys

import pieces
from pieces import PEOPLE_FIRST, PEOPLE_LAST, PLACES

COUNTS = {
    "writing": 440, "roleplay": 360, "reasoning": 420, "humanities": 440, "stem": 440, "extraction": 420, "translation": 560,
    "summarization": 520, "rag": 540, "qa": 520, "code": 300, "code_completion": 440,
}
MONTHS = "January February March April May June July August September October November December".split()


class Slots(dict):
    """What the names in braces stand for: one value for each name within a text, drawn when it is first met."""

    def __init__(self, rng, **given):
        super().__init__(**given)
        self.rng = rng

    def __missing__(self, key):
        base = key.rstrip("0123456789")
        r = self.rng
        if base == "S":  # the surname of the person with the same number
            value = self["P" + key[1:]].split()[-1]
        elif base == "P":
            value = f"{r.choice(PEOPLE_FIRST)} {r.choice(PEOPLE_LAST)}"
        elif base == "L":
            value = r.choice(PLACES)
        elif base == "Y":
            value = str(r.randint(1790, 2021))
        elif base == "YY":
            value = str(r.randint(1985, 2024))
        elif base == "D":
            value = f"{r.randint(1, 28)} {r.choice(MONTHS)}"
        elif base == "N":
            value = str(r.randint(2, 19))
        elif base == "H":
            value = str(r.randint(21, 96))
        elif base == "M":
            value = f"{r.choice([r.randint(110, 990), r.randint(11, 99) * 100, r.randint(11, 95) * 1000]):,}"
        elif base == "X":  # a made-up name
            value = "".join(r.choice(pieces.SYLLABLES) for _ in range(r.choice([2, 2, 3]))).capitalize()
        else:
            value = r.choice(pieces.LISTS[base])
            if isinstance(value, str) and "{" in value:
                value = value.format_map(self)
        self[key] = value
        return value


def fill(rng, template, **given):
    text = template.format_map(Slots(rng, **given))
    return text[0].upper() + text[1:] if text else text


def upper(text):
    return text[0].upper() + text[1:]


def passage(rng, low, high, subject=None):
    """A text of low to high words on one subject, with the questions that it answers."""
    subject = subject or rng.choice(list(pieces.PASSAGES))
    head, body = pieces.PASSAGES[subject][0], list(pieces.PASSAGES[subject][1:])
    general = rng.sample(pieces.GENERAL, len(pieces.GENERAL))
    slots, goal = Slots(rng), rng.randint(low, high)
    rng.shuffle(body)
    sentences, questions, words = [], [], 0
    order = [head]
    for i, known in enumerate(body):
        order += [known] if i % 3 != 2 else [known, general.pop()]
    for sentence, question in order:
        if words >= goal:
            break
        text = upper(sentence.format_map(slots))
        sentences.append(text)
        words += len(text.split())
        if question:
            questions.append(upper(question.format_map(slots)))
    breaks = [" " if rng.random() < 0.85 else "\n\n" for _ in sentences]
    return "".join(s + b for s, b in zip(sentences, breaks)).strip(), questions, slots


def writing(rng):
    text = fill(rng, rng.choice(pieces.WRITING))
    return text + (" " + rng.choice(pieces.LIMITS) if rng.random() < 0.45 else "")


def roleplay(rng):
    return fill(rng, rng.choice(pieces.ROLEPLAY))


def reasoning(rng):
    r = rng
    kind = r.randrange(7)
    if kind == 0:  # an order of people
        names = r.sample(PEOPLE_FIRST, r.choice([3, 4, 5]))
        word, end = r.choice([("taller", "tallest"), ("older", "oldest"), ("faster", "fastest"), ("richer", "richest"),
                              ("heavier", "lightest"), ("stronger", "weakest"), ("earlier", "last to arrive")])
        facts = [f"{a} is {word} than {b}." for a, b in zip(names, names[1:])]
        r.shuffle(facts)
        return " ".join(facts) + f" Who is the {end} of them? Explain your answer."
    if kind == 1:  # a sequence
        a, d = r.randint(1, 20), r.randint(2, 9)
        make = r.choice([lambda i: a + d * i, lambda i: a * 2 ** i, lambda i: a + i * (i + 1) // 2, lambda i: (i + a) ** 2])
        shown = ", ".join(str(make(i)) for i in range(r.randint(4, 6)))
        return r.choice(["What is the next number in the sequence {}, ...? Explain the rule.",
                         "Find the rule behind the numbers {} and give the two numbers that follow.",
                         "Continue the pattern {} and say how you found it."]).format(shown)
    if kind == 2:  # rules
        s = Slots(r)
        return r.choice(pieces.SYLLOGISMS).format_map(s)
    if kind == 3:  # directions
        steps = [f"{r.choice([5, 10, 15, 20, 30])} metres {d}" for d in r.sample(["north", "east", "south", "west"], 3)]
        return f"{r.choice(PEOPLE_FIRST)} leaves the {r.choice(pieces.LISTS['room'])}, walks {steps[0]}, then {steps[1]} and at " \
               f"last {steps[2]}. Where is the starting point now, seen from there, and how far away is it?"
    return fill(r, r.choice(pieces.PUZZLES))


def humanities(rng):
    return fill(rng, rng.choice(pieces.EXPLAIN), topic=rng.choice(pieces.HUMANITIES), reader=rng.choice(pieces.READERS))


def stem(rng):
    return fill(rng, rng.choice(pieces.EXPLAIN), topic=rng.choice(pieces.STEM), reader=rng.choice(pieces.READERS))


def extraction(rng):
    text, _, _ = passage(rng, 60, 200)
    if rng.random() < 0.3:
        rows = [fill(rng, rng.choice(pieces.RECORDS)) for _ in range(rng.randint(3, 6))]
        text = "\n".join(f"{i + 1}. {t}" for i, t in enumerate(rows))
    ask = fill(rng, rng.choice(pieces.EXTRACT))
    return f"{ask}\n\n{text}" if rng.random() < 0.7 else f"{text}\n\n{ask}"


def translation(rng):
    r = rng
    language = r.choice(["German"] * 5 + ["French", "Spanish", "Italian"])
    into = r.random() < 0.75
    source = language if into else "English"
    text = sentence(r, source)
    if r.random() < 0.25:
        text += " " + sentence(r, source)
    a, b = (language, "English") if into else ("English", language)
    return r.choice(["Translate {a} to {b}: {t}", "Translate from {a} to {b}: {t}", "Translate the following {a} text into {b}.\n\n{t}",
                     "How do you say this in {b}? \"{t}\"", "{t}\n\nTranslate this into {b}.",
                     "Please give me the {b} translation of this {a} sentence: {t}"]).format(a=a, b=b, t=text)


def sentence(rng, language):
    """A clause of time, subject and predicate, and sometimes a second clause."""
    time, subject, predicate, tail, form, city = pieces.GRAMMAR[language]
    s = Slots(rng, city=rng.choice(city), t=rng.choice(time), s=rng.choice(subject), p=rng.choice(predicate), x=rng.choice(tail))
    text = rng.choice(form).format_map(s).format_map(s).format_map(s)
    return upper(re.sub(r" +", " ", text))


def summarization(rng):
    number = rng.choice([1, 1, 2])
    text = "\n\n".join(passage(rng, 120, 400 // number, s)[0] for s in rng.sample(list(pieces.PASSAGES), number))
    ask = rng.choice(pieces.SUMMARIZE)
    return f"{ask} {text}" if ask.endswith(":") else f"{text}\n\n{ask}"


def rag(rng):
    number = rng.choice([1, 1, 2, 3])
    found = [passage(rng, 80, 380 // number, s) for s in rng.sample(list(pieces.PASSAGES), number)]
    question = rng.choice([q for _, qs, _ in found for q in qs])
    texts = [t for t, _, _ in found]
    form = rng.randrange(4)
    if form == 0:
        return " ".join(texts) + f" {question}"
    if form == 1:
        body = "\n\n".join(f"Passage {i + 1}: {t}" for i, t in enumerate(texts))
        return f"{body}\n\n{rng.choice(pieces.ANSWER_FROM)} {question}"
    if form == 2:
        return f"{rng.choice(pieces.ANSWER_FROM)}\n\n" + "\n\n".join(texts) + f"\n\nQuestion: {question}\nAnswer:"
    return f"Question: {question}\n\n" + "\n".join(f"[{i + 1}] {t}" for i, t in enumerate(texts)) + "\n\nAnswer the question from the text."


def qa(rng):
    text = fill(rng, rng.choice(pieces.QUESTIONS))
    return text if rng.random() < 0.7 else text[0].lower() + text[1:].rstrip("?")


# Code: what a function computes is put together of a filter, a map and a reduction, so that examples can be computed.

def list_task(rng):
    (f_words, f), (m_words, m), (r_words, r) = (rng.choice(part) for part in (pieces.FILTERS, pieces.MAPS, pieces.REDUCTIONS))
    name = rng.choice(["{r}_of_{f}", "{r}_{f}", "get_{r}_{f}", "compute_{r}", "{f}_{r}", "solve", "process_numbers"])
    name = name.format(r=r_words.split()[1].strip(","), f=f_words[0])
    what = f"{r_words} of {m_words.format(f_words[1])}"
    return name, "numbers", "List[int]", what, lambda xs: r([m(x) for x in xs if f(x)]), \
        lambda: [rng.randint(-9, 30) for _ in range(rng.randint(3, 7))]


def text_task(rng):
    name, what, f = rng.choice(pieces.TEXT_TASKS)
    k = rng.randint(2, 5)
    words = lambda: " ".join(rng.sample(pieces.WORDS, rng.randint(1, 4)))
    return name, rng.choice(["text", "s", "string", "sentence"]), "str", what.format(k=k), lambda s: f(s, k), words


def number_task(rng):
    name, what, f = rng.choice(pieces.NUMBER_TASKS)
    k = rng.randint(2, 9)
    return name, rng.choice(["n", "number", "x"]), "int", what.format(k=k), lambda n: f(n, k), lambda: rng.randint(1, 150)


def task(rng):
    return rng.choice([list_task, list_task, text_task, text_task, number_task])(rng)


def code_completion(rng):
    name, arg, kind, what, f, make = task(rng)
    examples = [make() for _ in range(rng.randint(1, 3))]
    style = rng.randrange(3)
    shown = "\n".join([f"    >>> {name}({x!r})\n    {f(x)!r}" if style == 0 else f"    {name}({x!r}) {'==' if style == 1 else '➞'} {f(x)!r}"
                       for x in examples])
    hints = rng.random() < 0.5
    head = "from typing import List\n\n\n" if hints and kind.startswith("List") else rng.choice(["", "\n"])
    begin = rng.choice(["Return", "Compute", "For {a}, return", "This function takes {a} and returns", "Find"]).format(
        a={"str": f"a string {arg}", "int": f"a positive integer {arg}"}.get(kind, f"a list of integers {arg}"))
    note = rng.choice(["", "", "\n    The argument is not changed.", "\n    An empty input is allowed.", "\n    Use plain Python only."])
    return f"{head}def {name}({arg}{': ' + kind if hints else ''}):\n    \"\"\"{begin} {what}.{note}\n{shown}\n    \"\"\"\n"


def code(rng):
    form = rng.randrange(4)
    if form == 0:
        return fill(rng, rng.choice(pieces.CODE_ASKS))
    name, arg, kind, what, f, make = task(rng)
    x = make()
    if form == 1:
        return f"Write a Python function `{name}({arg})` that returns {what}. For example, `{name}({x!r})` returns `{f(x)!r}`."
    if form == 2:
        return rng.choice(["Write a function in {l} that returns {w}. Add a short comment to each step.",
                           "Implement {w} in {l} as a single function and show how it is called.",
                           "I need {l} code for this: {w}. Please include two tests."]).format(
                               l=rng.choice(["Python", "Python", "JavaScript", "Java", "C++", "Go", "Rust"]), w=what)
    body = rng.choice(pieces.SNIPPETS).format_map(Slots(rng, n=str(rng.randint(2, 9)), v=rng.choice(["items", "data", "values", "xs"])))
    return rng.choice(["Explain what this code does:", "What does the following function return, and why?",
                       "Find the mistake in this code, if there is one, and correct it:", "Rewrite this code so that it is easier to read:",
                       "Add a docstring and type hints to this function:"]) + f"\n\n{body}"


def prompts(seed):
    seen, rows = set(), []
    for kind, count in COUNTS.items():
        rng, make = random.Random(f"{seed}/{kind}"), globals()[kind]
        for tries in range(60 * count):
            text = make(rng)
            if text in seen:
                continue
            seen.add(text)
            rows.append({"prompt": text, "kind": kind} | ({"raw": True} if kind == "code_completion" else {}))
            count -= 1
            if count == 0:
                break
        if count:
            print(f"{kind}: {count} too few", file=sys.stderr)
    random.Random(seed).shuffle(rows)
    return rows


def strings(value):
    if isinstance(value, str):
        yield value
    for v in value.values() if isinstance(value, dict) else value if isinstance(value, list) else []:
        yield from strings(v)


def grams(text, n=8):
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[i:i + n]) for i in range(len(words) - n + 1)}


def check(path, others):
    """Says which sequences of eight words of the prompts also stand in files of others."""
    rows = [json.loads(line) for line in open(path, encoding="utf-8")]
    ours = collections.Counter(g for row in rows for g in grams(row["prompt"]))
    sizes = collections.defaultdict(list)
    for row in rows:
        sizes[row["kind"]].append(len(row["prompt"].split()))
    for kind, n in sorted(sizes.items()):
        n.sort()
        print(f"{kind:16} {len(n):5} prompts, {n[0]} to {n[-1]} words, median {n[len(n) // 2]}")
    common = 0
    for other in others:
        with (gzip.open if other.endswith(".gz") else open)(other, "rt", encoding="utf-8") as f:
            theirs = set().union(*(grams(s) for line in f for s in strings(json.loads(line))))
        shared = sorted(theirs & ours.keys())
        common += len(shared)
        print(f"{other.split('/')[-1]}: {len(shared)} of {len(ours)} sequences in common")
        print("".join(f"  {g} ({ours[g]} times)\n" for g in shared), end="")
    return common


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--check", nargs="+", metavar="FILE")
    a = p.parse_args()
    if a.check:
        sys.exit(1 if check(a.check[0], a.check[1:]) else 0)
    for row in prompts(a.seed):
        print(json.dumps(row, ensure_ascii=False))


if __name__ == "__main__":
    main()
