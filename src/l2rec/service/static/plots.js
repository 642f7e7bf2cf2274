// Lines over time, as SVG.

import { make } from "./dom.js";

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
export function plot({ dates, lines, band = null, format, from = null, zero = false, label }) {
  const known = [...lines.flatMap((line) => line.values), ...(band ? [...band.low, ...band.high] : [])].filter((value) => value !== null);
  if (band) {
    // The first intervals are so wide that nothing else could be seen beside them.
    const late = [...band.low.slice(band.low.length >> 2), ...band.high.slice(band.high.length >> 2), ...lines[0].values].filter((value) => value !== null);
    known.splice(0, known.length, ...late);
  }
  let low = Math.min(...known, from ?? (zero ? 0 : Infinity));
  let high = Math.max(...known, zero ? 0 : -Infinity);
  if (low === high) high = low + (Math.abs(low) || 1) / 10;
  const height = 168, left = 56, right = 8, top = 8, bottom = 24;
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

export function figure(title, line, drawn, names) {
  return make(
    "figure",
    {},
    make("figcaption", {}, make("b", {}, title), ` ${line}`, make("span", { class: "names" }, ...names.map((name) => make("span", { class: `name ${name}` }, name)))),
    drawn,
  );
}
