// GET /metrics, read: samples by name and labels, sums, and quantiles of histograms.

/** Samples of a text in Prometheus' format: { name, labels, value }. */
export function parse(text) {
  const samples = [];
  for (const line of text.split("\n")) {
    const [, name, pairs, value] = /^([A-Za-z_:][\w:]*)(?:\{(.*)\})? (\S+)/.exec(line) ?? [];
    if (!name) continue;
    const labels = {};
    for (const [, label, quoted] of (pairs ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) {
      labels[label] = quoted.replace(/\\(.)/g, (_, c) => (c === "n" ? "\n" : c));
    }
    samples.push({ name, labels, value: Number(value.replace("Inf", "Infinity")) });
  }
  return samples;
}

export function all(samples, name, wanted = {}) {
  return samples.filter((one) => one.name === name && Object.entries(wanted).every(([label, value]) => one.labels[label] === value));
}

export function sum(samples, name, wanted) {
  return all(samples, name, wanted).reduce((total, one) => total + one.value, 0);
}

/** Cumulative counts of a histogram by upper bound; `since`: less those of samples before. */
export function buckets(samples, name, wanted, since = null) {
  const before = new Map(since ? all(since, `${name}_bucket`, wanted).map((one) => [one.labels.le, one.value]) : []);
  return all(samples, `${name}_bucket`, wanted)
    .map((one) => ({ to: Number(one.labels.le.replace("+Inf", "Infinity")), count: one.value - (before.get(one.labels.le) ?? 0) }))
    .sort((a, b) => a.to - b.to);
}

/** A quantile, as Prometheus' histogram_quantile reads it; null of nothing, Infinity beyond the
 * last bound. */
export function quantile(q, some) {
  const total = some.at(-1)?.count ?? 0;
  if (!total) return null;
  const n = some.findIndex((bucket) => bucket.count >= q * total);
  const [from, below] = n ? [some[n - 1].to, some[n - 1].count] : [0, 0];
  if (some[n].to === Infinity) return Infinity;
  return from + (some[n].to - from) * ((q * total - below) / (some[n].count - below));
}
