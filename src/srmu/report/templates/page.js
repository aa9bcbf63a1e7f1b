"use strict";
const all = (selector, root = document) => [...root.querySelectorAll(selector)];

// ---- figures

const family = getComputedStyle(document.documentElement).fontFamily;
const axis = {
  fixedrange: true, zeroline: false, gridcolor: "rgba(128,136,144,.18)", linecolor: "rgba(128,136,144,.55)",
  ticks: "", automargin: true,
};
const base = {
  paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, dragmode: false,
  hovermode: "closest", font: {family, size: 12, color: "#808890"},
  hoverlabel: {align: "left", namelength: 0, font: {family, size: 13}},
  modebar: {bgcolor: "rgba(0,0,0,0)", color: "#808890", activecolor: "#808890"}, margin: {l: 8, r: 12, t: 12, b: 8},
};
const legend = {orientation: "h", traceorder: "normal", x: 0, y: 1.02, yanchor: "bottom", itemclick: false, itemdoubleclick: false};
// what is saved stands alone: its legend takes the place of the page's buttons
const save = ({data, layout}) => Plotly.downloadImage(
  {data: data.map(trace => ({...trace, showlegend: "name" in trace})), layout: {...layout, showlegend: data.length > 1}},
  {format: "svg", width: 820, height: 480, filename: document.title},
);
for (const script of all("script.figure")) {
  const {data, layout} = JSON.parse(script.textContent), plot = script.previousElementSibling;
  if (layout.images) { // a map, whose sizes are for a wide screen: dots shrink with the continents
    const shrink = Math.max(1, (960 / plot.clientWidth) ** 0.7);
    for (const {marker} of data) {
      marker.sizeref = shrink;
      marker.line.width = marker.line.width.map(width => width / shrink);
    }
    layout.legend.font = {size: shrink < 1.5 ? 15 : 12};
  }
  Plotly.newPlot(plot, data, {
    ...base, ...layout, legend: {...legend, ...layout.legend}, xaxis: {...axis, ...layout.xaxis}, yaxis: {...axis, ...layout.yaxis},
  }, {
    responsive: true, displaylogo: false,
    modeBarButtons: [[{name: "Save as SVG", icon: Plotly.Icons.camera, click: save}]],
  });
}
// paper is narrower than the screen: a drawing with a viewBox shrinks with its box, in shape
addEventListener("beforeprint", () => {
  for (const plot of all(".plot")) plot.style.setProperty("--shape", plot.clientWidth / plot.clientHeight);
  for (const svg of all(".main-svg")) svg.setAttribute("viewBox", `0 0 ${svg.clientWidth} ${svg.clientHeight}`);
});
addEventListener("afterprint", () => all(".main-svg").forEach(svg => svg.removeAttribute("viewBox")));

// ---- a click on a label hides it everywhere

const filter = document.getElementById("filter");
function show() {
  const shown = new Set(all("[aria-pressed=true]", filter).map(button => button.dataset.label));
  for (const element of all("[data-labels]"))
    element.hidden = !JSON.parse(element.dataset.labels).some(label => shown.has(label));
  for (const plot of all(".plot")) {
    const labelled = plot.data.flatMap((trace, i) => trace.legendgroup ? [i] : []);
    if (labelled.length)
      Plotly.restyle(plot, {visible: labelled.map(i => shown.has(plot.data[i].legendgroup))}, labelled);
  }
}
if (filter) {
  filter.hidden = false;
  filter.addEventListener("click", event => {
    const button = event.target.closest("button");
    if (!button) return;
    const one = button.dataset.label !== undefined;
    for (const other of one ? [button] : all("[aria-pressed]", filter))
      other.setAttribute("aria-pressed", one ? other.getAttribute("aria-pressed") !== "true" : button.dataset.all);
    show();
  });
}

// ---- a click on a head sorts its column, first the largest

function sort(table, column, up) {
  const body = table.tBodies[table.tBodies.length - 1];
  const value = row => {
    const cell = row.cells[column];
    return cell.dataset.sort === undefined ? cell.textContent.trim() : Number(cell.dataset.sort);
  };
  const compare = (a, b) => {
    const numbers = [a, b].map(item => typeof item === "number" && !Number.isNaN(item));
    if (numbers[0] !== numbers[1]) return numbers[0] ? -1 : 1; // what was not measured comes last
    return (up ? 1 : -1) * (numbers[0] ? a - b : String(b).localeCompare(String(a)));
  };
  body.append(...[...body.rows].sort((a, b) => compare(value(a), value(b))));
  all("thead th", table).forEach((head, i) => {
    if (i === column) head.setAttribute("aria-sort", up ? "ascending" : "descending");
    else head.removeAttribute("aria-sort");
  });
}
for (const table of all("table.sortable"))
  all("thead th", table).forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "sort";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => sort(table, column, head.getAttribute("aria-sort") === "descending"));
  });
