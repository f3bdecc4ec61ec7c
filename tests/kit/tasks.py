"""Tasks of lm-evaluation-harness that need no network: YAML files and their data in one folder.

`tiny_choice` is multiple choice, `tiny_text` generates, `tiny_read` reads texts (rolling), and
`tiny` is the group of the first two.
"""

from __future__ import annotations

import json
from pathlib import Path

N = 12
FRUITS = ("apple", "plum", "pear")
COMMON = """
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}, train: {data}}}
  cache_dir: {cache}
test_split: test
fewshot_split: train
metadata: {{version: {version}}}
"""
TASKS = {
    "tiny_choice": """
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: " "
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "tiny_text": """
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 5}
filter_list:
  - {name: first, filter: [{function: regex, regex_pattern: "(\\\\w+)"}, {function: take_first}]}
  - {name: whole, filter: [{function: take_first}]}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
    "tiny_read": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{q}} {{choices[answer]}}"
metric_list:
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
""",
}
GROUP = """
group: tiny
task: [tiny_choice, tiny_text]
aggregate_metric_list:
  - {metric: acc, weight_by_size: true}
metadata: {version: 3.0}
"""


def write_tasks(folder: Path, n: int = N) -> Path:
    """The YAML files and data.jsonl, of `n` documents."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {"q": f"Person{i} eats", "choices": list(FRUITS), "answer": i * 2 % 3} for i in range(n)
    ]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for number, (name, own) in enumerate(TASKS.items()):
        about = COMMON.format(data=data, cache=folder / "cache", version=number + 1.0)
        (folder / f"{name}.yaml").write_text(f"task: {name}{about}{own}")
    (folder / "tiny.yaml").write_text(GROUP)
    return folder
