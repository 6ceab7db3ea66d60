# SPDX-License-Identifier: Apache-2.0
"""Write a file of varied prompts for `vllm-redrafter data --prompts`: tasks x topics, and code.

The prompts that a small target invents are mostly requests for advice. This adds the other things
that people ask for: essays, stories, roles, reasoning, sums, extraction, explanations, and Python
functions to be completed, whose signatures and docstrings are those of Python's standard library.
No benchmark is among them.

    python examples/varied_prompts.py prompts.jsonl
"""

import argparse
import ast
import json
import random
import sysconfig
from pathlib import Path

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

TASKS = (
    "Write a short essay about {t}.",
    "Write a persuasive email to a friend about {t}.",
    "Explain {t} to a ten year old child.",
    "Explain {t} to an expert, and say where experts disagree.",
    "Write a poem of four stanzas about {t}.",
    "Write the opening scene of a story about {t}.",
    "You are a travel guide. Tell your group something surprising about {t}.",
    "Pretend to be a scientist who is interviewed about {t}. Answer three questions.",
    "Give me five facts about {t} as a numbered list.",
    "What are the advantages and disadvantages of {t}? Answer in a table.",
    "Draft an outline for a ten minute talk on {t}.",
    "Write a dialogue between two people who disagree about {t}.",
    "Summarize what is known about {t} in three sentences.",
    "Suggest three titles and a first paragraph for a blog post about {t}.",
    "Write a quiz with four questions about {t}, with the answers.",
    "Compare {t} with {u}.",
    "How are {t} and {u} connected? Think step by step.",
    "Write a product description that has to do with {t}.",
    "Translate the sentence 'I have been thinking about {t} all day' into French and Spanish.",
    "Write a JSON object that describes {t}, with at least five fields.",
    "List the most important dates and names for {t}.",
    "Correct the grammar: 'me and him was talk about {t} since two hour'.",
    "Describe {t} in the style of an old sea captain.",
    "What would happen if there were no such thing as {t}?",
    "Write a Python class that models {t}.",
    "Write an HTML page about {t} with a heading and a list.",
    "Write a SQL table for {t} and a query that counts its rows by year.",
    "A shop sells {n} items about {t} a day at {m} dollars each. How much does it take in a week?",
    "A book about {t} has {n} pages. Anna reads {m} pages a day. On which day does she finish it?",
    "There are {n} people interested in {t}, and {m} of them know {u}. What share is that?",
    "Plan a week of study about {t}, day by day.",
    "Give honest advice to somebody who is afraid of {t}.",
)

CODE = (
    "Complete this Python function:\n\n{c}",
    "Finish the following Python function. Answer with code only.\n\n```python\n{c}```",
    "{c}",
    "Write the body of this function and explain it briefly:\n\n{c}",
    "Implement this in Python:\n\n```python\n{c}\n```",
)


def task_prompts(rng: random.Random, per_task: int) -> list[str]:
    """Each task with ``per_task`` topics."""
    prompts = []
    for task in TASKS:
        for topic in rng.sample(TOPICS, per_task):
            other = rng.choice([t for t in TOPICS if t != topic])
            m = rng.randint(2, 19)
            prompts.append(task.format(t=topic, u=other, n=m + rng.randint(1, 480), m=m))
    return prompts


def function_heads(root: Path) -> list[str]:
    """``def`` line and docstring of every documented function under a directory of sources."""
    heads = {}
    for path in sorted(root.rglob("*.py")):
        if {"test", "tests", "idlelib", "lib2to3", "site-packages"} & set(path.parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("__"):
                continue
            doc = ast.get_docstring(node)
            if doc and 30 < len(doc) < 700:
                body = "\n".join(f"    {line}".rstrip() for line in doc.splitlines())
                quoted = f'    """{body.strip()}\n    """\n'
                heads[f"def {node.name}({ast.unparse(node.args)}):\n{quoted}"] = None
    return list(heads)


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--topics-per-task", type=int, default=40, help=f"at most {len(TOPICS)}")
    parser.add_argument("--functions", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    prompts = task_prompts(rng, args.topics_per_task)
    heads = function_heads(Path(sysconfig.get_paths()["stdlib"]))
    for head in rng.sample(heads, min(args.functions, len(heads))):
        prompts.append(rng.choice(CODE).format(c=head))
    rng.shuffle(prompts)
    with args.out.open("w", encoding="utf-8") as file:
        for prompt in prompts:
            file.write(json.dumps({"prompt": prompt}) + "\n")
    print(f"wrote {len(prompts)} prompts to {args.out}")


if __name__ == "__main__":
    main()
