"""The harness's model whose neurons are off or set: `relneuron` among the names of its models.

`stage.py` runs tasks on it; `lm_eval.simple_evaluate` takes it as it takes any other.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from relneuron.ablation.harness.changes import Changes
from relneuron.ablation.harness.options import ChangeOptions
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.installed import need
from relneuron.artifact.neurons import NeuronFile

need("relneuron.NeuronLM", "lm_eval", "transformers")

from lm_eval.api.registry import register_model  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402


@register_model("relneuron")
class NeuronLM(HFLM):  # type: ignore[misc]
    """lm_eval's `hf` model, with the neurons of a set off, or what `mode` says, in every forward.

    `pretrained` and everything that is not listed here are HFLM's own: a name or a model. `neurons`
    is a neurons.json; `off` one of its sets (needless if it has one only), `set` one whose neurons
    are at their mean activation. `mode`, `factor`, `scale_at`, `mean_of`, `moments` and `counts`
    are as the options of `relneuron eval` of that name. Without `neurons` it is HFLM.

    Raises RelneuronError for what the options refuse, and a set that the file does not have.
    """

    def __init__(
        self,
        pretrained: Any,
        *,
        neurons: str | Path | None = None,
        off: str | None = None,
        mode: str = "zero",
        factor: float | None = None,
        scale_at: str | None = None,
        mean_of: str = "all",
        moments: str | Path | None = None,
        set: str | None = None,
        counts: str | Path | None = None,
        **own: Any,
    ) -> None:
        super().__init__(pretrained, **own)
        # Entered around every forward; `stage.py` puts another one here for each condition.
        self.change: Callable[[], AbstractContextManager[None]] = nullcontext
        options = ChangeOptions(
            off=None if off is None else (str(off),),
            mode=mode,
            factor=factor,
            scale_at=scale_at,
            mean_of=mean_of,
            moments=Path(moments) if moments is not None else None,
            set_to=None if set is None else str(set),
            counts=Path(counts) if counts is not None else None,
        )
        if neurons is None:
            if options != ChangeOptions():
                raise RelneuronError(
                    "off, set and mode are of neurons, and none are given", "add neurons=FILE", 2
                )
            return
        path = Path(neurons)
        if off is None and set is None and len(NeuronFile.read(path).sets) != 1:
            sets = ", ".join(NeuronFile.read(path).sets)
            raise RelneuronError(
                f"off does not say which set of {path} is off", f"one of {sets}: off=...", 2
            )
        if off is None and set is not None:
            options = ChangeOptions(off=("clean",), set_to=options.set_to, counts=options.counts)
        changes = Changes(self.model, path, options)
        run = changes.runs[-1]
        self.change = lambda: changes.acting(run)

    def _model_call(self, *args: Any, **kwargs: Any) -> Any:
        with self.change():
            return super()._model_call(*args, **kwargs)

    def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
        with self.change():
            return super()._model_generate(*args, **kwargs)
