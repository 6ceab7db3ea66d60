# SPDX-License-Identifier: Apache-2.0
"""benchmarks/tree_sizes.py without engines: its tables on runs with known times."""

from benchmark_scripts import load_script

from vllm_redrafter.bench.compare import Comparison, Run, Settings
from vllm_redrafter.bench.engine_process import Generation, SpecCounters


def run(variant, group, seconds, accepted=0):
    spec = SpecCounters(drafts=4, draft_tokens=28, accepted=accepted) if accepted else None
    fields = {} if spec is None else {"spec": spec}
    result = Generation(token_ids=[[1, 2, 3, 4]], seconds=seconds, decode_seconds=seconds, steps=4,
                        texts=["text"], **fields)  # fmt: skip
    return Run(variant, 0, group, (group,), result)


def test_a_row_for_every_category():
    script = load_script("tree_sizes.py", "tree_sizes_benchmark")
    plain, tree = script.PLAIN, "4,3,7"
    runs = [run(plain, 0, 2.0), run(tree, 0, 1.0, 4), run(plain, 1, 3.0), run(tree, 1, 4.0, 1),
            run(plain, 2, 4.0), run(tree, 2, 2.0, 2)]  # fmt: skip
    result = Comparison(
        target="t", variants={plain: None, tree: {}}, settings=Settings(), baseline=plain,
        runs=runs, peak_rss_bytes={plain: 1, tree: 1}, startup_seconds={plain: 1.0, tree: 1.0},
    )  # fmt: skip
    found = script.by_category(result, ["math", "coding", "math"])
    assert found["math"] == {"prompts": 2, tree: {"ratio": 2.0, "acceptance_length": 1.75}}
    assert script.category_table(found).splitlines() == [
        "| ratio, acceptance length | prompts | 4,3,7 |",
        "| --- | --- | --- |",
        "| math | 2 | 2.00, 1.75 |",  # 6 s against 3; 6 accepted in 8 drafts
        "| coding | 1 | 0.75, 1.25 |",  # a loss stays in the table
    ]
    assert script.table(result).splitlines()[3].startswith("| 4,3,7 | 1.7 | 1.29 (2.00; ")
