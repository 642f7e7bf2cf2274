// The recommender: a history is put together, /v1/recommend ranks.
//
//   history   chips: add, remove, move
//   search    items and users while one types
//   ranking   the list

import { know, known, labelText, labels, learn, missing, nameOf, picture, titleOf } from "./catalog.js";
import { choose, chooseSoon, opened, plus, subject } from "./detail.js";
import { $, decimals, latest, later, make, measure, narrow, number, say, scale, short } from "./dom.js";
import { drawFilters, onFilters } from "./filters.js";
import { about, ask, live, onLive, tell, untell } from "./server.js";
import { filtersAsked, MOST, read, remember, state } from "./session.js";

/** Shows what an address says. */
export async function showRecommender(parts) {
  read(parts);
  if (![...$("k").options].some((option) => option.value === String(state.k))) $("k").add(new Option(state.k));
  $("k").value = state.k;
  await refresh();
}

/** One sentence on what this is, and one on what a score means. */
onLive(() => {
  $("purpose").replaceChildren(
    "What would somebody take next? ",
    make("b", {}, live.name),
    ` ranks its ${number(live.items)} items for a history that you put together. A score orders the items for this one history: it is no probability, and scores of two histories or two versions cannot be compared.`,
  );
  if (!$("recommend").hidden) drawFilters();
});

async function refresh() {
  try {
    await learn([...state.history, state.next]);
  } catch (error) {
    tell(error, refresh);
    if (!error.silent) draw();
    return;
  }
  draw();
  await recommend();
}

// -- history -------------------------------------------------------------------------------------

/** After the history was changed: drawn, ranked, and kept in the address. */
function changed(line, { user = null, next = null } = {}) {
  state.history = state.history.slice(-MOST);
  state.user = user;
  state.next = next;
  state.chosen = null;
  remember(true);
  draw();
  if (line) say(line);
  recommend();
}

function add(item) {
  know(item);
  state.history.push(item.id);
  changed(`Added: ${short(nameOf(item))}`);
}

// Whatever of the page shows an item may ask to add it.
document.addEventListener("take", (event) => add(event.detail));

function remove(place) {
  const [id] = state.history.splice(place, 1);
  changed(`Removed: ${short(titleOf(id))}`);
  focusChip(Math.min(place, state.history.length - 1));
}

function move(from, to) {
  if (to < 0 || to >= state.history.length || from === to) return;
  const [id] = state.history.splice(from, 1);
  state.history.splice(to, 0, id);
  changed(`Moved to ${to + 1} of ${state.history.length}: ${short(titleOf(id))}`);
  focusChip(to);
}

function focusChip(place) {
  const chips = $("history").querySelectorAll(".open");
  for (const [n, chip] of chips.entries()) chip.tabIndex = n === place ? 0 : -1; // one stop of Tab
  (chips[place] || $("search")).focus();
}

let dragged = null;

function chip(id, place) {
  const text = titleOf(id);
  const unknown = missing(id);
  const last = state.history.length - 1;
  const keys = (event) => {
    if (event.key === "Delete" || event.key === "Backspace") remove(place);
    else if (event.key === "ArrowUp") event.altKey ? move(place, place - 1) : focusChip(Math.max(place - 1, 0));
    else if (event.key === "ArrowDown") event.altKey ? move(place, place + 1) : focusChip(Math.min(place + 1, last));
    else if (event.key === "Home") focusChip(0);
    else if (event.key === "End") focusChip(last);
    else return;
    event.preventDefault();
  };
  const tool = (label, sign, kind, disabled, onclick) =>
    make("button", { type: "button", class: kind, tabindex: -1, disabled, title: label, "aria-label": `${label}: ${short(text)}`, onclick }, sign);
  return make(
    "li",
    {
      class: `chip${unknown ? " unknown" : ""}`,
      draggable: "true",
      ondragstart: (event) => {
        dragged = place;
        event.dataTransfer.effectAllowed = "move";
        event.dataTransfer.setData("text/plain", text);
        event.currentTarget.classList.add("dragged");
      },
      ondragend: (event) => { dragged = null; event.currentTarget.classList.remove("dragged"); },
      ondragover: (event) => {
        if (dragged === null) return;
        event.preventDefault();
        event.currentTarget.classList.add("over");
      },
      ondragleave: (event) => event.currentTarget.classList.remove("over"),
      ondrop: (event) => {
        if (dragged === null) return;
        event.preventDefault();
        move(dragged, place);
      },
    },
    make(
      "button",
      {
        type: "button", class: "open", title: text, "data-id": id, "aria-describedby": "chip-help",
        "aria-label": `${place + 1}. ${text}${unknown ? " (not in this catalog)" : ""}`,
        tabindex: place === last ? 0 : -1, onkeydown: keys, onclick: () => { if (!unknown) choose(id, { tab: "near", open: true, focus: true }); },
      },
      make("i", {}, String(place + 1)),
      picture(known(id)),
      make("span", { class: "text" }, unknown ? `${id} (not in this catalog)` : text),
    ),
    make(
      "span",
      { class: "tools" },
      tool("Move up", "↑", "move", place === 0, () => move(place, place - 1)),
      tool("Move down", "↓", "move", place === last, () => move(place, place + 1)),
      tool("Remove", "×", "remove", false, () => remove(place)),
    ),
  );
}

function draw() {
  const some = state.history.length;
  const grown = state.history.length > $("history").children.length;
  const top = $("history").scrollTop;
  $("history").replaceChildren(...state.history.map(chip));
  $("count").textContent = some ? `${some} ${some === 1 ? "item" : "items"}${state.user ? ` of user ${state.user}` : ""}, oldest first` : "";
  $("clear").hidden = $("copy").hidden = !some;
  $("empty").hidden = some > 0;
  if (!some) starts();
  drawNext();
  drawFilters();
  $("history").scrollTop = grown ? $("history").scrollHeight : top; // the newest is the last
}

/** What a user of the data set took next, and where the ranking has it. */
function drawNext() {
  const text = state.next && known(state.next)?.title;
  $("next").hidden = !text;
  if (!text) return;
  const place = state.ranked.findIndex((item) => item.id === state.next);
  const where = !state.ranked.length ? "\u00a0" : place < 0 ? `It is not among these ${state.ranked.length}.` : `It is ranked ${place + 1}.`;
  $("next").replaceChildren(make("span", { class: "quiet" }, "Taken next by this user"), make("span", { class: "text", title: text }, text), make("b", {}, where));
}

let started = false;

/** Where to start from, while there is no history: users, or else items. */
async function starts() {
  if (started) return;
  started = true;
  try {
    const { users } = await ask("v1/users?limit=6");
    const option = (name, detail, onclick) =>
      make("li", {}, make("button", { type: "button", onclick }, make("span", { class: "text" }, name), make("span", { class: "id" }, detail)));
    if (users.length) {
      $("starts").replaceChildren(...users.map((user) => option(`User ${user.id}`, told(user), () => takeOver(user.id))));
      return;
    }
    const { items } = await ask("v1/items?limit=6");
    $("starts").replaceChildren(...items.map((item) => option(nameOf(item), labelText(item) || item.id, () => { add(item); $("search").focus(); })));
  } catch (error) {
    started = false;
    tell(error, starts);
  }
}

const told = (user) => (user.source === "events" ? "from the event log" : `${number(user.events)} events of the data set`);

async function takeOver(id) {
  try {
    const found = await ask(`v1/users/${encodeURIComponent(id)}`);
    know(...[...found.items, found.next].filter(Boolean));
    state.history = found.items.map((item) => item.id);
    changed(`The history of user ${id}: ${found.items.length} items`, { user: id, next: found.next && found.next.id });
    $("search").focus({ preventScroll: true });
  } catch (error) {
    tell(error, () => takeOver(id));
  }
}

// -- search --------------------------------------------------------------------------------------

let options = [];
let at = -1;

const search = latest(async (signal) => {
  const words = $("search").value.trim();
  if (!words) return close();
  const q = encodeURIComponent(words.slice(0, 200));
  try {
    const [items, users] = await Promise.all([ask(`v1/items?limit=8&q=${q}`, { signal }), ask(`v1/users?limit=4&q=${q}`, { signal })]);
    offer(words, items, users.users);
  } catch (error) {
    if (error.name === "AbortError") return;
    close();
    tell(error, search);
  }
});
const searchSoon = later(90, search);

/** The text with what was searched for marked. */
function marked(text, words) {
  const parts = words.split(/\s+/).filter(Boolean).map((word) => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
  return text.split(new RegExp(`(${parts.join("|")})`, "i")).map((part, n) => (n % 2 ? make("mark", {}, part) : part));
}

function offer(words, { items, total }, users) {
  const rest = total - items.length;
  const groups = [
    { name: rest > 0 ? `Items: the best ${items.length} of ${number(total)}` : "Items", some: items.map((item) => ({ text: nameOf(item), detail: labels(item, { most: 4 }), take: () => add(item) })) },
    { name: "Users", some: users.map((user) => ({ text: `User ${user.id}`, detail: make("span", { class: "id" }, `${told(user)}; replaces the history`), take: () => takeOver(user.id) })) },
  ];
  if (users.some((user) => user.id === words)) groups.reverse(); // who types an id in full means it
  options = groups.flatMap(({ some }) => some);
  const offered = (option) => {
    const place = options.indexOf(option);
    return make(
      "li",
      { role: "option", id: `option-${place}`, "aria-selected": "false", onpointermove: () => point(place, false), onpointerdown: (event) => { event.preventDefault(); take(place); } },
      make("span", { class: "text" }, ...marked(option.text, words)),
      option.detail,
    );
  };
  const group = (text) => make("li", { class: "group", role: "presentation" }, text);
  const nodes = groups.flatMap(({ name, some }) => (some.length ? [group(name), ...some.map(offered)] : []));
  if (!options.length) nodes.push(group("Nothing has all these words. Try fewer, or their beginnings."));
  $("found").replaceChildren(...nodes);
  $("found").hidden = false;
  $("found").scrollTop = 0;
  $("search").setAttribute("aria-expanded", "true");
  point(options.length ? 0 : -1);
  say(options.length ? `${number(total)} items and ${users.length} users found` : "Nothing found");
}

function point(place, scroll = true) {
  if (at >= 0) $(`option-${at}`)?.setAttribute("aria-selected", "false");
  at = place;
  if (at < 0) return $("search").removeAttribute("aria-activedescendant");
  const node = $(`option-${at}`);
  node.setAttribute("aria-selected", "true");
  $("search").setAttribute("aria-activedescendant", node.id);
  if (scroll) node.scrollIntoView({ block: "nearest" });
}

function close() {
  options = [];
  at = -1;
  $("found").hidden = true;
  $("search").setAttribute("aria-expanded", "false");
  $("search").removeAttribute("aria-activedescendant");
}

function take(place) {
  searchSoon.cancel();
  const option = options[place];
  if (!option) return;
  $("search").value = "";
  close();
  option.take();
}

$("search").addEventListener("input", searchSoon);
$("search").addEventListener("blur", close);
$("search").addEventListener("keydown", async (event) => {
  const open = options.length > 0;
  if (event.key === "ArrowDown" && open) point((at + 1) % options.length);
  else if (event.key === "ArrowUp" && open) point((at - 1 + options.length) % options.length);
  else if (event.key === "ArrowDown" && !$("search").value) focusRow(0);
  else if (event.key === "Enter") {
    event.preventDefault();
    if (!open) await search(); // faster than the wait for more letters
    if ($("search").value) take(Math.max(at, 0));
    return;
  } else if (event.key === "Escape") {
    if (!$("found").hidden) event.stopPropagation();
    $("search").value = "";
    close();
  } else return;
  event.preventDefault();
});

// -- ranking -------------------------------------------------------------------------------------

const recommend = latest(async (signal) => {
  const usable = state.history.filter((id) => !missing(id));
  const focused = [...$("results").querySelectorAll(".pick")].indexOf(document.activeElement);
  if (!usable.length) {
    state.ranked = [];
    $("results").replaceChildren();
    $("none").hidden = true;
    $("summary").textContent = "";
    busy(false);
    subject(null);
    if (state.history.length) say("None of these items is in this catalog");
    return;
  }
  busy(true);
  if (!state.ranked.length) $("results").replaceChildren(...Array.from({ length: state.k }, () => make("li", { class: "blank", "aria-hidden": "true" })));
  const began = performance.now();
  try {
    const found = await ask("v1/recommend", { body: { history: usable, filters: filtersAsked(), k: state.k }, signal });
    untell();
    const time = performance.now() - began;
    await learn(found.items.map((item) => item.id), signal);
    state.ranked = found.items.map((item) => ({ ...(known(item.id) ?? { ...item, title: item.text, labels: [] }), score: item.score }));
    $("summary").textContent = `${state.ranked.length} of ${live ? number(live.items) : "all"}, in ${time < 10 ? time.toFixed(1) : time.toFixed(0)} ms`;
    drawRanked();
    $("none").hidden = state.ranked.length > 0;
    $("none").textContent = state.filters.length ? "No item of the catalog passes these filters and is not in the history." : "Every item of the catalog is in the history.";
    drawNext();
    busy(false);
    const first = state.ranked[0] ? `First: ${short(nameOf(state.ranked[0]))}` : "Nothing is left to recommend.";
    say(`${state.ranked.length} recommendations for a history of ${usable.length}. ${first}`);
    if (state.by && state.by !== found.version) about();
    state.by = found.version;
    if (focused >= 0) focusRow(Math.min(focused, state.ranked.length - 1));
    const wanted = state.ranked.some((item) => item.id === state.chosen) ? state.chosen : state.ranked[Math.max(focused, 0)]?.id || state.ranked[0]?.id;
    if (wanted && (!narrow.matches || opened())) choose(wanted, { tab: "why" });
    else if (!wanted) subject(null);
  } catch (error) {
    if (error.name === "AbortError") return;
    busy(false);
    state.ranked = [];
    $("results").replaceChildren();
    $("summary").textContent = "";
    subject(null);
    tell(error, refresh);
  }
});

function busy(is) {
  $("answer").setAttribute("aria-busy", String(is));
}

function drawRanked() {
  const share = scale(state.ranked.map((item) => item.score));
  $("results").replaceChildren(
    ...state.ranked.map((item, place) =>
      make(
        "li",
        { class: "row" },
        make(
          "button",
          {
            type: "button", class: "pick", "data-id": item.id, tabindex: place ? -1 : 0,
            "aria-label": `${place + 1}. ${nameOf(item)}, score ${decimals(item.score)}${item.id === state.next ? ", taken next by this user" : ""}`,
            onclick: () => choose(item.id, { open: true, focus: narrow.matches }),
            onkeydown: (event) => rowKeys(event, place, item),
            onfocus: () => { if (!narrow.matches) chooseSoon(item.id); },
          },
          make("span", { class: "rank" }, String(place + 1)),
          make(
            "span",
            { class: "what" },
            picture(item),
            make("span", { class: "text" }, nameOf(item)),
            labels(item, { most: 5 }),
            item.id === state.next ? make("span", { class: "tag" }, "taken next") : null,
          ),
          make("span", { class: "score" }, decimals(item.score), measure(make("span", { class: "bar" }, make("i")), { share: share(item.score) })),
        ),
        plus(item),
      ),
    ),
  );
}

/** Whether there is a row to have the focus. */
export function focusRow(place) {
  const rows = $("results").querySelectorAll(".pick");
  for (const [n, row] of rows.entries()) row.tabIndex = n === place ? 0 : -1;
  rows[place]?.focus();
  return place in rows;
}

function rowKeys(event, place, item) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "ArrowDown") focusRow(Math.min(place + 1, state.ranked.length - 1));
  else if (event.key === "ArrowUp") place ? focusRow(place - 1) : $("search").focus();
  else if (event.key === "Home") focusRow(0);
  else if (event.key === "End") focusRow(state.ranked.length - 1);
  else if (event.key === "a") add(item);
  else if (event.key === "n") choose(item.id, { tab: "near", open: true, focus: true });
  else return;
  event.preventDefault();
}

onFilters((line) => {
  remember(true);
  drawFilters();
  say(line);
  recommend();
});
$("k").addEventListener("change", () => {
  state.k = Number($("k").value);
  remember(true);
  recommend();
});
$("clear").addEventListener("click", () => {
  state.history = [];
  changed("The history is empty");
  $("search").focus();
});
$("copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText(location.href);
    $("copy").textContent = "Copied";
  } catch {
    $("copy").textContent = "Copy it from the address bar";
  }
  setTimeout(() => { $("copy").textContent = "Copy link"; }, 2000);
});
