"use strict";

const QUARTERS = [0, 1, 2, 3].map((quarter) => Math.log2(1 + quarter / 4));

/** Return a colour of the page, as it is in the present scheme. */
function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

/** Return a text as Plotly shows it unchanged: it takes some tags and entities for markup. */
function inert(text) {
  return String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
}

/** Return a number of few digits, as people read it. */
function show(value) {
  if (typeof value !== "number") return value === null || value === undefined ? "–" : [].concat(value).join("x");
  if (Number.isInteger(value) && Math.abs(value) < 1e15) return value.toLocaleString("en");
  const size = Math.abs(value);
  return size >= 1e5 || size < 1e-3 ? value.toExponential(3) : String(Number(value.toPrecision(4)));
}

function frame(extra) {
  const label = { bgcolor: colour("paper"), bordercolor: colour("quiet"), align: "left" };
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", dragmode: false, showlegend: false,
    font: { family: "system-ui, sans-serif", size: 12, color: colour("ink") },
    hoverlabel: { ...label, font: { color: colour("ink"), family: "system-ui, sans-serif", size: 12 } },
    ...extra,
  };
}

function axis(extra) {
  return {
    automargin: true, zeroline: false, gridcolor: colour("rule"), linecolor: colour("rule"), fixedrange: true,
    ticks: "", ...extra, title: { text: extra.title || "", standoff: 8, font: { color: colour("quiet"), size: 12 } },
  };
}

function draw(node, traces, layout) {
  return Plotly.react(node, traces, frame(layout), { displayModeBar: false });
}

/** Return ticks for the logarithmic colours of values: powers of ten, and between few of them 2 and 5 times those. */
function decades(of, low, high, small) {
  const [from, to] = [Math.log10(Math.max(low, small)), Math.log10(Math.max(-low, high))];
  const factors = to - from > 2 ? [1] : [1, 2, 5];
  const step = Math.max(1, Math.round((to - from) / (low < 0 ? 3 : 6)));
  const sizes = [0];
  for (let power = Math.floor(from); power <= to; power += step) sizes.push(...factors.map((it) => it * 10 ** power));
  const values = [...sizes, ...sizes.slice(1).map((size) => -size)].filter((value) => value >= low && value <= high);
  return { tickvals: values.map(of), ticktext: values.map((value) => String(Number(value.toPrecision(1)))) };
}

/** Return how values become colours: one scale for all models, diverging around zero where there are signs. */
function colouring(values, { signed, small }, log, narrow) {
  const finite = values.filter((value) => typeof value === "number");
  const high = signed ? Math.max(...finite.map(Math.abs)) : Math.max(...finite);
  const low = signed ? -high : Math.min(...finite);
  const diverging = [[0, "#2166ac"], [0.25, "#7fb0d3"], [0.5, colour("middle")], [0.75, "#e6a15c"], [1, "#a6500c"]];
  // The inverse hyperbolic sine is a logarithm of large values, of both signs, and has zero.
  const of = log ? (value) => Math.asinh(value / small) : (value) => value;
  const bar = {
    thickness: 12, outlinewidth: 0, tickcolor: colour("quiet"), ticks: "outside", ticklen: 3,
    ...(narrow ? { orientation: "h", y: 0, yanchor: "top", ypad: 46, xpad: 0 } : { ypad: 0 }),
    ...(log ? decades(of, low, high, small) : {}),
  };
  return { of, axis: { cmin: of(low), cmax: of(high), colorscale: signed ? diverging : "Viridis", colorbar: bar } };
}

function isDrawn(cell) {
  return cell !== null && typeof cell.value === "number";
}

/** Draw a statistic of a grid, a heatmap for each model; `cellAt` tells what a cell shows, and how it is described. */
function drawHeatmap(node, grid, statistic, log, cellAt) {
  const shown = grid.models.map((_, model) =>
    grid.roles.map((_, role) => grid.layers.map((_, layer) => cellAt(model, role, layer))));
  const values = shown.flat(2).map((cell) => cell && cell.value);
  const stacked = node.clientWidth < 760;
  const colours = colouring(values, statistic, log, stacked);
  const count = grid.models.length, named = count > 1, below = stacked ? 100 : 44;
  const height = (named ? 30 : 0) + (stacked && named ? 40 : 0) + Math.max(120, 20 * grid.roles.length);
  const layout = {
    margin: { l: 8, r: 8, t: 4, b: below }, height: height * (stacked ? count : 1) + below + 4, annotations: [],
    coloraxis: colours.axis,
  };
  const traces = [];
  const every = Math.max(1, Math.ceil(grid.layers.length / (stacked || !named ? node.clientWidth / 40 : 14)));
  const ticked = grid.layers.flatMap((layer, place) => (layer !== null && layer % every === 0 ? [place] : []));
  shown.forEach((lines, model) => {
    const suffix = model ? String(model + 1) : "";
    const title = named ? 26 / layout.height : 0, labels = 44 / layout.height;
    const domain = stacked
      ? { x: [0, 1], y: [1 - (model + 1) / count + (model + 1 < count ? labels : 0), 1 - model / count - title] }
      : { x: [(model + (model ? 0.04 : 0)) / count, (model + 1) / count], y: [0, 1 - title] };
    layout[`xaxis${suffix}`] = axis({
      title: "layer", domain: domain.x, anchor: `y${suffix}`, showgrid: false, tickvals: ticked,
      range: [-0.5, grid.layers.length - 0.5],
      ticktext: ticked.map((place) => String(grid.layers[place])),
    });
    layout[`yaxis${suffix}`] = axis({
      domain: domain.y, anchor: `x${suffix}`, showgrid: false, range: [grid.roles.length - 0.5, -0.5],
      tickvals: grid.roles.map((_, place) => place), ticktext: grid.roles.map(inert),
      showticklabels: stacked || model === 0,
    });
    const where = { xaxis: `x${suffix}`, yaxis: `y${suffix}` };
    traces.push({
      ...where, type: "heatmap", coloraxis: "coloraxis", xgap: 1, ygap: 1, hoverinfo: "text",
      z: lines.map((line) => line.map((cell) => (isDrawn(cell) ? colours.of(cell.value) : null))),
      text: lines.map((line) => line.map((cell) => (cell ? cell.lines.map(inert).join("<br>") : ""))),
    });
    const broken = lines.flatMap((line, y) =>
      line.flatMap((cell, x) => (cell && !isDrawn(cell) ? [[x, y]] : [])));
    traces.push({
      ...where, type: "scatter", mode: "markers", hoverinfo: "skip",
      x: broken.map(([x]) => x), y: broken.map(([, y]) => y),
      marker: { symbol: "x-thin", size: 8, line: { width: 2, color: colour("alarm") } },
    });
    if (named) {
      layout.annotations.push({
        text: `<b>${inert(grid.models[model])}</b>`, showarrow: false, xref: "paper", yref: "paper", xanchor: "left",
        yanchor: "bottom", x: domain.x[0], y: domain.y[1], yshift: 4,
      });
    }
  });
  return draw(node, traces, layout);
}

/** Return the cell of a click; Plotly tells only of those that come after it has shown a hover text. */
function cellUnder(node, grid, { clientX, clientY }) {
  const boxes = [...node.querySelectorAll(".nsewdrag")].map((area) => area.getBoundingClientRect());
  const model = boxes.findIndex((box) =>
    clientX > box.left && clientX < box.right && clientY > box.top && clientY < box.bottom);
  if (model < 0) return null;
  const { left, top, width, height } = boxes[model];
  const role = Math.floor(((clientY - top) / height) * grid.roles.length);
  return { model, role, layer: Math.floor(((clientX - left) / width) * grid.layers.length) };
}

/** Return outlines around cells of a heatmap; the paper behind the ink makes them visible on every colour. */
function outlines(cells) {
  return cells.flatMap(({ model, role, layer, ink }) => {
    const suffix = model ? String(model + 1) : "";
    const box = {
      type: "rect", xref: `x${suffix}`, yref: `y${suffix}`,
      x0: layer - 0.5, x1: layer + 0.5, y0: role - 0.5, y1: role + 0.5,
    };
    return [["paper", 5], [ink, 2]].map(([name, width]) => ({ ...box, line: { color: colour(name), width } }));
  });
}

/** Return the logarithm to base 2 of the lower edge of a histogram's bin. */
function edge(histogram, bin) {
  return histogram.octave + Math.floor(bin / 4) + QUARTERS[bin % 4];
}

/** Return the first bin worth drawing: below it lie at most 2 in 1000 of the elements, and only bins near zero. */
function firstBin({ negative, positive }) {
  const counts = Array.from({ length: Math.max(negative.length, positive.length) }, (_, bin) =>
    (negative[bin] || 0) + (positive[bin] || 0));
  const all = counts.reduce((sum, count) => sum + count, 0);
  let below = 0;
  const first = counts.findIndex((count) => (below += count) > 0.002 * all);
  return Math.max(0, first);
}

/** Return the bars of a histogram, on a scale of logarithms to both sides of a bar for all that is smaller. */
function bars(histogram, floor) {
  const within = { count: histogram.zero, x: 0, width: 1 };
  const power = (at) => show(2 ** at);
  const drawn = [];
  for (const [sign, counts] of [[-1, histogram.negative], [1, histogram.positive]]) {
    counts.forEach((count, bin) => {
      const [from, to] = [edge(histogram, bin), edge(histogram, bin + 1)];
      if (from < floor) within.count += count;
      else if (count) {
        const ends = sign > 0 ? `${power(from)} to ${power(to)}` : `−${power(to)} to −${power(from)}`;
        drawn.push({ count, x: sign * ((from + to) / 2 - floor + 1), width: to - from, text: ends });
      }
    });
  }
  within.text = `smaller than ${power(floor)}, of them ${show(histogram.zero)} zero`;
  return [...drawn, within].sort((one, other) => one.x - other.x);
}

/** Return elements per octave: quarters of an octave are not equally wide, and counts alone would draw stairs. */
function density(bar) {
  return bar.count / bar.width;
}

/** Draw histograms, `[label, histogram]` each: one as bars, several as outlines over each other. */
function drawHistograms(node, series, log) {
  const floor = Math.min(...series.map(([, histogram]) => edge(histogram, firstBin(histogram))));
  const drawn = series.map(([, histogram]) => bars(histogram, floor));
  const ends = drawn.flat().flatMap((bar) => [bar.x - bar.width, bar.x + bar.width]);
  const range = [Math.min(-1, ...ends), Math.max(1, ...ends)], reach = Math.max(-range[0], range[1]);
  const top = Math.max(1, ...drawn.flat().map(density));
  const powers = [];
  const octaves = Math.log2(10);
  const step = Math.ceil((range[1] - range[0]) / octaves / Math.max(1, node.clientWidth / 65));
  for (let power = Math.floor((floor + reach - 1) / octaves); power * octaves >= floor; power -= step) {
    powers.push(power);
  }
  const places = powers.map((power) => power * octaves - floor + 1);
  const words = powers.map((power) => (power >= -3 && power <= 3 ? String(10 ** power) : `10<sup>${power}</sup>`));
  const form = (each, place) => (series.length > 1
    ? { type: "scatter", mode: "lines", line: { color: palette(place), width: 1.5, shape: "hvh" } }
    : { type: "bar", width: each.map((bar) => bar.width), textposition: "none", marker: { color: palette(0) } });
  const traces = drawn.map((each, place) => ({
    ...form(each, place), name: inert(series[place][0]), x: each.map((bar) => bar.x), y: each.map(density),
    hoverinfo: "text", text: each.map((bar) => hint(series[place][0], bar.text, bar.count)),
  }));
  const scale = log
    ? { type: "log", range: [Math.log10(0.5), Math.log10(2 * top)], dtick: Math.ceil(Math.log10(top) / 5) }
    : { rangemode: "tozero" };
  return draw(node, traces, {
    height: 260, margin: { l: 8, r: 8, t: 8, b: 8 }, hovermode: series.length > 1 ? "x" : "closest", ...legend(series),
    xaxis: axis({
      title: "value", range, showgrid: false,
      tickvals: [...places.map((place) => -place), 0, ...places],
      ticktext: [...words.map((it) => `−${it}`), "0", ...words],
    }),
    yaxis: axis({ title: "elements per octave", ...scale }),
  });
}

/** Draw curves, `[label, numbers]` each; `texts` says what is under the pointer. */
function drawCurves(node, series, { title, step, log, text }) {
  const traces = series.map(([label, values], place) => ({
    type: "scatter", mode: "lines", name: inert(label),
    line: { color: palette(place), width: 1.3, shape: step > 1 ? "hv" : "linear" },
    x: values.map((_, at) => at * step + (log ? 1 : 0)), y: values,
    hoverinfo: "text", text: values.map((value, at) => hint(label, text(at), value)),
  }));
  return draw(node, traces, {
    height: 220, margin: { l: 8, r: 8, t: 8, b: 8 }, hovermode: "x", ...legend(series),
    xaxis: axis({ title, showgrid: false }),
    yaxis: axis(log ? { type: "log", exponentformat: "power", nticks: 6 } : { rangemode: "tozero" }),
  });
}

function hint(label, what, value) {
  return inert([label, `${what}: ${show(value)}`].filter(Boolean).join(", "));
}

function legend(series) {
  return { showlegend: series.length > 1, legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom", traceorder: "normal" } };
}

function palette(place) {
  return [colour("one"), colour("two"), "#8f7ac2", "#4f9d7c", "#b5658c", "#8a8f98"][place % 6];
}
