"""The papers that a folder's methods go back to, and how they are written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from relneuron.artifact import papers
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.manifest import Manifest
from relneuron.artifact.papers import (
    ANLS,
    ATTNLRP,
    CRANE,
    EXPERTS,
    GAIN,
    HARNESS,
    KNOWLEDGE,
    LAPE,
    LOCALIZATION,
    MMNEURON,
    QUERIES,
    RELATIONS,
    SAFETY,
    SOFTWARE,
    Paper,
)
from relneuron.methods import NAMES, methods
from relneuron.study.cite import bibtex, citations, text
from tests.conftest import ROOT

EVERY = [value for value in vars(papers).values() if isinstance(value, Paper)]


def held(folder: Path, **stages: dict[str, Any]) -> Path:
    """A folder whose manifest has these stages, made from these inputs."""
    manifest = Manifest(folder)
    manifest.data["stages"] = {
        stage: {"inputs": inputs, "files": []} for stage, inputs in stages.items()
    }
    manifest.save()
    return folder


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ({"prompts": {"choices": None}}, []),
        ({"prompts": {"choices": 3}}, [QUERIES]),
        ({"record": {}, "identify": {"method": "ap"}}, [RELATIONS, EXPERTS]),
        ({"identify": {"method": "random"}}, []),
        ({"identify": {"method": "of a later version"}, "look": {}, "attribute_new": {}}, []),
        ({"import": {"format": "theirs"}, "prompts": {"choices": {"odd": []}}}, [QUERIES]),
        ({"ablate": {"mode": "zero", "analyses": []}}, [RELATIONS]),
        ({"ablate": {"mode": "p50", "analyses": ["sizes"]}}, [RELATIONS, EXPERTS]),
        ({"ablate": {"mode": "patch", "analyses": ["gain"]}}, [RELATIONS, GAIN, SAFETY]),
        ({"ablate": {"module_sets": True}}, [RELATIONS, MMNEURON]),
        ({"count": {"module": None}, "nll": {}}, [LAPE]),
        ({"count": {"module": ["language"]}}, [LAPE, MMNEURON]),
        ({"attribute": {}, "identify": {"method": "logprob_gain"}}, [GAIN]),
        ({"attribute_ig": {}, "identify": {"method": "qrnca"}}, [KNOWLEDGE, QUERIES]),
        ({"attribute_relevance": {"rules": "plain"}}, []),
        ({"attribute_relevance": {"rules": "conservative"}}, [ATTNLRP]),
        ({"identify_relevance": {"method": "relevance"}}, [CRANE]),
        ({"identify": {"method": "query_localization"}}, [LOCALIZATION]),
        ({"contrast": {}, "identify": {"method": "contrast"}, "probe": {}}, [SAFETY]),
        ({"import": {"names": []}}, [LAPE]),
        ({"import": {"format": "mmneuron"}}, [MMNEURON]),
        ({"edit": {}, "report": {}}, [KNOWLEDGE]),
        ({"eval": {"mode": "zero", "set_to": None}}, [HARNESS]),
        ({"eval": {"mode": "p50", "set_to": "en"}}, [EXPERTS, HARNESS, LAPE]),
    ],
)
def test_a_folder_cites_what_its_stages_go_back_to(
    tmp_path: Path, stages: Any, expected: list[Paper]
) -> None:
    folder = held(tmp_path, **stages)
    assert {*citations(folder)} == {*expected}
    assert re.findall(r"@\w+\{(\w+),", bibtex(folder))[-1] == SOFTWARE.key
    assert len(text(folder).splitlines()) == len(expected) + 1


def test_it_says_what_goes_back_to_each(tmp_path: Path) -> None:
    folder = held(tmp_path, record={}, identify={"method": "ap"}, ablate={"mode": "p90"})
    said = citations(folder)
    assert said[RELATIONS] == ["record", "identify --method ap", "ablate"]
    assert said[EXPERTS] == ["identify --method ap", "ablate --mode p90"]
    assert bibtex(folder).startswith("% record, identify --method ap, ablate\n@inproceedings{")


def test_a_folder_without_a_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RelneuronError, match="holds no study") as caught:
        citations(tmp_path)
    assert "leave it out" in caught.value.fix


def test_every_paper_is_behind_something() -> None:
    assert {*citations()} | {SOFTWARE} == {*EVERY}
    assert citations()[ANLS] == ["generate --measure anls"]


def test_every_entry_of_bibtex_is_whole() -> None:
    entries = [entry.partition("\n")[2] for entry in bibtex().strip().split("\n\n")]
    keys = [
        re.fullmatch(r"@(?:misc|inproceedings)\{([a-z0-9]+),", e.split("\n")[0]) for e in entries
    ]
    assert all(keys) and len({key[1] for key in keys if key}) == len(entries) == len(EVERY)
    for entry in entries:
        depth = 0
        for letter in entry:
            depth += {"{": 1, "}": -1}.get(letter, 0)
            assert depth >= 0
        assert depth == 0 and entry.endswith("\n}")
        assert all(re.fullmatch(r"  \w+ = \{.+\},", line) for line in entry.split("\n")[1:-1])


def test_every_paper_has_what_a_reader_looks_for() -> None:
    assert HARNESS.doi in HARNESS.bibtex() and f"doi:{HARNESS.doi}" in HARNESS.text()
    for paper in {*EVERY} - {SOFTWARE, HARNESS}:
        assert paper.year and re.fullmatch(r"\d{4}\.\d{4,5}", paper.arxiv)
        assert all(re.fullmatch(r"[^,]+, [^,]+", author) for author in paper.authors)
        assert paper.arxiv in paper.bibtex() and f"arXiv:{paper.arxiv}" in paper.text()
    assert text().splitlines()[-1].startswith("The relneuron authors. relneuron: find")


def test_a_method_cites_the_papers_that_its_first_lines_name() -> None:
    for name, method in zip(NAMES, methods(), strict=True):
        source = (ROOT / "relneuron" / "methods" / name / "__init__.py").read_text("utf-8")
        ways = (*method.stages, *method.rankings, *method.attributions)
        cited = {paper.arxiv for way in ways for paper in way.papers}
        assert {*re.findall(r"\d{4}\.\d{5}", source.split('"""')[1])} <= cited
    readme = (ROOT / "README.md").read_text("utf-8")
    known = {paper.arxiv for paper in EVERY}
    assert {*re.findall(r"arxiv\.org/abs/(\d{4}\.\d{5})", readme)} <= known


def test_it_agrees_with_the_citation_file() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert cited["title"] == SOFTWARE.title and cited["version"] in SOFTWARE.note
    assert SOFTWARE.authors == tuple(f"{{{one['name']}}}" for one in cited["authors"])
    [paper] = cited["references"]
    named = tuple(f"{one['family-names']}, {one['given-names']}" for one in paper["authors"])
    assert (paper["title"], named, paper["year"], paper["doi"]) == (
        *(RELATIONS.title, RELATIONS.authors, RELATIONS.year, RELATIONS.doi),
    )
    assert RELATIONS.pages == f"{paper['start']}-{paper['end']}"
    assert RELATIONS.venue == paper["collection-title"]


def test_the_command_prints_or_writes_them(relneuron: Any, tmp_path: Path) -> None:
    folder = held(tmp_path / "study", record={}, identify={"method": "ap"})
    assert relneuron("cite", folder) == (0, bibtex(folder), "")
    assert relneuron("cite", folder, "--format", "text") == (0, text(folder), "")
    assert relneuron("cite") == (0, bibtex(), "")
    file = tmp_path / "new" / "references.bib"
    assert relneuron("cite", folder, "-o", file) == (0, f"-> {file}\n", "")
    assert file.read_text("utf-8") == bibtex(folder)
    code, _, err = relneuron("cite", "-o", file)
    assert code == 2 and err.startswith(f"error: {file} exists") and file.stat().st_size < 2000
    assert relneuron("cite", "-o", file, "--force")[0] == 0
    assert file.read_text("utf-8") == bibtex()
    assert relneuron("cite", tmp_path)[0] == 1
