"use strict";
// Draws the charts in the colours of the page, light or dark, and sorts a table by a click.
// The script uses no network and no storage.

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

// A name as lines of at most `most` characters, broken after a separator where there is one. The
// name is escaped: an entity such as &lt; is one character.
function inLines(name, most) {
  const some = `(?:&#?\\w+;|.){1,${most}}`;
  const lines = name.match(new RegExp(`${some}$|${some}(?<=[-/_.,: ])|${some}`, "gu"));
  return (lines || []).join("<br>");
}

// How many lines the names take above a chart, which grows by them: the plot keeps its height.
function legendLines(names, width) {
  const lines = names.map((name) => (name || "").split("<br>"));
  const longest = Math.max(...lines.flat().map((line) => line.length));
  const besides = Math.max(1, Math.floor(width / (45 + 8 * longest)));
  return besides > 1 ? Math.ceil(names.length / besides) : lines.flat().length;
}

function dressTrace(trace, most) {
  const part = trace.meta.colour;
  const shade = part === "level" ? colour("muted") : colour(`series-${part % 8}`);
  return {
    ...trace,
    name: inLines(trace.name, most),
    line: { ...trace.line, color: shade },
    marker: { ...trace.marker, color: shade, line: { width: 0 } },
    error_y: { ...trace.error_y, color: shade, thickness: 1 },
  };
}

function dressAxis(axis) {
  return {
    ...axis,
    automargin: true,
    fixedrange: true,
    gridcolor: colour("line"),
    zerolinecolor: colour("line"),
    linecolor: colour("line"),
    title: { ...(axis || {}).title, standoff: 12, font: { color: colour("muted"), size: 13 } },
    tickfont: { color: colour("muted") },
  };
}

// Paper is narrower than most windows, and a browser does not say how wide it is: 640 pixels fit on
// A4 and on letter. A character of a name takes at most 8 pixels, and the mark before it takes 45.
function draw(box) {
  const width = matchMedia("print").matches ? Math.min(640, box.clientWidth) : box.clientWidth;
  const most = Math.max(8, Math.floor((width - 45) / 8));
  const figure = JSON.parse(document.getElementById(`${box.id}-figure`).textContent);
  const layout = {
    ...figure.layout,
    width,
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: colour("ink") },
    margin: { l: 8, r: 8, t: 8, b: 8 },
    legend: { orientation: "h", x: 0, xanchor: "left", y: 1.03, yanchor: "bottom", font: { color: colour("ink") } },
    hoverlabel: { bgcolor: colour("surface"), bordercolor: colour("line"), font: { color: colour("ink") } },
    xaxis: dressAxis(figure.layout.xaxis),
    yaxis: dressAxis(figure.layout.yaxis),
  };
  const traces = figure.data.map((trace) => dressTrace(trace, most));
  layout.height += 19 * legendLines(traces.map((trace) => trace.name), width);
  return Plotly.react(box, traces, layout, { displayModeBar: false });
}

function valueOf(row, column) {
  const text = row.cells[column].dataset.value;
  return text === undefined ? null : text;
}

function compare(left, right, numeric) {
  if (left === null || right === null) return (left === null) - (right === null); // missing figures go last
  return numeric ? Number(left) - Number(right) : left.localeCompare(right, undefined, { numeric: true });
}

function sort(header) {
  const table = header.closest("table");
  const column = header.cellIndex;
  const numeric = header.classList.contains("number");
  const down = header.getAttribute("aria-sort") === "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", down ? "descending" : "ascending");
  const body = table.tBodies[0];
  const rows = Array.from(body.rows);
  rows.sort((a, b) => {
    const left = valueOf(a, column);
    const right = valueOf(b, column);
    const order = compare(left, right, numeric);
    return down && left !== null && right !== null ? -order : order;
  });
  body.append(...rows);
}

for (const header of document.querySelectorAll("thead th")) {
  const button = document.createElement("button");
  button.type = "button";
  button.append(...header.childNodes);
  button.addEventListener("click", () => sort(header));
  header.append(button);
}

// The page holds the plotting library compressed, because it is most of the page.
async function loadLibrary() {
  const packed = document.getElementById("plotly");
  if (packed === null) return;
  const bytes = Uint8Array.from(atob(packed.textContent), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
}

// A chart in a closed fold has no width yet. It is drawn when its fold opens.
const charts = Array.from(document.querySelectorAll(".chart"));
const drawAll = () => Promise.all(charts.filter((box) => box.closest("details:not([open])") === null).map(draw));
loadLibrary().then(() => {
  // A page in dark colours is printed in light ones.
  for (const medium of ["(prefers-color-scheme: dark)", "print"]) matchMedia(medium).addEventListener("change", drawAll);
  addEventListener("resize", drawAll);
  for (const fold of document.querySelectorAll("details")) fold.addEventListener("toggle", drawAll);
  return drawAll();
}).then(() => document.documentElement.setAttribute("data-charts", String(charts.length)));
