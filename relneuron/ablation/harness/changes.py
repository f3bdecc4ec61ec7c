"""What becomes of a model's neurons under each condition of `eval`: planned once, entered often.

`stage.py` and the harness's model (`lm.py`) ask for it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from relneuron.ablation.conditions import Ablation, empty_sets, read_sets
from relneuron.ablation.evaluate import How, wave_states
from relneuron.ablation.exchange import FromMeans, check_products, puts_of, stored_moments
from relneuron.ablation.harness.options import ChangeOptions
from relneuron.ablation.how import by_product, files_beside, read_how
from relneuron.ablation.masks import named_masks
from relneuron.ablation.options import CLEAN, FROM_RESPONSES, AblateOptions
from relneuron.ablation.pictured import find_for
from relneuron.ablation.steer import steering_patch
from relneuron.artifact.counts import NAME as COUNTS
from relneuron.artifact.effects import Condition
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.manifest import checked
from relneuron.artifact.neurons import NeuronFile
from relneuron.artifact.prompts import read_prompts
from relneuron.model.mlps.find import find_mlps
from relneuron.model.mlps.mlp import MLP
from relneuron.model.mlps.shape import Part, model_shape
from relneuron.model.pair import Taps
from relneuron.model.patch import Patch
from relneuron.model.states import LayerState, Tokens

RESPONSES, PROMPTS = "responses.safetensors", "prompts.jsonl"


class Run(NamedTuple):
    """One condition of the tasks: a mask, and the set whose neurons are at their mean besides."""

    place: int  # of the mask in the plan; -1 is the model itself
    condition: Condition
    set: str = ""


class Changes:
    """The runs of a file of neurons, `clean` first, and the contexts in which they are true.

    runs     clean, then each mask of the options and its random sets; with `set_to` all of these
             steered, the clean one, too
    reads    the files that they come from

    The model computes with its own activation (`Patch.own_activation`): a neuron that stays does
    not change by a rounding.
    """

    def __init__(
        self,
        model: Any,
        path: Path | None,
        options: ChangeOptions,
        random_seeds: int = 0,
    ) -> None:
        self.neurons = NeuronFile.read(checked(path)) if path else None
        self.mlps: list[Part] = (
            find_for(model, self.neurons, None) if self.neurons else find_mlps(model)
        )
        self.reads: list[Path] = []
        self._plan: list[Ablation] = []
        self._how = How()
        self._means: FromMeans | None = None
        self._steering: Any = nullcontext
        self._at: tuple[int, list[LayerState]] = (-1, [])
        self.runs = [Run(-1, Condition(CLEAN, CLEAN, n_neurons=0))]
        if self.neurons and path:
            self._read(model, self.neurons, path, options, random_seeds)

    def _read(
        self,
        model: Any,
        neurons: NeuronFile,
        path: Path,
        options: ChangeOptions,
        random_seeds: int,
    ) -> None:
        self.reads.append(path)
        shape = model_shape(self.mlps)
        neurons.check_model(shape)
        sets, doubles = read_sets(neurons, shape)
        self._plan = named_masks(
            sets,
            list(sets) if options.off is None else options.off,
            shape,
            models=(CLEAN,),
            random_seeds=random_seeds,
            products=self._are_products(path, options),
        )
        asked = {a.condition.name: a.places for a in self._plan if a.condition.kind != CLEAN}
        # With --set something is done, whatever is off.
        does_more = options.set_to is not None or not asked
        for notice in empty_sets({"": (0,), **asked} if does_more else asked):
            warnings.warn(notice, stacklevel=4)
        for name, n in doubles.items():
            warnings.warn(f"{name}: {n} neurons stood there twice", stacklevel=4)
        self._how = self._read_how(model, neurons, path, options)
        if options.set_to is not None:
            counts = (options.counts or path.parent) / COUNTS
            self._steering = partial(
                steering_patch, self.mlps, neurons, options.set_to, counts, own_activation=True
            )
            self._steering()  # raises for what is not there
            self.reads.append(counts)
        self._plan_runs(options.set_to)

    def _plan_runs(self, set_to: str | None) -> None:
        if set_to is not None:
            self.runs.append(Run(-1, self.runs[0].condition, set_to))
        masks = [(i, a) for i, a in enumerate(self._plan) if a.condition.kind != CLEAN]
        self.runs += [Run(i, ablation.condition, set_to or "") for i, ablation in masks]

    @staticmethod
    def _are_products(path: Path, options: ChangeOptions) -> bool:
        """Whether what becomes another value is the products of neurons, not their outputs."""
        has_responses = options.moments is None and (path.parent / RESPONSES).exists()
        return options.mode == "mean" and not has_responses

    def _read_how(self, model: Any, neurons: NeuronFile, path: Path, options: ChangeOptions) -> How:
        """What the masks do; with means of products also these."""
        shape, folder = model_shape(self.mlps), path.parent
        asked = AblateOptions(
            mode=options.mode,
            factor=options.factor,
            scale_at=options.scale_at,
            mean_of=options.mean_of,
        )
        if self._are_products(path, options):
            if options.mean_of != "all":
                raise RelneuronError(
                    f"--mean-of {options.mean_of} needs responses, and {folder} has none",
                    "record the prompts, or leave out --mean-of",
                    2,
                )
            check_products(self._plan, self.mlps, [], options.mode)
            file, moments = stored_moments(options.moments or folder, shape)
            mlps = [part for part in self.mlps if isinstance(part, MLP) and part.runs]
            self._means = FromMeans(model, mlps, moments.mean)
            self.reads.append(file)
            return How()
        prompts = []
        if options.mode in FROM_RESPONSES:
            prompts = read_prompts(checked(folder / PROMPTS))
            beside = files_beside(path, folder / PROMPTS, asked)
            self.reads += {folder / PROMPTS: None, **dict.fromkeys(beside.values())}
        return read_how(
            asked, self._plan, folder / RESPONSES, prompts, shape, by_product=by_product(neurons)
        )

    @contextmanager
    def acting(self, run: Run) -> Iterator[None]:
        """What a run says is true of the model's forwards within."""
        steering = self._steering() if run.set else nullcontext()
        with steering, self._masked(run.place) if run.place >= 0 else nullcontext():
            yield

    @contextmanager
    def _masked(self, place: int) -> Iterator[None]:
        acting: Any
        within: Any
        if self._means is not None:
            means = self._means
            means.puts = puts_of([self._plan[place]], means.mlps, model_shape(self.mlps))
            acting, within = means, Taps(means.mlps, means.see)
        else:
            acting = within = Patch(self.mlps, self._states(place), own_activation=True)
        # Of the states row 0 is clean, and row 1 the mask: every token has it.
        acting.tokens = Tokens(conditions=torch.ones((), dtype=torch.int32, device="cpu"))
        with within:
            yield

    def _states(self, place: int) -> list[LayerState]:
        """What the patch of a mask does; those of the last one are kept."""
        if self._at[0] != place:
            states = wave_states(self._plan, range(place, place + 1), self.mlps, self._how)
            self._at = (place, states)
        return self._at[1]
