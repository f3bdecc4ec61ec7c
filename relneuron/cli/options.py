"""The options of the command line, each written once with its help; the commands take them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.reading import allow_record_mib

state = {"debug": False, "interrupted": False}


def _debug(value: bool) -> None:
    state["debug"] = state["debug"] or value


Model = Annotated[str, typer.Argument(metavar="MODEL", help="Model folder or hub name.")]
Prompts = Annotated[Path, typer.Argument(metavar="PROMPTS", help="A prompts.jsonl.")]
Study = Annotated[Path, typer.Argument(metavar="DIR", help="A study directory.")]
Output = Annotated[Path, typer.Option("-o", "--output", help="Where to write.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite what is there.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar.")]
Debug = Annotated[bool, typer.Option("--debug", callback=_debug, help="Traceback on errors.")]
MaxRecord = Annotated[
    int,
    typer.Option(
        min=1,
        callback=allow_record_mib,
        help="Largest line, record or cell that is read, in MiB; a JSON file may have four.",
    ),
]
Eva = Annotated[int, typer.Option(min=1, help="Facts per relation kept for evaluation.")]
Seed = Annotated[int, typer.Option(help="Seed of the split, the negatives and all that is drawn.")]
Suffix = Annotated[
    str | None,
    typer.Option(
        help="Follows every template of the files' own language; default: what each file says, "
        "or '? Answer:' after English ones."
    ),
]
ChatTemplate = Annotated[
    bool,
    typer.Option("--chat-template", help="Wrap every prompt in the model's chat template."),
]
ChatTemplateOf = Annotated[
    str | None,
    typer.Option(
        "--chat-template",
        metavar="MODEL",
        help="Wrap every prompt in the chat template of this model (folder or hub name).",
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16, float16; default: float32 on a CPU, else the model's."),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda; default: the GPU if there is one.")]
Revision = Annotated[str | None, typer.Option(help="Revision of a hub model.")]
Backend = Annotated[str, typer.Option(help="Kernels: auto, reference, cpu, triton.")]
BatchTokens = Annotated[int, typer.Option(min=1, help="Padded tokens per batch.")]
Pooling = Annotated[str, typer.Option(help="A prompt's response: mean over tokens, or last.")]
ExcludeBos = Annotated[
    bool, typer.Option("--exclude-bos", help="Leave the first token out of the mean.")
]
Attention = Annotated[
    bool,
    typer.Option(
        "--attention", help="Also record the outputs of the attention's projections: q, k, v, o."
    ),
]
AcceptPrefix = Annotated[
    bool,
    typer.Option(
        "--accept-object-prefix",
        help="Also correct: a prediction that begins with the object ('Japan.' for 'Japan').",
    ),
]
Method = Annotated[str, typer.Option(help="How neurons are ranked: ap (average precision).")]
Top = Annotated[
    int | None,
    typer.Option(help="Neurons per relation; default: 3000, at most a tenth of the model's."),
]
Ends = Annotated[
    str,
    typer.Option(
        help="Which end of the ranking by ap: top, bottom (the lowest scores), or both, half of "
        "--top from each."
    ),
]
Fdr = Annotated[
    float | None,
    typer.Option(
        help="In place of --top: all neurons below this false discovery rate, such as 0.05."
    ),
]
Permutations = Annotated[
    int, typer.Option(help="Shuffled labels for each chosen neuron's p-value; 0: none.")
]
Bootstrap = Annotated[
    int, typer.Option(help="Resamples of the prompts for each score's 95 % interval; 0: none.")
]
Noise = Annotated[
    int, typer.Option(help="Columns of noise that q-values compare with; 0: none, no --fdr.")
]
Negatives = Annotated[int, typer.Option(min=1, help="Negative prompts per positive one.")]
Splits = Annotated[str, typer.Option(help="What to ask when neurons are off: eva,eva2,det.")]
RandomSeeds = Annotated[int, typer.Option(min=0, help="Random neuron sets to compare with.")]
Analyses = Annotated[
    str,
    typer.Option(help="main, all, or some of: matched,sizes,sites,concepts,gain,perplexity."),
]
Sizes = Annotated[
    str, typer.Option(help="Set sizes of the analysis sizes; default: the paper's nine, scaled.")
]
Mode = Annotated[
    str,
    typer.Option(
        help="What a neuron's output becomes: zero, mean, scale; or of its responses p50, p90 on "
        "the relation's positives, off_mean on its negatives."
    ),
]
Factor = Annotated[float | None, typer.Option(help="Of --mode scale.")]
MeanOf = Annotated[
    str, typer.Option(help="Of --mode mean: over the det prompts of all, or of the set's relation.")
]
Positions = Annotated[str, typer.Option(help="Tokens: all, prompt, last (and the answer's).")]
Generate = Annotated[
    int | None,
    typer.Option(min=1, help="Free text of so many tokens; right if it begins with the object."),
]
Oom = Annotated[str, typer.Option(help="Out of memory: split halves the batches, error ends.")]
AnySet = Annotated[bool, typer.Option("--any-set", help="Also sets that no prompt's relation has.")]
DropResponses = Annotated[
    bool, typer.Option("--drop-responses", help="Delete responses.safetensors after identify.")
]

# Of `bench` only.
Op = Annotated[
    str | None,
    typer.Argument(metavar="[OP]", help="swiglu_stats, average_precision, logprob_gain."),
]
Quick = Annotated[bool, typer.Option("--quick", help="Tiny sizes: does it run at all.")]
Full = Annotated[bool, typer.Option("--full", help="Every size, dtype and layout.")]
Dtypes = Annotated[str, typer.Option(help="float32,bfloat16,float16 in place of all.")]
Tokens = Annotated[str, typer.Option(help="Numbers of tokens, such as 2048,8192.")]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads; 0: as torch chooses.")]
NoCompile = Annotated[
    bool, typer.Option("--no-compile", help="Without torch.compile (needs a C++ compiler).")
]
BenchOutput = Annotated[
    Path | None, typer.Option("-o", "--output", help="Folder for the csv and the roofline.")
]


def size_list(text: str) -> tuple[int, ...] | None:
    """The sizes of --sizes, ascending; None for the default."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdigit() and int(part) for part in parts):
        raise RelneuronError(f"unknown size in {text!r}", "use numbers such as 10,50,200", 2)
    return tuple(sorted({int(part) for part in parts})) or None


def split_list(text: str) -> tuple[str, ...]:
    """The splits of --splits."""
    splits = tuple(part.strip() for part in text.split(",") if part.strip())
    unknown = [part for part in splits if part not in ("det", "eva", "eva2")]
    if unknown or not splits:
        raise RelneuronError(f"unknown split in {text!r}", "use det, eva, eva2", 2)
    return splits


def check_folder(output: Path) -> None:
    """Refuse a file where a folder is to be."""
    if output.is_file():
        raise RelneuronError(f"{output} is a file", "give a folder", 2)


def names(text: str) -> tuple[str, ...]:
    """The names of an option such as --sites or --groups, in order."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
