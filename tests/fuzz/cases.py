"""The commands that make the world, and those that are run in it: who reads which file.

world.py runs the first ones, run.py the others.
"""

from __future__ import annotations

from dataclasses import dataclass

GROUPS = ("en", "zh")
COUNT = "--window 16 --batch-tokens 256 --workers 1 --quiet"
RUN = (
    "run model --facts facts -o study --eva 4 --top 20 --random-seeds 1 --batch-tokens 256"
    " --permutations 3 --bootstrap 3 --noise 500 --analyses all --cards 3 --quiet"
)
ABLATE = "ablate model study/neurons.json study/prompts.jsonl --splits eva --quiet --random-seeds 1"
ATTRIBUTE = "attribute model --top 3 --batch-tokens 256 --quiet"
COMPARE = "--intervene 2 --random-seeds 1"
PARTS = "--no-compare --kinds ffn_neuron"
KEPT = "--examples 2 --histogram 8"
NLL = f"nll model counts/neurons.json en=corpus/en.txt zh=corpus/zh.jsonl --windows 2 {COUNT}"
LAPE = "--method lape --top-rate 0.2 --filter-rate 0.5 --bar-ratio 0.5"
IDENTIFY = "--permutations 3 --bootstrap 3 --noise 500 --quiet"
KNOW = "identify knowledge --method knowledge_neurons --sets fact --quiet"
PROBE = "--labels labels.csv:y --set en --top 2 --folds 2 --random-seeds 0 --quiet"
CONTINUE = "--max-new-tokens 2 --quiet"
CONTRAST = f"contrast model adapter prompts.txt {CONTINUE}"
CHANGED = "identify contrast --method contrast --top 5 --quiet"

# What makes the world, line by line; a line that begins with ! is killed in the middle.
MADE = [
    RUN,
    f"{ATTRIBUTE} study/prompts.jsonl -o attribution --splits eva {COMPARE}",
    "identify attribution -o attribution/neurons.json --method logprob_gain --quiet",
    "report attribution -o attribution/report.html",
    f"{ATTRIBUTE} table.csv -o table --format parquet {COMPARE}",
    f"count model en=corpus/en.txt zh=corpus/zh.jsonl -o counts --moments --examples 2"
    f" --histogram 8 {COUNT}",
    f"identify counts -o counts/neurons.json {LAPE}",
    f"{NLL} -o counts",
    f"{CONTRAST} -o contrast",
    f"{CHANGED} -o contrast/neurons.json",
    f"probe model prompts.txt -o probe --neurons counts/neurons.json {PROBE}",
    *(
        f"count model en=corpus/en.txt zh=corpus/zh.jsonl -o half{n} --shard {n}/2 {KEPT} {COUNT}"
        for n in (1, 2)
    ),
    "prompts concepts -o sentences/prompts.jsonl",
    "record model sentences/prompts.jsonl -o sentences --quiet",
    f"identify sentences -o sentences/neurons.json --top 20 {IDENTIFY}",
    "ablate model sentences/neurons.json study/prompts.jsonl -o columns/effects.parquet --any-set"
    " --splits eva --random-seeds 1 --quiet",
    "export study -o exported/expertise.csv",
    "attribute model study/prompts.jsonl -o knowledge --method ig --steps 2 --splits eva --quiet",
    f"{KNOW} -o knowledge/neurons.json",
    "ablate model knowledge/neurons.json knowledge/prompts.jsonl -o knowledge/effects.csv --quiet"
    " --splits eva --random-seeds 1 --analyses matched --unrelated 2",
    "export study/prompts.jsonl -o theirs/facts.json",
    *(f"export knowledge/neurons.json -o theirs/neurons.{kind}" for kind in ("json", "jsonl")),
    "edit model knowledge/neurons.json knowledge/prompts.jsonl -o edited --quiet",
    "export contrast -o theirs/scores.pt",
    "!record model study/prompts.jsonl -o unfinished --batch-tokens 64 --quiet",
    f"!{ABLATE} -o unfinished/effects.csv --batch-tokens 64",
    f"!{ATTRIBUTE} table.csv -o unfinished-table --batch-tokens 20 {COMPARE}",
    f"!{NLL} -o unfinished-nll --batch-tokens 32",
    f"!count model en=corpus/en.txt zh=corpus/zh.jsonl -o unfinished-count {COUNT}"
    " --batch-tokens 32 --checkpoint-batches 1",
    f"!{CONTRAST} -o unfinished-contrast --batch-tokens 8 --checkpoint-batches 1",
    *(f"{ABLATE} -o part{n}/effects.csv --batch-tokens 64 --shard {n}/2" for n in (1, 2)),
    *(f"{ATTRIBUTE} table.csv -o rows{n} --batch-tokens 20 {PARTS} --shard {n}/2" for n in (1, 2)),
    "!generate model prompts.txt -o unfinished/texts.jsonl --neurons counts/neurons.json"
    f" {CONTINUE} --off en,zh --batch-tokens 8",
]


@dataclass(frozen=True)
class Case:
    """A command, and those of the files that it reads: of stages, and of users."""

    words: str
    guarded: tuple[str, ...] = ()  # a manifest or a digest of their own knows them
    given: tuple[str, ...] = ()  # nothing says what they were


def _of(folder: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{folder}/{name}" for name in names)


IDS = "count model en={0} -o out --max-tokens 200 " + COUNT
CASES = {
    "run": Case(
        RUN,
        _of("study", "prompts.jsonl", "validated.csv", "scores.safetensors", "neurons.json")
        + _of("study", "effects.csv", "accuracy.csv", "conditions.csv", "perplexity.csv")
        + _of("study", "manifest.json", "sentences.jsonl", "significance.csv", "labels.csv"),
        _of("facts", "likes_fruit.json", "lives_in.json", "works_as.json"),
    ),
    "prompts": Case(
        "prompts facts -o out/prompts.jsonl --eva 4",
        given=_of("facts", "likes_fruit.json", "lives_in.json", "works_as.json"),
    ),
    "prompts of concepts": Case(
        "prompts concepts -o out/prompts.jsonl",
        given=_of("concepts", "sense/city.json", "sense/fruit.json", "concept_list.csv"),
    ),
    "prompts of a list": Case(
        "prompts concepts/concept_list.json -o out/prompts.jsonl",
        given=("concepts/concept_list.json",),
    ),
    "record": Case(
        "record model study/prompts.jsonl -o out --quiet",
        _of("study", "prompts.jsonl", "manifest.json"),
    ),
    "record at once": Case(
        "record model study/prompts.jsonl -o out --identify --top 9 --quiet",
        _of("study", "prompts.jsonl"),
    ),
    "record again": Case(
        "record model study/prompts.jsonl -o study --force --quiet",
        _of("study", "prompts.jsonl", "manifest.json"),
    ),
    "record, unfinished": Case(
        "record model study/prompts.jsonl -o unfinished --batch-tokens 64 --quiet",
        _of("unfinished", "record.journal", "responses.safetensors"),
    ),
    "identify": Case(
        f"identify study -o out/neurons.json --top 20 {IDENTIFY}",
        _of("study", "prompts.jsonl", "validated.csv", "responses.safetensors", "manifest.json"),
    ),
    "ablate": Case(
        f"{ABLATE} -o out/effects.csv",
        _of("study", "neurons.json", "prompts.jsonl", "manifest.json"),
    ),
    "ablate sizes": Case(
        f"{ABLATE} -o out/effects.parquet --analyses sizes --sizes 3",
        ("study/scores.safetensors",),
    ),
    "ablate mean": Case(
        f"{ABLATE} -o out/effects.csv --mode mean",
        _of("study", "responses.safetensors", "validated.csv"),
    ),
    "ablate p50": Case(
        f"{ABLATE} -o out/effects.csv --mode p50",
        _of("study", "responses.safetensors", "validated.csv", "labels.csv"),
    ),
    "ablate gain": Case(
        f"{ABLATE} -o out/effects.csv --analyses gain,concepts",
        _of("study", "attribution/neurons.json", "concepts/neurons.json"),
    ),
    "ablate perplexity": Case(
        f"{ABLATE} -o out/effects.csv --analyses perplexity", ("study/sentences.jsonl",)
    ),
    "ablate, unfinished": Case(
        f"{ABLATE} -o unfinished/effects.csv --batch-tokens 64", ("unfinished/ablate.journal",)
    ),
    "report": Case(
        "report study -o out/report.html",
        _of("study", "manifest.json", "prompts.jsonl", "neurons.json", "significance.csv")
        + _of("study", "effects.csv", "accuracy.csv", "conditions.csv", "perplexity.csv")
        + _of("study", "scores.safetensors", "concepts/neurons.json", "attribution/neurons.json")
        + ("study/attribution/scores.safetensors",),
    ),
    "report as figures": Case(
        "report study --figures out/figures --width 84mm",
        _of("study", "prompts.jsonl", "neurons.json", "effects.csv", "conditions.csv"),
    ),
    "report of columns": Case(
        "report columns -o out/report.html",
        _of("columns", "effects.parquet", "accuracy.csv", "conditions.csv", "manifest.json"),
    ),
    "report of an attribution": Case(
        "report attribution -o out/report.html",
        _of("attribution", "targets.csv", "attributions.csv", "promoted.csv", "comparison.csv")
        + _of("attribution", "neurons.json", "manifest.json", "scores.safetensors"),
    ),
    "report of a table": Case(
        "report table -o out/report.html",
        _of("table", "targets.csv", "attributions.parquet", "promoted.csv"),
    ),
    "report of counts": Case(
        "report counts -o out/report.html",
        _of("counts", "manifest.json", "counts.safetensors", "neurons.json", "scores.safetensors")
        + _of("counts", "nll.csv", "nll_windows.csv"),
    ),
    "attribute": Case(
        f"{ATTRIBUTE} study/prompts.jsonl -o out --splits eva {PARTS}",
        _of("study", "prompts.jsonl", "manifest.json"),
    ),
    **{
        f"attribute {kind}": Case(
            f"{ATTRIBUTE} table.{kind} -o out {PARTS}",
            given=(f"table.{kind}",),
        )
        for kind in ("csv", "tsv", "jsonl")
    },
    "attribute facts": Case(
        f"{ATTRIBUTE} facts -o out --no-compare --kinds ffn_layer",
        given=_of("facts", "likes_fruit.json", "lives_in.json"),
    ),
    "attribute, unfinished": Case(
        f"{ATTRIBUTE} table.csv -o unfinished-table --batch-tokens 20 {COMPARE}",
        _of("unfinished-table", "attribute.journal", "gains.safetensors"),
    ),
    "identify gains": Case(
        "identify attribution -o out/neurons.json --method logprob_gain --quiet",
        _of("attribution", "targets.csv", "gains.safetensors", "manifest.json"),
    ),
    "identify counts": Case(
        f"identify counts -o out/neurons.json {LAPE}",
        _of("counts", "counts.safetensors", "manifest.json"),
    ),
    "prompts of sentences": Case(
        "prompts theirs/facts.json -o out/prompts.jsonl", given=("theirs/facts.json",)
    ),
    **{
        f"import facts, {kind}": Case(
            f"import theirs/neurons.{kind} --model model -o out/neurons.json",
            given=(f"theirs/neurons.{kind}",),
        )
        for kind in ("json", "jsonl")
    },
    "identify facts": Case(
        f"{KNOW} -o out/neurons.json",
        _of("knowledge", "ig.safetensors", "prompts.jsonl", "manifest.json"),
    ),
    "edit": Case(
        "edit model knowledge/neurons.json knowledge/prompts.jsonl -o out/edited --quiet",
        _of("knowledge", "neurons.json", "prompts.jsonl", "manifest.json"),
    ),
    "report of facts": Case(
        "report knowledge -o out/report.html",
        _of("knowledge", "facts.csv", "neurons.json", "prompts.jsonl", "completeness.csv")
        + _of("knowledge", "effects.csv", "conditions.csv", "manifest.json"),
    ),
    "import scores": Case(
        "import theirs/scores.pt --model model -o out/neurons.json --format safety",
        given=("theirs/scores.pt",),
    ),
    "merge": Case(
        "merge half1 half2 -o out",
        _of("half2", "counts.safetensors", "examples.safetensors", "histogram.safetensors")
        + ("half2/manifest.json", "half1/counts.safetensors", "half1/examples.safetensors"),
    ),
    "export counts": Case(
        "export counts -o out", _of("counts", "counts.safetensors", "manifest.json")
    ),
    "export neurons": Case(
        "export counts/neurons.json -o out/neurons.pth",
        _of("counts", "neurons.json", "manifest.json"),
    ),
    "export table": Case(
        "export sentences -o out/expertise.csv",
        _of("sentences", "responses.safetensors", "scores.safetensors", "labels.csv")
        + _of("sentences", "neurons.json", "manifest.json"),
    ),
    "import neurons": Case(
        "import lape/neurons.pth --model model -o out/neurons.json --names en,zh",
        given=("lape/neurons.pth", "model/config.json"),
    ),
    "import counts": Case(
        "import en=lape/en zh=lape/zh --model model -o out", given=_of("lape", "en", "zh")
    ),
    "nll": Case(
        f"{NLL} -o out",
        _of("counts", "neurons.json", "manifest.json"),
        _of("corpus", "en.txt", "zh.jsonl"),
    ),
    "ablate of two processes, unfinished": Case(
        f"{ABLATE} -o shared/effects.csv --batch-tokens 64",
        _of("shared", "ablate.journal", "ablate.journal.1"),
    ),
    # What of a part is damaged is left to do, so that the output is another one.
    "merge of answers": Case("merge part1 part2 -o out", given=_of("part2", "ablate.journal")),
    "merge of rows": Case(
        "merge rows1 rows2 -o out", given=_of("rows2", "attribute.journal", "gains.safetensors")
    ),
    "nll, unfinished": Case(
        f"{NLL} -o unfinished-nll --batch-tokens 32", ("unfinished-nll/nll.journal",)
    ),
    "contrast": Case(
        f"{CONTRAST} -o out",
        given=(*_of("adapter", "adapter_config.json", "adapter_model.safetensors"), "prompts.txt"),
    ),
    "contrast, unfinished": Case(
        f"{CONTRAST} -o unfinished-contrast --batch-tokens 8 --checkpoint-batches 1",
        ("unfinished-contrast/contrast.checkpoint",),
    ),
    "identify contrast": Case(
        f"{CHANGED} -o out/neurons.json",
        _of("contrast", "contrast.safetensors", "manifest.json"),
    ),
    "report of two models": Case(
        "report contrast -o out/report.html",
        _of("contrast", "contrast.safetensors", "neurons.json", "manifest.json"),
    ),
    "count, unfinished": Case(
        f"count model en=corpus/en.txt zh=corpus/zh.jsonl -o unfinished-count {COUNT}"
        " --batch-tokens 32",
        ("unfinished-count/count.checkpoint",),
    ),
    "generate": Case(
        f"generate model prompts.txt -o out/t.jsonl --neurons counts/neurons.json {CONTINUE}"
        " --off en",
        ("counts/neurons.json",),
        ("prompts.txt",),
    ),
    "generate jsonl": Case(
        f"generate model prompts.jsonl -o out/t.jsonl --neurons counts/neurons.json {CONTINUE}",
        given=("prompts.jsonl",),
    ),
    "generate steered": Case(
        f"generate model prompts.txt -o out/t.jsonl --neurons counts/neurons.json {CONTINUE}"
        " --set en",
        ("counts/counts.safetensors",),
    ),
    "probe": Case(
        f"probe model prompts.txt -o out --neurons counts/neurons.json {PROBE}",
        ("counts/neurons.json",),
        ("prompts.txt", "labels.csv"),
    ),
    "probe, applied": Case(
        "probe model prompts.txt -o out --apply probe/probe.safetensors --quiet",
        ("probe/probe.safetensors", "probe/manifest.json"),
    ),
    "look": Case(
        "look study -o out.html --model model --cards 3 --examples 2 --force --quiet",
        _of("study", "neurons.json", "significance.csv", "responses.safetensors", "prompts.jsonl")
        + _of("study", "manifest.json"),
    ),
    "look again": Case(
        "look study -o out.html --model model --cards 3 --quiet",
        _of("study", "cards.jsonl", "sets.csv"),
    ),
    "look at a corpus": Case(
        "look counts -o out.html --model model --cards 3 --examples 2 --quiet",
        _of("counts", "neurons.json", "examples.safetensors", "histogram.safetensors"),
    ),
    "effect": Case(
        "effect said.jsonl -o out/e.csv --cost costs.csv:cost",
        given=("said.jsonl", "costs.csv"),
    ),
    "generate, unfinished": Case(
        "generate model prompts.txt -o unfinished/texts.jsonl --neurons counts/neurons.json"
        f" {CONTINUE} --off en,zh --batch-tokens 8",
        ("unfinished/texts.jsonl.journal",),
    ),
    **{
        f"count {name.partition('.')[2]}": Case(
            IDS.format(f"corpus/{name}"), (), (f"corpus/{name}",)
        )
        for name in ("en.txt", "zh.jsonl", "code.jsonl.gz", "fr.parquet", "ids.pt", "ids.npy")
        + ("ids.bin",)
    },
    "count by column": Case(
        f"count model corpus/all.jsonl -o out --group-column language {COUNT}",
        given=("corpus/all.jsonl",),
    ),
}


# Those that take longest when they are not refused.
SLOW = [n for n in CASES if n.startswith(("count", "report", "run", "nll", "record", "generate"))]
SLOW += [n for n in CASES if n.endswith(", unfinished") and n not in SLOW]
