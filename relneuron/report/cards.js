// The page of cards: finds, sorts and filters them, and goes from one to the next by keys.
"use strict";
(() => {
  const form = document.querySelector(".controls");
  const list = document.querySelector(".cards");
  const cards = [...list.querySelectorAll(".card")];
  const texts = new Map(cards.map((card) => [card, card.textContent.toLowerCase() + "\n" + card.dataset.neuron]));
  const sets = new Map(cards.map((card) => [card, [...card.querySelectorAll("[data-set]")].map((one) => one.dataset.set)]));
  const place = new Map(cards.map((card, number) => [card, number]));
  const number = (card, name) => (name in card.dataset ? Number(card.dataset[name]) : -Infinity);
  const down = (name) => (a, b) => number(b, name) - number(a, name);
  const up = (name) => (a, b) => number(a, name) - number(b, name);
  const site = (a, b) => (a.dataset.site < b.dataset.site ? -1 : Number(a.dataset.site > b.dataset.site));
  const orders = {
    score: [down("score")],
    value: [down("value")],
    layer: [up("layer"), down("score")],
    name: [up("layer"), site, up("index")],
  };
  const shown = () => [...list.querySelectorAll(".card:not([hidden])")];

  function update() {
    const asked = new FormData(form);
    const words = asked.get("find").toLowerCase().split(/\s+/).filter(Boolean);
    for (const card of cards) {
      card.hidden = !(
        words.every((word) => texts.get(card).includes(word)) &&
        (!asked.get("set") || sets.get(card).includes(asked.get("set"))) &&
        (!asked.get("layer") || card.dataset.layer === asked.get("layer")) &&
        (!asked.get("site") || card.dataset.site === asked.get("site"))
      );
    }
    const rules = [...(orders[asked.get("sort")] || []), (a, b) => place.get(a) - place.get(b)];
    const compare = (a, b) => rules.reduce((found, rule) => found || rule(a, b), 0);
    list.append(...cards.slice().sort(compare));
    const n = shown().length;
    form.querySelector("output").textContent = `${n} of ${cards.length} neurons.`;
    stop(shown()[0]);
  }

  // One card is a stop of the tab key: the one that was last gone to.
  function stop(card) {
    for (const other of cards) other.tabIndex = other === card ? 0 : -1;
  }

  function go(step) {
    const every = shown();
    const now = every.indexOf(document.activeElement.closest(".card"));
    const next = every[now < 0 ? (step > 0 ? 0 : every.length - 1) : now + step];
    if (!next) return;
    stop(next);
    next.focus({ preventScroll: true });
    next.scrollIntoView({ block: "nearest" });
  }

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const at = event.target;
    if (at.matches("input, select")) {
      if (event.key === "Escape" && at.name === "find") { at.value = ""; update(); at.blur(); }
      return;
    }
    const isCard = at.matches(".card");
    const step = { j: 1, k: -1, ArrowDown: isCard && 1, ArrowUp: isCard && -1 }[event.key];
    if (event.key === "/") form.elements.find.focus();
    else if (step) go(step);
    else return;
    event.preventDefault();
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", update);
  // What a link leads to may be filtered out.
  for (const link of list.querySelectorAll(".near a")) {
    link.addEventListener("click", () => { form.reset(); update(); });
  }
  form.hidden = false;
  update();
})();
