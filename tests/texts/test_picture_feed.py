"""Records with pictures: in their order, from every position, of the groups that are asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from relneuron.artifact.files import RelneuronError
from relneuron.texts.picture_feed import PictureFeed, describe_pictures, have_pictures
from relneuron.texts.sources import Source, parse_sources
from tests.kit.pictures import picture


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of three groups in turn, seven records in each; two pictures in every third."""
    path = tmp_path_factory.mktemp("records")
    for i in range(14):
        picture(i).save(path / f"{i}.png")
    for name, numbers in (("one", range(7)), ("two", range(7, 14))):
        lines = [
            json.dumps(
                {
                    "image": [f"{i}.png", "0.png"] if i % 3 == 0 else f"{i}.png",
                    "text": str(i),
                    "kind": "abc"[i % 3],
                }
            )
            for i in numbers
        ]
        (path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return path


def named(folder: Path) -> list[Source]:
    texts = [f"x={folder / 'one.jsonl'}", f"y={folder / 'two.jsonl'}"]
    return parse_sources(texts, image_column="image")


def of_column(folder: Path, **asked: Any) -> list[Source]:
    texts = [str(folder / "one.jsonl"), str(folder / "two.jsonl")]
    return parse_sources(texts, group_column="kind", image_column="image", **asked)


def everything(sources: list[Source], state: Any = None, **asked: Any) -> list[tuple[str, str]]:
    with PictureFeed(sources, state=state, **asked) as feed:
        return [(record.group, record.text) for record in feed.take(1000)]


def test_records_come_in_order_with_their_pictures(folder: Path) -> None:
    assert everything(named(folder)) == [("x" if i < 7 else "y", str(i)) for i in range(14)]
    with PictureFeed(named(folder)) as feed:
        records = feed.take(1000)
    assert [len(record.pictures) for record in records] == [
        2 if i % 3 == 0 else 1 for i in range(14)
    ]
    assert records[3].where == f"{folder / 'one.jsonl'}, line 4"
    assert [image.size for image in records[3].open()] == [(20, 16)] * 2


@pytest.mark.parametrize("most", [None, 1, 3, 4])
@pytest.mark.parametrize("groups", [None, ["c", "a"]])
def test_from_every_position_the_rest_follows(folder: Path, most: int | None, groups: Any) -> None:
    asked = of_column(folder, groups=groups)
    expected, seen = [], {"a": 0, "b": 0, "c": 0}
    for i in range(14):
        group = "abc"[i % 3]
        if group in (groups or seen) and (most is None or seen[group] < most):
            expected.append((group, str(i)))
            seen[group] += 1
    assert everything(asked, most=most) == expected
    for n in range(len(expected) + 1):
        with PictureFeed(asked, most=most) as feed:
            first = [(record.group, record.text) for record in feed.take(n)]
            state = json.loads(json.dumps(feed.state()))
        rest = PictureFeed(asked, most=most, state=state)
        assert first + [(r.group, r.text) for r in rest.take(1000)] == expected
        assert rest.notes["records"] == {name: k for name, k in seen.items() if k}
        assert rest.groups == (groups or [name for name in "abc" if seen[name]])
        again = PictureFeed(asked, most=most, state=rest.state())
        assert again.take(5) == []


def test_records_of_other_groups_are_counted(folder: Path) -> None:
    with PictureFeed(of_column(folder, groups=["b"])) as feed:
        assert len(feed.take(1000)) == 5
        assert feed.notes == {"records": {"b": 5}, "records_of_other_groups": 9}


def test_pictures_are_known_by_their_bytes_in_their_order(folder: Path, tmp_path: Path) -> None:
    whole = describe_pictures(named(folder), None)
    assert whole["pictures"] == 14 + 5
    assert describe_pictures(named(folder), 2)["pictures"] == 2 + 1 + 1 + 1
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert describe_pictures(named(tmp_path), None) == whole
    one, two = tmp_path / "4.png", tmp_path / "5.png"
    data = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(data)
    assert describe_pictures(named(tmp_path), None) != whole


def test_sources_have_pictures_all_or_none(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("a line")
    (tmp_path / "t.jsonl").write_text('\n{"text": "a line"}\n')
    (tmp_path / "none.jsonl").write_text("")
    texts = parse_sources([f"{name}={tmp_path / name}" for name in ("t.txt", "t.jsonl")])
    assert have_pictures(named(folder)) and not have_pictures(texts)
    assert not have_pictures(parse_sources([f"a={tmp_path / 'none.jsonl'}"]))
    records = [{"image": 1, "text": "a"}]
    assert have_pictures([Source("a", dataset=records)])
    assert not have_pictures([Source("a", dataset=iter(records))])  # it would be lost
    with pytest.raises(RelneuronError, match="can be read only once"):
        describe_pictures([Source("a", dataset=iter(records), image_column="image")], None)
    with pytest.raises(RelneuronError, match="t.jsonl has no field 'image', other sources"):
        have_pictures([*named(folder), texts[1]])
