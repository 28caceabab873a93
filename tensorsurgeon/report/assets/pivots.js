"use strict";

const PIVOT_ROWS = 100;

/** Return what is told with a text: words for what is so, and for what is not; numbers with what they count. */
function marksOf(marks, row) {
  return marks.filter((mark) => row[mark] !== null && row[mark] !== undefined).map((mark) => {
    const value = row[mark];
    if (typeof value !== "boolean") return make("span", {}, `${show(value)} ${mark}`);
    return make("span", { class: value ? "so" : "not-so" }, value ? `✓ ${mark}` : `✗ not ${mark}`);
  });
}

/** Return texts of a table side by side: a line for each that was asked, and columns that can be chosen. */
function pivotView(pivot) {
  const { columns, rows } = tableOf(pivot.table);
  const named = rows.map((row) => Object.fromEntries(columns.map((column, place) => [column, row[place]])));
  const keyOf = (row, keys) => keys.map((key) => row[key]).filter((it) => it !== null).join(", ");
  const told = pivot.rows.filter((key) => new Set(named.map((row) => row[key])).size > 1);
  const names = [...new Set(named.map((row) => keyOf(row, pivot.column)))];
  const asked = new Map();
  for (const row of named) {
    const key = JSON.stringify(pivot.rows.map((it) => row[it]));
    if (!asked.has(key)) asked.set(key, { row, cells: new Map() });
    asked.get(key).cells.set(keyOf(row, pivot.column), row);
  }
  const known = pivot.first.filter((name) => names.includes(name));
  const chosen = known.length ? known : names.slice(0, 3);
  const head = make("tr", {}), body = make("tbody", {}), note = make("span", { role: "status" });
  const filter = make("input", { type: "search", "aria-label": `Filter ${pivot.title}`, placeholder: "filter", input: fill });
  const add = make("button", { type: "button", click: () => { chosen.push(spare()); all(); } }, "Add a column");

  function spare() {
    return names.find((name) => !chosen.includes(name)) || names[0];
  }

  function all() {
    add.hidden = chosen.length >= names.length;
    const choice = (name, place) => {
      const change = (event) => { chosen[place] = names[Number(event.target.value)]; fill(); };
      const options = names.map((it, number) => make("option", { value: number }, it));
      const select = make("select", { "aria-label": `Column ${place + 1}`, change }, ...options);
      select.value = names.indexOf(name);
      const click = () => { chosen.splice(place, 1); all(); };
      const remove = make("button", { type: "button", "aria-label": `Remove column ${place + 1}`, click }, "×");
      remove.hidden = chosen.length === 1;
      return make("th", { scope: "col" }, make("span", { class: "choice" }, select, remove));
    };
    head.replaceChildren(make("th", { scope: "col" }, "asked"), ...chosen.map(choice));
    fill();
  }

  function fill() {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = [...asked.values()].filter(({ row, cells }) => {
      const texts = chosen.map((name) => (cells.get(name) || {})[pivot.text]);
      const text = [...pivot.rows.map((key) => row[key]), ...texts].join(" ").toLowerCase();
      return words.every((word) => text.includes(word));
    });
    body.replaceChildren(...found.slice(0, PIVOT_ROWS).map(line));
    const shown = Math.min(found.length, PIVOT_ROWS);
    note.textContent = shown === asked.size ? "" : `${show(shown)} of ${show(asked.size)} rows`;
  }

  function line({ row, cells }) {
    const facts = told.filter((key) => row[key] !== null && row[key] !== "").map((key) => {
      const value = show(row[key]);
      return make("div", { class: key === "question" ? "" : "quiet" }, key === "question" ? value : `${key} ${value}`);
    });
    return make("tr", {}, make("th", { scope: "row" }, ...facts), ...chosen.map((name, place) => {
      const cell = cells.get(name);
      if (!cell) return make("td", { class: "quiet" }, "–");
      const first = cells.get(chosen[0]), same = place > 0 && first && first[pivot.text] === cell[pivot.text];
      const marks = [...marksOf(pivot.marks, cell), ...(same ? [make("span", {}, "as in the first column")] : [])];
      return make("td", {}, make("div", { class: "said" }, cell[pivot.text]), make("div", { class: "marks quiet" }, ...marks));
    }));
  }

  all();
  return make("section", { class: "pivot", "aria-label": pivot.title }, make("h2", {}, pivot.title),
    make("div", { class: "controls" }, filter, add, note),
    make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `${pivot.title}, table` },
      make("table", {}, make("thead", {}, head), body)));
}
