# SPDX-License-Identifier: Apache-2.0
"""Write a file of varied prompts for `vllm-redrafter data --prompts`: tasks x topics, and code.

The prompts that a small target invents are mostly requests for advice. This adds the other things
that people ask for: the tasks of `varied_prompts.json` with topics, names and numbers from Corpora
(CC0), passages of the target's own answers, and Python functions to be completed, whose signatures
and docstrings come from Python's standard library, from trees of sources that you name, and from
`made_functions.py`. No benchmark is among them.

    git clone --depth 1 https://github.com/dariusk/corpora
    git clone --depth 1 https://github.com/TheAlgorithms/Python algorithms
    vllm-redrafter data --target TARGET --out invented --num-prompts 2000
    python examples/varied_prompts.py prompts.jsonl --corpora corpora --sources algorithms \
        --passages invented --target TARGET
"""

import argparse
import ast
import json
import random
import re
import string
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from made_functions import made_function

TASKS = Path(__file__).with_suffix(".json")
NOT_SOURCES = {"test", "tests", "idlelib", "lib2to3", "site-packages"}

# Slot of a task -> files of Corpora's `data` that fill it.
SLOTS = {
    "t": (
        "books/academic_subjects", "technology/new_technologies", "film-tv/iab_categories",
        "corporations/industries", "humans/human_universals", "sports/sports", "music/genres",
        "music/instruments", "foods/breads_and_pastries", "religion/religions",
        "technology/computer_sciences", "governments/governmentForms",
    ),
    "job": ("humans/occupations",),
    "field": ("books/academic_subjects", "corporations/industries"),
    "tech": ("technology/new_technologies",),
    "place": ("geography/us_cities", "geography/countries", "geography/oceans"),
    "country": ("geography/countries",),
    "name": ("humans/firstNames",),
    "obj": ("objects/objects", "technology/appliances", "objects/clothing"),
    "animal": ("animals/common",),
    "disease": ("medicine/symptoms", "medicine/infectious_diseases"),
    "god": ("mythology/greek_gods", "mythology/norse_gods", "mythology/egyptian_gods"),
    "ism": ("art/isms",),
    "element": ("science/elements",),
    "material": ("materials/building-materials", "materials/natural-materials"),
    "body": ("humans/bodyParts",),
    "food": ("foods/vegetables", "foods/fruits", "foods/fish"),
    "proverb": ("words/proverbs",),
    "sentence": ("words/harvard_sentences",),
    "word": ("words/common",),
}  # fmt: skip

# What people ask about; three times as often as a topic of Corpora.
TOPICS = (
    "renewable energy", "the history of chess", "a museum", "black holes", "sourdough bread",
    "remote work", "the French Revolution", "coral reefs", "machine learning", "a lost dog",
    "the stock market", "jazz music", "vaccines", "the Roman Empire", "electric cars", "bees",
    "public libraries", "a haunted lighthouse", "inflation", "marathon training", "the ocean floor",
    "quantum mechanics", "a family reunion", "urban gardening", "the printing press", "volcanoes",
    "space travel", "climate change", "a broken friendship", "classical painting", "online privacy",
    "the human heart", "minimalism", "ancient Egypt", "a chess tournament", "plate tectonics",
    "social media", "a small bakery", "the moon landing", "photosynthesis", "time management",
    "a winter storm", "democracy", "blockchain", "the Amazon rainforest", "learning a language",
    "antibiotics", "a train journey", "artificial intelligence in schools", "whales", "tea",
    "the Industrial Revolution", "sleep", "a detective in Paris", "gravity", "recycling",
    "the Olympic Games", "mental health", "a robot that wants to paint", "evolution", "tax law",
)  # fmt: skip

WORDS = {
    "lang": ("JavaScript", "Java", "C", "C++", "Go", "Rust", "Ruby", "Python", "TypeScript"),
    "ds": ("linked list", "stack", "queue", "heap", "hash table", "binary tree", "trie", "graph"),
    "algo": (
        "binary search", "bubble sort", "merge sort", "quicksort", "insertion sort",
        "breadth first search", "depth first search", "Dijkstra's algorithm", "knapsack",
        "the sieve of Eratosthenes", "Euclid's algorithm", "matrix multiplication",
        "a Caesar cipher", "run length encoding", "the Tower of Hanoi", "Newton's method",
    ),
    "task": (
        "the largest element", "the sum of all even numbers", "the list without duplicates",
        "the second smallest number", "the number of vowels in each string", "the median",
        "the running totals", "all pairs whose sum is ten", "the elements in reverse order",
        "the longest string", "how often each element occurs", "all numbers that are prime",
        "the positions of the zeros", "the product of all elements", "the list in sorted order",
        "the difference between the largest and the smallest element", "every third element",
        "a dictionary that groups the words by their first letter", "the elements of both lists",
        "true when the numbers are increasing", "the greatest common divisor of all of them",
    ),
    "fname": ("process", "count_items", "find_best", "merge", "average", "is_valid", "split_all"),
}  # fmt: skip

CODE = (
    "Complete this Python function:\n\n{c}",
    "Complete the function below. Answer with the whole function in Python.\n\n```python\n{c}```",
    "Finish the following Python function. Answer with code only.\n\n```python\n{c}```",
    "{c}",
    "Write the body of this function and explain it briefly:\n\n{c}",
    "Implement this in Python:\n\n```python\n{c}\n```",
)


def strings(value: Any, key: str | None = None) -> Iterator[str]:
    """The words that a file of Corpora lists: every string that is not about the file itself."""
    if isinstance(value, str):
        if key in (None, "name", "category_name"):
            yield value
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)
    elif isinstance(value, dict):
        for name, item in value.items():
            if name in ("name", "category_name"):
                yield from strings(item, name)
            elif isinstance(item, (list, dict)):
                yield from strings(item)


def read_slots(corpora: Path) -> dict[str, list[str]]:
    """What may stand in each slot, from a clone of Corpora."""
    slots = {slot: list(words) for slot, words in WORDS.items()}
    for slot, files in SLOTS.items():
        words: dict[str, None] = {}
        for file in files:
            text = (corpora / "data" / f"{file}.json").read_text(encoding="utf-8")
            words.update(dict.fromkeys(word for word in strings(json.loads(text)) if len(word) > 1))
        slots[slot] = list(words)
    slots["t"] += 3 * list(TOPICS)
    slots["u"] = slots["t"]
    return slots


def filler(slots: dict[str, list[str]], passages: list[str], rng: random.Random) -> Callable:
    """A function that fills a task's slots; ``{name2}`` is another of ``{name}``'s kind."""

    def fill(task: str) -> str:
        values: dict[str, str] = {}
        small = rng.randint(2, 19)
        numbers = {"n": small + rng.randint(1, 480), "m": small, "k": rng.randint(2, 12)}
        for _, field, _, _ in string.Formatter().parse(task):
            if field is None:
                continue
            if field in numbers:
                values[field] = str(numbers[field])
            elif field == "passage":
                values[field] = rng.choice(passages)
            else:
                choices = slots[field.rstrip("23")]
                values[field] = rng.choice([w for w in choices if w not in values.values()])
        return task.format(**values)

    return fill


def task_prompts(
    rng: random.Random, slots: dict[str, list[str]], passages: list[str], number: int
) -> list[str]:
    """``number`` prompts, the kinds of task in turn, the tasks of a kind by chance."""
    kinds = list(json.loads(TASKS.read_text(encoding="utf-8")).values())
    if not passages:
        kinds = [[task for task in kind if "{passage}" not in task] for kind in kinds]
    fill = filler(slots, passages, rng)
    return [fill(rng.choice(kinds[i % len(kinds)])) for i in range(number)]


def read_passages(dataset: Path, target: str, most: int = 3000) -> list[str]:
    """Paragraphs of 30 to 150 words from the target's own answers in a dataset."""
    from transformers import AutoTokenizer

    from vllm_redrafter.training.dataset import load_dataset

    tokenizer = AutoTokenizer.from_pretrained(target)
    data = load_dataset(dataset)
    passages = []
    for tokens, answer in zip(data.tokens, data.answer, strict=True):
        text = tokenizer.decode(tokens[answer], skip_special_tokens=True)
        passages += [p for p in text.split("\n\n") if 30 <= len(p.split()) <= 150]
        if len(passages) >= most:
            break
    return passages


def function_heads(root: Path) -> list[str]:
    """``def`` line and docstring of every documented function under a directory of sources."""
    heads = {}
    for path in sorted(root.rglob("*.py")):
        if NOT_SOURCES & set(path.parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("__"):
                continue
            if node.args.args and node.args.args[0].arg in ("self", "cls"):
                continue
            doc = ast.get_docstring(node)
            if doc and 30 < len(doc) < 700:
                body = "\n".join(f"    {line}".rstrip() for line in doc.splitlines())
                quoted = f'    """{body.strip()}\n    """\n'
                returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
                heads[f"def {node.name}({ast.unparse(node.args)}){returns}:\n{quoted}"] = None
    return list(heads)


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--corpora", type=Path, required=True, help="clone of dariusk/corpora")
    parser.add_argument("--tasks", type=int, default=8000, help="prompts from tasks x topics")
    parser.add_argument("--functions", type=int, default=2000, help="functions to be completed")
    parser.add_argument("--sources", type=Path, nargs="*", default=[], help="trees of functions")
    parser.add_argument("--made-functions", type=int, default=0, help="made up, to be completed")
    parser.add_argument("--passages", type=Path, help="dataset whose answers become passages")
    parser.add_argument("--target", help="the target, whose tokenizer --passages needs")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.passages and not args.target:
        parser.error("--passages needs --target, whose tokenizer reads the dataset")
    rng = random.Random(args.seed)
    passages = read_passages(args.passages, args.target) if args.passages else []
    prompts = task_prompts(rng, read_slots(args.corpora), passages, args.tasks)
    heads: dict[str, None] = {}
    for root in (*args.sources, Path(sysconfig.get_paths()["stdlib"])):
        heads.update(dict.fromkeys(function_heads(root)))
    for head in rng.sample(list(heads), min(args.functions, len(heads))):
        prompts.append(rng.choice(CODE).format(c=head))
    for _ in range(args.made_functions):
        prompts.append(rng.choice(CODE).format(c=made_function(rng)))
    prompts = [re.sub(r"[ \t]+\n", "\n", prompt) for prompt in dict.fromkeys(prompts)]
    rng.shuffle(prompts)
    with args.out.open("w", encoding="utf-8") as file:
        for prompt in prompts:
            file.write(json.dumps({"prompt": prompt}) + "\n")
    print(f"wrote {len(prompts)} prompts to {args.out}")


if __name__ == "__main__":
    main()
