// The panel beside the ranking: reasons and neighbours of the chosen item.

import { know, known, labels, link, missing, nameOf, picture, titleOf } from "./catalog.js";
import { $, decimals, later, latest, make, measure, narrow, scale, short } from "./dom.js";
import { block, reasons } from "./reasons.js";
import { ask, lineOf, live } from "./server.js";
import { remember, state } from "./session.js";

const panels = { why: { shown: null }, near: { shown: null } };
let tab = "why";
let subjectId = null;
let trail = []; // items whose neighbours were looked at before
let origin = null; // what had the focus when the panel was opened

export const opened = () => document.body.classList.contains("opened");
export const chooseSoon = later(120, (id) => { if (state.chosen !== id || subjectId !== id) choose(id, { tab: "why" }); });

/** Shows an item in the panel: in the tab that is there, or another. */
export function choose(id, { tab: wanted = tab, open = false, focus = false, back = false } = {}) {
  chooseSoon.cancel();
  if (!back) trail = [];
  if (state.ranked.some((item) => item.id === id)) {
    state.chosen = id;
    remember();
  }
  for (const row of $("results").querySelectorAll(".row")) {
    const own = row.firstChild.dataset.id === id;
    row.classList.toggle("chosen", own);
    row.firstChild.toggleAttribute("aria-current", own);
    if (own) row.firstChild.setAttribute("aria-current", "true");
  }
  subject(id);
  select(wanted);
  if (open && narrow.matches && !opened()) openPanel();
  if (focus) $(`tab-${tab}`).focus();
}

export function subject(id) {
  subjectId = id;
  $("subject").hidden = !id;
  if (!id) {
    panels.why.shown = panels.near.shown = null;
    const hold = () => make("p", { class: "quiet hold" }, state.history.length ? "Nothing is chosen." : "Reasons and neighbours of an item are shown here.");
    $("why").replaceChildren(hold());
    $("near").replaceChildren(hold());
    return;
  }
  const item = known(id) ?? { id, title: titleOf(id), text: "", labels: [] };
  const reads = item.text && item.text !== item.title ? make("p", { class: "quiet reads", title: item.text }, make("span", {}, "The model reads: "), item.text) : null;
  $("subject").replaceChildren(
    make("div", { class: "what" }, picture(item), make("p", { class: "text", title: nameOf(item) }, nameOf(item)), labels(item)),
    make("button", { type: "button", onclick: (event) => take(event.currentTarget, item) }, "Add to history"),
    ...[reads, link(item)].filter(Boolean),
  );
}

/** Asks the history to add an item. */
function take(node, item) {
  node.dispatchEvent(new CustomEvent("take", { bubbles: true, detail: item }));
}

export function plus(item) {
  return make("button", { type: "button", class: "plus", tabindex: -1, title: "Add to the history", "aria-label": `Add to the history: ${short(nameOf(item))}`, onclick: (event) => take(event.currentTarget, item) }, "+");
}

function select(name) {
  tab = name;
  for (const other of ["why", "near"]) {
    $(`tab-${other}`).setAttribute("aria-selected", String(other === name));
    $(`tab-${other}`).tabIndex = other === name ? 0 : -1;
    $(other).hidden = other !== name;
  }
  if (subjectId) (name === "why" ? explain : neighbours)(subjectId);
}

for (const name of ["why", "near"]) {
  $(`tab-${name}`).addEventListener("click", () => select(name));
  $(`tab-${name}`).addEventListener("keydown", (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    event.preventDefault();
    const other = name === "why" ? "near" : "why";
    select(other);
    $(`tab-${other}`).focus();
  });
}

function openPanel() {
  origin = document.activeElement;
  document.body.classList.add("opened");
  $("detail").setAttribute("role", "dialog");
  $("detail").setAttribute("aria-modal", "true");
  for (const node of [document.querySelector("header"), $("ask"), $("answer"), document.querySelector("footer")]) node.inert = true;
}

export function closePanel() {
  if (!opened()) return;
  document.body.classList.remove("opened");
  $("detail").removeAttribute("role");
  $("detail").removeAttribute("aria-modal");
  for (const node of document.querySelectorAll("[inert]")) node.inert = false;
  if (origin?.isConnected) origin.focus();
  else document.querySelector("#results .chosen .pick")?.focus();
}

$("close").addEventListener("click", closePanel);
narrow.addEventListener("change", () => {
  closePanel();
  if (!narrow.matches && !subjectId && state.ranked.length) choose(state.ranked[0].id, { tab: "why" });
});

/** Fills a tab for an item: what is there stays until there is something new. */
async function fill(name, key, load, draw) {
  const panel = panels[name];
  if (panel.shown === key) return;
  $(name).setAttribute("aria-busy", "true");
  try {
    const found = await load();
    panel.shown = key;
    $(name).replaceChildren(...draw(found));
    $(name).scrollTop = 0;
  } catch (error) {
    if (error.name === "AbortError") return;
    panel.shown = null;
    $(name).replaceChildren(make("p", { class: "quiet hold" }, lineOf(error)));
  } finally {
    $(name).setAttribute("aria-busy", "false");
  }
}

const explain = latest((signal, id) => {
  const usable = state.history.filter((other) => !missing(other));
  if (!usable.length) {
    panels.why.shown = null;
    $("why").replaceChildren(make("p", { class: "quiet hold" }, "Reasons need a history."));
    return undefined;
  }
  return fill("why", JSON.stringify([id, usable, state.by]), () => ask("v1/explain", { body: { history: usable, item: id }, signal }), reasons);
});

const neighbours = latest((signal, id) => {
  if (live && !live.can.neighbours) {
    panels.near.shown = null;
    $("near").replaceChildren(make("p", { class: "quiet hold" }, "This method only ranks: its items have no vectors, and so no neighbours."));
    return undefined;
  }
  return fill("near", JSON.stringify([id, state.by]), () => ask(`v1/items/${encodeURIComponent(id)}/neighbours?k=12`, { signal }), (found) => nearby(id, found.items));
});

function nearby(id, items) {
  const share = scale(items.map((item) => item.score));
  const visit = (other) => { trail.push(id); choose(other.id, { tab: "near", back: true, focus: true }); };
  know(...items);
  const keys = (event, item) => {
    const rows = [...$("near").querySelectorAll(".pick")];
    const place = rows.indexOf(event.currentTarget);
    if (event.key === "ArrowDown") rows[place + 1]?.focus();
    else if (event.key === "ArrowUp") (rows[place - 1] || $("tab-near")).focus();
    else if (event.key === "a") take(event.currentTarget, item);
    else return;
    event.preventDefault();
  };
  const before = trail.at(-1);
  return [
    before ? make("button", { type: "button", id: "back", class: "plain", onclick: () => { trail.pop(); choose(before, { tab: "near", back: true, focus: true }); } }, `← ${short(titleOf(before)).slice(0, 40)}`) : null,
    block(
      "Nearest items",
      "By the cosine of their vectors. Enter goes on from there.",
      make(
        "ol",
        { class: "nearby" },
        ...items.map((item) =>
          make(
            "li",
            { class: "row" },
            make(
              "button",
              { type: "button", class: "pick", "data-id": item.id, "aria-label": `${nameOf(item)}, cosine ${decimals(item.score, 2)}`, onclick: () => visit(item), onkeydown: (event) => keys(event, item) },
              make("span", { class: "what" }, picture(item), make("span", { class: "text" }, nameOf(item)), labels(item, { most: 3, id: false })),
              make("span", { class: "score" }, decimals(item.score, 2), measure(make("span", { class: "bar" }, make("i")), { share: share(item.score) })),
            ),
            plus(item),
          ),
        ),
      ),
    ),
  ].filter(Boolean);
}
