"""The commands that a report prints make the study again: every kind, with options of every stage.

Each study is made by the command line; what its report.html prints is run in a fresh folder, and
every file must have the same bytes.
"""

from __future__ import annotations

import html
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main

from relneuron.artifact.manifest import Manifest
from relneuron.artifact.neurons import NeuronFile
from relneuron.artifact.options import options_of
from relneuron.artifact.stage import command, commands, moved, placed
from relneuron.cli import main as cli
from relneuron.study.run import _whole
from relneuron.study.settings import DEMO, DemoOptions, RunOptions
from tests.kit.corpus_commands import TEXTS, call, sources, write_texts, written
from tests.kit.pairs import save_moved
from tests.kit.pictures import save as save_pictured
from tests.kit.pictures import write_lines
from tests.kit.tasks import write_tasks

# RunOptions that change how a stage runs, and not what it makes.
RUNNING = {"--force", "--quiet", "--debug", "--oom", "--workers", "--help", "--output"}
RUNNING |= {"--max-record-mib"}
RUNNING |= {"--checkpoint-seconds", "--checkpoint-batches", "--revision"}
RUNNING |= {"--tensor-parallel-size"}  # takes torchrun: methods/counts/test_in_parts.py
# Of the others it makes a part, and no results: study/test_shared.py.
RUNNING |= {"--shard"}
RUNNING |= {"--serve", "--host", "--port"}  # a server makes no file: study/test_serve.py
RUNNING |= {"--dry-run", "--tflops", "--gbps", "--json"}  # nothing is run: cli/test_plan.py
# They write no study, and a model's folder no page.
NO_STUDY = {"generate", "effect", "export", "report", "doctor", "bench", "edit", "cite", "plan"}
COUNT = "--workers 1 --quiet --batch-tokens 512"
LOAD = "--dtype bfloat16 --device cpu --backend reference"
EXACT = LOAD.replace("bfloat16", "float32")
TASK = "--tasks tiny_choice --include-path {tasks} --limit 2"
SPREAD = "--dtype float32 --device-map auto"
RELATIONS = [
    "prompts {suffixed} -o {d}/prompts.jsonl --eva 8 --seed 3 --suffix ''",
    "record {model} {d}/prompts.jsonl -o {d} --exclude-bos --batch-tokens 300 --quiet"
    f" --accept-object-prefix --attention {EXACT}",
]
IDENTIFY = "identify {d} -o {d}/neurons.json --permutations 20 --bootstrap 20 --noise 1000 --quiet"
ATTRIBUTE = "attribute {model} {facts} -o {d} --batch-tokens 300 --quiet"
# Of two prompts a fact.
GRADIENTS = "attribute {model} {d}/prompts.jsonl -o {d} --splits eva,eva2 --quiet"

STUDIES: dict[str, list[str]] = {
    "run": [
        "run {model} --facts {facts} -o {d} --eva 8 --top 40 --random-seeds 1 --quiet --attention"
        " --ends bottom"
    ],
    "run with sets beside": [
        "run {model} --facts {suffixed} -o {d} --eva 8 --top 40 --random-seeds 1 --quiet --seed 2"
        " --suffix '' --method ap --negatives 3 --permutations 20 --bootstrap 20 --noise 900"
        " --splits eva --analyses gain,sizes --sizes 5,10 --mode scale --factor 0.5"
        " --scale-at output --positions prompt --generate 3 --drop-responses --pooling last"
        " --responses memory"
        " --accept-object-prefix --cards 3"
        f" --batch-tokens 300 {EXACT}",
    ],
    "run with a rate": [
        "run {chat} --facts {facts} -o {d} --eva 8 --fdr 0.3 --random-seeds 1 --quiet"
        f" --chat-template --noise 900 --exclude-bos --mode mean --mean-of relation {SPREAD}",
        "eval {chat} -o {d} --neurons {d}/neurons.json --off lives_in --mode mean --quiet"
        f" --mean-of relation --apply-chat-template --unsafe-code {TASK} {SPREAD}",
    ],
    "stages": [
        *RELATIONS,
        f"{IDENTIFY} --fdr 0.3 --negatives 3 --seed 2 --method ap",
        "ablate {model} {d}/neurons.json {d}/prompts.jsonl -o {d}/effects.csv --splits eva,eva2,det"
        " --random-seeds 1 --analyses matched,sizes,sites,perplexity --sizes 5,10 --mode mean"
        " --mean-of relation --positions last --generate 2 --any-set"
        f" --batch-tokens 400 --quiet {EXACT}",
    ],
    "stages, other options": [
        "prompts {facts} -o {d}/prompts.jsonl --eva 8 --chat-template {chat}",
        f"record {{model}} {{d}}/prompts.jsonl -o {{d}} --pooling last --quiet {SPREAD}",
        f"{IDENTIFY} --top 30 --ends both",
        f"look {{d}} -o {{d}}/look.html --cards 5 --examples 3 --batch-tokens 300 --quiet {SPREAD}",
        "ablate {model} {d}/neurons.json {d}/prompts.jsonl -o {d}/effects.csv --mode scale"
        f" --factor -0.5 --random-seeds 0 --accept-object-prefix --quiet {SPREAD}",
        "eval {model} -o {d} --neurons {d}/neurons.json --off likes_fruit --mode scale --quiet"
        " --factor 0.5 --scale-at output --num-fewshot 1 --batch-size 2"
        f" --log-samples {TASK} --dtype float32 --device cpu",
    ],
    "prompts of elsewhere, gains beside": [
        "record {model} {prompts} -o {d} --quiet",
        f"{IDENTIFY} --top 30",
        "attribute {model} {d}/prompts.jsonl -o {d} --splits det --kinds ffn_neuron --no-compare"
        " --quiet",
        "identify {d} -o {d}/gain.json --method logprob_gain --top 20 --quiet",
        "ablate {model} {d}/neurons.json {d}/prompts.jsonl -o {d}/effects.csv --random-seeds 1"
        " --quiet",
    ],
    "prompts recorded and ranked at once": [
        "record {model} {prompts} -o {d} --quiet --identify --responses memory --ends both --seed 2"
        f" --top 30 --negatives 3 --permutations 20 --bootstrap 20 --noise 900 {EXACT}",
        "ablate {model} {d}/neurons.json {d}/prompts.jsonl -o {d}/effects.csv --random-seeds 1"
        " --quiet",
    ],
    "prompts ranked at once by a rate": [
        "record {model} {prompts} -o {d} --quiet --identify --fdr 0.3 --noise 900 --pooling last",
        "ablate {model} {d}/neurons.json {d}/prompts.jsonl -o {d}/effects.csv --random-seeds 0"
        " --quiet",
    ],
    "attribution": [
        f"{ATTRIBUTE} --splits det,eva --top 20 --mode exact --own-norm --key up --query-of ffn"
        f" --no-center-keys --query-units 5 --keep known --intervene 3 --random-seeds 1 {LOAD}",
        "identify {d} -o {d}/neurons.json --method logprob_gain --kept-only --quiet",
    ],
    "attribution without comparison": [
        f"{ATTRIBUTE} --kinds ffn_neuron,head,query_layer --tolerance 1e-3 --norm-bias"
        " --no-compare --format parquet --target prediction",
    ],
    "attribution of a table": [
        f"attribute {{model}} {{table}} -o {{d}} --strict --quiet {SPREAD}",
        "attribute {model} {table} -o {d} --method ig --steps 3 --schedule midpoint --answer mean"
        " --baseline replaced --extend argmax --site act --precision float64 --quiet",
        "attribute {model} {table} -o {d} --method relevance --of probability --quiet"
        " --rules conservative",
    ],
    "knowledge neurons": [
        "prompts {facts} -o {d}/prompts.jsonl --eva 8",
        f"{GRADIENTS} --method ig --steps 3",
        "identify {d} -o {d}/neurons.json --method knowledge_neurons --kind absolute"
        " --threshold 1e-5 --share 0.3 --negative-prompts 2 --seed 3",
        "ablate {model} {d}/neurons.json {d}/prompts.jsonl -o {d}/effects.csv --random-seeds 1"
        " --mode scale --factor 2 --scale-at output --positions last --unrelated 3 --quiet",
    ],
    "query-relevant neurons": [
        "prompts {several} -o {d}/prompts.jsonl --eva 8 --choices 3 --choose-from 2 --seed 2",
        f"{GRADIENTS} --method ig --steps 3",
        "identify {d} -o {d}/neurons.json --method qrnca --sets fact --common 0.9 --keep-common"
        " --decimals 8 --top 5 --threshold 0.1",
        "identify {d} -o {d}/stepped.json --method knowledge_neurons --stepped",
        "ablate {model} {d}/stepped.json {d}/prompts.jsonl -o {d}/effects.csv --random-seeds 0"
        " --choose acc_norm --any-set --quiet",
    ],
    "query localization": [
        "prompts {facts} -o {d}/prompts.jsonl --eva 8",
        f"{GRADIENTS} --method ig --steps 3",
        f"{GRADIENTS} --method relevance",
        "identify {d} -o {d}/neurons.json --method query_localization --consistency cs1 --cut 0.2"
        " --neurons cas --cas-share 0.4 --mean-weight 0.6 --deviation-weight 0.2 --unbiased",
        "identify {d} -o {d}/shares.json --method relevance --specific 0.4 --sums absolute --top 9",
    ],
    "consistency by Otsu": [
        "prompts {facts} -o {d}/prompts.jsonl --eva 8",
        f"{GRADIENTS} --method ig --steps 3",
        "identify {d} -o {d}/neurons.json --method query_localization --otsu",
        "ablate {model} {d}/neurons.json {d}/prompts.jsonl -o {d}/effects.csv --random-seeds 1"
        " --mode patch --from {donor} --splits eva --unrelated 2 --any-set --quiet",
    ],
    "corpus": [
        "count {model} en={texts}/en.txt {other} -o {d} --window 24 --moments --sites act,up"
        f" --threshold 0.1 --max-tokens 600 --packing documents --bos window --exclude-bos {LOAD}"
        f" --text-column body --examples 2 --histogram 16 {COUNT}",
        "identify {d} -o {d}/neurons.json --method lape --site up --groups en,zh --top-rate 0.2"
        " --filter-rate 0.6 --bar-ratio 0.7 --precision float64",
        f"look {{d}} -o {{d}}/two.html --neurons 1.up.3,0.act.7 --model {{model}} --quiet {LOAD}",
        "nll {model} {d}/neurons.json en={texts}/en.txt {other} -o {d} --windows 4 --window 20"
        " --packing documents --bos window --random-sets 2 --text-column body"
        f" {COUNT} {LOAD}",
    ],
    "corpus with a column of groups": [
        "count {model} {all} -o {d} --group-column language --text-column body --groups en,zh"
        f" --window 24 --boundaries position --moments {COUNT} {SPREAD}",
        "identify {d} -o {d}/neurons.json --method random --top 20 --seed 4",
        "eval {model} -o {d} --neurons {d}/neurons.json --off en --set zh --counts {d} --quiet"
        f" {TASK} {SPREAD}",
        "nll {model} {d}/neurons.json {all} -o {d} --group-column language --text-column body"
        f" --join '\\n\\n' --groups zh,en --windows 4 --window 24 {COUNT} {SPREAD}",
        "probe {model} {prompts} -o {d} --neurons {d}/neurons.json --set en --top 3 --folds 2"
        " --labels {labels}:y --mask s --above 0.5 --seed 3 --random-seeds 1 --quiet"
        f" --template 'Q: {{{{prompt}}}}' --batch-tokens 60 {EXACT}",
        "probe {model} {prompts} -o {d} --apply {d}/probe.safetensors --quiet"
        f" --labels {{labels}}:y --mask s --template 'Q: {{{{prompt}}}}' {SPREAD}",
    ],
    "corpus of token ids": [
        f"count {{model}} a={{ids}} b={{ids2}} -o {{d}} --ids-dtype int32 --window 8 {COUNT}",
        "identify {d} -o {d}/best.json --method probability --top 20",
        f"nll {{model}} {{d}}/best.json a={{ids}} -o {{d}} --ids-dtype int32 --window 8 {COUNT}",
    ],
    "corpus in a folder of the study": [
        f"count {{model}} {{d}}/texts/../texts -o {{d}} --group-column language {COUNT}"
        " --text-column body --window 24",
    ],
    "shards": [
        f"count {{model}} {{three}} -o {{d}}-a --shard 1/2 --window 24 --examples 2 {COUNT}",
        f"count {{model}} {{three}} -o {{d}}-b --shard 2/2 --window 24 --examples 2 {COUNT}",
        "merge {d}-a {d}-b -o {d}",
        "identify {d} -o {d}/neurons.json --method lape --top-rate 0.2 --filter-rate 0.6"
        " --bar-ratio 0.6",
    ],
    "imported counts": [
        "import en={imported}/en zh={imported}/zh --model {model} -o {d}",
        "identify {d} -o {d}/neurons.json --method lape --top-rate 0.2 --filter-rate 0.6"
        " --bar-ratio 0.6",
    ],
    "imported snapshots": [
        "import {imported}/ad_1.log {imported}/med_1.log --model {llava} -o {d} --format mmneuron",
        "identify {d} -o {d}/neurons.json --method lape --top-rate 0.2 --filter-rate 0.6"
        " --bar-ratio 0.6",
    ],
    "sets of modules": [
        "import {imported}/llava-lang {imported}/llava-vision --model {llava} -o {d}/neurons.json"
        " --format mmneuron --names doc,med",
        "ablate {llava} {d}/neurons.json {d}/prompts.jsonl -o {d}/effects.csv --random-seeds 1"
        " --module-sets --quiet",
    ],
    "pictures": [
        "count {llava} doc={pictures}/doc.jsonl med={pictures}/med.jsonl -o {d}"
        " --module language,vision --image-column image --max-records 3 --quiet",
        "identify {d} -o {d}/neurons.json --method probability --module vision --top 4",
    ],
    "imported neurons": [
        "import {imported}/neurons.pth --model {model} -o {d}/neurons.json --names en,zh",
        f"nll {{model}} {{d}}/neurons.json {{three}} -o {{d}} --windows 3 --window 24 {COUNT}",
    ],
    "imported scores": [
        "import {imported}/scores.pt --model {model} -o {d}/neurons.json --format safety --top 6"
        " --without-layers 0",
        f"nll {{model}} {{d}}/neurons.json {{three}} -o {{d}} --windows 3 --window 24 {COUNT}",
    ],
    "two models": [
        "contrast {model} {donor} {prompts} -o {d} --completion-by b --positions predicting"
        " --max-new-tokens 3 --template 'So {{prompt}}' --batch-tokens 300 --quiet"
        f" {EXACT}",
        "identify {d} -o {d}/neurons.json --method contrast --sizes 5,20 --groups likes_fruit"
        " --without-layers 0",
        "eval {model} -o {d} --neurons {d}/neurons.json --mode mean --moments {d} --quiet"
        f" --random-seeds 1 {TASK}",
    ],
    "two models, neurons within others": [
        "contrast {model} {donor} {prompts} -o {d} --tokens prompt --quiet",
        "identify {d} -o {d}/neurons.json --method contrast --rate 0.5 --from-rank 2 --by-group"
        " --within {neurons}",
    ],
    "shards of two models": [
        f"contrast {{model}} {{donor}} {{prompts}} -o {{d}}-a --tokens last --shard 1/2 {SPREAD}"
        " --batch-tokens 300 --quiet",
        f"contrast {{model}} {{donor}} {{prompts}} -o {{d}}-b --tokens last --shard 2/2 {SPREAD}"
        " --batch-tokens 300 --quiet",
        "merge {d}-a {d}-b -o {d}",
        "identify {d} -o {d}/neurons.json --method contrast --top 4 --without {neurons}",
    ],
    "demo": [
        "demo -o {d} --analyses perplexity --top 20 --permutations 0 --bootstrap 0 --noise 0"
        " --random-seeds 0 --quiet",
    ],
}


@pytest.fixture(scope="module")
def given(model_folder: Path, fact_folder: Path, tmp_path_factory: Any) -> dict[str, str]:
    """What the commands of a study are given, by its name in braces."""
    folder: Path = tmp_path_factory.mktemp("given")
    write_texts(folder)
    spaced = folder / "two words"
    spaced.mkdir()
    lines = [json.dumps({"body": text}, ensure_ascii=False) for text in TEXTS["zh"]]
    (spaced / "a.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (spaced / "b.jsonl").write_text("\n".join(lines[:9]) + "\n", encoding="utf-8")
    for name in ("ids", "ids2"):
        values = torch.arange(400, dtype=torch.int32) * 7 % 90
        (folder / f"{name}.bin").write_bytes(values.numpy().tobytes())
    assert call("prompts", fact_folder, "-o", folder / "prompts.jsonl", "--eva", 8) == 0
    asked = (folder / "prompts.jsonl").read_text().splitlines()
    labels = [f"s,{json.loads(line)['id']},{i % 2}" for i, line in enumerate(asked)]
    (folder / "labels.csv").write_text("\n".join(["mask,id,y", *labels]) + "\n")
    suffixed = folder / "suffixed"
    suffixed.mkdir()
    for path in fact_folder.iterdir():
        data = json.loads(path.read_text())
        for key in ("prompt_templates", "prompt_templates_zs"):
            data[key] = [f"{template}? Answer:" for template in data[key]]
        (suffixed / path.name).write_text(json.dumps(data))
    several = folder / "several"
    several.mkdir()
    for stem in ("likes_fruit", "lives_in"):  # of several answers
        shutil.copy(fact_folder / f"{stem}.json", several)
    rows = ["prompt,answer,type"]
    for i, answer in enumerate(["apple", "plum", "pear"] * 4):
        rows.append(f"Person{i} eats? Answer:,{answer},fruit")
    (folder / "facts.csv").write_text("\n".join(rows) + "\n")
    lapes = folder / "imported"
    lapes.mkdir()
    index = [[torch.tensor([1, 5]), torch.tensor([7])], [torch.tensor([2]), torch.tensor([3])]]
    torch.save(index, lapes / "neurons.pth")
    torch.manual_seed(0)
    scores = torch.rand(1, 48)
    order = scores[0].argsort(descending=True)
    ranks = torch.stack([torch.zeros_like(order), order], 1)
    torch.save((scores, ranks, *torch.rand(4, 1, 48).clone().unbind()), lapes / "scores.pt")
    for name in ("en", "zh"):
        counts = {"n": 1000, "over_zero": torch.randint(0, 1000, (2, 48))}
        torch.save(counts, lapes / name)
    save_pictured("llava", folder / "llava")
    sizes = {"lang": (2, 48), "vision": (3, 40), "mmproj": (1, 32)}
    for name in ("ad", "med"):
        snapshot: dict[str, Any] = {}
        for module, size in sizes.items():
            snapshot[f"{module}_log"] = torch.randint(0, 1000, size, dtype=torch.int32)
            snapshot[f"{module}_value"] = torch.rand(size, dtype=torch.float64)
            snapshot[f"{module}_len"] = torch.tensor(1000)
        torch.save(snapshot, lapes / f"{name}_1.log")
    for module in ("lang", "vision"):
        of_layer = [torch.tensor([1, 7]), torch.tensor([3]), torch.tensor([0, 2])]
        torch.save([of_layer[: sizes[module][0]]] * 2, lapes / f"llava-{module}")
    write_lines(folder / "pictures", "med", 4, first=4)
    lines = write_lines(folder / "pictures", "doc", 4).read_text().splitlines()
    asked = [
        json.loads(line) | {"group": g} for line, g in zip(lines, ["doc", "med"] * 2, strict=True)
    ]
    asked = [line | {"answers": ["a", "b"]} for line in asked]
    (folder / "pictures" / "prompts.jsonl").write_text("\n".join(map(json.dumps, asked)) + "\n")
    shutil.copytree(model_folder, folder / "chat")
    (folder / "chat" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    shape = {"layers": 2, "width": 48, "hidden": 32}
    some = [(layer, "gate", i, 1.0) for layer in (0, 1) for i in range(9)]
    NeuronFile(shape, "ap", {"some": some}, {}).write(folder / "neurons.json")
    return {
        "model": str(model_folder),
        "neurons": str(folder / "neurons.json"),
        "donor": str(save_moved(model_folder, folder / "donor")),
        "chat": str(folder / "chat"),
        "facts": str(fact_folder),
        "suffixed": str(suffixed),
        "several": str(several),
        "texts": str(folder),
        "other": shlex.quote(f"zh={spaced}"),
        "all": str(folder / "all.jsonl"),
        "three": shlex.join(sources(folder)),
        "ids": str(folder / "ids.bin"),
        "ids2": str(folder / "ids2.bin"),
        "prompts": str(folder / "prompts.jsonl"),
        "labels": str(folder / "labels.csv"),
        "table": str(folder / "facts.csv"),
        "imported": str(lapes),
        "llava": str(folder / "llava"),
        "pictures": str(folder / "pictures"),
        "tasks": str(write_tasks(folder / "tasks", 4)),
    }


def printed(report: Path) -> str:
    """The commands of a report's page."""
    text = report.read_text(encoding="utf-8")
    found = re.search(r"<h3>Commands</h3>.*?<pre>(.*?)</pre>", text, re.DOTALL)
    assert found
    return html.unescape(found[1])


def run_all(script: str) -> None:
    for line in script.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words and words[0] == "relneuron":
            assert call(*words[1:]) == 0, line


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*makes a token of the space:UserWarning")
@pytest.mark.parametrize("kind", STUDIES)
def test_printed_commands_make_the_study_again(
    kind: str, given: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, again = tmp_path / "one" / "study", tmp_path / "two" / "other"
    if kind == "demo":
        again = study  # finished from other inputs, it would be refused; a second one takes long
    for folder in {study, again}:
        folder.parent.mkdir()
        if kind == "sets of modules":
            shutil.copytree(given["pictures"], folder)
        if "folder of the study" in kind:
            (folder / "texts").mkdir(parents=True)
            (folder / "texts" / "all.jsonl").write_bytes(Path(given["all"]).read_bytes())
    lines = [f"relneuron {line}".format(**given, d=study) for line in STUDIES[kind]]
    run_all("\n".join([*lines, f"relneuron report {study} -o {study}/report.html --force"]))
    script = printed(study / "report.html")
    assert str(study) not in script and "relneuron report STUDY" in script
    # From any folder.
    monkeypatch.chdir(again.parent)
    if kind not in ("run", "run with a rate"):  # printed stage by stage
        assert script.count("relneuron ") == len(lines) + 1, script
    before = written(study)
    run_all(script.replace("STUDY", str(again)).replace("report ", "report --force "))
    after = written(again)
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] == []


def test_every_option_of_every_stage_is_tried() -> None:
    """A stage's new option belongs into its command, and here."""
    group: Any = typer.main.get_command(cli.app)
    lines = [shlex.split(line) for study in STUDIES.values() for line in study]
    stages = {line[0] for line in lines}
    assert stages == {*group.commands} - NO_STUDY
    for stage in stages - {"demo"}:
        tried = {word for line in lines if line[0] == stage for word in line}
        for param in group.commands[stage].params:
            names = {name for name in (*param.opts, *param.secondary_opts) if name[:2] == "--"}
            if names == {"--chat-template"}:  # the tiny models have none
                continue
            assert not names or names & (tried | RUNNING), f"{stage} {names}"


def test_a_command_made_by_hand_after_run_overwrites_what_run_made() -> None:
    whole = command("run", "m", "-o", "STUDY", facts="f")
    stages = {stage: {"commands": whole} for stage in ("prompts", "record", "identify")}
    stages["ablate"] = {"commands": command("ablate", "m", "-o", "STUDY/effects.csv", sizes=[])}
    assert commands({"stages": stages | {"attribute": {"commands": []}}}) == [
        *("relneuron run m -o STUDY \\", "    --facts f"),
        *("relneuron ablate m -o STUDY/effects.csv \\", "    --force"),
        "# attribute: made from Python, or within another study",
        "relneuron report STUDY -o STUDY/report.html",
    ]


def test_paths_within_the_study_are_named_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    study = Path("a") / "s"
    assert placed(study / "x" / ".." / "n.json", study) == "STUDY/n.json"
    assert placed(tmp_path / "a" / "s", study) == "STUDY"
    assert placed("a/texts", study) == "a/texts"
    monkeypatch.chdir(tmp_path / "a" if (tmp_path / "a").mkdir() is None else tmp_path)
    assert placed("s/n.json", Path("s")) == "STUDY/n.json"
    words = ["count", "m", "en=STUDY/t.txt", "x=STUDYING", "-o", "STUDY.2"]
    moved_to = ["count", "m", "en=STUDY.1/t.txt", "x=STUDYING", "-o", "STUDY.1.2"]
    assert moved([words], "STUDY.1") == [moved_to]


def test_the_demo_names_its_options(tmp_path: Path) -> None:
    params = typer.main.get_command(cli.app).commands["demo"].params  # type: ignore[attr-defined]
    names = {option for param in params for option in param.opts if option[:2] == "--"} - RUNNING
    assert names == {f"--{key.replace('_', '-')}" for key in options_of(DemoOptions)}
    facts = tmp_path / "facts"
    words = _whole(DEMO, "m", facts, tmp_path, RunOptions(top=20))[0]
    assert words[:5] == ["demo", "-o", "STUDY", "--top", "20"]
    assert words[words.index("--analyses") + 1] == "main"


def test_a_manifest_names_no_output(given: dict[str, str], tmp_path: Path) -> None:
    study = tmp_path / "study"
    run_all("\n".join(f"relneuron {x}".format(**given, d=study) for x in STUDIES["run"]))
    assert str(tmp_path) not in (study / "manifest.json").read_text()
    assert Manifest(study).data["stages"]["record"]["commands"][0][:2] == ["record", given["model"]]
