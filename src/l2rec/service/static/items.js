// The catalog: find items, add, change and delete them, with a write key where there are keys.

import { forget, know, labels, link, nameOf, picture } from "./catalog.js";
import { $, confirmed, latest, later, make, number, say, short } from "./dom.js";
import { about, ask, lineOf, tell, writeKeyForm } from "./server.js";

const PAGE = 25;
const MEANS = {
  kept: "was kept: its text is the same, so the model's row and counts of it stay, whatever its attributes do.",
  updated: "was updated: it has another text, and is read by that alone until the next training.",
  new: "is new: it is read by its text until the next training.",
};

let listed = [];
let edited = null; // the item in the editor, with its attributes; null for a new one
let names = []; // of attributes

export async function showItems(parts) {
  const id = parts.get("item");
  await Promise.all([list(), id && id !== edited?.id ? open(id) : edited || draw(null)]);
}

// -- list ----------------------------------------------------------------------------------------

const list = latest(async (signal, more = false) => {
  const query = new URLSearchParams({ limit: PAGE, offset: more ? listed.length : 0, q: $("catalog-search").value.trim().slice(0, 200) });
  try {
    const found = await ask(`v1/items?${query}`, { signal });
    know(...found.items);
    listed = more ? [...listed, ...found.items] : found.items;
    $("catalog-count").textContent = `${number(found.total)}${query.get("q") ? " found" : ""}`;
    $("catalog-more").hidden = listed.length >= found.total;
    $("catalog-list").replaceChildren(...listed.map(entry));
    mark();
  } catch (error) {
    tell(error, list);
  }
});

function entry(item) {
  return make(
    "li",
    {},
    make("button", { type: "button", class: "what", "data-id": item.id, onclick: () => open(item.id, { focus: true }) }, picture(item), make("span", { class: "text" }, nameOf(item)), labels(item)),
  );
}

function mark() {
  for (const node of $("catalog-list").querySelectorAll("button")) {
    if (node.dataset.id === edited?.id) node.setAttribute("aria-current", "true");
    else node.removeAttribute("aria-current");
  }
}

$("catalog-search").addEventListener("input", later(120, () => list()));
$("catalog-more").addEventListener("click", () => list(true));
$("catalog-new").addEventListener("click", () => {
  $("items").classList.add("editing");
  draw(null);
  $("item-id").focus();
});

// -- editor --------------------------------------------------------------------------------------

function remember() {
  if ($("items").hidden) return; // another part is shown meanwhile
  const parts = new URLSearchParams({ view: "items", ...(edited && { item: edited.id }) });
  history.replaceState(null, "", `#${parts}`);
}

/** Opens an item in the editor. */
async function open(id, { focus = false, line = null } = {}) {
  $("items").classList.add("editing"); // a phone shows the list or the editor
  try {
    draw(await ask(`v1/items/${encodeURIComponent(id)}`), line);
    if (focus) $("editor-title").focus();
  } catch (error) {
    draw(null, lineOf(error), true);
  }
}

function close() {
  $("items").classList.remove("editing");
  ($("catalog-list").querySelector("[aria-current]") || $("catalog-search")).focus();
}

/** The editor of an item, or of a new one; and a line on what became of the one before. */
async function draw(item, line = null, wrong = false) {
  edited = item;
  remember();
  mark();
  const box = $("editor");
  const title = make("h2", { id: "editor-title", tabindex: -1 }, item ? short(nameOf(item)) : "New item");
  const outcome = make("p", { id: "outcome", class: wrong ? "wrong" : "done", role: wrong ? "alert" : "status", hidden: !line }, line || "");
  const unlock = writeKeyForm(() => draw(edited, "The key is taken."));
  const form = make(
    "form",
    { id: "item-form" },
    make("label", {}, make("span", {}, "Id"), make("input", { id: "item-id", value: item?.id, required: true, readonly: Boolean(item), maxlength: 256, autocomplete: "off", spellcheck: "false" })),
    make("label", {}, make("span", {}, "Text", make("span", { class: "quiet" }, " that the model reads")), make("textarea", { id: "item-text", required: true, maxlength: 10000, rows: 3 }, item?.text || "")),
    make(
      "fieldset",
      {},
      make("legend", {}, "Attributes ", make("span", { class: "quiet" }, "that filters and people see; several values with | between them")),
      make("ul", { id: "item-attributes" }, ...Object.entries(item?.attributes ?? {}).map(([name, value]) => attribute(name, value))),
      make("button", { type: "button", class: "plain", onclick: addAttribute }, "Add an attribute"),
    ),
    make(
      "p",
      { class: "options" },
      make("button", { class: "primary", disabled: Boolean(unlock) }, item ? "Save" : "Add the item"),
      make("span", { class: "spring" }),
      item ? make("button", { type: "button", class: "danger", disabled: Boolean(unlock), onclick: remove }, "Delete") : null,
    ),
  );
  form.addEventListener("submit", save);
  const back = make("button", { type: "button", id: "catalog-back", class: "plain", onclick: close }, "← All items");
  box.replaceChildren(...[back, title, item && link(item), outcome, unlock, form].filter(Boolean));
  if (!names.length) {
    try {
      names = (await ask("v1/attributes?limit=1")).attributes.map(({ name }) => name);
    } catch {
      return; // names can be typed, too
    }
  }
  if (!item && !$("item-attributes").children.length) $("item-attributes").replaceChildren(...names.slice(0, 6).map((name) => attribute(name, "")));
}

function attribute(name, value) {
  return make(
    "li",
    { class: "pair" },
    make("input", { class: "name", value: name, maxlength: 64, "aria-label": "Name of the attribute", placeholder: "name", autocomplete: "off", spellcheck: "false" }),
    make("input", { class: "value", value, maxlength: 1000, "aria-label": name ? `Value of ${name}` : "Value", placeholder: "value", autocomplete: "off" }),
    make("button", { type: "button", class: "plain", "aria-label": `Remove the attribute ${name}`, onclick: (event) => event.currentTarget.parentElement.remove() }, "×"),
  );
}

function addAttribute() {
  const row = attribute("", "");
  $("item-attributes").append(row);
  row.firstChild.focus();
}

function filledIn() {
  const pairs = [...$("item-attributes").children].map((row) => [row.querySelector(".name").value.trim(), row.querySelector(".value").value]);
  return { id: $("item-id").value, text: $("item-text").value, attributes: Object.fromEntries(pairs.filter(([name, value]) => name && value)) };
}

async function save(event) {
  event.preventDefault();
  const item = filledIn();
  let before = edited;
  try {
    before ??= (await ask(`v1/items?id=${encodeURIComponent(item.id)}`)).items[0];
  } catch (error) {
    return fail(error);
  }
  if (before && item.text.trim() !== before.text.trim()) {
    const sure = await confirmed(`Give ${short(nameOf(before))} another text?`, "What the model has learned of the item is not used for another text: it is read by that alone until the next training.", "Save the text");
    if (!sure) return;
  }
  const done = await changing(() => ask("v1/items", { method: "PUT", body: { items: [item] } }));
  if (!done) return;
  names = [];
  const line = `${item.id} ${MEANS[done.changes[item.id]]}`;
  await open(item.id, { line });
  say(line);
}

async function remove() {
  const item = edited;
  const sure = await confirmed(`Delete ${short(nameOf(item))}?`, `From the next request on, ${item.id} is in no answer of this service. Adding it with the same text brings it back as it was.`, "Delete");
  if (!sure) return;
  const done = await changing(() => ask(`v1/items?id=${encodeURIComponent(item.id)}`, { method: "DELETE" }));
  if (!done) return;
  forget(item.id);
  const line = `${item.id} was deleted: it is in no answer any more.`;
  await draw(null, line);
  say(line);
}

/** Says beside the form what went wrong. */
function fail(error) {
  $("outcome").className = "wrong";
  $("outcome").setAttribute("role", "alert");
  $("outcome").textContent = lineOf(error);
  $("outcome").hidden = false;
}

/** What a change answers; null if it was refused, which is said beside the form. */
async function changing(run) {
  const buttons = $("editor").querySelectorAll("button");
  for (const button of buttons) button.disabled = true;
  try {
    const done = await run();
    list();
    about().catch(tell);
    return done;
  } catch (error) {
    fail(error);
    return null;
  } finally {
    for (const button of buttons) button.disabled = false;
  }
}
