"""`relneuron.plan`: what a command would take, from Python; the object that --json prints."""

from __future__ import annotations

import json
from pathlib import Path

from relneuron.artifact.files import Json, RelneuronError
from relneuron.artifact.installed import need
from relneuron.artifact.stage import load
from relneuron.cli.plan import planned_stage


def plan(command: str, *words: str | Path | float) -> Json:
    """What a command would take, before it starts; nothing is written, no weight is loaded.

    `command` and `words` are those of the command line: plan("record", "Qwen/Qwen3-0.6B",
    "prompts.jsonl", "-o", "study", "--batch-tokens", 4096). With "--tflops" and "--gbps" nothing is
    measured. Keys:

    - `layers`; `neurons`, how many each site has in all of them
    - `flops_per_s`, `bytes_per_s`: the speed that `seconds` is reckoned with
    - `stages`, of `run` several. Each has `stage`, `device`, `dtype`, `reads` (how many of what it
      reads, by name) and the numbers:
      `batches`, `tokens` and `padded_tokens` (with padding), as `batch_plan` of the manifest has
      them; `steps`, tokens that are asked one by one; `flops`, of the forwards and backwards that
      are certain, two for a product and its sum; `seconds` = sum over forwards of
      max(flops / flops_per_s, bytes of weights / bytes_per_s);
      `more_tokens`, at most so many more, by what the model answers, with `more_flops` and
      `more_seconds` as far as they are told;
      `memory_bytes` of the process at its peak; `device_bytes`, on a device of its own;
      `disk_bytes`.
      `memory_bytes` in parts: `tensors_bytes` (on the device where there is one) and `host_bytes`;
      `disk_bytes` in parts: `files_bytes`, None where a size cannot be told
    - `total`: the same numbers of all stages, sums; of `memory_bytes` and `device_bytes` the most
    - `notes`: what has to be said of them

    Raises RelneuronError for a command without a plan, and for all that the command refuses.
    """
    need("relneuron.plan", "typer", "rich", "transformers")
    from relneuron.cli.flags import command as made
    from relneuron.cli.main import make_app

    stage, said = planned_stage(command), list[str]()
    app = make_app(command)
    [registered] = app.registered_commands
    registered.callback = made(load(stage.run), said.append, stage.plan)
    given = [command, *map(str, words), "--dry-run", "--json"]
    try:
        app(given, standalone_mode=False, prog_name="relneuron")
    except Exception as error:
        if hasattr(error, "format_message"):  # of typer's parser
            fix = f"relneuron {command} --help says what it takes"
            raise RelneuronError(error.format_message(), fix, 2) from error
        raise
    if not said:
        raise RelneuronError("--help is for the command line", "leave it out", 2)
    found: Json = json.loads(said[0])
    return found
