// Figures in the page: a frame a panel, drawn when it comes near the view, redrawn when what it shows has changed, and saved.

const FIGURES = {multiple, heat, curves, lead, final, layers, grids, recipe};
const frames = new Map(); // by slot and key
const near = new IntersectionObserver(seen => {
  for (const entry of seen) { const frame = entry.target.frame; frame.near = entry.isIntersecting; refresh(frame); }
}, {rootMargin: "500px"});

/** The panels of a kind of figure: one a group; one a study for what groups share; for recipes one each. */
function wanted(name) {
  const all = panels();
  if (!FIGURES[name].once && name !== "recipe") return all.map(panel => ({panel, key: panel.key, label: labelOf(panel)}));
  const studies = new Map(all.map(panel => [panel.s, panel]));
  const together = s => ({...studies.get(s), runs: all.filter(panel => panel.s === s).flatMap(panel => panel.runs)});
  const named = panel => content.studies.length > 1 ? panel.study.name : "";
  return [...studies.keys()].map(together).flatMap(panel => name !== "recipe" ? [{panel, key: String(panel.s), label: named(panel)}]
    : recipesOf(panel).filter(of => panel.study.recipes[of]).map(of => ({panel, of, key: panel.s + "." + of, label: [named(panel), of].filter(Boolean).join(", ")})));
}

/** Make, keep or take away frames so that each slot has one for every panel that is wanted, and draw those near the view. */
function rebuild() {
  const shown = panels();
  for (const slot of document.querySelectorAll(".slots")) fill(slot, slot.dataset.figure, wanted(slot.dataset.figure));
  for (const group of document.querySelectorAll(".group")) {
    const panel = shown.find(p => p.key === group.dataset.study + "." + group.dataset.group);
    group.hidden = !panel;
    for (const item of group.querySelectorAll(".verdicts [data-recipe], .tally [data-recipe]")) item.hidden = state.keep.recipe != null && !state.keep.recipe.has(item.dataset.recipe);
    for (const line of group.querySelectorAll(".tally > div")) line.hidden = !line.querySelector("[data-recipe]:not([hidden])");
    const slot = group.querySelector("[data-slot]");
    if (slot) fill(slot, slot.dataset.slot, panel ? [{panel, key: panel.key, label: ""}] : []);
  }
  document.getElementById("nothing").hidden = shown.length > 0;
  document.getElementById("verdict-note").hidden = state.keep.seed == null;
  const count = shown.reduce((sum, panel) => sum + panel.runs.length, 0), all = content.studies.reduce((sum, study) => sum + study.finished, 0);
  document.getElementById("count").textContent = count < all ? `${count} of ${all} runs` : all === 1 ? "1 run" : `all ${all} runs`;
}

function fill(slot, name, list) {
  const keep = new Set(list.map(item => item.key));
  for (const element of [...slot.children]) if (!keep.has(element.frame.key)) { near.unobserve(element); frames.delete(name + " " + element.frame.key); element.remove(); }
  slot.style.setProperty("--columns", content.studies.length);
  list.forEach((item, place) => {
    const id = name + " " + item.key;
    if (!frames.has(id)) frames.set(id, newFrame(name, item));
    const frame = frames.get(id);
    Object.assign(frame, item, {stale: true});
    frame.element.style.setProperty("--column", item.panel.s + 1);
    if (slot.children[place] !== frame.element) slot.insertBefore(frame.element, slot.children[place] ?? null);
    // Room for what will be drawn, so that nothing moves when it is.
    const drawn = frame.plot.childElementCount > 0, absent = FIGURES[name].absent?.(item.panel);
    frame.plot.style.minHeight = drawn || absent ? "0" : (FIGURES[name].tall?.(item.panel, slot.clientWidth / (innerWidth > 900 ? content.studies.length : 1), item.of) ?? 120) + "px";
    refresh(frame);
  });
}

function newFrame(name, {key, label, of}) {
  const frame = {name, key, near: false, stale: true};
  const save = kind => make("button", {type: "button", "aria-label": `Save ${FIGURES[name].title} ${label} as ${kind}`, onclick: () => saveAs(frame, kind)}, kind);
  frame.tools = make("span", {class: "tools"}, save("PNG"), save("SVG"), save("CSV"));
  frame.note = make("span", {class: "soft"});
  frame.plot = make("div", {class: "plot", role: "img"});
  frame.after = make("div");
  frame.title = make("span", {}, make("b", {}, label), " ", frame.note);
  frame.element = make("figure", {"data-name": name, "data-key": key, ...(of ? {"data-recipe": of} : {})}, make("figcaption", {}, frame.title, frame.tools), frame.plot, frame.after);
  frame.element.frame = frame;
  near.observe(frame.element);
  return frame;
}

const refresh = frame => { if (frame.near && frame.stale) show(frame); };

/** Draw a frame as things stand. */
function show(frame) {
  const kind = FIGURES[frame.name], {panel} = frame, absent = kind.absent?.(panel) ?? "";
  frame.stale = false;
  frame.tools.hidden = absent !== "";
  frame.note.textContent = absent ? "" : kind.note?.(panel) ?? "";
  frame.plot.setAttribute("aria-label", absent || kind.say(panel, frame.of));
  if (absent) {
    if (frame.plot.data) Plotly.purge(frame.plot);
    frame.plot.style.height = "auto";
    frame.plot.replaceChildren(make("p", {class: "soft"}, absent));
    frame.after.replaceChildren();
    return;
  }
  const width = frame.plot.clientWidth || 680;
  frame.plot.style.minHeight = "0";
  if (kind.svg) frame.plot.replaceChildren(kind.svg(panel, width, frame.of));
  else {
    if (!frame.plot.data) frame.plot.replaceChildren();
    const {data, layout: of, click} = kind.plot(panel, width);
    frame.plot.style.height = of.height + "px";
    Plotly.react(frame.plot, data, {...of, width}, {displaylogo: false, displayModeBar: false, responsive: false});
    if (click) {
      frame.plot.removeAllListeners("plotly_click");
      frame.plot.on("plotly_click", event => { const chosen = click(event.points[0]); openCell(panel, chosen.recipe, chosen.rate); });
    }
  }
  if (frame.name === "heat") frame.after.replaceChildren(cellTable(panel, frame), cellRuns(panel));
}

const cellKey = (panel, recipe, rate) => `${panel.key}|${recipe}|${rate}`;

/** Choose a cell of a heat map; choosing it again lets it go. */
function openCell(panel, recipe, rate) {
  const key = cellKey(panel, recipe, rate);
  state.cell = state.cell === key ? null : key;
  const focused = document.activeElement?.dataset.cell;
  for (const frame of frames.values()) if (frame.name === "heat" && !frame.stale) frame.after.replaceChildren(cellTable(frame.panel, frame), cellRuns(frame.panel));
  // The table was made anew: who came by keyboard goes on where they were.
  if (focused) [...document.querySelectorAll("[data-cell]")].find(button => button.dataset.cell === focused)?.focus();
  remember();
}

/** The heat map as a table, whose cells are buttons. */
function cellTable(panel, frame) {
  const recipes = recipesOf(panel), rates = ratesOf(panel), bits = panel.group.bits;
  const details = make("details", {class: "cells", open: frame.after.querySelector(".cells")?.open ?? false}, make("summary", {}, "The same as a table"));
  const line = recipe => make("tr", {}, make("th", {scope: "row"}, recipe), ...rates.map(rate => {
    const cell = cellOf(panel, recipe, rate);
    if (!cell.n) return make("td", {}, "–");
    const button = make("button", {type: "button", "data-cell": cellKey(panel, recipe, rate), "aria-pressed": String(state.cell === cellKey(panel, recipe, rate)), onclick: () => openCell(panel, recipe, rate)},
      Number.isFinite(cell.loss) ? cell.loss.toFixed(3) : "non-finite", make("br"), make("small", {}, counted(cell)));
    return make("td", {class: cell.k === cell.n ? "every" : cell.k ? "some" : ""}, button);
  }));
  details.append(make("p", {class: "soft"}, "Mean final training loss in nats/token; under it k/n, runs that diverged of all runs, and the 95 % interval of that share, Clopper and Pearson's."
    + (bits ? ` On this text 1 nat/token is ${word(bits)} bits/byte.` : "")));
  details.append(make("div", {class: "wide"}, make("table", {}, make("thead", {}, make("tr", {}, make("th", {scope: "col"}, "recipe"), ...rates.map(rate => make("th", {scope: "col"}, "lr " + word(rate, 3))))),
    make("tbody", {}, ...recipes.map(line)))));
  return details;
}

/** The runs of the cell that is chosen, if it is one of the panel's. */
function cellRuns(panel) {
  const box = make("div", {"aria-live": "polite"}), [key, recipe, rate] = (state.cell ?? "").split("|");
  if (key !== panel.key) return box;
  const cell = cellOf(panel, recipe, +rate), of = panel.study.run;
  if (!cell.n) return box;
  const rows = cell.runs.map(run => make("tr", {}, make("th", {scope: "row"}, seedOf(panel, run)), ...[
    word(of.final[run]), of.validation ? word(of.validation[run]) : "–", of.diverged[run] ? `yes, at step ${stepWord(of.at[run])}` : "no", word(of.spikes[run], 2), of.id[run] ?? "–",
  ].map(text => make("td", {}, text))));
  box.append(make("div", {class: "runs"},
    make("h3", {}, `${recipe} at learning rate ${word(+rate, 3)}: ${counted(cell)} diverged`),
    make("div", {class: "wide"}, make("table", {}, make("thead", {}, make("tr", {}, ...["seed", "final loss", "validation loss", "diverged", "spike score", "run"].map(name => make("th", {scope: "col"}, name)))), make("tbody", {}, ...rows))),
    make("p", {}, make("button", {type: "button", class: "quiet", onclick: () => { state.rate = +rate; changed(); goTo("curves"); }}, "Show curves at this learning rate"), " ",
      make("button", {type: "button", class: "quiet", onclick: () => openCell(panel, recipe, +rate)}, "Close"))));
  return box;
}

// Saving ------------------------------------------------------------------------------------------------------------------------

function csvOf({head, rows}) {
  const field = value => {
    if (value === null || value === undefined || Number.isNaN(value)) return "";
    const text = typeof value === "number" && !Number.isInteger(value) ? String(+value.toPrecision(9)) : String(value);
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return [head, ...rows].map(line => line.map(field).join(",")).join("\n") + "\n";
}

function download(blob, name) {
  const link = make("a", {href: URL.createObjectURL(blob), download: name});
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

async function saveAs(frame, kind) {
  const of = FIGURES[frame.name], name = [frame.panel.study.name, frame.name, frame.of ?? frame.panel.group.label].filter(Boolean).join("-").replace(/[^\w.+-]+/g, "_") + "." + kind.toLowerCase();
  if (frame.stale) show(frame);
  if (kind === "CSV") return download(new Blob([csvOf(of.table(frame.panel, frame.of))], {type: "text/csv"}), name);
  const svg = of.svg ? new XMLSerializer().serializeToString(frame.plot.querySelector("svg")) : decodeURIComponent((await Plotly.toImage(frame.plot, {format: "svg"})).split(",").slice(1).join(","));
  const file = new Blob([svg], {type: "image/svg+xml"});
  return download(kind === "SVG" ? file : await rasterised(file, frame.plot), name);
}

/** An SVG as a PNG of twice its size on the screen. */
async function rasterised(svg, plot) {
  const image = new Image(), drawn = plot.querySelector("svg").getBoundingClientRect();
  image.src = URL.createObjectURL(svg);
  await image.decode();
  const canvas = make("canvas", {width: Math.round(2 * drawn.width), height: Math.round(2 * drawn.height)});
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  URL.revokeObjectURL(image.src);
  return new Promise((done, failed) => canvas.toBlob(blob => blob ? done(blob) : failed(new Error("the picture is too large to save as PNG; save it as SVG"))));
}
