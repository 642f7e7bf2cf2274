// Asking the server, the keys to do so, what is live, and in plain words what went wrong.

import { $, make } from "./dom.js";

const KEY = "l2rec-key";

export class Problem extends Error {}

// -- keys ----------------------------------------------------------------------------------------

let writeKey = null; // in memory alone: whoever opens this tab later has to type it again

const storedKey = () => sessionStorage.getItem(KEY);

/** Takes a key if the server knows it: a read key until the tab is closed, a write key until the
 * page is left. Throws a Problem if it does not, or if it has to write and may not. */
async function takeKey(key, { toWrite = false } = {}) {
  const state = await ask("v1/live", { key });
  if (toWrite && !state.may_write) throw new Problem("That is a read key; changes need a write key.");
  if (state.may_write) writeKey = key;
  else sessionStorage.setItem(KEY, key);
  live = state;
}

let entered = () => {};

/** What to do once a key was given. */
export function onKey(run) {
  entered = run;
}

function askForKey(wrong) {
  $("key").hidden = false;
  $("key").querySelector("label").textContent = wrong ? "The server does not know that key" : "This server asks for a key";
  if (document.activeElement !== $("key-field")) $("key-field").focus();
}

$("key").addEventListener("submit", async (event) => {
  event.preventDefault();
  const key = $("key-field").value.trim();
  $("key-field").value = "";
  try {
    await takeKey(key);
  } catch (error) {
    if (error.status === 401) askForKey(true);
    else tell(error);
    return;
  }
  $("key").hidden = true;
  entered();
});

/** A form for a write key, and then what to do; null where none is needed. */
export function writeKeyForm(unlocked) {
  if (live?.may_write) return null;
  const field = make("input", { type: "password", autocomplete: "off", spellcheck: "false", required: true });
  const wrong = make("p", { class: "wrong", role: "alert" });
  const form = make(
    "form",
    { class: "unlock" },
    make("label", {}, make("span", {}, "Changes need a write key"), field),
    make("button", { class: "primary" }, "Use this key"),
    make("p", { class: "quiet" }, "It is kept in this page's memory alone, and forgotten when you leave or reload it."),
    wrong,
  );
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    try {
      await takeKey(field.value.trim(), { toWrite: true });
      unlocked();
    } catch (error) {
      wrong.textContent = error.message;
      field.select();
    }
  });
  return form;
}

// -- requests ------------------------------------------------------------------------------------

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

/** JSON of a route, or text. Throws a Problem with a line to show; an AbortError where nobody waits.
 *
 * key: another than those that are known, to try it; it is not asked for again if it is wrong. */
export async function ask(path, { method, body, signal, key = null, plain = false } = {}) {
  const headers = {};
  const used = key || writeKey || storedKey();
  if (used) headers.authorization = `Bearer ${used}`;
  if (body) headers["content-type"] = "application/json";
  wait(1);
  try {
    let answer;
    try {
      answer = await fetch(path, { method: method || (body ? "POST" : "GET"), headers, body: body && JSON.stringify(body), signal });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Problem(error instanceof TypeError && /header/i.test(error.message) ? "A key has no such letters." : "The server cannot be reached. It may be restarting.");
    }
    if (answer.ok) {
      return await (plain ? answer.text() : answer.json()).catch((error) => {
        if (error.name === "AbortError") throw error;
        throw new Problem("The server's answer cannot be read.");
      });
    }
    throw await problemOf(answer, used, key);
  } finally {
    wait(-1);
  }
}

async function problemOf(answer, used, tried) {
  const said = (await answer.json().catch(() => ({}))).detail;
  const { status } = answer;
  if (status === 401) {
    if (tried) return Object.assign(new Problem("The server does not know that key."), { status });
    if (used === (writeKey || storedKey())) askForKey(Boolean(used)); // no other was given meanwhile
    return Object.assign(new Problem(""), { status, silent: true });
  }
  if (status === 429 || status === 503) {
    const seconds = answer.headers.get("retry-after");
    return new Problem(`The server is busy${seconds ? `; try again in ${seconds} s` : ""}. It says: ${said || status}`);
  }
  return Object.assign(new Problem(said ? `The server says: ${said}` : `The server answered ${status}.`), { status });
}

// -- problems ------------------------------------------------------------------------------------

let again = null;

/** Shows what went wrong, and what to do again. */
export function tell(error, retry = null) {
  if (error.name === "AbortError" || error.silent) return;
  $("problem").textContent = lineOf(error);
  again = retry;
  $("retry").hidden = !retry;
  $("notice").hidden = false;
}

/** What went wrong, for people. */
export function lineOf(error) {
  if (error.silent) return "A key is needed.";
  if (error instanceof Problem) return error.message;
  console.error(error);
  return "Something in this page failed. Reloading it may help.";
}

export function untell() {
  $("notice").hidden = true;
}

$("retry").addEventListener("click", () => {
  untell();
  again?.();
});

// -- what is live --------------------------------------------------------------------------------

export let live = null; // of GET v1/live

const watchers = [];

/** What to do each time that what is live was asked for. */
export function onLive(run) {
  watchers.push(run);
}

export async function about() {
  live = await ask("v1/live");
  for (const run of watchers) run();
}
