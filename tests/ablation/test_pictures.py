"""Prompts with pictures in `ablate` and `generate`: what plain hooks and `model.generate` give.

The reference takes one prompt and one condition at a time, and zeroes neurons in forward hooks.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import relneuron
from relneuron.ablation.ablate import ablate_prompts
from relneuron.ablation.conditions import module_sets
from relneuron.ablation.generate import generate
from relneuron.ablation.options import GenerateOptions
from relneuron.artifact.counts import NAME, RAN, Counts
from relneuron.artifact.effects import WRITTEN
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.journal import Journal
from relneuron.artifact.modules import module_layers
from relneuron.artifact.neurons import NeuronFile
from relneuron.artifact.reading import read_csv
from relneuron.model.mlps.find import find_mlps
from relneuron.model.mlps.shape import model_shape
from relneuron.model.pictures import picture_run, sent
from tests.kit.pictured import DOMAINS, NEW, World, tower_of
from tests.kit.pictures import KINDS, picture, save


@pytest.fixture(scope="module", params=KINDS)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World("llava", tmp_path_factory.mktemp("llava"))


# --- generate --------------------------------------------------------------------------------


def test_every_set_of_modules_is_plain_hooks(world: World) -> None:
    """Texts under each of MMNeuron's sets of modules, of each domain's own neurons."""
    made = world.ours(module_sets=True, measure="anls", anls_threshold=1.0)
    known = module_sets(list(module_layers(world.shape)))
    assert [(g.mask, g.id) for g in made] == [(m, f"p{i}") for m in known for i in range(4)]
    by_id = {line["id"]: line for line in world.lines}
    for g in made:
        line = by_id[g.id]
        tokens = world.said(line, world.within(line["group"], known[g.mask]))
        assert (g.output, g.n_tokens) == (world.text(tokens).rstrip("\ufffd"), len(tokens)), g
    texts = {mask: [g.output for g in made if g.mask == mask] for mask in known}
    assert len({tuple(some) for some in texts.values()}) == len(known)
    with (world.folder / "o.scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["mask"], r["group"]) for r in rows] == [(m, d) for m in known for d in DOMAINS]


def test_a_named_set_is_off_in_all_prompts(world: World) -> None:
    made = world.ours(off=("clean", "med"))
    for g, line in zip(made, [*world.lines, *world.lines], strict=True):
        tokens = world.said(line, world.sets["med"] if g.mask == "med" else [])
        assert g.output == world.text(tokens).rstrip("\ufffd")


def test_logits_of_each_module_are_those_of_hooks(world: World) -> None:
    """Beside the clean model in the same forward, number by number."""
    from relneuron.model.converse import go_through
    from relneuron.model.patch import Patch
    from relneuron.model.states import Tokens, mask_states

    run = picture_run(world.model, world.processor)
    mlps = find_mlps(world.model, modules=("all",), run=run)
    names = list(module_layers(world.shape))
    off = [[], *(world.within("doc", [name]) for name in names)]
    states = mask_states([[row[:3] for row in rows] for rows in off], mlps)
    line, seen = world.lines[1], []
    with Patch(mlps, states) as patch:
        rows = torch.arange(len(off), dtype=torch.int32)
        patch.tokens = Tokens(conditions=rows, stacked=True)

        def choose(number: int, logits: Tensor) -> Tensor | None:
            seen.append(logits.clone())
            return torch.full((len(off),), 7 + number) if number < 2 else None

        go_through(world.model, world.inputs(line), len(off), 3, choose, lambda step: None)
    assert len(seen) == 3
    for row, neurons in enumerate(off):
        inputs = sent(world.model, world.inputs(line))
        with world.hooked(neurons), torch.no_grad():
            logits = world.model(**inputs).logits[0, -1]
        torch.testing.assert_close(seen[0][row], logits, rtol=1e-4, atol=1e-4)
        assert row == 0 or (seen[0][row] - seen[0][0]).abs().max() > 1e-3


def test_several_pictures_and_text_alone(llava: World, tmp_path: Path) -> None:
    """A prompt with two pictures, and one without, each as if it were alone."""
    lines = [
        {"image": ["0.png", "1.png"], "text": "same?", "group": "doc"},
        {"prompt": "what is it?", "group": "med"},
    ]
    path = llava.folder / "several.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "o.jsonl"
    how = GenerateOptions(module_sets=True, max_new_tokens=NEW, stop=(), repetition_penalty=1.0)
    files = (llava.folder / "neurons.json", path, out)
    model, tokenizer = llava.model, llava.processor.tokenizer
    made = generate("m", model, tokenizer, *files, how, processor=llava.processor, quiet=True)
    from PIL import Image

    opened = [Image.open(llava.folder / name).convert("RGB") for name in lines[0]["image"]]
    both = llava.processor.processor(
        images=opened, text=f"{llava.processor.marker}\n" * 2 + "same?", return_tensors="pt"
    )
    inputs = [dict(both), dict(tokenizer("what is it?", return_tensors="pt"))]
    known = module_sets(list(module_layers(llava.shape)))
    for number, g in enumerate(made):
        line = number % 2
        neurons = llava.within(lines[line]["group"], known[g.mask])
        with llava.hooked(neurons):
            tokens = model.generate(
                **sent(model, inputs[line]),
                max_new_tokens=NEW,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=2,
            )[0, inputs[line]["input_ids"].shape[1] :].tolist()
        tokens = tokens[: tokens.index(2)] if 2 in tokens else tokens
        assert g.output == llava.text(tokens).rstrip("\ufffd"), g


def test_seeds_penalty_stop_and_lens(llava: World) -> None:
    asked = {"temperature": 0.9, "seeds": 2, "repetition_penalty": 1.3, "lens": 1}
    made = llava.ours(module_sets=True, **asked)
    assert [(g.id, g.seed) for g in made[:4]] == [("p0", 0), ("p0", 1), ("p1", 0), ("p1", 1)]
    assert len({g.output for g in made}) > 4
    # One row at a time gives the same.
    assert llava.ours("b.jsonl", module_sets=True, batch_tokens=1, **asked) == made
    first, second = ((llava.folder / f"{n}.lens.csv").read_text() for n in "ob")
    assert len(first.splitlines()) == 1 + len(made) * 2
    for a, b in zip(
        csv.DictReader(first.splitlines()), csv.DictReader(second.splitlines()), strict=True
    ):
        assert float(a.pop("entropy")) == pytest.approx(float(b.pop("entropy")), rel=1e-4)
        assert a == b
    greedy = llava.ours(module_sets=True)
    letter = greedy[0].output[1]
    cut = llava.ours(module_sets=True, stop=(letter,))
    for g, whole in zip(cut, greedy, strict=True):
        assert g.output == whole.output.split(letter)[0]


def test_the_lens_of_each_kind_ends_at_the_models_own_logits(world: World) -> None:
    known = module_sets(list(module_layers(world.shape)))
    world.ours(module_sets=True, lens=1)
    with (world.folder / "o.lens.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["layer"] == "1"]
    assert len(rows) == len(known) * len(world.lines)
    by_id = {line["id"]: line for line in world.lines}
    for row in rows:
        line = by_id[row["id"]]
        neurons = world.within(line["group"], known[row["mask"]])
        with world.hooked(neurons), torch.no_grad():
            logits = world.model(**sent(world.model, world.inputs(line))).logits[0, -1]
        entropy = float(torch.distributions.Categorical(logits=logits).entropy())
        assert float(row["entropy"]) == pytest.approx(entropy, rel=1e-4)


def test_a_killed_run_goes_on(llava: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from relneuron.ablation.continuer import Continuer

    whole = llava.ours("whole.jsonl", module_sets=True, batch_tokens=80)
    monkeypatch.setattr(Journal, "SAVE_EVERY_S", 0.0)
    true, calls = Continuer.go_on, 0

    def dies(self: Any, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return true(self, *args)

    monkeypatch.setattr(Continuer, "go_on", dies)
    with pytest.raises(KeyboardInterrupt):
        llava.ours("part.jsonl", module_sets=True, batch_tokens=80)
    assert llava.ours("part.jsonl", module_sets=True, batch_tokens=80) == whole
    parts = [(llava.folder / f"{name}.jsonl").read_bytes() for name in ("part", "whole")]
    assert parts[0] == parts[1]


def test_steering_in_every_module(llava: World, tmp_path: Path) -> None:
    """A set at its mean activation over the tokens that each module saw: hooks on activations."""
    rng = np.random.default_rng(4)
    n_layers, width = llava.shape["layers"], llava.shape["width"]
    ran = np.array([[100] * 2 + [50] * 3 + [40]])
    total = rng.normal(size=(1, n_layers, width)) * 60
    arrays = {"count.act": np.zeros((1, n_layers, width), np.int64), "sum.act": total}
    Counts(["med"], np.array([100]), arrays, {RAN: ran}).write(tmp_path / NAME)
    means = (total[0] / ran[0][:, None]).astype(np.float32)
    made = llava.ours(set_to="med", counts=tmp_path)
    model = llava.model
    places = [m.mlp.act_fn for m in model.model.language_model.layers]
    places += [m.mlp.activation_fn for m in tower_of(model).encoder.layers]
    places += [model.model.multi_modal_projector.act]
    assert len({id(place) for place in places}) == n_layers
    for g, line in zip(made, llava.lines, strict=True):
        with ExitStack() as stack:
            for layer, place in enumerate(places):
                on = [row[2] for row in llava.sets["med"] if row[0] == layer]
                new = torch.from_numpy(means[layer, on])

                def change(_m: Any, _i: Any, out: Tensor, on: Any = on, new: Any = new) -> Tensor:
                    changed = out.clone()
                    changed[..., on] = new
                    return changed

                stack.callback(place.register_forward_hook(change).remove)
            tokens = llava.said(line, [])
        assert g.output == llava.text(tokens).rstrip("\ufffd")
    assert [g.output for g in made] != [g.output for g in llava.ours()]


# --- ablate ----------------------------------------------------------------------------------


def test_ablate_is_plain_hooks(world: World, tmp_path: Path) -> None:
    """Predictions and log-probabilities under every condition of a study."""
    output = tmp_path / "effects.csv"
    ablate_prompts(
        "m",
        *(world.model, world.processor.tokenizer),
        *(world.folder / "neurons.json", world.folder / "q.jsonl", output),
        processor=world.processor,
        random_seeds=1,
        module_sets=True,
        generate=3,
        quiet=True,
    )
    rows = list(read_csv(output, WRITTEN))
    known = module_sets(list(module_layers(world.shape)))
    names = [f"{d}@{m}" for m in known if m != "none" for d in DOMAINS]
    assert list(dict.fromkeys(r["condition"] for r in rows)) == [
        "clean",
        *DOMAINS,
        "random.0",
        *names,
    ]
    by_id = {line["id"]: line for line in world.lines}
    first = {
        word: world.processor.tokenizer(f" {word}", add_special_tokens=False)["input_ids"][:2]
        for word in ("red", "a b")
    }
    for row in rows:
        name, _, modules = row["condition"].partition("@")
        if name.startswith("random"):
            continue
        neurons = [] if name == "clean" else world.sets[name]
        if modules:
            neurons = world.within(name, known[modules])
            assert row["relation"] == name
        line = by_id[row["id"]]
        # Three tokens, or as many more as make a whole character.
        tokens = world.said(line, neurons, 6)
        texts = [world.text(tokens[:n]).rstrip("\ufffd").strip() for n in range(3, 7)]
        assert row["prediction"] == next((text for text in texts if text), "")
        # The tokenizer makes the space before an answer a token of its own.
        wanted = {word: world.logprob(line, neurons, first[word]) for word in first}
        assert row["logprob_of"] == max(wanted, key=lambda word: wanted[word])
        assert float(row["logprob"]) == pytest.approx(max(wanted.values()), rel=1e-4, abs=1e-4)


def test_the_context_manager(world: World) -> None:
    """Around transformers' own `generate`, whatever shape a module's tokens have."""
    modules = list(module_layers(world.shape))
    for names in (modules[1:2], modules[2:], modules):
        neurons = world.within("med", names)
        wanted = world.said(world.lines[0], neurons)
        processor = world.processor.processor
        with relneuron.ablate(world.model, neurons, modules=modules, processor=processor):
            assert world.said(world.lines[0], []) == wanted
        assert world.said(world.lines[0], []) != wanted
    bare = relneuron.ablate(world.model, neurons, modules=modules)
    with pytest.raises(RelneuronError, match="need a forward with a picture"), bare:
        pass


# --- what is refused -------------------------------------------------------------------------


def test_bad_input(llava: World, tmp_path: Path) -> None:
    def asked(line: dict[str, Any], **how: Any) -> None:
        path = tmp_path / "q.jsonl"
        path.write_text(json.dumps(line) + "\n")
        files = (llava.folder / "neurons.json", path, tmp_path / "o.jsonl")
        options = GenerateOptions(max_new_tokens=2, off=("doc",))
        given = {"processor": llava.processor} | how
        generate("m", llava.model, llava.processor.tokenizer, *files, options, quiet=True, **given)

    good = {"text": "a", "image": str(llava.folder / "0.png"), "id": "x"}
    asked(good)
    (tmp_path / "o.jsonl").unlink()
    with pytest.raises(RelneuronError, match="prompt x: there is no picture"):
        asked(good | {"image": "nowhere.png"})
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(RelneuronError, match="is no picture that can be read"):
        asked(good | {"image": "text.png"})
    with pytest.raises(RelneuronError, match="the text has 2 <image>, the record 1 pictures"):
        asked(good | {"text": "<image><image>"})
    with pytest.raises(RelneuronError, match="vision, projector, which are found with a picture"):
        asked(good, processor=None)
    assert not (tmp_path / "o.jsonl").exists()
    with pytest.raises(RelneuronError, match="what vision reads of a picture is no last token"):
        ablate_prompts(
            "m",
            *(llava.model, llava.processor.tokenizer),
            *(llava.folder / "neurons.json", llava.folder / "q.jsonl", tmp_path / "effects.csv"),
            processor=llava.processor,
            positions="last",
        )


def test_module_sets_of_one_module_are_refused(llava: World, tmp_path: Path) -> None:
    shape = model_shape(find_mlps(llava.model))
    rows = [row for row in llava.sets["doc"] if row[0] < 2]
    NeuronFile({"id": "m", **shape}, "lape", {"doc": rows}, {}).write(tmp_path / "neurons.json")
    (tmp_path / "q.jsonl").write_text('{"prompt": "a", "group": "doc"}\n')
    files = (tmp_path / "neurons.json", tmp_path / "q.jsonl", tmp_path / "o.jsonl")
    options = GenerateOptions(module_sets=True)
    with pytest.raises(RelneuronError, match="of the language module alone"):
        generate("m", llava.model, llava.processor.tokenizer, *files, options)
    (tmp_path / "q.jsonl").write_text('{"prompt": "a", "group": "rs"}\n')
    with pytest.raises(RelneuronError, match="no set for the group rs"):
        files = (llava.folder / "neurons.json", tmp_path / "q.jsonl", tmp_path / "o.jsonl")
        how = {"processor": llava.processor}
        generate("m", llava.model, llava.processor.tokenizer, *files, options, **how)


def test_the_command_line(tmp_path: Path, relneuron: Callable[..., Any]) -> None:
    """From folders alone: a language model's own neurons need the processor for the pictures."""
    world = World("instructblip", tmp_path)
    folder = save("instructblip", tmp_path / "model")
    files = (tmp_path / "q.jsonl", "--neurons", tmp_path / "neurons.json", "--quiet")
    words = ("--module-sets", "--measure", "exact", "--max-new-tokens", 3, "--stop", "")
    code, out, err = relneuron("generate", folder, *files, *words, "-o", tmp_path / "o.jsonl")
    assert code == 0, err
    assert "vision+qformer" in out and "24 outputs" in out
    made = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    for g, line in zip(made[:4], world.lines, strict=True):
        assert g["mask"] == "none" and g["group"] == line["group"] and g["score"] in (0.0, 1.0)
    (tmp_path / "prompts.jsonl").write_bytes((tmp_path / "q.jsonl").read_bytes())
    place = (tmp_path / "neurons.json", tmp_path / "prompts.jsonl", "-o", tmp_path / "effects.csv")
    words = (*place, "--random-seeds", 1, "--module-sets", "--quiet")
    code, out, err = relneuron("ablate", folder, *words)
    assert code == 0, err
    code, out, err = relneuron("report", tmp_path, "-o", tmp_path / "report.html")
    assert code == 0, err
    page = (tmp_path / "report.html").read_text()
    assert "In which modules of the model" in page and "language L0.gate" in page
    rows = list(read_csv(tmp_path / "analyses" / "modules.csv", ("relation", "modules")))
    wanted = ("language", "vision", "qformer", "vision+qformer", "all")
    assert [(r["relation"], r["modules"]) for r in rows] == [
        (d, m) for d in DOMAINS for m in wanted
    ]
    # A changed picture is another study.
    before = json.loads((tmp_path / "manifest.json").read_text())["stages"]["ablate"]["inputs"]
    picture(9).save(tmp_path / "0.png")
    code, out, err = relneuron("ablate", folder, *words, "--force")
    after = json.loads((tmp_path / "manifest.json").read_text())["stages"]["ablate"]["inputs"]
    assert code == 0 and {k for k in after if after[k] != before[k]} == {"pictures"}
