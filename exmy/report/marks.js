// What all pictures share: colours of the theme, axes, numbers in words, elements.

const css = name => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
const isDark = () => getComputedStyle(document.documentElement).colorScheme === "dark";
const colourOf = recipe => content.looks[recipe][isDark() ? "dark" : "light"];
const FONT = "system-ui, sans-serif";

/** A signal's name in words: its epsilon or radius after a comma, the first eigenvalue's rank left out. */
function spoken(name) {
  return name.replaceAll("_", " ").replace(" at epsilon ", ", ε\u00a0").replace(" at rho ", ", ρ\u00a0").replace(/ at rank 0$/, "");
}

/** A number in few digits, "–" where there is none. */
function word(value, digits = 4) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  return Number.isFinite(value) ? String(+value.toPrecision(digits)) : value > 0 ? "∞" : "−∞";
}
/** A step, or how many, to the last digit: 12345, and 12345.5 halfway between two. */
const stepWord = value => Number.isFinite(value) ? String(+value.toFixed(1)) : word(value);
const percent = share => Number.isFinite(share) ? Math.round(100 * share) + " %" : "–";
const counted = cell => cell.n ? `${cell.k}/${cell.n} [${Math.round(100 * cell.low)}–${Math.round(100 * cell.high)} %]` : "no run";

/** Text that plotly won't read as markup. */
const plain = text => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

/** An HTML element with attributes and children; text is text and never markup. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null) element.setAttribute(name, value);
  }
  element.append(...children.filter(child => child !== null));
  return element;
}

/** The same in SVG. */
function draw(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== null) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function axis(title, more = {}) {
  return {
    title: {text: title, standoff: 8, font: {size: 13}}, gridcolor: css("line"), zeroline: false, linecolor: css("soft"),
    ticks: "outside", ticklen: 4, tickcolor: css("soft"), automargin: true, ...more,
  };
}

function layout(height, more = {}) {
  return {
    height, margin: {l: 56, r: 16, t: 12, b: 48}, showlegend: false, hovermode: "closest", dragmode: "zoom",
    paper_bgcolor: css("paper"), plot_bgcolor: css("paper"), font: {family: FONT, size: 12.5, color: css("ink")},
    hoverlabel: {bgcolor: css("panel"), bordercolor: css("soft"), font: {family: FONT, color: css("ink")}}, ...more,
  };
}

/** Colours of a share from 0 to 1, a step from none to the first, so that one run of thirty is seen. */
const shares = () => [[0, css("none")], [0.001, css("few")], [0.5, css("half")], [1, css("all")]];
const blues = () => [[0, css("low")], [1, css("high")]];

/** A logarithmic axis with a label at each power of ten, or at 1, 2 and 5 times it where there are few. */
function logTicks(values) {
  const positive = values.filter(v => v > 0 && Number.isFinite(v));
  let low = Infinity, high = -Infinity;
  for (const v of positive) { low = Math.min(low, v); high = Math.max(high, v); }
  if (low > high) { low = 1; high = 10; }
  [low, high] = [Math.log10(low), Math.log10(high)];
  const every = Math.max(1, Math.ceil((high - low) / 5)), factors = high - low < 2 ? [1, 2, 5] : [1];
  const tickvals = [];
  for (let decade = Math.floor(low) - 1; decade <= Math.ceil(high) + 1; decade++)
    if (decade % every === 0) for (const factor of factors) tickvals.push(factor * 10 ** decade);
  const pad = 0.06 * Math.max(high - low, 0.1);
  return {type: "log", tickvals, ticktext: tickvals.map(v => String(+v.toPrecision(3))), range: [low - pad, high + pad]};
}

/** An axis of learning rates: labels at the rates that were tried, as far as there is room for them in a width. */
function rateAxis(rates, width) {
  const spacing = rates.length > 1 ? Math.min(...rates.slice(1).map((rate, i) => Math.log10(rate / rates[i]))) : 0.3;
  const range = [Math.log10(rates[0]) - spacing / 2, Math.log10(rates.at(-1)) + spacing / 2];
  // Turned labels, a line's height apart; the last one first, since high rates are asked about.
  const pixel = (range[1] - range[0]) / Math.max(1, width - 100), apart = 26 * pixel, shown = [];
  for (const rate of [...rates].reverse()) if (!shown.length || Math.log10(shown.at(-1) / rate) >= apart) shown.push(rate);
  shown.reverse();
  // Turned here and not by plotly, which changes its mind back and forth where there is just room.
  const labels = shown.map(rate => word(rate, 3)), wide = 8 * Math.max(...labels.map(label => label.length)) * pixel;
  const turned = shown.slice(1).some((rate, i) => Math.log10(rate / shown[i]) < wide);
  return axis("peak learning rate (log scale)", {type: "log", tickvals: shown, ticktext: labels, range, tickangle: turned ? -60 : 0, automargin: false});
}

/** Of limits that panels beside each other share: the least and the greatest. */
const together = limits => [Math.min(...limits.map(l => l[0])), Math.max(...limits.map(l => l[1]))];

/** Markers that say what became of runs: open, diverged; a cross, not finite; a triangle, above the axis. */
function symbolOf(recipe, loss, diverged, edge) {
  if (!Number.isFinite(loss)) return "x-thin-open";
  if (loss > edge) return "triangle-up";
  return content.looks[recipe].symbol + (diverged ? "-open" : "");
}
const marker = (recipe, symbols, size = 8) => ({
  symbol: symbols, size, color: colourOf(recipe), line: {width: 1.5, color: colourOf(recipe)}, opacity: 0.9,
});
const faint = (colour, share) => colour + Math.round(255 * share).toString(16).padStart(2, "0");
