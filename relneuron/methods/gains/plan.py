"""What `attribute --method gain` would take: `attribute --dry-run`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from relneuron.ablation.rows import plan_interventions
from relneuron.artifact.gains import (
    COMPARISON,
    GAINS,
    INTERVENTIONS,
    PROMOTED,
    TARGETS,
    Target,
    gains_bytes,
    rows_text,
    targets_bytes,
)
from relneuron.artifact.options import LoadOptions
from relneuron.artifact.planned import Planned
from relneuron.artifact.prompts import Prompt, check_copy
from relneuron.methods.gains.attribute import refuse_outputs
from relneuron.methods.gains.commands import check
from relneuron.methods.gains.comparison import most_conditions
from relneuron.methods.gains.options import AttributeOptions
from relneuron.methods.gains.scores import query_bytes
from relneuron.methods.gains.values import write_bytes
from relneuron.model.batches import plan_batches
from relneuron.model.dry import DIGEST, Dry, Work, dry_model
from relneuron.model.questions import Questions
from relneuron.model.targets import Targets, read_asked
from relneuron.texts.tokens import token_text

_NUMBER = 0.123456789  # as long as most scores are


def attribute(
    model: str,
    prompts: Path,
    output: Path,
    options: AttributeOptions,
    load_options: LoadOptions,
    *,
    method: str,
    force: bool,
    quiet: bool,
) -> Iterator[Planned]:
    """The plan of `attribute --method gain`, with its parameters."""
    check(prompts, output, options)
    dry = dry_model(model, load_options)
    asked = read_asked(prompts, output, dry.model, dry.tokenizer, options)
    refuse_outputs(output, force)
    check_copy(output / "prompts.jsonl", prompts, asked.copy, force)
    yield plan_attribute(dry, asked.prompts, asked.targets, options, len(asked.copy))


def plan_attribute(
    dry: Dry,
    prompts: Sequence[Prompt],
    targets: Targets,
    options: AttributeOptions,
    copy_bytes: int,
) -> Planned:
    """The plan of sentences with their targets; `copy_bytes` are those of prompts.jsonl."""
    work = Work(dry)
    asked = Questions(list(prompts), targets.ids, targets.targets)
    for rows in plan_batches(asked, options.batch_tokens):
        work.batch([asked.length(row) for row in rows])
    relations = list(dict.fromkeys(p.relation for p in prompts))
    n_conditions = most_conditions(dry.order.layers, len(relations), options.random_seeds)
    again = Work(dry)
    if options.compare:
        again = _comparison(dry, targets, n_conditions, options)
    about = {"prompts": DIGEST, "ids": [p.id for p in prompts], "model": DIGEST}
    n_gains = gains_bytes(dry.shape, about) if "ffn_neuron" in options.kinds else 0
    n_rows, width, _ = work.largest
    files: dict[str, int | None] = {
        TARGETS: len(_targets(dry, prompts, targets)),
        options.table: _table_bytes(dry, prompts, targets, options),
        PROMOTED: None,
        "prompts.jsonl": copy_bytes,
    }
    files |= {GAINS: n_gains} if n_gains else {}
    files |= {INTERVENTIONS: None, COMPARISON: None} if options.compare else {}
    notes = [
        "attribute: FLOP are those of the forwards; gains and query scores come to them, as many "
        "as their bounds ask for"
    ]
    if options.compare:
        notes.append(
            "the comparison asks the sentences that are known again, under "
            f"{n_conditions} conditions at most"
        )
    n_heads, head = _heads(dry)
    held = n_rows * width * dry.order.layers * _wide(dry) * dry.model.dtype.itemsize
    scores = {"scores": 4 * n_rows * dry.order.layers * dry.order.widths["gate"]}
    if options.has_writes:
        n_writes = write_bytes(n_rows, width, n_heads, dry.order.widths["down"])
        scores["vectors of positions"] = n_writes
    if options.has_query:
        scores["query scores"] = query_bytes(n_rows, dry.order, options.query_units)
    return dry.planned(
        "attribute",
        {"sentences": len(prompts)},
        **work.told,
        more=again.tokens,
        more_forwards=again.told["forwards"],
        tensors={
            "activations": work.peak(cache=False),
            "what a batch writes": held,
            "the head with the last norm": 4 * dry.vocabulary * dry.order.widths["down"],
            **scores,
        },
        host={"gains, of the disk": n_gains},
        files=files,
        notes=notes,
    )


def _comparison(dry: Dry, targets: Targets, n_conditions: int, options: AttributeOptions) -> Work:
    """The forwards of the comparison, of sentences that are all known.

    Of the last layer's MLP, and of what its attention ends with, only the last token is computed;
    experts are computed whole.
    """
    work, lengths = Work(dry), list(map(len, targets.ids))
    n_heads, head = _heads(dry)
    spared = dry.last_mlp and dry.last_mlp + 2 * n_heads * head * dry.order.widths["down"]
    for rows in plan_interventions(
        lengths, n_conditions, options.batch_tokens, on_cpu=dry.device == "cpu"
    ):
        own = [lengths[row % len(lengths)] for row in rows]
        work.batch(own, less=len(own) * (max(own) - 1) * spared)
    return work


def _wide(dry: Dry) -> int:
    """What a trace keeps of a token and layer: the stream twice, two writes, neurons, values."""
    n_heads, head = _heads(dry)
    return 4 * dry.order.widths["down"] + dry.order.widths["gate"] + n_heads * head


def _heads(dry: Dry) -> tuple[int, int]:
    """How many heads a layer's attention has, and how wide one is."""
    config = dry.model.config.get_text_config()
    n_heads = int(config.num_attention_heads)
    return n_heads, int(getattr(config, "head_dim", None) or config.hidden_size // n_heads)


def _targets(dry: Dry, prompts: Sequence[Prompt], targets: Targets) -> bytes:
    rows = zip(prompts, targets.targets, targets.n_answer_tokens, targets.ids, strict=True)
    return targets_bytes(
        Target(
            *(p.id, p.relation, token_text(dry.tokenizer, token), token, n, len(ids)),
            rank=1,
            prob=_NUMBER,
            logprob=-_NUMBER,
            kept=True,
        )
        for p, token, n, ids in rows
    )


def _table_bytes(
    dry: Dry, prompts: Sequence[Prompt], targets: Targets, options: AttributeOptions
) -> int | None:
    """About the size of attributions.csv; None of a table that is packed."""
    if options.format != "csv":
        return None
    n_layers, (n_heads, head) = dry.order.layers, _heads(dry)
    width, size = max(map(dry.active, range(n_layers))), 0
    for prompt, ids in zip(prompts, targets.ids, strict=True):
        n = len(ids)
        kinds = {
            "ffn_layer": (n_layers, (n_layers, 0, 0, 0)),
            "attention_layer": (n_layers, (n_layers, 0, 0, 0)),
            "head": (n_layers * n_heads, (n_layers, n_heads, 0, 0)),
            "position": (n_layers * n, (n_layers, n_heads, 0, n)),
            "ffn_neuron": (n_layers * width, (n_layers, 0, width, 0)),
            "attention_neuron": (n_layers * n_heads * head * n, (n_layers, n_heads, head, n)),
            "query_layer": (2 * n_layers + 1, (n_layers, 0, n_layers, 0)),
            # Of a layer no unit of which reads it there are none.
            "query_ffn_neuron": ((n_layers - 1) * width, (n_layers, 0, width, 0)),
        }
        for kind in options.kinds:
            total, sizes = kinds[kind]
            has_top = kind in ("position",) or kind.endswith("neuron")
            taken = min(total, options.top) if has_top else total
            # Half of all places of an axis stand for its numbers' length.
            place = tuple(n_values * 5 // 9 if n_values else "" for n_values in sizes)
            row = (prompt.id, kind, *place, f"{_NUMBER:.9g}", max(1, taken * 5 // 9))
            size += taken * len(rows_text([row]).encode())
    return size + len("id,kind,layer,head,index,position,score,rank\n")
