"""Neurons by the gradient of an answer: integrated gradients, gradient x activation.

`attribute --method ig|relevance` writes the scores of every neuron and sentence (`attribute.py`);
`options.py` and `commands.py` are its command line. No torch here.
"""

from relneuron.artifact.stage import Attribution, Method
from relneuron.methods.gradients.options import IgOptions, RelevanceOptions

_RUN = "relneuron.methods.gradients.commands:attribute"

METHOD = Method(
    attributions=(
        Attribution("ig", "integrated gradients of the answer's probability", IgOptions, _RUN),
        Attribution("relevance", "gradient x activation over all tokens", RelevanceOptions, _RUN),
    ),
    supports="relneuron.methods.gradients.commands:supports",
)
