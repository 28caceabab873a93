"use strict";

/**
 * Return the scale that all panels of a chart share: `of` places a value, `axis` is the axis of values.
 *
 * Perplexities and the like, which are never near zero, have a logarithm. Of all others the inverse hyperbolic sine is
 * taken: a logarithm of large values, of both signs, and it has zero.
 */
function scaleOf(chart, log) {
  const points = chart.panels.flatMap((panel) => panel.series.flatMap((one) => one.points))
    .filter((it) => it.value !== null);
  const bases = chart.panels.map((panel) => panel.baseline).filter((it) => it !== null);
  const ends = points.flatMap(({ value, spread }) => [value - (spread || 0), value, value + (spread || 0)]);
  const zero = !(log && chart.small === null);
  // A spread may reach below zero where a mean does not.
  const least = Math.min(...points.map((it) => it.value), ...bases);
  const logarithm = (value) => (zero ? Math.asinh(value / chart.small) : Math.log10(Math.max(value, least / 3)));
  const of = log ? logarithm : (value) => value;
  // Bars begin at zero where there is one: what is read off a length is otherwise wrong.
  const places = [...ends, ...bases, ...(zero ? [0] : [])].map(of);
  const low = Math.min(...places), high = Math.max(...places), room = 0.06 * (high - low || 1);
  const range = [zero && low === 0 ? 0 : low - room, high + room];
  const ticks = !log ? {} : zero ? clear(decades(of, Math.min(0, ...ends), Math.max(0, ...ends), chart.small))
    : powers(range);
  return { of, range, zero, axis: axis({ title: chart.measure, range, ...ticks }) };
}

/** Return ticks without those that stand too close to zero to be read. */
function clear({ tickvals, ticktext }) {
  const far = tickvals.map((at) => at === 0 || Math.abs(at) > 0.8);
  return { tickvals: tickvals.filter((_, place) => far[place]), ticktext: ticktext.filter((_, place) => far[place]) };
}

/** Return ticks at powers of ten, and between few of them at 2 and 5 times those. */
function powers([low, high]) {
  const factors = high - low > 3 ? [1] : [1, 2, 5];
  const found = [];
  for (let power = Math.floor(low); power <= high; power += Math.max(1, Math.round((high - low) / 6))) {
    found.push(...factors.map((it) => it * 10 ** power));
  }
  const values = found.filter((it) => Math.log10(it) >= low && Math.log10(it) <= high);
  return { tickvals: values.map(Math.log10), ticktext: values.map((it) => show(Number(it.toPrecision(1)))) };
}

/** Return every so many ticks, as many as there is room for. */
function ticksOf(panel, most) {
  const every = Math.ceil(panel.ticks.length / Math.max(2, most));
  const shown = panel.ticks.filter((_, place) => place % every === 0);
  return { tickvals: shown.map(([at]) => at), ticktext: shown.map(([, text]) => inert(text)), showgrid: false };
}

/** Return the trace of a series as far as all kinds have it in common; `flat` ones lie on their side. */
function traceOf(series, place, { of }, flat) {
  const known = series.points.filter((it) => it.value !== null);
  const [at, value] = flat ? ["y", "x"] : ["x", "y"];
  const reach = (it, sign) => Math.abs(of(it.value + sign * (it.spread || 0)) - of(it.value));
  return {
    name: inert(series.label), [at]: known.map((it) => it.at), [value]: known.map((it) => of(it.value)),
    hoverinfo: "text", hovertext: known.map((it) => inert(it.text)), textposition: "none",
    marker: { color: palette(place) }, line: { color: palette(place), width: 1.6 },
    [`error_${value}`]: {
      type: "data", symmetric: false, array: known.map((it) => reach(it, 1)), arrayminus: known.map((it) => reach(it, -1)),
      visible: known.some((it) => it.spread), color: colour("quiet"), thickness: 1, width: 3,
    },
  };
}

/** Return crosses for points without a number, at the far end of the scale. */
function crossesOf(panel, { range }, flat) {
  const broken = panel.series.flatMap((series) => series.points.filter((it) => it.value === null));
  const ends = broken.map(() => range[1]), places = broken.map((it) => it.at);
  return {
    type: "scatter", mode: "markers", cliponaxis: false, showlegend: false, name: "no number",
    x: flat ? ends : places, y: flat ? places : ends,
    hoverinfo: "text", hovertext: broken.map((it) => inert(it.text)),
    marker: { symbol: "x-thin", size: 9, line: { width: 2, color: colour("alarm") } },
  };
}

function baselineOf(panel, { of }, flat) {
  if (panel.baseline === null) return {};
  const place = of(panel.baseline);
  const [along, across] = flat ? ["y", "x"] : ["x", "y"];
  return {
    shapes: [{
      type: "line", layer: "above", [`${along}ref`]: "paper", [`${along}0`]: 0, [`${along}1`]: 1,
      [`${across}ref`]: across, [`${across}0`]: place, [`${across}1`]: place,
      line: { color: colour("quiet"), width: 1, dash: "dot" },
    }],
    annotations: [{
      text: "baseline", showarrow: false, font: { size: 11, color: colour("quiet") },
      ...(flat
        ? { xref: "x", x: place, yref: "paper", y: 1, yanchor: "bottom", xanchor: "left" }
        : { yref: "y", y: place, xref: "paper", x: 1, xanchor: "right", yanchor: "bottom" }),
    }],
  };
}

/** Return the line of a series and the band of its spread. */
function curveOf(series, place, scale) {
  const known = series.points.filter((it) => it.value !== null);
  const ends = (sign) => known.map((it) => scale.of(it.value + sign * (it.spread || 0)));
  const places = known.map((it) => it.at);
  const band = {
    type: "scatter", mode: "lines", fill: "toself", opacity: 0.18, hoverinfo: "skip", showlegend: false,
    x: [...places, ...places.toReversed()], y: [...ends(1), ...ends(-1).toReversed()],
    line: { width: 0 }, fillcolor: palette(place),
  };
  const line = { ...traceOf(series, place, scale, false), type: "scatter", mode: "lines+markers" };
  line.error_y.visible = false;
  return known.some((it) => it.spread) ? [band, line] : [line];
}

/** Return the bars of a series; dots where the scale has no zero for bars to begin at. */
function barsOf(series, place, scale, flat) {
  const kind = scale.zero ? { type: "bar", width: 0.7 } : { type: "scatter", mode: "markers" };
  return { ...traceOf(series, place, scale, flat), ...kind, ...(flat && scale.zero ? { orientation: "h" } : {}) };
}

function drawUpright(node, chart, panel, scale) {
  const form = (series, place) => (chart.kind === "curves"
    ? curveOf(series, place, scale) : [barsOf(series, place, scale, false)]);
  return draw(node, [...panel.series.flatMap(form), crossesOf(panel, scale, false)], {
    height: 300, margin: { l: 8, r: 12, t: 8, b: 8 }, hovermode: "closest", ...legend(panel.series),
    ...baselineOf(panel, scale, false),
    xaxis: axis({ title: chart.axis, ...ticksOf(panel, node.clientWidth / 34) }), yaxis: scale.axis,
  });
}

/** Return a vertical axis with a line for each tick, the first on top. */
function lines(panel) {
  const count = panel.ticks.length;
  return axis({ ...ticksOf(panel, count), range: [count - 0.4, -0.6] });
}

function drawRows(node, chart, panel, scale) {
  const traces = panel.series.map((series, place) => barsOf(series, place, scale, true));
  return draw(node, [...traces, crossesOf(panel, scale, true)], {
    height: 80 + 19 * panel.ticks.length, margin: { l: 8, r: 16, t: 20, b: 8 }, hovermode: "closest",
    ...baselineOf(panel, scale, true), xaxis: scale.axis, yaxis: lines(panel),
  });
}

function drawStack(node, chart, panel, scale) {
  const traces = panel.series.map((series, place) => {
    const { error_x: _, ...trace } = traceOf(series, place, scale, true);
    return { ...trace, type: "bar", orientation: "h", width: 0.8 };
  });
  return draw(node, traces, {
    height: 110 + 19 * panel.ticks.length, margin: { l: 8, r: 16, t: 8, b: 8 }, hovermode: "closest", barmode: "stack",
    ...legend(panel.series), xaxis: axis({ title: chart.measure, range: [0, 1] }), yaxis: lines(panel),
  });
}

function drawMap(node, chart, panel, scale, log) {
  const values = chart.panels.flatMap((it) => it.series.flatMap((one) => one.points.map((point) => point.value)))
    .filter((it) => it !== null);
  const colours = colouring(values, { signed: chart.signed, small: chart.small || 1 }, log, false);
  const starts = panel.ticks.map(([at]) => at), rows = panel.series.length;
  const cell = (series, at, of) => {
    const point = series.points.find((it) => it.at === at);
    return point === undefined || point.value === null ? null : of(point);
  };
  const broken = panel.series.flatMap((series, row) =>
    series.points.filter((it) => it.value === null).map((it) => ({ ...it, row })));
  const cells = {
    type: "heatmap", coloraxis: "coloraxis", xgap: 1, ygap: 1, hoverinfo: "text", x: starts,
    y: panel.series.map((_, row) => row),
    z: panel.series.map((series) => starts.map((at) => cell(series, at, (point) => colours.of(point.value)))),
    text: panel.series.map((series) => starts.map((at) => cell(series, at, (point) => inert(point.text)) || "")),
  };
  const crosses = {
    type: "scatter", mode: "markers", x: broken.map((it) => it.at), y: broken.map((it) => it.row),
    hoverinfo: "text", hovertext: broken.map((it) => inert(it.text)),
    marker: { symbol: "x-thin", size: 9, line: { width: 2, color: colour("alarm") } },
  };
  return draw(node, [cells, crosses], {
    height: Math.max(200, 90 + Math.min(30 * rows, Math.max(900, 9 * rows))), margin: { l: 8, r: 8, t: 8, b: 8 }, coloraxis: colours.axis,
    xaxis: axis({ title: chart.axis, ...ticksOf(panel, node.clientWidth / 34) }),
    yaxis: axis({
      ...ticksOf({ ticks: panel.series.map((it, row) => [row, it.label]) }, 50),
    }),
  });
}

const DRAWING = { curves: drawUpright, bars: drawUpright, rows: drawRows, stack: drawStack, map: drawMap };

/** Return a section for charts of one title, of which one measure is shown, and what draws it again. */
function chartView(title, charts) {
  const panels = make("div", { class: `panels ${charts[0].kind}` });
  const options = charts.map((it, place) => make("option", { value: place }, it.measure));
  const select = make("select", { change: open }, ...options);
  const log = make("input", { type: "checkbox", change: redraw });
  const controls = make("div", { class: "controls" },
    make("label", {}, "Measure ", select), make("label", {}, log, " logarithmic scale"));
  controls.hidden = charts[0].kind === "stack";

  function open() {
    log.checked = charts[Number(select.value)].log;
    redraw();
  }

  function redraw() {
    const chart = charts[Number(select.value)], scale = scaleOf(chart, log.checked);
    const nodes = chart.panels.map((panel) => {
      const name = [title, panel.title, chart.measure].filter(Boolean).join(", ");
      const node = make("div", { role: "img", "aria-label": name });
      return [panel, node, make("figure", {}, make("figcaption", {}, panel.title), node)];
    });
    panels.replaceChildren(...nodes.map(([, , figure]) => figure));
    nodes.forEach(([panel, node]) => DRAWING[chart.kind](node, chart, panel, scale, log.checked));
  }

  return [make("section", { "aria-label": title }, make("h2", {}, title), controls, panels), open, redraw];
}

/** Return the charts of each title. */
function byTitle(charts) {
  const found = new Map();
  for (const chart of charts) found.set(chart.title, [...(found.get(chart.title) || []), chart]);
  return [...found];
}
