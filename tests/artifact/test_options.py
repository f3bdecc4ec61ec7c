"""Options, their words, and the command line: each says the same as the others."""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import typer

from relneuron.ablation.options import AblateOptions
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.options import Flag, Kind, Only, Options, like, option, options_of, read
from relneuron.artifact.stage import load
from relneuron.cli.flags import taken
from relneuron.cli.main import app, stages
from relneuron.methods import attributions, rankings
from relneuron.texts.options import read_shard

TEXTS = ("en", "a b", "-x", "--top", "it's", 'say "no"', "中文", "{prompt}", "a\\b", "50 %")
NAMES = (*TEXTS, "a,b", ",", "a\\,b")  # of what is listed with commas
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def classes_of(stage: Any) -> list[type[Options]]:
    """The classes of options that a command takes."""
    if stage.name == "identify":
        return [ranking.options for ranking in rankings().values()]
    if stage.name == "attribute":
        return [one.options for one in attributions().values()]
    parameters = inspect.signature(load(stage.run), eval_str=True).parameters.values()
    hints = [p.annotation for p in parameters if isinstance(p.annotation, type)]
    return [hint for hint in hints if issubclass(hint, Options)]


TAKEN = [(stage.name, cls) for stage in stages() for cls in dict.fromkeys(classes_of(stage))]


def drawn(rng: random.Random, says: Flag, kind: Kind) -> Any:
    """A value that an option may have."""
    if kind.optional and rng.random() < 0.3:
        return None
    if says.show is not None and kind.many:  # --shard
        of = rng.randint(1, 9)
        return rng.randint(1, of), of
    if kind.many:
        known = list(says.choices) or {int: range(1, 99), str: NAMES}[kind.base]
        if says.repeats:
            known = [*TEXTS, "\n", "\\n", "a\nb"]
        least = 1 if says.some or kind.optional else 0
        return tuple(rng.sample(list(known), rng.randint(least, min(4, len(known)))))
    if says.choices:
        return rng.choice(says.choices)
    if kind.base is bool:
        return rng.random() < 0.5
    if kind.base is str:
        return rng.choice([*TEXTS, "", "\n"] if says.read else [*TEXTS, ""])
    low = next((x for x in (says.least, says.above) if x is not None), -100)
    high = next((x for x in (says.most, says.below) if x is not None), low + rng.choice((9, 9e5)))
    if kind.base is int:
        return rng.randint(int(low), int(high))
    if kind.base is float:
        return rng.uniform(low, high) or high
    return kind.base(rng.choice(("a", "b c", "-d")))


def random_options(cls: type[Options], rng: random.Random) -> Iterator[Options]:
    """Sets of options that are not refused; one that does nothing beside the others is default."""
    while True:
        chosen = rng.random()
        values = {
            name: drawn(rng, says, kind)
            for name, (_, says, kind) in options_of(cls).items()
            if rng.random() < chosen
        }
        try:
            made = cls(**values)
        except RelneuronError:
            continue
        for name, (field, says, _) in options_of(cls).items():
            if says.only is not None and not says.only.holds(made):
                made = replace(made, **{name: field.default})
        yield made


def parsed(command: str, cls: type[Options], words: list[str]) -> Options:
    """What a command takes `words` for."""
    needed: list[str] = []
    for param in COMMANDS[command].params:
        if param.required:
            needed += ["x"] if param.param_type_name == "argument" else [param.opts[-1], "x"]
    context = COMMANDS[command].make_context(command, [*needed, *words])
    return taken(cls, context.params)


@pytest.mark.parametrize(
    ("command", "cls"), TAKEN, ids=lambda value: getattr(value, "__name__", value)
)
def test_options_come_back_from_their_words(command: str, cls: type[Options]) -> None:
    rng = random.Random(f"{command} {cls.__name__}")
    for _, made in zip(range(200), random_options(cls, rng), strict=False):
        assert parsed(command, cls, made.words(all=True)) == made
        # The words that a report prints make the same results.
        assert parsed(command, cls, made.words()).recorded() == made.recorded()


def test_every_command_that_has_options_is_here() -> None:
    assert {name for name, _ in TAKEN} == {stage.name for stage in stages()} - {
        *("merge", "import", "export", "plan")
    }


@dataclass(frozen=True)
class Toy(Options):
    kind: str = option("a", "Kind.", choices=("a", "b"))
    size: int | None = option(None, "Size.", least=1)
    rate: float = option(
        0.5, "Rate.", above=0, below=1, only=Only("with --kind b", lambda o: o.kind == "b")
    )
    names: tuple[str, ...] = option(
        ("x",), "Names.", choices=("x", "y"), names={"all": ("x", "y")}, some=True
    )
    loud: bool = option(True, "Loud.")
    workers: int = option(1, "Workers.", least=0, records=False)


@pytest.mark.parametrize(
    ("asked", "cause"),
    [
        ({"kind": "c"}, "unknown --kind 'c'"),
        ({"size": 0}, "--size must be at least 1, got 0"),
        ({"rate": 1.0}, "--rate must be above 0 and below 1, got 1.0"),
        ({"rate": float("nan")}, "--rate nan is not finite"),
        ({"names": ()}, "--names names nothing"),
        ({"names": ("x", "x")}, "--names names one twice"),
        ({"names": "z"}, "unknown --names 'z'"),
        ({"workers": -1}, "--workers must be at least 0, got -1"),
    ],
)
def test_what_an_option_cannot_be(asked: dict[str, Any], cause: str) -> None:
    with pytest.raises(RelneuronError, match=cause) as error:
        Toy(**asked)
    assert error.value.exit_code == 2 and error.value.fix


@pytest.mark.parametrize("text", ["²", "1,²", "-1", "1e3", "1" * 5000, "x"])
def test_what_is_no_list_of_numbers(text: str) -> None:
    _, says, kind = options_of(AblateOptions)["sizes"]
    with pytest.raises(RelneuronError, match="unknown number in --sizes"):
        read(says, kind, text)
    with pytest.raises(RelneuronError, match="unknown --shard"):
        read_shard(f"1/{text}")


def test_what_is_recorded_and_printed() -> None:
    toy = Toy(names=["y", "x"], loud=False, workers=3)  # type: ignore[arg-type]
    assert toy.recorded() == {
        "kind": "a",
        "size": None,
        "rate": None,
        "names": ["y", "x"],
        "loud": False,
    }
    assert toy.words() == ["--kind", "a", "--names", "y,x", "--no-loud"]
    assert toy.words(all=True)[-2:] == ["--workers", "3"]
    assert Toy(kind="b").recorded()["rate"] == 0.5
    assert Toy(names=("x", "y")).words()[2:4] == ["--names", "all"]


def test_an_option_of_another_class_with_its_own_default() -> None:
    @dataclass(frozen=True)
    class Mine(Options):
        kind: str = like(Toy, "kind", "b")

    assert Mine().words() == ["--kind", "b"]
    assert options_of(Mine)["kind"][1] == options_of(Toy)["kind"][1]
    assert Toy(kind="b").part(Mine) == Mine("b")


def test_every_help_text_is_a_sentence() -> None:
    for command in COMMANDS.values():
        for param in command.params:
            text = param.help
            assert text and text[-1] in ".:)" and text[0] == text[0].upper() or text[0].islower(), (
                text
            )
