"""Tasks of lm-evaluation-harness with neurons off: the harness alone, and with plain hooks.

Everything is compared bit by bit: the log-likelihood of every option, and every text.
"""

from __future__ import annotations

import copy
import json
import logging
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lm_eval
import lm_eval.evaluator
import numpy as np
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor

import relneuron
import relneuron.ablation.harness.stage as stage
from relneuron.ablation.harness.options import EvalOptions
from relneuron.ablation.harness.scores import Score, score_table
from relneuron.ablation.harness.stage import evaluate
from relneuron.artifact.counts import NAME as COUNTS
from relneuron.artifact.counts import Counts
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.manifest import Manifest
from relneuron.artifact.neurons import NeuronFile
from tests.kit.dying import Killed, Points
from tests.kit.files import read_rows
from tests.kit.hooked import Study, plain_means
from tests.kit.tasks import N, write_tasks

TASKS = ("tiny_choice", "tiny_text", "tiny_read")
Change = Any


@pytest.fixture(scope="module")
def study(model_folder: Path, fact_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    return Study(model_folder, fact_folder, tmp_path_factory.mktemp("harness"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def neurons(study: Study) -> Path:
    return study.folder / "neurons.json"


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """`pip freeze` for each call of the harness takes seconds, and is no result."""
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)


def run(study: Study, yamls: Path, folder: Path, neurons: Path | None = None, **asked: Any) -> Any:
    how = {"force": asked.pop("force", False)}
    options = EvalOptions(**{"tasks": TASKS, "include_path": (str(yamls),), **asked})
    return evaluate("m", study.model, study.tokenizer, neurons, folder, options, quiet=True, **how)


def harness(study: Study, tasks: Path, task: str, batch_size: int = 1, **asked: Any) -> Any:
    """lm_eval without us."""
    lm = HFLM(study.model, tokenizer=copy.deepcopy(study.tokenizer), batch_size=batch_size)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return lm_eval.simple_evaluate(lm, tasks=[task], task_manager=manager, **asked)


SAID = ("doc_id", "arguments", "resps", "filtered_resps", "filter", "target", "doc_hash")


def samples_of(folder: Path, task: str, condition: str) -> list[Any]:
    text = (folder / "samples" / f"{task}.{condition}.jsonl").read_text()
    return [{key: json.loads(line)[key] for key in SAID} for line in text.splitlines()]


def same_as_harness(folder: Path, condition: str, task: str, theirs: Any) -> None:
    """Every number of every metric, and all that was asked and answered."""
    wanted = json.loads(json.dumps(theirs["samples"][task]))
    assert samples_of(folder, task, condition) == [{k: s[k] for k in SAID} for s in wanted]
    numbers = {}
    for key, value in theirs["results"][task].items():
        metric, comma, how = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            error = theirs["results"][task][f"{metric}_stderr,{how}"]
            numbers[metric, how] = (str(value), "" if error == "N/A" else str(error))
    ours = [
        row for row in read_rows(folder / "eval.csv")
        if (row["condition"], row["task"]) == (condition, task)
    ]  # fmt: skip
    assert {(r["metric"], r["filter"]): (r["value"], r["stderr"]) for r in ours} == numbers
    assert {row["n"] for row in ours} == {str(theirs["n-samples"][task]["effective"])}


@contextmanager
def hooked(model: Any, neurons: Sequence[Sequence[Any]], change: Change) -> Iterator[None]:
    """Plain hooks on gate_proj, up_proj and down_proj: what a set's outputs become."""
    with ExitStack() as stack:
        for layer, block in enumerate(model.model.layers):
            for site in ("gate", "up", "down"):
                index = torch.tensor([n[2] for n in neurons if (n[0], n[1]) == (layer, site)])

                def hook(
                    _m: Any, _i: Any, out: Tensor, index: Any = index, at: Any = (layer, site)
                ) -> Any:
                    new = out.clone()
                    if len(index):
                        new[..., index] = change(out[..., index], at, index)
                    return new

                module = getattr(block.mlp, f"{site}_proj")
                stack.callback(module.register_forward_hook(hook).remove)
        yield


def zero(out: Tensor, at: Any, index: Tensor) -> Tensor:
    return torch.zeros_like(out)


# --- the same as the harness, and as hooks ---------------------------------------------------


@pytest.mark.parametrize(
    "asked",
    [
        {"limit": 0.5},
        {"batch_size": 3, "num_fewshot": 2, "limit": 7},
    ],
)
def test_clean_is_the_harness_and_off_is_hooks(
    study: Study, tasks: Path, neurons: Path, tmp_path: Path, asked: Any
) -> None:
    """Without neurons off not a bit differs from `hf`, with some none from hooks on it."""
    off = ("lives_in", "works_as")
    run(study, tasks, tmp_path, neurons, off=off, log_samples=True, **asked)
    differ = 0
    for condition in ("clean", *off):
        within = hooked(study.model, study.sets.get(condition, []), zero)
        with within if condition != "clean" else nullcontext():
            for task in TASKS:
                same_as_harness(tmp_path, condition, task, harness(study, tasks, task, **asked))
                said = [samples_of(tmp_path, task, c) for c in ("clean", condition)]
                differ += said[0] != said[1]
    assert differ > len(TASKS)


def test_neurons_of_every_site_are_those_of_hooks(
    study: Study, tasks: Path, tmp_path: Path
) -> None:
    sets = {
        site: [(layer, site, i) for layer in (0, 1) for i in range(3, 20, 3)]
        for site in ("gate", "up", "down")
    }
    path = study.write_sets(tmp_path / "sites.json", sets)
    run(study, tasks, tmp_path / "out", path, tasks=("tiny_choice",), log_samples=True)
    for site, chosen in sets.items():
        with hooked(study.model, chosen, zero):
            theirs = harness(study, tasks, "tiny_choice")
        same_as_harness(tmp_path / "out", site, "tiny_choice", theirs)


def test_modes_are_those_of_hooks(study: Study, tasks: Path, neurons: Path, tmp_path: Path) -> None:
    means = plain_means(study)
    changes: dict[str, tuple[dict[str, Any], Change]] = {
        "scale": ({"factor": -0.5, "scale_at": "output"}, lambda out, at, index: out * -0.5),
        "mean": (
            {"mean_of": "relation"},
            lambda out, at, index: torch.tensor(means["lives_in"][at], dtype=out.dtype)[index],
        ),
    }
    for mode, (how, change) in changes.items():
        folder = tmp_path / mode
        how |= {"tasks": TASKS[:2], "off": ("lives_in",), "log_samples": True, "limit": 6}
        run(study, tasks, folder, neurons, mode=mode, **how)
        with hooked(study.model, study.sets["lives_in"], change):
            for task in TASKS[:2]:
                theirs = harness(study, tasks, task, limit=6)["samples"][task]
                wanted = json.loads(json.dumps(theirs))
                ours = samples_of(folder, task, "lives_in")
                # Our means are of float32 sums.
                assert np.allclose(*(_numbers([s["resps"] for s in x]) for x in (ours, wanted)))
                assert _texts(ours) == _texts(wanted)


def _numbers(value: Any) -> list[float]:
    if isinstance(value, list):
        return [number for part in value for number in _numbers(part)]
    return [] if isinstance(value, str | bool) else [value]


def _texts(samples: Any) -> list[str]:
    return [text for s in samples for text in s["resps"][0] if isinstance(text, str)]


def counted(folder: Path, site: str = "act") -> Any:
    """Counts with moments in `folder`; the means (2, 48)."""
    rng, shape = np.random.default_rng(1), (1, 2, 48)
    arrays = {
        f"count.{site}": rng.integers(0, 100, shape),
        f"sum.{site}": rng.normal(size=shape) * 300,
        f"sum_sq.{site}": np.full(shape, 1000.0),
        f"max.{site}": np.ones(shape, np.float32),
        f"n_nonfinite.{site}": np.zeros(shape, np.int64),
    }
    folder.mkdir(exist_ok=True)
    Counts(["works_as"], np.array([100], np.int64), arrays).write(folder / COUNTS)
    return (arrays[f"sum.{site}"][0] / 100).astype(np.float32)


@contextmanager
def put(model: Any, where: str, neurons: Sequence[Any], means: Any) -> Iterator[None]:
    """Activations (`act_fn`) or products (inputs of down_proj) of neurons at stored means."""
    with ExitStack() as stack:
        for layer, block in enumerate(model.model.layers):
            index = sorted({n[2] for n in neurons if n[0] == layer})
            value = torch.tensor(means[layer, index])

            def new(x: Tensor, index: Any = index, value: Tensor = value) -> Tensor:
                x = x.clone()
                x[..., index] = value
                return x

            if where == "act":
                hook = block.mlp.act_fn.register_forward_hook(lambda _m, _i, out, new=new: new(out))
            else:
                hook = block.mlp.down_proj.register_forward_pre_hook(
                    lambda _m, x, new=new: (new(x[0]),)
                )
            stack.callback(hook.remove)
        yield


@pytest.mark.parametrize("where", ["act", "product"])
def test_steered_models_and_means_of_products_are_those_of_hooks(
    study: Study, tasks: Path, tmp_path: Path, where: str
) -> None:
    sets = {name: [(n % 2, "gate", n) for n in rows]
            for name, rows in (("lives_in", range(9)), ("works_as", range(20, 30)))}  # fmt: skip
    path = study.write_sets(tmp_path / "n" / "neurons.json", sets)
    means = counted(tmp_path / "moments", where)
    if where == "act":
        asked: dict[str, Any] = {"set_to": "works_as", "counts": tmp_path / "moments"}
        conditions = {"clean.set=works_as": [], "lives_in.set=works_as": sets["lives_in"]}
        chosen = sets["works_as"]
    else:
        asked = {"mode": "mean", "moments": tmp_path / "moments"}
        conditions, chosen = {"lives_in": []}, sets["lives_in"]
    asked |= {"tasks": TASKS[:2], "off": ("lives_in",), "log_samples": True, "limit": 6}
    run(study, tasks, tmp_path / "o", path, **asked)
    plain = [samples_of(tmp_path / "o", task, "clean") for task in TASKS[:2]]
    for condition, off in conditions.items():
        with hooked(study.model, off, zero), put(study.model, where, chosen, means):
            for task, clean in zip(TASKS[:2], plain, strict=True):
                theirs = harness(study, tasks, task, limit=6)["samples"][task]
                wanted = [{k: s[k] for k in SAID} for s in json.loads(json.dumps(theirs))]
                ours = samples_of(tmp_path / "o", task, condition)
                assert ours == wanted != clean
    for task, clean in zip(TASKS[:2], plain, strict=True):
        theirs = json.loads(json.dumps(harness(study, tasks, task, limit=6)["samples"][task]))
        assert clean == [{k: s[k] for k in SAID} for s in theirs]


def test_the_harness_knows_the_model_by_name(
    study: Study, model_folder: Path, tasks: Path, neurons: Path
) -> None:
    """`--model relneuron --model_args pretrained=...,neurons=...,off=...`, and in Python."""
    assert issubclass(relneuron.NeuronLM, HFLM)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = lm_eval.simple_evaluate(
        "relneuron",
        model_args=f"pretrained={model_folder},neurons={neurons},off=lives_in",
        tasks=["tiny_choice"],
        task_manager=manager,
        device="cpu",
    )
    with hooked(study.model, study.sets["lives_in"], zero):
        theirs = harness(study, tasks, "tiny_choice")
    for key in ("resps", "doc_id"):
        ours, wanted = ([s[key] for s in x["samples"]["tiny_choice"]] for x in (found, theirs))
        assert ours == wanted
    own: dict[str, Any] = {"tokenizer": copy.deepcopy(study.tokenizer)}
    plain = relneuron.NeuronLM(study.model, **own)
    assert lm_eval.simple_evaluate(plain, tasks=["tiny_choice"], task_manager=manager)
    for wrong, cause in (
        ({"off": "lives_in"}, "none are given"),
        ({"neurons": neurons}, "which set"),
        ({"neurons": neurons, "off": "no"}, "no set 'no'"),
        ({"neurons": neurons, "off": "lives_in", "mode": "scale"}, "--factor"),
    ):
        with pytest.raises(RelneuronError, match=cause):
            relneuron.NeuronLM(study.model, **own, **wrong)


# --- what is run, and written ----------------------------------------------------------------


def test_random_sets_and_files(study: Study, tasks: Path, neurons: Path, tmp_path: Path) -> None:
    """Conditions in their order, tidy rows, all that the harness says; nothing of ours is left."""
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    logger = logging.getLogger("lm_eval")
    before = (list(logger.handlers), logger.propagate)
    scores = run(
        study, tasks, tmp_path, neurons, off=("lives_in", "clean"), random_seeds=2, limit=0.25
    )
    assert states[0] == random.getstate() and torch.equal(states[2], torch.get_rng_state())
    assert states[1] == np.random.get_state()[1].tolist()
    assert before == (list(logger.handlers), logger.propagate)
    assert study.tokenizer.pad_token is None
    names = ["clean", "lives_in", "random.0", "random.1"]
    assert list(dict.fromkeys(s.condition for s in scores)) == names
    assert [tuple(row) for row in read_rows(tmp_path / "eval.csv")][0] == Score._fields
    whole = json.loads((tmp_path / "eval.json").read_text())
    assert whole["lm_eval"] == lm_eval.__version__
    n = len(study.sets["lives_in"])
    assert [c["n_neurons"] for c in whole["conditions"]] == [0, n, n, n]
    assert [(r["condition"], r["asked"]) for r in whole["runs"]] == [
        (name, task) for name in names for task in TASKS
    ]
    assert whole["runs"][1]["versions"] == {"tiny_text": 2.0}
    assert whole["runs"][0]["n-samples"]["tiny_choice"] == {"original": N, "effective": 3}
    assert "0x" not in (tmp_path / "eval.json").read_text()
    frame = relneuron.load(tmp_path).evaluation
    assert frame["value"].tolist() == [s.value for s in scores]
    assert frame["task"].tolist() == [s.task for s in scores] and frame["n"].dtype == np.int64
    entry = Manifest(tmp_path).data["stages"]["eval"]
    assert entry["versions"]["tiny_choice"] == {"tiny_choice": 1.0}
    assert entry["inputs"]["lm_eval"] == lm_eval.__version__
    assert not (tmp_path / "samples").exists()


def test_a_group_has_its_own_rows(study: Study, tasks: Path, neurons: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="lm_eval: Group 'tiny'.*missing in 1/2 tasks"):
        scores = run(study, tasks, tmp_path, neurons, tasks=("tiny",), off=("lives_in",))
    theirs = harness(study, tasks, "tiny")["results"]
    found = {(s.condition, s.task, s.metric, s.filter): (s.value, s.n) for s in scores}
    assert found["clean", "tiny", "acc", "none"] == (theirs["tiny"]["acc,none"], N)
    assert found["clean", "tiny_text", "exact_match", "whole"][1] == N
    table = score_table(scores, ["tiny"])
    assert table.columns == ("off", "tiny acc")
    assert [row[0] for row in table.rows] == ["clean", "lives_in"]
    own = [s.value for s in scores if (s.task, s.metric) == ("tiny", "acc")]
    assert table.rows[1][1] == f"{own[1] - own[0]:+.4f}"


def test_a_killed_run_goes_on_with_the_same_bits(
    study: Study, tasks: Path, neurons: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    asked: dict[str, Any] = {"off": ("lives_in",), "log_samples": True, "limit": 4}
    run(study, tasks, tmp_path / "whole", neurons, **asked)

    def files(name: str) -> dict[str, bytes]:
        root = tmp_path / name
        return {
            str(path.relative_to(root)): path.read_bytes()
            for path in root.rglob("*")
            if path.is_file() and path.name != ".lock"
        }

    calls: list[str] = []
    true = stage.run_one
    monkeypatch.setattr(stage, "run_one", lambda *a: calls.append(a[2][1].name) or true(*a))
    with Points(5, [(stage, "run_one")]), pytest.raises(Killed):
        run(study, tasks, tmp_path / "killed", neurons, **asked)
    assert calls == ["clean"] * 3 + ["lives_in"]
    damaged = tmp_path / "killed" / "samples" / "tiny_text.clean.jsonl"
    damaged.write_bytes(damaged.read_bytes().replace(b"eats", b"ears", 1))
    calls.clear()
    with pytest.warns(UserWarning, match="samples are not as they were written: 1 of 4"):
        run(study, tasks, tmp_path / "killed", neurons, **asked)
    assert calls == ["clean", "lives_in", "lives_in"]
    assert files("killed") == files("whole")
    with pytest.raises(RelneuronError, match="exists"):
        run(study, tasks, tmp_path / "killed", neurons, **asked)
    asked["log_samples"] = False
    run(study, tasks, tmp_path / "killed", neurons, **asked, force=True)
    assert not list((tmp_path / "killed").glob("samples/*"))


def test_other_documents_are_other_inputs(study: Study, tmp_path: Path, neurons: Path) -> None:
    """What a task asks is in the digest, wherever its files lie; the manifest's, too."""
    digests = []
    for folder, n in (("a", 6), ("b", 6), ("c", 7)):
        tasks = write_tasks(tmp_path / folder, n)
        run(study, tasks, tmp_path / folder / "o", neurons, tasks=("tiny_read",), off=("clean",))
        inputs = Manifest(tmp_path / folder / "o").data["stages"]["eval"]["inputs"]
        digests.append(inputs["tasks"]["tiny_read"])
    assert digests[0] == digests[1] != digests[2]


# --- the command line ------------------------------------------------------------------------


def test_the_command_shows_changes_and_makes_itself_again(
    relneuron: Any, model_folder: Path, tasks: Path, study: Study, tmp_path: Path
) -> None:
    out = tmp_path / "o"
    code, text, err = relneuron(
        *("eval", model_folder, "--neurons", study.folder / "neurons.json", "-o", out),
        *("--tasks", "tiny_c*,tiny_read", "--include-path", tasks, "--limit", 3, "--quiet"),
    )
    assert code == 0 and not err, err
    rows = [line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│")]
    assert [row for row in rows if row] == ["clean", *study.sets]
    words = Manifest(out).data["stages"]["eval"]["commands"][0]
    again = [str(tmp_path / "again") if word == "STUDY" else word for word in words]
    assert relneuron(*again, "--quiet")[0] == 0
    for name in ("eval.csv", "eval.json"):
        assert (out / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["--tasks", "tiny_chioce"], "no task is named 'tiny_chioce'"),
        (["--tasks", "", "--off", "clean"], "--tasks names no task"),
        (["--tasks", "tiny_choice", "--off", "nobody"], "no set 'nobody'"),
        (["--tasks", "tiny_choice", "--limit", "2.5"], "--limit 2.5 is no number of documents"),
        (["--tasks", "tiny_choice", "--mode", "scale"], "--factor and --mode scale"),
        (["--tasks", "tiny_choice", "--off", "clean", "--mode", "mean"], "changes nothing"),
        (["--tasks", "tiny_choice", "--apply-chat-template"], "has no chat template"),
        (["--tasks", "tiny_choice", "--include-path", "nowhere"], "--include-path nowhere"),
        (["--tasks", "tiny_choice", "--set", "lives_in"], "counts.safetensors"),
        (["--tasks", "broken"], "the task broken cannot be read"),
    ],
)
def test_a_mistake_is_a_line_of_cause_and_one_of_fix(
    relneuron: Any,
    model_folder: Path,
    tasks: Path,
    study: Study,
    tmp_path: Path,
    monkeypatch: Any,
    words: list[str],
    cause: str,
) -> None:
    if words[1] == "broken":
        text = (tasks / "tiny_choice.yaml").read_text()
        own = tmp_path / "own"
        own.mkdir()
        text = text.replace("{{q}}", "{{q.r.s}}").replace("tiny_choice", "broken")
        (own / "broken.yaml").write_text(text)
        words = [*words, "--include-path", str(own)]
    if "--include-path" not in words:
        words = [*words, "--include-path", str(tasks)]
    if words[1] == "tiny_chioce":  # listing the harness's own takes seconds
        monkeypatch.setattr(lm_eval.tasks.manager, "__file__", str(tasks / "manager.py"))
    code, out, err = relneuron(
        *("eval", model_folder, "--neurons", study.folder / "neurons.json", "--quiet"),
        *(*words, "-o", tmp_path / "o"),
    )
    lines = err.splitlines()
    assert code in (1, 2) and not out and len(lines) == 2, err
    assert cause in lines[0] and lines[1].startswith("fix:")
    if words[1] == "tiny_chioce":
        assert re.search("did you mean tiny_choice", lines[1])
    assert not (tmp_path / "o").exists()


def test_without_neurons_there_is_the_clean_model(
    relneuron: Any, model_folder: Path, tasks: Path, tmp_path: Path
) -> None:
    words = ["eval", model_folder, "--tasks", "tiny_choice", "--include-path", tasks, "--quiet"]
    for stray in (["--off", "a"], ["--mode", "scale", "--factor", 2], ["--random-seeds", 1]):
        code, _, err = relneuron(*words, *stray, "-o", tmp_path / "o")
        assert code == 2 and "none are given" in err, err
    assert relneuron(*words, "-o", tmp_path / "o")[0] == 0
    assert {row["condition"] for row in read_rows(tmp_path / "o" / "eval.csv")} == {"clean"}


def test_neurons_without_a_set(study: Study, tasks: Path, tmp_path: Path) -> None:
    data = json.loads((study.folder / "neurons.json").read_text())
    data["sets"] = {"none": []}
    (tmp_path / "none.json").write_text(json.dumps(data))
    assert NeuronFile.read(tmp_path / "none.json").sets == {"none": []}
    with pytest.raises(RelneuronError, match="no neuron to switch off"):
        run(study, tasks, tmp_path / "o", tmp_path / "none.json")
    assert not (tmp_path / "o").exists()
