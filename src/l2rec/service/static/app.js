// The page: a history is put together, /v1/recommend ranks, /v1/explain says why.
//
//   server    asking, and saying in plain words what went wrong
//   address   history and k are behind the # of the address, so that a view can be shared
//   history   chips: add, remove, move
//   search    items and users while one types
//   ranking   the list
//   detail    reasons and neighbours of the chosen item
//   around    what is live, scores, experiment, theme, key

const $ = (id) => document.getElementById(id);
const MOST = 100; // items of a history
const BARS = 12; // of the history in the reasons, until all are asked for
const KEY = "l2rec-key";
const THEME = "l2rec-theme";

const state = { history: [], k: 10, next: null, chosen: null };
const texts = new Map(); // id -> text; null for an id that the catalog does not have
let live = null;

/** An element with attributes, listeners (on...) and children; empty attributes are left out. */
function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

/** Custom properties of an element: the style sheet says what they mean. */
function measure(node, values) {
  for (const [name, value] of Object.entries(values)) node.style.setProperty(`--${name}`, value);
  return node;
}

const number = (value) => value.toLocaleString("en");
const signed = (value, digits = 3) => {
  const size = Math.abs(value).toFixed(digits);
  return Number(size) ? `${value < 0 ? "−" : "+"}${size}` : size;
};
const decimals = (value, digits = 3) => value.toFixed(digits).replace("-", "−");
const percent = (value, digits = 0) => `${(100 * value).toFixed(digits)}%`;
const textOf = (id) => texts.get(id) || id;
const short = (text) => (text.length > 80 ? `${text.slice(0, 78)}…` : text);
const say = (line) => { $("status").textContent = line; };
const narrow = matchMedia("(max-width: 1119px)");

// -- server --------------------------------------------------------------------------------------

class Problem extends Error {}

let waiting = 0;
let bar = 0;

/** Shows that something is awaited, once it takes long enough to be noticed. */
function wait(by) {
  waiting += by;
  if (waiting && !bar) bar = setTimeout(() => { $("progress").hidden = !waiting; }, 200);
  if (!waiting) {
    clearTimeout(bar);
    bar = 0;
    $("progress").hidden = true;
  }
}

/** JSON of a route. Throws a Problem with a line to show; an AbortError where nobody waits. */
async function ask(path, { body, signal } = {}) {
  const headers = {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers.authorization = `Bearer ${key}`;
  if (body) headers["content-type"] = "application/json";
  wait(1);
  try {
    let answer;
    try {
      answer = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Problem("The server cannot be reached. It may be restarting.");
    }
    if (answer.ok) {
      return await answer.json().catch((error) => {
        if (error.name === "AbortError") throw error;
        throw new Problem("The server's answer cannot be read.");
      });
    }
    const said = (await answer.json().catch(() => ({}))).detail;
    if (answer.status === 401) {
      if (key === sessionStorage.getItem(KEY)) askForKey(Boolean(key)); // no other was given meanwhile
      throw Object.assign(new Problem(""), { silent: true });
    }
    if (answer.status === 429 || answer.status === 503) {
      const seconds = answer.headers.get("retry-after");
      throw new Problem(`The server is busy${seconds ? `; try again in ${seconds} s` : ""}. It says: ${said || answer.status}`);
    }
    throw Object.assign(new Problem(said ? `The server says: ${said}` : `The server answered ${answer.status}.`), { status: answer.status });
  } finally {
    wait(-1);
  }
}

let again = null;

/** Shows what went wrong, and what to do again. */
function tell(error, retry = null) {
  if (error.name === "AbortError" || error.silent) return;
  if (!(error instanceof Problem)) console.error(error);
  $("problem").textContent = error instanceof Problem ? error.message : "Something in this page failed. Reloading it may help.";
  again = retry;
  $("retry").hidden = !retry;
  $("notice").hidden = false;
}

function untell() {
  $("notice").hidden = true;
}

function askForKey(wrong) {
  $("key").hidden = false;
  $("key").querySelector("label").textContent = wrong ? "The server does not know that key" : "This server asks for a key";
  if (document.activeElement !== $("key-field")) $("key-field").focus();
}

/** A function of which only the newest call counts: the one before is given up. */
function latest(run) {
  let controller = null;
  return async (...args) => {
    controller?.abort();
    const own = (controller = new AbortController());
    try {
      return await run(own.signal, ...args);
    } finally {
      if (controller === own) controller = null;
    }
  };
}

/** A function that runs when it was not called again for a while. */
function later(milliseconds, run) {
  let timer = 0;
  const call = (...args) => {
    clearTimeout(timer);
    timer = setTimeout(run, milliseconds, ...args);
  };
  call.cancel = () => clearTimeout(timer);
  return call;
}

// -- address -------------------------------------------------------------------------------------

function address() {
  const parts = new URLSearchParams();
  for (const id of state.history) parts.append("h", id);
  if (state.k !== 10) parts.set("k", state.k);
  if (state.next) parts.set("next", state.next);
  if (state.chosen && state.history.length) parts.set("item", state.chosen);
  return parts.size ? `#${parts}` : "";
}

/** Writes the address; `push`: so that going back takes back what was done. */
function remember(push = false) {
  const wanted = address();
  if (wanted === location.hash) return;
  history[push ? "pushState" : "replaceState"](null, "", wanted || location.pathname + location.search);
}

async function restore() {
  const parts = new URLSearchParams(location.hash.slice(1));
  const k = Math.round(Number(parts.get("k")));
  state.history = parts.getAll("h").slice(-MOST);
  state.k = k >= 1 && k <= 500 ? k : 10;
  state.next = parts.get("next");
  state.chosen = parts.get("item");
  if (![...$("k").options].some((option) => option.value === String(state.k))) $("k").add(new Option(state.k));
  $("k").value = state.k;
  await refresh();
}

/** Texts of ids that are not known yet; of ids that the catalog lacks, null. */
async function learn(ids) {
  const wanted = [...new Set(ids)].filter((id) => id && !texts.get(id));
  if (!wanted.length) return;
  const query = wanted.map((id) => `id=${encodeURIComponent(id)}`).join("&");
  const { items } = await ask(`v1/items?${query}`);
  for (const id of wanted) texts.set(id, null);
  for (const item of items) texts.set(item.id, item.text);
}

async function refresh() {
  try {
    await learn([...state.history, state.next]);
  } catch (error) {
    tell(error, restore);
    if (!error.silent) draw();
    return;
  }
  draw();
  await recommend();
}

// -- history -------------------------------------------------------------------------------------

/** After the history was changed: drawn, ranked, and kept in the address. */
function changed(line, { next = null } = {}) {
  state.history = state.history.slice(-MOST);
  state.next = next;
  state.chosen = null;
  remember(true);
  draw();
  if (line) say(line);
  recommend();
}

function add(id, text) {
  texts.set(id, text);
  state.history.push(id);
  changed(`Added: ${short(text || id)}`);
}

function remove(place) {
  const [id] = state.history.splice(place, 1);
  changed(`Removed: ${short(textOf(id))}`);
  focusChip(Math.min(place, state.history.length - 1));
}

function move(from, to) {
  if (to < 0 || to >= state.history.length || from === to) return;
  const [id] = state.history.splice(from, 1);
  state.history.splice(to, 0, id);
  changed(`Moved to ${to + 1} of ${state.history.length}: ${short(textOf(id))}`);
  focusChip(to);
}

function focusChip(place) {
  const chips = $("history").querySelectorAll(".open");
  for (const [n, chip] of chips.entries()) chip.tabIndex = n === place ? 0 : -1; // one stop of Tab
  (chips[place] || $("search")).focus();
}

let dragged = null;

function chip(id, place) {
  const text = textOf(id);
  const unknown = texts.get(id) === null;
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
  $("count").textContent = some ? `${some} ${some === 1 ? "item" : "items"}, oldest first` : "";
  $("clear").hidden = $("copy").hidden = !some;
  $("empty").hidden = some > 0;
  if (!some) starts();
  drawNext();
  $("history").scrollTop = grown ? $("history").scrollHeight : top; // the newest is the last
}

/** What a user of the data set took next, and where the ranking has it. */
function drawNext() {
  const text = state.next && texts.get(state.next);
  $("next").hidden = !text;
  if (!text) return;
  const place = ranked.findIndex((item) => item.id === state.next);
  const where = !ranked.length ? "\u00a0" : place < 0 ? `It is not among these ${ranked.length}.` : `It is ranked ${place + 1}.`;
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
    $("starts").replaceChildren(...items.map((item) => option(item.text || item.id, item.id, () => { add(item.id, item.text); $("search").focus(); })));
  } catch (error) {
    started = false;
    tell(error, starts);
  }
}

const told = (user) => (user.source === "events" ? "from the event log" : `${number(user.events)} events of the data set`);

async function takeOver(id) {
  try {
    const found = await ask(`v1/users/${encodeURIComponent(id)}`);
    for (const item of [...found.items, found.next]) if (item) texts.set(item.id, item.text);
    state.history = found.items.map((item) => item.id);
    changed(`The history of user ${id}: ${found.items.length} items`, { next: found.next && found.next.id });
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
  options = [
    ...items.map((item) => ({ text: item.text || item.id, detail: item.id, take: () => add(item.id, item.text) })),
    ...users.map((user) => ({ text: `User ${user.id}`, detail: `${told(user)}; replaces the history`, take: () => takeOver(user.id) })),
  ];
  const nodes = options.map((option, place) =>
    make(
      "li",
      { role: "option", id: `option-${place}`, "aria-selected": "false", onpointermove: () => point(place, false), onpointerdown: (event) => { event.preventDefault(); take(place); } },
      make("span", { class: "text" }, ...marked(option.text, words)),
      make("span", { class: "id" }, option.detail),
    ),
  );
  const group = (text) => make("li", { class: "group", role: "presentation" }, text);
  const rest = total - items.length;
  if (items.length) nodes.splice(0, 0, group(rest > 0 ? `Items: the best ${items.length} of ${number(total)}` : "Items"));
  if (users.length) nodes.splice(nodes.length - users.length, 0, group("Users"));
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

let ranked = [];
let rankedBy = null; // version

const recommend = latest(async (signal) => {
  const known = state.history.filter((id) => texts.get(id) !== null);
  const focused = [...$("results").querySelectorAll(".pick")].indexOf(document.activeElement);
  if (!known.length) {
    ranked = [];
    $("results").replaceChildren();
    $("summary").textContent = "";
    busy(false);
    subject(null);
    if (state.history.length) say("None of these items is in this catalog");
    return;
  }
  busy(true);
  if (!ranked.length) $("results").replaceChildren(...Array.from({ length: state.k }, () => make("li", { class: "blank", "aria-hidden": "true" })));
  const began = performance.now();
  try {
    const found = await ask("v1/recommend", { body: { history: known, k: state.k }, signal });
    untell();
    for (const item of found.items) texts.set(item.id, item.text);
    ranked = found.items;
    const time = performance.now() - began;
    $("summary").textContent = `${ranked.length} of ${live ? number(live.items) : "all"}, in ${time < 10 ? time.toFixed(1) : time.toFixed(0)} ms`;
    drawRanked();
    drawNext();
    busy(false);
    const first = ranked[0] ? `First: ${short(ranked[0].text)}` : "Nothing is left to recommend.";
    say(`${ranked.length} recommendations for a history of ${known.length}. ${first}`);
    if (rankedBy && rankedBy !== found.version) about();
    rankedBy = found.version;
    if (focused >= 0) focusRow(Math.min(focused, ranked.length - 1));
    const wanted = ranked.some((item) => item.id === state.chosen) ? state.chosen : ranked[Math.max(focused, 0)]?.id || ranked[0]?.id;
    if (wanted && (!narrow.matches || opened())) choose(wanted, { tab: "why" });
    else if (!wanted) subject(null);
  } catch (error) {
    if (error.name === "AbortError") return;
    busy(false);
    ranked = [];
    $("results").replaceChildren();
    $("summary").textContent = "";
    subject(null);
    tell(error, refresh);
  }
});

function busy(is) {
  $("answer").setAttribute("aria-busy", String(is));
}

/** Lengths of score bars: from zero, or from the lowest where scores are below it. */
function scale(scores) {
  const low = Math.min(0, ...scores);
  const high = Math.max(...scores, low + 1e-9);
  return (score) => (score - low) / (high - low);
}

function drawRanked() {
  const share = scale(ranked.map((item) => item.score));
  $("results").replaceChildren(
    ...ranked.map((item, place) =>
      make(
        "li",
        { class: "row" },
        make(
          "button",
          {
            type: "button", class: "pick", "data-id": item.id, tabindex: place ? -1 : 0,
            "aria-label": `${place + 1}. ${item.text || item.id}, score ${decimals(item.score)}${item.id === state.next ? ", taken next by this user" : ""}`,
            onclick: () => choose(item.id, { open: true, focus: narrow.matches }),
            onkeydown: (event) => rowKeys(event, place, item),
            onfocus: () => { if (!narrow.matches) chooseSoon(item.id); },
          },
          make("span", { class: "rank" }, String(place + 1)),
          make(
            "span",
            {},
            make("span", { class: "text" }, item.text || item.id),
            make("span", { class: "id" }, item.id),
            item.id === state.next ? make("span", { class: "tag" }, "taken next") : null,
          ),
          make("span", { class: "score" }, decimals(item.score), measure(make("span", { class: "bar" }, make("i")), { share: share(item.score) })),
        ),
        plus(item),
      ),
    ),
  );
}

function plus(item) {
  return make("button", { type: "button", class: "plus", tabindex: -1, title: "Add to the history", "aria-label": `Add to the history: ${short(item.text || item.id)}`, onclick: () => add(item.id, item.text) }, "+");
}

function focusRow(place) {
  const rows = $("results").querySelectorAll(".pick");
  for (const [n, row] of rows.entries()) row.tabIndex = n === place ? 0 : -1;
  rows[place]?.focus();
}

function rowKeys(event, place, item) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "ArrowDown") focusRow(Math.min(place + 1, ranked.length - 1));
  else if (event.key === "ArrowUp") place ? focusRow(place - 1) : $("search").focus();
  else if (event.key === "Home") focusRow(0);
  else if (event.key === "End") focusRow(ranked.length - 1);
  else if (event.key === "a") add(item.id, item.text);
  else if (event.key === "n") choose(item.id, { tab: "near", open: true, focus: true });
  else return;
  event.preventDefault();
}

// -- detail --------------------------------------------------------------------------------------

const panels = { why: { shown: null }, near: { shown: null } };
let tab = "why";
let subjectId = null;
let trail = []; // items whose neighbours were looked at before
let origin = null; // what had the focus when the panel was opened

const opened = () => document.body.classList.contains("opened");
const chooseSoon = later(120, (id) => { if (state.chosen !== id || subjectId !== id) choose(id, { tab: "why" }); });

/** Shows an item in the panel: in the tab that is there, or another. */
function choose(id, { tab: wanted = tab, open = false, focus = false, back = false } = {}) {
  chooseSoon.cancel();
  if (!back) trail = [];
  if (ranked.some((item) => item.id === id)) {
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

function subject(id) {
  subjectId = id;
  $("subject").hidden = !id;
  if (!id) {
    panels.why.shown = panels.near.shown = null;
    const hold = () => make("p", { class: "quiet hold" }, state.history.length ? "Nothing is chosen." : "Reasons and neighbours of an item are shown here.");
    $("why").replaceChildren(hold());
    $("near").replaceChildren(hold());
    return;
  }
  const text = textOf(id);
  $("subject").replaceChildren(
    make("div", {}, make("p", { class: "text", title: text }, text), make("span", { class: "id" }, id)),
    make("button", { type: "button", onclick: () => add(id, texts.get(id)) }, "Add to history"),
  );
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

function closePanel() {
  if (!opened()) return;
  document.body.classList.remove("opened");
  $("detail").removeAttribute("role");
  $("detail").removeAttribute("aria-modal");
  for (const node of document.querySelectorAll("[inert]")) node.inert = false;
  if (origin?.isConnected) origin.focus();
  else focusRow(Math.max(ranked.findIndex((item) => item.id === state.chosen), 0));
}

$("close").addEventListener("click", closePanel);
narrow.addEventListener("change", () => {
  closePanel();
  if (!narrow.matches && !subjectId && ranked.length) choose(ranked[0].id, { tab: "why" });
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
    $(name).replaceChildren(make("p", { class: "quiet hold" }, error.message || "A key is needed."));
  } finally {
    $(name).setAttribute("aria-busy", "false");
  }
}

const explain = latest((signal, id) => {
  const known = state.history.filter((other) => texts.get(other) !== null);
  if (!known.length) {
    panels.why.shown = null;
    $("why").replaceChildren(make("p", { class: "quiet hold" }, "Reasons need a history."));
    return undefined;
  }
  return fill("why", JSON.stringify([id, known, rankedBy]), () => ask("v1/explain", { body: { history: known, item: id }, signal }), reasons);
});

function block(title, note, ...children) {
  return make("section", { class: "block" }, make("h3", {}, title), note ? make("p", { class: "quiet" }, note) : null, ...children);
}

function reasons(found) {
  return [scored(found), gate(found.gate), effects(found), heat(found.experts)].filter(Boolean);
}

function scored(found) {
  const parts = found.added === null ? null : `${decimals(found.score - found.added)} by its vector, ${signed(found.added)} by co-occurrence with the history`;
  return block(`Score ${decimals(found.score)}`, parts);
}

function gate(value) {
  if (value === null) return null;
  return block(
    "How this user is read",
    `The vector is ${percent(1 - value)} the semantic view (what the texts say), ${percent(value)} the behavioural (what is taken after what).`,
    make(
      "div",
      { class: "gate", role: "img", "aria-label": `Gate δ = ${value.toFixed(2)}, between 0, all semantic, and 1, all behavioural` },
      make("div", { class: "track" }, measure(make("i"), { at: value })),
      make("div", { class: "ends" }, make("span", {}, "Semantic"), make("span", {}, `δ = ${value.toFixed(2)}`), make("span", {}, "Behavioural")),
    ),
  );
}

function effects(found) {
  const title = "What each item of the history does";
  const known = found.history.map((one, n) => ({ ...one, n, effect: one.score === null ? null : found.score - one.score })).reverse();
  const some = known.filter((one) => one.effect !== null);
  if (!some.length) return block(title, "There is only one: without it there would be no history.");
  const low = Math.min(0, ...some.map((one) => one.effect));
  const high = Math.max(0, ...some.map((one) => one.effect));
  const span = high - low || 1;
  const row = (one) => {
    const side = measure(make("span", { class: "side", "aria-hidden": "true" }, measure(make("i", { class: one.effect < 0 ? "less" : null }), { from: (Math.min(one.effect, 0) - low) / span, share: Math.abs(one.effect) / span })), { zero: percent(-low / span, 2) });
    return make("li", {}, make("span", { class: "text one", title: one.text }, `${one.n + 1}. ${one.text || one.id}`), side, make("span", { class: "value" }, signed(one.effect)));
  };
  const list = make("ol", { class: "effects", "aria-label": "Change of the score by each item, newest first" }, ...some.slice(0, BARS).map(row));
  const rest = some.length - BARS;
  const more = rest > 0 ? make("button", { type: "button", class: "plain", onclick: (event) => { list.append(...some.slice(BARS).map(row)); event.currentTarget.remove(); } }, `Show ${rest} older`) : null;
  const older = known.length - some.length;
  return block(title, `The score, less the score if that item had never been; newest first${older ? `, the newest ${some.length}` : ""}.`, list, more);
}

function heat(experts) {
  if (!experts) return null;
  const shares = Object.values(experts.shares).flat(2);
  const top = Math.max(...shares, 1e-9);
  const even = 1 / Object.values(experts.shares)[0][0].length;
  const names = { semantic: "Semantic view", behavioral: "Behavioural view" };
  const map = ([view, rows]) => {
    const best = rows.flatMap((row, j) => row.map((share, e) => ({ share, j, e }))).reduce((a, b) => (b.share > a.share ? b : a));
    return make(
      "table",
      {},
      make("caption", {}, names[view] || view, make("span", { class: "hidden" }, `: most in expert ${best.e + 1} of ${experts.labels[best.j]}, ${percent(best.share)}`)),
      make("thead", {}, make("tr", {}, make("td"), ...rows[0].map((_, e) => make("th", { scope: "col" }, make("span", { class: "hidden" }, "expert "), String(e + 1))))),
      make(
        "tbody",
        {},
        ...rows.map((row, j) =>
          make(
            "tr",
            {},
            make("th", { scope: "row", title: experts.matrices[j] }, experts.labels[j]),
            ...row.map((share, e) => measure(make("td", { title: `${experts.labels[j]}, expert ${e + 1}: ${percent(share, 1)}` }, make("span", { class: "hidden" }, percent(share))), { share: share / top })),
          ),
        ),
      ),
    );
  };
  const [first] = experts.labels;
  return block(
    "Which experts were active",
    `Of what the history's tokens chose among experts 1 to ${Math.round(1 / even)}, by layer and matrix${first.includes(" ") ? ` (${first}: matrix ${first.split(" ")[1]} of layer ${first.split(" ")[0]})` : ""}.`,
    make("div", { class: "maps" }, ...Object.entries(experts.shares).map(map)),
    make("p", { class: "legend" }, "0%", make("i"), `${percent(top)}; even would be ${percent(even, 1)}`),
  );
}

const neighbours = latest((signal, id) => {
  if (live && !live.can.neighbours) {
    panels.near.shown = null;
    $("near").replaceChildren(make("p", { class: "quiet hold" }, "This method only ranks: its items have no vectors, and so no neighbours."));
    return undefined;
  }
  return fill("near", JSON.stringify([id, rankedBy]), () => ask(`v1/items/${encodeURIComponent(id)}/neighbours?k=12`, { signal }), (found) => nearby(id, found.items));
});

function nearby(id, items) {
  const share = scale(items.map((item) => item.score));
  const visit = (other) => { trail.push(id); choose(other.id, { tab: "near", back: true, focus: true }); };
  for (const item of items) texts.set(item.id, item.text);
  const keys = (event, item) => {
    const rows = [...$("near").querySelectorAll(".pick")];
    const place = rows.indexOf(event.currentTarget);
    if (event.key === "ArrowDown") rows[place + 1]?.focus();
    else if (event.key === "ArrowUp") (rows[place - 1] || $("tab-near")).focus();
    else if (event.key === "a") add(item.id, item.text);
    else return;
    event.preventDefault();
  };
  const before = trail.at(-1);
  return [
    before ? make("button", { type: "button", id: "back", class: "plain", onclick: () => { trail.pop(); choose(before, { tab: "near", back: true, focus: true }); } }, `← ${short(textOf(before)).slice(0, 40)}`) : null,
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
              { type: "button", class: "pick", "data-id": item.id, "aria-label": `${item.text || item.id}, cosine ${decimals(item.score, 2)}`, onclick: () => visit(item), onkeydown: (event) => keys(event, item) },
              make("span", {}, make("span", { class: "text" }, item.text || item.id)),
              make("span", { class: "score" }, decimals(item.score, 2), measure(make("span", { class: "bar" }, make("i")), { share: share(item.score) })),
            ),
            plus(item),
          ),
        ),
      ),
    ),
  ].filter(Boolean);
}

// -- around --------------------------------------------------------------------------------------

const METRICS = ["recall@10", "ndcg@10", "mrr"];

async function about() {
  try {
    live = await ask("v1/live");
  } catch (error) {
    tell(error, start);
    return;
  }
  $("live").replaceChildren(make("b", { title: `Live version ${live.name}` }, live.name), make("code", {}, live.version.slice(0, 8)));
  const own = live.scores[live.method] || {};
  $("headline").replaceChildren(...METRICS.filter((name) => name in own).map((name) => make("span", {}, `${name} `, make("b", {}, own[name].toFixed(4)))));
  facts();
  scores();
  experiment();
}

function facts() {
  const rows = [
    ["Run", live.name],
    ["Version", make("code", {}, live.version)],
    ["Method", live.recipe ? `${live.method}, ${live.recipe}` : live.method],
    ["Loaded", new Date(1000 * live.loaded_at).toLocaleString()],
    ["Items", `${number(live.items)}${live.added ? `, ${number(live.added)} of them rows that came since` : ""}`],
    ["Index", live.index || "none: the method only ranks"],
    ["Data", live.data && `${live.data.name}: ${number(live.data.users)} users, ${number(live.data.items)} items, ${number(live.data.events)} events`],
    ["Fingerprint", live.data && make("code", {}, live.data.fingerprint)],
    ["Control", live.control && live.control.name],
    ["Shadow", live.shadow && `${live.shadow.name}, compared on live requests`],
    ["Refused", live.refused && `${live.refused.run}: ${live.refused.reason}`],
  ];
  $("facts").replaceChildren(...rows.filter(([, value]) => value).flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
}

function scores() {
  const all = Object.entries(live.scores);
  if (!all.length) {
    $("scores").replaceChildren(make("p", { class: "quiet" }, "This run has no report."));
    return;
  }
  const names = METRICS.filter((name) => all.some(([, values]) => name in values));
  $("scores").replaceChildren(
    make(
      "table",
      { class: "table" },
      make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "on the test split"), ...names.map((name) => make("th", { scope: "col" }, name)))),
      make("tbody", {}, ...all.map(([method, values]) => make("tr", { class: method === live.method ? "own" : null }, make("th", { scope: "row" }, method), ...names.map((name) => make("td", {}, name in values ? values[name].toFixed(4) : ""))))),
    ),
  );
}

async function experiment() {
  const box = $("experiment");
  $("f-experiment").parentElement.classList.toggle("wide", Boolean(live.experiment));
  if (!live.experiment) {
    box.replaceChildren(make("p", { class: "quiet" }, "None runs. Every request is answered by the live version."));
    return;
  }
  const { name, treatment } = live.experiment;
  const lines = [make("p", {}, make("b", {}, name), `: ${percent(treatment)} of the users are served ${live.name}, the others ${live.control ? live.control.name : "the same, to test the test"}.`)];
  try {
    const found = await ask(`v1/experiments/${encodeURIComponent(name)}`);
    lines.push(...mixed(found.served));
    if (!found.result) lines.push(make("p", { class: "quiet" }, `No result yet: ${found.reason}`));
    else lines.push(...outcome(found.result));
  } catch (error) {
    if (error.name !== "AbortError") lines.push(make("p", { class: "quiet" }, error.message));
  }
  box.replaceChildren(...lines);
}

const alarm = (text) => make("p", { class: "alarm" }, text);

/** Alarms of arms that more than one version has served. */
function mixed(served) {
  return ["treatment", "control"].flatMap((arm) => {
    const runs = served.filter((one) => one.arm === arm).map((one) => one.run);
    return runs.length < 2 ? [] : [alarm(`The ${arm} arm was served by ${runs.length} versions, one after the other (${runs.join(", ")}). What is measured is a mixture of them: start another experiment.`)];
  });
}

/** Whether the arms have the sizes that were planned. */
function sizes({ arms, sample_ratio: ratio }) {
  const users = arms.treatment.users + arms.control.users;
  const share = `${percent(ratio.observed, 2)} of ${number(users)} users are in the treatment`;
  if (ratio.mismatch === null) return make("p", { class: "quiet" }, `${share}. Not checked: the log does not know what was planned.`);
  const planned = `${percent(ratio.planned, 2)} planned, p ${chance(ratio.p)}`;
  if (ratio.mismatch) return alarm(`The arms are not as planned: ${share}, ${planned}. Something loses users of one arm; find it before you read on.`);
  return make("p", { class: "quiet" }, `The arms are as planned: ${share}, ${planned}.`);
}

const chance = (p) => (typeof p === "number" ? (p < 1e-3 ? p.toExponential(0).replace("-", "−") : p.toPrecision(2)) : "–");
const change = (lift) => (typeof lift === "number" ? `${signed(100 * lift, 1)}%` : "–");
const between = (one) => (one && typeof one.lift_low === "number" ? `${change(one.lift_low)} to ${change(one.lift_high)}` : "–");
const COUNTED = { ctr: "clicks", reply_rate: "replies" };

function outcome(result) {
  const level = percent(1 - result.alpha);
  const heads = ["control", "treatment", "lift", `${level} interval`, "p", `${level} at any time`, "p at any time"];
  const rows = Object.entries(result.metrics).map(([name, one]) => [
    COUNTED[name] || name,
    ...["control", "treatment"].map((side) => percent(one[side], 2)),
    change(one.lift), between(one), chance(one.p), between(one.any_time), chance(one.any_time?.p),
  ]);
  const table = make(
    "table",
    { class: "table stacked" },
    make("thead", {}, make("tr", {}, ...["rate of", ...heads].map((text) => make("th", { scope: "col" }, text)))),
    make("tbody", {}, ...rows.map(([name, ...cells]) => make("tr", {}, make("th", { scope: "row" }, name), ...cells.map((text, n) => make("td", { "data-head": heads[n] }, text))))),
  );
  const note = "Interval and p are for one look, on a day set beforehand. Those at any time hold however often you look, and need more users.";
  return [sizes(result), table, make("p", { class: "quiet" }, note), ...overTime(result)];
}

// -- experiment over time ------------------------------------------------------------------------

function overTime({ over_time: { seconds, periods }, alpha }) {
  if (periods.length < 2) return [];
  const day = seconds % 86400 === 0;
  const when = new Intl.DateTimeFormat("en", { timeZone: "UTC", month: "short", day: "numeric", ...(day ? {} : { hour: "2-digit", minute: "2-digit", hour12: false }) });
  const dates = periods.map((period) => when.format(1000 * period.from));
  const [many, unit] = day ? [seconds / 86400, "day"] : [seconds / 3600, "hour"];
  const length = many === 1 ? unit : `${many} ${unit}s`;
  const rate = (arm) => periods.map((period) => period[arm].ctr);
  const so = (key) => periods.map((period) => period.so_far.ctr?.[key] ?? null);
  const last = (values) => values.findLast((value) => value !== null) ?? null;
  const clicks = plot({
    dates, format: (value) => percent(value, 1), from: 0,
    lines: [{ name: "control", values: rate("control") }, { name: "treatment", values: rate("treatment") }],
    label: `Clicks by exposures, ${dates[0]} to ${dates.at(-1)} UTC: at the end ${percent(last(rate("control")) ?? 0, 2)} in the control, ${percent(last(rate("treatment")) ?? 0, 2)} in the treatment`,
  });
  const plots = [figure("Clicks by exposures", `In each ${length}, UTC.`, clicks, ["control", "treatment"])];
  if (last(so("lift")) !== null) {
    const lift = plot({
      dates, format: (value) => `${signed(100 * value, 0)}%`, zero: true,
      band: { low: so("lift_low"), high: so("lift_high") },
      lines: [{ name: "treatment", values: so("lift") }],
      label: `Lift of clicks so far, at the end ${change(last(so("lift")))}, ${percent(1 - alpha)} interval ${between({ lift_low: last(so("lift_low")), lift_high: last(so("lift_high")) })}`,
    });
    plots.push(figure("Lift of clicks so far", `With the ${percent(1 - alpha)} interval that holds at any time.`, lift, []));
  }
  return [make("div", { class: "plots" }, ...plots)];
}

function figure(title, line, drawn, names) {
  return make(
    "figure",
    {},
    make("figcaption", {}, make("b", {}, title), ` ${line}`, make("span", { class: "names" }, ...names.map((name) => make("span", { class: `name ${name}` }, name)))),
    drawn,
  );
}

/** An SVG element; no styles, which the policy of the page would refuse. */
function shape(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/** Round values that divide a range into four parts or fewer. */
function ticks(low, high) {
  const rough = (high - low) / 4 || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
  const first = Math.ceil(low / step - 1e-9);
  return Array.from({ length: Math.floor(high / step + 1e-9) - first + 1 }, (_, n) => (first + n) * step);
}

/** Lines over time, drawn again at each width of the place they are in. */
function plot({ dates, lines, band = null, format, from = null, zero = false, label }) {
  const known = [...lines.flatMap((line) => line.values), ...(band ? [...band.low, ...band.high] : [])].filter((value) => value !== null);
  if (band) {
    // The first intervals are so wide that nothing else could be seen beside them.
    const late = [...band.low.slice(band.low.length >> 2), ...band.high.slice(band.high.length >> 2), ...lines[0].values].filter((value) => value !== null);
    known.splice(0, known.length, ...late);
  }
  let low = Math.min(...known, from ?? (zero ? 0 : Infinity));
  let high = Math.max(...known, zero ? 0 : -Infinity);
  if (low === high) high = low + (Math.abs(low) || 1) / 10;
  const height = 168, left = 48, right = 8, top = 8, bottom = 24;
  const y = (value) => top + (height - top - bottom) * (1 - (Math.min(Math.max(value, low), high) - low) / (high - low));
  const box = make("div", { class: "plot" });

  const at = (width) => (n) => left + (n * (width - left - right)) / (dates.length - 1);
  const path = (x, values) => values.map((value, n) => (value === null ? "" : `${n && values[n - 1] !== null ? "L" : "M"}${x(n).toFixed(1)} ${y(value).toFixed(1)}`)).join("");
  const area = (x) => {
    const some = dates.map((_, n) => n).filter((n) => band.low[n] !== null);
    const edge = (values, places) => places.map((n) => `${x(n).toFixed(1)} ${y(values[n]).toFixed(1)}`).join("L");
    return some.length ? `M${edge(band.high, some)}L${edge(band.low, [...some].reverse())}Z` : "";
  };
  const redraw = (width) => {
    const x = at(width);
    const nodes = [shape("title", {}, label)];
    for (const value of ticks(low, high)) {
      const name = shape("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, format(value));
      nodes.push(shape("line", { class: zero && Math.abs(value) < 1e-12 ? "zero" : "grid", x1: left, x2: width - right, y1: y(value), y2: y(value) }), name);
    }
    const every = Math.ceil((dates.length - 1) / Math.max(1, Math.floor((width - left - right) / (8 * dates[0].length + 24))));
    for (let n = 0; n < dates.length; n += every) {
      const anchor = x(n) > width - 48 ? "end" : n ? "middle" : "start";
      nodes.push(shape("text", { x: x(n), y: height - 6, "text-anchor": anchor }, dates[n]));
    }
    if (band) nodes.push(shape("path", { class: "band", d: area(x) }));
    for (const line of lines) {
      nodes.push(shape("path", { class: `line ${line.name}`, d: path(x, line.values) }));
      for (const [n, value] of line.values.entries()) {
        if (value === null) continue;
        const alone = (line.values[n - 1] ?? null) === null && (line.values[n + 1] ?? null) === null;
        const point = shape("circle", { class: `point ${line.name}${alone ? " alone" : ""}`, cx: x(n), cy: y(value), r: 6 });
        point.append(shape("title", {}, `${dates[n]}, ${line.name}: ${format(value)}`));
        nodes.push(point);
      }
    }
    box.replaceChildren(shape("svg", { role: "img", "aria-label": label, width, height, viewBox: `0 0 ${width} ${height}` }, ...nodes));
  };
  new ResizeObserver(([entry]) => { if (entry.contentRect.width > left + right) redraw(Math.floor(entry.contentRect.width)); }).observe(box);
  return box;
}

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

$("key").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("key-field").value.trim());
  $("key-field").value = "";
  $("key").hidden = true;
  started = false;
  start();
  $("search").focus();
});

$("retry").addEventListener("click", () => {
  untell();
  again?.();
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

addEventListener("keydown", (event) => {
  const typing = event.target.closest?.("input, select, textarea");
  if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) {
    event.preventDefault();
    closePanel();
    $("search").focus();
    $("search").select();
  } else if (event.key === "Escape") closePanel();
});
addEventListener("popstate", restore);
document.addEventListener("visibilitychange", () => { if (!document.hidden && live) about(); });
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // the part behind the # is the history
  ranked.length ? focusRow(0) : $("results").focus();
});

async function start() {
  await Promise.all([about(), restore()]);
}

theme(storedTheme());
subject(null);
start();
if (!narrow.matches) $("search").focus();
