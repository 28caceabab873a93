"use strict";

const ROWS_SHOWN = 1000;

/** Make an element; text among its children stays text, whatever it holds. */
function make(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (typeof value === "function") node.addEventListener(key, value);
    else node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}

/** Return rows side by side, one line for each column of theirs. */
function factsView(columns, rows) {
  const told = columns.filter((_, place) => rows.some((row) => row[place] !== null));
  const cell = (row, column) => row[columns.indexOf(column)];
  if (rows.length === 1) {
    const lines = told.map((column) =>
      make("div", {}, make("dt", {}, column), make("dd", {}, show(cell(rows[0], column)))));
    return make("dl", { class: "facts" }, ...lines);
  }
  const line = (column, kind) =>
    make("tr", {}, make("th", { scope: "row" }, column), ...rows.map((row) => make(kind, {}, show(cell(row, column)))));
  const [heads, others] = [told.filter((it) => it === "model"), told.filter((it) => it !== "model")];
  return make("div", { class: "beside", tabindex: "0", role: "region", "aria-label": "Facts side by side" },
    make("table", {}, make("thead", {}, ...heads.map((it) => line(it, "th"))),
      make("tbody", {}, ...others.map((it) => line(it, "td")))));
}

function compare(one, other) {
  if (typeof one === "number" && typeof other === "number") return one - other;
  return String(one).localeCompare(String(other), "en", { numeric: true });
}

/** Return a table that is sorted by its headers and filtered by a text; `select` is called with a tensor's name. */
function tableView({ title, columns, rows }, open, select) {
  const numeric = columns.map((_, place) => rows.some((row) => typeof row[place] === "number"));
  const named = columns.indexOf("name"), modelled = columns.indexOf("model");
  const body = make("tbody", {}), note = make("span", { role: "status" });
  const filter = make("input", { type: "search", "aria-label": `Filter ${title}`, placeholder: "filter", input: fill });
  let sorted = -1, direction = 1;

  function fill() {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = rows.filter((row) => {
      const text = row.map(show).join(" ").toLowerCase();
      return words.every((word) => text.includes(word));
    });
    if (sorted >= 0) {
      // What is missing stays last in both directions.
      const missing = (row) => row[sorted] === null || row[sorted] === "-";
      found.sort((one, other) => missing(one) - missing(other) || direction * compare(one[sorted], other[sorted]));
    }
    body.replaceChildren(...found.slice(0, ROWS_SHOWN).map(line));
    const shown = Math.min(found.length, ROWS_SHOWN);
    note.textContent = shown === rows.length ? "" : `${show(shown)} of ${show(rows.length)} rows`;
  }

  function line(row) {
    return make("tr", {}, ...row.map((value, place) => {
      if (place !== named) return make("td", numeric[place] ? { class: "number" } : {}, show(value));
      const click = () => select(value, modelled >= 0 ? row[modelled] : null);
      return make("td", { class: "name" }, make("button", { type: "button", class: "link", click }, show(value)));
    }));
  }

  const heads = columns.map((column, place) => {
    const click = () => {
      direction = sorted === place ? -direction : numeric[place] ? -1 : 1;
      sorted = place;
      heads.forEach((head) => head.removeAttribute("aria-sort"));
      heads[place].setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
      fill();
    };
    const button = make("button", { type: "button", click }, column);
    return make("th", { scope: "col", class: numeric[place] ? "number" : "" }, button);
  });
  const view = make("details", open ? { open: "" } : {},
    make("summary", {}, `${title} `, make("span", { class: "quiet" }, `${show(rows.length)} rows`)),
    make("div", { class: "controls" }, filter, note),
    make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": title },
      make("table", {}, make("thead", {}, make("tr", {}, ...heads)), body)));
  // A closed table is filled when it is opened: a thousand rows are slow to lay out.
  if (open) fill();
  else view.addEventListener("toggle", fill, { once: true });
  return view;
}
