// Sorts and filters the tables of a comparison. Without it the page only shows them.
"use strict";
const tables = [...document.querySelectorAll("table.rows")];

// The first number of a cell; texts without one are compared as texts, empty cells come last.
const read = (row, column) => row.cells[column].textContent.trim();
const toNumber = (text) => parseFloat(text.replace(/,/g, "").replace("−", "-"));

function compare(first, second, column, sign) {
  const [a, b] = [read(first, column), read(second, column)];
  if (!a || !b) return (a ? 0 : 1) - (b ? 0 : 1);
  const [x, y] = [toNumber(a), toNumber(b)];
  if (Number.isNaN(x) || Number.isNaN(y)) return sign * a.localeCompare(b, "en", { numeric: true });
  return sign * (x - y);
}

for (const table of tables) {
  for (const head of table.tHead.rows[0].cells) {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...table.tBodies[0].rows];
      rows.sort((first, second) => compare(first, second, head.cellIndex, down ? -1 : 1));
      table.tBodies[0].append(...rows);
    });
  }
}

// The rows of the first table are searched; all else that belongs to a row follows by its label.
const field = document.querySelector("#filter");
const parts = [...document.querySelectorAll("table.rows tbody tr, .dots .row, .legend li")];
const getLabel = (part) => (part.querySelector("td.fixed") || part).textContent.trim();
field.addEventListener("input", () => {
  const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
  const fits = (line) => words.every((word) => line.textContent.toLowerCase().includes(word));
  const lines = [...tables[0].tBodies[0].rows];
  const known = new Set(lines.map(getLabel));
  const found = new Set(lines.filter(fits).map(getLabel));
  for (const part of parts) part.hidden = known.has(getLabel(part)) && !found.has(getLabel(part));
  document.querySelector("#shown").textContent = words.length ? `${found.size} of ${lines.length} rows` : "";
});
document.querySelector("#tools").hidden = false;
