// Loss, gradient norm, sharpness and an alarm signal on one axis of steps.

/** Least, greatest and median over runs at each bucket; a run that has ended before its start is not counted, one that was lost is.
 * lost: of what is not measured at every step, where each run was lost; a run without a value counts from there on alone. */
function overSeeds(parts, runs, starts, last, lost = null) {
  const low = [], high = [], middle = [];
  for (let b = 0; b < starts.length; b++) {
    let least = Infinity, greatest = -Infinity;
    const means = [];
    for (const run of runs) {
      const l = row(parts.low, run)[b], h = row(parts.high, run)[b];
      if (l < least) least = l;
      if (h > greatest) greatest = h;
      const mean = row(parts.mean, run)[b], there = starts[b] <= last[run];
      if (lost ? !Number.isNaN(mean) || there && starts[b] >= lost[run] : there) means.push(mean);
    }
    low.push(least === Infinity ? null : least);
    high.push(greatest === -Infinity ? null : greatest);
    middle.push(median(means));
  }
  return {low, high, middle};
}

/** A band from low to high, in pieces where there is nothing between, and the line of medians, all cut at a ceiling. */
function bandAndLine(recipe, steps, {low, high, middle}, yaxis, ceiling, opacity) {
  const look = content.looks[recipe], colour = colourOf(recipe), cut = v => v > ceiling ? ceiling * 1.05 : v;
  const inside = steps.map((_, i) => i).filter(i => low[i] !== null);
  const outline = {type: "scatter", mode: "lines", yaxis, hoverinfo: "skip", x: inside.map(i => steps[i]), line: {width: 0}};
  return [
    {...outline, y: inside.map(i => cut(low[i]))},
    {...outline, y: inside.map(i => cut(high[i])), fill: "tonexty", fillcolor: faint(colour, opacity)},
    {
      type: "scatter", mode: "lines", yaxis, x: steps, y: middle.map(v => v <= ceiling ? v : null), line: {color: colour, dash: look.dash, width: 2.2},
      hovertemplate: `${plain(recipe)}: %{y:.4g} at step %{x:.0f}<extra></extra>`,
    },
  ];
}

const signalOf = (panel, kind) => {
  const of = panel.study.signals.filter(s => s.kind === kind && s.values);
  const asked = kind === "sharpness" ? state.sharpness : state.signal;
  return of.find(s => s.name === asked) ?? of.at(kind === "sharpness" ? of.findLastIndex(s => s.name.startsWith("logit_sharpness at")) : 0) ?? null;
};

/** Least, greatest and median of a signal over runs, at the steps at which one of them has a value: others are other runs' steps. */
function measured(panel, signal, runs) {
  const parts = {low: signal.values, high: signal.values, mean: signal.values}, {last, lost} = panel.study.curves;
  // A run without any value was not measured, as most of a digest's: it was not lost.
  const own = runs.filter(run => row(signal.values, run).some(Number.isFinite));
  const found = {steps: signal.steps, ...overSeeds(parts, own, signal.steps, last.map(l => l + 1), lost)};
  const there = signal.steps.map((_, b) => own.some(run => !Number.isNaN(row(signal.values, run)[b])));
  return Object.fromEntries(Object.entries(found).map(([name, of]) => [name, of.filter((_, b) => there[b])]));
}

/** A signal's band and median, its runs alike; and a star where the alarm rang in a run. */
function signalTraces(panel, signal, recipe, runs, yaxis, opacity) {
  const found = measured(panel, signal, runs);
  const traces = bandAndLine(recipe, found.steps, found, yaxis, Infinity, opacity);
  const rang = runs.filter(run => Number.isFinite(signal.rang[run]));
  const at = run => signal.steps.reduce((best, s, i) => Math.abs(s - signal.rang[run]) < Math.abs(signal.steps[best] - signal.rang[run]) ? i : best, 0);
  if (rang.length) traces.push({
    type: "scatter", mode: "markers", yaxis, cliponaxis: false, x: rang.map(run => signal.rang[run]), y: rang.map(run => row(signal.values, run)[at(run)]),
    marker: marker(recipe, rang.map(run => signal.failed[run] ? "star" : "star-open"), 10),
    text: rang.map(run => `${plain(recipe)}, seed ${plain(seedOf(panel, run))}<br>alarm at step ${stepWord(signal.rang[run])}` + (signal.failed[run] ? `, ${stepWord(signal.lead[run])} steps before the onset` : ", a false one")),
    hovertemplate: "%{text}<extra></extra>",
  });
  return traces;
}

/** A marker for every run that diverged, at its step. */
function divergences(panel, recipe, runs, high) {
  const of = panel.study.run, loss = panel.study.curves.loss_at, edge = high - 0.02 * Math.abs(high);
  const bad = runs.filter(run => of.diverged[run]);
  return bad.length ? [{
    type: "scatter", mode: "markers", cliponaxis: false, x: bad.map(run => of.at[run]), y: bad.map(run => loss[run] <= edge ? loss[run] : edge),
    marker: marker(recipe, bad.map(run => symbolOf(recipe, loss[run], true, edge)), 9),
    text: bad.map(run => `${plain(recipe)}, seed ${plain(seedOf(panel, run))}<br>diverged, step ${stepWord(of.at[run])}, loss ${word(loss[run])}`),
    hovertemplate: "%{text}<extra></extra>",
  }] : [];
}

const curves = {
  title: "While training", tall: () => 930,
  plot(panel) {
    const {study} = panel, rate = rateOf(panel), [low, high] = together(panels().map(p => p.group.loss_limits));
    const sharp = signalOf(panel, "sharpness"), signal = signalOf(panel, "signal");
    const below = [["gradient norm", null], ...(sharp ? [[shorter(sharp), sharp]] : []), ...(signal ? [[shorter(signal), signal]] : [])];
    const opacity = Math.max(0.03, 0.16 * Math.min(1, 6 / recipesOf(panel).length)); // many bands lie on each other
    const bands = [], lines = [], marks = [], seen = below.map(() => []);
    for (const value of panel.group.entropy)
      lines.push({type: "scatter", mode: "lines", x: study.curves.span, y: [value, value], hoverinfo: "skip", line: {color: css("soft"), dash: "dot", width: 1.6}});
    for (const recipe of recipesOf(panel)) {
      const runs = panel.runs.filter(run => recipeOf(panel, run) === recipe && study.rate[run] === rate);
      if (!runs.length) continue;
      const place = ([a, b, line, ...stars]) => { bands.push(a, b); lines.push(line); marks.push(...stars); };
      place(bandAndLine(recipe, study.curves.steps, overSeeds(study.curves.train_loss, runs, study.curves.starts, study.curves.last), "y", high, opacity));
      below.forEach(([, of], i) => {
        const traces = of ? signalTraces(panel, of, recipe, runs, "y" + (i + 2), opacity)
          : bandAndLine(recipe, study.curves.steps, overSeeds(study.curves.grad_norm, runs, study.curves.starts, study.curves.last), "y" + (i + 2), Infinity, opacity);
        for (const trace of traces) seen[i].push(...trace.y);
        place(traces);
      });
      marks.push(...divergences(panel, recipe, runs, high));
    }
    // The loss has the most room; panels below share the rest, from the top down.
    const count = below.length, share = count === 1 ? 0.4 : count === 2 ? 0.27 : 0.2, gap = 0.06;
    const top = i => 1 - (1 - count * share) - i * share;
    const [start, end] = study.curves.span, bottom = "y" + (count + 1);
    const figure = layout(420 + 170 * count, {
      xaxis: axis("step", {anchor: bottom, range: [start - 0.005 * (end - start), (end > start ? end : start + 1) * 1.012]}),
      yaxis: axis("", {range: [low, high], domain: [count * share + gap / 2, 1]}),
      margin: {l: 48, r: 16, t: 26, b: 48},
    });
    // Over each panel what it shows: turned names would run into each other.
    const named = (text, y) => ({text: `<b>${text}</b>`, x: 0, y, xref: "paper", yref: "paper", xanchor: "left", yanchor: "bottom", showarrow: false, font: {size: 12.5}});
    figure.annotations = [named("training loss (nats/token)", 1), ...below.map(([title], i) => named(title, top(i) - gap / 2))];
    below.forEach(([, of], i) => {
      const values = seen[i].filter(v => v !== null && Number.isFinite(v)), positive = values.length && values.every(v => v > 0);
      figure["yaxis" + (i + 2)] = axis("", {domain: [Math.max(0, top(i) - share + (i === count - 1 ? 0 : gap / 2)), top(i) - gap / 2], ...(positive || !of ? logTicks(values) : {})});
    });
    return {data: [...bands, ...lines, ...marks], layout: figure};
  },
  note: panel => `Learning rate ${word(rateOf(panel), 3)}` + (rateOf(panel) === panel.group.reference ? ` (${panel.group.why})` : ""),
  table(panel) {
    const {study} = panel, rate = rateOf(panel), rows = [];
    const add = (run, what, steps, low, high, mean) => steps.forEach((step, i) => {
      if (Number.isFinite(low[i]) || Number.isFinite(high[i])) rows.push([recipeOf(panel, run), rate, seedOf(panel, run), what, step, low[i], high[i], mean ? mean[i] : null]);
    });
    for (const run of panel.runs.filter(run => study.rate[run] === rate)) {
      for (const name of ["train_loss", "grad_norm"]) add(run, name, study.curves.steps, ...["low", "high", "mean"].map(part => row(study.curves[name][part], run)));
      for (const of of [signalOf(panel, "sharpness"), signalOf(panel, "signal")]) if (of) add(run, of.name, of.steps, row(of.values, run), row(of.values, run), null);
    }
    return {head: ["recipe", "learning_rate", "seed", "variable", "step", "low", "high", "mean"], rows};
  },
  say(panel) {
    const rate = rateOf(panel);
    return `Training loss, gradient norm, sharpness and an alarm signal against the step, at learning rate ${word(rate, 3)}. ` + recipesOf(panel).map(recipe => cellOf(panel, recipe, rate))
      .filter(cell => cell.n).map(cell => `${cell.recipe}: mean final loss ${word(cell.loss, 3)}, ${cell.k} of ${cell.n} diverged`).join("; ") + ".";
  },
};

/** A signal's name in words, with its unit. */
function shorter(signal) {
  const units = signal.units && signal.units !== "1" ? ` (${signal.units})` : "";
  return spoken(signal.name) + units;
}
