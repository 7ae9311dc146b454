// The page's controls, its address, its theme, and printing.

/** Put what is shown into the address, so that a link to it shows the same. */
function remember() { history.replaceState(null, "", toHash()); }

function changed() {
  remember();
  showControls();
  rebuild();
}

function goTo(section) {
  state.section = section;
  remember();
  document.getElementById(section)?.scrollIntoView();
  document.getElementById(section)?.focus({preventScroll: true});
}

function options(select, values, chosen) {
  select.replaceChildren(...values.map(([value, label]) => make("option", {value, selected: value === chosen}, label)));
  select.closest("label").hidden = !values.length;
}

/** Filters, choices and chips as the state has them. */
function showControls() {
  for (const chip of document.querySelectorAll(".chip")) {
    chip.setAttribute("aria-pressed", String(state.keep.recipe == null || state.keep.recipe.has(chip.dataset.value)));
    for (const part of chip.querySelectorAll("line")) part.setAttribute("stroke", colourOf(chip.dataset.value));
    for (const part of chip.querySelectorAll("text")) part.setAttribute("fill", colourOf(chip.dataset.value));
  }
  for (const picker of document.querySelectorAll(".picker")) {
    const kept = state.keep[picker.dataset.facet], all = valuesOf(picker.dataset.facet);
    for (const box of picker.querySelectorAll("input")) box.checked = !kept || kept.has(box.value);
    picker.querySelector(".chosen").textContent = all.length === 1 ? all[0] : !kept ? `all ${all.length}` : kept.size === 1 ? [...kept][0] : `${kept.size} of ${all.length}`;
  }
  const rates = [...new Set(content.studies.flatMap(study => study.rate ?? []))].sort((a, b) => a - b);
  const rated = [["", "the baseline's best"], ...rates.map(rate => [String(rate), word(rate, 3)])];
  for (const id of ["rate", "layer-rate"]) options(document.getElementById(id), rated, state.rate === null ? "" : String(state.rate));
  const signals = kind => [...new Map(content.studies.flatMap(study => study.signals).filter(s => s.kind === kind && s.values).map(s => [s.name, s])).keys()];
  const shown = kind => content.studies.filter(s => s.finished).map(study => signalOf({study}, kind)?.name).find(Boolean);
  for (const kind of ["sharpness", "signal"]) options(document.getElementById(kind), signals(kind).map(name => [name, spoken(name)]), shown(kind));
  const held = content.studies.map(study => study.layers).find(Boolean);
  options(document.getElementById("measure"), (held?.measures ?? []).map(m => [m.name, m.name.replaceAll("_", " ")]), state.measure ?? held?.measures[0].name);
  options(document.getElementById("role"), (held?.roles ?? []).map(role => [role, role]), state.role ?? held?.roles[0]);
  document.getElementById("layer-rate").closest("label").hidden = !held;
}

function listen() {
  for (const chip of document.querySelectorAll(".chip")) chip.addEventListener("click", () => { choose("recipe", chip.dataset.value, chip.getAttribute("aria-pressed") === "false"); changed(); });
  for (const box of document.querySelectorAll(".picker input")) box.addEventListener("change", () => { choose(box.dataset.facet, box.value, box.checked); changed(); });
  for (const all of document.querySelectorAll(".picker .all")) all.addEventListener("click", () => { choose(all.closest(".picker").dataset.facet, null); changed(); });
  document.getElementById("reset").addEventListener("click", () => { for (const facet of content.facets) state.keep[facet] = null; changed(); });
  document.getElementById("filters").addEventListener("submit", event => event.preventDefault());
  for (const id of ["rate", "layer-rate"]) document.getElementById(id).addEventListener("change", event => { state.rate = event.target.value === "" ? null : +event.target.value; changed(); });
  for (const name of ["sharpness", "signal", "measure", "role"]) document.getElementById(name).addEventListener("change", event => { state[name] = event.target.value; changed(); });
  for (const link of document.querySelectorAll(".sections a, .skip")) link.addEventListener("click", event => { event.preventDefault(); goTo(link.hash.slice(1)); });
  addEventListener("hashchange", () => { fromHash(location.hash); showControls(); rebuild(); document.getElementById(state.section)?.scrollIntoView(); });
  // A picker closes when one looks elsewhere.
  const close = except => { for (const picker of document.querySelectorAll(".picker[open]")) if (picker !== except) picker.open = false; };
  addEventListener("click", event => close(event.target.closest?.(".picker")));
  addEventListener("keydown", event => { if (event.key === "Escape") { document.querySelector(".picker[open] summary")?.focus(); close(null); } });
  let width = innerWidth, waiting;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; clearTimeout(waiting); waiting = setTimeout(rebuild, 150); } });
}

// Theme -------------------------------------------------------------------------------------------------------------------------

const THEMES = ["auto", "light", "dark"];

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  document.getElementById("theme").textContent = "Theme: " + theme;
  showControls();
  rebuild();
}

function listenToTheme() {
  document.getElementById("theme").addEventListener("click", () => {
    const next = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length];
    try { localStorage.setItem("exmy-theme", next); } catch { /* not kept, then */ }
    setTheme(next);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => setTheme(document.documentElement.dataset.theme));
  // Paper is white, and as wide as paper.
  let before = null;
  addEventListener("beforeprint", () => {
    before ??= document.documentElement.dataset.theme;
    document.documentElement.classList.add("printing");
    setTheme("light");
    for (const frame of frames.values()) show(frame);
  });
  addEventListener("afterprint", () => { document.documentElement.classList.remove("printing"); setTheme(before ?? "auto"); before = null; });
}

async function start() {
  const broken = document.getElementById("broken");
  try {
    if (typeof DecompressionStream === "undefined") throw new Error("this browser can't unpack its data (DecompressionStream is missing); browsers since 2023 can");
    content = await unpack(document.getElementById("content"));
    fromHash(location.hash);
    document.getElementById("window").textContent = [...new Set(content.studies.filter(study => study.finished).map(study => study.curves.over))].join(" or ");
    listen();
    listenToTheme();
    setTheme(document.documentElement.dataset.theme);
    if (state.section) document.getElementById(state.section)?.scrollIntoView();
    document.documentElement.dataset.ready = "yes";
    performance.mark("exmy-ready");
  } catch (error) {
    broken.textContent = "The figures can't be drawn: " + error.message;
    broken.hidden = false;
    throw error;
  }
}

start();
