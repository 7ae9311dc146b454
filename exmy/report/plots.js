// Figures by learning rate: heat maps, final losses, lead times, grids, layers. Each gives {data, layout} for plotly, a table of
// what is drawn, {head, rows}, and a sentence for who can't see it.

const heat = {
  title: "Divergence and loss", tall: (panel, width) => (width > 760 ? 100 : 250) + (width > 760 ? 30 : 60) * recipesOf(panel).length,
  plot(panel, width) {
    const recipes = recipesOf(panel), rates = ratesOf(panel);
    const cells = recipes.map(recipe => rates.map(rate => cellOf(panel, recipe, rate)));
    const wide = width > 760, beside = {xgap: 2, ygap: 2, showscale: false, x: rates.map(r => word(r, 3)), y: recipes.map(plain)};
    const said = cells.map(line => line.map(cell =>
      `${plain(cell.recipe)}, lr ${word(cell.rate, 3)}<br>${counted(cell)} diverged<br>mean final loss ${word(cell.loss)} nats/token`));
    const [low, high] = together(panels().map(p => p.group.final_limits));
    // Many rates leave a cell no room for three digits: the colour then says it, and the hover.
    const room = (wide ? width / 2 : width) / Math.max(1, rates.length) > 44;
    const one = {...beside, type: "heatmap", hovertext: said, hovertemplate: "%{hovertext}<extra></extra>"};
    // Under each other, two maps leave between them what turned labels and a title need.
    const height = 60 + 30 * recipes.length, between = 120, share = (height - 60) / (2 * (height - 60) + between), by = wide ? "by peak learning rate" : "by learning rate";
    const axes = (x, y, title, where) => ({
      ["xaxis" + x]: axis(title, {type: "category", showgrid: false, categoryorder: "array", categoryarray: beside.x, range: [-0.5, rates.length - 0.5], anchor: "y" + y, domain: where.x, tickangle: rates.length > 8 ? -60 : 0}),
      ["yaxis" + y]: axis("", {type: "category", showgrid: false, categoryorder: "array", categoryarray: beside.y, range: [recipes.length - 0.5, -0.5], anchor: "x" + x, domain: where.y, showticklabels: where.names, dtick: 1}),
    });
    return {
      data: [
        {...one, z: cells.map(line => line.map(c => c.n ? 100 * c.k / c.n : null)), zmin: 0, zmax: 100, colorscale: shares(),
          text: cells.map(line => line.map(c => c.n ? `${c.k}/${c.n}` : "")), texttemplate: room ? "%{text}" : ""},
        {...one, xaxis: "x2", yaxis: "y2", z: cells.map(line => line.map(c => Number.isFinite(c.loss) ? Math.min(c.loss, high) : null)),
          zmin: low, zmax: high, colorscale: blues(),
          text: cells.map(line => line.map(c => c.n ? Number.isFinite(c.loss) ? c.loss.toFixed(2) : "" : "")), texttemplate: room ? "%{text}" : ""},
      ],
      layout: layout(wide ? height + 40 : 2 * height + 130, {
        // A cell without a finite loss has no colour; a cross says that it has runs.
        annotations: cells.flatMap((line, i) => line.map((c, j) => ({c, i, j}))).filter(({c}) => c.n && !Number.isFinite(c.loss)).map(({i, j}) => ({
          text: "✕", x: j, y: i, xref: "x2", yref: "y2", showarrow: false, font: {color: css("bad")}})),
        ...axes("", "", `diverged, ${by}`, wide ? {x: [0, 0.49], y: [0, 1], names: true} : {x: [0, 1], y: [1 - share, 1], names: true}),
        ...axes("2", "2", `mean final loss, ${by}`, wide ? {x: [0.51, 1], y: [0, 1], names: false} : {x: [0, 1], y: [0, share], names: true}),
      }),
      click: point => ({recipe: recipes[point.pointIndex[0]], rate: rates[point.pointIndex[1]]}),
    };
  },
  table(panel) {
    const cells = recipesOf(panel).flatMap(recipe => ratesOf(panel).map(rate => cellOf(panel, recipe, rate))).filter(cell => cell.n);
    return {
      head: ["recipe", "learning_rate", "runs", "diverged", "rate_lower", "rate_upper", "mean_final_loss", "finite"],
      rows: cells.map(c => [c.recipe, c.rate, c.n, c.k, c.low, c.high, c.loss, c.finite]),
    };
  },
  say(panel) {
    const cells = recipesOf(panel).flatMap(recipe => ratesOf(panel).map(rate => cellOf(panel, recipe, rate))).filter(cell => cell.n);
    const worst = cells.reduce((a, b) => b.k / b.n > a.k / a.n ? b : a);
    return `Share of diverged runs and mean final loss of ${recipesOf(panel).length} recipes at ${ratesOf(panel).length} learning rates. `
      + (worst.k ? `Most diverged: ${worst.recipe} at ${word(worst.rate, 3)}, ${worst.k} of ${worst.n}.` : "No run diverged.") + " The table under it has the numbers.";
  },
};

const final = {
  title: "Final loss against learning rate", tall: () => 430,
  plot(panel, width) {
    const rates = ratesOf(panel), [low, high] = together(panels().map(p => p.group.final_limits));
    const above = high - 0.08 * (high - low), lost = high - 0.03 * (high - low);
    const spacing = rates.length > 1 ? Math.min(...rates.slice(1).map((rate, i) => Math.log(rate / rates[i]))) : 1;
    const data = panel.group.entropy.map(value => ({
      type: "scatter", mode: "lines", x: [rates[0] / 2, rates.at(-1) * 2], y: [value, value], hoverinfo: "skip", line: {color: css("soft"), dash: "dot", width: 1.6}}));
    for (const recipe of recipesOf(panel)) {
      const look = content.looks[recipe], aside = Math.exp(look.aside * Math.min(spacing, 1) * 0.8);
      const runs = panel.runs.filter(run => recipeOf(panel, run) === recipe), of = panel.study.run;
      const tried = rates.filter(rate => runs.some(run => panel.study.rate[run] === rate));
      const middles = tried.map(rate => median(runs.filter(run => panel.study.rate[run] === rate).map(run => of.final[run])));
      data.push({type: "scatter", mode: "lines", x: tried.map(r => r * aside), y: middles.map(m => m <= above ? m : null), hoverinfo: "skip",
        line: {color: colourOf(recipe), dash: look.dash, width: 2}});
      data.push({
        type: "scatter", mode: "markers", cliponaxis: false, x: runs.map(run => panel.study.rate[run] * aside),
        y: runs.map(run => Number.isFinite(of.final[run]) ? Math.min(of.final[run], above) : lost),
        marker: marker(recipe, runs.map(run => symbolOf(recipe, of.final[run], of.diverged[run], above))),
        text: runs.map(run => `${plain(recipe)}, seed ${plain(seedOf(panel, run))}<br>lr ${word(panel.study.rate[run], 3)}, final loss ${word(of.final[run])}${of.diverged[run] ? ", diverged" : ""}`),
        hovertemplate: "%{text}<extra></extra>",
      });
    }
    // Margins of our own: plotly's, which follow the labels, would not settle here.
    const across = rateAxis(rates, width);
    return {data, layout: layout(430, {margin: {l: 64, r: 16, t: 12, b: across.tickangle ? 96 : 56}, xaxis: across, yaxis: axis("final training loss (nats/token)", {range: [low, high], automargin: false})})};
  },
  table(panel) {
    const of = panel.study.run;
    return {
      head: ["recipe", "learning_rate", "seed", "final_loss", "diverged", "diverged_step"],
      rows: panel.runs.map(run => [recipeOf(panel, run), panel.study.rate[run], seedOf(panel, run), of.final[run], of.diverged[run], of.at[run]]),
    };
  },
  say(panel) {
    const best = recipesOf(panel).map(recipe => ratesOf(panel).map(rate => cellOf(panel, recipe, rate)).filter(c => c.n && Number.isFinite(c.loss))
      .reduce((a, b) => !a || b.loss < a.loss ? b : a, null)).filter(Boolean).map(c => `${c.recipe} ${word(c.loss, 3)} at ${word(c.rate, 3)}`);
    return "Final training loss of every run against its learning rate. " + (best.length ? `Lowest means: ${best.join("; ")}.` : "No loss is finite.");
  },
};

/** Signals with what their alarms did in the panel's runs; only those with a diverged run that could be judged. */
function alarmsOf(panel) {
  return panel.study.signals.map(signal => {
    const judged = panel.runs.filter(run => signal.judged[run]), failed = judged.filter(run => signal.failed[run]);
    const healthy = judged.filter(run => !signal.failed[run]), rang = run => Number.isFinite(signal.rang[run]);
    const warned = failed.filter(rang);
    return {signal, failed, healthy, warned, false_alarms: healthy.filter(rang).length, lead: median(warned.map(run => signal.lead[run]))};
  }).filter(of => of.failed.length);
}

/** The signals that warned of a run, those that warned of most first. */
const ranked = panel => alarmsOf(panel).filter(of => of.warned.length).sort((a, b) => b.warned.length / b.failed.length - a.warned.length / a.failed.length);

const lead = {
  title: "Lead times", tall: panel => 90 + 46 * ranked(panel).length,
  note(panel) {
    const silent = alarmsOf(panel).filter(of => !of.warned.length);
    return silent.length ? `Silent before every onset: ${silent.map(of => spoken(of.signal.name)).join("; ")}.` : "";
  },
  absent: panel => ranked(panel).length ? "" : alarmsOf(panel).length ? "No alarm rang before a run diverged." : panel.runs.some(run => panel.study.run.diverged[run])
    ? "No diverged run could be judged: of each recipe and learning rate, at least nine runs of other seeds that did not diverge are needed."
    : "No run diverged here: there is nothing to warn of.",
  plot(panel, width) {
    const found = ranked(panel);
    const name = of => { const text = spoken(of.signal.name); return text.length > 26 && width < 500 ? text.slice(0, 25) + "…" : text; };
    const labels = found.map(of => `${plain(name(of))}<br><span style="font-size:11px">${of.warned.length}/${of.failed.length} warned, ${of.false_alarms}/${of.healthy.length} false</span>`);
    const data = recipesOf(panel).map(recipe => {
      const points = found.flatMap((of, i) => of.warned.filter(run => recipeOf(panel, run) === recipe).map((run, j) => ({of, i, run, j})));
      return {
        type: "scatter", mode: "markers", marker: marker(recipe, content.looks[recipe].symbol, 7),
        x: points.map(p => p.of.signal.lead[p.run]), y: points.map(p => p.i + 0.5 * content.looks[recipe].aside + 0.03 * (p.j % 5 - 2)),
        text: points.map(p => `${plain(p.of.signal.label)}<br>${plain(recipe)}, lr ${word(panel.study.rate[p.run], 3)}, seed ${plain(seedOf(panel, p.run))}<br>rang at step ${stepWord(p.of.signal.rang[p.run])}, ${stepWord(p.of.signal.lead[p.run])} steps before`),
        hovertemplate: "%{text}<extra></extra>",
      };
    });
    const middles = found.map((of, i) => ({x: of.lead, i})).filter(m => Number.isFinite(m.x));
    data.push({type: "scatter", mode: "markers", x: middles.map(m => m.x), y: middles.map(m => m.i),
      text: middles.map(m => `median ${stepWord(m.x)} steps`), hovertemplate: "%{text}<extra></extra>",
      marker: {symbol: "line-ns-open", size: 26, color: css("ink"), line: {width: 2.5, color: css("ink")}}});
    return {data, layout: layout(90 + 46 * found.length, {
      xaxis: axis(width < 500 ? "steps before" : "steps before the onset", {rangemode: "tozero"}),
      yaxis: axis("", {tickvals: found.map((_, i) => i), ticktext: labels, range: [found.length - 0.4, -0.6]}),
    })};
  },
  table(panel) {
    return {
      head: ["signal", "recipe", "learning_rate", "seed", "diverged", "alarm_step", "lead_steps"],
      rows: panel.study.signals.flatMap(signal => panel.runs.filter(run => signal.judged[run]).map(run =>
        [signal.name, recipeOf(panel, run), panel.study.rate[run], seedOf(panel, run), signal.failed[run], signal.rang[run], signal.lead[run]])),
    };
  },
  say: panel => "Steps from each signal's alarm to the onset of divergence. " + alarmsOf(panel).map(of =>
    `${of.signal.name}: ${of.warned.length} of ${of.failed.length} diverged runs warned, median ${stepWord(of.lead)} steps`).join("; ") + ".",
};

const TINY = 1e-7; // where a logarithmic scale of shares and errors ends

/** Where the columns of a heat map begin and end: halfway between steps, within what was trained. */
function edges(steps, [start, end]) {
  if (steps.length === 1) return [start, Math.max(end, start + 1)];
  const inner = steps.slice(1).map((step, i) => (steps[i] + step) / 2), half = (steps.at(-1) - steps.at(-2)) / 2;
  return [Math.max(start, 2 * steps[0] - inner[0]), ...inner, Math.max(Math.min(end, steps.at(-1) + half), steps.at(-1))];
}

/** The mean over units whose runs are shown, [step][tensor], of a measure and role; `part` where a unit has other runs too. */
function layerMeans(panel, recipe) {
  const {units, measures, tensors, roles, steps} = panel.study.layers;
  const measure = measures.find(m => m.name === state.measure) ?? measures[0], role = Math.max(0, roles.indexOf(state.role));
  const shown = new Set(panel.runs.filter(run => recipeOf(panel, run) === recipe && panel.study.rate[run] === rateOf(panel)));
  const chosen = units.map((runs, i) => ({i, all: runs.every(run => shown.has(run)), any: runs.some(run => shown.has(run))})).filter(u => u.any);
  const sum = tensors.map(() => new Float64Array(steps.length)), count = tensors.map(() => new Float64Array(steps.length));
  for (const {i} of chosen) {
    const values = row(measure.values, i);
    for (let t = 0; t < steps.length; t++) for (let l = 0; l < tensors.length; l++) {
      const value = values[(t * tensors.length + l) * roles.length + role];
      if (!Number.isNaN(value)) { sum[l][t] += value; count[l][t] += 1; }
    }
  }
  return {measure, role: roles[role], means: sum.map((line, l) => [...line].map((s, t) => count[l][t] ? s / count[l][t] : NaN)), part: chosen.some(u => !u.all), runs: shown.size};
}

/** The places of the tensors that the panel's runs have. */
const tensorsOf = (panel, found) => panel.study.layers.tensors.map((_, l) => l).filter(l => found.some(of => of.means[l].some(Number.isFinite)));

const layers = {
  title: "Layers", tall: () => 300,
  absent: panel => panel.study.layers ? "" : panel.study.without_layers,
  plot(panel, width) {
    const {steps} = panel.study.layers, columnEdges = edges(steps, panel.study.curves.span);
    const found = recipesOf(panel).map(recipe => ({recipe, ...layerMeans(panel, recipe)})).filter(of => of.means.some(line => line.some(Number.isFinite)));
    const places = tensorsOf(panel, found), tensors = places.map(l => panel.study.layers.tensors[l]);
    const columns = width > 900 && found.length > 1 ? 2 : 1, rows = Math.max(1, Math.ceil(found.length / columns));
    const each = 40 + 15 * tensors.length, gap = 46, height = rows * (each + gap) + 30;
    const figure = {data: [], layout: layout(height, {annotations: []})};
    // Rows of equal height from the top, each with its recipe's name over it.
    // Zero has the lowest colour, a decade below the least that is there.
    const all = found.flatMap(of => of.means.flat()).filter(v => v > 0 && Number.isFinite(v)).map(v => Math.log10(Math.max(v, TINY))), none = found.some(of => of.means.some(line => line.includes(0)));
    const lowest = all.length ? Math.floor(Math.min(...all) + 1e-9) : -1, low = none ? lowest - 1 : lowest, high = all.length ? Math.max(Math.ceil(Math.max(...all)), low + 1) : 0;
    found.forEach((of, i) => {
      const n = i ? String(i + 1) : "", column = i % columns, line = Math.floor(i / columns);
      const inner = height - 60, top = 1 - (line * (each + gap) + 20) / inner, bottom = Math.max(0, 1 - (line * (each + gap) + 20 + each - 10) / inner);
      const x = columns === 2 ? [column * 0.53, column * 0.53 + 0.43] : [0, 0.9];
      figure.data.push({
        type: "heatmap", x: columnEdges, y: tensors.map(plain), xaxis: "x" + n, yaxis: "y" + n, coloraxis: "coloraxis",
        z: places.map(l => of.means[l].map(v => Number.isFinite(v) ? v > 0 ? Math.log10(Math.max(v, TINY)) : low : null)),
        customdata: places.map(l => of.means[l].map((v, t) => `step ${stepWord(steps[t])}: ${word(v, 3)}`)),
        hovertemplate: `${plain(of.recipe)}, %{y}<br>%{customdata}<extra></extra>`,
      });
      figure.layout["xaxis" + n] = axis(line === rows - 1 || i + columns >= found.length ? "step" : "", {domain: x, anchor: "y" + n, showgrid: false});
      figure.layout["yaxis" + n] = axis("", {domain: [bottom, top], anchor: "x" + n, type: "category", autorange: "reversed", showgrid: false, dtick: 1, tickfont: {size: 10.5}});
      figure.layout.annotations.push({text: `<b>${plain(of.recipe)}</b>`, x: x[0], y: top, xref: "paper", yref: "paper", xanchor: "left", yanchor: "bottom", showarrow: false});
    });
    const ticks = Array.from({length: high - low + 1}, (_, i) => low + i);
    figure.layout.coloraxis = {colorscale: blues(), cmin: low, cmax: high, colorbar: {
      tickvals: ticks, ticktext: ticks.map(t => none && t === low ? "0" : word(10 ** t)), thickness: 12, outlinewidth: 0, x: 1, len: Math.min(1, 260 / height), y: 1, yanchor: "top"}};
    return figure;
  },
  note: panel => recipesOf(panel).some(recipe => layerMeans(panel, recipe).part)
    ? "The page holds these as means over all seeds: there are too many runs to hold each." : "",
  table(panel) {
    const {tensors, steps} = panel.study.layers;
    const rows = recipesOf(panel).flatMap(recipe => {
      const {measure, role, means} = layerMeans(panel, recipe);
      return tensors.flatMap((tensor, l) => steps.map((step, t) => [recipe, rateOf(panel), measure.name, role, tensor, step, means[l][t]]));
    });
    return {head: ["recipe", "learning_rate", "measure", "operand", "tensor", "step", "mean"], rows: rows.filter(of => Number.isFinite(of[6]))};
  },
  say(panel) {
    const of = layerMeans(panel, recipesOf(panel)[0]);
    return `${of.measure.label} of the ${of.role} of each layer over training, by recipe, at learning rate ${word(rateOf(panel), 3)}. The CSV has the numbers.`;
  },
};

/** The formats of the recipes that are shown, of a study. */
function formatsOf(panel) {
  const names = new Set(recipesOf(panel).flatMap(recipe => panel.study.recipes[recipe]?.formats ?? []));
  return Object.values(panel.study.formats ?? {}).filter(f => names.has(f.name));
}

const grids = {
  title: "Grids", once: true, tall: panel => 80 + 38 * formatsOf(panel).length,
  absent: panel => formatsOf(panel).length ? "" : "The formats of these recipes are not known to this version.",
  plot(panel) {
    const formats = formatsOf(panel), data = [];
    const ink = css("high");
    formats.forEach((f, i) => {
      if (f.values.length) for (const [values, opacity] of [[f.values.filter(v => v >= f.normal), 1], [f.values.filter(v => v < f.normal), 0.45]])
        data.push({type: "scatter", mode: "markers", x: values, y: values.map(() => i), opacity, hovertemplate: `${f.name}: %{x}<extra></extra>`,
          marker: {symbol: "line-ns-open", size: 22, color: ink, line: {width: 1.1, color: ink}}});
      else for (const [from, to, opacity] of [[f.smallest, f.normal, 0.3], [f.normal, f.largest, 0.7]])
        data.push({type: "scatter", mode: "lines", x: [from, to], y: [i, i], opacity, line: {width: 18, color: ink},
          hovertemplate: `${f.name}: ${word(f.smallest)} to ${word(f.largest)}<extra></extra>`});
    });
    const low = Math.floor(Math.log2(Math.min(...formats.map(f => f.smallest)))) - 1, high = Math.ceil(Math.log2(Math.max(...formats.map(f => f.largest)))) + 1;
    const every = [1, 2, 4, 8, 16, 32, 64].find(step => (high - low) / step <= 12) ?? 128;
    const powers = []; for (let e = Math.ceil(low / every) * every; e <= high; e += every) powers.push(e);
    return {data, layout: layout(80 + 38 * formats.length, {
      xaxis: axis("magnitude (log scale)", {type: "log", range: [low * Math.log10(2), high * Math.log10(2)], tickvals: powers.map(e => 2 ** e), ticktext: powers.map(e => `2<sup>${e}</sup>`)}),
      yaxis: axis("", {tickvals: formats.map((_, i) => i), ticktext: formats.map(f => `${f.name}, ${f.bits} bits`), range: [formats.length - 0.4, -0.6], showgrid: false}),
    })};
  },
  table: panel => ({
    head: ["format", "bits", "positive_value"],
    rows: formatsOf(panel).flatMap(f => (f.values.length ? f.values : [f.smallest, f.normal, f.largest]).map(v => [f.name, f.bits, v])),
  }),
  say: panel => "Positive values of each format. " + formatsOf(panel).map(f => `${f.name}: ${f.bits} bits, ${word(f.smallest)} to ${word(f.largest)}`).join("; ") + ".",
};
