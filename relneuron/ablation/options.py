"""What `ablate`, `nll` and `generate` are asked for: what is off, and what is measured.

The stages, their commands and study/run.py take these options.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.options import Only, OomOptions, option
from relneuron.artifact.papers import ANLS, EXPERTS, GAIN, LAPE, MMNEURON, SAFETY
from relneuron.artifact.prompts import SPLITS
from relneuron.artifact.words import escaped, unescaped
from relneuron.texts.options import PackingOptions, ShardOptions

CHOOSE = ("acc", "acc_norm")
ANALYSES = ("matched", "sizes", "sites", "concepts", "gain", "perplexity")
# Modes whose values are of responses to what the set's relation was found with, or compared with,
# and the column of expertise.csv that they are.
FORCED = {"p50": "on_p50", "p90": "on_p90", "off_mean": "off_mean"}
MODES = ("zero", "mean", "scale", "patch", *FORCED)
# Of text that goes on: what the products of a set become.
STORED = ("mean", "noise")  # modes that need stored moments
EXCHANGES = ("zero", "patch", *STORED)
CLEAN, DONOR = "clean", "donor"  # the model itself, and the one that values come from
FROM_RESPONSES = ("mean", *FORCED)  # modes that need what was recorded
MEANS_OF = ("all", "relation")
# Headings of the help.
OFF, ASKED, BESIDE = "What becomes of the neurons", "What is asked", "What it is compared with"
MEASURED = "What is measured"
POSITIONS = ("all", "prompt", "last")
SCALE_AT = ("output", "product")


@dataclass(frozen=True)
class AblateOptions(ShardOptions):
    """What is asked, and what happens to the neurons; the defaults are the paper's.

    `analyses`: of ANALYSES, beside the sets and the random ones. `sizes`: of the sets of the
    analysis sizes; None: the paper's nine. `mode`: `zero`, `scale` (outputs times `factor`; with
    `scale_at` "product" the products: of a gate the same as of an up) or
    `mean` (outputs become their mean response over the det prompts: of all relations, or with
    `mean_of` "relation" of the relation that the set belongs to), or `p50`, `p90`, `off_mean`: the
    median or 90th percentile of their responses on what the set's relation was found with, or the
    mean on what it was compared with (random sets: of all of these); or `patch`: the products
    become those of the model `donor`, which reads the same tokens. `positions`: `all` tokens, those
    of the `prompt`, or the `last` of the prompt and all of the answer; the neutral sentences have
    all. `generate`: answers of so many greedy tokens, right if they begin with the object.
    `choose`: the answer is the option with the greatest log-likelihood behind the prompt, or the
    greatest one divided by the option's number of characters.
    """

    PANEL = OFF

    splits: Sequence[str] = option(
        ("eva", "eva2"),
        "Prompts to ask when neurons are off.",
        choices=SPLITS,
        some=True,
        panel=ASKED,
    )
    random_seeds: int = option(
        10, "Number of random neuron sets to compare with.", least=0, panel=BESIDE
    )
    analyses: Sequence[str] = option(
        (),
        "Analyses beside the main one; main stands for none.",
        choices=ANALYSES,
        names={"main": (), "all": ANALYSES},
        is_set=True,
        papers={"gain": GAIN},
        panel=BESIDE,
    )
    sizes: Sequence[int] | None = option(
        None,
        "Set sizes of the analysis sizes, such as 10,50,200; default: the paper's nine, scaled.",
        least=1,
        is_set=True,
        only=Only("with --analyses sizes", lambda o: "sizes" in o.analyses),
        panel=BESIDE,
    )
    mode: str = option(
        "zero",
        "What a neuron's output becomes: zero, mean, scale; patch, another model's value; or of "
        "its responses p50 or p90 on the relation's positives, off_mean on its negatives.",
        choices=MODES,
        papers={"patch": SAFETY, **dict.fromkeys(FORCED, EXPERTS)},
    )
    donor: str | None = option(
        None,
        "Model that reads the same tokens, whose values the neurons get with --mode patch.",
        flag="from",
    )
    factor: float | None = option(None, "Factor of the outputs, with --mode scale.")
    scale_at: str | None = option(
        None,
        "What is scaled with --mode scale: output (of the projection that a neuron is named by) or "
        "product (what down reads, of a neuron of gate or up); default: product, where the neurons "
        "were found by its gradient.",
        choices=SCALE_AT,
        only=Only("with --mode scale", lambda o: o.mode == "scale"),
    )
    mean_of: str = option(
        "all",
        "Prompts of the mean, with --mode mean: det prompts of all relations, or of the set's "
        "relation.",
        choices=MEANS_OF,
        only=Only("with --mode mean", lambda o: o.mode == "mean"),
    )
    positions: str = option(
        "all",
        "Tokens at which neurons are off: all, prompt, or last (of the prompt, and the answer's).",
        choices=POSITIONS,
    )
    unrelated: int | None = option(
        None,
        "Ask each set only the prompts of its relation or fact, and so many others, drawn; "
        "default: all.",
        least=0,
        panel=ASKED,
    )
    generate: int | None = option(
        None,
        "Answer with so many tokens of free text, which are right if they begin with the object.",
        least=1,
        panel=ASKED,
    )
    any_set: bool = option(False, "Also switch off sets that no prompt's relation has.")
    accept_object_prefix: bool = option(
        False,
        "Also count a prediction that begins with the object as correct ('Japan.' for 'Japan').",
        only=Only(
            "without --generate and --choose", lambda o: o.generate is None and o.choose is None
        ),
        panel=ASKED,
    )
    choose: str | None = option(
        None,
        "Answer with one of a prompt's options, whole: the most probable one (acc), or the most "
        "probable one by its characters (acc_norm).",
        choices=CHOOSE,
        only=Only("without --generate", lambda o: o.generate is None),
        panel=ASKED,
    )
    module_sets: bool = option(
        False,
        "Also switch off, of each relation's neurons and for its own prompts, those in each of a "
        "vision-language model's sets of modules: language, vision, ..., all.",
        papers={"": MMNEURON},
    )
    batch_tokens: int = option(4096, "Tokens of a batch, padding included.", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.factor is not None) != (self.mode == "scale"):
            raise RelneuronError(
                "--factor and --mode scale belong together", "use --mode scale --factor 0.5, say", 2
            )
        check_donor(self.donor, self.mode)


def check_donor(donor: str | None, mode: str) -> None:
    """Refuse another model without the mode that takes its values, and the reverse."""
    if (donor is not None) != (mode == "patch"):
        raise RelneuronError(
            "--from and --mode patch belong together", "use --mode patch --from MODEL", 2
        )


@dataclass(frozen=True)
class NllOptions(PackingOptions, ShardOptions):
    """What of each text is read, and under which masks beside the sets."""

    PANEL = "What is read"

    windows: int = option(256, "Maximum number of windows of each group.", least=1)
    join: str | None = option(
        None,
        "Text that joins the documents of a group to one, such as \\n\\n for blank lines between "
        "them, as perplexity is measured on Wikitext; default: each is tokenised by itself.",
        read=unescaped,
        show=escaped,
        only=Only("with --packing packed", lambda o: o.mode == "packed"),
    )
    random_sets: int = option(
        0, "Number of random sets, each as large as the largest set.", least=0, panel=BESIDE
    )
    batch_tokens: int = option(8192, "Tokens of a batch, padding included.", least=1)
    workers: int | None = option(
        None, "Number of processes that tokenise ahead.", least=1, records=False
    )


STOP = ("\nQ:", "\nA:")  # arXiv 2402.16438: the next question of the model's own making


@dataclass(frozen=True)
class ExchangeOptions(OomOptions):
    """Which neurons are off, or set to what, while a text goes on.

    `mode` says what becomes of a set's neurons (arXiv 2406.14144): `zero`, or of their products
    `patch`, those of the model `donor` at the same tokens, `mean`, a stored mean of them, or
    `noise`, themselves and noise of so many stored standard deviations.
    """

    PANEL = OFF

    off: Sequence[str] = option(
        (CLEAN,),
        "Sets to switch off, or what --mode says, one run of the prompts each; clean is no set, "
        "and donor the model of --from itself.",
    )
    mode: str = option(
        "zero",
        "What the sets' neurons become: zero; patch, their value in another model that reads the "
        "same text; mean, their stored mean; noise, themselves and noise.",
        choices=EXCHANGES,
        papers=dict.fromkeys(("patch", *STORED), SAFETY),
    )
    donor: str | None = option(
        None,
        "Model whose values the neurons get, with --mode patch.",
        flag="from",
    )
    moments: Path | None = option(
        None,
        "Folder with the means of --mode mean and the deviations of --mode noise: counts of the "
        "site product, made with --moments; default: that of the neurons.",
        only=Only("with --mode mean or noise", lambda o: o.mode in STORED),
    )
    noise: float = option(
        3.0,
        "Standard deviations of the noise that is added.",
        above=0,
        only=Only("with --mode noise", lambda o: o.mode == "noise"),
    )
    noise_seed: int = option(
        0,
        "Seed of the noise.",
        least=0,
        only=Only("with --mode noise", lambda o: o.mode == "noise"),
    )
    random_seeds: int = option(
        0,
        "Number of random sets for each set of --off: as many other neurons of each layer.",
        least=0,
        only=Only("with a set in --off", lambda o: bool(o.sets_off)),
    )
    set_to: str | None = option(
        None,
        "Set whose neurons get their mean activation.",
        flag="set",
        papers={"": LAPE},
    )
    counts: Path | None = option(
        None,
        "Folder with the counts (made with --moments) of --set; default: that of the neurons.",
        only=Only("with --set", lambda o: o.set_to is not None),
    )
    module_sets: bool = option(
        False,
        "In place of --off: of each prompt's own group switch off the neurons of each of a "
        "vision-language model's sets of modules: none, language, vision, ..., all.",
        papers={"": MMNEURON},
    )


@dataclass(frozen=True)
class GenerateOptions(ExchangeOptions, ShardOptions):
    """Which neurons are off or set to a mean, and how text is made.

    Text is made greedily from float32 logits after a repetition penalty: a token of the prompt or
    of the output has its logit divided by `repetition_penalty` if it is positive, times it
    otherwise (arXiv 1909.05858). With a `temperature` it is sampled (`continuer.sample`), once with
    each of the seeds 0 to `seeds` - 1; a prompt's draw is the same whatever is off.
    """

    PANEL = "How text is made"

    max_new_tokens: int = option(256, "Maximum number of new tokens per output.", least=1)
    repetition_penalty: float = option(
        1.1, "The logits of tokens that stood before are divided by this; 1 is none.", above=0
    )
    stop: Sequence[str] = option(
        STOP,
        "Text before which an output ends; may be given several times. Default: \\nQ: and \\nA:.",
        repeats=True,
    )
    template: str | None = option(
        None,
        "Text around each prompt, such as 'Q: {prompt}\\nA:'.",
        read=unescaped,
        show=escaped,
    )
    temperature: float | None = option(
        None, "Sample at this temperature; default: always the most probable token.", above=0
    )
    top_k: int | None = option(
        None,
        "Sample among so many of the most probable tokens only; default: among all.",
        least=1,
        only=Only("with --temperature", lambda o: o.temperature is not None),
    )
    seeds: int = option(
        1,
        "Number of times that each prompt is sampled, with the seeds 0, 1, ...",
        least=1,
        only=Only("with --temperature", lambda o: o.temperature is not None),
    )
    measure: str | None = option(
        None,
        "Score the outputs by the prompts' answers; a function of your own is named as "
        "module:function.",
        papers={"anls": ANLS},
        panel=MEASURED,
        offers=("exact", "anls", "letter", "MODULE:FUNCTION"),
    )
    anls_threshold: float = option(
        0.5,
        "Part of an answer that may be wrong before anls is 0; 1: any.",
        above=0,
        most=1,
        only=Only("with --measure anls", lambda o: o.measure == "anls"),
        panel=MEASURED,
    )
    lens: int | None = option(
        None,
        "Read the layers of so many tokens of each output by the logit lens: entropy, top tokens.",
        least=1,
        papers={"": MMNEURON},
        panel=MEASURED,
        only=Only("without --from", lambda o: o.donor is None),
    )
    batch_tokens: int = option(8192, "Tokens of a batch, padding included.", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "off", self.off or (CLEAN,))
        if self.module_sets and (self.off != (CLEAN,) or self.set_to is not None):
            raise RelneuronError(
                "--module-sets says itself what is off, beside --off or --set",
                "leave out --module-sets, or the others",
                2,
            )
        check_donor(self.donor, self.mode)
        if self.mode != "zero" and (self.module_sets or self.set_to is not None):
            raise RelneuronError(
                f"--mode {self.mode} says what the neurons of --off become, beside --set or "
                "--module-sets",
                "leave out --mode, or the others",
                2,
            )
        asks_donor = self.mode == "patch" and DONOR in self.off
        if self.mode != "zero" and not (self.sets_off or asks_donor):
            raise RelneuronError(
                f"--mode {self.mode} changes nothing of the model itself",
                "name sets with --off",
                2,
            )
        if "" in self.stop:
            raise RelneuronError("an empty stop string ends every text", "leave it out", 2)

    @property
    def sets_off(self) -> list[str]:
        """The sets that `off` names, each once."""
        own = (CLEAN, "", DONOR) if self.mode == "patch" else (CLEAN, "")
        return [name for name in dict.fromkeys(self.off) if name not in own]

    @property
    def n_seeds(self) -> int:
        """How often a prompt is asked: greedy text is the same with every seed."""
        return self.seeds if self.temperature is not None else 1
