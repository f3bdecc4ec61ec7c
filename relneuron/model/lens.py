"""The logit lens: what each layer of a language model would say next, read at the last column.

`ablation/continuer.py` reads it after each forward, and `ablation/generate.py` writes it down.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from relneuron.artifact.files import RelneuronError
from relneuron.model.layers import Unfound, decoder_layers
from relneuron.model.stream.find import agree

TOP = 10  # tokens of a layer (MMNeuron, arXiv 2406.11193, prints as many)


class Read(NamedTuple):
    """What one layer would say next."""

    entropy: float  # nats
    top: list[int]  # the TOP most probable tokens, the most probable first


class Lens:
    """Entropy and most probable tokens of softmax(lm_head(final norm(h^l))) of every layer l.

    h^l (D,) is the residual stream behind layer l at the last column of a forward (nostalgebraist
    2020, "interpreting GPT: the logit lens"). Whatever a model does to its logits behind the
    lm_head, a factor or a soft cap, is done here, too, so that the last layer's are the model's
    own. A context manager: inside of it hooks on the layers keep what they give, neurons that a
    patch has switched off included.

    The final norm is found by numbers, in the first forward: it reads what the last layer gives,
    and lm_head of it gives the model's logits. Raises RelneuronError where none does.
    """

    def __init__(self, model: Any) -> None:
        try:
            path, layers = decoder_layers(model)
        except Unfound as error:
            raise _no_lens(model, f"it has {error}") from None
        self.model, self.layers = model, layers
        inside = f"{path}."
        self._outside = [
            module
            for name, module in model.named_modules()
            if not name.startswith(inside) and not list(module.children())
        ]
        self._h: dict[int, Tensor] = {}
        self._last: Tensor | None = None  # all columns, until the norm is found
        self._norms: list[nn.Module] = []  # those that read it
        self.norm: nn.Module | None = None
        self._factor, self._cap = 1.0, 0.0
        self._is_reading = False
        self._handles: list[Any] = []

    def __enter__(self) -> Lens:
        for number, layer in enumerate(self.layers):
            self._handles.append(layer.register_forward_hook(self._keeper(number)))
        self._handles += [m.register_forward_hook(self._look) for m in self._outside]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _keeper(self, number: int) -> Any:
        def keep(_m: nn.Module, _i: Any, output: Any) -> None:
            y = output[0] if isinstance(output, tuple) else output
            self._h[number] = y[:, -1]
            if number == len(self.layers) - 1 and self.norm is None:
                self._last, self._norms = y, []

        return keep

    def _look(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Whether a module reads what the last layer gives, and gives as much."""
        if self._last is None or self._is_reading or not inputs:
            return
        x, last = inputs[0], self._last
        if isinstance(x, Tensor) and isinstance(output, Tensor):
            same = x is last or (x.shape == last.shape and torch.equal(x, last))
            if same and output.shape == x.shape:
                self._norms.append(module)

    @torch.no_grad()
    def read(self, logits: Tensor) -> list[list[Read]]:
        """Of each row of the last forward what every layer says; `logits` (B, V) are the model's.

        Rows stand in the order of the forward.
        """
        if len(self._h) < len(self.layers):
            raise _no_lens(self.model, "a forward does not call its layers")
        if self.norm is None:
            self._find(logits)
        found: list[list[Read]] = [[] for _ in logits]
        for number in range(len(self.layers)):
            own = self._logits(self._h[number]).to(logits.device)
            p = own.log_softmax(-1)
            entropies = -(p.exp() * p).nan_to_num(0).sum(-1)
            top = own.topk(min(TOP, own.shape[-1]), -1).indices.tolist()
            for row, entropy in enumerate(entropies.tolist()):
                found[row].append(Read(entropy, top[row]))
        return found

    def _logits(self, h: Tensor) -> Tensor:
        """(B, V) float32 logits of the stream (B, D) by norm and head, as the model has them."""
        head = self.model.get_output_embeddings()
        self._is_reading = True
        try:
            assert self.norm is not None
            given = head(self.norm(h[:, None])).float()[:, 0] * self._factor
        finally:
            self._is_reading = False
        return self._cap * torch.tanh(given / self._cap) if self._cap else given

    def _find(self, logits: Tensor) -> None:
        """The norm that the model's own logits come from, and what is done to them behind it."""
        last = self._h[len(self.layers) - 1]
        config = self.model.config.get_text_config()
        caps = [0.0, getattr(config, "final_logit_softcapping", None) or 0.0]
        for norm in self._norms:
            self.norm = norm
            for cap in dict.fromkeys(caps):
                self._factor, self._cap = 1.0, cap
                ours = self._logits(last).to(logits.device)
                if not cap:
                    factor = float((ours * logits).sum() / ours.square().sum().clamp(min=1e-30))
                    # One that is rounding only is none.
                    self._factor = factor if abs(factor - 1) > 1e-3 else 1.0
                if agree(self._logits(last).to(logits.device), logits, last.dtype):
                    self._last, self._norms = None, []
                    return
        self.norm = None
        raise _no_lens(self.model, "its logits are not lm_head(final norm(last layer's output))")


def _no_lens(model: Any, why: str) -> RelneuronError:
    return RelneuronError(
        f"no logit lens of {type(model).__name__}: {why}", "leave out --lens, or take another model"
    )


# --- stages --------------------------------------------------------------------------------------


def stages(entropy: Sequence[float] | NDArray[np.float64]) -> tuple[int, int] | None:
    """Where the second and the third stage of the curve of entropy over the layers begin.

    MMNeuron (arXiv 2406.11193) has three stages in which a language model handles what a projector
    makes of a picture, and shows them by the logit lens; its code has no rule for the borders. The
    one here is our reconstruction: the two borders that leave three runs of layers, none empty, in
    which the entropy differs least from the run's mean, in the sum of squares over all layers (a
    piecewise constant fit with two jumps; of equal fits the earliest borders). None with fewer than
    three layers.
    """
    curve = np.asarray(entropy, np.float64)
    n = len(curve)
    if n < 3:
        return None

    def spread(begin: int, end: int) -> float:
        part = curve[begin:end]
        return float(((part - part.mean()) ** 2).sum())

    borders = [(a, b) for a in range(1, n - 1) for b in range(a + 1, n)]
    return min(borders, key=lambda ab: (spread(0, ab[0]) + spread(*ab) + spread(ab[1], n), ab))
