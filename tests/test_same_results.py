"""`same_results.compare` sees a bit in any file, and nothing in what may differ."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.same_results import compare

PAGE = """<h2>Study</h2><p>{}</p><h3>Commands</h3><p>Run:</p>
<pre>{}
</pre><h3>Model</h3><p>{}</p>
<details><summary>The whole manifest: stages</summary>{}<details>x</details></details>
</section>
<footer>{}</footer>"""


def write(folder: Path, *words: str) -> Path:
    (folder / "study").mkdir(parents=True)
    (folder / "study" / "report.html").write_text(PAGE.format(*words))
    (folder / "study" / "manifest.json").write_text(words[3])
    (folder / "a.csv").write_bytes(b"id,x\r\n0,1\r\n")
    (folder / ".lock").touch()
    return folder


@pytest.mark.parametrize("at", range(5))
def test_a_report_is_compared_but_for_its_commands_and_manifest(tmp_path: Path, at: int) -> None:
    words = ["a", "b", "c", "d", "e"]
    one = write(tmp_path / "1", *words)
    words[at] = "x"
    said = compare(one, write(tmp_path / "2", *words))
    assert [line.partition(":")[0] for line in said] == ["study/report.html"] * (at not in (1, 3))


def test_files_that_differ_or_are_missing_are_named(tmp_path: Path) -> None:
    one, two = write(tmp_path / "1", *"abcde"), tmp_path / "2"
    shutil.copytree(one, two)
    assert compare(one, two) == []
    (two / "a.csv").write_bytes(b"id,x\r\n0,2\r\n")
    assert compare(one, two)[0].startswith("a.csv: 11 and 11 bytes, line 2: ...b'id,x")
    (two / "a.csv").write_bytes(b"id,x\r\n0,1\r\n0")
    assert compare(one, two)[0].startswith("a.csv: 11 and 12 bytes, line 3")
    (two / "a.csv").rename(two / "b.csv")
    assert compare(one, two) == [f"a.csv: only in {one}", f"b.csv: only in {two}"]
