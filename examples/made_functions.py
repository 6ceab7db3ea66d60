# SPDX-License-Identifier: Apache-2.0
"""Python functions to be completed, made up: a name, a signature, a docstring with examples.

Each is one of a few choices of elements, a change of them and a result, so there are some thousands
that differ in more than a number. What a docstring says of a call is what the made-up function
really returns.
"""

import math
import random
from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any

Numbers, Words = list[int], list[str]

# Of a list of integers: which elements, what is done to them, what is returned.
CHOSEN = {
    "": lambda xs, k: xs,
    "even ": lambda xs, k: [x for x in xs if x % 2 == 0],
    "odd ": lambda xs, k: [x for x in xs if x % 2],
    "positive ": lambda xs, k: [x for x in xs if x > 0],
    "negative ": lambda xs, k: [x for x in xs if x < 0],
    "distinct ": lambda xs, k: list(dict.fromkeys(xs)),
    "non-zero ": lambda xs, k: [x for x in xs if x],
    "single-digit ": lambda xs, k: [x for x in xs if -10 < x < 10],
}
LIMITED = {
    "": lambda xs, k: xs,
    " that are greater than {k}": lambda xs, k: [x for x in xs if x > k],
    " that are smaller than {k}": lambda xs, k: [x for x in xs if x < k],
    " that are divisible by {k}": lambda xs, k: [x for x in xs if x % k == 0],
    " at even positions": lambda xs, k: xs[::2],
    " except the first one": lambda xs, k: xs[1:],
    " among the first {k}": lambda xs, k: xs[:k],
    " whose digits add up to at most {k}": lambda xs, k: [
        x for x in xs if sum(map(int, str(abs(x)))) <= k
    ],
}
RESULTS: dict[str, tuple[str, Callable[[Numbers], Any]]] = {
    "the sum of the {}": ("int", sum),
    "the sum of the squares of the {}": ("int", lambda xs: sum(x * x for x in xs)),
    "the product of the {}": ("int", math.prod),
    "how many of the {} there are": ("int", len),
    "the largest of the {}, or None if there is none": (
        "Optional[int]", lambda xs: max(xs, default=None)),
    "the smallest of the {}, or None if there is none": (
        "Optional[int]", lambda xs: min(xs, default=None)),
    "the average of the {}, or 0.0 if there are none": (
        "float", lambda xs: sum(xs) / len(xs) if xs else 0.0),
    "a list of the {} in ascending order": ("List[int]", sorted),
    "a list of the {} in descending order": ("List[int]", lambda xs: sorted(xs, reverse=True)),
    "a list of the {} in reverse order": ("List[int]", lambda xs: xs[::-1]),
    "a list of the {}, each of them doubled": ("List[int]", lambda xs: [2 * x for x in xs]),
    "a list of the running totals of the {}": ("List[int]", lambda xs: list(accumulate(xs))),
    "a list of the differences of neighbours among the {}": (
        "List[int]", lambda xs: [b - a for a, b in pairwise(xs)]),
    "a dictionary that says how often each of the {} occurs": (
        "Dict[int, int]", lambda xs: {x: xs.count(x) for x in xs}),
    "True if the {} are in ascending order": ("bool", lambda xs: xs == sorted(xs)),
    "True if any of the {} occurs twice": ("bool", lambda xs: len(set(xs)) < len(xs)),
    "the {} as a string, separated by commas": ("str", lambda xs: ",".join(map(str, xs))),
    "the difference between the largest and the smallest of the {} (0 if there are none)": (
        "int", lambda xs: max(xs, default=0) - min(xs, default=0)),
}  # fmt: skip

# Of a list of words, and of a text.
WORDS_THAT = {
    "words": lambda ws, k: ws,
    "words that start with a vowel": lambda ws, k: [w for w in ws if w[0] in "aeiou"],
    "words that are longer than {k} letters": lambda ws, k: [w for w in ws if len(w) > k],
    "words that are palindromes": lambda ws, k: [w for w in ws if w == w[::-1]],
    "words with an odd number of letters": lambda ws, k: [w for w in ws if len(w) % 2],
    "words that contain the letter 'e'": lambda ws, k: [w for w in ws if "e" in w],
    "words that occur only once": lambda ws, k: [w for w in ws if ws.count(w) == 1],
}
WORD_RESULTS: dict[str, tuple[str, Callable[[Words], Any]]] = {
    "how many {} there are": ("int", len),
    "the {} in upper case": ("List[str]", lambda ws: [w.upper() for w in ws]),
    "the {}, each of them reversed": ("List[str]", lambda ws: [w[::-1] for w in ws]),
    "the lengths of the {}": ("List[int]", lambda ws: [len(w) for w in ws]),
    "the longest of the {} (the first one if there are several)": (
        "Optional[str]", lambda ws: max(ws, key=len, default=None)),
    "the {} in alphabetical order": ("List[str]", sorted),
    "the {}, sorted by length": ("List[str]", lambda ws: sorted(ws, key=len)),
    "the {}, joined by hyphens": ("str", "-".join),
    "the number of vowels in the {}": (
        "int", lambda ws: sum(c in "aeiou" for w in ws for c in w)),
    "a dictionary from each of the {} to its length": (
        "Dict[str, int]", lambda ws: {w: len(w) for w in ws}),
    "the first letters of the {} as one string": ("str", lambda ws: "".join(w[0] for w in ws)),
    "the letters that all of the {} have in common, sorted": (
        "List[str]", lambda ws: sorted(set.intersection(*map(set, ws))) if ws else []),
    "True if all the {} have different lengths": (
        "bool", lambda ws: len({len(w) for w in ws}) == len(ws)),
}  # fmt: skip

VOCABULARY = (
    "apple banana level river stone noon eagle cloud radar orange tree civic moon sea ember kayak "
    "lamp onion wave paper ice dad violet"
).split()
VERBS = ("get", "find", "compute", "count", "select", "make", "check", "collect", "solve", "filter")
STYLES = (
    "Return {result}.",
    "Returns {result}.",
    "Given {given}, return {result}.",
    "You are given {given}. Your task is to return {result}.",
    "Write a function that takes {given} and returns {result}.",
    "{Given} is given. The function should return {result}.",
)


def made_function(rng: random.Random) -> str:
    """A ``def`` line and a docstring."""
    what, result, returns, kind, run = _numbers(rng) if rng.random() < 0.6 else _words(rng)
    if kind == "List[int]":
        argument = rng.choice(("numbers", "nums", "lst", "arr", "xs", "values"))
        given = f"a list of integers `{argument}`"
    elif kind == "List[str]":
        argument = rng.choice(("words", "strings", "names"))
        given = f"a list of strings `{argument}`"
    else:
        argument = rng.choice(("text", "sentence"))
        given = f"a string `{argument}` of words separated by spaces"
    letters = "".join(c if c.isalpha() else " " for c in what)
    words = [word for word in letters.split() if len(word) > 3]
    name = "_".join([rng.choice(VERBS), *words[: rng.randint(1, 3)]])
    lines = [
        rng.choice(STYLES).format(result=result, given=given, Given=given[0].upper() + given[1:])
    ]
    arrow = rng.choice((">>>", ">>>", "==", "=>", None))
    for _ in range(rng.randint(1, 4) if arrow else 0):
        if kind == "List[int]":
            shortest = 0 if rng.random() < 0.2 else 3
            value = [rng.randint(-20, 40) for _ in range(rng.randint(shortest, 7))]
        else:
            value = rng.choices(VOCABULARY, k=rng.randint(2, 6))
        call = f"{name}({(' '.join(value) if kind == 'str' else value)!r})"
        answer = repr(run(value))
        lines += [f">>> {call}", answer] if arrow == ">>>" else [f"{call} {arrow} {answer}"]
    typed = rng.random() < 0.7
    head = f"def {name}({argument}: {kind}) -> {returns}:" if typed else f"def {name}({argument}):"
    if typed and rng.random() < 0.4:
        head = "from typing import Dict, List, Optional\n\n\n" + head
    quotes = rng.choice(('"""', '""" ', '"""\n    '))
    body = "\n    ".join(lines)
    return f'{head}\n    {quotes}{body}\n    """\n'


def _numbers(rng: random.Random) -> tuple[str, str, str, str, Callable[[Numbers], Any]]:
    """What elements, what of them, its type, the argument's type, the function itself."""
    k = rng.randint(2, 9)
    chosen, first = rng.choice(list(CHOSEN.items()))
    limited, second = rng.choice(list(LIMITED.items()))
    result, (returns, last) = rng.choice(list(RESULTS.items()))
    what = f"{chosen}numbers{limited.format(k=k)}"
    return what, result.format(what), returns, "List[int]", lambda xs: last(second(first(xs, k), k))


def _words(rng: random.Random) -> tuple[str, str, str, str, Callable[[Words], Any]]:
    """As `_numbers`."""
    k = rng.randint(3, 6)
    what, first = rng.choice(list(WORDS_THAT.items()))
    result, (returns, last) = rng.choice(list(WORD_RESULTS.items()))
    what = what.format(k=k)
    kind = rng.choice(("List[str]", "List[str]", "str"))
    return what, result.format(what), returns, kind, lambda ws: last(first(ws, k))
