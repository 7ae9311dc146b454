// Pictures that are SVG of our own: the small multiple of the verdicts, and recipes as diagrams. Colours are written into them, so that
// a picture that is saved looks as it did.

const TALL = 208; // pixels, of a product of a recipe

/** Text cut to a width in pixels, roughly: 0.56 em a character. */
const fit = (text, width, size = 12) => text.length * size * 0.56 > width ? text.slice(0, Math.max(1, Math.floor(width / size / 0.56) - 1)) + "…" : text;

function words(x, y, text, more = {}) {
  return draw("text", {x, y, "font-size": 12, "font-family": FONT, fill: css("ink"), ...more}, text);
}

/** Where values lie between x and x + width; low and high are the ends of the axis. */
const scaled = (low, high, x, width) => value => x + width * (Math.min(Math.max(value, low), high) - low) / (high - low || 1);

const multiple = {
  title: "Stable window, divergence rate, loss penalty", tall: (panel, width) => (width < 640 ? 3 : 1) * (74 + 36 * multiple.cards(panel).length),
  note: panel => `Grey: ${panel.study.baseline}, the baseline. Lines: 95 % intervals.`,
  cards: panel => panel.group.verdicts.cards.filter(card => !state.keep.recipe || state.keep.recipe.has(card.recipe)),
  absent: panel => multiple.cards(panel).length ? "" : "No recipe beside the baseline is chosen.",
  svg(panel, width) {
    const cards = multiple.cards(panel), base = panel.group.verdicts.baseline, stacked = width < 640;
    const name = Math.min(stacked ? Math.max(118, 0.45 * width) : 190, 46 + 7 * Math.max(...cards.map(card => card.recipe.length))), inner = width - name - 20, each = stacked ? inner : (inner - 48) / 3, line = 36, block = 30 + line * cards.length + 44;
    const svg = draw("svg", {xmlns: "http://www.w3.org/2000/svg", width, height: stacked ? 3 * block : block, viewBox: `0 0 ${width} ${stacked ? 3 * block : block}`});
    svg.append(draw("rect", {width: "100%", height: "100%", fill: css("paper")}));
    [windows, divergenceRates, penalties].forEach((part, i) => {
      const x = name + (stacked ? 0 : i * (each + 24)), y = stacked ? i * block : 0;
      part(svg, panel, cards, base, x, y, each, line);
      if (stacked || i === 0) cards.forEach((card, j) => svg.append(
        words(20, y + 30 + line * j + 20, fit(card.recipe, name - 26)), words(2, y + 30 + line * j + 20, content.looks[card.recipe].sign, {fill: colourOf(card.recipe)})));
    });
    return svg;
  },
  table(panel) {
    const base = panel.group.verdicts.baseline, keys = Object.keys(base);
    const line = (recipe, verdict, numbers) => { const c = ofSeeds(panel, recipe, base.learning_rate); return [recipe, verdict, ...keys.map(key => numbers[key]), c.n, c.k, c.low, c.high]; };
    return {
      head: ["recipe", "verdict", ...keys, "chosen_runs", "chosen_diverged", "chosen_rate_low", "chosen_rate_high"],
      rows: [...multiple.cards(panel).map(card => line(card.recipe, card.state, card.numbers)), line(panel.study.baseline, "baseline", base)],
    };
  },
  say: panel => "Of each recipe against the baseline: stable window of learning rates, share of diverged runs and loss penalty, each with its interval. The numbers stand under each verdict.",
};

/** Runs of a recipe at a learning rate, of the seeds that are chosen, whatever recipes are. */
function ofSeeds(panel, recipe, rate) {
  const runs = panel.group.runs.filter(run => !state.keep.seed || state.keep.seed.has(seedOf(panel, run)));
  return cellOf({...panel, runs}, recipe, rate);
}

/** A part's title, its grid lines with labels, and a faint line under each recipe. */
function frame(svg, title, unit, ticks, x, y, width, rows, line) {
  svg.append(words(x, y + 14, title, {"font-weight": 600}));
  const bottom = y + 30 + line * rows;
  svg.append(words(x + width / 2, bottom + 31, unit, {"text-anchor": "middle", "font-size": 11, fill: css("soft")}));
  let free = -Infinity;
  for (const [at, label] of ticks) {
    svg.append(draw("line", {x1: at, x2: at, y1: y + 22, y2: bottom, stroke: css("line")}));
    const half = label.length * 3.2;
    if (at - half > free) { svg.append(words(at, bottom + 15, label, {"text-anchor": "middle", "font-size": 11, fill: css("soft")})); free = at + half + 4; }
  }
}

function windows(svg, panel, cards, base, x, y, width, line) {
  const rates = [...new Set(panel.group.runs.map(run => panel.study.rate[run]))].sort((a, b) => a - b), [low, high] = [Math.log(rates[0]), Math.log(rates.at(-1))];
  const at = scaled(low - 0.2, high + 0.2, x, width), place = rate => at(Math.log(rate));
  frame(svg, "Stable window", "peak learning rate", rates.map(rate => [place(rate), word(rate, 2)]), x, y, width, cards.length, line);
  cards.forEach((card, i) => {
    const top = y + 30 + line * i;
    for (const [of, colour, shift, height] of [[base, css("soft"), 6, 6], [card.numbers, colourOf(card.recipe), 15, 11]]) {
      if (!Number.isFinite(of.window_lowest ?? NaN)) { svg.append(words(x + 4, top + shift + 8, of === base ? "" : "none", {"font-size": 11})); continue; }
      const [from, to] = [place(of.window_lowest), place(of.window_highest)];
      svg.append(draw("rect", {x: from - 3, y: top + shift, width: to - from + 6, height, rx: 2, fill: colour, opacity: of === base ? 0.55 : 1}));
      // A window that reaches the end of what was tried may go on.
      if (of.window_censored_above && of !== base) svg.append(words(to + 5, top + shift + 9, "→", {fill: colour}));
      if (of.window_censored_below && of !== base) svg.append(words(from - 16, top + shift + 9, "←", {fill: colour}));
    }
  });
}

/** A point with its interval; the baseline's thin and grey above it. */
function interval(svg, place, y, [value, low, high], colour, thick) {
  if (value === null || value === undefined) return;
  if (low !== null && high !== null) svg.append(draw("line", {x1: place(low), x2: place(high), y1: y, y2: y, stroke: colour, "stroke-width": thick ? 2.6 : 1.6}));
  svg.append(draw("circle", {cx: place(value), cy: y, r: thick ? 4.5 : 3, fill: colour}));
}

function divergenceRates(svg, panel, cards, base, x, y, width, line) {
  const place = scaled(0, 1, x + 6, width - 12), rate = base.learning_rate;
  frame(svg, rate === null ? "Diverged" : `Diverged at ${word(rate, 3)}`, state.keep.seed ? "share of runs, chosen seeds" : "share of runs", [0, 0.25, 0.5, 0.75, 1].map(v => [place(v), percent(v)]), x, y, width, cards.length, line);
  cards.forEach((card, i) => {
    // Of all seeds it is the verdict's number; of some, as in the heat map, the same interval of theirs.
    const top = y + 30 + line * i, some = recipe => { const c = ofSeeds(panel, recipe, rate); return [c.n ? c.k / c.n : null, c.low, c.high]; };
    const of = (recipe, numbers) => state.keep.seed ? some(recipe) : [numbers.rate, numbers.rate_low, numbers.rate_high];
    interval(svg, place, top + 10, of(panel.study.baseline, base), css("soft"), false);
    interval(svg, place, top + 22, of(card.recipe, card.numbers), colourOf(card.recipe), true);
  });
}

function penalties(svg, panel, cards, base, x, y, width, line) {
  const ends = panels().flatMap(p => p.group.verdicts.cards).flatMap(c => [c.numbers.loss_penalty, c.numbers.loss_penalty_low, c.numbers.loss_penalty_high])
    .filter(v => v !== null && typeof v === "number");
  // One recipe that loses nats would press all others onto zero: the axis ends at what the middle half needs, at most tenfold.
  const size = ends.map(Math.abs).sort((a, b) => a - b), end = Math.max(1e-3, Math.min(size.at(-1) ?? 0, 10 * (size[size.length >> 1] ?? 1)));
  const low = Math.min(...ends, 0) < 0 ? Math.max(Math.min(...ends), -end) : 0, place = scaled(low, end, x + 8, width - 16);
  const step = [1, 2, 5].flatMap(m => [-4, -3, -2, -1, 0, 1].map(e => m * 10 ** e)).sort((a, b) => a - b).find(s => (end - low) / s <= 4) ?? end;
  const ticks = []; for (let v = Math.ceil(low / step) * step; v <= end + 1e-12; v += step) ticks.push([place(v), String(+v.toPrecision(3))]);
  frame(svg, "Loss penalty", "nats/token", ticks, x, y, width, cards.length, line);
  svg.append(draw("line", {x1: place(0), x2: place(0), y1: y + 22, y2: y + 30 + line * cards.length, stroke: css("soft"), "stroke-width": 1.5}));
  cards.forEach((card, i) => {
    const {loss_penalty: value, loss_penalty_low: a, loss_penalty_high: b} = card.numbers, top = y + 30 + line * i;
    if (value === null) { svg.append(words(place(0) + 6, top + 20, "no pair", {"font-size": 11, fill: css("soft")})); return; }
    interval(svg, place, top + 16, [value, a, b], colourOf(card.recipe), true);
    if (value > end) svg.append(words(place(end) + 6, top + 20, "→", {fill: colourOf(card.recipe)}));
  });
}

const recipe = {
  title: "Recipe", tall: (panel, width, of) => panel.study.recipes[of].places.length * (26 + TALL * Math.ceil(3 / Math.max(1, Math.min(3, Math.floor(width / 330))))),
  svg(panel, width, of) {
    const across = Math.max(1, Math.min(3, Math.floor(width / 330))), size = Math.min(420, width / across), tall = TALL;
    const diagram = panel.study.recipes[of], rows = diagram.places.length * Math.ceil(3 / across);
    const height = rows * tall + diagram.places.length * 26;
    const svg = draw("svg", {xmlns: "http://www.w3.org/2000/svg", width, height, viewBox: `0 0 ${width} ${height}`});
    svg.append(draw("rect", {width: "100%", height: "100%", fill: css("paper")}));
    let y = 0;
    for (const place of diagram.places) {
      svg.append(words(0, y + 16, capital(place.names.join(", ")), {"font-weight": 600}));
      place.products.forEach((product, i) => drawProduct(svg, product, (i % across) * size, y + 26 + Math.floor(i / across) * tall, size - 14, colourOf(of)));
      y += 26 + Math.ceil(3 / across) * tall;
    }
    return svg;
  },
  table: (panel, of) => ({
    head: ["recipe", "places", "product", "operand", "format", "rounding", "scale", "rotation", "carrier", "sums", "output"],
    rows: panel.study.recipes[of].places.flatMap(place => place.products.flatMap(p => p.operands.map(o =>
      [of, place.names.join(" + "), p.name, o.role, o.format, o.rounding, o.scale, o.rotated, p.carrier, p.summed, p.output]))),
  }),
  say: (panel, of) => `${of}. ` + panel.study.recipes[of].places.map(place => `${place.names.join(", ")}: ` + place.products.map(p =>
    `${p.equation} of ${p.operands.map(o => `${o.role} in ${o.format}`).join(" and ")}, multiplied in ${p.carrier}, ${p.summed}, result in ${p.output}`).join("; ")).join(". ") + ".",
};

const capital = text => text.charAt(0).toUpperCase() + text.slice(1);

/** Two operands in boxes, the product that they go into, and what comes out. */
function drawProduct(svg, product, x, y, width, colour) {
  const box = (width - 16) / 2, middle = x + width / 2;
  product.operands.forEach((operand, i) => {
    const left = x + i * (box + 16);
    const [element, ...scales] = operand.format.split("@");
    const lines = [scales.length ? "@" + scales.join("@") : "", operand.rounding, operand.scale, operand.rotated].filter(Boolean);
    svg.append(draw("rect", {x: left + 1, y: y + 1, width: box - 2, height: 102, rx: 6, fill: css("panel"), stroke: colour, "stroke-width": 1.6}));
    svg.append(words(left + 10, y + 20, `${operand.letter}  ${operand.role}`, {"font-size": 12, fill: css("soft")}));
    svg.append(words(left + 10, y + 40, fit(element, box - 18, 15), {"font-size": 14, "font-weight": 600}));
    lines.slice(0, 4).forEach((text, j) => svg.append(words(left + 10, y + 55 + 14 * j, fit(text, box - 16, 11), {"font-size": 11})));
    svg.append(draw("path", {d: `M ${left + box / 2} ${y + 103} V ${y + 118}`, stroke: css("soft"), "stroke-width": 1.5, fill: "none"}));
  });
  svg.append(draw("rect", {x: x + 1, y: y + 118, width: width - 2, height: 46, rx: 6, fill: css("paper"), stroke: css("soft")}));
  svg.append(words(middle, y + 137, product.equation, {"font-size": 14, "font-weight": 600, "text-anchor": "middle"}));
  svg.append(words(middle, y + 155, fit(`in ${product.carrier}, ${product.summed}`, width - 16, 11), {"font-size": 11, "text-anchor": "middle"}));
  svg.append(draw("path", {d: `M ${middle} ${y + 164} v 14 m -4 -5 l 4 5 l 4 -5`, stroke: css("soft"), "stroke-width": 1.5, fill: "none"}));
  svg.append(words(middle, y + 194, `${product.result} in ${product.output}`, {"text-anchor": "middle"}));
}
