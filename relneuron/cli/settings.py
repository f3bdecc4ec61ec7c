"""What a whole study is made with: the options of `relneuron run`, with the paper's defaults.

The commands take their defaults from here, without torch; `run` makes the study.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.ranking import BOOTSTRAP, NOISE, PERMUTATIONS

if TYPE_CHECKING:
    from relneuron.ablation.options import AblateOptions

DEMO = "relneuron demo"  # what the bundled model is called
DEMO_OPTIONS = ("top", "fdr", "permutations", "bootstrap", "noise", "random_seeds", "sizes")


@dataclass(frozen=True)
class Options:
    """What a study is made with; the defaults are the paper's."""

    eva: int = 50
    seed: int = 0
    suffix: str | None = None
    chat_template: bool = False
    method: str = "ap"
    top: int | None = None
    ends: str = "top"
    fdr: float | None = None
    negatives: int = 4
    permutations: int = PERMUTATIONS
    bootstrap: int = BOOTSTRAP
    noise: int = NOISE
    splits: Sequence[str] = ("eva", "eva2")
    random_seeds: int = 10
    analyses: Sequence[str] = ()
    sizes: Sequence[int] | None = None
    mode: str = "zero"
    factor: float | None = None
    mean_of: str = "all"
    positions: str = "all"
    generate: int | None = None
    oom: str = "split"
    pooling: str = "mean"
    exclude_bos: bool = False
    attention: bool = False
    accept_object_prefix: bool = False
    batch_tokens: int = 4096
    dtype: str | None = None
    device: str | None = None
    revision: str | None = None
    backend: str = "auto"
    drop_responses: bool = False

    def __post_init__(self) -> None:
        from relneuron.ablation.options import FROM_RESPONSES
        from relneuron.methods.responses.rank import check_options
        from relneuron.methods.responses.record import check_pooling

        check_options(
            self.method,
            self.top,
            self.fdr,
            permutations=self.permutations,
            bootstrap=self.bootstrap,
            noise=self.noise,
            ends=self.ends,
        )
        check_pooling(self.pooling)
        if self.mode in FROM_RESPONSES and self.drop_responses:
            raise RelneuronError(
                f"--mode {self.mode} takes its values from the responses",
                "leave out --drop-responses",
                2,
            )
        self.asked()

    def asked(self) -> AblateOptions:
        """What `ablate` is asked for."""
        from relneuron.ablation.options import AblateOptions

        asked = [f.name for f in fields(AblateOptions) if f.name != "any_set"]
        return AblateOptions(**{name: getattr(self, name) for name in asked})
