"""What `eval` is asked for: which neurons are off, or what they become, and which tasks are run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from relneuron.ablation.options import (
    CLEAN,
    FORCED,
    MEANS_OF,
    OFF,
    AblateOptions,
    GenerateOptions,
)
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.options import Only, Options, like, option
from relneuron.artifact.papers import EXPERTS
from relneuron.texts.options import ShardOptions, check_shard

MODES = ("zero", "scale", "mean", *FORCED)


@dataclass(frozen=True)
class ChangeOptions(Options):
    """Which neurons of a neurons.json are changed, and how.

    `mode`: `zero`, `scale` (times `factor`), `mean` (their stored mean: of the responses that were
    recorded in the neurons' folder, as `ablate` takes it, or without any, or with `moments`, that
    of their products, as `generate` takes it), or `p50`, `p90`, `off_mean` of recorded responses.
    With `set_to` the neurons of that set are at their mean activation besides (arXiv 2402.16438).
    """

    PANEL = OFF

    off: Sequence[str] | None = option(
        None,
        "Sets to switch off, or what --mode says, one run of the tasks each; clean is no set. "
        "Default: every set of --neurons; without --neurons none.",
    )
    mode: str = option(
        "zero",
        "What a neuron's output becomes: zero, scale; mean, its stored mean; or of its responses "
        "p50 or p90 on the relation's positives, off_mean on its negatives.",
        choices=MODES,
        papers=dict.fromkeys(FORCED, EXPERTS),
    )
    factor: float | None = option(None, "Factor of the outputs, with --mode scale.")
    scale_at: str | None = like(AblateOptions, "scale_at")
    mean_of: str = option(
        "all",
        "Prompts of a mean of responses: det prompts of all relations, or of the set's relation.",
        choices=MEANS_OF,
        only=Only(
            "with --mode mean, without --moments", lambda o: o.mode == "mean" and o.moments is None
        ),
    )
    moments: Path | None = option(
        None,
        "Folder with means of products: counts of the site product, made with --moments, or a "
        "contrast; default: the neurons' folder, where it has no responses.",
        only=Only("with --mode mean", lambda o: o.mode == "mean"),
    )
    set_to: str | None = like(GenerateOptions, "set_to")
    counts: Path | None = like(GenerateOptions, "counts")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.factor is not None) != (self.mode == "scale"):
            raise RelneuronError(
                "--factor and --mode scale belong together", "use --mode scale --factor 0.5, say", 2
            )
        if self.mode != "zero" and self.off is not None and not self.sets_off:
            raise RelneuronError(
                f"--mode {self.mode} changes nothing of the model itself",
                "name sets with --off",
                2,
            )

    @property
    def sets_off(self) -> list[str]:
        """The sets that `off` names, each once."""
        return [name for name in dict.fromkeys(self.off or ()) if name not in (CLEAN, "")]


@dataclass(frozen=True)
class EvalOptions(ChangeOptions):
    """Which tasks are run under each condition; the rest is the harness's own."""

    PANEL = "The tasks"

    tasks: Sequence[str] = option(
        (), "Tasks or groups of tasks, patterns such as mmlu_*, or YAML files."
    )
    random_seeds: int = option(
        0,
        "Number of random sets for each set: as many other neurons of each layer.",
        least=0,
        only=Only("with a set in --off", lambda o: o.off is None or bool(o.sets_off)),
    )
    num_fewshot: int | None = option(
        None, "Examples before each question; default: the task's.", least=0
    )
    limit: float | None = option(
        None, "Only so many documents of each task; below 1: this part of them.", above=0
    )
    batch_size: int = option(1, "Requests of a batch.", least=1)
    include_path: Sequence[str] = option((), "Folders with YAML files of more tasks.")
    apply_chat_template: bool = option(False, "Put every question into the chat template.")
    log_samples: bool = option(
        False, "Write what was asked and answered: samples/TASK.CONDITION.jsonl."
    )
    unsafe_code: bool = option(
        False, "Run tasks that execute the code that the model writes, on this machine."
    )
    shard: tuple[int, int] = like(
        ShardOptions,
        "shard",
        help="Only a part of the tasks under each condition, such as 1/3, and no results yet; add "
        "the parts with merge.",
    )

    def __post_init__(self) -> None:
        if not self.tasks:
            raise RelneuronError("--tasks names no task", "use --tasks hellaswag,arc_easy, say", 2)
        super().__post_init__()
        check_shard(self.shard)
        if self.limit is not None and self.limit >= 1 and self.limit != int(self.limit):
            raise RelneuronError(
                f"--limit {self.limit} is no number of documents",
                "give a whole number, or a part below 1",
                2,
            )
