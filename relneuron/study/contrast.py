"""A whole study of two models: contrast, identify, generate, effect, report, each once.

`relneuron demo --analyses contrast` calls it; it goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relneuron.ablation.effect import effect
from relneuron.ablation.effect_options import EffectOptions
from relneuron.ablation.generate import generate
from relneuron.ablation.options import CLEAN, DONOR, GenerateOptions
from relneuron.artifact.files import Json, atomic_write, sha256
from relneuron.artifact.manifest import Manifest, same_model
from relneuron.artifact.neurons import NeuronFile
from relneuron.artifact.prompts import Prompt, prompts_bytes
from relneuron.methods.contrast.choices import ChangeOptions
from relneuron.methods.contrast.contrast import contrast
from relneuron.methods.contrast.options import ContrastOptions
from relneuron.methods.contrast.rank import identify_contrast, identify_contrast_inputs
from relneuron.methods.contrast.study import EFFECT, OUTPUTS
from relneuron.model.pair import Pair
from relneuron.model.ranks import Ranks, sharing
from relneuron.study.run import record_whole, report_stage


@dataclass(frozen=True)
class Plan:
    """What is asked of two models.

    contrasted  prompts whose tokens are compared; with answers of a few tokens also the last one of
                the prompt counts, which says the first
    asked       prompts that are answered with values patched
    group       the group of the contrasted prompts that neurons are chosen by
    cost        what an answer costs (`EffectOptions.cost`)
    made_by     the command of the whole, as `artifact.stage.command` makes it
    """

    contrasted: Sequence[Prompt]
    asked: Sequence[Prompt]
    group: str
    cost: str
    made_by: list[list[str]]
    sizes: Sequence[int] = (25, 50, 100, 200, 400)
    random_seeds: int = 3
    max_new_tokens: int = 6

    @property
    def contrast(self) -> ContrastOptions:
        return ContrastOptions(positions="predicting", max_new_tokens=self.max_new_tokens)

    @property
    def choice(self) -> ChangeOptions:
        return ChangeOptions(sizes=self.sizes, groups=(self.group,))

    def generate(self, sets: Sequence[str], donor: str) -> GenerateOptions:
        return GenerateOptions(
            off=(CLEAN, DONOR, *sets),
            mode="patch",
            donor=donor,
            random_seeds=self.random_seeds,
            max_new_tokens=self.max_new_tokens,
            repetition_penalty=1.0,
        )


def contrast_study(
    pair: Pair,
    plan: Plan,
    folder: Path,
    *,
    force: bool = False,
    quiet: bool = False,
    say: Callable[[str], object] = lambda text: None,
) -> Path:
    """Make, or go on with, the study of a pair in `folder`; returns the report's path.

    outputs.jsonl has the answers of both models and of A with B's values in each set of the choice
    and in its random sets, effect.csv what they do to the cost. Of several processes the first one
    decides what is left to do, and all share the stages that ask a model.
    """
    neurons, outputs, effects = (folder / name for name in ("neurons.json", OUTPUTS, EFFECT))
    prompts = {name: folder / f"{name}.jsonl" for name in ("contrasted", "asked")}
    with sharing(pair.a, folder) as ranks:
        if ranks.rank:
            ranks.serve(pair, pair.tokenizer)
            return folder / "report.html"
        for name, path in prompts.items():
            data = prompts_bytes(getattr(plan, name))
            if not path.exists() or path.read_bytes() != data:
                atomic_write(path, data)
        how = {"force": force, "quiet": quiet}
        ranks.call(_contrast, "", pair, None, prompts["contrasted"], folder, plan.contrast, **how)
        inputs = identify_contrast_inputs(folder, plan.choice)
        if not Manifest(folder).is_done("identify", inputs, force=force):
            identify_contrast(folder, neurons, plan.choice, force=True)
        sets = NeuronFile.read(neurons).sets
        for name, found in sets.items():
            say(f"{name}: {len(found):,} neurons")
        _answer(pair, plan, folder, [neurons, prompts["asked"], outputs], [*sets], ranks, **how)
        inputs = {"outputs": sha256(outputs), "cost": plan.cost}
        if not Manifest(folder).is_done("effect", inputs, force=force):
            asked = (outputs, effects, EffectOptions(cost=plan.cost))
            ranks.call(_effect, "", pair, None, *asked, force=True, quiet=quiet)
            costs = effects.with_name(f"{effects.stem}.costs.csv")
            Manifest(folder).finish("effect", inputs, [effects, costs], reads=[outputs])
        stages = [stage for stage in Manifest(folder).data["stages"] if stage != "report"]
        record_whole(folder, plan.made_by, stages)
        report = report_stage(folder, folder / "report.html", force=force, resume=True)
        ranks.dismiss()
    return report


# Stages of a pair as `Ranks.call` has them: a name, what is asked, a tokenizer, and their own.


def _contrast(_name: str, pair: Pair, _tokenizer: Any, *asked: Any, **how: Any) -> None:
    contrast(pair, *asked, **how)


def _generate(name: str, pair: Pair, _tokenizer: Any, *asked: Any, **how: Any) -> None:
    generate(name, pair.a, pair.tokenizer, *asked, pair=pair, **how)


def _effect(_name: str, _pair: Pair, _tokenizer: Any, *asked: Any, **how: Any) -> None:
    effect(*asked, **how)


def _answer(
    pair: Pair,
    plan: Plan,
    folder: Path,
    files: Sequence[Path],
    sets: Sequence[str],
    ranks: Ranks,
    *,
    force: bool,
    quiet: bool,
) -> None:
    """The answers of both models, and of A with B's values in each set, unless they are there."""
    neurons, asked, outputs = files
    name_a, name_b = (str(described["id"]) for described in pair.described)
    options = plan.generate(sets, name_b)
    inputs: Json = {
        "models": [same_model(described) for described in pair.described],
        "neurons": sha256(neurons),
        "prompts": sha256(asked),
        **options.recorded(),
    }
    if Manifest(folder).is_done("generate", inputs, force=force):
        return
    files = (neurons, asked, outputs)
    ranks.call(_generate, name_a, pair, None, *files, options, force=True, quiet=quiet)
    Manifest(folder).finish("generate", inputs, [outputs], reads=[neurons])
