// Elements, numbers and waits that every part of the page uses.

export const $ = (id) => document.getElementById(id);

/** An element with attributes, listeners (on...) and children; empty ones are left out. */
export function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

/** Custom properties of an element: the style sheet says what they mean. */
export function measure(node, values) {
  for (const [name, value] of Object.entries(values)) node.style.setProperty(`--${name}`, value);
  return node;
}

/** A table; the first cell of each row is its header. numbers: from which column on. */
export function table(heads, rows, { kind = "table", numbers = 1 } = {}) {
  const cell = (tag, n, attributes, content) => make(tag, { ...attributes, class: n >= numbers ? "number" : null }, content);
  return make(
    "table",
    { class: kind },
    make("thead", {}, make("tr", {}, ...heads.map((head, n) => cell("th", n, { scope: "col" }, head)))),
    make("tbody", {}, ...rows.map(([first, ...rest]) => make("tr", {}, cell("th", 0, { scope: "row" }, first), ...rest.map((content, n) => cell("td", n + 1, { "data-head": heads[n + 1] }, content))))),
  );
}

export const quiet = (text) => make("p", { class: "quiet" }, text);
export const number = (value) => value.toLocaleString("en");
export const decimals = (value, digits = 3) => value.toFixed(digits).replace("-", "−");
export const percent = (value, digits = 0) => `${(100 * value).toFixed(digits)}%`;
export const short = (text) => (text.length > 80 ? `${text.slice(0, 78)}…` : text);
export const say = (line) => { $("status").textContent = line; };
export const moment = (seconds) => new Date(1000 * seconds).toLocaleString("en", { dateStyle: "medium", timeStyle: "medium" });

export function signed(value, digits = 3) {
  const size = Math.abs(value).toFixed(digits);
  return Number(size) ? `${value < 0 ? "−" : "+"}${size}` : size;
}

/** Lengths of score bars: from zero, or from the lowest where scores are below it. */
export function scale(scores) {
  const low = Math.min(0, ...scores);
  const high = Math.max(...scores, low + 1e-9);
  return (score) => (score - low) / (high - low);
}

/** Whether the panel of an item lies over the page. */
export const narrow = matchMedia("(max-width: 1119px)");

/** A function of which only the newest call counts: the one before is given up. */
export function latest(run) {
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
export function later(milliseconds, run) {
  let timer = 0;
  const call = (...args) => {
    clearTimeout(timer);
    timer = setTimeout(run, milliseconds, ...args);
  };
  call.cancel = () => clearTimeout(timer);
  return call;
}

/** Asks before something that cannot be taken back; true if it shall be done. */
export function confirmed(question, detail, action) {
  const [dialog, yes] = [$("confirm"), $("confirm-yes")];
  $("confirm-title").textContent = question;
  $("confirm-detail").textContent = detail;
  yes.textContent = action;
  dialog.returnValue = "";
  dialog.showModal();
  $("confirm-no").focus(); // Enter by mistake does nothing
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

for (const [id, value] of [["confirm-yes", "yes"], ["confirm-no", ""]]) $(id).addEventListener("click", () => $("confirm").close(value));
