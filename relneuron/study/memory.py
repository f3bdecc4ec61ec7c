"""`relneuron.run`: the whole study of a model in memory, as the command line makes it by name."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.installed import need
from relneuron.artifact.options import LoadOptions, options_of
from relneuron.study.folder import Study, load
from relneuron.study.settings import RunOptions

# What only says how a model is loaded by its name.
_LOADING = frozenset(f.name for f in fields(LoadOptions)) - {"backend"}
_NEEDS = ("transformers", "pydantic", "tqdm", "filelock", "jinja2", "matplotlib", "scipy")


def run(
    model: Any,
    tokenizer: Any,
    facts: Any,
    *,
    output: str | Path,
    name: str | None = None,
    force: bool = False,
    quiet: bool = False,
    **options: Any,
) -> Study:
    """The whole study of a model in memory: `relneuron run` as a function; returns its folder.

    model      a causal language model of transformers in eval mode, as it is: with an adapter of
               peft active, too, merged or not; one under torch.compile is refused
    facts      a folder of fact files; or in memory a list of dicts, a pandas.DataFrame or a
               datasets.Dataset (`study.facts.fact_files`): one row a fact with relation, subject,
               object and template, or one relation a row with what its fact file holds
    output     the study's folder: the same files as of the command line, and it goes on where it
               stopped. Facts in memory are written to `output`/facts. Another model (by the digest
               of its weights), other facts or options are refused there
    name       what the manifest and the report call the model; default: what it was loaded from
    options    fields of `RunOptions`, the flags of `relneuron run` with _ for -: top=200,
               chat_template=True, analyses=("sizes",). Those that load a model are refused

    Raises RelneuronError for what cannot be done, before anything is written.
    """
    need("relneuron.run", *_NEEDS)
    # What the package brings by name is imported without them.
    from relneuron.model.load import settle_arithmetic
    from relneuron.study.facts import Facts
    from relneuron.study.run import make_study

    check_given(model, tokenizer)
    _check_options(options)
    settle_arithmetic()
    make_study(
        name or name_of(model),
        lambda: (model, tokenizer),
        Facts.of(facts),
        Path(output),
        RunOptions(**options),
        force=force,
        quiet=quiet,
    )
    return load(output)


def _check_options(options: dict[str, Any]) -> None:
    known = [name for name in options_of(RunOptions) if name not in _LOADING]
    for key in options:
        if key in _LOADING:
            raise RelneuronError(
                f"{key} says how a model is loaded, and this one is in memory", "leave it out", 2
            )
        if key not in known:
            raise RelneuronError(f"run has no option {key!r}", f"use {', '.join(known)}", 2)


def check_given(model: Any, tokenizer: Any) -> None:
    """Refuse a model that would not compute what it does elsewhere, or something else."""
    if isinstance(model, str | Path):
        raise RelneuronError(
            f"{str(model)!r} is a name, not a model",
            "load it with AutoModelForCausalLM.from_pretrained, or use: relneuron run",
            2,
        )
    if not callable(tokenizer):
        raise RelneuronError(
            f"the tokenizer is {type(tokenizer).__name__!r}, which makes no tokens",
            "give the model's tokenizer: AutoTokenizer.from_pretrained",
            2,
        )
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise RelneuronError(
            "the model is compiled, and would be compiled again for every length of a batch",
            "give it as it was before torch.compile (model._orig_mod)",
            2,
        )
    if getattr(model, "training", False):
        raise RelneuronError(
            "the model is in training mode, in which dropout changes its answers",
            "call model.eval() before",
            2,
        )


def name_of(model: Any) -> str:
    """What a model in memory is called: as it was loaded, else its class."""
    return str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
