// The page: a part is shown for each address, and what all parts share is set up.
//
//   session    what the recommender is asked, and its address
//   recommend  history, search and ranking; filters; detail: the panel of an item, with reasons
//   items      the catalog: find, add, change, delete
//   experiments, plots
//   live       operations: metrics, errors, versions
//   server     asking, keys, and what went wrong; catalog: what is known of items; dom: elements

import { closePanel } from "./detail.js";
import { $, make, narrow } from "./dom.js";
import { showExperiments } from "./experiments.js";
import { showItems } from "./items.js";
import { showOperations } from "./live.js";
import { focusRow, showRecommender } from "./recommend.js";
import { about, live, onKey, onLive, tell, untell } from "./server.js";
import { address } from "./session.js";

const VIEWS = {
  recommend: { name: "Recommend", node: $("recommend"), show: showRecommender, search: $("search") },
  items: { name: "Items", node: $("items"), show: showItems, search: $("catalog-search") },
  experiments: { name: "Experiments", node: $("experiments"), show: showExperiments },
  live: { name: "Live", node: $("operations"), show: showOperations },
};
const HEADLINE = ["recall@10", "ndcg@10", "mrr"];

let view = "recommend";

/** Makes the part of the page visible that the address names. */
function reveal() {
  const parts = new URLSearchParams(location.hash.slice(1));
  const before = view;
  view = parts.get("view") in VIEWS ? parts.get("view") : "recommend";
  closePanel();
  if (before !== view) untell();
  for (const [name, { node }] of Object.entries(VIEWS)) {
    node.hidden = name !== view;
    if (name === view) $(`to-${name}`).setAttribute("aria-current", "page");
    else $(`to-${name}`).removeAttribute("aria-current");
  }
  document.querySelector("footer").hidden = view !== "recommend";
  document.title = view === "recommend" ? "l2rec" : `${VIEWS[view].name} · l2rec`;
  return parts;
}

async function route() {
  const parts = reveal();
  await VIEWS[view].show(parts);
}

// The way back to the recommender is to the history that it had.
$("to-recommend").addEventListener("click", (event) => {
  if (event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  if (view === "recommend") return;
  history.pushState(null, "", address() || location.pathname + location.search);
  route();
});
for (const name of ["items", "experiments", "live"]) {
  $(`to-${name}`).addEventListener("click", (event) => { if (view === name) event.preventDefault(); });
}

onLive(() => {
  $("live").replaceChildren(make("b", { title: `Live version ${live.name}` }, live.name), make("code", {}, live.version.slice(0, 8)));
  const own = live.scores[live.method] || {};
  $("headline").replaceChildren(...HEADLINE.filter((name) => name in own).map((name) => make("span", {}, `${name} `, make("b", {}, own[name].toFixed(4)))));
});

// -- theme ---------------------------------------------------------------------------------------

const THEME = "l2rec-theme";
const THEMES = ["auto", "light", "dark"];

function theme(chosen) {
  if (chosen === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = chosen;
  $("theme").textContent = `Theme: ${chosen}`;
  $("theme").setAttribute("aria-label", `Colours: ${chosen === "auto" ? "as the system" : chosen}. Change`);
}

function storedTheme() {
  const chosen = localStorage.getItem(THEME);
  return THEMES.includes(chosen) ? chosen : "auto";
}

$("theme").addEventListener("click", () => {
  const chosen = THEMES[(THEMES.indexOf(storedTheme()) + 1) % THEMES.length];
  localStorage.setItem(THEME, chosen);
  theme(chosen);
});

// -- keyboard ------------------------------------------------------------------------------------

addEventListener("keydown", (event) => {
  const typing = event.target.closest?.("input, select, textarea, dialog");
  const { search } = VIEWS[view];
  if (event.key === "/" && search && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) {
    event.preventDefault();
    closePanel();
    search.focus();
    search.select();
  } else if (event.key === "Escape") closePanel();
});
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // the part behind the # is the history
  if (view === "recommend") focusRow(0) || $("results").focus();
  else {
    VIEWS[view].node.tabIndex = -1;
    VIEWS[view].node.focus();
  }
});

// -- start ---------------------------------------------------------------------------------------

async function start() {
  try {
    await about();
  } catch (error) {
    tell(error, start);
    if (error.silent) return;
  }
  await route();
}

onKey(() => {
  start();
  VIEWS[view].search?.focus();
});
addEventListener("popstate", route);
document.addEventListener("visibilitychange", () => { if (!document.hidden && live) about().catch((error) => tell(error, about)); });

theme(storedTheme());
reveal();
start();
if (!narrow.matches) VIEWS[view].search?.focus();
