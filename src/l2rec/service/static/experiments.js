// The experiment that runs: its arms, their alarm, intervals and plots.

import { $, make, number, percent, quiet, signed, table } from "./dom.js";
import { figure, plot } from "./plots.js";
import { ask, lineOf, live } from "./server.js";

export async function showExperiments() {
  const box = $("experiment");
  if (!live) return;
  if (!live.experiment) {
    box.replaceChildren(quiet("None runs. Every request is answered by the live version. `l2rec serve --experiment NAME` starts one."));
    return;
  }
  const { name, treatment } = live.experiment;
  const lines = [make("p", {}, make("b", {}, name), `: ${percent(treatment)} of the users are served ${live.name}, the others ${live.control ? live.control.name : "the same, to test the test"}.`)];
  try {
    const found = await ask(`v1/experiments/${encodeURIComponent(name)}`);
    lines.push(...mixed(found.served));
    if (!found.result) lines.push(quiet(`No result yet: ${found.reason}`));
    else lines.push(...outcome(found.result));
  } catch (error) {
    if (error.name !== "AbortError") lines.push(make("p", { class: "alarm" }, lineOf(error)));
  }
  box.replaceChildren(...lines);
}

const alarm = (text) => make("p", { class: "alarm" }, text);

/** Alarms of arms that more than one version has served. */
function mixed(served) {
  return ["treatment", "control"].flatMap((arm) => {
    const runs = served.filter((one) => one.arm === arm).map((one) => one.run);
    return runs.length < 2 ? [] : [alarm(`The ${arm} arm was served by ${runs.length} versions, one after the other (${runs.join(", ")}). What is measured is a mixture of them: start another experiment.`)];
  });
}

/** Whether the arms have the sizes that were planned. */
function sizes({ arms, sample_ratio: ratio }) {
  const users = arms.treatment.users + arms.control.users;
  const share = `${percent(ratio.observed, 2)} of ${number(users)} users are in the treatment`;
  if (ratio.mismatch === null) return quiet(`${share}. Not checked: the log does not know what was planned.`);
  const planned = `${percent(ratio.planned, 2)} planned, p ${chance(ratio.p)}`;
  if (ratio.mismatch) return alarm(`The arms are not as planned: ${share}, ${planned}. Something loses users of one arm; find it before you read on.`);
  return quiet(`The arms are as planned: ${share}, ${planned}.`);
}

const chance = (p) => (typeof p === "number" ? (p < 1e-3 ? p.toExponential(0).replace("-", "−") : p.toPrecision(2)) : "–");
const change = (lift) => (typeof lift === "number" ? `${signed(100 * lift, 1)}%` : "–");
const between = (one) => (one && typeof one.lift_low === "number" ? `${change(one.lift_low)} to ${change(one.lift_high)}` : "–");
const COUNTED = { ctr: "clicks", reply_rate: "replies" };

function outcome(result) {
  const level = percent(1 - result.alpha);
  const heads = ["control", "treatment", "lift", `${level} interval`, "p", `${level} at any time`, "p at any time"];
  const rows = Object.entries(result.metrics).map(([name, one]) => [
    COUNTED[name] || name,
    ...["control", "treatment"].map((side) => percent(one[side], 2)),
    change(one.lift), between(one), chance(one.p), between(one.any_time), chance(one.any_time?.p),
  ]);
  const rates = table(["rate of", ...heads], rows, { kind: "table stacked" });
  const note = "Interval and p are for one look, on a day set beforehand. Those at any time hold however often you look, and need more users.";
  return [sizes(result), rates, quiet(note), ...overTime(result)];
}

// -- experiment over time ------------------------------------------------------------------------

function overTime({ over_time: { seconds, periods }, alpha }) {
  if (periods.length < 2) return [];
  const day = seconds % 86400 === 0;
  const when = new Intl.DateTimeFormat("en", { timeZone: "UTC", month: "short", day: "numeric", ...(day ? {} : { hour: "2-digit", minute: "2-digit", hour12: false }) });
  const dates = periods.map((period) => when.format(1000 * period.from));
  const [many, unit] = day ? [seconds / 86400, "day"] : [seconds / 3600, "hour"];
  const length = many === 1 ? unit : `${many} ${unit}s`;
  const rate = (arm) => periods.map((period) => period[arm].ctr);
  const so = (key) => periods.map((period) => period.so_far.ctr?.[key] ?? null);
  const last = (values) => values.findLast((value) => value !== null) ?? null;
  const clicks = plot({
    dates, format: (value) => percent(value, 1), from: 0,
    lines: [{ name: "control", values: rate("control") }, { name: "treatment", values: rate("treatment") }],
    label: `Clicks by exposures, ${dates[0]} to ${dates.at(-1)} UTC: at the end ${percent(last(rate("control")) ?? 0, 2)} in the control, ${percent(last(rate("treatment")) ?? 0, 2)} in the treatment`,
  });
  const plots = [figure("Clicks by exposures", `In each ${length}, UTC.`, clicks, ["control", "treatment"])];
  if (last(so("lift")) !== null) {
    const lift = plot({
      dates, format: (value) => `${signed(100 * value, 0)}%`, zero: true,
      band: { low: so("lift_low"), high: so("lift_high") },
      lines: [{ name: "treatment", values: so("lift") }],
      label: `Lift of clicks so far, at the end ${change(last(so("lift")))}, ${percent(1 - alpha)} interval ${between({ lift_low: last(so("lift_low")), lift_high: last(so("lift_high")) })}`,
    });
    plots.push(figure("Lift of clicks so far", `With the ${percent(1 - alpha)} interval that holds at any time.`, lift, []));
  }
  return [make("div", { class: "plots" }, ...plots)];
}
