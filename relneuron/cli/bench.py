"""The command `relneuron bench`: the kernels against their peers; cli/main.py takes it in."""

from __future__ import annotations

from contextlib import nullcontext

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.installed import need
from relneuron.cli import options as take
from relneuron.cli.show import print_bench, say


def bench(
    op: take.Op = None,
    quick: take.Quick = False,
    full: take.Full = False,
    dtype: take.Dtypes = "",
    tokens: take.Tokens = "",
    threads: take.Threads = 0,
    device: take.Device = None,
    no_compile: take.NoCompile = False,
    output: take.BenchOutput = None,
    debug: take.Debug = False,
) -> None:
    """The kernels against their peers on this machine, in the same rounds."""
    import torch

    from relneuron.artifact.manifest import locked
    from relneuron.bench.timing import EFFORTS, Row, append_rows, choose_cases, run_case, summary
    from relneuron.model.load import choose_device

    suite = "quick" if quick else "full" if full else "usual"
    sizes = [part.strip() for part in tokens.split(",") if part.strip()]
    if not all(part.isdigit() for part in sizes):
        raise RelneuronError(f"unknown number in {tokens!r}", "use numbers such as 2048,8192", 2)
    dtypes = [part.strip() for part in dtype.split(",") if part.strip()]
    cases = choose_cases(suite, op, dtypes, [int(part) for part in sizes])
    device = choose_device(device)
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise RelneuronError(f"bench cannot time the device {device!r}", "use --device cpu", 2)
    if threads:
        torch.set_num_threads(threads)
    if output is not None:
        need("relneuron bench -o", "matplotlib", "filelock", otherwise=", or leave out -o")
        from relneuron.bench.plot import roofline

        take.check_folder(output)
    rows: list[Row] = []
    with locked(output) if output is not None else nullcontext():
        for case in cases:
            found = run_case(case, device=device, compiled=not no_compile, effort=EFFORTS[suite])
            print_bench(str(case), found)
            for what, who, value in summary(found):
                say(f"  {what}: {value:.2f} x our time ({who})")
            rows += found
            if output is not None:
                path = append_rows(output, found)
        if output is None:
            say("to keep the rows: add -o DIR")
            return
        drawn = roofline(rows, path.with_suffix(".png"))
    say(f"-> {path}{', the roofline ' + path.with_suffix('.png').name if drawn else ''}")
