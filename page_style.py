"""How the report looks and what its keys do: the style sheet and the script that stand in the page itself.

Text only, no imports. Used by report_page.
"""

CSS = """
:root { color-scheme: light dark; --back: #fcfcfa; --text: #1c1c1a; --dim: #62625c; --line: #d9d8d2; --card: #fff;
  --accent: #0b62c4; --good: #1d7a33; --warn: #8a5a00; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --back: #161614; --text: #e9e8e3; --dim: #a3a29b; --line: #3a3a36;
  --card: #1f1f1c; --accent: #6cb0ff; --good: #6fd386; --warn: #e5b252; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 16px; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.35rem; margin: 0 0 4px; line-height: 1.3; } h2 { font-size: 1.1rem; margin: 0 0 8px; }
h3 { font-size: 1rem; margin: 14px 0 6px; } h4 { font-size: .85rem; margin: 0; font-weight: 600; }
section, header, footer { border-top: 1px solid var(--line); padding: 14px 0; } header { border: 0; }
p { margin: 4px 0 8px; max-width: 75ch; } .dim, figcaption, caption { color: var(--dim); }
small { color: var(--dim); white-space: nowrap; } code { font: 13px ui-monospace, "DejaVu Sans Mono", monospace; }
.facts { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 2px 14px; margin: 8px 0; }
.facts dt { color: var(--dim); } .facts dd { margin: 0; }
.strip { display: flex; flex-wrap: wrap; gap: 8px; margin: 0 0 10px; padding: 0; list-style: none; }
.chip { border: 1px solid var(--line); border-left: 5px solid; border-radius: 4px; padding: 4px 10px; max-width: 100%;
  background: var(--card); }
.red { border-left-color: var(--bad); } .amber { border-left-color: var(--warn); }
.green { border-left-color: var(--good); } .chip b { display: block; }
.problems { border-left: 5px solid var(--warn); padding-left: 12px; }
.scroll { overflow-x: auto; max-width: 100%; margin: 6px 0; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: 4px; }
th, td { padding: 3px 10px 3px 0; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top;
  white-space: nowrap; }
th:first-child, td.t, .words :last-child { text-align: left; }
tbody th { font-weight: 400; } thead th { border-bottom-width: 2px; }
.sort thead th { cursor: pointer; } .sort th[aria-sort=ascending]::after { content: " \\2191"; }
.sort th[aria-sort=descending]::after { content: " \\2193"; }
.tall { max-height: 460px; overflow-y: auto; } .tall thead th { position: sticky; top: 0; background: var(--back); }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(300px, 100%), 1fr)); gap: 14px; }
.curve svg { width: 100%; height: auto; display: block; font: 9px system-ui, sans-serif; }
svg text { fill: var(--text); } svg .dim { fill: var(--dim); } svg circle { fill: var(--accent); }
svg polyline { fill: none; stroke: var(--accent); stroke-width: 1.6; } svg .faint { opacity: .35; stroke-width: 1; }
svg .second { stroke: var(--text); } svg .axis { stroke: var(--line); }
svg .level { stroke: var(--dim); stroke-dasharray: 3 3; } svg .mark { stroke: var(--warn); stroke-dasharray: 1 3; }
svg .band { fill: var(--accent); opacity: .18; }
.grids { display: flex; flex-wrap: wrap; gap: 10px 14px; align-items: flex-start; margin: 6px 0; }
figure { margin: 0; max-width: 100%; } figcaption { font-size: .75rem; line-height: 1.3; max-width: 140px; }
.l { position: relative; display: inline-block; vertical-align: top; border: 1px solid #555; line-height: 0;
  background: #f4f4f0; }
.l img, .l canvas { image-rendering: pixelated; display: block; }
.l canvas { position: absolute; inset: 0; width: 100%; height: 100%; z-index: 1; image-rendering: auto; }
.l::after { content: ""; position: absolute; inset: 0; pointer-events: none;
  background: linear-gradient(90deg, #5559 1px, transparent 1px) 0 0 / var(--s) var(--s),
    linear-gradient(#5559 1px, transparent 1px) 0 0 / var(--s) var(--s); }
body:not(.digits) .l canvas { display: none; }
.pair { display: flex; gap: 4px; align-items: center; flex-wrap: wrap; } .leak .l { border: 3px solid var(--bad); }
.card { border: 1px solid var(--line); border-radius: 6px; padding: 8px 12px; margin: 8px 0; background: var(--card); }
.card:focus, summary:focus { outline: 3px solid var(--accent); outline-offset: 1px; }
.card h3 { margin: 0 0 2px; } summary { cursor: pointer; padding: 2px 0; }
.tools { position: sticky; top: 0; z-index: 5; background: var(--back); padding: 6px 0; display: flex; flex-wrap: wrap;
  gap: 6px 12px; align-items: center; border-bottom: 1px solid var(--line); }
.tools input[type=range] { flex: 1 1 160px; min-width: 100px; max-width: 420px; }
button, select { font: inherit; padding: 2px 10px; background: var(--card); color: var(--text);
  border: 1px solid var(--line); border-radius: 4px; } button[aria-pressed=true] { border-color: var(--accent); }
.no-js .js { display: none; } .yes { color: var(--good); } .no { color: var(--bad); } [hidden] { display: none; }
.key { display: inline-block; width: 12px; height: 12px; border: 1px solid #555; vertical-align: -2px; }
pre { white-space: pre-wrap; background: var(--card); border: 1px solid var(--line); padding: 8px; margin: 6px 0; }
"""

SCRIPT = r"""
"use strict";
document.body.classList.remove("no-js");
const all = (s, e = document) => [...e.querySelectorAll(s)];
const data = JSON.parse(document.getElementById("data").textContent);

// Digits: drawn over a grid once it is seen; what a pixel stands for is told by its colour.
const near = (table, r, g, b) => table.reduce((best, c, i) => {
  const d = (c[0] - r) ** 2 + (c[1] - g) ** 2 + (c[2] - b) ** 2;
  return d < best[0] ? [d, i] : best; }, [1e9, 0])[1];
function fit(img, least) {
  const w = img.naturalWidth, h = img.naturalHeight, side = img.dataset.side || data.side;
  const c = Math.max(least, Math.min(18, Math.floor(side / Math.max(w, h))));
  img.width = w * c; img.height = h * c; img.parentNode.style.setProperty("--s", c + "px");
  return c;
}
function overlay(img) {
  if (!img.complete || !img.naturalWidth) { img.addEventListener("load", () => overlay(img), {once: true}); return; }
  img.dataset.side = img.dataset.side || Math.max(img.width, img.height);
  const box = img.parentNode, c = fit(img, 9), w = img.naturalWidth, h = img.naturalHeight;
  all("canvas", box).forEach(e => e.remove());
  const read = document.createElement("canvas"); read.width = w; read.height = h;
  const from = read.getContext("2d"); from.drawImage(img, 0, 0);
  const pixels = from.getImageData(0, 0, w, h).data, marks = img.dataset.marks;
  const shown = document.createElement("canvas"), scale = 2;
  shown.width = w * c * scale; shown.height = h * c * scale; shown.setAttribute("aria-hidden", "true");
  const to = shown.getContext("2d"); to.font = Math.round(c * scale * .72) + "px sans-serif";
  to.textAlign = "center"; to.textBaseline = "middle";
  for (let y = 0; y < h; y++) for (let x = 0; x < w; x++) {
    const [r, g, b, a] = pixels.slice(4 * (y * w + x), 4 * (y * w + x) + 4);
    const i = near(marks ? data.marks : data.palette, r, g, b);
    const light = ((r * 3 + g * 6 + b) / 10 * a + 240 * (255 - a)) / 255;
    to.fillStyle = marks || light > 120 ? "#000" : "#fff";
    to.fillText(marks ? data.signs[i] : i, (x + .5) * c * scale, (y + .54) * c * scale);
  }
  box.append(shown);
}
const seen = new IntersectionObserver(found => found.forEach(e => {
  if (e.isIntersecting) { seen.unobserve(e.target); overlay(e.target); } }));
function digits() {
  const on = document.body.classList.toggle("digits");
  all("button.digit").forEach(b => b.setAttribute("aria-pressed", on));
  all(".l img").forEach(img => {
    if (on) { seen.observe(img); return; }
    seen.unobserve(img);
    if (img.dataset.side) fit(img, 3);
  });
}
all("button.digit").forEach(b => b.addEventListener("click", digits));

// The epoch slider: the same outputs as they were after each validation.
const slider = document.getElementById("epoch");
function show(place) {
  document.getElementById("which").textContent = "epoch " + data.epochs[place];
  all(".card[data-card]").forEach(card => {
    const frame = data.frames[place][card.dataset.card];
    card.classList.toggle("dim", !frame);
    if (!frame) return;
    all("img[data-slot]", card).forEach((img, i) => {
      const figure = img.closest("figure"); figure.hidden = i >= frame[1].length;
      if (figure.hidden) return;
      img.addEventListener("load", () => { fit(img, 3); if (document.body.classList.contains("digits")) overlay(img); },
        {once: true});
      img.src = "data:image/png;base64," + data.images[frame[1][i]];
      figure.querySelector("figcaption").textContent = frame[2][i];
    });
    card.querySelector(".said").textContent = frame[0];
  });
}
if (slider) slider.addEventListener("input", () => show(+slider.value));

// Sorting: numbers as numbers, what has none last.
all("table.sort").forEach(table => {
  const heads = all("thead th", table), body = table.tBodies[0];
  const sort = (i) => {
    const down = heads[i].getAttribute("aria-sort") === "ascending";
    heads.forEach(h => h.removeAttribute("aria-sort"));
    heads[i].setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = row => { const text = row.cells[i].dataset.v ?? row.cells[i].textContent.trim();
      return text === "" || text === "\u2013" ? null : isNaN(text) ? text : +text; };
    const rows = [...body.rows].map(row => [value(row), row]);
    rows.sort(([a], [b]) => a === null ? (b === null ? 0 : 1) : b === null ? -1 :
      (typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === "number" ? -1 : 1) * (down ? -1 : 1));
    body.append(...rows.map(([, row]) => row));
  };
  heads.forEach((head, i) => { head.tabIndex = 0; head.addEventListener("click", () => sort(i));
    head.addEventListener("keydown", e => {
      if (e.key === "Enter" || e.key === " ") { e.preventDefault(); sort(i); }
    });
  });
});
all("button.csv").forEach(button => button.addEventListener("click", () => {
  const rows = all("tr", document.getElementById(button.dataset.of));
  const cell = c => '"' + (c.dataset.v ?? c.textContent).replaceAll('"', '""') + '"';
  const url = URL.createObjectURL(new Blob([rows.map(r => [...r.cells].map(cell).join(",")).join("\n") + "\n"]));
  const link = document.createElement("a"); link.href = url; link.download = "outputs.csv"; link.click();
  URL.revokeObjectURL(url);
}));

// Filters, and j / k from task to task.
all("select.filter").forEach(select => select.addEventListener("change", () => {
  let left = 0;
  all(select.dataset.of).forEach(e => { e.hidden = select.value && !e.dataset.kinds.split(" ").includes(select.value);
    left += !e.hidden; });
  document.getElementById("left").textContent = left + " shown";
}));
let at = null;
function move(step) {
  const stops = all("[data-stop]").filter(e => !e.hidden);
  if (!stops.length) return;
  let i = stops.indexOf(at);
  if (i < 0) {
    i = stops.findIndex(e => e.getBoundingClientRect().top > 60);
    i = i < 0 ? stops.length - 1 : step > 0 ? i : i - 1;
  } else i += step;
  at = stops[Math.max(0, Math.min(stops.length - 1, i))];
  if (at.tagName === "DETAILS") at.open = true;
  const target = at.tagName === "DETAILS" ? at.querySelector("summary") : at;
  target.focus({preventScroll: true}); at.scrollIntoView({block: "start"}); window.scrollBy(0, -56);
}
document.addEventListener("keydown", e => {
  if (e.ctrlKey || e.metaKey || e.altKey || /INPUT|SELECT|TEXTAREA/.test(e.target.tagName)) return;
  if (e.key === "j") move(1); else if (e.key === "k") move(-1); else if (e.key === "d") digits();
});
"""
