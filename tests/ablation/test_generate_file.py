"""The file of `generate`: its lines, resuming, memory; prompts that are read, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from relneuron.ablation.continuer import Continuer
from relneuron.ablation.outputs import Generated
from relneuron.artifact.counts import NAME, Counts
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.journal import Journal
from relneuron.artifact.neurons import NeuronFile
from relneuron.artifact.prompts import read_questions
from relneuron.model.batches import is_out_of_memory
from tests.kit.continued import (
    OFF,
    PROMPTS,
    SHAPE,
    Sets,
    load_talkative,
    make_sets,
    ours,
    write_study,
)

# One of the sets is empty, which is said in each run that switches it off.
pytestmark = pytest.mark.filterwarnings("ignore:empty. its set has no neuron")


@pytest.fixture(scope="module")
def loaded(model_folder: Path) -> tuple[Any, Any]:
    return load_talkative(model_folder)


@pytest.fixture(scope="module")
def sets() -> Sets:
    return make_sets()


@pytest.fixture
def study(tmp_path: Path, sets: Sets) -> Path:
    return write_study(tmp_path, sets)


# --- the file, resuming, memory --------------------------------------------------------------


def test_the_file_has_an_object_a_line(loaded: Any, study: Path) -> None:
    made = ours(loaded, study, off=("zh", "clean", "zh"), template="Q: {prompt}\nA:")
    lines = (study / "o.jsonl").read_text(encoding="utf-8").split("\n")
    assert lines.pop() == ""
    assert [Generated(**json.loads(line)) for line in lines] == made
    assert list(json.loads(lines[0])) == [
        *("mask", "set", "id", "prompt", "output", "n_tokens", "stopped"),
    ]
    assert [g.mask for g in made] == ["zh"] * 5 + ["clean"] * 5
    assert made[0].prompt == f"Q: {PROMPTS[0]}\nA:"
    assert {path.name for path in study.iterdir()} == {
        *("neurons.json", NAME, "prompts.txt", "o.jsonl", ".lock"),
    }


def test_sets_with_the_same_neurons_are_asked_once(
    loaded: Any, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    true = Continuer.go_on

    def go_on(self: Any, questions: Any, rows: Any, mark: Any) -> Any:
        asked.extend(rows)
        return true(self, questions, rows, mark)

    monkeypatch.setattr(Continuer, "go_on", go_on)
    made = ours(loaded, study, off=("clean", "empty", "en"))
    assert sorted(asked) == sorted([0, 1, 2, 3, 4] * 2)
    assert [g[1:] for g in made[:5]] == [g[1:] for g in made[5:10]]


def test_a_killed_run_goes_on(loaded: Any, study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"off": OFF, "batch_tokens": 60}
    whole = ours(loaded, study, "whole.jsonl", **asked)
    monkeypatch.setattr(Journal, "SAVE_EVERY_S", 0.0)
    true, calls = Continuer.go_on, 0

    def dies(self: Any, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls in (3, 7):
            raise KeyboardInterrupt
        return true(self, *args)

    monkeypatch.setattr(Continuer, "go_on", dies)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            ours(loaded, study, **asked)
        assert not (study / "o.jsonl").exists()
        assert (study / "o.jsonl.journal").exists()
    assert ours(loaded, study, **asked) == whole
    n_batches = calls - 2
    assert not (study / "o.jsonl.journal").exists()
    calls = 100
    ours(loaded, study, "again.jsonl", **asked)
    assert calls - 100 == n_batches
    assert (study / "o.jsonl").read_bytes() == (study / "whole.jsonl").read_bytes()


@pytest.mark.filterwarnings("ignore:out of memory")
def test_out_of_memory_gives_the_same_texts(
    loaded: Any, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ours(loaded, study, "whole.jsonl", off=OFF)
    true = Continuer.go_on

    def small(self: Any, questions: Any, rows: Any, mark: Any) -> Any:
        if len(rows) > 2:
            raise RuntimeError("CUDA out of memory")
        return true(self, questions, rows, mark)

    monkeypatch.setattr(Continuer, "go_on", small)
    assert is_out_of_memory(RuntimeError("CUDA out of memory"))
    assert ours(loaded, study, off=OFF) == whole
    with pytest.raises(RelneuronError, match="out of memory"):
        ours(loaded, study, "e.jsonl", off=OFF, oom="error")


# --- prompts ---------------------------------------------------------------------------------


def test_prompts_of_a_text_file(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeffone {x}\r\n\n  \nt\u2028wo \x1b[31m\nthree".encode())
    found = read_questions(path)
    assert [(p.id, p.prompt) for p in found] == [
        *(("1", "one {x}"), ("4", "t\u2028wo \x1b[31m"), ("5", "three")),
    ]
    asked = read_questions(path, "{0} {prompt} {}")
    assert [p.prompt for p in asked][0] == "{0} one {x} {}"


def test_prompts_of_a_jsonl_file(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a\\nb"}\n\n{"prompt": "c", "id": "x", "more": 1}\n')
    assert [(p.id, p.prompt) for p in read_questions(path)] == [("1", "a\nb"), ("x", "c")]


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("p.txt", b"fine\n\xff\xfe\n", "line 2: not UTF-8"),
        ("p.txt", b"\n \n", "holds no prompt"),
        ("p.csv", b"a", "neither .txt nor .jsonl"),
        ("p.jsonl", b"{", "line 1: not JSON"),
        ("p.jsonl", b'{"prompt": "a"}\n["b"]', "line 2: not a prompt"),
        ("p.jsonl", b'{"text": "a"}', "line 1: not a prompt .it has no text called prompt"),
        ("p.jsonl", b'{"prompt": 3}', "line 1: not a prompt .it has no text"),
        ("p.jsonl", b'{"prompt": "\\ud800"}', "line 1: it holds half a surrogate pair"),
        ("p.jsonl", b'{"prompt": "a", "id": "1"}\n{"prompt": "b", "id": 1}', "second prompt"),
        ("p.jsonl", b"[" * 100_000, "line 1: not JSON"),
    ],
)
def test_bad_prompt_files_are_refused(
    loaded: Any, study: Path, name: str, content: bytes, cause: str
) -> None:
    (study / name).write_bytes(content)
    with pytest.raises(RelneuronError, match=cause) as caught:
        ours(loaded, study, prompts=study / name)
    assert "\n" not in caught.value.cause + caught.value.fix
    assert not (study / "o.jsonl").exists() and not (study / "o.jsonl.journal").exists()


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "cause"),
    [
        ({"off": ("de",)}, "no set 'de'"),
        ({"set_to": "de"}, "no set 'de'"),
        ({"set_to": "fr"}, "no group 'fr'"),
        ({"set_to": "en", "counts": Path("nowhere")}, "does not exist"),
        ({"max_new_tokens": 0}, "--max-new-tokens must be at least 1"),
        ({"max_new_tokens": 60}, "longer than the model's context of 64"),
        ({"repetition_penalty": 0.0}, "--repetition-penalty must be above 0"),
        ({"repetition_penalty": float("nan")}, "is not finite"),
        ({"repetition_penalty": float("inf")}, "is not finite"),
        ({"stop": ("",)}, "empty stop string"),
        ({"batch_tokens": 0}, "--batch-tokens must be at least 1"),
        ({"oom": "never"}, "unknown --oom"),
        ({"template": "Q: {}"}, "does not have"),
        ({"backend": "metal"}, "unknown backend"),
        ({"prompts": Path("gone.txt")}, "does not exist"),
    ],
)
def test_wrong_options_are_refused_before_any_work(
    loaded: Any, study: Path, asked: dict[str, Any], cause: str
) -> None:
    before = {path.name for path in study.iterdir()}
    with pytest.raises(RelneuronError, match=cause):
        ours(loaded, study, **asked)
    assert {path.name for path in study.iterdir()} == before


def test_counts_that_cannot_steer_are_refused(loaded: Any, study: Path) -> None:
    whole = Counts.read(study / NAME)
    arrays = {"count.act": whole.arrays["count.act"]}
    Counts(whole.groups, whole.tokens, arrays).write(study / NAME)
    with pytest.raises(RelneuronError, match="holds no sums") as caught:
        ours(loaded, study, set_to="en")
    assert "--moments" in caught.value.fix
    Counts(whole.groups, whole.tokens * [1, 0], whole.arrays).write(study / NAME)
    with pytest.raises(RelneuronError, match="no token of 'zh'"):
        ours(loaded, study, set_to="zh")
    other = {name: array[:, :1] for name, array in whole.arrays.items()}
    Counts(whole.groups, whole.tokens, other).write(study / NAME)
    with pytest.raises(RelneuronError, match="with 1 layers and width 48"):
        ours(loaded, study, set_to="en")


def test_an_output_is_not_overwritten_without_force(loaded: Any, study: Path) -> None:
    (study / "o.jsonl").write_text("mine")
    with pytest.raises(RelneuronError, match="exists"):
        ours(loaded, study)
    assert (study / "o.jsonl").read_text() == "mine"
    assert len(ours(loaded, study, force=True)) == 5


def test_a_set_named_clean_is_refused(loaded: Any, study: Path, sets: Any) -> None:
    NeuronFile(SHAPE, "lape", {"clean": sets["en"]}, {}).write(study / "neurons.json")
    with pytest.raises(RelneuronError, match="named clean"):
        ours(loaded, study)
    NeuronFile(SHAPE | {"width": 49}, "lape", sets, {}).write(study / "neurons.json")
    with pytest.raises(RelneuronError, match="of a model of shape"):
        ours(loaded, study)
