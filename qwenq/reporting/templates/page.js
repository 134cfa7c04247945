"use strict";
// Tables sort by a click or Enter on a heading: up, down, and back to the order of the report.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const original = Array.from(body.rows);
  const headings = Array.from(table.tHead.rows[0].cells);
  const key = (row, column) => {
    const text = row.cells[column].dataset.sort;
    const number = text === undefined || text === "" ? NaN : Number(text);
    return Number.isNaN(number) ? text : number;
  };
  const compare = (a, b) =>
    typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
  headings.forEach((heading, column) => {
    heading.firstElementChild.addEventListener("click", () => {
      const before = heading.getAttribute("aria-sort");
      const next = before === "ascending" ? "descending" : before === "descending" ? null : "ascending";
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      if (next === null) return body.append(...original);
      heading.setAttribute("aria-sort", next);
      const sign = next === "ascending" ? 1 : -1;
      const filled = original.filter((row) => key(row, column) !== undefined);
      const empty = original.filter((row) => key(row, column) === undefined); // last in either direction
      filled.sort((a, b) => sign * compare(key(a, column), key(b, column)));
      body.append(...filled, ...empty);
    });
  });
}
