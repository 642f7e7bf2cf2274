// Operations: requests, latency, errors and the queue from /metrics; versions, and the way back.

import { $, confirmed, make, moment, number, percent, quiet, say, table } from "./dom.js";
import { all, buckets, parse, quantile, sum } from "./metrics.js";
import { figure, plot } from "./plots.js";
import { about, ask, lineOf, live, onLive, tell, untell, writeKeyForm } from "./server.js";

const EVERY = 2000; // milliseconds between two looks
const WINDOW = 60; // seconds that "now" means
const KEPT = 300; // seconds of looks that the plot shows
const PATIENCE = 120; // seconds until a roll-back is no longer watched
const OWN = ["/metrics", "/v1/failures", "/v1/deployments", "/v1/live"]; // what this page itself asks for

let looks = []; // { at, samples }, oldest first
let timer = 0;
let turn = 0;
let lost = false; // whether the last look failed
let failed = -1; // number of errors when they were last asked for

export async function showOperations() {
  clearTimeout(timer);
  await Promise.all([look(), versions()]);
}

async function look() {
  if ($("operations").hidden) return;
  if (!document.hidden) {
    try {
      const samples = parse(await ask("metrics", { plain: true }));
      const at = performance.now() / 1000;
      if (looks.length && counted(samples) < counted(looks.at(-1).samples)) looks = []; // the server was restarted
      looks = [...looks.filter((one) => at - one.at < KEPT), { at, samples }];
      if (lost) untell();
      lost = false;
      drawMetrics();
      await failures(samples);
      if (++turn % 5 === 0) await Promise.all([about(), versions()]);
    } catch (error) {
      lost = true;
      tell(error, look);
      if (error.silent) return; // a key is asked for, and then this part is shown again
    }
  }
  clearTimeout(timer);
  timer = setTimeout(look, EVERY);
}

document.addEventListener("visibilitychange", () => { if (!document.hidden && !$("operations").hidden) look(); });

// -- requests ------------------------------------------------------------------------------------

const counted = (samples) => sum(samples, "l2rec_requests_total");
const bad = (status) => !/^[123]/.test(status);
const seconds = (value) => (value === null ? "–" : value === Infinity ? "> 10 s" : value < 1 ? `${(1000 * value).toPrecision(value < 0.0995 ? 2 : 3)} ms` : `${value.toPrecision(2)} s`);

/** Requests of clients between two looks, a second. */
function rate(from, to) {
  const of = ({ samples }) => counted(samples) - OWN.reduce((own, route) => own + sum(samples, "l2rec_requests_total", { route }), 0);
  return (of(to) - of(from)) / (to.at - from.at);
}

function drawMetrics() {
  const newest = looks.at(-1);
  const { samples } = newest;
  const first = looks.find((one) => newest.at - one.at <= WINDOW);
  const recent = first === newest ? null : first;
  const started = sum(samples, "l2rec_start_time_seconds");
  $("since").textContent = `of this process, since ${moment(started)}`;
  const length = recent ? `last ${Math.round(newest.at - recent.at)} s` : "";
  const requests = all(samples, "l2rec_requests_total");
  const total = counted(samples);
  const errors = requests.filter((one) => bad(one.labels.status)).reduce((some, one) => some + one.value, 0);
  const ranking = buckets(samples, "l2rec_request_seconds", { route: "/v1/recommend" }, recent?.samples);
  const ranked = ranking.at(-1)?.count > 0 ? ranking : buckets(samples, "l2rec_request_seconds", { route: "/v1/recommend" });
  const when = ranked === ranking && recent ? length : "since the start";
  tiles([
    ["Requests a second", recent ? rate(recent, newest).toFixed(1) : "–", recent ? `${length}, without this page's own looks` : "from the next look on"],
    ["Answered with an error", number(errors), `${percent(total ? errors / total : 0, 1)} of ${number(total)} since the start`],
    ["Recommend, p50", seconds(quantile(0.5, ranked)), when],
    ["Recommend, p99", seconds(quantile(0.99, ranked)), when],
    ["In progress", number(sum(samples, "l2rec_inflight_requests")), "requests, this one included"],
    ["Waiting for the model", number(sum(samples, "l2rec_queue_histories")), `histories, and ${number(sum(samples, "l2rec_queue_slices"))} texts or histories to embed`],
  ]);
  byRoute(samples, requests, recent);
  work(samples);
  traffic();
}

function tiles(rows) {
  $("tiles").replaceChildren(...rows.map(([name, value, note]) => make("div", {}, make("dt", {}, name), make("dd", {}, make("b", {}, value), make("span", { class: "quiet" }, note)))));
}

function byRoute(samples, requests, recent) {
  const groups = new Map();
  for (const { labels, value } of requests) {
    if (!value) continue;
    const one = groups.get(labels.route) ?? { methods: new Set(), total: 0, statuses: new Map() };
    one.methods.add(labels.method);
    one.total += value;
    one.statuses.set(labels.status, (one.statuses.get(labels.status) ?? 0) + value);
    groups.set(labels.route, one);
  }
  const status = ([code, count]) => make("span", { class: `code${bad(code) ? " bad" : ""}` }, make("b", {}, code === "none" ? "gone" : code), ` ${number(count)}`);
  const rows = [...groups].sort((a, b) => b[1].total - a[1].total).map(([route, one]) => {
    const times = buckets(samples, "l2rec_request_seconds", { route });
    const before = recent ? sum(recent.samples, "l2rec_requests_total", { route }) : one.total;
    return [
      make("span", {}, route === "other" ? "files of this page, and unknown paths" : make("code", {}, route), make("span", { class: "quiet" }, ` ${[...one.methods].join(", ")}`)),
      make("span", { class: "codes" }, ...[...one.statuses].sort().map(status)),
      number(one.total),
      recent ? number(one.total - before) : "–",
      seconds(quantile(0.5, times)),
      seconds(quantile(0.99, times)),
    ];
  });
  const heads = ["Endpoint", "by status", "requests", recent ? `last ${Math.round(looks.at(-1).at - recent.at)} s` : "now", "p50", "p99"];
  const note = "p50 and p99 since the start, read from the buckets of /metrics as Prometheus reads them. “gone”: the client left before the answer.";
  $("requests").replaceChildren(rows.length ? table(heads, rows, { kind: "table stacked", numbers: 2 }) : quiet("None yet."), quiet(note));
}

/** Requests a second between the looks. */
function traffic() {
  const steps = looks.slice(1).map((one, n) => ({ at: one.at, rate: rate(looks[n], one) }));
  $("traffic").hidden = steps.length < 3;
  if (steps.length < 3) return;
  const ago = ({ at }) => { const s = Math.round(looks.at(-1).at - at); return s ? `−${s} s` : "now"; };
  const values = steps.map((step) => Math.max(0, step.rate));
  const drawn = plot({ dates: steps.map(ago), from: 0, format: (value) => value.toFixed(value < 10 ? 1 : 0), lines: [{ name: "treatment", values }], label: `Requests a second, now ${values.at(-1).toFixed(1)}, at most ${Math.max(...values).toFixed(1)}` });
  $("traffic").replaceChildren(figure("Requests a second", "While this tab is open, without its own looks.", drawn, []));
}

function work(samples) {
  const mean = (name) => { const count = sum(samples, `${name}_count`); return count ? (sum(samples, `${name}_sum`) / count).toFixed(1) : "–"; };
  const [hits, misses] = ["hit", "miss"].map((found) => sum(samples, "l2rec_user_cache_total", { found }));
  const each = (name, label) => all(samples, name).filter((one) => one.value).map((one) => `${one.labels[label]} ${number(one.value)}`).join(", ") || "none";
  const rows = [
    ["Batches", `${number(sum(samples, "l2rec_batch_histories_count"))}, of ${mean("l2rec_batch_histories")} histories and ${mean("l2rec_batch_tokens")} tokens on average`],
    ["Wait for a batch, p99", seconds(quantile(0.99, buckets(samples, "l2rec_batch_wait_seconds")))],
    ["Cached user vectors", `${number(sum(samples, "l2rec_user_cache_entries"))}${hits + misses ? `; ${percent(hits / (hits + misses))} of the look-ups find one` : ""}`],
    ["Refused for load", each("l2rec_refused_total", "reason")],
    ["Events", each("l2rec_events_total", "result")],
    ["Changes of items", each("l2rec_item_changes_total", "change")],
    ["Failures of storage", each("l2rec_storage_failures_total", "call")],
    ["Shadow's requests", each("l2rec_shadow_requests_total", "result")],
  ];
  $("work").replaceChildren(make("dl", { class: "facts" }, ...rows.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)])));
}

// -- errors --------------------------------------------------------------------------------------

async function failures(samples) {
  const now = all(samples, "l2rec_requests_total").filter((one) => bad(one.labels.status)).reduce((some, one) => some + one.value, 0);
  if (now === failed) return;
  const found = (await ask("v1/failures")).failures;
  failed = now;
  const row = (one) => [moment(one.at), make("span", { class: "code bad" }, make("b", {}, String(one.status))), make("span", {}, `${one.method} `, one.route === "other" ? "elsewhere" : make("code", {}, one.route)), one.detail || "–", make("code", {}, one.request)];
  $("failures").replaceChildren(
    found.length ? make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Latest errors" }, table(["when", "status", "request", "detail", "id in the log"], found.map(row), { kind: "table plain stacked", numbers: 9 })) : quiet("None since the start."),
  );
}

// -- versions ------------------------------------------------------------------------------------

const DID = { deploy: "deployed", rollback: "rolled back to", shadow: "compares", "end shadow": "stopped comparing" };

async function versions() {
  try {
    drawVersions(await ask("v1/deployments"));
  } catch (error) {
    $("versions").replaceChildren(make("p", { class: "alarm" }, lineOf(error)));
  }
}

const named = ({ run, version }) => make("span", {}, make("b", {}, run), " ", make("code", {}, version ? version.slice(0, 8) : ""));

function drawVersions(found) {
  if (!live) return;
  const box = $("versions");
  if (box.contains(document.activeElement) && document.activeElement.matches("input")) return; // somebody types a key
  const refused = live.refused && make("p", { class: "alarm" }, `${live.refused.run} was refused on ${moment(live.refused.at)}: ${live.refused.reason}`);
  if (!found.current) {
    box.replaceChildren(...[refused, quiet("One run folder is served. Deploy to a folder with `l2rec deploy RUN --to DIR` and serve that: then versions are kept here, and one can go back.")].filter(Boolean));
    return;
  }
  const { current, previous } = found;
  const lines = [refused];
  if (current.version && current.version !== live.version) lines.push(make("p", { class: "alarm" }, `${current.run} is deployed, and ${live.name} is live: it is being loaded, or was refused.`));
  const back = previous.length
    ? make("p", { class: "options" }, make("button", { type: "button", id: "roll-back", class: "danger", onclick: () => rollBack(current, previous[0]) }, `Roll back to ${previous[0].run}`), make("span", { class: "quiet" }, previous[0].version ? ` version ${previous[0].version.slice(0, 8)}` : ""))
    : quiet("Nothing was deployed before, so there is no way back.");
  const steps = found.steps.length
    ? table(["when", "who", "what", "run"], found.steps.map((step) => [moment(step.at), step.by, DID[step.action], named(step)]), { kind: "table plain stacked", numbers: 9 })
    : quiet("Who deployed what is known from the next deployment on.");
  box.replaceChildren(...[...lines, make("p", {}, "Deployed: ", named(current)), back, steps].filter(Boolean));
}

async function rollBack(current, target) {
  const key = writeKeyForm(() => { key.remove(); rollBack(current, target); });
  if (key) {
    $("versions").querySelector(".unlock")?.remove();
    $("roll-back").parentElement.after(key);
    key.querySelector("input").focus();
    return;
  }
  const sure = await confirmed(`Serve ${target.run} again?`, `It takes the place of ${current.run} once it is loaded and checked. Requests in progress end on the version that they began with.`, "Roll back");
  if (!sure) return;
  const began = Date.now() / 1000;
  try {
    untell();
    await ask("v1/deployments/rollback", { body: current });
    say(`${target.run} is being loaded`);
    await versions();
    await watch(target, began);
  } catch (error) {
    tell(error);
    await versions();
  }
}

/** Waits until a run is live, or was refused. */
async function watch(target, began) {
  while (Date.now() / 1000 - began < PATIENCE) {
    await about();
    if (live.name === target.run && (!target.version || live.version === target.version)) {
      say(`${target.run} is live`);
      break;
    }
    if (live.refused && live.refused.at >= began - 1) break; // the page says why
    await new Promise((resolve) => setTimeout(resolve, 500));
  }
  await versions();
}

// -- the live version ----------------------------------------------------------------------------

const METRICS = ["recall@10", "ndcg@10", "mrr"];

onLive(() => {
  facts();
  scores();
});

function facts() {
  const rows = [
    ["Run", live.name],
    ["Version", make("code", {}, live.version)],
    ["Method", live.recipe ? `${live.method}, ${live.recipe}` : live.method],
    ["Loaded", moment(live.loaded_at)],
    ["Items", `${number(live.items)}${live.added ? `, ${number(live.added)} of them rows that came since` : ""}`],
    ["Index", live.index || "none: all items are scored"],
    ["Data", live.data && `${live.data.name}: ${number(live.data.users)} users, ${number(live.data.items)} items, ${number(live.data.events)} events`],
    ["Fingerprint", live.data && make("code", {}, live.data.fingerprint)],
    ["Control", live.control && live.control.name],
    ["Shadow", live.shadow && `${live.shadow.name}, compared on live requests`],
  ];
  $("facts").replaceChildren(...rows.filter(([, value]) => value).flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
}

function scores() {
  const every = Object.entries(live.scores);
  if (!every.length) {
    $("scores").replaceChildren(quiet("This run has no report."));
    return;
  }
  const names = METRICS.filter((name) => every.some(([, values]) => name in values));
  const rows = every.map(([method, values]) => [method, ...names.map((name) => (name in values ? values[name].toFixed(4) : ""))]);
  const drawn = table(["on the test split", ...names], rows);
  drawn.tBodies[0].rows[0].classList.toggle("own", every[0][0] === live.method);
  $("scores").replaceChildren(drawn);
}
