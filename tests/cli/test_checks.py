"""Options that would do nothing: each command refuses them, and names where they do something.

Nothing is read or written for that; the folders that are named here are not there.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from relneuron.artifact.options import Options, options_of
from relneuron.artifact.stage import load
from relneuron.cli.flags import Command
from relneuron.cli.main import app, stages
from relneuron.methods import attributions, rankings
from tests.kit.corpus_commands import check_refused

# What each `identify --method` takes.
METHODS = {name: [*options_of(ranking.options)] for name, ranking in rankings().items()}

GIVEN = {
    "top": 5,
    "ends": "both",
    "fdr": 0.01,
    "negatives": 4,
    "permutations": 3,
    "bootstrap": 3,
    "noise": 10,
    "seed": 0,
    "kept_only": None,
    "site": "act",
    "groups": "en",
    "top_rate": 0.01,
    "filter_rate": 0.95,
    "bar_ratio": 0.95,
    "precision": "float32",
    "module": "all",
    "sets": "fact",
    "threshold": 0.1,
    "kind": "adaptive",
    "share": 0.5,
    "stepped": None,
    "negative_prompts": 3,
    "common": 0.3,
    "keep_common": None,
    "decimals": 6,
    "consistency": "cs2",
    "cut": 0.3,
    "otsu": None,
    "neurons": "cas",
    "cas_share": 0.3,
    "mean_weight": 0.7,
    "deviation_weight": 0.3,
    "unbiased": None,
    "specific": 0.5,
    "sums": "positive",
    "rate": 0.05,
    "sizes": "5,10",
    "from_rank": 3,
    "without_layers": "0",
    "by_group": None,
    "within": "n.json",
    "without": "n.json",
}


def flag(name: str) -> list[object]:
    """An option of identify on the command line, with a value where it takes one."""
    value = GIVEN[name]
    return [f"--{name.replace('_', '-')}", *([] if value is None else [value])]


def test_every_option_of_identify_is_of_some_method() -> None:
    """An option of `identify` is one of a method's."""
    [identify] = [c for c in app.registered_commands if c.name == "identify"]
    general = {"folder", "output", "method", "force", "quiet", "debug", "max_record_mib"}
    options = {*identify.callback.__annotations__} - general
    assert options == {name for taken in METHODS.values() for name in taken} == {*GIVEN}


@pytest.mark.parametrize("method", METHODS)
def test_identify_refuses_the_options_of_other_methods(
    relneuron: Any, tmp_path: Path, method: str
) -> None:
    words = ["identify", tmp_path / "d", "-o", tmp_path / "n.json", "--method", method]
    for name in GIVEN:
        code, out, err = relneuron(*words, *flag(name))
        shown = flag(name)[0]
        if name in METHODS[method]:
            assert f"takes no {shown}" not in err
            continue
        lines = err.splitlines()
        assert code == 2 and out == "" and len(lines) == 2
        assert lines[0] == f"error: --method {method} takes no {shown}"
        takers = [other for other, taken in METHODS.items() if name in taken]
        assert all(re.search(rf"\b{other}\b", lines[1]) for other in takers)
    assert not list(tmp_path.iterdir())


def test_an_unknown_method_names_all(relneuron: Any, tmp_path: Path) -> None:
    for method in ("lap", "", "LAPE"):
        words = ["identify", tmp_path, "-o", tmp_path / "n.json", "--method", method]
        fix = check_refused(relneuron, tmp_path, f"unknown method {method!r}", *words)
        assert fix == f"fix:   use {', '.join(METHODS)}"


MODEL = ["no-such/model"]
RUN = ["run", *MODEL, "--facts", "f", "-o", "o"]
ABLATE = ["ablate", *MODEL, "n.json", "p.jsonl", "-o", "e.csv"]
ATTRIBUTE = ["attribute", *MODEL, "p.jsonl", "-o", "a"]
IG = [*ATTRIBUTE, "--method", "ig"]
IDENTIFY = ["identify", "d", "-o", "n.json", "--method"]
EDIT = ["edit", *MODEL, "n.json", "p.jsonl", "-o", "edited"]
COUNT = ["count", *MODEL, "en=a.txt", "-o", "c"]
CONTRAST = ["contrast", *MODEL, *MODEL, "p.jsonl", "-o", "c"]
GENERATE = ["generate", *MODEL, "p.txt", "--neurons", "n.json", "-o", "g.jsonl"]
NLL = ["nll", *MODEL, "n.json", "en=a.txt", "-o", "c"]
EVAL = ["eval", *MODEL, "--neurons", "n.json", "--tasks", "t", "-o", "o"]
EFFECT = ["effect", "o.jsonl", "-o", "e.csv", "--cost", "c.csv:cost"]
APPLY = ["probe", *MODEL, "p.jsonl", "-o", "o", "--apply", "probe.safetensors"]
LABELLED = (("--above", "2"), ("--mask", "donor"))
FITTED = (
    *(("--neurons", "n.json"), ("--set", "s"), ("--top", "5"), ("--folds", "3")),
    *(("--seed", "1"), ("--random-seeds", "2")),
)
JUDGED = (
    *(("--label", "1"), ("--template", "{output}"), ("--batch-tokens", "8")),
    *(("--dtype", "float16"), ("--device", "cuda"), ("--shard", "1/2")),
)
PATCH = ["--off", "donor", "--mode", "patch", "--from", "b"]
EDITS = (("--old-factor", "2"), ("--new-factor", "2"), ("--embedding", "input"))
STRAY: list[tuple[list[str], str, str]] = [
    (["report", "d", "-o", "r.html", "--width", "3in"], "--width", "with --figures FOLDER"),
    (["report", "d", "-o", "r.html", "--format", "svg"], "--format", "with --figures FOLDER"),
    (["demo", "--analyses", "main", "--sizes", "5"], "--sizes", "with --analyses sizes"),
    ([*RUN, "--sizes", "5"], "--sizes", "with --analyses sizes"),
    ([*GENERATE, "--top-k", "5"], "--top-k", "with --temperature"),
    ([*GENERATE, "--seeds", "5"], "--seeds", "with --temperature"),
    (
        [*GENERATE, "--measure", "exact", "--anls-threshold", "1"],
        "--anls-threshold",
        "with --measure anls",
    ),
    ([*RUN, "--mean-of", "relation"], "--mean-of", "with --mode mean"),
    ([*RUN, "--pooling", "last", "--exclude-bos"], "--exclude-bos", "with --pooling mean"),
    (
        ["record", *MODEL, "p.jsonl", "-o", "o", "--pooling", "last", "--exclude-bos"],
        "--exclude-bos",
        "with --pooling mean",
    ),
    ([*RUN, "--responses", "memory"], "--responses", "with --drop-responses"),
    *(
        (["record", *MODEL, "p.jsonl", "-o", "o", *words], words[0], "with --identify")
        for words in (
            *(("--responses", "memory"), ("--top", "5"), ("--ends", "both"), ("--fdr", "0.1")),
            *(("--negatives", "2"), ("--permutations", "9"), ("--bootstrap", "9")),
            *(("--noise", "90000"), ("--seed", "1")),
        )
    ),
    ([*ABLATE, "--analyses", "sites", "--sizes", "5"], "--sizes", "with --analyses sizes"),
    ([*ABLATE, "--mode", "zero", "--mean-of", "relation"], "--mean-of", "with --mode mean"),
    (
        [*ABLATE, "--generate", "5", "--accept-object-prefix"],
        "--accept-object-prefix",
        "without --generate and --choose",
    ),
    ([*ABLATE, "--generate", "5", "--choose", "acc"], "--choose", "without --generate"),
    ([*IG, "--extend", "argmax"], "--extend", "with --answer mean or sum"),
    (
        [*IG, "--target", "prediction", "--answer", "mean"],
        "--answer",
        "with --target answer",
    ),
    ([*ATTRIBUTE, "--no-compare", "--intervene", "5"], "--intervene", "with --compare"),
    ([*ATTRIBUTE, "--no-compare", "--random-seeds", "5"], "--random-seeds", "with --compare"),
    (
        [*ATTRIBUTE, "--no-compare", "--kinds", "head", "--query-units", "5"],
        "--query-units",
        "with --compare or --kinds query_layer,query_ffn_neuron",
    ),
    ([*ATTRIBUTE, "--key", "up"], "--key", "with --query-of ffn"),
    ([*ATTRIBUTE, "--mode", "exact", "--tolerance", "1"], "--tolerance", "with --mode certified"),
    (
        [*COUNT, "--checkpoint-batches", "1", "--checkpoint-seconds", "1"],
        "--checkpoint-seconds",
        "without --checkpoint-batches",
    ),
    ([*NLL, "--packing", "documents", "--join", " "], "--join", "with --packing packed"),
    ([*GENERATE, "--counts", "c"], "--counts", "with --set"),
    *(
        ([*CONTRAST, "--tokens", "last", option, value], option, "with --tokens completion")
        for option, value in (
            ("--completion-by", "b"),
            ("--positions", "predicting"),
            ("--max-new-tokens", "5"),
        )
    ),
    (
        [*CONTRAST, "--checkpoint-batches", "1", "--checkpoint-seconds", "1"],
        "--checkpoint-seconds",
        "without --checkpoint-batches",
    ),
    ([*GENERATE, "--moments", "c"], "--moments", "with --mode mean or noise"),
    ([*EVAL, "--moments", "c"], "--moments", "with --mode mean"),
    ([*EVAL, "--mean-of", "relation"], "--mean-of", "with --mode mean, without --moments"),
    ([*EVAL, "--scale-at", "output"], "--scale-at", "with --mode scale"),
    ([*EVAL, "--counts", "c"], "--counts", "with --set"),
    ([*EVAL, "--off", "clean", "--random-seeds", "2"], "--random-seeds", "with a set in --off"),
    *(
        ([*GENERATE, "--off", "en", "--mode", "mean", option, "2"], option, "with --mode noise")
        for option in ("--noise", "--noise-seed")
    ),
    ([*GENERATE, "--random-seeds", "2"], "--random-seeds", "with a set in --off"),
    ([*GENERATE, *PATCH, "--lens", "2"], "--lens", "without --from"),
    (
        ["import", "en=a.pth", "--model", "m", "-o", "o", "--names", "en"],
        "--names",
        "with a .neuron.pth",
    ),
    ([*RUN, "--scale-at", "output"], "--scale-at", "with --mode scale"),
    ([*ABLATE, "--scale-at", "output"], "--scale-at", "with --mode scale"),
    (["prompts", "f", "-o", "p.jsonl", "--choose-from", "5"], "--choose-from", "with --choices"),
    *(([*EDIT, option, value], option, "with --to") for option, value in EDITS),
    *(([*APPLY, option, value], option, "without --apply") for option, value in FITTED),
    *(([*APPLY, option, value], option, "with --labels") for option, value in LABELLED),
    *(
        ([*EFFECT, option, value], option, "with a classifier as --cost")
        for option, value in JUDGED
    ),
    (
        [*IDENTIFY, "knowledge_neurons", "--stepped", "--share", "0.9"],
        "--share",
        "without --stepped",
    ),
    ([*IDENTIFY, "query_localization", "--otsu", "--cut", "0.9"], "--cut", "without --otsu"),
    (
        [*IDENTIFY, "query_localization", "--neurons", "query", "--cas-share", "0.9"],
        "--cas-share",
        "with --neurons cas",
    ),
    (["bench", "--quick", "--full"], "--quick", "without --full"),
    (["bench", "logprob_gain", "--dtype", "float32"], "--dtype", "with the op swiglu_stats"),
    (["cite", "--force"], "--force", "with -o"),
    (["bench", "--with", "mine:op"], "--with", "with an OP"),
    (["bench", "average_precision", "--tokens", "8"], "--tokens", "with the op swiglu_stats"),
    (["doctor", "--revision", "main"], "--revision", "with a MODEL"),
    (["doctor", "--dry-run"], "--dry-run", "with a MODEL"),
    *(
        (["doctor", *MODEL, option, value], option, "with --dry-run")
        for option, value in (
            ("--memory", "0=3GB"),
            ("--device-map", "auto"),
            ("--dtype", "float16"),
            ("--tensor-parallel-size", "2"),
        )
    ),
    (["look", "d", "-o", "p.html", "--host", "::1"], "--host", "with --serve"),
    (["look", "d", "-o", "p.html", "--port", "80"], "--port", "with --serve"),
    (
        ["look", "d", "-o", "p.html", "--neurons", "1.up.3", "--cards", "4"],
        "--cards",
        "with neurons of sets",
    ),
    (
        [*IDENTIFY, "lape", "--top", "5", "--top-rate", "0.5"],
        "--top-rate",
        "without --top",
    ),
    (
        [*IDENTIFY, "contrast", "--top", "5", "--rate", "0.5"],
        "--rate",
        "without --top and --sizes",
    ),
    ([*IDENTIFY, "contrast", "--sizes", "5", "--top", "4"], "--top", "without --sizes"),
]


@pytest.mark.parametrize(
    ("words", "option", "where"), STRAY, ids=lambda v: v[0] if isinstance(v, list) else v
)
def test_an_option_that_would_do_nothing_is_refused(
    relneuron: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    option: str,
    where: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    cause = f"{option} does something only {where}"
    fix = check_refused(relneuron, tmp_path, cause, *words)
    assert option in fix and where in fix
    assert relneuron(*words)[0] == 2
    # As a default the same option is no mistake: whatever fails then is another thing.
    place = words.index(option)
    n = 1 if option in ("--exclude-bos", "--accept-object-prefix", "--quick") else 2
    if words[0] not in ("demo", "bench", "doctor"):
        assert "does something only" not in relneuron(*words[:place], *words[place + n :])[2]


def test_a_default_may_be_given(relneuron: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """As in a command that a report prints with all that a stage was made with."""
    monkeypatch.chdir(tmp_path)
    for words in (
        [*ABLATE, "--mean-of", "all"],
        [*ATTRIBUTE, "--key", "gate", "--no-compare", "--intervene", "10", "--random-seeds", "3"],
        [*ATTRIBUTE, "--mode", "exact", "--tolerance", "1e-5"],
    ):
        assert "does something only" not in relneuron(*words)[2]


def test_every_rule_is_tried() -> None:
    """Each option that counts only beside others, of each command that takes it."""
    tried = {(words[0], option) for words, option, _ in STRAY}
    classes = {"identify": [ranking.options for ranking in rankings().values()]}
    classes["attribute"] = [one.options for one in attributions().values()]
    for stage in stages():
        hints = inspect.signature(load(stage.run), eval_str=True).parameters.values()
        found = [p.annotation for p in hints if isinstance(p.annotation, type)]
        classes.setdefault(stage.name, [c for c in found if issubclass(c, Options)])
    rules = {
        (name, says.flag)
        for name, found in classes.items()
        for cls in found
        for _, says, _ in options_of(cls).values()
        if says.only is not None
    }
    assert rules - tried == {("attribute", "--query-of")}
    assert all(command.cls is Command for command in app.registered_commands)


def test_a_corpus_refuses_options_of_other_files(relneuron: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Rome\n")
    (tmp_path / "a.jsonl").write_text('{"text": "Rome"}\n')
    start = ["count", tmp_path / "no model", "-o", tmp_path / "o"]
    words = [*start, f"en={tmp_path / 'a.txt'}", "--text-column", "body"]
    check_refused(relneuron, tmp_path, "--text-column, but no file with fields", *words)
    words = [*start, f"en={tmp_path / 'a.jsonl'}", "--ids-dtype", "uint16"]
    check_refused(relneuron, tmp_path, "--ids-dtype, but no .bin file", *words)


def test_run_names_the_command_of_other_methods(relneuron: Any, tmp_path: Path) -> None:
    words = ["run", "m", "--facts", tmp_path, "-o", tmp_path / "o", "--method"]
    fix = check_refused(relneuron, tmp_path, "run ranks by ap, not by lape", *words, "lape")
    assert "lape is one of relneuron identify" in fix
