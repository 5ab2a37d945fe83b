"""How every page looks, and the script that sorts its tables: both go into the page itself."""

STYLE = """
:root { color-scheme: light; --ink: #1f2933; --muted: #52606d; --line: #e4e7eb; --soft: #f7f9fb; --accent: #1d5b9b; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0; background: #fff; color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; overflow-wrap: break-word; }
main { max-width: 1160px; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; }
.subtitle { color: var(--muted); margin: 0 0 1.2rem; max-width: 75ch; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.3rem; border-block: 1px solid var(--line); padding: .55rem 0;
  margin-bottom: 1.6rem; font-size: .92rem; }
a { color: var(--accent); text-decoration: none; } a:hover { text-decoration: underline; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 2.4rem 0 .6rem; }
p { max-width: 75ch; margin: .6rem 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: .8rem; margin: 1.2rem 0; }
.card { background: var(--soft); border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem; }
.card .label { color: var(--muted); font-size: .85rem; }
.card .value { font-size: 1.55rem; font-weight: 600; font-variant-numeric: tabular-nums; line-height: 1.35; }
.card .remark { color: var(--muted); font-size: .82rem; line-height: 1.4; }
.verdicts { list-style: none; margin: 1.2rem 0; padding: 0; border-top: 1px solid var(--line); }
.verdicts li { display: grid; grid-template-columns: 8.6rem 1fr; gap: .3rem 1rem; padding: .7rem 0;
  border-bottom: 1px solid var(--line); }
.verdicts .badge { justify-self: start; align-self: start; border: 1px solid; border-radius: 999px;
  padding: .1rem .65rem; font-size: .82rem; font-weight: 600; }
.verdicts .claim { font-weight: 600; } .verdicts .because { color: var(--muted); font-size: .92rem; }
.supported { color: #134a80; background: #e2eefa; }
.contradicted { color: #8f2d0c; background: #fdeadf; }
.undecided { color: #44505c; background: #eef1f4; }
figure { margin: 1.2rem 0; } figure img { max-width: 100%; height: auto; display: block; }
figcaption { color: var(--muted); font-size: .88rem; margin: .5rem 0; max-width: 90ch; }
.scroll { overflow-x: auto; position: relative; }
table { border-collapse: separate; border-spacing: 0; font-size: .88rem; font-variant-numeric: tabular-nums;
  min-width: 60%; }
th, td { padding: .38rem .6rem; vertical-align: top; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr { background: #fff; } tbody tr:hover { background: var(--soft); }
th:first-child { position: sticky; left: 0; z-index: 1; background: inherit; border-right: 1px solid var(--line); }
thead th { vertical-align: bottom; border-bottom: 2px solid var(--ink); font-weight: 600; }
tbody th { font-weight: 600; } td small { display: block; color: var(--muted); font-size: .78rem; }
thead button { all: unset; cursor: pointer; padding: .35rem 0; } thead button:hover { color: var(--accent); }
thead button:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
/* the arrow stands in the padding, so that no column changes its width */
thead button::after { content: "\\2195\\FE0E"; position: absolute; color: #9aa5b1; font-size: .7rem; font-weight: 400; }
thead [aria-sort=ascending] button::after { content: "\\25B2\\FE0E"; color: var(--accent); }
thead [aria-sort=descending] button::after { content: "\\25BC\\FE0E"; color: var(--accent); }
@media (scripting: none) { thead button { pointer-events: none; } thead button::after { content: none; } }
details { border: 1px solid var(--line); border-radius: 8px; padding: .6rem 1rem; margin: .8rem 0; }
summary { cursor: pointer; font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.2rem; font-size: .85rem; margin: .6rem 0; }
dt { color: var(--muted); overflow-wrap: anywhere; }
dd { margin: 0; overflow-wrap: anywhere; font-family: ui-monospace, Menlo, Consolas, monospace; }
@media (max-width: 640px) {
  main { padding: 1.4rem 1rem 3rem; } h1 { font-size: 1.5rem; }
  nav { gap: .1rem 1.1rem; } nav a { padding: .25rem 0; }
  .cards { grid-template-columns: 1fr; }
  .verdicts li { grid-template-columns: 1fr; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .4rem; }
  tbody th { max-width: 11rem; white-space: normal; font-size: .8rem; }
  /* a wide figure keeps readable letters and scrolls instead */
  figure img { max-width: none; }
}
@media print {
  nav { display: none; } main { max-width: none; padding: 0; } h2 { break-after: avoid; }
  figure, tr, thead, .card, .verdicts li { break-inside: avoid; } figure:has(table) { break-inside: auto; }
  figure img { max-width: 100%; max-height: 85vh; object-fit: contain; object-position: left top; }
  .scroll { overflow: visible; } table { font-size: .7rem; } td small { font-size: .66rem; }
  thead button { display: contents; } thead button::after { content: none; }
  th, td { padding: .2rem .3rem; white-space: normal; } th:first-child { position: static; border-right: 0; }
  .badge { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""

SCRIPT = """
// A click on a header sorts its column up, then down, then restores the order the table came in.
const next = { none: "ascending", ascending: "descending", descending: "none" };
const kind = key => key === "" ? 2 : isNaN(key) ? 1 : 0;  // numbers, then texts, then what is missing: up and down
const within = (a, b) => kind(a) ? a.localeCompare(b, "en", { numeric: true }) : a - b;

for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0], original = [...body.rows];
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const order = next[head.getAttribute("aria-sort")], sign = order === "descending" ? -1 : 1;
    const rows = [...original];
    if (order !== "none") rows.sort((p, q) => {
      const [a, b] = [p, q].map(row => row.cells[column].dataset.key);
      return kind(a) - kind(b) || sign * within(a, b);
    });
    body.append(...rows);
    for (const other of heads) other.setAttribute("aria-sort", other === head ? order : "none");
  }));
}
"""
