"""`relneuron.stages`: the stages of the command line as functions, each with its options' class.

A name is imported when it is first used. `record(name, model, tokenizer, prompts, folder,
RecordOptions(...))` does what `relneuron record` does with a model in memory: the same files,
manifest and resume; `name` is what the manifest calls the model. Paths are pathlib.Path.
"""

from __future__ import annotations

from typing import Any

from relneuron.artifact.stage import load

# The functions by the name of their command, and the classes of their options.
_HOMES = {
    "prompts": "texts.prompts:write_prompts",
    "PromptsOptions": "texts.options:PromptsOptions",
    "record": "methods.responses.record:record",
    "RecordOptions": "methods.responses.options:RecordOptions",
    "identify": "methods.responses.rank:identify",
    "RankOptions": "methods.responses.options:RankOptions",
    "identify_at_once": "methods.responses.at_once:identify_at_once",
    "AtOnceOptions": "methods.responses.options:AtOnceOptions",
    "ablate": "ablation.ablate:ablate_prompts",
    "AblateOptions": "ablation.options:AblateOptions",
    "nll": "ablation.nll:nll",
    "NllOptions": "ablation.options:NllOptions",
    "generate": "ablation.generate:generate",
    "GenerateOptions": "ablation.options:GenerateOptions",
    "eval": "ablation.harness.stage:evaluate",
    "EvalOptions": "ablation.harness.options:EvalOptions",
    "effect": "ablation.effect:effect",
    "EffectOptions": "ablation.effect_options:EffectOptions",
    "parse_sources": "texts.sources:parse_sources",
    "SourceOptions": "texts.options:SourceOptions",
    "count": "methods.counts.count:count",
    "CountOptions": "texts.options:CountOptions",
    "merge": "methods.counts.merge:merge",
    "identify_counts": "methods.counts.rank:identify_counts",
    "LapeOptions": "methods.counts.options:LapeOptions",
    "attribute": "methods.gains.attribute:attribute",
    "AttributeOptions": "methods.gains.options:AttributeOptions",
    "identify_gains": "methods.gains.rank:identify_gains",
    "attribute_gradients": "methods.gradients.attribute:attribute",
    "IgOptions": "methods.gradients.options:IgOptions",
    "RelevanceOptions": "methods.gradients.options:RelevanceOptions",
    "identify_gradients": "methods.gradients.rank:identify_gradients",
    "edit": "methods.gradients.edit:edit_model",
    "EditOptions": "methods.gradients.options:EditOptions",
    "load_pair": "model.pair:load_pair",
    "contrast": "methods.contrast.contrast:contrast",
    "ContrastOptions": "methods.contrast.options:ContrastOptions",
    "identify_contrast": "methods.contrast.rank:identify_contrast",
    "probe": "methods.contrast.probe:probe",
    "ProbeOptions": "methods.contrast.options:ProbeOptions",
    "look": "study.look:look",
    "LookOptions": "study.settings:LookOptions",
    "report": "study.run:report_stage",
    "figures": "study.figures:figures",
    "FigureOptions": "report.save:FigureOptions",
}
__all__ = list(_HOMES)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'relneuron.stages' has no attribute {name!r}")
    value = load(f"relneuron.{_HOMES[name]}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
