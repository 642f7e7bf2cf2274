// Items that the page has come to know, and what is shown of one: title, labels, picture, link.

import { make } from "./dom.js";
import { ask } from "./server.js";

const AT_ONCE = 100; // ids of one request, so that addresses stay short

const items = new Map(); // id -> item; null for an id that the catalog does not have

export const known = (id) => items.get(id);
export const missing = (id) => items.get(id) === null;
export const titleOf = (id) => items.get(id)?.title || id;
export const nameOf = (item) => item.title || item.id;

export function know(...some) {
  for (const item of some) items.set(item.id, item);
}

export function forget(id) {
  items.delete(id);
}

/** Learns the items of ids that are not known yet. */
export async function learn(ids, signal) {
  const wanted = [...new Set(ids)].filter((id) => id && !items.get(id));
  for (let n = 0; n < wanted.length; n += AT_ONCE) {
    const part = wanted.slice(n, n + AT_ONCE);
    const found = await ask(`v1/items?${part.map((id) => `id=${encodeURIComponent(id)}`).join("&")}`, { signal });
    for (const id of part) items.set(id, null);
    know(...found.items);
  }
}

const YEAR = /^(1[5-9]|20)\d\d$/;
const NUMBER = /^[\d\s.,:/$€£%+-]+$/;

/** What a label says: a number says nothing without its name, a year does. */
const saying = ({ name, value }) => (NUMBER.test(value) && !YEAR.test(value) ? `${name.replaceAll("_", " ")} ${value}` : value);

export const labelText = (item) => item.labels.map(saying).join(", ");

/** The labels of an item, and its id. */
export function labels(item, { most = 8, id = true } = {}) {
  return make(
    "span",
    { class: "labels" },
    ...item.labels.slice(0, most).map((label) => make("span", { class: "label", title: `${label.name}: ${label.value}` }, saying(label))),
    id ? make("span", { class: "id" }, item.id) : null,
  );
}

/** The picture of an item, or nothing: it goes where it cannot be loaded. */
export function picture(item) {
  if (!item?.image) return null;
  return make("img", { src: item.image, alt: "", loading: "lazy", referrerpolicy: "no-referrer", width: 44, height: 44, onerror: (event) => event.currentTarget.remove() });
}

/** A link to where the catalog says more of an item, or nothing. */
export function link(item) {
  const url = item?.link && URL.canParse(item.link) && new URL(item.link);
  if (!url || !/^https?:$/.test(url.protocol)) return null;
  return make("a", { class: "out", href: url.href, target: "_blank", rel: "noopener noreferrer", title: url.href }, url.host, make("span", { "aria-hidden": "true" }, " ↗"), make("span", { class: "hidden" }, " (opens in a new tab)"));
}
