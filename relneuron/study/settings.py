"""What a whole study is made with: the options of `relneuron run` and `relneuron demo`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from relneuron.ablation.options import ANALYSES, FROM_RESPONSES, AblateOptions
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.options import (
    LoadOptions,
    Only,
    OomOptions,
    Options,
    like,
    option,
    options_of,
    refuse_stray,
)
from relneuron.methods import rankings
from relneuron.methods.responses.options import RankOptions, RecordOptions, responses_option
from relneuron.texts.options import PromptsOptions

DEMO = "relneuron demo"  # what the bundled model is called
CONTRAST = "contrast"  # the demo of two models


@dataclass(frozen=True)
class ServeOptions(Options):
    """Where `look` answers a browser, in place of a page."""

    PANEL = "The server"

    serve: bool = option(
        False, "Show all neurons in a browser, by a server on this machine, in place of a page."
    )
    host: str = option(
        "127.0.0.1",
        "Address to listen at; at another one than this machine's own everybody who knows the URL "
        "may look.",
        only=Only("with --serve", lambda o: o.serve),
    )
    port: int = option(
        0,
        "Port to listen at; 0: one that is free.",
        least=0,
        most=65535,
        only=Only("with --serve", lambda o: o.serve),
    )


CARDS = 200  # a page of so many neurons is about 2 MB


def names_file(neurons: Sequence[str]) -> bool:
    """Whether `--neurons` names a file of sets, not neurons."""
    return len(neurons) == 1 and neurons[0].endswith(".json")


@dataclass(frozen=True)
class LookOptions(OomOptions):
    """Which neurons get a card, and how much stands on it."""

    PANEL = "The cards"

    neurons: Sequence[str] = option(
        (),
        "A neurons.json, or neurons by name, such as 12.gate.345,3.up.7; default: the sets of DIR.",
    )
    cards: int = option(
        CARDS,
        "Neurons that get a card: the best of each set, then the second ones, and so on.",
        least=1,
        only=Only("with neurons of sets", lambda o: not o.neurons or names_file(o.neurons)),
    )
    examples: int = option(8, "Examples of each neuron.", least=1, most=100)
    batch_tokens: int = like(RecordOptions, "batch_tokens")


@dataclass(frozen=True)
class RunOptions(PromptsOptions, RecordOptions, RankOptions, AblateOptions, LoadOptions):
    """What a study is made with; the defaults are the paper's."""

    PANEL = "The study"

    chat_template: bool = option(False, "Wrap every prompt in the model's chat template.")
    method: str = option("ap", "How neurons are ranked; ap is average precision.", offers=("ap",))
    drop_responses: bool = option(False, "Keep no responses: they are gone once neurons are shown.")
    responses: str = responses_option(Only("with --drop-responses", lambda o: o.drop_responses))
    cards: int = like(
        LookOptions,
        "cards",
        help="Neurons that look.html and the report show, the best of each set; 0: none.",
        least=0,
        only=None,
    )
    # Every set of a study is of a relation that its prompts ask, and is found with right answers.
    any_set: bool = False
    validate: bool = True
    # A study is of one model.
    donor: str | None = None
    # record reads text, which only the language model has neurons for.
    module_sets: bool = False
    # A study has its relations' templates, and asks every set everything.
    unrelated: int | None = None
    choices: int | None = None
    choose: str | None = None
    choose_from: int = 4
    # Its stages read each other's results, which a part has not.
    shard: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method != "ap":
            other = f"; {self.method} is one of relneuron identify"
            raise RelneuronError(
                f"run ranks by ap, not by {self.method}",
                f"leave out --method{other if self.method in rankings() else ''}",
                2,
            )
        if self.mode == "patch":
            raise RelneuronError(
                "run has no second model for --mode patch",
                "use another mode, or relneuron ablate --mode patch --from MODEL",
                2,
            )
        if self.mode in FROM_RESPONSES and self.drop_responses:
            raise RelneuronError(
                f"--mode {self.mode} takes its values from the responses",
                "leave out --drop-responses",
                2,
            )


@dataclass(frozen=True)
class DemoOptions(Options):
    """What the demo lets one choose of a study."""

    PANEL = RunOptions.PANEL

    top: int | None = like(RunOptions, "top")
    fdr: float | None = like(RunOptions, "fdr")
    permutations: int = like(RunOptions, "permutations")
    bootstrap: int = like(RunOptions, "bootstrap")
    noise: int = like(RunOptions, "noise")
    random_seeds: int = like(RunOptions, "random_seeds")
    cards: int = like(RunOptions, "cards")
    analyses: Sequence[str] = like(
        RunOptions,
        "analyses",
        ("gain",),
        help="Analyses beside the main one; main stands for none. Or contrast alone, a study of "
        "two models.",
        choices=(*ANALYSES, CONTRAST),
    )
    sizes: Sequence[int] | None = like(RunOptions, "sizes")

    def __post_init__(self) -> None:
        super().__post_init__()
        if CONTRAST not in self.analyses:
            return
        if self.analyses != (CONTRAST,):
            raise RelneuronError(
                "--analyses contrast is a study of its own", "give it alone, and its own -o", 2
            )
        for name, (f, says, _) in options_of(DemoOptions).items():
            if name != "analyses" and getattr(self, name) != f.default:
                refuse_stray(says.flag, "without --analyses contrast")
