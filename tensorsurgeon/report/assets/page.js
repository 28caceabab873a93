"use strict";

const at = (id) => document.getElementById(id);
const redraws = [];
const state = { grid: 0, statistic: 0, log: false, logCounts: true, cursor: null, chosen: null };
let data, redrawTokens = () => {};

async function unpack(id) {
  const bytes = Uint8Array.from(atob(at(id).textContent), (character) => character.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

const grid = () => data.grids[state.grid];
const statistic = () => grid().statistics[state.statistic];
const tableOf = (title) => data.tables.find((table) => table.title === title);

/** Return a row of the present grid by the names of its columns. */
function rowAt(number) {
  const { columns, rows } = tableOf(grid().title);
  return Object.fromEntries(columns.map((column, place) => [column, rows[number][place]]));
}

/** Return what a cell shows, or nothing for an empty one. */
function cellAt(model, role, layer) {
  const number = statistic().cells[model][role][layer];
  if (number === null) return null;
  const row = rowAt(number), value = row[statistic().name], many = grid().counts[model][role][layer];
  const lines = [`${statistic().name} ${show(value)}`];
  if (row.name !== undefined) lines.push(row.name);
  lines.push([grid().models[model], whereabouts(role, layer)].filter(Boolean).join(", "));
  const kind = [row.dtype, row.shape].filter((it) => it !== undefined && it !== null).map(show).join(", ");
  if (kind) lines.push(kind);
  if (many > 1) lines.push(`the farthest from the median of its role, of ${show(many)} here`);
  return { number, row, value, lines };
}

function whereabouts(role, layer) {
  const number = grid().layers[layer];
  return `${number === null ? "outside of layers" : `layer ${number}`}, ${grid().roles[role]}`;
}

async function showMap() {
  at("log").checked = state.log;
  await drawHeatmap(at("heatmap"), grid(), statistic(), state.log, cellAt);
  showMarks();
}

/** Return the places of the cells that show the chosen tensor. */
function chosenCells() {
  return statistic().cells.flatMap((lines, model) => lines.flatMap((line, role) => line.flatMap((number, layer) =>
    (number !== null && isChosen(rowAt(number)) ? [{ model, role, layer }] : []))));
}

/** Outline the chosen cell, and the one that the keyboard is on. */
function showMarks() {
  const marks = state.chosen ? chosenCells().map((place) => ({ ...place, ink: "alarm" })) : [];
  if (state.cursor && document.activeElement === at("heatmap")) marks.push({ ...state.cursor, ink: "ink" });
  Plotly.relayout(at("heatmap"), { shapes: outlines(marks) });
}

function isChosen(row) {
  const { name, model } = state.chosen;
  return row.name === name && (model === null || row.model === model);
}

function tell({ model, role, layer }) {
  const cell = cellAt(model, role, layer);
  at("cell").textContent = cell ? cell.lines.join("; ") : `${whereabouts(role, layer)}: no tensor`;
}

function move(event) {
  const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  const limit = (value, count) => Math.min(Math.max(value, 0), count - 1);
  if (event.key in steps) {
    const [down, right] = steps[event.key], width = grid().layers.length;
    // All models lie in one line: to the right of a model's last layer is the next one's first.
    const from = state.cursor.model * width + state.cursor.layer;
    const place = limit(from + right, width * grid().models.length);
    const role = limit(state.cursor.role + down, grid().roles.length);
    state.cursor = { model: Math.floor(place / width), role, layer: place % width };
    tell(state.cursor);
    showMarks();
  } else if (event.key === "Enter" || event.key === " ") pick(state.cursor);
  else return;
  event.preventDefault();
}

function pick(cursor) {
  const cell = cellAt(cursor.model, cursor.role, cursor.layer);
  state.cursor = cursor;
  tell(cursor);
  showMarks();
  if (cell && cell.row.name !== undefined) choose(cell.row.name, cell.row.model || null);
}

/** Choose a tensor, of one model where there are several, and show what is known of it. */
function choose(name, model) {
  state.chosen = { name, model: model || null };
  if (data.grids.length) {
    state.cursor = chosenCells()[0] || state.cursor;
    tell(state.cursor);
    showMarks();
    showOutliers();
  }
  showDetail();
}

/** Bring what was chosen away from the heatmap into view. */
function visit(name, model) {
  choose(name, model);
  at("detail-title").focus({ preventScroll: true });
  at("detail").scrollIntoView({ block: "start" });
}

function showDetail() {
  const { name, model } = state.chosen;
  at("detail-title").textContent = [name, model].filter(Boolean).join(", ");
  at("detail-title").className = "name";
  at("detail").hidden = at("below").hidden = false;
  const found = data.details.filter((detail) => detail.name === name);
  const each = (key) => found.filter((it) => it[key]).map((it) => [it.model || "", it[key]]);
  at("plots").replaceChildren();
  const counts = (node, series) => drawHistograms(node, series, state.logCounts);
  const histograms = each("histogram");
  if (histograms.length) plot("Values", histograms, counts, "wide", countSwitch());
  for (const [of, series] of each("histograms")) {
    const title = ["Values compared", of].filter(Boolean).join(", ");
    plot(title, Object.entries(series), counts, "wide", countSwitch());
  }
  for (const [key, word] of [["rows", "row"], ["columns", "column"]]) {
    const series = each(key);
    if (!series.length) continue;
    const step = series[0][1].group;
    const text = (place) => (step > 1 ? `${key} ${place * step} to ${place * step + step - 1}` : `${word} ${place}`);
    const numbers = series.map(([label, { largest }]) => [label, largest]);
    const curves = (node, it) => drawCurves(node, it, { title: word, step, log: false, text });
    plot(`Largest magnitude by ${word}`, numbers, curves);
  }
  const spectra = each("spectrum");
  if (spectra.length) {
    const { step } = spectra[0][1];
    const text = (place) => `singular value ${place * step + 1}`;
    const numbers = spectra.map(([label, { values }]) => [label, values]);
    const curves = (node, it) => drawCurves(node, it, { title: "index", step, log: true, text });
    plot("Singular values", numbers, curves, "wide");
  }
  at("facts").replaceChildren(...data.grids.map((it) => tableOf(it.title)).flatMap(({ columns, rows }) => {
    const named = columns.indexOf("name");
    const lines = rows.filter((row) => row[named] === name);
    const unnamed = (list) => list.filter((_, place) => place !== named);
    return lines.length ? [factsView(unnamed(columns), lines.map(unnamed))] : [];
  }));
}

function plot(title, series, drawing, kind, control) {
  const node = make("div", { role: "img", "aria-label": title });
  at("plots").append(make("figure", { class: kind || "" }, make("figcaption", {}, title, control || ""), node));
  drawing(node, series);
}

function countSwitch() {
  const change = (event) => {
    state.logCounts = event.target.checked;
    showDetail();
    at("plots").querySelector("input").focus();
  };
  const box = make("input", { type: "checkbox", change });
  box.checked = state.logCounts;
  return make("label", {}, box, " logarithmic counts");
}

function showOutliers() {
  at("outliers").hidden = at("below").hidden = false;
  const { name, outliers } = statistic();
  at("outliers-note").textContent = outliers.length
    ? `Farthest from the median of their role in ${name}, in robust standard deviations.`
    : `No tensor stands out from its role in ${name}.`;
  at("outliers-list").replaceChildren(...outliers.map(([number, median, score]) => {
    const row = rowAt(number), label = row.name === undefined ? `${row.role}, layer ${row.layer}` : row.name;
    const click = () => visit(row.name, row.model);
    const button = make("button", { type: "button", class: "link name", click }, label);
    if (state.chosen && isChosen(row)) button.setAttribute("aria-current", "true");
    const told = [row.model, `${show(row[name])}, median ${show(median)}, ${score.toFixed(1)} deviations away`];
    return make("li", {}, button, make("br"), make("span", { class: "quiet" }, told.filter(Boolean).join(": ")));
  }));
}

/** Return the tensor with whose name a problem begins, if it is one that there is something to see of. */
function subject(problem) {
  const name = problem.split(": ")[0];
  const shown = data.grids.some(({ title }) => {
    const { columns, rows } = tableOf(title);
    return rows.some((row) => row[columns.indexOf("name")] === name);
  });
  return shown || data.details.some((it) => it.name === name) ? name : null;
}

function showProblems() {
  at("problems").hidden = false;
  if (!data.problems.length) {
    at("problems").append(make("p", {}, "No problem was found."));
    return;
  }
  at("problems").classList.add("found");
  at("problems").append(make("ul", {}, ...data.problems.map((text) => {
    const name = subject(text);
    if (name === null) return make("li", {}, text);
    const click = () => visit(name, null);
    return make("li", {}, make("button", { type: "button", class: "link name", click }, name), text.slice(name.length));
  })));
}

function choices(node, names, chosen) {
  node.replaceChildren(...names.map((name, place) => make("option", { value: place }, name)));
  node.value = chosen;
}

function openStatistic(place) {
  state.statistic = place;
  state.log = statistic().log;
  showMap();
  showOutliers();
}

function openGrid(place) {
  state.grid = place;
  state.cursor = { model: 0, role: 0, layer: 0 };
  choices(at("statistic"), grid().statistics.map((it) => it.name), grid().default);
  openStatistic(grid().default);
}

function showAll() {
  redrawTokens();
  if (data.grids.length) showMap();
  if (state.chosen) showDetail();
  redraws.forEach((redraw) => redraw());
}

function isDark() {
  const set = document.documentElement.style.colorScheme;
  return set ? set === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function listen() {
  const label = () => (at("theme").textContent = isDark() ? "Light colours" : "Dark colours");
  const recolour = () => { label(); showAll(); };
  at("theme").addEventListener("click", () => {
    document.documentElement.style.colorScheme = isDark() ? "light" : "dark";
    recolour();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolour);
  label();
  let width = innerWidth, waiting;
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth;
    clearTimeout(waiting);
    waiting = setTimeout(showAll, 150);
  });
}

function listenToMap() {
  at("grid").addEventListener("change", (event) => openGrid(Number(event.target.value)));
  at("statistic").addEventListener("change", (event) => openStatistic(Number(event.target.value)));
  at("log").addEventListener("change", (event) => { state.log = event.target.checked; showMap(); });
  at("heatmap").addEventListener("keydown", move);
  at("heatmap").addEventListener("focus", () => { tell(state.cursor); showMarks(); });
  at("heatmap").addEventListener("blur", showMarks);
  at("heatmap").addEventListener("click", (event) => {
    const place = cellUnder(at("heatmap"), grid(), event);
    if (place) pick(place);
  });
}

async function start() {
  data = JSON.parse(await unpack("packed-data"));
  document.body.append(make("script", {}, await unpack("packed-plotly")));
  at("waiting").remove();
  const model = tableOf("model") || tableOf("study");
  if (model && model.rows.length) {
    at("model").append(factsView(model.columns, model.rows));
    at("model").hidden = false;
  }
  showProblems();
  const drawn = new Set(data.grids.map((it) => it.title));
  const others = data.tables.filter((it) => it !== model && it.rows.length);
  // Beside charts, tables but the first are there to look things up.
  const isOpen = (it, place) => (data.charts.length ? place === 0 : !drawn.has(it.title));
  at("tables").append(...others.map((it, place) => tableView(it, isOpen(it, place), visit)));
  showViews();
  listen();
  redrawTokens = openTokens();
  if (!data.grids.length) return;
  at("map").hidden = false;
  choices(at("grid"), data.grids.map((it) => it.title), 0);
  at("grid-label").hidden = data.grids.length === 1;
  openGrid(0);
  listenToMap();
  chooseFirst();
}

/** Show what was found in words, in charts, and as texts side by side. */
function showViews() {
  at("summary").append(...data.summary.map((text) => make("p", {}, text)));
  at("summary").hidden = !data.summary.length;
  for (const [title, charts] of byTitle(data.charts)) {
    const [view, open, redraw] = chartView(title, charts);
    at("charts").append(view);
    open();
    redraws.push(redraw);
  }
  at("pivots").append(...data.pivots.filter((it) => tableOf(it.table)).map(pivotView));
}

/** Choose a tensor that has a problem, or else one that stands out, or else the first. */
function chooseFirst() {
  const named = data.problems.map(subject).find((name) => name !== null);
  const [outlier] = statistic().outliers;
  const row = rowAt(outlier ? outlier[0] : statistic().cells.flat(2).find((number) => number !== null));
  if (named !== undefined) choose(named, null);
  else if (row.name !== undefined) choose(row.name, row.model);
}

start();
