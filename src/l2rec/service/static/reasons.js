// The reasons for a rank, drawn from an answer of /v1/explain.

import { nameOf } from "./catalog.js";
import { decimals, make, measure, percent, signed } from "./dom.js";

const BARS = 12; // items of the history, until all are asked for

export function block(title, note, ...children) {
  return make("section", { class: "block" }, make("h3", {}, title), note ? make("p", { class: "quiet" }, note) : null, ...children);
}

export function reasons(found) {
  return [scored(found), gate(found.gate), effects(found), heat(found.experts)].filter(Boolean);
}

function scored(found) {
  if (found.score === null) return block("No score", "The search of this method has not found the item for this history.");
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
  if (found.score === null) return null;
  const title = "What each item of the history does";
  const known = found.history.map((one, n) => ({ ...one, n, effect: one.score === null ? null : found.score - one.score })).reverse();
  const some = known.filter((one) => one.effect !== null);
  if (!some.length) return block(title, known.length > 1 ? "Without any one of them the item is not found." : "There is only one: without it there would be no history.");
  const low = Math.min(0, ...some.map((one) => one.effect));
  const high = Math.max(0, ...some.map((one) => one.effect));
  const span = high - low || 1;
  const row = (one) => {
    const side = measure(make("span", { class: "side", "aria-hidden": "true" }, measure(make("i", { class: one.effect < 0 ? "less" : null }), { from: (Math.min(one.effect, 0) - low) / span, share: Math.abs(one.effect) / span })), { zero: percent(-low / span, 2) });
    return make("li", {}, make("span", { class: "text one", title: one.text }, `${one.n + 1}. ${nameOf(one)}`), side, make("span", { class: "value" }, signed(one.effect)));
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
