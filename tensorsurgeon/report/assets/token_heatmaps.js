"use strict";

/** A lens: rows that tell of a position of a prompt at a depth what the model would say next. */
const LENS = { statistics: ["bits", "p", "final p", "final rank", "kl", "rms"], log: ["final rank", "kl", "rms"] };

/** Return the table of all positions; that of the last ones has the same columns. */
function tokenTable() {
  const needed = ["prompt", "position", "depth", "top tokens"];
  const found = data.tables.filter(({ columns }) => needed.every((it) => columns.includes(it)));
  return found.sort((one, other) => other.rows.length - one.rows.length)[0];
}

/** Return a token as it can be seen: spaces at its ends would be lost, and some characters turn what stands after. */
function visible(token) {
  return String(token).replace(/\n/g, "⏎").replace(/\t/g, "⇥")
    .replace(/^ +| +$/g, (spaces) => "␣".repeat(spaces.length)).replace(/\p{C}/gu, "·");
}

/** Return a token between marks that keep its direction of writing to itself. */
function isolated(token) {
  return `\u2068${visible(token)}\u2069`;
}

/** Return as much of a token as a cell has room for. */
function shortened(token) {
  const characters = [...visible(token)];
  return inert(characters.length > 8 ? `${characters.slice(0, 7).join("")}…` : characters.join(""));
}

/** Return the rows of each model and prompt, by the names of their columns. */
function tokenGroups({ columns, rows }) {
  const groups = new Map();
  for (const row of rows) {
    const named = Object.fromEntries(columns.map((column, place) => [column, row[place]]));
    const key = JSON.stringify([named.model === undefined ? null : named.model, named.prompt]);
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(named);
  }
  return groups;
}

function tokenHover(row) {
  const best = row["top tokens"].map((token, place) =>
    `${(100 * row.probabilities[place]).toFixed(1)} %  ${isolated(token)}`);
  return [`after ${row.depth} layers, at ${row.position} “${isolated(row.token)}”`, ...best,
    `entropy ${show(row.bits)} bits, final token: rank ${show(row["final rank"])}, ${show(row["final p"])}`,
    `divergence from the end ${show(row.kl)} nats`];
}

/** Draw what one prompt says, layer x position, with the most probable token in each cell. */
function drawTokens(node, rows, statistic, log) {
  const positions = [...new Set(rows.map((row) => row.position))].sort((one, other) => one - other);
  const depths = [...new Set(rows.map((row) => row.depth))].sort((one, other) => one - other);
  const cells = new Map(rows.map((row) => [`${row.depth} ${row.position}`, row]));
  const grid = depths.map((depth) => positions.map((position) => cells.get(`${depth} ${position}`)));
  const values = rows.map((row) => row[statistic]).filter((value) => typeof value === "number");
  const sizes = values.filter((value) => value > 0).sort((one, other) => one - other);
  const small = sizes.length ? sizes[Math.floor(sizes.length / 20)] : 1;
  const signed = values.some((value) => value < 0);
  const colours = colouring(values.length ? values : [0, 1], { signed, small }, log, false);
  const width = Math.max(node.clientWidth, 120 + 62 * positions.length);
  const heads = positions.map((position, place) => shortened(grid[0][place] ? grid[0][place].token : position));
  const middle = (colours.axis.cmin + colours.axis.cmax) / 2;
  const annotations = grid.flatMap((line, y) => line.flatMap((row, x) => (row ? [{
    x, y, text: shortened(row.top), showarrow: false,
    font: { size: 11, color: colours.of(row[statistic]) > middle ? "#111" : "#fff", family: "monospace" },
  }] : [])));
  return draw(node, [{
    type: "heatmap", coloraxis: "coloraxis", xgap: 1, ygap: 1, hoverinfo: "text",
    z: grid.map((line) => line.map((row) => (row ? colours.of(row[statistic]) : null))),
    text: grid.map((line) => line.map((row) => (row ? tokenHover(row).map(inert).join("<br>") : ""))),
  }], {
    width, height: 90 + 24 * depths.length, margin: { l: 8, r: 8, t: 34, b: 8 }, annotations,
    coloraxis: colours.axis,
    xaxis: axis({ showgrid: false, side: "top", tickvals: positions.map((_, place) => place), ticktext: heads,
      tickangle: positions.length > 24 ? -60 : 0 }),
    yaxis: axis({ title: "layers that were run", showgrid: false, tickvals: depths.map((_, place) => place),
      ticktext: depths.map(String), range: [-0.5, depths.length - 0.5] }),
  });
}

/** Show the lens, where the tables hold one, and return what draws it anew in other colours. */
function openTokens() {
  const table = tokenTable();
  if (!table) return () => {};
  const groups = [...tokenGroups(table).values()], present = { group: 0, statistic: "bits" };
  const words = table.columns.filter((column) => column.startsWith("p("));
  const statistics = [...LENS.statistics, ...words].filter((it) => table.columns.includes(it));
  const label = (rows) => {
    const ends = rows.filter((row) => row.depth === rows[0].depth).map((row) => row.token).join("");
    const model = rows[0].model === undefined ? "" : `${rows[0].model}, `;
    return `${model}prompt ${rows[0].prompt}: ${ends.length > 60 ? `…${ends.slice(-60)}` : ends}`;
  };
  const tokens = make("div", { id: "lens-tokens", class: "plain", role: "img",
    "aria-label": "Heatmap of layers and positions with the most probable token of each" });
  const scroll = make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Layers and positions" },
    tokens);
  const redraw = () => drawTokens(tokens, groups[present.group], present.statistic,
    LENS.log.includes(present.statistic));
  const pickers = [["prompt", groups.map(label), (value) => (present.group = Number(value))],
    ["statistic", statistics, (value) => (present.statistic = statistics[Number(value)])]].map(([name, names, set]) => {
    const select = make("select", { id: `lens-${name}`, change: (event) => { set(event.target.value); redraw(); } });
    choices(select, names, 0);
    return make("label", {}, `${name} `, select);
  });
  at("lens").append(make("div", { class: "controls" }, ...pickers), scroll);
  at("lens").hidden = false;
  redraw();
  return redraw;
}
