"""counts.safetensors: written and read, added by the names of groups, damaged, and past 2^53."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from relneuron.artifact.counts import DTYPES, SITES, Counts
from relneuron.artifact.files import RelneuronError
from tests.kit.counted import assert_equal

NAMES = ("en", "zh", "日本語", 'a "b"', "c,d")
LAYERS, WIDTH, HIDDEN = 2, 3, 5
LIMIT = 2**62


@st.composite
def drawn(draw: st.DrawFn, moments: bool = False) -> Counts:
    """Counts of some groups at two sites, with numbers up to 2^61."""
    groups = draw(st.lists(st.sampled_from(NAMES), unique=True, min_size=0, max_size=4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    arrays = {}
    for site, width in (("act", WIDTH), ("down", HIDDEN)):
        shape = (len(groups), LAYERS, width)
        arrays[f"count.{site}"] = rng.integers(0, LIMIT // 2, shape)
        if moments:
            arrays[f"sum.{site}"] = rng.normal(size=shape)
            arrays[f"sum_sq.{site}"] = rng.random(shape)
            arrays[f"max.{site}"] = rng.normal(size=shape).astype(np.float32)
            arrays[f"n_nonfinite.{site}"] = rng.integers(0, 9, shape)
    return Counts(groups, rng.integers(0, LIMIT // 2, len(groups)), arrays)


def added(one: Counts, other: Counts) -> Counts:
    """The sum, group by group and number by number."""
    groups = one.groups + [name for name in other.groups if name not in one.groups]
    tokens, arrays = [], {name: [] for name in one.arrays}  # type: ignore[var-annotated]
    for group in groups:
        parts = [(c, c.groups.index(group)) for c in (one, other) if group in c.groups]
        tokens.append(sum(int(c.tokens[row]) for c, row in parts))
        for name, found in arrays.items():
            rows = [c.arrays[name][row] for c, row in parts]
            both = np.maximum if name.startswith("max.") else np.add
            found.append(rows[0] if len(rows) == 1 else both(*rows))
    shapes = {name: (0, *array.shape[1:]) for name, array in one.arrays.items()}
    return Counts(
        groups,
        np.array(tokens, np.int64),
        {
            n: np.array(a, one.arrays[n].dtype).reshape(len(a), *shapes[n][1:])
            for n, a in arrays.items()
        },
    )


@settings(deadline=None)
@given(st.booleans().flatmap(lambda moments: st.tuples(drawn(moments), drawn(moments))))
def test_adding_is_by_name(pair: tuple[Counts, Counts]) -> None:
    one, other = pair
    before = [{name: array.copy() for name, array in c.arrays.items()} for c in pair]
    total = one + other
    assert_equal(total, added(one, other))
    for name, array in total.arrays.items():
        assert array.dtype == DTYPES[name.partition(".")[0]]
    back = other + one
    assert sorted(back.groups) == sorted(total.groups)
    if not total.has_moments:  # integers are exact in every order
        assert_equal(back.take(total.groups), total)
    for counts, arrays in zip(pair, before, strict=True):  # neither is changed
        assert all(np.array_equal(counts.arrays[name], a) for name, a in arrays.items())


@settings(deadline=None)
@given(st.booleans().flatmap(drawn), st.permutations(NAMES), st.integers(0, 5))
def test_taking_groups(counts: Counts, names: list[str], n: int) -> None:
    """In any order; a group that is not there has no token and no maximum."""
    taken = counts.take(names[:n])
    assert taken.groups == names[:n]
    for row, name in enumerate(taken.groups):
        if name in counts.groups:
            old = counts.groups.index(name)
            assert taken.tokens[row] == counts.tokens[old]
            assert all((a[row] == counts.arrays[k][old]).all() for k, a in taken.arrays.items())
        else:
            assert taken.tokens[row] == 0
            for key, array in taken.arrays.items():
                assert (array[row] == (-np.inf if key.startswith("max.") else 0)).all()


@settings(deadline=None, max_examples=30)
@given(counts=st.booleans().flatmap(drawn))
def test_a_file_is_what_was_written(counts: Counts, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("counts") / "counts.safetensors"
    counts.write(path)
    found = Counts.read(path)
    assert_equal(found, counts)
    assert found.sites == ["act", "down"]
    assert found.has_moments == ("sum.act" in counts.arrays)
    first = path.read_bytes()
    found.write(path)
    assert path.read_bytes() == first


def make(number: int = 1, groups: tuple[str, ...] = ("en", "zh")) -> Counts:
    shape = (len(groups), LAYERS, WIDTH)
    tokens = np.full(len(groups), number, np.int64)
    return Counts(list(groups), tokens, {"count.act": np.full(shape, number, np.int64)})


@pytest.mark.parametrize("number", [2**31 - 1, 2**31, 2**32, 2**53, 2**53 + 1, 2**61])
def test_large_numbers_are_exact(tmp_path: Path, number: int) -> None:
    path = tmp_path / "counts.safetensors"
    (make(number) + make(1)).write(path)
    found = Counts.read(path) + make(number)
    assert found.tokens.tolist() == [2 * number + 1] * 2
    assert (found.arrays["count.act"] == 2 * number + 1).all()


def test_counts_of_other_statistics_cannot_be_added() -> None:
    other = make()
    other.arrays["count.up"] = other.arrays["count.act"]
    with pytest.raises(RelneuronError, match=r"\['count.act'\] and \['count.act', 'count.up'\]"):
        make() + other


def write_raw(path: Path, arrays: Any, groups: Any = ("en", "zh"), text: str | None = None) -> None:
    described = json.dumps({"groups": groups}) if text is None else text
    save_file(arrays, path, {"relneuron.counts": described})


def good() -> dict[str, np.ndarray]:
    return {"tokens": np.ones(2, np.int64), "count.act": np.ones((2, 2, 3), np.int64)}


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": np.ones(3, np.int64)},
        {"tokens": np.ones(2, np.int32)},
        {"tokens": None},
        {"count.act": np.ones((2, 2, 3), np.float32)},
        {"count.act": np.ones((3, 2, 3), np.int64)},
        {"count.act": np.ones((2, 6), np.int64)},
        {"count.attention": np.ones((2, 2, 3), np.int64)},
        {"mean.act": np.ones((2, 2, 3))},
        {"count": np.ones((2, 2, 3), np.int64)},
        {"sum.act": np.ones((2, 2, 3), np.float32)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_file_of_arrays_is_no_counts(tmp_path: Path, change: Any) -> None:
    path = tmp_path / "counts.safetensors"
    write_raw(path, {k: v for k, v in (good() | change).items() if v is not None})
    with pytest.raises(RelneuronError, match="is no file of counts") as error:
        Counts.read(path)
    assert str(path) in error.value.cause and error.value.fix.startswith(
        "make it again with: relneuron"
    )


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"groups": 3}', '{"groups": "e"}', "null"])
def test_a_file_that_does_not_name_its_groups(tmp_path: Path, text: str) -> None:
    path = tmp_path / "counts.safetensors"
    write_raw(path, good(), text=text)
    with pytest.raises(RelneuronError, match="is no file of counts"):
        Counts.read(path)
    save_file(good(), path)
    with pytest.raises(RelneuronError, match="is no file of counts"):
        Counts.read(path)


@pytest.mark.parametrize("groups", [["en", "en"], ["en", 3], ["en", None]])
def test_names_of_groups_are_distinct_texts(tmp_path: Path, groups: Any) -> None:
    write_raw(tmp_path / "c", good(), groups)
    with pytest.raises(RelneuronError, match="is no file of counts"):
        Counts.read(tmp_path / "c")


@pytest.mark.parametrize(
    ("name", "shape"), [("sum.act", (2, 2, 4)), ("count.up", (2, 3, 3)), ("count.down", (2, 1, 5))]
)
def test_arrays_that_do_not_fit_together(tmp_path: Path, name: str, shape: Any) -> None:
    array = np.ones(shape, DTYPES[name.partition(".")[0]])
    write_raw(tmp_path / "c", good() | {name: array})
    with pytest.raises(RelneuronError, match="is no file of counts"):
        Counts.read(tmp_path / "c")


def test_a_missing_file_names_its_command(tmp_path: Path) -> None:
    with pytest.raises(RelneuronError, match="does not exist") as error:
        Counts.read(tmp_path / "counts.safetensors", "merge A B -o DIR")
    assert "relneuron merge A B -o DIR" in error.value.fix


def test_no_damage_ends_in_a_traceback(tmp_path: Path) -> None:
    """Every byte of the header flipped, and every length: counts, or one line that says what."""
    path = tmp_path / "counts.safetensors"
    make().write(path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    damaged = [whole[:i] for i in range(0, len(whole), 3)] + [whole + b"\0"]
    for bit in (1, 32, 128):
        damaged += [whole[:i] + bytes([whole[i] ^ bit]) + whole[i + 1 :] for i in range(header)]
    refused = 0
    for data in damaged:
        path.write_bytes(data)
        try:
            Counts.read(path)
        except RelneuronError as error:
            assert str(path) in error.cause
            refused += 1
    assert refused > len(damaged) * 0.8


def test_every_site_has_a_place() -> None:
    shape = (1, 1, 1)
    arrays = {f"count.{site}": np.ones(shape, np.int64) for site in reversed(SITES)}
    assert Counts(["en"], np.ones(1, np.int64), arrays).sites == list(SITES)
