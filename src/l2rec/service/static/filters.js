// Filters of the ranking: attributes of the catalog, and the values that items may have.

import { $, make, number } from "./dom.js";
import { ask, live, tell } from "./server.js";
import { state } from "./session.js";

let attributes = []; // of GET v1/attributes
let loadedFor = null; // version and number of items
let changed = () => {};

/** What to do when a filter was added or taken away. */
export function onFilters(run) {
  changed = run;
}

/** Shows the filters; learns what there is to filter by, once for each state of the catalog. */
export async function drawFilters() {
  drawChosen();
  const now = live && `${live.version} ${live.items} ${live.added}`;
  if (!now || now === loadedFor) return;
  loadedFor = now;
  try {
    attributes = (await ask("v1/attributes?limit=100")).attributes.filter((one) => one.values.length);
  } catch (error) {
    loadedFor = null;
    tell(error, drawFilters);
    return;
  }
  const before = $("filter-name").value;
  $("filter-name").replaceChildren(...attributes.map(({ name }) => make("option", { value: name }, name.replaceAll("_", " "))));
  if (attributes.some(({ name }) => name === before)) $("filter-name").value = before;
  offerValues();
  drawChosen();
}

function drawChosen() {
  $("filter").hidden = !attributes.length && !state.filters.length;
  if (state.filters.length) $("filter").open = true;
  $("filters").replaceChildren(
    ...state.filters.map(([name, value], place) =>
      make(
        "li",
        {},
        make("span", { class: "quiet" }, `${name.replaceAll("_", " ")} `),
        make("b", {}, value),
        make("button", { type: "button", class: "plain", "aria-label": `Remove the filter ${name}: ${value}`, onclick: () => remove(place) }, "×"),
      ),
    ),
  );
}

function offerValues() {
  const one = attributes.find(({ name }) => name === $("filter-name").value);
  $("filter-value").value = "";
  $("filter-value").placeholder = one ? one.values[0].value : "";
  $("filter-values").replaceChildren(...(one?.values ?? []).map(({ value, items }) => make("option", { value }, `${number(items)} items`)));
}

function remove(place) {
  const [[name, value]] = state.filters.splice(place, 1);
  changed(`No longer only items with ${name}: ${value}`);
  $("filter-value").focus();
}

$("filter-name").addEventListener("change", offerValues);
$("filter-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const [name, value] = [$("filter-name").value, $("filter-value").value.trim()];
  if (!name || !value) return;
  $("filter-value").value = "";
  if (state.filters.some(([n, v]) => n === name && v === value)) return;
  state.filters.push([name, value]);
  changed(`Only items with ${name}: ${value}`);
});
