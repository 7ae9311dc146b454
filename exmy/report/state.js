// What is shown: the content as it was packed, which runs the filters leave, and the address that says so.

function bytesOf(base64) {
  const text = atob(base64), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

/** The content: base64 of gzipped JSON, its number arrays turned into Float32Array with a shape. */
async function unpack(element) {
  const stream = new Blob([bytesOf(element.textContent)]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text(), (key, value) => {
    if (value === null || typeof value !== "object" || typeof value.f4 !== "string") return value;
    const numbers = new Float32Array(bytesOf(value.f4).buffer);
    numbers.shape = value.shape;
    return numbers;
  });
}

/** Row `run` of an array [run, ...]. */
function row(numbers, run) {
  const length = numbers.shape.slice(1).reduce((a, b) => a * b, 1);
  return numbers.subarray(run * length, (run + 1) * length);
}

// keep: of each facet the values to show, null for all. rate: null for each group's own. cell: what was chosen in a heat map.
const state = {section: "", keep: {}, rate: null, sharpness: null, signal: null, measure: null, role: null, cell: null};
const CHOICES = ["rate", "sharpness", "signal", "measure", "role", "cell"];
let content = null;

/** The address's part after #: section?facet=value&facet=value&rate=... Facets stand under "by.", so that no axis hides a choice. */
function toHash() {
  const query = new URLSearchParams();
  for (const facet of content.facets) for (const value of state.keep[facet] ?? []) query.append("by." + facet, value);
  for (const facet of content.facets) if (state.keep[facet]?.size === 0) query.append("by." + facet, "");
  for (const name of CHOICES) if (state[name] !== null) query.set(name, state[name]);
  const text = query.toString();
  return "#" + state.section + (text ? "?" + text : "");
}

function fromHash(hash) {
  const [section, text] = hash.replace(/^#/, "").split("?");
  const query = new URLSearchParams(text ?? "");
  state.section = /^[a-z]*$/.test(section) ? section : "";
  state.keep = {};
  for (const facet of content.facets) {
    const asked = query.getAll("by." + facet);
    const known = new Set(valuesOf(facet));
    state.keep[facet] = asked.length ? new Set(asked.filter(value => known.has(value))) : null;
  }
  for (const name of CHOICES) state[name] = query.get(name);
  state.rate = state.rate === null || !Number.isFinite(+state.rate) ? null : +state.rate;
}

/** A facet's values in all studies, in order. */
function valuesOf(facet) {
  return [...new Set(content.studies.flatMap(study => study.columns[facet]?.values ?? []))];
}

/** Show a facet's value or hide it; all of them again for value null. */
function choose(facet, value, shown) {
  const all = valuesOf(facet);
  const kept = value === null ? new Set(all) : new Set(state.keep[facet] ?? all);
  if (value !== null) shown ? kept.add(value) : kept.delete(value);
  state.keep[facet] = kept.size === all.length ? null : kept;
}

function isKept(study, run) {
  return content.facets.every(facet => {
    const column = study.columns[facet], kept = state.keep[facet];
    return !kept || !column || kept.has(column.values[column.of[run]]);
  });
}

/** What a figure is drawn of: one group of a study, with the runs that the filters leave. */
function panels() {
  return content.studies.flatMap((study, s) => study.groups
    .map((group, g) => ({study, s, group, g, key: s + "." + g, runs: group.runs.filter(run => isKept(study, run))}))
    .filter(panel => panel.runs.length));
}

const labelOf = panel => [content.studies.length > 1 ? panel.study.name : "", panel.group.label].filter(Boolean).join(", ");
const recipeOf = (panel, run) => panel.study.columns.recipe.values[panel.study.columns.recipe.of[run]];
const seedOf = (panel, run) => panel.study.columns.seed.values[panel.study.columns.seed.of[run]];
const recipesOf = panel => panel.study.columns.recipe.values.filter(name => panel.runs.some(run => recipeOf(panel, run) === name));
const ratesOf = panel => [...new Set(panel.runs.map(run => panel.study.rate[run]))].sort((a, b) => a - b);

/** The learning rate to show of a panel: the one chosen, or the nearest that it has; without a choice its reference. */
function rateOf(panel) {
  const asked = state.rate ?? panel.group.reference;
  return ratesOf(panel).reduce((best, rate) => Math.abs(Math.log(rate / asked)) < Math.abs(Math.log(best / asked)) ? rate : best);
}

/** Runs of a recipe at a learning rate, k of n diverged, its exact interval as Python made it, and the mean of finite final losses. */
function cellOf(panel, recipe, rate) {
  const runs = panel.runs.filter(run => recipeOf(panel, run) === recipe && panel.study.rate[run] === rate);
  const n = runs.length, k = runs.filter(run => panel.study.run.diverged[run]).length;
  const finite = runs.map(run => panel.study.run.final[run]).filter(Number.isFinite);
  const loss = finite.length ? finite.reduce((a, b) => a + b, 0) / finite.length : NaN;
  const [low, high] = n ? content.limits[n][k] : [NaN, NaN];
  return {recipe, rate, runs, n, k, low, high, loss, finite: finite.length};
}

/** The median, of an even number the mean of the middle two; what is NaN counts as infinite, and an infinite median is NaN. */
function median(values) {
  if (!values.length) return NaN;
  const sorted = values.map(v => Number.isNaN(v) ? Infinity : v).sort((a, b) => a - b);
  const middle = (sorted[(sorted.length - 1) >> 1] + sorted[sorted.length >> 1]) / 2;
  return Number.isFinite(middle) ? middle : NaN;
}
