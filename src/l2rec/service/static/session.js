// What the recommender is asked: history, filters and k. It is behind the # of the address, so that
// a view can be shared.

export const MOST = 100; // items of a history

export const state = { history: [], k: 10, user: null, next: null, chosen: null, filters: [], ranked: [], by: null };
// filters: [attribute, value]; ranked: items, best first; by: the version that ranked them

export function address() {
  const parts = new URLSearchParams();
  for (const id of state.history) parts.append("h", id);
  if (state.k !== 10) parts.set("k", state.k);
  for (const [name, value] of state.filters) parts.append("f", `${encodeURIComponent(name)}=${value}`);
  if (state.user) parts.set("user", state.user);
  if (state.next) parts.set("next", state.next);
  if (state.chosen && state.history.length) parts.set("item", state.chosen);
  return parts.size ? `#${parts}` : "";
}

/** Writes the address; `push`: so that going back takes back what was done. */
export function remember(push = false) {
  const wanted = address();
  if (wanted === location.hash) return;
  history[push ? "pushState" : "replaceState"](null, "", wanted || location.pathname + location.search);
}

export function read(parts) {
  const k = Math.round(Number(parts.get("k")));
  state.history = parts.getAll("h").slice(-MOST);
  state.k = k >= 1 && k <= 500 ? k : 10;
  state.user = parts.get("user");
  state.next = parts.get("next");
  state.chosen = parts.get("item");
  state.filters = parts.getAll("f").map(filterOf).filter(Boolean);
}

function filterOf(text) {
  const at = text.indexOf("=");
  try {
    return at > 0 ? [decodeURIComponent(text.slice(0, at)), text.slice(at + 1)] : null;
  } catch {
    return null; // no such name can be written
  }
}

/** The filters as /v1/recommend takes them: attribute -> values. */
export function filtersAsked() {
  const filters = {};
  for (const [name, value] of state.filters) (filters[name] ??= []).push(value);
  return filters;
}
