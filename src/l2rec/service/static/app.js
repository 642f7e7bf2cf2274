// The page: a history is put together, /v1/recommend ranks, /v1/explain says why. State is in the
// address behind the #, so that what is seen can be shared.

const $ = (id) => document.getElementById(id);
const state = { history: [], texts: new Map(), k: 10, seen: false, chosen: null, run: 0 };

const make = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
};

// -- the server ----------------------------------------------------------------------------------

async function ask(path, body) {
  const headers = {};
  const key = sessionStorage.getItem("l2rec-key");
  if (key) headers.authorization = `Bearer ${key}`;
  if (body) headers["content-type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body) });
  } catch {
    throw new Error("The server cannot be reached.");
  }
  if (answer.status === 401) {
    $("key").hidden = false;
    $("key-field").focus();
  }
  const found = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(found.error || `The server answered ${answer.status}.`);
  return found;
}

function tell(error) {
  $("problem").textContent = error ? error.message : "";
  $("problem").hidden = !error;
}

// -- the address ---------------------------------------------------------------------------------

function remember() {
  const parts = new URLSearchParams();
  for (const id of state.history) parts.append("h", id);
  if (state.k !== 10) parts.set("k", state.k);
  if (state.seen) parts.set("seen", 1);
  history.replaceState(null, "", parts.size ? `#${parts}` : location.pathname);
}

async function restore() {
  const parts = new URLSearchParams(location.hash.slice(1));
  state.history = parts.getAll("h").slice(0, 500);
  state.k = Number(parts.get("k")) || 10;
  state.seen = parts.has("seen");
  $("k").value = state.k;
  $("seen").checked = state.seen;
  await Promise.all(
    state.history.filter((id) => !state.texts.has(id)).map(async (id) => {
      try {
        state.texts.set(id, (await ask(`/v1/items/${encodeURIComponent(id)}`)).text);
      } catch {
        state.texts.set(id, "");
      }
    }),
  );
  changed();
}

// -- the history ---------------------------------------------------------------------------------

function add(id, text) {
  state.texts.set(id, text);
  state.history.push(id);
  changed();
}

function remove(place) {
  state.history.splice(place, 1);
  changed();
  const chips = $("history").children;
  (chips[Math.min(place, chips.length - 1)] || $("search")).focus();
}

function move(place, by) {
  const to = place + by;
  if (to < 0 || to >= state.history.length) return;
  state.history.splice(to, 0, ...state.history.splice(place, 1));
  changed();
  $("history").children[to].focus();
}

function drawHistory() {
  $("history").replaceChildren(
    ...state.history.map((id, place) => {
      const text = state.texts.get(id) || id;
      return make(
        "li",
        {
          tabindex: 0,
          "aria-label": `${place + 1}: ${text}. Delete removes it, Alt with an arrow moves it.`,
          onkeydown: (event) => {
            if (event.target !== event.currentTarget) return;
            if (event.key === "Delete" || event.key === "Backspace") remove(place);
            else if (event.altKey && event.key === "ArrowUp") move(place, -1);
            else if (event.altKey && event.key === "ArrowDown") move(place, 1);
            else return;
            event.preventDefault();
          },
        },
        make("span", {}, make("span", { class: "text", title: text }, text), make("span", { class: "id" }, id)),
        make("button", { type: "button", "aria-label": `Remove ${text}`, onclick: () => remove(place) }, "×"),
      );
    }),
  );
  $("empty").hidden = state.history.length > 0;
  $("clear").hidden = !state.history.length;
}

function changed() {
  remember();
  drawHistory();
  recommend();
}

// -- searching -----------------------------------------------------------------------------------

let options = [];
let at = -1;
let searching = 0;
let timer;

async function search() {
  const words = $("search").value.trim();
  const mine = ++searching;
  if (!words) return close();
  try {
    const [items, users] = await Promise.all([
      ask(`/v1/items?limit=8&q=${encodeURIComponent(words)}`),
      ask(`/v1/users?limit=3&q=${encodeURIComponent(words)}`).catch(() => ({ users: [] })),
    ]);
    if (mine !== searching) return;
    tell();
    options = [
      ...users.users.map((user) => ({ user })),
      ...items.items.map((item) => ({ item })),
    ];
    const rest = items.total - items.items.length;
    $("found").replaceChildren(
      ...options.map((option, place) =>
        make(
          "li",
          { role: "option", id: `option-${place}`, "aria-selected": "false", onmousedown: (e) => { e.preventDefault(); choose(place); } },
          make("span", { class: "text" }, option.user ? `User ${option.user}` : option.item.text),
          make("span", { class: "id" }, option.user ? "takes over this user's history" : option.item.id),
        ),
      ),
      ...(options.length ? [] : [make("li", { class: "quiet" }, "Nothing has all these words.")]),
      ...(rest > 0 ? [make("li", { class: "quiet" }, `and ${rest.toLocaleString()} more: add a word`)] : []),
    );
    open(options.length ? 0 : -1);
  } catch (error) {
    close();
    tell(error);
  }
}

function open(place) {
  at = place;
  $("found").hidden = false;
  $("search").setAttribute("aria-expanded", "true");
  for (const [n, node] of [...$("found").children].entries()) node.setAttribute("aria-selected", String(n === at));
  if (at >= 0) {
    $("search").setAttribute("aria-activedescendant", `option-${at}`);
    $(`option-${at}`).scrollIntoView({ block: "nearest" });
  } else $("search").removeAttribute("aria-activedescendant");
}

function close() {
  options = [];
  at = -1;
  $("found").hidden = true;
  $("search").setAttribute("aria-expanded", "false");
  $("search").removeAttribute("aria-activedescendant");
}

async function choose(place) {
  const option = options[place];
  if (!option) return;
  $("search").value = "";
  close();
  if (option.item) return add(option.item.id, option.item.text);
  try {
    const { items } = await ask(`/v1/users/${encodeURIComponent(option.user)}`);
    state.history = items.map((item) => item.id);
    for (const item of items) state.texts.set(item.id, item.text);
    changed();
  } catch (error) {
    tell(error);
  }
}

$("search").addEventListener("input", () => {
  clearTimeout(timer);
  timer = setTimeout(search, 120);
});
$("search").addEventListener("keydown", (event) => {
  if (event.key === "ArrowDown" && options.length) open((at + 1) % options.length);
  else if (event.key === "ArrowUp" && options.length) open((at - 1 + options.length) % options.length);
  else if (event.key === "Enter") choose(at);
  else if (event.key === "Escape") close();
  else if (event.key === "Backspace" && !$("search").value && state.history.length) {
    state.history.pop();
    changed();
  } else return;
  if (event.key !== "Backspace") event.preventDefault();
});
$("search").addEventListener("blur", () => close());

// -- ranking -------------------------------------------------------------------------------------

async function recommend() {
  const mine = ++state.run;
  state.chosen = null;
  $("why").hidden = true;
  if (!state.history.length) {
    $("results").replaceChildren();
    $("status").textContent = "";
    return;
  }
  $("status").textContent = "Ranking…";
  try {
    const found = await ask("/v1/recommend", { history: state.history, k: state.k, exclude_seen: !state.seen });
    if (mine !== state.run) return;
    tell();
    const scores = found.items.map((item) => item.score);
    const high = Math.max(...scores);
    const low = Math.min(...scores, high - 1e-9);
    for (const item of found.items) state.texts.set(item.id, item.text);
    $("results").replaceChildren(
      ...found.items.map((item, place) => {
        const fill = make("i");
        fill.style.width = `${15 + (85 * (item.score - low)) / (high - low)}%`;
        return make(
          "li",
          {},
          make(
            "button",
            {
              type: "button", class: "row", "aria-expanded": "false", "data-id": item.id,
              onclick: (event) => why(item, event.currentTarget),
              onkeydown: (event) => keys(event, place, item),
            },
            make("span", { class: "rank" }, String(place + 1)),
            make("span", {}, make("span", { class: "text" }, item.text || item.id), make("span", { class: "id" }, item.id)),
            make("span", { class: "score" }, item.score.toFixed(3), make("span", { class: "bar" }, fill)),
          ),
        );
      }),
    );
    $("status").textContent =
      `${found.items.length} of version ${found.version}` +
      (found.gate === null ? "" : ` · this user is read ${Math.round(100 * found.gate)}% by behaviour, ${Math.round(100 * (1 - found.gate))}% by text`);
  } catch (error) {
    if (mine !== state.run) return;
    $("results").replaceChildren();
    $("status").textContent = "";
    tell(error);
  }
}

function keys(event, place, item) {
  const rows = [...$("results").querySelectorAll(".row")];
  if (event.key === "ArrowDown") (rows[place + 1] || rows[0]).focus();
  else if (event.key === "ArrowUp") (rows[place - 1] || $("search")).focus();
  else if (event.key === "a") {
    add(item.id, item.text);
    $("search").focus();
  } else return;
  event.preventDefault();
}

// -- reasons -------------------------------------------------------------------------------------

async function why(item, row) {
  if (state.chosen === item.id) {
    state.chosen = null;
    row.setAttribute("aria-expanded", "false");
    $("why").hidden = true;
    return;
  }
  state.chosen = item.id;
  for (const other of $("results").querySelectorAll(".row")) other.setAttribute("aria-expanded", String(other === row));
  try {
    const [found, near] = await Promise.all([
      ask("/v1/explain", { history: state.history, item: item.id }),
      ask(`/v1/items/${encodeURIComponent(item.id)}/neighbours?k=6`).catch(() => ({ items: [] })),
    ]);
    if (state.chosen !== item.id) return;
    tell();
    $("why").replaceChildren(
      make("h2", {}, item.text || item.id),
      make("button", { type: "button", onclick: () => add(item.id, item.text) }, "Add to the history"),
      ...gate(found.gate),
      ...effects(found),
      ...heat(found),
      ...neighbours(near.items),
    );
    $("why").hidden = false;
    if (matchMedia("(max-width: 1080px)").matches) $("why").scrollIntoView({ block: "nearest" });
  } catch (error) {
    tell(error);
  }
}

function gate(value) {
  if (value === null) return [];
  const mark = make("span", { class: "mark" });
  mark.style.left = `${100 * value}%`;
  return [
    make("h3", {}, "How this user is read"),
    make(
      "div",
      { class: "gate", role: "img", "aria-label": `Gate ${value.toFixed(2)}: 0 all text, 1 all behaviour` },
      make("span", {}, "texts"),
      make("span", { class: "track" }, mark),
      make("span", {}, `behaviour  δ ${value.toFixed(2)}`),
    ),
  ];
}

function effects(found) {
  const known = found.without.filter((one) => one.score !== null);
  if (!known.length) return [make("h3", {}, "What mattered"), make("p", { class: "quiet" }, "There is but one item in the history.")];
  const changes = known.map((one) => found.score - one.score);
  const widest = Math.max(...changes.map(Math.abs), 1e-9);
  const rows = known.map((one, n) => [n, one]).reverse().flatMap(([n, one]) => {
    const bar = make("i", { class: changes[n] < 0 ? "less" : null });
    const width = (50 * Math.abs(changes[n])) / widest;
    bar.style.width = `${width}%`;
    bar.style.left = `${changes[n] < 0 ? 50 - width : 50}%`;
    return [
      make("span", { class: "text", title: one.text }, one.text || one.id),
      make("span", { class: "side" }, bar),
      make("b", {}, `${changes[n] >= 0 ? "+" : "−"}${Math.abs(changes[n]).toFixed(3)}`),
    ];
  });
  return [
    make("h3", {}, "What each item of the history adds to the score, newest first"),
    make("div", { class: "effects" }, ...rows),
  ];
}

function heat(found) {
  const space = "http://www.w3.org/2000/svg";
  return Object.entries(found.experts).flatMap(([view, loads]) => {
    if (!loads.length) return [];
    const experts = loads[0].length;
    const cell = 12;
    const wide = loads.length * cell;
    const svg = document.createElementNS(space, "svg");
    svg.setAttribute("class", "heat");
    svg.setAttribute("viewBox", `0 0 ${wide + 18} ${experts * cell}`);
    svg.setAttribute("role", "img");
    const most = Math.max(...loads.flat(), 1e-9);
    for (const [x, shares] of loads.entries()) {
      for (const [y, share] of shares.entries()) {
        const box = document.createElementNS(space, "rect");
        for (const [name, value] of Object.entries({ x: 18 + x * cell, y: y * cell, width: cell - 1, height: cell - 1, rx: 2 })) box.setAttribute(name, value);
        box.setAttribute("fill-opacity", (0.06 + (0.94 * share) / most).toFixed(3));
        const title = document.createElementNS(space, "title");
        title.textContent = `${found.matrices[x] || x}, expert ${y + 1}: ${(100 * share).toFixed(0)}% of the tokens`;
        box.append(title);
        svg.append(box);
      }
    }
    for (let y = 0; y < experts; y += 1) {
      const label = document.createElementNS(space, "text");
      label.setAttribute("x", 0);
      label.setAttribute("y", y * cell + 9);
      label.textContent = String(y + 1);
      svg.append(label);
    }
    const busiest = loads.reduce((sum, shares) => sum.map((s, n) => s + shares[n]), Array(experts).fill(0));
    svg.setAttribute("aria-label", `Experts of the ${view} view, first matrix to last; busiest: expert ${busiest.indexOf(Math.max(...busiest)) + 1}`);
    return [make("h3", {}, `Experts of the ${view} view, from the first matrix to the last`), svg];
  });
}

function neighbours(items) {
  if (!items.length) return [];
  return [
    make("h3", {}, "Closest items"),
    make(
      "ul",
      { class: "near" },
      ...items.map((item) =>
        make(
          "li",
          {},
          make(
            "button",
            { type: "button", title: "Add to the history", onclick: () => add(item.id, item.text) },
            make("span", { class: "text" }, item.text || item.id),
            make("span", { class: "score" }, item.score.toFixed(2)),
          ),
        ),
      ),
    ),
  ];
}

// -- around it -----------------------------------------------------------------------------------

async function about() {
  try {
    const live = await ask("/v1/live");
    tell();
    $("live").textContent = [
      `${live.name} · ${live.version}`,
      `${live.items.toLocaleString()} items`,
      live.index && `${live.index} index`,
      live.shadow && `shadow ${live.shadow}`,
      live.refused && `refused ${live.refused.run}`,
    ].filter(Boolean).join(" · ");
    const scores = Object.entries(live.scores).map(([name, value]) => `${name.replace("_", " ")} ${value.toFixed(4)}`);
    const lines = scores.length ? [`${live.method} on ${live.data} (${live.fingerprint}), test: ${scores.join(", ")}`] : [];
    if (live.experiment) lines.push(await experiment(live.experiment));
    $("scores").textContent = lines.join(" · ");
  } catch (error) {
    $("live").textContent = "";
    tell(error);
  }
}

async function experiment(name) {
  try {
    const found = await ask(`/v1/experiments/${encodeURIComponent(name)}`);
    const ctr = found.metrics && found.metrics.ctr;
    if (!ctr || ctr.lift === null) return `experiment ${name}: too few events`;
    return `experiment ${name}: clicks ${ctr.lift >= 0 ? "+" : ""}${(100 * ctr.lift).toFixed(1)}%, p ${ctr.p.toPrecision(2)}`;
  } catch {
    return `experiment ${name}: no events yet`;
  }
}

function theme(next) {
  if (next) localStorage.setItem("l2rec-theme", next);
  const chosen = localStorage.getItem("l2rec-theme");
  if (chosen) document.documentElement.dataset.theme = chosen;
}

$("theme").addEventListener("click", () => {
  const dark = getComputedStyle(document.documentElement).getPropertyValue("--ground").trim() === "#141518";
  theme(dark ? "light" : "dark");
});
$("key").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("l2rec-key", $("key-field").value);
  $("key").hidden = true;
  about();
  restore();
});
$("k").addEventListener("change", () => { state.k = Number($("k").value); changed(); });
$("seen").addEventListener("change", () => { state.seen = $("seen").checked; changed(); });
$("clear").addEventListener("click", () => { state.history = []; changed(); $("search").focus(); });
addEventListener("keydown", (event) => {
  if (event.key === "/" && document.activeElement !== $("search") && !event.ctrlKey && !event.metaKey) {
    event.preventDefault();
    $("search").focus();
  }
});
addEventListener("hashchange", restore);

theme();
about();
restore();
$("search").focus();
