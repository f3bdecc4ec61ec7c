"""`look --serve`: what the server shows, and what it tells nobody, over a real socket.

The browser is headless Chromium, where it is there.
"""

from __future__ import annotations

import http.client
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import numpy as np
import pytest
import uvicorn

from relneuron.artifact.cards import check_card
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.neurons import NeuronFile
from relneuron.study import browse
from relneuron.study import serve as served
from relneuron.study.browse import PER_PAGE, Pages
from relneuron.study.look import open_cards
from relneuron.study.ranked import Ranked
from relneuron.study.serve import address, app_of, hosts_of, listening
from relneuron.study.settings import LookOptions
from tests.conftest import ROOT
from tests.kit.cards import chromium
from tests.kit.corpus_commands import check_refused
from tests.kit.hooked import Study

TOKEN = "t0ken-of_the_tests"


@pytest.fixture(scope="module")
def study(model_folder: Path, fact_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    return Study(model_folder, fact_folder, tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def server(study: Study) -> Pages:
    cards, sets = open_cards(study.model, study.tokenizer, study.folder, LookOptions(examples=2))
    return Pages(cards, sets, Ranked(study.folder, cards.order), "a/<b>model</b>")


@contextmanager
def running(app: Any, found: Any) -> Iterator[None]:
    """The server in a thread of its own."""
    config = uvicorn.Config(
        app, log_level="critical", lifespan="off", ws="none", server_header=False
    )
    one = uvicorn.Server(config)
    thread = threading.Thread(target=one.run, kwargs={"sockets": [found]})
    thread.start()
    while not one.started:
        time.sleep(0.01)
    try:
        yield
    finally:
        one.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def url(server: Pages) -> Iterator[str]:
    with listening("127.0.0.1", 0) as found:
        place = address(found, TOKEN)
        with running(app_of(server, TOKEN, hosts_of("127.0.0.1")), found):
            yield place


def ask(
    url: str, path: str = "", *, method: str = "GET", host: str | None = None, whole: bool = False
) -> tuple[int, dict[str, str], str]:
    """Status, headers and text of an answer; `path` is behind the token, or `whole`."""
    parts = urlsplit(url if whole else urljoin(url, path))
    target = path if whole else parts.path + f"?{parts.query}" * bool(parts.query)
    one = http.client.HTTPConnection(parts.netloc, timeout=60)
    one.putrequest(method, target, skip_host=host is not None)
    if host is not None:
        one.putheader("Host", host)
    one.endheaders()
    answer = one.getresponse()
    text = answer.read().decode()
    one.close()
    return answer.status, {k.lower(): v for k, v in answer.getheaders()}, text


def cells(text: str) -> list[list[str]]:
    """The text of every row of a page's lists."""
    rows = re.findall(r"<tr>(.*?)</tr>", text, re.DOTALL)
    return [
        [unescape(re.sub(r"<[^>]+>", "", cell)) for cell in re.findall(r"<td.*?</td>", row)]
        for row in rows[0:]
        if "<td" in row
    ]


def links(text: str) -> list[str]:
    """Where a page leads, but to its icon."""
    return [unescape(link) for link in re.findall(r'<a [^>]*href="([^"]+)"', text)]


# --- what it shows ---------------------------------------------------------------------------


def test_it_begins_with_the_sets_and_the_layers(url: str, study: Study) -> None:
    status, _, text = ask(url)
    assert status == 200 and "<b>model" not in text and "a/&lt;b&gt;model" in text
    rows = cells(text)
    assert rows[:3] == [[name, str(len(chosen))] for name, chosen in study.sets.items()]
    assert rows[3:6] == [[name] for name in study.sets]
    assert rows[6:] == [["L0", "48", "48", "32"], ["L1", "48", "48", "32"]]
    for link in links(text):
        assert ask(url, link)[0] == 200, link


def test_every_neuron_has_a_card(url: str, server: Pages) -> None:
    """Of each site, the first and the last; those beside it are linked."""
    for neuron in ((0, "gate", 0), (1, "up", 47), (1, "down", 31), (0, "down", 5)):
        name = ".".join(map(str, neuron))
        status, _, text = ask(url, f"neuron/{name}")
        assert status == 200 and text.count('<article class="card"') == 1
        assert f'data-neuron="{name}"' in text
        card = server.cards.card(neuron)
        check_card(card)
        assert text.count('<p class="text"') == len(card["examples"]) == 2
        near = [one["neuron"] for one in card["nearest"]]
        beside = [neuron[2] - 1] * (neuron[2] > 0) + [neuron[2] + 1] * (neuron[2] not in (47, 31))
        beside_names = [f"{neuron[0]}.{neuron[1]}.{i}" for i in beside]
        assert links(text) == ["../", *near, *beside_names]
        for link in near[:1] + beside_names[:1]:
            assert ask(url, f"neuron/{link}")[0] == 200


def test_a_card_is_made_once(url: str, server: Pages, monkeypatch: Any) -> None:
    made, true = [], server.cards.card
    monkeypatch.setattr(server.cards, "card", lambda n: made.append(n) or true(n))
    monkeypatch.setattr(browse, "KEPT", 2)
    for name in ("0.gate.30", "0.gate.30", "0.gate.31", "0.gate.32", "0.gate.32", "0.gate.30"):
        assert ask(url, f"neuron/{name}")[0] == 200
    assert [index for _, _, index in made] == [30, 31, 32, 30]


def test_many_ask_at_once(url: str) -> None:
    """The model belongs to one thread at a time, and all get their card."""
    said: dict[int, int] = {}

    def one(i: int) -> None:
        said[i] = ask(url, f"neuron/1.up.{i}")[0]

    threads = [threading.Thread(target=one, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == dict.fromkeys(range(6), 200)


def test_sets_and_layers_are_sorted_and_cut(
    url: str, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = study.sets["lives_in"]
    rows = cells(ask(url, "set?name=lives_in")[2])
    assert [int(row[1]) for row in rows] == list(range(1, len(chosen) + 1))
    assert [row[0] for row in rows] == [f"L{n[0]}.{n[1]}.{n[2]}" for n in chosen]
    by_layer = cells(ask(url, "set?name=lives_in&sort=layer")[2])
    assert sorted(map(tuple, rows)) == sorted(map(tuple, by_layer)) and rows != by_layer
    best: dict[int, float] = {}
    for some in study.sets.values():
        for layer, site, index, score in some:
            if (layer, site) == (1, "gate"):
                best[index] = max(score, best.get(index, score))
    assert best
    shown = [int(row[0].split(".")[2]) for row in cells(ask(url, "layer/1/gate?sort=score")[2])]
    wanted = sorted(range(48), key=lambda i: (-best.get(i, -1.0), i))
    assert [best.get(i) for i in shown] == [best.get(i) for i in wanted]
    monkeypatch.setattr(browse, "PER_PAGE", 20)
    seen, page = [], "layer/1/gate?sort=index"
    for _ in range(3):
        text = ask(url, page)[2]
        seen += [row[0] for row in cells(text)]
        following = re.search(r'rel="next" href="([^"]+)"', text)
        page = f"layer/1/gate{unescape(following[1])}" if following else ""
    assert page == "" and seen == [f"L1.gate.{i}" for i in range(48)] and PER_PAGE == 100


def test_all_neurons_by_a_score(url: str, study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """As numpy sorts them; equal scores in the order of layers within a site."""
    from safetensors.numpy import load_file

    scores, relation = load_file(study.folder / "scores.safetensors"), "lives_in"
    every = [
        (float(value), site, layer, index)
        for site in ("gate", "up", "down")
        for (layer, index), value in np.ndenumerate(
            scores[f"ap.{site}"][list(study.sets).index(relation)]
        )
    ]
    monkeypatch.setattr(browse, "PER_PAGE", 100)
    for sort, sign in (("", -1), ("&sort=-ap", 1)):
        seen = []
        for page in (1, 2, 3):
            status, _, text = ask(url, f"scores?of={relation}{sort}&page={page}")
            assert status == 200
            seen += cells(text)
        assert len(seen) == 256
        values = {f"L{layer}.{site}.{index}": value for value, site, layer, index in every}
        assert sorted(values) == sorted(row[0] for row in seen)
        shown = [values[row[0]] for row in seen]
        assert shown == sorted(shown, key=lambda value: sign * value)
    first = cells(ask(url, f"scores?of={relation}")[2])[0]
    assert f"{relation} no. " in first[-1]


def test_a_folder_without_scores_has_no_list(study: Study, server: Pages, tmp_path: Path) -> None:
    assert Ranked(tmp_path, server.cards.order).names == []
    (tmp_path / "scores.safetensors").write_bytes(b"no tensors")
    with pytest.warns(UserWarning, match="no lists by score"):
        assert Ranked(tmp_path, server.cards.order).names == []


def test_a_neuron_is_found_by_its_name(url: str) -> None:
    status, headers, _ = ask(url, "find?neuron=+1.down.3+")
    assert (status, headers["location"]) == (303, "neuron/1.down.3")


# --- what it does not show -------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        *("neuron/2.gate.0", "neuron/0.gate.48", "neuron/0.gate.-1", "neuron/0.gate.x"),
        *("neuron/0.q.0", "neuron/", "neuron/0.gate.0/x", "neuron/..%2f..%2fetc", "neuron/%00"),
        *("neuron/0.gate.99999999999999999999", "neuron/0.gate.%C2%B2", "find?neuron=<b>x"),
        *("layer/2/gate", "layer/0/q", "layer/-1/gate", "layer/%C2%B2/gate", "layer/0/gate?page=0"),
        *("layer/0/gate?page=2", "layer/0/gate?page=x", "layer/0/gate?sort=x", "set?name=<b>x"),
        *("scores", "scores?of=x", "scores?of=lives_in&sort=x", "scores?of=lives_in&page=4"),
        *("set", "nothing", "find", "manifest.json", "static/../manifest.json"),
    ],
)
def test_what_is_not_there_is_said_without_a_trace(url: str, path: str, study: Study) -> None:
    status, headers, text = ask(url, path)
    assert status == 404 and "<h1>Not found</h1>" in text
    assert "<b>x" not in text and "Traceback" not in text and str(study.folder) not in text
    assert "default-src 'none'" in headers["content-security-policy"]
    assert ask(urljoin(url, path), links(text)[0])[0] == 200  # the way back


def test_an_error_stays_in_the_terminal(url: str, server: Pages, monkeypatch: Any) -> None:
    def broken(neuron: Any) -> Any:
        raise RuntimeError("a secret of /home")

    monkeypatch.setattr(server.cards, "card", broken)
    said: list[str] = []
    monkeypatch.setattr(browse.warnings, "warn", lambda text, **_: said.append(text))
    status, headers, text = ask(url, "neuron/0.up.0")
    assert (status, text) == (500, "This page cannot be made; the terminal says why.")
    assert "secret" not in str(headers) and said == ["look: RuntimeError: a secret of /home"]


def test_who_does_not_know_the_token_sees_nothing(url: str) -> None:
    """Whatever is asked for, in every way; a wrong host is refused before."""
    other = TOKEN[:-1] + "x"
    for path in (
        "/",
        "/x",
        f"/{other}/",
        f"/{TOKEN}x/",
        "/neuron/0.gate.0",
        f"/x/{TOKEN}/",
        "/%ff/",
    ):
        for method in ("GET", "POST", "HEAD"):
            status, headers, text = ask(url, path, whole=True, method=method)
            assert status == 404 and text in ("Not found", ""), (path, method)
            assert "location" not in headers and headers["referrer-policy"] == "no-referrer"
    assert ask(url, f"/{TOKEN}", whole=True)[:2][1]["location"] == f"/{TOKEN}/"
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        status, headers, _ = ask(url, "neuron/0.gate.0", method=method)
        assert status == 405 and headers["allow"] == "GET, HEAD"
    assert ask(url, "", method="HEAD")[2] == "" and ask(url, "", method="HEAD")[0] == 200


def test_another_host_is_refused(url: str) -> None:
    """A page of another site whose name leads here (DNS rebinding) does not get an answer."""
    port = urlsplit(url).port
    for host in ("evil.example", f"evil.example:{port}", "", "127.0.0.1.evil.example", "0.0.0.0"):
        status, headers, text = ask(url, host=host)
        assert (status, text) == (400, "Invalid host header"), host
        assert "cache-control" in headers
    for host in (f"127.0.0.1:{port}", "localhost", f"localhost:{port}", f"[::1]:{port}"):
        assert ask(url, host=host)[0] == 200, host
    assert hosts_of("192.0.2.7") == ["192.0.2.7"]
    assert "*" not in hosts_of("0.0.0.0") and "localhost" in hosts_of("0.0.0.0")
    with listening("0.0.0.0", 0) as found:
        assert urlsplit(address(found, TOKEN)).hostname in [h.lower() for h in hosts_of("0.0.0.0")]
    with listening("::1", 0) as found:
        assert address(found, TOKEN).startswith("http://[::1]:")


def test_every_answer_is_guarded(url: str) -> None:
    for path in ("", "neuron/0.gate.0", "set?name=lives_in", "find?neuron=0.gate.1", "x"):
        _, headers, text = ask(url, path)
        assert {*served.HEADERS} <= {*headers} and "server" not in headers
        assert "<script" not in text and TOKEN not in text
        assert re.findall(r'(?:src|href|action)="([a-z]+:|//)', text) in ([], ["data:"])


# --- the command, and a browser --------------------------------------------------------------


def test_a_place_that_is_taken_or_none(tmp_path: Path) -> None:
    with listening("127.0.0.1", 0) as found:
        found.listen()
        with (
            pytest.raises(RelneuronError, match="cannot listen"),
            listening("127.0.0.1", found.getsockname()[1]),
        ):
            pass
    with (
        pytest.raises(RelneuronError, match="--host nowhere is no address"),
        listening("nowhere", 0),
    ):
        pass


def test_what_does_nothing_beside_a_server_is_refused(relneuron: Any, tmp_path: Path) -> None:
    start = ["look", tmp_path, "--serve"]
    for more, cause in (
        (["-o", tmp_path / "p.html"], "-o does something only without --serve"),
        (["--force"], "--force does something only without --serve"),
        (["--cards", 5], "--cards does something only without --serve"),
        (["--neurons", "0.gate.1"], "--serve shows all neurons"),
    ):
        check_refused(relneuron, tmp_path, cause, *start, *more)
    check_refused(relneuron, tmp_path, "neither a page nor a server", "look", tmp_path)


def test_the_command_says_where_and_ends_with_ctrl_c(study: Study, model_folder: Path) -> None:
    words = ["look", study.folder, "--serve", "--examples", 2, "--model", model_folder]
    before = sorted(path.name for path in study.folder.iterdir())
    command = [sys.executable, "-m", "relneuron", *map(str, words)]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    done = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    assert done.stdout is not None
    line = done.stdout.readline()
    found = re.search(r"^256 neurons: (http://127\.0\.0\.1:\d+/([\w-]{43})/)$", line)
    assert found, (line, done.stderr.read() if done.stderr else "")
    status = 0
    for _ in range(100):
        try:
            status = ask(found[1], "neuron/0.gate.3")[0]
            break
        except ConnectionError:
            time.sleep(0.1)
    assert status == 200
    done.send_signal(signal.SIGINT)
    _, err = done.communicate(timeout=60)
    assert done.returncode == 130, err
    assert [text.split()[0] for text in err.splitlines()] == ["error:", "fix:"], err
    assert "interrupted" in err and "relneuron look" in err
    assert sorted(path.name for path in study.folder.iterdir()) == before


def test_a_browser_walks_from_the_layers_to_a_card(url: str, study: Study) -> None:
    chosen = NeuronFile.read(study.folder / "neurons.json").sets["lives_in"][0]
    with chromium() as browser:
        tab = browser.new_page(viewport={"width": 1200, "height": 900})
        said: list[str] = []
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        asked: list[str] = []
        tab.on("request", lambda one: asked.append(one.url))
        tab.goto(url)
        tab.click("text=lives_in >> nth=0")
        assert tab.locator("tbody tr").count() == len(study.sets["lives_in"])
        tab.click("tbody tr:first-child a")
        name = ".".join(map(str, chosen[:3]))
        assert tab.get_attribute(".card", "data-neuron") == name
        assert tab.locator(".card .text .t").count() > 0
        shades = tab.eval_on_selector_all(
            ".t", "all => all.map(one => getComputedStyle(one).backgroundColor)"
        )
        assert len({*shades}) > 1
        tab.fill("input[name=neuron]", "1.down.7")
        tab.press("input[name=neuron]", "Enter")
        tab.wait_for_selector('.card[data-neuron="1.down.7"]')
        tab.click(".near a >> nth=0")
        tab.wait_for_selector(".card")
        tab.click("header.top > a")
        assert tab.title().startswith("The 256 neurons")
        assert said == [] and all(one.startswith((url, "data:")) for one in asked)
        tab.set_viewport_size({"width": 420, "height": 800})
        tab.goto(f"{url}neuron/{name}")
        assert tab.evaluate("document.documentElement.scrollWidth") <= 420
        tab.close()
